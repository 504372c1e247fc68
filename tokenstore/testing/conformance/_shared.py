"""Tests of two backend objects on the same data."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tokenstore.protocol import Backend
from tokenstore.testing.conformance._helpers import KEY, LONG, assert_cannot_change, read_row, sealed, store_row
from tokenstore.testing.conformance._testbed import Testbed, on_two_backends, on_url


class SharedBackendConformance(Testbed):
    """Tests of two backend objects that open the same data, as two processes do.

    Inherit from it together with :class:`BackendConformance` or :class:`RowLockConformance`. In their tests of two
    callers, each caller then has its own backend object.
    """

    @asynccontextmanager
    async def second(self, url: str, backend: Backend, **options: Any) -> AsyncIterator[Backend]:  # noqa: ARG002
        """Yield a second backend object that opens the same URL."""
        async with self.opened(url, **options) as other:
            yield other

    @on_two_backends()
    async def test_one_backend_reads_what_the_other_wrote(self, backend: Backend, other: Backend) -> None:
        await backend.put(KEY, sealed("a"))
        assert (await read_row(other)).tokens == sealed("a")
        await other.put(KEY, sealed("b"))
        assert (await read_row(backend)).tokens == sealed("b")
        assert await other.delete(KEY)
        assert await backend.get(KEY) is None

    @on_two_backends()
    async def test_closing_one_backend_leaves_the_other_open(self, backend: Backend, other: Backend) -> None:
        await backend.put(KEY, sealed())
        await other.aclose()
        assert (await read_row(backend)).tokens == sealed()

    @on_two_backends()
    async def test_a_lease_claimed_on_one_backend_holds_on_the_other(self, backend: Backend, other: Backend) -> None:
        generation = await store_row(backend)
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        assert (await read_row(other)).lease_holder == "h"
        assert await other.claim_lease(KEY, generation=generation, holder="other", duration=LONG) is False
        assert await backend.release_lease(KEY, generation=generation, holder="h")
        assert await other.claim_lease(KEY, generation=generation, holder="other", duration=LONG) is True
        await assert_cannot_change(backend, generation, "h")

    @on_url
    async def test_setup_from_eight_backends_at_once(self, url: str) -> None:
        backends = [self.open(url) for _ in range(8)]
        try:
            await asyncio.gather(*(backend.setup() for backend in backends))
            await asyncio.gather(*(backend.put(KEY, sealed()) for backend in backends))
            assert len(await backends[0].scan(limit=2)) == 1
        finally:
            for backend in backends:
                await self.close(backend)
