"""Revocation, as in RFC 7009 and as providers implement it."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any
from urllib.parse import quote

import pytest

from support.oauth2_calls import ACCESS, ID, REFRESH, SECRET, record, refusal, show_no_secret
from support.preset_calls import refresher_at
from support.scripted_endpoint import Endpoint, answer, hang_up
from tokenstore import (
    ProviderRefusedError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    RefreshError,
    UnsupportedOperationError,
)
from tokenstore.integrations.oauth2 import OAuth2Refresher
from tokenstore.integrations.presets import PROVIDERS

REAUTHORIZE, UNAVAILABLE, REFUSED = ReauthorizationRequiredError, ProviderUnavailableError, ProviderRefusedError


def revoker(endpoint: Endpoint, **options: Any) -> OAuth2Refresher:
    return OAuth2Refresher(endpoint.url, ID, SECRET, revocation_url=endpoint.url, **options)


def test_the_revocation_request(endpoint: Endpoint) -> None:
    """It contains the refresh token, which ends the grant, or else the access token (RFC 7009 section 2.1)."""
    endpoint.script(answer(b"", 200))
    asyncio.run(revoker(endpoint).revoke(record()))
    asyncio.run(revoker(endpoint).revoke(record(None)))
    with_refresh_token, without = endpoint.received
    assert with_refresh_token.form == {"token": REFRESH, "token_type_hint": "refresh_token"}
    assert without.form == {"token": ACCESS, "token_type_hint": "access_token"}
    assert with_refresh_token.headers["authorization"].startswith("Basic ")


@pytest.mark.parametrize("body", [b"", b"<html>", {"error": "invalid_grant"}, {}])
def test_the_body_of_a_successful_revocation_is_ignored(endpoint: Endpoint, body: object) -> None:
    """Only the status counts (RFC 7009 section 2.2)."""
    endpoint.script(answer(body))
    asyncio.run(revoker(endpoint).revoke(record()))


def test_revoking_an_unknown_token_succeeds(endpoint: Endpoint) -> None:
    """Also if the provider answers with an error, against the RFC."""
    endpoint.script(answer({"error": "invalid_token"}, 400))
    asyncio.run(revoker(endpoint).revoke(record()))


@pytest.mark.parametrize(
    ("status", "body", "kind", "code"),
    [
        (400, {"error": "unsupported_token_type"}, REFUSED, "unsupported_token_type"),
        (401, {"error": "invalid_client"}, REFUSED, "invalid_client"),
        (400, {"error": "invalid_grant"}, REAUTHORIZE, "invalid_grant"),
        (404, b"", REFUSED, "http_404"),
        (302, b"", REFUSED, "redirect"),
        (429, b"", UNAVAILABLE, "http_429"),
    ],
)
def test_a_failed_revocation_raises_the_same_errors_as_a_refresh(
    endpoint: Endpoint, status: int, body: object, kind: type[RefreshError], code: str
) -> None:
    """The error names the revocation endpoint."""
    endpoint.script(answer(body, status))
    error = refusal(revoker(endpoint), revoke=True)
    assert (type(error), error.code) == (kind, code)
    assert "the revocation endpoint" in str(error)


def test_a_revocation_may_always_be_repeated(endpoint: Endpoint) -> None:
    """Revoking a token twice does no harm, also with strict rotation."""
    endpoint.script(hang_up, answer(b""))
    asyncio.run(revoker(endpoint, rotation="strict").revoke(record()))
    assert len(endpoint.received) == 2


# What each vendor documents of its own way: the line, the body without the client's id and secret, the authentication.
OWN_WAYS: list[tuple[str, str, object, str]] = [
    ("dropbox", "POST /2/auth/token/revoke", "", f"Bearer {ACCESS}"),
    ("slack", "POST /api/auth.revoke", "", f"Bearer {ACCESS}"),
    ("zendesk", "DELETE /api/v2/oauth/tokens/current.json", "", f"Bearer {ACCESS}"),
    ("github", f"DELETE /applications/{quote(ID, safe='')}/grant", {"access_token": ACCESS}, "Basic"),
    ("zoom", "POST /oauth/revoke", {"token": ACCESS}, "Basic"),
    ("notion", "POST /v1/oauth/revoke", {"token": ACCESS}, "Basic"),
    ("intuit", "POST /v2/oauth2/tokens/revoke", {"token": REFRESH}, "Basic"),
    ("auth0", "POST /oauth/revoke", {"token": REFRESH}, "post"),
    ("linear", "POST /oauth/revoke", {"refresh_token": REFRESH}, "post"),
    (
        "hubspot",
        "POST /oauth/2026-03/token/revoke",
        {"token": REFRESH, "token_type_hint": "refresh_token"},
        "post",
    ),
    (
        "keycloak",
        "POST /auth/realms/main/protocol/openid-connect/revoke",
        {"token": REFRESH, "token_type_hint": "refresh_token"},
        "post",
    ),
]


@pytest.mark.parametrize(("preset", "line", "body", "auth"), OWN_WAYS, ids=[way[0] for way in OWN_WAYS])
def test_a_vendor_s_own_way_of_revocation(
    endpoint: Endpoint, caplog: pytest.LogCaptureFixture, preset: str, line: str, body: object, auth: str
) -> None:
    """No token is in the URL, which httpx logs."""
    endpoint.script(answer(b"", 204))
    refresher = refresher_at(endpoint, preset)
    assert refresher.can_revoke
    with caplog.at_level(logging.INFO):
        asyncio.run(refresher.revoke(record()))
    [request] = endpoint.received
    assert request.line == f"{line} HTTP/1.1"
    assert "HTTP Request" in caplog.text
    assert REFRESH not in caplog.text
    assert ACCESS not in caplog.text
    as_json = request.headers.get("content-type") == "application/json"
    assert as_json is (preset in ("github", "intuit", "notion"))
    sent: Any = json.loads(request.body) if as_json else request.form if request.body else ""
    if auth == "post":
        assert sent.pop("client_id") == ID
        assert sent.pop("client_secret") == SECRET
        assert "authorization" not in request.headers
    else:
        assert request.headers["authorization"].startswith(auth)
    assert sent == body
    assert ("notion-version" in request.headers) is (preset == "notion")


def test_linear_s_field_is_named_by_the_kind_of_token(endpoint: Endpoint) -> None:
    """Linear's revocation endpoint differs from RFC 7009."""
    endpoint.script(answer(b""))
    asyncio.run(refresher_at(endpoint, "linear").revoke(record(None)))
    assert endpoint.received[0].form.keys() - {"client_id", "client_secret"} == {"access_token"}


@pytest.mark.parametrize(
    ("preset", "status", "body"),
    [
        ("dropbox", 401, {"error_summary": "expired_access_token/.", "error": {".tag": "expired_access_token"}}),
        ("slack", 200, {"ok": False, "error": "token_expired"}),
        ("slack", 200, {"ok": False, "error": "invalid_auth"}),
        ("zendesk", 401, {"error": "invalid_token", "error_description": "The access token provided is expired"}),
        ("github", 404, {"message": "Not Found"}),
        ("zoom", 400, {"error": "invalid_token"}),
        ("notion", 400, {"object": "error", "status": 400, "code": "validation_error"}),
    ],
)
def test_an_expired_access_token_does_not_count_as_revoked(
    endpoint: Endpoint, preset: str, status: int, body: object
) -> None:
    """The refresh token beside it is still valid. The error says what to do."""
    endpoint.script(answer(body, status))
    error = refusal(refresher_at(endpoint, preset), revoke=True)
    assert type(error) is REFUSED
    assert "load_fresh_tokens" in str(error)


def test_a_grant_that_has_ended_needs_no_revocation(endpoint: Endpoint) -> None:
    """Slack says so with HTTP 200, and the code of a removed app."""
    for body in ({"ok": False, "error": "token_revoked"}, {"ok": True, "revoked": True}):
        endpoint.script(answer(body))
        asyncio.run(refresher_at(endpoint, "slack").revoke(record()))
    endpoint.script(answer({"error": "invalid_token"}, 400))
    asyncio.run(refresher_at(endpoint, "zoom").revoke(record(None)))


def test_without_a_token_of_the_kind_nothing_is_sent(endpoint: Endpoint) -> None:
    """Auth0 revokes refresh tokens alone."""
    with pytest.raises(UnsupportedOperationError, match="Auth0 revokes refresh_token alone, and there is none"):
        asyncio.run(refresher_at(endpoint, "auth0").revoke(record(None)))
    assert not endpoint.received


def test_a_client_without_a_secret_cannot_use_http_basic(endpoint: Endpoint) -> None:
    """GitHub's way needs the client's secret; Dropbox's needs only the access token."""
    refresher = refresher_at(endpoint, "github", None)
    assert not refresher.can_revoke
    with pytest.raises(UnsupportedOperationError, match="for a client without a secret: delete_tokens"):
        asyncio.run(refresher.revoke(record()))
    assert not endpoint.received
    assert refresher_at(endpoint, "dropbox", None).can_revoke


@pytest.mark.parametrize("preset", sorted(name for name, found in PROVIDERS.items() if not found.revocation_url))
def test_without_a_revocation_endpoint_the_error_says_what_to_do(preset: str) -> None:
    """It says what can be done instead, in the store and at the provider."""
    refresher = OAuth2Refresher.for_provider(preset, client_id=ID, client_secret=SECRET)
    assert not refresher.can_revoke
    with pytest.raises(UnsupportedOperationError, match="delete_tokens") as caught:
        asyncio.run(refresher.revoke(record()))
    assert PROVIDERS[preset].otherwise
    assert PROVIDERS[preset].otherwise in str(caught.value)
    show_no_secret(caught.value)
    plain = OAuth2Refresher("https://example.com/token", ID)
    with pytest.raises(UnsupportedOperationError, match=r"delete_tokens makes the store forget the tokens$"):
        asyncio.run(plain.revoke(record()))
