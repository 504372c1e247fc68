"""The clock that a store is opened with: the memory backend follows it, a database does not."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from tokenstore import Keyring, ProviderUnavailableError, open_store
from tokenstore.records import TokenKey
from tokenstore.refresh.rows import new_holder
from tokenstore.testing import FakeClock
from tokenstore_memory import MemoryBackend

LOGIN = {"access_token": "a", "refresh_token": "r", "expires_in": 3600}


class Provider:
    """Is down until it is repaired."""

    def __init__(self) -> None:
        self.is_down = True
        self.calls = 0

    async def __call__(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        self.calls += 1
        if self.is_down:
            raise ProviderUnavailableError("down")
        return {**LOGIN, "access_token": f"a{self.calls}"}


def test_expiry_times_and_retry_times_follow_the_clock(keyring: Keyring) -> None:
    async def main() -> None:
        clock, provider = FakeClock(1_000_000.0), Provider()
        async with open_store("memory://", keyring=keyring, clock=clock, refreshers={"github": provider}) as store:
            record = await store.store_token_response("github", "u1", LOGIN)
            assert record["created_at"].timestamp() == 1_000_000
            assert await store.load_fresh_tokens("github", "u1") == record
            clock.advance(3600)
            assert not store.is_access_token_valid(record)
            for _ in range(2):
                with pytest.raises(ProviderUnavailableError):
                    await store.load_fresh_tokens("github", "u1")
            provider.is_down = False
            with pytest.raises(ProviderUnavailableError):
                await store.load_fresh_tokens("github", "u1")
            assert provider.calls == 1
            clock.advance(60)
            fresh = await store.load_fresh_tokens("github", "u1", missing="raise")
            assert fresh["access_token"] == "a2"

    asyncio.run(main())


def test_leases_and_values_expire_by_the_clock(keyring: Keyring) -> None:
    async def main() -> None:
        clock = FakeClock()
        async with open_store("memory://", keyring=keyring, clock=clock) as store:
            record = await store.store_token_response("github", "u1", LOGIN)
            await store.put_value("login", "state", "verifier", ttl=600)

            async def claimed() -> bool:
                return await store._backend.claim_lease(
                    TokenKey("github", "u1"), generation=record["generation"], holder=new_holder(30), duration=30
                )

            assert (await claimed(), await claimed()) == (True, False)
            clock.advance(31)
            assert await claimed()
            assert await store.get_value("login", "state") == "verifier"
            clock.advance(569)
            assert await store.get_value("login", "state") is None

    asyncio.run(main())


def test_a_backend_that_is_passed_keeps_its_own_clock(keyring: Keyring) -> None:
    async def main() -> None:
        backend = MemoryBackend(clock=FakeClock(2_000_000.0))
        async with open_store(backend, keyring=keyring, clock=FakeClock(1_000_000.0)) as store:
            record = await store.store_token_response("github", "u1", LOGIN)
            assert record["created_at"].timestamp() == 2_000_000

    asyncio.run(main())


@pytest.mark.sqlite
def test_a_database_has_a_clock_of_its_own(keyring: Keyring, tmp_path: Any) -> None:
    async def main() -> None:
        clock = FakeClock()
        url = f"sqlite:///{tmp_path}/tokens.db"
        async with open_store(url, keyring=keyring, clock=clock, refreshers={"github": Provider()}) as store:
            await store.setup()
            record = await store.store_token_response("github", "u1", LOGIN)
            clock.advance(7200)
            assert not store.is_access_token_valid(record)
            assert await store.load_fresh_tokens("github", "u1") == record

    asyncio.run(main())
