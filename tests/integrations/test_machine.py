"""The refreshers of tokens that are issued without a refresh token: their requests, and what the answers mean."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from joserfc import jwt
from joserfc.jwk import RSAKey

from support.oauth2_calls import ACCESS, GOOD, ID, SECRET, record, show_no_secret
from support.scripted_endpoint import FORM, Endpoint, answer
from tokenstore import (
    ConfigurationError,
    InvalidInputError,
    ProviderRefusedError,
    ProviderUnavailableError,
    TokenRecord,
    open_store,
)
from tokenstore.integrations.machine import ClientCredentials, GitHubAppInstallation, JWTBearer, TokenExchange
from tokenstore.integrations.providers import Provider
from tokenstore.keyring import Keyring
from tokenstore.records import TokenKey

RSA = RSAKey.generate_key(2048)
PEM = RSA.as_pem(private=True).decode()
SUBJECT = TokenRecord(
    provider="login", user_id="u1", access_token="subject-access", refresh_token="subject-refresh", extra={}
)
GOOGLE = {
    "type": "service_account",
    "client_email": "robot@project.iam.gserviceaccount.com",
    "private_key": PEM,
    "private_key_id": "key-1",
    "token_uri": "",
}


def claims_of(assertion: str) -> tuple[dict[str, Any], dict[str, Any]]:
    token = jwt.decode(assertion, RSA, algorithms=["RS256", "PS256"])
    return dict(token.header), dict(token.claims)


def issue(refresher: Any, *records: TokenRecord) -> dict[str, Any]:
    fields: dict[str, Any] = asyncio.run(refresher(*(records or (record(None),))))
    return fields


def test_client_credentials(endpoint: Endpoint) -> None:
    """A form of RFC 6749 section 4.4.2, with the fields that vendors and RFC 8707 add. No token is sent."""
    endpoint.script(answer(GOOD))
    refresher = ClientCredentials(
        endpoint.url,
        ID,
        SECRET,
        scope="a b",
        audience="https://api.example.com",
        resource="https://api.example.com/v1",
        extra_parameters={"tenant": "x"},
    )
    assert issue(refresher) == {"audience": "https://api.example.com", **GOOD}
    [request] = endpoint.received
    assert request.line == "POST /token HTTP/1.1"
    assert request.headers["content-type"] == FORM
    assert request.headers["authorization"].startswith("Basic ")
    assert request.form == {
        "grant_type": "client_credentials",
        "scope": "a b",
        "audience": "https://api.example.com",
        "resource": "https://api.example.com/v1",
        "tenant": "x",
    }
    assert (refresher.issues, refresher.scope, refresher.audience) == (True, "a b", "https://api.example.com")
    assert SECRET not in repr(refresher)


def test_client_credentials_with_a_key_and_a_vendors_ways(endpoint: Endpoint) -> None:
    endpoint.script(answer({"data": GOOD}))
    vendor = Provider("Vendor", endpoint.url, wrapper="data", json_request=True, headers={"X-Version": "1"})
    assert issue(ClientCredentials(endpoint.url, ID, private_key=PEM, provider=vendor)) == {"data": GOOD, **GOOD}
    [request] = endpoint.received
    assert request.headers["x-version"] == "1"
    body = json.loads(request.body)
    assert (body["grant_type"], body["client_id"]) == ("client_credentials", ID)
    _, claims = claims_of(body["client_assertion"])
    assert (claims["iss"], claims["aud"]) == (ID, endpoint.url)


@pytest.mark.parametrize("sends", ["access_token", "id_token"])
def test_token_exchange(endpoint: Endpoint, sends: Any) -> None:
    """A form of RFC 8693 section 2.1. The subject is the same user's row."""
    endpoint.script(answer(GOOD))
    refresher = TokenExchange(
        endpoint.url,
        ID,
        SECRET,
        subject_provider="login",
        subject_account="work",
        subject_token_type=sends,
        requested_token_type="urn:ietf:params:oauth:token-type:jwt",
        audience="orders",
        scope="read",
    )
    assert refresher.subject_of(TokenKey("orders", "u1", "x")) == TokenKey("login", "u1", "work")
    subject = SUBJECT | {"extra": {"id_token": "subject-id"}}
    assert issue(refresher, record(None), subject) == {"audience": "orders", **GOOD}
    [request] = endpoint.received
    assert request.form == {
        "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
        "subject_token": "subject-id" if sends == "id_token" else "subject-access",
        "subject_token_type": f"urn:ietf:params:oauth:token-type:{sends}",
        "requested_token_type": "urn:ietf:params:oauth:token-type:jwt",
        "audience": "orders",
        "scope": "read",
    }


def test_token_exchange_without_what_it_exchanges(endpoint: Endpoint) -> None:
    refresher = TokenExchange(endpoint.url, ID, SECRET, subject_provider="login", subject_token_type="id_token")
    with pytest.raises(ConfigurationError, match="subject"):
        issue(refresher, record(None))
    with pytest.raises(ProviderRefusedError, match="no ID token") as caught:
        issue(refresher, record(None), SUBJECT)
    assert caught.value.code == "no_id_token"
    assert not endpoint.received


def test_jwt_bearer(endpoint: Endpoint) -> None:
    """An assertion of RFC 7523 section 3, new for each attempt, whose subject may depend on the row."""
    endpoint.script(answer({}, 503), answer(GOOD))
    refresher = JWTBearer(
        endpoint.url,
        "my-app",
        PEM,
        subject=lambda record: record["user_id"],
        audience="https://login.example.com",
        scope="read",
        claims={"tenant": 5},
        lifetime=120,
        jwt_algorithm="PS256",
        jwt_headers={"kid": "k"},
    )
    assert issue(refresher) == GOOD
    first, second = (request.form for request in endpoint.received)
    header, claims = claims_of(second["assertion"])
    assert (header["alg"], header["kid"]) == ("PS256", "k")
    assert second.keys() == {"grant_type", "assertion", "scope"}
    assert second["grant_type"] == "urn:ietf:params:oauth:grant-type:jwt-bearer"
    names = ("iss", "sub", "aud", "tenant")
    assert [claims[name] for name in names] == ["my-app", "u1", "https://login.example.com", 5]
    assert claims["exp"] - claims["iat"] == 120
    assert abs(claims["iat"] - time.time()) < 60
    assert claims_of(first["assertion"])[1]["jti"] != claims["jti"]
    assert "authorization" not in endpoint.received[0].headers


def test_jwt_bearer_of_an_authenticated_client(endpoint: Endpoint) -> None:
    endpoint.script(answer(GOOD))
    assert issue(JWTBearer(endpoint.url, "app", PEM, client_id=ID, client_secret=SECRET)) == GOOD
    [request] = endpoint.received
    assert request.headers["authorization"].startswith("Basic ")
    _, claims = claims_of(request.form["assertion"])
    assert (claims["sub"], claims["aud"]) == ("app", endpoint.url)


@pytest.mark.parametrize("subject", [None, "user@example.com"])
def test_a_google_service_account(endpoint: Endpoint, subject: str | None) -> None:
    """The scope is a claim. The subject is there only if the account acts for a user."""
    endpoint.script(answer({"access_token": "ya29.x", "expires_in": 3599, "token_type": "Bearer"}))
    refresher = JWTBearer.for_google({**GOOGLE, "token_uri": endpoint.url}, scope="a b", subject=subject)
    assert issue(refresher)["access_token"] == "ya29.x"
    assert refresher.scope == "a b"
    [request] = endpoint.received
    assert request.form.keys() == {"grant_type", "assertion"}
    header, claims = claims_of(request.form["assertion"])
    assert (header["alg"], header["kid"]) == ("RS256", "key-1")
    assert claims["exp"] - claims["iat"] == 3600
    assert (claims["iss"], claims["aud"], claims["scope"]) == (GOOGLE["client_email"], endpoint.url, "a b")
    assert claims.get("sub") == subject


@pytest.mark.parametrize("broken", [{}, {"private_key": None}, None, {**GOOGLE, "token_uri": 5}])
def test_what_is_no_key_of_a_service_account(broken: Any) -> None:
    with pytest.raises(ConfigurationError, match="service_account must be a mapping with token_uri") as caught:
        JWTBearer.for_google(broken, scope="a")
    show_no_secret(caught.value)


def test_a_github_app(endpoint: Endpoint) -> None:
    """The path names the installation, by default the row's user. The token's name is that of RFC 6749 afterwards."""
    granted = {
        "token": "ghs_16C7e42F292c6912E7710c838347Ae178B4a",
        "expires_at": "2099-07-11T22:14:10Z",
        "permissions": {"contents": "read"},
        "repository_selection": "all",
    }
    endpoint.script(answer(granted, 201))
    url = endpoint.url.removesuffix("/token")
    refresher = GitHubAppInstallation(
        12345, PEM, permissions={"contents": "read"}, repositories=["Hello-World"], api_url=f"{url}/"
    )
    store = open_store("memory://", keyring=Keyring({"k": bytes(32)}), refreshers={"app": refresher})

    async def main() -> TokenRecord:
        async with store:
            return await store.load_fresh_tokens("app", "987", missing="raise")

    stored = asyncio.run(main())
    assert stored["access_token"] == granted["token"]
    assert str(stored["access_token_expires_at"]) == "2099-07-11 22:14:10+00:00"
    assert stored["extra"]["permissions"] == granted["permissions"]
    assert granted["token"] not in str(stored["extra"])
    [request] = endpoint.received
    assert request.line == "POST /app/installations/987/access_tokens HTTP/1.1"
    assert request.headers["accept"] == "application/vnd.github+json"
    assert request.headers["x-github-api-version"] == "2022-11-28"
    assert json.loads(request.body) == {"permissions": {"contents": "read"}, "repositories": ["Hello-World"]}
    header, claims = claims_of(request.headers["authorization"].removeprefix("Bearer "))
    assert header["alg"] == "RS256"
    assert claims["iss"] == "12345"
    assert claims["exp"] - claims["iat"] == 600
    assert 55 <= time.time() - claims["iat"] < 120


def test_a_row_that_names_no_installation(endpoint: Endpoint) -> None:
    url = endpoint.url.removesuffix("/token")
    with pytest.raises(ProviderRefusedError, match="installation_id"):
        issue(GitHubAppInstallation("app", PEM, api_url=url))
    assert not endpoint.received
    endpoint.script(answer({"token": "ghs_x"}, 201))
    assert issue(GitHubAppInstallation("app", PEM, installation_id=5, api_url=url))["access_token"] == "ghs_x"
    assert json.loads(endpoint.received[0].body) == {}


MAKERS: Mapping[str, Callable[[str], Any]] = {
    "client credentials": lambda url: ClientCredentials(url, ID, SECRET),
    "exchange": lambda url: TokenExchange(url, ID, SECRET, subject_provider="login"),
    "assertion": lambda url: JWTBearer(url, "app", PEM),
    "GitHub": lambda url: GitHubAppInstallation("app", PEM, installation_id=5, api_url=url),
}
ANSWERS = [
    (400, {"error": "invalid_grant", "error_description": ACCESS}, ProviderRefusedError, "invalid_grant"),
    (401, {"error": "invalid_client"}, ProviderRefusedError, "invalid_client"),
    (404, {"message": "Not Found"}, ProviderRefusedError, "http_404"),
    (400, {"error": "subject-access"}, ProviderRefusedError, "http_400"),
    (503, {}, ProviderUnavailableError, "http_503"),
    (429, {}, ProviderUnavailableError, "http_429"),
    (200, {"no": "token"}, ProviderUnavailableError, "invalid_response"),
]


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(("status", "body", "kind", "code"), ANSWERS)
def test_what_a_refusal_means(
    endpoint: Endpoint, maker: str, status: int, body: Mapping[str, Any], kind: type[Exception], code: str
) -> None:
    """No answer means that a user has to log in again. No error contains a secret."""
    endpoint.script(answer(dict(body), status))
    records = [record(None), SUBJECT] if maker == "exchange" else [record(None)]
    if maker != "exchange" and body.get("error") == "subject-access":
        records = [record(None) | {"access_token": "subject-access"}]
    with pytest.raises(kind) as caught:
        issue(MAKERS[maker](endpoint.url), *records)
    error: Any = caught.value
    assert error.code == code
    show_no_secret(error)
    assert "subject-access" not in str(error)


def test_arguments_that_cannot_work(endpoint: Endpoint) -> None:
    url = endpoint.url
    short = generate_private_key(65537, 1024)
    pem = short.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    calls: list[tuple[type[Exception], Callable[[], object]]] = [
        (ConfigurationError, lambda: ClientCredentials("http://example.com/token", ID, SECRET)),
        (ConfigurationError, lambda: ClientCredentials(url, ID, SECRET, private_key=PEM)),
        (ConfigurationError, lambda: ClientCredentials(url, ID, SECRET, extra_parameters={"scope": "x"})),
        (ConfigurationError, lambda: ClientCredentials(url, ID, SECRET, extra_parameters={"grant_type": "x"})),
        (ConfigurationError, lambda: ClientCredentials(url, ID, SECRET, scope="")),
        (InvalidInputError, lambda: ClientCredentials(url, ID, SECRET, timeout=0)),
        (InvalidInputError, lambda: ClientCredentials(url, ID, SECRET, default_lifetime=0)),
        (InvalidInputError, lambda: TokenExchange(url, ID, SECRET, subject_provider="")),
        (
            ConfigurationError,
            lambda: TokenExchange(url, ID, SECRET, subject_provider="a", subject_token_type="refresh_token"),  # type: ignore[arg-type]
        ),
        (ConfigurationError, lambda: JWTBearer(url, "app", pem)),
        (ConfigurationError, lambda: JWTBearer(url, "app", "no key")),
        (ConfigurationError, lambda: JWTBearer(url, "app", PEM, client_secret=SECRET)),
        (ConfigurationError, lambda: JWTBearer(url, "app", PEM, jwt_algorithm="HS256")),
        (InvalidInputError, lambda: JWTBearer(url, "app", PEM, lifetime=0)),
        (ConfigurationError, lambda: GitHubAppInstallation("app", PEM, installation_id="5/../6")),
        (ConfigurationError, lambda: GitHubAppInstallation("app", PEM, repositories="one")),
        (ConfigurationError, lambda: GitHubAppInstallation("", PEM)),
    ]
    for kind, call in calls:
        with pytest.raises(kind) as caught:
            call()
        show_no_secret(caught.value)
    with pytest.raises(ConfigurationError, match="api_url must be https"):
        GitHubAppInstallation("app", PEM, api_url="http://github.example.com/api/v3")
