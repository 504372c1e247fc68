"""DPoP keys and proofs: test vectors of the RFCs, a second library, and one key for all processes."""

from __future__ import annotations

import asyncio
import itertools
import json
import pickle
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from joserfc.jwk import ECKey

from support import dpop_jobs, store_jobs
from support.broken_backends import Fault
from support.frame_walk import Walk
from support.proofs import claims_of, key_in
from support.value_jobs import InsertThatReadsThenPuts
from support.workers import Team
from tokenstore import ConfigurationError, InvalidInputError, Keyring, TamperedError, open_store
from tokenstore.integrations._nonces import Nonces
from tokenstore.integrations.dpop import DPoP, DPoPKey
from tokenstore.testing.provider.dpop import ProofRefused, Proofs

# The key of RFC 7515, appendix A.3.
JWK: dict[str, Any] = {
    "kty": "EC",
    "crv": "P-256",
    "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
    "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
    "d": "jpsQnnGQmL-YBIffH1136cspYG6-0iY7X1fCE9-E9LI",
}
# RFC 9449: the proof of figure 2, the thumbprint of its key in figure 9, and the access token of figure 12.
PROOF = (
    "eyJ0eXAiOiJkcG9wK2p3dCIsImFsZyI6IkVTMjU2IiwiandrIjp7Imt0eSI6IkVDIiwieCI6Imw4dEZyaHgtMzR0VjNoUklDUkRZOXpDa0RscEJoRj"
    "QyVVFVZldWQVdCRnMiLCJ5IjoiOVZFNGpmX09rX282NHpiVFRsY3VOSmFqSG10NnY5VERWclUwQ2R2R1JEQSIsImNydiI6IlAtMjU2In19."
    "eyJqdGkiOiItQndDM0VTYzZhY2MybFRjIiwiaHRtIjoiUE9TVCIsImh0dSI6Imh0dHBzOi8vc2VydmVyLmV4YW1wbGUuY29tL3Rva2VuIiwiaWF0Ij"
    "oxNTYyMjYyNjE2fQ."
    "2-GxA6T8lP4vfrg8v-FdWP0A0zdrj8igiMLvqRMUvwnQg4PtFLbdLXiOSsX0x7NVY-FNyJK70nfbV37xRZT3Lg"
)
THUMBPRINT = "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I"
ACCESS_TOKEN, ATH = "Kz~8mXK1EalYznwH-LC-1fBAo.4Ljp~zsPE_NeO.gxU", "fUHyO2r2Z3DZ53EsNrWBb0xWXoaNy59IiKCAqksmQEo"
URL = "https://server.example.com/token"


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    team = Team()
    yield team
    team.close()


# -- proofs ----------------------------------------------------------------------------------------


def test_the_provider_accepts_the_proof_of_the_rfc() -> None:
    proofs = Proofs(lambda: 1562262616.0)
    assert proofs.check(PROOF, "POST", URL) == THUMBPRINT
    with pytest.raises(ProofRefused, match="used before"):
        proofs.check(PROOF, "POST", URL)


def test_a_second_library_verifies_our_proofs() -> None:
    key = DPoPKey.from_jwk(JWK)
    proof = key.proof("POST", URL, access_token=ACCESS_TOKEN, nonce="n-1")
    claims = claims_of(proof)
    assert abs(claims.pop("iat") - time.time()) < 5
    assert len(claims.pop("jti")) >= 16
    assert claims == {"htm": "POST", "htu": URL, "ath": ATH, "nonce": "n-1"}
    assert key_in(proof).thumbprint() == ECKey.import_key(dict(JWK)).thumbprint() == key.thumbprint
    assert claims_of(key.proof("GET", URL)).keys() == {"jti", "htm", "htu", "iat"}
    assert Proofs(time.time).check(key.proof("GET", URL), "GET", URL) == key.thumbprint


def test_an_access_token_that_cannot_be_encoded_is_not_shown() -> None:
    with pytest.raises(InvalidInputError, match="access_token") as caught:
        DPoPKey.generate().proof("GET", URL, access_token="s3cret\ud800")
    Walk(["s3cret"]).through(caught.value, "a surrogate")


def test_no_two_proofs_have_the_same_jti() -> None:
    key = DPoPKey.generate()
    assert len({claims_of(key.proof("GET", URL))["jti"] for _ in range(200)}) == 200


@pytest.mark.parametrize(
    ("url", "htu"),
    [
        ("https://API.example.com:443/a%20b/?q=1#f", "https://api.example.com/a%20b/"),
        ("https://api.example.com", "https://api.example.com/"),
        ("http://user:secret@[::1]:8080/x", "http://[::1]:8080/x"),
        ("http://localhost:80?x", "http://localhost/"),
    ],
)
def test_the_url_of_a_proof_has_one_spelling(url: str, htu: str) -> None:
    assert claims_of(DPoPKey.generate().proof("GET", url))["htu"] == htu


@pytest.mark.parametrize("url", ["", "/path", "ftp://a/b", "https://", "https://u:s3cret@:443/", "https://[s3cret/"])
def test_a_proof_needs_the_url_of_a_server(url: str) -> None:
    with pytest.raises(ConfigurationError, match="http or https URL") as caught:
        DPoPKey.generate().proof("GET", url)
    assert "s3cret" not in repr(caught.value)


# -- keys ------------------------------------------------------------------------------------------


def test_a_key_is_stored_whole_and_shown_by_its_thumbprint() -> None:
    key = DPoPKey.from_jwk(JWK)
    assert key.to_jwk() == JWK
    assert DPoPKey.from_jwk(DPoPKey.generate().to_jwk()).thumbprint != key.thumbprint
    assert repr(key) == f"<DPoPKey {key.thumbprint}>"
    assert JWK["d"] not in repr(vars(key))
    with pytest.raises(TypeError):  # it does not leave the process by accident
        pickle.dumps(key)


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        [],
        {},
        {**JWK, "d": "?"},
        {**JWK, "d": 7},
        {**JWK, "x": JWK["y"]},
        {**JWK, "kid": "1"},
        {**JWK, "d": ""},
    ],
)
def test_another_value_is_no_key(value: object) -> None:
    with pytest.raises(TamperedError, match="another program") as caught:
        DPoPKey.from_jwk(value)
    Walk([JWK["d"]]).through(caught.value, "no key")


def test_each_connection_has_a_key_which_survives_a_restart(keyring: Keyring, tmp_path: Path) -> None:
    async def main() -> None:
        url, dpop = f"sqlite:///{tmp_path}/keys.db", DPoP()
        async with open_store(url, keyring=keyring) as store:
            await store.setup()
            rows = [("a", "u", ""), ("a", "u", "x"), ("a", "v", ""), ("b", "u", "")]
            keys = [await dpop.key(store, provider, user, account=account) for provider, user, account in rows]
            assert len({key.thumbprint for key in keys}) == 4
            shared = DPoP(shared=True)
            together = [await shared.key(store, provider, user, account=account) for provider, user, account in rows]
            assert len({key.thumbprint for key in (*keys, *together)}) == 4 + 2
            entries = [entry async for entry in store.list_values()]
        assert {entry["namespace"] for entry in entries} == {"dpop"}
        async with open_store(url, keyring=keyring) as store:
            again = [await DPoP().key(store, provider, user, account=account) for provider, user, account in rows]
            assert [key.thumbprint for key in again] == [key.thumbprint for key in keys]
            assert await dpop.delete_key(store, "a", "u", account="x") is True
            assert await dpop.delete_key(store, "a", "u", account="x") is False
            assert (await dpop.key(store, "a", "u", account="x")).thumbprint != keys[1].thumbprint
        at_rest = (tmp_path / "keys.db").read_bytes()
        assert not any(key.to_jwk()["d"].encode() in at_rest for key in keys)
        assert json.dumps(["a", "u", ""]).encode() not in at_rest

    asyncio.run(main())


def test_a_value_of_another_program_is_no_key(keyring: Keyring) -> None:
    async def main() -> None:
        async with open_store("memory://", keyring=keyring) as store:
            await store.setup()
            dpop = DPoP()
            key = await dpop.key(store, "a", "u")
            [entry] = [entry async for entry in store.list_values(namespace="dpop")]
            await store.put_value("dpop", entry["name"], {**key.to_jwk(), "crv": "P-384"})
            with pytest.raises(TamperedError) as caught:
                await dpop.key(store, "a", "u")
            Walk([key.to_jwk()["d"]]).through(caught.value, "another curve")
            with pytest.raises(InvalidInputError, match="user_id"):
                await dpop.key(store, "a", "")

    asyncio.run(main())


# -- many callers at once --------------------------------------------------------------------------


def test_stores_that_make_a_key_at_once_get_the_same_one(keyring: Keyring, tmp_path: Path) -> None:
    async def main() -> None:
        url = f"sqlite:///{tmp_path}/keys.db"
        stores = [open_store(url, keyring=keyring) for _ in range(8)]
        await stores[0].setup()
        for user in map(str, range(10)):
            keys = await asyncio.gather(*(DPoP().key(store, "a", user) for store in stores for _ in range(3)))
            assert len({key.thumbprint for key in keys}) == 1
        for store in stores:
            await store.aclose()

    asyncio.run(main())


def _made(ready: str, team: Team, users: list[str], fault: Fault | None = None) -> set[tuple[str, ...]]:
    """Let 8 processes make the keys of these users at once; return what each process got for each user."""
    return {tuple(found) for found in team.all_at_once(dpop_jobs.make_keys, ready, users, fault, count=8)}


@pytest.mark.sqlite
def test_processes_that_make_a_key_at_once_get_the_same_one(tmp_path: Path, team: Team) -> None:
    url = f"sqlite:///{tmp_path}/keys.db"
    team[0].call(store_jobs.set_up, url)
    [thumbprints] = _made(url, team, [f"user-{number}" for number in range(20)])
    assert len(set(thumbprints)) == 20


@pytest.mark.sqlite
def test_the_race_finds_a_store_that_reads_and_then_puts(tmp_path: Path, team: Team) -> None:
    """Otherwise it would prove nothing."""
    url = f"sqlite:///{tmp_path}/keys.db"
    team[0].call(store_jobs.set_up, url)
    for round_number in itertools.count():
        if len(_made(url, team, [f"{round_number}-{number}" for number in range(20)], InsertThatReadsThenPuts())) > 1:
            break
        assert round_number < 10, "the race did not find the fault"


# -- nonces ----------------------------------------------------------------------------------------


def test_the_last_nonce_of_each_origin_is_kept() -> None:
    nonces = Nonces()
    assert nonces.last(URL) is None
    assert nonces.note(URL, ["n-1"]) is True
    assert nonces.note("https://other.example.com/", ["n-2"]) is True
    for refused in ([], [""], ["a b"], ['"'], ["n-3", "n-4"], ["é"], ["x" * 5000]):
        assert nonces.note(URL, refused) is False
    assert nonces.last("https://SERVER.example.com:443/other?x") == "n-1"
    assert nonces.last("http://server.example.com/") is None
    for number in range(1000):
        nonces.note(f"https://{sha256(str(number).encode()).hexdigest()}.example", ["n"])
    assert len(nonces._last) <= 256
