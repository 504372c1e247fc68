"""Revocation, as in RFC 7009 and as providers implement it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from support.oauth2_calls import ACCESS, ID, REFRESH, SECRET, record, refusal, show_no_secret
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
