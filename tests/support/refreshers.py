"""Refresh callables for tests: one calls a provider over HTTP, the others return given responses."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import httpx

from tokenstore import (
    ProviderRefusedError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    RefreshableRecord,
    TokenRecord,
)
from tokenstore.testing.provider import ProviderError, StrictRotatingProvider, refresh_over_http

OLD = ("old-access-secret", "old-refresh-secret")
"""The tokens of `World.expired`."""
NEW: Mapping[str, Any] = {
    "access_token": "new-access-secret",
    "refresh_token": "new-refresh-secret",
    "expires_in": 3600,
    "scope": "read write",
}
"""A token response."""


def pair(record: Mapping[str, Any]) -> tuple[str, str]:
    """The access token and the refresh token of a record or a token response."""
    return record["access_token"], record["refresh_token"]


NEW_PAIR = pair(NEW)


class Refresher:
    """Calls a provider over HTTP, and translates its errors."""

    def __init__(self, provider: StrictRotatingProvider) -> None:
        self.provider = provider
        self.calls = 0

    async def __call__(self, record: RefreshableRecord) -> Mapping[str, Any]:
        self.calls += 1
        provider = self.provider
        try:
            return await refresh_over_http(
                provider.token_url,
                record["refresh_token"],
                client_id=provider.client_id,
                client_secret=provider.client_secret,
            )
        except ProviderError as error:
            if error.error == "invalid_grant":
                raise ReauthorizationRequiredError(str(error)) from error
            if error.status < 500:
                raise ProviderRefusedError(str(error), code=error.error) from error
            raise ProviderUnavailableError(str(error), code=error.error) from error

    async def revoke(self, record: TokenRecord) -> None:
        provider = self.provider
        async with httpx.AsyncClient(verify=False, trust_env=False) as client:
            answer = await client.post(
                f"{provider.base_url}/revoke",
                data={"token": record["refresh_token"]},
                auth=(provider.client_id, provider.client_secret),
            )
        if answer.status_code != 200:
            raise ProviderUnavailableError(f"the revocation endpoint answered with status {answer.status_code}")


class Script:
    """A refresh callable without a provider. It returns or raises the given answers in turn, and repeats the last."""

    def __init__(self, *answers: Mapping[str, Any] | BaseException) -> None:
        self._answers = list(answers or (NEW,))
        self.calls = 0
        self.called = asyncio.Event()
        self.answer = asyncio.Event()
        self.answer.set()

    def hold(self) -> None:
        """Delay the answers until ``answer`` is set."""
        self.answer.clear()

    async def __call__(self, record: TokenRecord) -> Mapping[str, Any]:
        self.calls += 1
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        self.called.set()
        await self.answer.wait()
        if isinstance(answer, BaseException):
            raise answer
        return answer


class Revoker(Script):
    """A refresher whose revocation can also be delayed, or fail."""

    def __init__(self, error: BaseException | None = None) -> None:
        super().__init__()
        self.error = error
        self.revoking = asyncio.Event()
        self.revoked: list[tuple[object, object]] = []

    async def revoke(self, record: TokenRecord) -> None:
        self.revoking.set()
        await self.answer.wait()
        if self.error is not None:
            raise self.error
        self.revoked.append(pair(record))


class Gone(Exception):
    pass
