"""A refresher that reads a value of the store before the row is claimed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from typing import Any

import pytest

from support.error_text import assert_silent
from tokenstore import AuthTokenStore, ConfigurationError, Keyring, RefreshableRecord, TamperedError, open_store
from tokenstore.records import TokenKey
from tokenstore.values import ValueOperations


class Prepares:
    """Its argument is a value whose name is the user's id; users without one need none."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def prepare_refresh(self, values: ValueOperations, key: TokenKey, /) -> Awaitable[object] | None:
        if key.user_id == "at once":
            raise KeyError("s3cret")
        return None if key.user_id == "plain" else self._load(values, key)

    async def _load(self, values: ValueOperations, key: TokenKey) -> object:
        value = await values.get_value("keys", key.user_id)
        if value is None:
            raise KeyError("s3cret")
        return value

    async def __call__(self, record: RefreshableRecord, *prepared: object) -> Mapping[str, Any]:
        self.calls.append((record["user_id"], *prepared))
        return {"access_token": "new", "expires_in": 3600}


async def _store_expired(store: AuthTokenStore, *users: str) -> None:
    await store.setup()
    for user in users:
        await store.store_token_response("acme", user, {"access_token": "x", "refresh_token": "rt", "expires_in": 1e-6})


def test_the_refresher_gets_what_it_has_prepared(keyring: Keyring) -> None:
    refresher = Prepares()

    async def main() -> None:
        async with open_store("memory://", keyring=keyring, refreshers={"acme": refresher}) as store:
            await _store_expired(store, "with", "plain")
            await store.put_value("keys", "with", {"k": 1})
            for user in ("with", "plain"):
                await store.load_fresh_tokens("acme", user)

    asyncio.run(main())
    assert refresher.calls == [("with", {"k": 1}), ("plain",)]


@pytest.mark.parametrize("user", ["without", "at once"])
def test_an_exception_there_is_a_configuration_error_of_this_row_alone(keyring: Keyring, user: str) -> None:
    """It is named by its type. The provider is not called, and a sweep goes on with the other rows."""
    refresher = Prepares()

    async def main() -> None:
        async with open_store("memory://", keyring=keyring, refreshers={"acme": refresher}) as store:
            await _store_expired(store, user, "plain")
            with pytest.raises(ConfigurationError, match="prepare_refresh raised KeyError") as caught:
                await store.load_fresh_tokens("acme", user)
            assert_silent(caught.value, "s3cret")
            results = {result.user_id: result.outcome async for result in store.refresh_due(within=60)}
            assert results == {user: "failed", "plain": "refreshed"}
            await store.put_value("keys", "without", 7)
            if user == "without":  # the row has no failure
                await store.load_fresh_tokens("acme", user)

    asyncio.run(main())
    assert refresher.calls == [("plain",), *([("without", 7)] if user == "without" else [])]


def test_an_error_of_the_store_there_reaches_the_caller(keyring: Keyring) -> None:
    async def main() -> None:
        class OtherKey(Prepares):
            async def _load(self, values: ValueOperations, key: TokenKey) -> object:
                raise TamperedError(f"no key for {key.user_id}")

        async with open_store("memory://", keyring=keyring, refreshers={"acme": OtherKey()}) as store:
            await _store_expired(store, "with")
            with pytest.raises(TamperedError, match="no key for with"):
                await store.load_fresh_tokens("acme", "with")

    asyncio.run(main())
