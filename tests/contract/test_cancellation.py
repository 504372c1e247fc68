"""Calls that are cancelled repeatedly, as anyio's cancel scopes do, leave no task running and lose no connection."""

from __future__ import annotations

import asyncio
import gc
import random
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import pytest

from support.matrix import Row, every_row
from support.polling import until
from tokenstore import AuthTokenStore, Keyring, open_store

_EXPIRY = datetime.now(UTC) + timedelta(hours=1)
_CALLS = 1200
_AT_ONCE = 20
_LONGEST = 0.020  # most seconds until a call is cancelled, so that some have ended and some have not begun


@pytest.mark.parametrize("kind", ["transaction", "store", "load", "list"])
@every_row
def test_calls_cancelled_in_cancel_scopes_return_their_connections(
    row: Row, url: str, keyring: Keyring, kind: str
) -> None:
    """As when clients of a web server disconnect at any moment: no connection is lost, and no error goes unnoticed."""
    asyncio.run(_calls_in_cancel_scopes(row, url, keyring, kind))
    gc.collect()


async def _calls_in_cancel_scopes(row: Row, url: str, keyring: Keyring, kind: str) -> None:
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    random_source = random.Random(kind)
    options: dict[str, Any] = {} if row.name == "memory" else {"pool_size": 5}
    async with open_store(url, keyring=keyring, **options) as store:
        await store.setup()
        for number in range(4):
            await store.store_tokens("github", f"u{number}", "a", "r", _EXPIRY)

        async def one(number: int) -> None:
            with anyio.move_on_after(random_source.uniform(0, _LONGEST)):
                await _call(store, kind, f"u{number % 4}", f"a{number}")

        for start in range(0, _CALLS, _AT_ONCE):
            await asyncio.gather(*(one(number) for number in range(start, start + _AT_ONCE)))
        source = getattr(store._backend, "_source", None)
        # A connection that a cancelled caller was opening is returned to the pool once it is open.
        await until(lambda: source is None or source.in_use == 0)
        # All connections of the pool can be used again.
        assert all(await asyncio.gather(*(store.load_tokens("github", f"u{number % 4}") for number in range(10))))
    gc.collect()
    assert problems == []


async def _call(store: AuthTokenStore, kind: str, user_id: str, token: str) -> None:
    match kind:
        case "transaction":
            async with store.transaction() as tx:
                await tx.load_tokens("github", user_id, for_update=True)
                await tx.store_tokens("github", user_id, token, "r", _EXPIRY)
        case "store":
            await store.store_tokens("github", user_id, token, "r", _EXPIRY)
        case "load":
            await store.load_tokens("github", user_id)
        case "list":
            async for _ in store.list_tokens():
                pass


@pytest.mark.parametrize("pairs", [100, pytest.param(1250, marks=pytest.mark.soak)])
@every_row
def test_a_cancelled_store_never_takes_effect_after_its_caller_was_told(
    row: Row, url: str, keyring: Keyring, pairs: int
) -> None:
    """A cancelled ``store_tokens`` must not overwrite the tokens of a later call."""

    async def main() -> int:
        stale = 0
        random_source = random.Random(row.name)
        async with open_store(url, keyring=keyring) as store:
            await store.setup()

            async def one(user_id: str) -> None:
                nonlocal stale
                for number in range(pairs):
                    cancelled = asyncio.create_task(_call(store, "store", user_id, f"cancelled{number}"))
                    for _ in range(random_source.randrange(12)):
                        await asyncio.sleep(0)
                    cancelled.cancel()
                    await asyncio.wait([cancelled])
                    await _call(store, "store", user_id, f"stored{number}")
                    record = await store.load_tokens("github", user_id)
                    stale += record is None or record["access_token"] != f"stored{number}"

            await asyncio.gather(*(one(f"u{number}") for number in range(8)))
        return stale

    assert asyncio.run(main()) == 0
