"""Tests of setting a backend up and closing it."""

from __future__ import annotations

import asyncio

from tokenstore.errors import StoreClosedError, TableMissingError
from tokenstore.protocol import Backend, SupportsRowLocks
from tokenstore.records import TokenKey
from tokenstore.testing.conformance._helpers import KEY, each_operation, raises, read_row, sealed, store_row
from tokenstore.testing.conformance._testbed import Testbed, on_one_backend, on_url


class SetupTests(Testbed):
    """Tests of setting a backend up and closing it."""

    @on_one_backend
    async def test_is_a_backend(self, backend: Backend) -> None:
        assert isinstance(backend, Backend)

    # Setting up and closing

    @on_url
    async def test_without_setup_every_operation_raises_table_missing_error(self, url: str) -> None:
        """No operation lets the driver's own exception through."""
        async with self.opened(url, setup=False) as backend:
            if not self.needs_setup:
                assert await backend.get(KEY) is None
                return
            for operation in each_operation(backend):
                with raises(TableMissingError):
                    await operation()

    @on_one_backend
    async def test_repeated_setup_changes_nothing(self, backend: Backend) -> None:
        """A second ``setup()``, and eight more at the same time, succeed and leave existing rows as they are."""
        generation = await store_row(backend)
        await backend.setup()
        await asyncio.gather(*(backend.setup() for _ in range(8)))
        assert (await read_row(backend)).generation == generation

    @on_url
    async def test_first_setup_from_eight_tasks_at_once(self, url: str) -> None:
        async with self.opened(url, setup=False) as backend:
            await asyncio.gather(*(backend.setup() for _ in range(8)))
            await store_row(backend)

    @on_one_backend
    async def test_operations_after_aclose_raise_store_closed_error(self, backend: Backend) -> None:
        """``aclose()`` can be called twice; every later operation raises StoreClosedError."""
        await store_row(backend)
        await backend.aclose()
        await backend.aclose()
        for operation in [*each_operation(backend), backend.setup]:
            with raises(StoreClosedError):
                await operation()
        if isinstance(backend, SupportsRowLocks):
            with raises(StoreClosedError):
                async with backend.transaction() as transaction:
                    await transaction.get(KEY)

    @on_url
    async def test_closing_a_backend_that_was_never_used(self, url: str) -> None:
        backend = self.open(url)
        await backend.aclose()
        await self.close(backend)

    # get, put, delete

    @on_one_backend
    async def test_many_concurrent_calls_get_their_own_answers(self, backend: Backend) -> None:
        """Each of 1200 callers gets the row it asked for, even if the backend reads several rows in one statement."""
        keys = [TokenKey("github", f"user-{number}") for number in range(600)]
        stored = dict.fromkeys(keys[::3])
        await asyncio.gather(*(backend.put(key, sealed(key.user_id)) for key in stored))
        records = await asyncio.gather(*(backend.get(key) for key in [*keys, *reversed(keys)]))
        for key, record in zip([*keys, *reversed(keys)], records, strict=True):
            if key in stored:
                assert record is not None
                assert (record.key, record.tokens) == (key, sealed(key.user_id))
            else:
                assert record is None
