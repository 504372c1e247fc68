"""The strict provider: DPoP proofs (RFC 9449) are checked completely, and tokens are bound to their key."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from joserfc import jwt
from joserfc.jwk import ECKey, OctKey

from support.provider_requests import authorize, outcome, redirected
from tokenstore.testing.provider import StrictRotatingProvider
from tokenstore.testing.provider.dpop import NonceNeeded, ProofRefused, Proofs

URL = "https://server.example.com/token"
KEY = ECKey.generate_key("P-256")
NOW = 1_700_000_000.0


def _proof(header: dict[str, Any] | None = None, *, key: Any = KEY, **claims: Any) -> str:
    """A proof for a POST to the URL, with these members changed; None leaves a member out."""
    members = {"typ": "dpop+jwt", "alg": "ES256", "jwk": KEY.as_dict(private=False), **(header or {})}
    members["jwk"] = {name: value for name, value in members["jwk"].items() if name != "kid"}
    given = {"jti": "j" * 16, "htm": "POST", "htu": URL, "iat": int(NOW), **claims}
    given = {name: value for name, value in given.items() if value is not None}
    return jwt.encode(members, given, key, algorithms=["ES256", "HS256"])


@pytest.mark.parametrize(
    ("proof", "why"),
    [
        (lambda: "", "compact"),
        (lambda: "a.b", "compact"),
        (lambda: "!.!.!", "compact"),
        (lambda: "e30.e30.e30", "typ"),
        (lambda: "W10.e30.e30", "JSON object"),
        (lambda: "abcde.e30.e30", "base64url"),
        (lambda: _proof({"typ": "JWT"}), "typ"),
        (lambda: _proof({"alg": "HS256"}, key=OctKey.generate_key(256)), "alg"),
        (lambda: _proof({"jwk": KEY.as_dict(private=True)}), "jwk"),
        (lambda: _proof({"jwk": {**KEY.as_dict(private=False), "crv": "P-384"}}), "curve"),
        (lambda: _proof({"jwk": ECKey.generate_key("P-256").as_dict(private=False)}), "signature"),
        (lambda: _proof({"jwk": {**KEY.as_dict(private=False), "x": "AAAA"}}), "signature"),
        (lambda: _proof({"kid": "k1"}), "other members"),
        (lambda: _proof().rpartition(".")[0] + ".AAAA", "64 bytes"),
        (lambda: _proof()[:-8] + "AAAAAAAA", "signature"),
        (lambda: _proof(jti=None), "jti"),
        (lambda: _proof(jti="short"), "jti"),
        (lambda: _proof(htm="GET"), "htm"),
        (lambda: _proof(htm=None), "htm"),
        (lambda: _proof(htu=f"{URL}?a=1"), "htu"),
        (lambda: _proof(htu="https://other.example.com/token"), "htu"),
        (lambda: _proof(iat=int(NOW) - 61), "iat"),
        (lambda: _proof(iat=int(NOW) + 6), "iat"),
        (lambda: _proof(iat=str(int(NOW))), "iat"),
        (lambda: _proof(iat=None), "iat"),
        (lambda: _proof(ath="x"), "ath"),
    ],
)
def test_a_proof_with_one_fault_is_refused(proof: Callable[[], str], why: str) -> None:
    proofs = Proofs(lambda: NOW)
    with pytest.raises(ProofRefused, match=why):
        proofs.check(proof(), "POST", URL)
    assert proofs.check(_proof(), "POST", URL) == KEY.thumbprint()


def test_a_proof_works_once_for_its_access_token_and_with_the_nonce() -> None:
    now = [NOW]
    proofs = Proofs(lambda: now[0])
    with pytest.raises(ProofRefused, match="ath"):
        proofs.check(_proof(), "POST", URL, access_token="at")
    with pytest.raises(ProofRefused, match="ath"):
        proofs.check(_proof(ath="fUHyO2r2Z3DZ53EsNrWBb0xWXoaNy59IiKCAqksmQEo"), "POST", URL, access_token="at")
    for nonce in (None, "other"):
        with pytest.raises(NonceNeeded):
            proofs.check(_proof(jti=f"0123456789abcdef{nonce}", nonce=nonce), "POST", URL, demands_nonce=True)
    first = proofs.nonce
    proofs.check(_proof(jti="0" * 16, nonce=first), "POST", URL, demands_nonce=True)
    proofs.renew_nonce()
    with pytest.raises(NonceNeeded):
        proofs.check(_proof(jti="1" * 16, nonce=first), "POST", URL, demands_nonce=True)
    for second in (0, 59):
        now[0] = NOW + second
        with pytest.raises(ProofRefused, match="used before"):
            proofs.check(_proof(jti="0" * 16), "POST", URL)
    now[0] = NOW + 1000
    proofs.check(_proof(iat=int(now[0])), "POST", URL)
    assert len(proofs._seen) == 1  # those of expired proofs are forgotten


def test_a_proof_binds_the_tokens_that_are_issued(provider: StrictRotatingProvider, http: httpx.Client) -> None:
    """Those of a user, of the client itself, and in exchange for others. A proof upgrades a grant without a key."""
    token_url, resource_url = provider.token_url, provider.resource_url

    def headers(url: str, **claims: Any) -> dict[str, str]:
        jti = f"jti-{time.monotonic_ns():032}"
        return {"DPoP": _proof(jti=jti, htu=url, iat=int(provider._grants.clock()), **claims)}

    plain = provider.new_grant("alice")
    form = {"grant_type": "refresh_token", "refresh_token": plain["refresh_token"]}
    bound = http.post("/token", data=form, headers=headers(token_url)).json()
    exchange = {
        "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
        "subject_token_type": "urn:ietf:params:oauth:token-type:access_token",
        "subject_token": bound["access_token"],
    }
    issued = [
        bound,
        http.post("/token", data={"grant_type": "client_credentials"}, headers=headers(token_url)).json(),
        http.post("/token", data=exchange, headers=headers(token_url)).json(),
    ]
    assert [tokens["token_type"] for tokens in (plain, *issued)] == ["Bearer", "DPoP", "DPoP", "DPoP"]
    for tokens in issued:
        authorization = {"Authorization": f"Bearer {tokens['access_token']}"}
        assert outcome(http.get("/resource", headers=authorization, auth=None)) == (401, "invalid_token")
    without = {"grant_type": "refresh_token", "refresh_token": bound["refresh_token"]}
    assert outcome(http.post("/token", data=without)) == (400, "invalid_grant")
    assert http.post("/token", data=without, headers=headers(token_url)).status_code == 200
    twice = [("DPoP", headers(token_url)["DPoP"]), ("DPoP", headers(token_url)["DPoP"])]
    assert outcome(http.post("/token", data=without, headers=twice)) == (400, "invalid_request")
    unbound = {"Authorization": f"DPoP {provider.new_grant('bob')['access_token']}", **headers(resource_url)}
    refused = http.get("/resource", headers=unbound, auth=None)
    assert outcome(refused) == (401, "invalid_dpop_proof")  # without the access token's digest
    assert 'DPoP realm="tokenstore.testing", error="invalid_dpop_proof", algs="ES256"' in refused.headers.values()


def test_the_thumbprint_in_an_authorization_request_is_checked(http: httpx.Client) -> None:
    answered = redirected(authorize(http, dpop_jkt="not a thumbprint"))
    assert (answered["error"], answered["state"]) == ("invalid_request", "s t&1")
    assert "code" in redirected(authorize(http, dpop_jkt=KEY.thumbprint()))
