"""A row that is not the requested one is refused, whether the database or an attacker in front of it returned it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from support.connection_faults import FaultProxy
from support.database import Place, app_engine
from support.matrix import Row, server_rows
from tokenstore import AuthTokenStore, Keyring, TamperedError, TokenRecord, open_store
from tokenstore.protocol import BackendTransaction
from tokenstore.records import DueKey, DueRow, ScannedRow, SealedRecord, TokenKey
from tokenstore_memory import MemoryBackend

ALICE, BOBBY = "alice", "bobby"
OLD_KEY, NEW_KEY = bytes(range(32)), bytes(range(32, 64))
NOW = datetime.now(UTC)
FRESH, EXPIRED = NOW + timedelta(hours=1), NOW - timedelta(hours=1)

Call = Callable[[AuthTokenStore], Awaitable[Any]]


class _Refresher:
    """Records the tokens that it has to refresh or revoke."""

    def __init__(self) -> None:
        self.asked: list[str | None] = []

    async def __call__(self, record: TokenRecord) -> Mapping[str, Any]:
        self.asked.append(record["refresh_token"])
        return {"access_token": "new", "refresh_token": "new", "expires_in": 3600}

    async def revoke(self, record: TokenRecord) -> None:
        self.asked.append(record["refresh_token"])


class _Swapping(MemoryBackend):
    """Returns bobby's row for alice, and lists rows that do not match the filter."""

    def __init__(self) -> None:
        super().__init__()
        self.swaps = False

    def _asked(self, key: TokenKey) -> TokenKey:
        return TokenKey(key.provider, BOBBY) if self.swaps else key

    async def get(self, key: TokenKey) -> SealedRecord | None:
        return await super().get(self._asked(key))

    async def scan(self, *, provider: str | None = None, **rest: Any) -> list[ScannedRow]:
        page = await super().scan(provider=provider, **rest)
        if not self.swaps:
            return page
        return [replace(row, key=TokenKey("gitlab", row.key.user_id)) for row in page]

    async def scan_due(self, **rest: Any) -> list[DueRow]:
        page = await super().scan_due(**rest)
        return [replace(row, key=TokenKey("gitlab", row.key.user_id)) for row in page] if self.swaps else page

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[BackendTransaction]:  # type: ignore[override]
        async with super().transaction() as transaction:
            lock = transaction.lock
            transaction.lock = lambda key: lock(self._asked(key))  # type: ignore[method-assign]
            yield transaction


async def _locked(store: AuthTokenStore) -> None:
    async with store.transaction() as tx:
        await tx.load_tokens("github", ALICE, for_update=True)


async def _listed(store: AuthTokenStore) -> None:
    async for _ in store.list_tokens(provider="github"):
        pass


async def _listed_with_metadata(store: AuthTokenStore) -> None:
    async for _ in store.list_tokens(provider="github", with_metadata=True):
        pass


async def _refreshed_due(store: AuthTokenStore) -> None:
    async for result in store.refresh_due(within=86400):
        if result.error is not None:
            raise result.error


CALLS: dict[str, Call] = {
    "load": lambda store: store.load_tokens("github", ALICE),
    "lock": _locked,
    "load fresh": lambda store: store.load_fresh_tokens("github", ALICE),
    "forced refresh": lambda store: store.load_fresh_tokens("github", ALICE, force=True, force_min_age=0),
    "reseal": lambda store: store.reseal_tokens("github", ALICE),
    "revoke": lambda store: store.revoke_tokens("github", ALICE),
    "update metadata": lambda store: store.update_metadata("github", ALICE, {"a": 1}),
    "list": _listed,
    "list with metadata": _listed_with_metadata,
    "refresh due": _refreshed_due,
}


@pytest.mark.memory
@pytest.mark.parametrize("expiry", [FRESH, EXPIRED], ids=["fresh", "expired"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_another_row_is_refused_in_every_call(call: Call, expiry: datetime) -> None:
    """No caller gets another user's tokens, no provider gets another provider's, and none of them is written."""

    async def main() -> None:
        backend, refresher = _Swapping(), _Refresher()
        await _fill(AuthTokenStore(backend=backend, keyring=Keyring({"old": OLD_KEY})), expiry)
        keyring = Keyring({"new": NEW_KEY, "old": OLD_KEY})
        async with AuthTokenStore(
            backend=backend, keyring=keyring, refreshers={"github": refresher, "gitlab": refresher}
        ) as store:
            before = await backend.scan(limit=10)
            backend.swaps = True
            with pytest.raises(TamperedError) as caught:
                await call(store)
            backend.swaps = False
            assert "bobby-secret" not in str(caught.value)
            assert refresher.asked == []
            assert [replace(row, as_of=0) for row in await backend.scan(limit=10)] == [
                replace(row, as_of=0) for row in before
            ]

    asyncio.run(main())


async def _fill(store: AuthTokenStore, expiry: datetime) -> None:
    for user_id in (ALICE, BOBBY):
        await store.store_tokens("github", user_id, f"{user_id}-secret", f"{user_id}-secret-r", expiry)


@pytest.mark.memory
def test_a_listing_whose_pages_do_not_advance_is_refused() -> None:
    """Otherwise the listing, or the sweep, would never end."""

    class Repeating(MemoryBackend):
        async def scan(self, *, after: TokenKey | None = None, **rest: Any) -> list[ScannedRow]:
            return await super().scan(after=None, **rest)

        async def scan_due(self, *, after: DueKey | None = None, **rest: Any) -> list[DueRow]:
            return await super().scan_due(after=None, **rest)

    async def main() -> None:
        async with AuthTokenStore(backend=Repeating(), keyring=Keyring({"k1": OLD_KEY})) as store:
            await _fill(store, FRESH)
            with pytest.raises(TamperedError):
                async for _ in store.list_tokens(page_size=1):
                    pass
            await _fill(store, EXPIRED)
            refresher = _Refresher()
            with pytest.raises(TamperedError):
                async for _ in store.refresh_due(within=60, page_size=1, provider="github", refresh=refresher):
                    pass

    asyncio.run(main())


# ---- Attacks on the network


async def _many(store: AuthTokenStore) -> None:
    """Load several rows in one statement: each is refused, except the row that the attacker did not change."""
    users = [ALICE, "carol", *([ALICE] * 30)]
    answers = await asyncio.gather(*(store.load_tokens("github", user) for user in users), return_exceptions=True)
    for user, answer in zip(users, answers, strict=True):
        if user == "carol":
            assert answer is None
        elif not isinstance(answer, TamperedError):
            raise AssertionError(f"{user} got {answer!r}")
    raise TamperedError("as expected of alice's")


WIRE_CALLS: dict[str, Call] = {
    **{name: CALLS[name] for name in ("load", "lock", "load fresh", "forced refresh", "reseal")},
    "loads in one statement": _many,
}


@server_rows
def test_a_row_that_a_proxy_substituted_is_refused(row: Row, url: str) -> None:
    """An attacker between the store and the server replaces the user id in the parameters of all statements."""

    async def main() -> None:
        async with open_store(url, keyring=Keyring({"old": OLD_KEY})) as direct, FaultProxy(url) as proxy:
            await direct.setup()
            await _fill(direct, EXPIRED)
            refresher = _Refresher()
            keyring = Keyring({"new": NEW_KEY, "old": OLD_KEY})
            async with open_store(
                proxy.url, keyring=keyring, refreshers={"github": refresher}, refresh_timeout=1
            ) as store:
                for name, call in WIRE_CALLS.items():
                    with proxy.swapping(b"alice", b"bobby"), pytest.raises(TamperedError):
                        await call(store)
                    assert proxy.swapped > 0, name
            await _in_a_session(Place(row, proxy.url), proxy, keyring)
            assert refresher.asked == []
            for user_id in (ALICE, BOBBY):
                record = await direct.load_tokens("github", user_id)
                assert record is not None
                assert record["access_token"] == f"{user_id}-secret"

    asyncio.run(main())


async def _in_a_session(place: Place, proxy: FaultProxy, keyring: Keyring) -> None:
    async with app_engine(place) as engine, AsyncSession(engine) as session:
        store = AuthTokenStore(session, keyring=keyring, **place.options)
        for for_update in (False, True):
            with proxy.swapping(b"alice", b"bobby"), pytest.raises(TamperedError):
                await store.load_tokens("github", ALICE, for_update=for_update)
            assert proxy.swapped > 0
            await session.rollback()
