"""What OAuth libraries return or raise in a refresh callable is understood: a dead token is sent once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import httpx
import pytest
from authlib.integrations.base_client.errors import OAuthError

from support.refresh_world import World, on_memory
from support.refreshers import OLD
from support.store_calls import fresh
from tokenstore import (
    ProviderRefusedError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    RefreshError,
    TokenRecord,
)

REAUTHORIZE, UNAVAILABLE, REFUSED = ReauthorizationRequiredError, ProviderUnavailableError, ProviderRefusedError


class LibraryError(Exception):
    """Like oauthlib's errors: the code is an attribute."""

    def __init__(self, error: object) -> None:
        super().__init__("(some_code) a description")
        self.error = error


class ResponseError(Exception):
    """Like httpx-oauth's errors and those of requests: the response is an attribute."""

    def __init__(self, response: object) -> None:
        super().__init__("400 Bad Request")
        self.response = response


class Odd(Exception):
    @property
    def error(self) -> str:
        raise RuntimeError("no")


class AsyncResponse:
    status_code = 400

    async def json(self) -> dict[str, str]:
        return {"error": "invalid_grant"}


def status_error(status: int, **content: Any) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "https://example.com/token")
    response = httpx.Response(status, request=request, **content)
    return httpx.HTTPStatusError(str(status), request=request, response=response)


INVALID_GRANT = {"error": "invalid_grant", "error_description": "AADSTS700082"}
RAISED: dict[str, tuple[Exception, type[RefreshError], str]] = {
    "Authlib": (OAuthError("invalid_grant", "x"), REAUTHORIZE, "invalid_grant"),
    "an attribute": (LibraryError("invalid_grant"), REAUTHORIZE, "invalid_grant"),
    "an object": (LibraryError({"code": "invalid_grant"}), REAUTHORIZE, "invalid_grant"),
    "google-auth": (RuntimeError("invalid_grant: x", INVALID_GRANT), REAUTHORIZE, "invalid_grant"),
    "raise_for_status": (status_error(400, json=INVALID_GRANT), REAUTHORIZE, "invalid_grant"),
    "httpx-oauth": (ResponseError(httpx.Response(400, json=INVALID_GRANT)), REAUTHORIZE, "invalid_grant"),
    "a refusal": (OAuthError("invalid_client"), REFUSED, "invalid_client"),
    "another refusal": (status_error(401, json={"error": "unauthorized_client"}), REFUSED, "unauthorized_client"),
    "an outage": (LibraryError("temporarily_unavailable"), UNAVAILABLE, "temporarily_unavailable"),
    "another code": (LibraryError("slow_down"), UNAVAILABLE, "refresh_failed"),
    "no JSON": (status_error(502, text="<html>"), UNAVAILABLE, "refresh_failed"),
    "no code": (OAuthError(), UNAVAILABLE, "refresh_failed"),
    "an attribute that raises": (Odd(), UNAVAILABLE, "refresh_failed"),
    "a response that is read in a coroutine": (ResponseError(AsyncResponse()), UNAVAILABLE, "refresh_failed"),
}


async def calls_of(world: World, said: Callable[[], Mapping[str, Any]]) -> tuple[RefreshError, RefreshError, int]:
    """The errors of two callers with two stores, and the number of calls of the provider."""
    calls = 0

    async def refresh(record: TokenRecord) -> Mapping[str, Any]:
        nonlocal calls
        calls += 1
        return said()

    one, two = await world.store(refreshers={"github": refresh}), await world.store(refreshers={"github": refresh})
    await world.expired(one)
    with pytest.raises(RefreshError) as first:
        await fresh(one)
    with pytest.raises(RefreshError) as second:
        await fresh(two)
    return first.value, second.value, calls


@on_memory
@pytest.mark.parametrize(("raised", "kind", "code"), RAISED.values(), ids=RAISED)
async def test_an_exception_of_a_library(world: World, raised: Exception, kind: type[RefreshError], code: str) -> None:
    """By a code of RFC 6749 in it; all callers get the same kind of error after one call."""

    def fail() -> Mapping[str, Any]:
        raise raised

    first, second, calls = await calls_of(world, fail)
    assert (type(first), first.code) == (type(second), second.code) == (kind, code)
    assert first.__cause__ is None  # it may hold a token
    assert calls == 1


@on_memory
@pytest.mark.parametrize(
    ("returned", "kind", "code"),
    [
        (INVALID_GRANT, REAUTHORIZE, "invalid_grant"),
        ({"error": "invalid_grant", "access_token": None}, REAUTHORIZE, "invalid_grant"),
        ({"errors": [{"errorType": "invalid_grant"}]}, REAUTHORIZE, "invalid_grant"),
        ({"error": "invalid_client"}, REFUSED, "invalid_client"),
        ({"error": "server_error"}, UNAVAILABLE, "server_error"),
        ({"error": OLD[1]}, UNAVAILABLE, "invalid_response"),
        ({"error": None}, UNAVAILABLE, "invalid_response"),
    ],
)
async def test_a_refusal_that_is_returned(
    world: World, returned: Mapping[str, Any], kind: type[RefreshError], code: str
) -> None:
    """As MSAL does."""
    first, second, calls = await calls_of(world, lambda: returned)
    assert (type(first), first.code) == (type(second), second.code) == (kind, code)
    assert calls == 1


@on_memory
async def test_tokens_beside_an_error_are_stored(world: World) -> None:
    """The pair is the only copy."""
    store = await world.store(refreshers={"github": lambda _: {"access_token": "at-2", "error": "invalid_grant"}})
    await world.expired(store)
    assert (await fresh(store))["access_token"] == "at-2"
