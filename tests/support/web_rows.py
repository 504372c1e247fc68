"""Rows of users of a web application that runs in other processes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import httpx

from tokenstore import AuthTokenStore, Keyring, TokenRecord, open_store
from tokenstore.testing.provider import StrictRotatingProvider

__all__ = ["BROWSER", "DUE", "EXPIRED", "Rows", "get_all"]

T = TypeVar("T")

BROWSER = {"Sec-Fetch-Mode": "navigate", "Accept": "text/html"}
"""The headers of a browser that shows a page."""

EXPIRED, DUE = timedelta(hours=-1), timedelta(seconds=90)
"""A token that has to be refreshed first, and one that is valid and refreshed in the background."""


class Rows:
    """The rows of users who logged in at a provider, which the store knows as ``github``."""

    def __init__(self, url: str, keyring: Keyring, provider: StrictRotatingProvider) -> None:
        self._url, self._keyring, self._provider = url, keyring, provider
        self._issued: dict[str, str] = {}
        self._with(lambda store: store.setup())

    def log_in(self, user: str, expires_in: timedelta) -> None:
        grant = self._provider.new_grant(user)
        self._issued[user] = grant["refresh_token"]
        at = datetime.now(UTC) + expires_in

        async def put(store: AuthTokenStore) -> None:
            tokens = grant["access_token"], grant["refresh_token"]
            await store.store_tokens("github", user, *tokens, at, extra={"expires_in": 3600})

        self._with(put)

    def has_new_tokens(self, user: str) -> bool:
        """Whether the store has the tokens of a refresh."""
        record: TokenRecord | None = self._with(lambda store: store.load_tokens("github", user))
        return record is not None and record["refresh_token"] != self._issued[user]

    def _with(self, work: Callable[[AuthTokenStore], Awaitable[T]]) -> T:
        async def main() -> T:
            async with open_store(self._url, keyring=self._keyring) as store:
                return await work(store)

        return asyncio.run(main())


def get_all(urls: list[str]) -> list[Any]:
    """Send requests at the same time. Each has to succeed; returns their JSON."""

    def get(url: str) -> Any:
        response = httpx.get(url, timeout=60, trust_env=False)
        assert response.status_code == 200, response.text
        return response.json()

    with ThreadPoolExecutor(len(urls)) as threads:
        return list(threads.map(get, urls))
