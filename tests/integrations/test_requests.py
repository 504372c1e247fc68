"""The refresh request: its form, the client authentication, and proxies."""

from __future__ import annotations

import asyncio
import json
from base64 import b64decode
from datetime import UTC, datetime
from urllib.parse import quote_plus

import httpx
import pytest
from joserfc import jwt
from joserfc.jwk import ECKey, OKPKey, RSAKey

from support.oauth2_calls import GOOD, ID, REFRESH, SECRET, record, refresh, refusal
from support.scripted_endpoint import FORM, Endpoint, answer
from tokenstore import ConfigurationError, ProviderUnavailableError, ReauthorizationRequiredError
from tokenstore.integrations.oauth2 import OAuth2Refresher
from tokenstore.integrations.providers import AuthMethod, Provider

RSA = RSAKey.generate_key(2048)


def test_the_refresh_request(endpoint: Endpoint) -> None:
    """It is a POST with a form (RFC 6749 section 6), has no parameter in the URL, and asks for uncompressed JSON."""
    endpoint.script(answer(GOOD))
    refresher = OAuth2Refresher(
        endpoint.url, ID, SECRET, scope="a b", extra_parameters={"redirect_uri": "https://example.com/?a=b&c"}
    )
    assert refresh(refresher) == GOOD
    [request] = endpoint.received
    assert request.line == "POST /token HTTP/1.1"
    assert request.headers["content-type"] == FORM
    assert request.headers["accept"] == "application/json"
    assert request.headers["accept-encoding"] == "identity"
    assert request.form == {
        "grant_type": "refresh_token",
        "refresh_token": REFRESH,
        "redirect_uri": "https://example.com/?a=b&c",
        "scope": "a b",
    }


def test_client_secret_basic_encodes_both_parts(endpoint: Endpoint) -> None:
    """Id and secret are form-encoded, then Base64-encoded (RFC 6749 section 2.3.1); the body contains neither."""
    endpoint.script(answer(GOOD))
    refresh(OAuth2Refresher(endpoint.url, ID, SECRET))
    [request] = endpoint.received
    scheme, _, pair = request.headers["authorization"].partition(" ")
    assert scheme == "Basic"
    assert b64decode(pair, validate=True).decode() == f"{quote_plus(ID)}:{quote_plus(SECRET)}"
    assert request.form.keys() == {"grant_type", "refresh_token"}


def test_a_vendor_may_take_basic_without_encoding(endpoint: Endpoint) -> None:
    """Many do not decode the id and the secret. A colon in the id could not be told from the one between them."""
    vendor = Provider("Vendor", endpoint.url, raw_basic=True)
    endpoint.script(answer(GOOD))
    refresh(OAuth2Refresher(endpoint.url, "my client", SECRET, provider=vendor))
    pair = endpoint.received[0].headers["authorization"].removeprefix("Basic ")
    assert b64decode(pair, validate=True).decode() == f"my client:{SECRET}"
    endpoint.script(answer({"error": pair}, 400))
    assert refusal(OAuth2Refresher(endpoint.url, "my client", SECRET, provider=vendor)).code == "http_400"
    with pytest.raises(ConfigurationError, match="colon"):
        OAuth2Refresher(endpoint.url, ID, SECRET, provider=vendor)


@pytest.mark.parametrize("method", ["client_secret_basic", "client_secret_post", "none"])
def test_a_vendor_may_take_json(endpoint: Endpoint, method: AuthMethod) -> None:
    """With the same fields as the form, for a refresh and a revocation."""
    vendor = Provider("Vendor", endpoint.url, json_request=True)
    secret = None if method == "none" else SECRET
    refresher = OAuth2Refresher(
        endpoint.url, ID, secret, provider=vendor, auth_method=method, scope="ü a", revocation_url=endpoint.url
    )
    endpoint.script(answer(GOOD))
    assert refresh(refresher) == GOOD
    asyncio.run(refresher.revoke(record()))
    for request in endpoint.received:
        assert request.headers["content-type"] == "application/json"
    bodies = [json.loads(request.body) for request in endpoint.received]
    assert bodies[0].items() >= {"grant_type": "refresh_token", "refresh_token": REFRESH, "scope": "ü a"}.items()
    assert bodies[1]["token"] == REFRESH
    assert ("authorization" in endpoint.received[0].headers) is (method == "client_secret_basic")
    assert bodies[0].get("client_secret") == (SECRET if method == "client_secret_post" else None)


def test_client_secret_post_sends_both_in_the_body(endpoint: Endpoint) -> None:
    """No header contains the id or the secret."""
    endpoint.script(answer(GOOD))
    refresh(OAuth2Refresher(endpoint.url, ID, SECRET, auth_method="client_secret_post"))
    [request] = endpoint.received
    assert request.form["client_id"] == ID
    assert request.form["client_secret"] == SECRET
    assert "authorization" not in request.headers


def test_a_public_client_sends_its_id(endpoint: Endpoint) -> None:
    """Without a secret and a key, this is the default (RFC 6749 section 3.2.1)."""
    endpoint.script(answer(GOOD))
    refresh(OAuth2Refresher(endpoint.url, ID))
    [request] = endpoint.received
    assert request.form == {"grant_type": "refresh_token", "refresh_token": REFRESH, "client_id": ID}
    assert "authorization" not in request.headers


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        (RSA, "RS256"),
        (ECKey.generate_key("P-256"), "ES256"),
        (ECKey.generate_key("P-384"), "ES384"),
        (ECKey.generate_key("P-521"), "ES512"),
        (OKPKey.generate_key("Ed25519"), "Ed25519"),
    ],
    ids=["RSA", "P-256", "P-384", "P-521", "Ed25519"],
)
def test_private_key_jwt(endpoint: Endpoint, key: RSAKey | ECKey | OKPKey, algorithm: str) -> None:
    """The assertion names client and endpoint, is signed and short-lived, and new for each request (RFC 7523)."""
    endpoint.script(answer({}, 500), answer(GOOD))
    before = int(datetime.now(UTC).timestamp())
    for form in (key.as_pem(private=True).decode(), key.as_pem(private=True), key.as_dict(private=True)):
        refresher = OAuth2Refresher(
            endpoint.url, ID, private_key=form, rotation="none", jwt_headers={"kid": "k1", "x5t#S256": "abc"}
        )
        refresh(refresher)  # the first refresh takes two attempts
    seen = set()
    for request in endpoint.received:
        assert request.form["client_assertion_type"] == "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
        assert request.form["client_id"] == ID
        assert request.form["refresh_token"] == REFRESH
        assert "authorization" not in request.headers
        token = jwt.decode(request.form["client_assertion"], key, algorithms=[algorithm])
        assert token.header.items() >= {"alg": algorithm, "kid": "k1", "x5t#S256": "abc"}.items()
        claims = token.claims
        assert claims["iss"] == claims["sub"] == ID
        assert claims["aud"] == endpoint.url
        assert before <= claims["iat"] < claims["exp"] <= before + 330
        seen.add(claims["jti"])
    assert len(seen) == len(endpoint.received) == 4


def test_another_jwt_algorithm_can_be_chosen(endpoint: Endpoint) -> None:
    """Microsoft prefers PS256 to RS256, which is the default of RSA keys."""
    endpoint.script(answer(GOOD))
    refresh(OAuth2Refresher(endpoint.url, ID, private_key=RSA.as_pem(private=True), jwt_algorithm="PS256"))
    [request] = endpoint.received
    assert jwt.decode(request.form["client_assertion"], RSA, algorithms=["PS256"]).header["alg"] == "PS256"


def test_without_a_refresh_token_no_request_is_sent(endpoint: Endpoint) -> None:
    """The error says that the user has to log in again."""
    with pytest.raises(ReauthorizationRequiredError, match="log in again"):
        refresh(OAuth2Refresher(endpoint.url, ID, SECRET), None)
    assert not endpoint.received


def test_a_passed_http_client_is_used_and_not_closed(endpoint: Endpoint) -> None:
    """Both calls use its connection; its own credentials are not sent."""
    endpoint.script(answer(GOOD, Connection="keep-alive"))

    async def main() -> None:
        async with httpx.AsyncClient(trust_env=False, auth=("somebody", "else"), follow_redirects=True) as client:
            refresher = OAuth2Refresher(endpoint.url, ID, http_client=client)
            for _ in range(2):
                assert await refresher(record()) == GOOD
            assert not client.is_closed
        with pytest.raises(ProviderUnavailableError, match="HTTP client"):
            await refresher(record())

    asyncio.run(main())
    assert endpoint.connections == 1
    assert not [request for request in endpoint.received if "authorization" in request.headers]


def test_the_environment_s_proxy_is_used_but_not_for_loopback_addresses(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests to this machine are not sent to another one. A proxy that refuses has not passed the request on."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://{endpoint.address}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    endpoint.script(answer(b"", 502))
    error = refusal(OAuth2Refresher("https://login.example.com/token", ID, SECRET))
    assert error.code == "network_error"
    assert [request.line for request in endpoint.received] == ["CONNECT login.example.com:443 HTTP/1.1"] * 2
    assert not [request for request in endpoint.received if "authorization" in request.headers]
    endpoint.script(answer(GOOD))
    assert refresh(OAuth2Refresher(endpoint.url, ID, SECRET)) == GOOD
    assert [request.line for request in endpoint.received] == ["POST /token HTTP/1.1"]


def test_the_error_for_unusable_proxy_settings_does_not_contain_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message of httpx's own error may contain the proxy's password."""
    monkeypatch.setenv("HTTPS_PROXY", f"gopher://user:{SECRET}@proxy.example.com")
    error = refusal(OAuth2Refresher("https://login.example.com/token", ID, SECRET))
    assert error.code == "http_client"
    assert "proxy" in str(error)
