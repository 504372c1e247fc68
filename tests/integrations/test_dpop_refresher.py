"""Refreshes and logins with DPoP proofs (RFC 9449), over HTTP against a provider that checks every proof."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from joserfc.jwk import ECKey

from support.frame_walk import Walk
from support.oauth2_calls import GOOD, ID, SECRET, record
from support.proofs import claims_of
from support.provider_requests import CALLBACK, VERIFIER, authorize, redirected
from support.scripted_endpoint import Endpoint, answer
from tokenstore import (
    AuthTokenStore,
    ConfigurationError,
    Keyring,
    ProviderRefusedError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    TamperedError,
    open_store,
)
from tokenstore.integrations.authlib import AsyncStoreOAuth2Client
from tokenstore.integrations.dpop import DPoP, DPoPKey
from tokenstore.integrations.httpx import StoreAuth
from tokenstore.integrations.machine import ClientCredentials, JWTBearer, TokenExchange
from tokenstore.integrations.oauth2 import OAuth2Refresher
from tokenstore.testing.provider import StrictRotatingProvider


@pytest.fixture
def provider() -> Iterator[StrictRotatingProvider]:
    with StrictRotatingProvider(client_id=ID, client_secret=SECRET) as provider:
        yield provider


def _run(work: Callable[[AuthTokenStore, DPoP], Any], url: str, keyring: Keyring, dpop: DPoP | None = None) -> Any:
    """Do something with a store whose refresher calls this token endpoint with proofs."""
    dpop = dpop or DPoP()

    async def main() -> Any:
        refresher = OAuth2Refresher(url, ID, SECRET, dpop=dpop)
        async with open_store("memory://", keyring=keyring, refreshers={"acme": refresher}, force_min_age=0) as store:
            await store.setup()
            return await work(store, dpop)

    return asyncio.run(main())


async def _log_in(store: AuthTokenStore, dpop: DPoP, provider: StrictRotatingProvider) -> dict[str, Any]:
    key = await dpop.key(store, "acme", "u1")
    tokens = provider.new_grant("u1", dpop_jkt=key.thumbprint)
    await store.store_token_response("acme", "u1", tokens)
    return tokens


def _force(store: AuthTokenStore) -> Any:
    return store.load_fresh_tokens("acme", "u1", force=True, missing="raise")


@pytest.mark.parametrize("demands_nonces", [False, True])
def test_a_refresh_has_a_proof_and_gets_bound_tokens(
    provider: StrictRotatingProvider, keyring: Keyring, demands_nonces: bool
) -> None:
    """The nonce is kept for the next refresh: the first one alone takes two requests."""
    provider.demands_nonces = demands_nonces

    async def work(store: AuthTokenStore, dpop: DPoP) -> None:
        await _log_in(store, dpop, provider)
        for _ in range(3):
            refreshed = await _force(store)
            assert refreshed["extra"]["token_type"] == "DPoP"
        assert provider.stats().refreshes == 3
        assert provider.stats().requests == 3 + demands_nonces
        provider.renew_nonces()
        await _force(store)
        assert provider.stats().requests == 4 + 2 * demands_nonces

    _run(work, provider.token_url, keyring)
    assert provider.stats().reuses == 0


def test_a_refusal_for_the_nonce_is_repeated_at_once_and_once(endpoint: Endpoint, keyring: Keyring) -> None:
    """With the same refresh token, which such a refusal does not consume, although the rotation is strict."""
    refused = answer({"error": "use_dpop_nonce"}, 400, DPoP_Nonce="n-1")
    endpoint.script(refused, answer({**GOOD, "token_type": "DPoP"}, DPoP_Nonce="n-2"))

    async def work(store: AuthTokenStore, dpop: DPoP) -> None:
        await store.store_tokens("acme", "u1", "at", "rt", None)
        await _force(store)
        first, second = endpoint.received
        assert first.form == second.form == {"grant_type": "refresh_token", "refresh_token": "rt"}
        proofs = [claims_of(one.headers["dpop"]) for one in (first, second)]
        assert [proof.get("nonce") for proof in proofs] == [None, "n-1"]
        assert {(proof["htm"], proof["htu"]) for proof in proofs} == {("POST", endpoint.url)}
        assert proofs[0]["jti"] != proofs[1]["jti"]
        assert dpop.token_nonces.last(endpoint.url) == "n-2"  # of the answer with the tokens
        assert dpop.resource_nonces.last(endpoint.url) is None
        for never in (refused, answer({"error": "use_dpop_nonce"}, 400)):
            endpoint.script(never)
            await store.store_tokens("acme", "u1", "at", "rt", None)
            with pytest.raises(ProviderRefusedError) as caught:
                await _force(store)
            assert caught.value.code == "use_dpop_nonce"
            assert len(endpoint.received) == (2 if never is refused else 1)

    _run(work, endpoint.url, keyring)


def test_an_outage_after_the_nonce_is_no_answer_of_the_first_request(endpoint: Endpoint, keyring: Keyring) -> None:
    """The second request may have consumed the refresh token, so that its result is unknown, and it is not repeated."""
    endpoint.script(answer({"error": "use_dpop_nonce"}, 400, DPoP_Nonce="n-1"), lambda _: None)

    async def work(store: AuthTokenStore, _: DPoP) -> None:
        await store.store_tokens("acme", "u1", "at", "rt", None)
        with pytest.raises(ProviderUnavailableError) as caught:
            await _force(store)
        assert caught.value.code == "network_error"
        assert len(endpoint.received) == 2

    _run(work, endpoint.url, keyring)


def test_a_token_type_of_bearer_is_stored_as_it_is(provider: StrictRotatingProvider, keyring: Keyring) -> None:
    """The refresh token is bound to the key even so. The adapters refuse to send the access token."""
    provider.binds_access_tokens = False

    async def work(store: AuthTokenStore, dpop: DPoP) -> None:
        await _log_in(store, dpop, provider)
        for _ in range(2):
            assert (await _force(store))["extra"]["token_type"] == "Bearer"

    _run(work, provider.token_url, keyring)
    assert provider.stats().refreshes == 2


def test_stolen_tokens_are_worthless_without_the_key(provider: StrictRotatingProvider, keyring: Keyring) -> None:
    """Neither the refresh token nor the access token works, as Bearer token or with another key; the grant survives."""
    thief = DPoPKey.generate()

    async def work(store: AuthTokenStore, dpop: DPoP) -> None:
        stolen = await _log_in(store, dpop, provider)
        url, token = provider.token_url, stolen["access_token"]
        form = {"grant_type": "refresh_token", "refresh_token": stolen["refresh_token"]}
        async with httpx.AsyncClient(trust_env=False) as http:
            for headers in ({}, {"DPoP": thief.proof("POST", url)}):
                refused = await http.post(url, data={**form, "client_id": ID, "client_secret": SECRET}, headers=headers)
                assert (refused.status_code, refused.json()["error"]) == (400, "invalid_grant")
            proof = thief.proof("GET", provider.resource_url, access_token=token)
            for scheme, extra in (("Bearer", {}), ("DPoP", {}), ("DPoP", {"DPoP": proof})):
                headers = {"Authorization": f"{scheme} {token}", **extra}
                assert (await http.get(provider.resource_url, headers=headers)).status_code == 401
        await _force(store)

    _run(work, provider.token_url, keyring)
    assert provider.stats().revoked_grants == 0


def test_a_wrong_clock_costs_no_login(keyring: Keyring) -> None:
    """The provider's clock is ten minutes ahead. When it is right again, the refresh token still works."""
    ahead = [600.0]
    with StrictRotatingProvider(client_id=ID, client_secret=SECRET, clock=lambda: time.time() + ahead[0]) as provider:

        async def work(store: AuthTokenStore, dpop: DPoP) -> None:
            await _log_in(store, dpop, provider)
            with pytest.raises(ProviderRefusedError) as caught:
                await _force(store)
            assert caught.value.code == "invalid_dpop_proof"
            ahead[0] = 0.0
            await _force(store)

        _run(work, provider.token_url, keyring)


def test_a_lost_key_means_a_new_login(provider: StrictRotatingProvider, keyring: Keyring) -> None:
    """The refresh makes another key, with which a confidential client's refresh token may still work."""

    async def work(store: AuthTokenStore, dpop: DPoP) -> None:
        await _log_in(store, dpop, provider)
        await dpop.delete_key(store, "acme", "u1")
        with pytest.raises(ReauthorizationRequiredError):
            await _force(store)
        await _log_in(store, dpop, provider)
        await _force(store)

    _run(work, provider.token_url, keyring)


def test_a_key_that_does_not_open_calls_no_provider_and_is_no_failure_of_the_row(
    provider: StrictRotatingProvider, keyring: Keyring
) -> None:
    async def work(store: AuthTokenStore, dpop: DPoP) -> None:
        await _log_in(store, dpop, provider)
        [entry] = [entry async for entry in store.list_values(namespace="dpop")]
        kept = await store.get_value("dpop", entry["name"])
        await store.put_value("dpop", entry["name"], "altered")
        with pytest.raises(TamperedError) as caught:
            await _force(store)
        Walk([kept["d"], SECRET]).through(caught.value, "an altered key")
        assert provider.stats().requests == 0
        await store.put_value("dpop", entry["name"], kept)
        await _force(store)

    _run(work, provider.token_url, keyring)


def test_no_error_of_a_refresh_shows_a_key_or_a_proof(endpoint: Endpoint, keyring: Keyring) -> None:
    async def work(store: AuthTokenStore, dpop: DPoP) -> None:
        key = await dpop.key(store, "acme", "u1")
        walk = Walk([key.to_jwk()["d"], SECRET, "the-refresh-token"])
        for response in (answer({"error": "invalid_dpop_proof"}, 400), answer({"error": "invalid_grant"}, 400)):
            endpoint.script(response)
            await store.store_tokens("acme", "u1", "at", "the-refresh-token", None)
            with pytest.raises((ProviderRefusedError, ReauthorizationRequiredError)) as caught:
                await _force(store)
            walk.look_for(*(one.headers["dpop"] for one in endpoint.received))
            walk.through(caught.value, "a refusal")

    _run(work, endpoint.url, keyring)


def test_without_the_store_a_refresh_with_a_key_is_an_error() -> None:
    refresher = OAuth2Refresher("https://example.com/token", ID, SECRET, dpop=DPoP())
    with pytest.raises(ConfigurationError, match="pass the refresher itself to load_fresh_tokens"):
        asyncio.run(refresher(record()))


def test_machine_tokens_are_bound_to_the_key_of_their_row(provider: StrictRotatingProvider, keyring: Keyring) -> None:
    """Those of the client itself, and those in exchange for the access token of a user."""
    provider.demands_nonces = True
    dpop, client = DPoP(), (provider.token_url, ID, SECRET)
    refreshers: dict[str, Any] = {
        "machine": ClientCredentials(*client, dpop=dpop),
        "exchanged": TokenExchange(*client, subject_provider="acme", dpop=dpop),
        "acme": OAuth2Refresher(*client, dpop=dpop),
    }

    async def main() -> None:
        async with (
            open_store("memory://", keyring=keyring, refreshers=refreshers) as store,
            httpx.AsyncClient() as http,
        ):
            await store.setup()
            await _log_in(store, dpop, provider)
            for name in refreshers:
                auth = StoreAuth(store, name, "u1", origins=[provider.base_url], dpop=dpop)
                response = await http.get(provider.resource_url, auth=auth)
                assert response.json()["user"] == (ID if name == "machine" else "u1")
                assert (await store.load_fresh_tokens(name, "u1", missing="raise"))["extra"]["token_type"] == "DPoP"

    asyncio.run(main())
    assert provider.stats().issues == 2


def test_an_assertion_is_sent_with_a_proof(endpoint: Endpoint, keyring: Keyring) -> None:
    endpoint.script(answer({"access_token": "at", "token_type": "DPoP", "expires_in": 60}))
    refresher = JWTBearer(endpoint.url, "app", ECKey.generate_key("P-256").as_dict(private=True), dpop=DPoP())

    async def main() -> None:
        async with open_store("memory://", keyring=keyring, refreshers={"acme": refresher}) as store:
            await store.setup()
            await store.load_fresh_tokens("acme", "u1")

    asyncio.run(main())
    [request] = endpoint.received
    assert claims_of(request.headers["dpop"])["htu"] == endpoint.url
    assert "assertion" in request.form


@pytest.mark.parametrize("binds_code", [True, False])
def test_a_login_with_the_key(provider: StrictRotatingProvider, keyring: Keyring, binds_code: bool) -> None:
    """The authorization request names the key's thumbprint; the code is worthless without the key."""
    provider.demands_nonces = True

    async def work(store: AuthTokenStore, dpop: DPoP) -> None:
        key = await dpop.key(store, "acme", "alice")
        jkt = {"dpop_jkt": key.thumbprint} if binds_code else {}
        with httpx.Client(base_url=provider.base_url, trust_env=False) as http:
            codes = [redirected(authorize(http, client_id=ID, **jkt))["code"] for _ in range(2)]

            def redeem(code: str, signer: DPoPKey) -> httpx.Response:
                form = {"grant_type": "authorization_code", "code": code, "redirect_uri": CALLBACK}
                form |= {"code_verifier": VERIFIER, "client_id": ID, "client_secret": SECRET}
                response = http.post("/token", data=form, headers={"DPoP": signer.proof("POST", provider.token_url)})
                if response.json().get("error") != "use_dpop_nonce":
                    return response
                proof = signer.proof("POST", provider.token_url, nonce=response.headers["DPoP-Nonce"])
                return http.post("/token", data=form, headers={"DPoP": proof})

            if binds_code:
                assert redeem(codes[1], DPoPKey.generate()).json()["error"] == "invalid_grant"
            tokens = redeem(codes[0], key).json()
        assert tokens["token_type"] == "DPoP"
        await store.store_token_response("acme", "alice", tokens)
        await store.load_fresh_tokens("acme", "alice", force=True)
        async with AsyncStoreOAuth2Client(store, "acme", "alice") as client:
            with pytest.raises(ConfigurationError, match="bound to a DPoP key"):
                await client.get(provider.resource_url)

    _run(work, provider.token_url, keyring)
    assert provider.stats().refreshes == 1
