"""A decorator that runs a test with a new store on each backend."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable

from support.matrix import Row, every_row
from tokenstore import AuthTokenStore, Keyring, open_store

Body = Callable[[AuthTokenStore], Awaitable[None]]


def on_every_row(test: Body) -> Callable[..., None]:
    """Run a coroutine function with a new store, on each backend."""

    @every_row
    def run(row: Row, url: str, keyring: Keyring) -> None:
        async def main() -> None:
            async with open_store(url, keyring=keyring, lock_timeout=2) as store:
                await store.setup()
                await test(store)

        asyncio.run(main())

    functools.update_wrapper(run, test, assigned=("__name__", "__qualname__", "__doc__", "__module__"))
    del run.__wrapped__  # type: ignore[attr-defined]  # pytest would read the fixtures from it
    return run
