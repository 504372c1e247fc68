"""The store's contract, on every backend."""

from __future__ import annotations

import asyncio
import functools
import io
import logging
import pprint
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from rich.console import Console

from support.matrix import Row, every_row
from tokenstore import (
    AuthTokenStore,
    Keyring,
    LockTimeoutError,
    StoreClosedError,
    TamperedError,
    TokenRecord,
    TransactionRequiredError,
    UnknownKeyError,
    UnsupportedOperationError,
    open_store,
)
from tokenstore.protocol import Backend
from tokenstore.records import TokenKey
from tokenstore.sealing import seal_tokens

HOUR = timedelta(hours=1)
ACCESS, REFRESH, SCOPE = "gho_access-secret", "ghr_refresh-secret", "repo-secret"
NORTH, SOUTH = bytes(range(32)), bytes(range(32, 64))

Body = Callable[[AuthTokenStore], Awaitable[None]]


def on_every_row(test: Body) -> Callable[..., None]:
    """Run a coroutine on a fresh store of each row."""

    @every_row
    def run(row: Row, url: str, keyring: Keyring) -> None:
        async def main() -> None:
            async with open_store(url, keyring=keyring, lock_timeout=2) as store:
                await store.setup()
                await test(store)

        asyncio.run(main())

    functools.update_wrapper(run, test, assigned=("__name__", "__qualname__", "__doc__", "__module__"))
    del run.__wrapped__  # type: ignore[attr-defined]  # pytest would take the fixtures from there
    return run


async def load(store: AuthTokenStore, user: str = "u1") -> TokenRecord:
    record = await store.load_tokens("github", user)
    assert record is not None
    return record


@on_every_row
async def test_what_is_passed_is_what_is_stored(store: AuthTokenStore) -> None:
    """Every field comes back; a second store keeps nothing of the first."""
    now = datetime.now(UTC)
    assert await store.load_tokens("github", "u1") is None
    extra = {"scope": SCOPE, "nested": {"list": [1, 2.5, None, True, "é"]}}
    await store.store_tokens("github", "u1", ACCESS, REFRESH, now + HOUR, now + 100 * HOUR, extra=extra)
    first = await load(store)
    assert (first["provider"], first["user_id"]) == ("github", "u1")
    assert (first["access_token"], first["refresh_token"], first["extra"]) == (ACCESS, REFRESH, extra)
    assert first["access_token_expires_at"] == now + HOUR
    assert first["refresh_token_expires_at"] == now + 100 * HOUR
    assert first["key_id"] == "k1"
    assert abs(first["created_at"] - now) < HOUR / 60
    await store.store_tokens("github", "u1", "second", None, None)
    second = await load(store)
    assert (second["access_token"], second["refresh_token"], second["extra"]) == ("second", None, {})
    assert second["access_token_expires_at"] is second["refresh_token_expires_at"] is None
    assert second["generation"] == first["generation"] + 1
    assert second["created_at"] == first["created_at"] <= second["updated_at"]
    assert await store.delete_tokens("github", "u1")
    assert not await store.delete_tokens("github", "u1")
    assert await store.load_tokens("github", "u1") is None


@on_every_row
async def test_times_are_utc_whatever_zone_they_came_in(store: AuthTokenStore) -> None:
    """A naive datetime is UTC, an offset is converted, and a microsecond is kept, from the year 1 to 9999."""
    naive = datetime(2040, 6, 1, 12, 0, 0, 123456)  # what utcnow() gives
    zoned = datetime(2040, 6, 1, 17, 45, 0, 123456, tzinfo=timezone(timedelta(hours=5, minutes=45)))
    for given in (naive, zoned):
        await store.store_tokens("github", "u1", "at", "rt", given)
        loaded = (await load(store))["access_token_expires_at"]
        assert loaded == datetime(2040, 6, 1, 12, 0, 0, 123456, tzinfo=UTC)
        assert loaded.tzinfo is UTC
    for extreme in (datetime.min, datetime.max, datetime(1969, 12, 31), datetime(2038, 1, 20)):
        await store.store_tokens("github", "u1", "at", "rt", extreme, extreme)
        record = await load(store)
        assert record["access_token_expires_at"] == record["refresh_token_expires_at"] == extreme.replace(tzinfo=UTC)


@on_every_row
async def test_an_expiry_of_now_is_not_never(store: AuthTokenStore) -> None:
    """`expires_in: 0` and the epoch itself are expired; only None is never."""
    for moment in (datetime.now(UTC), datetime(1970, 1, 1, tzinfo=UTC)):
        await store.store_tokens("github", "u1", "at", "rt", moment, moment)
        record = await load(store)
        assert not store.is_access_token_valid(record)
        assert not store.is_access_token_valid(record, clock_skew_seconds=0)
        assert not store.is_refresh_token_valid(record)
    await store.store_tokens("github", "u1", "at", "rt", None, None)
    record = await load(store)
    assert store.is_access_token_valid(record)
    assert store.is_refresh_token_valid(record)
    await store.store_tokens("github", "u1", "at", None, None, None)
    assert not store.is_refresh_token_valid(await load(store))


def test_validity_ends_at_the_skew_before_the_expiry(keyring: Keyring) -> None:
    """Valid while now + skew is before the expiry, to the microsecond; a refresh token has no skew."""
    now = datetime(2030, 1, 1, tzinfo=UTC)
    store = open_store("memory://", keyring=keyring, clock=now.timestamp)
    tick = timedelta(microseconds=1)
    for skew in (0, 60, 300.5):
        edge = now + timedelta(seconds=skew)
        assert not store.is_access_token_valid({"access_token_expires_at": edge}, clock_skew_seconds=skew)
        assert store.is_access_token_valid({"access_token_expires_at": edge + tick}, clock_skew_seconds=skew)
    assert not store.is_access_token_valid({"access_token_expires_at": now + timedelta(seconds=60)})
    assert store.is_access_token_valid({"access_token_expires_at": (now + 2 * HOUR).replace(tzinfo=None)})
    refresh: dict[str, Any] = {"refresh_token": "rt", "refresh_token_expires_at": now}
    assert not store.is_refresh_token_valid(refresh)
    assert store.is_refresh_token_valid(refresh | {"refresh_token_expires_at": now + tick})
    assert not store.is_refresh_token_valid({"refresh_token": None, "refresh_token_expires_at": None})


@on_every_row
async def test_a_lock_needs_a_transaction(store: AuthTokenStore) -> None:
    """Outside one, for_update=True says what to write; the transaction's object is dead after its block."""
    with pytest.raises(TransactionRequiredError, match=r"async with store.transaction\(\) as tx"):
        await store.load_tokens("github", "u1", for_update=True)
    async with store.transaction() as tx:
        assert await tx.load_tokens("github", "u1", for_update=True) is None
        await tx.store_tokens("github", "u1", "at", "rt", None)
        assert await store.load_tokens("github", "u1") is None
    assert (await load(store))["access_token"] == "at"
    with pytest.raises(StoreClosedError, match="this transaction has ended"):
        await tx.load_tokens("github", "u1")


@on_every_row
async def test_an_error_in_the_block_undoes_it(store: AuthTokenStore) -> None:
    """Nothing of the block stays, and the row can be locked again at once."""
    await store.store_tokens("github", "u1", "before", None, None)
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        async with store.transaction() as tx:
            await tx.load_tokens("github", "u1", for_update=True)
            await tx.store_tokens("github", "u1", "within", None, None)
            await tx.delete_tokens("github", "u1")
            raise ZeroDivisionError
    async with store.transaction() as tx:
        record = await tx.load_tokens("github", "u1", for_update=True)
        assert record is not None
        assert record["access_token"] == "before"


@on_every_row
async def test_a_failed_call_ends_the_transaction(store: AuthTokenStore) -> None:
    """After a lock that was not to be had, the block can only be left; no backend commits what came before."""
    await store.store_tokens("github", "u1", "before", None, None)
    async with store.transaction() as holder:
        await holder.load_tokens("github", "u1", for_update=True)
        with pytest.raises(StoreClosedError, match="is rolled back"):  # noqa: PT012
            async with store.transaction() as tx:
                with pytest.raises(LockTimeoutError, match=r"u1|lock was not free"):
                    await tx.load_tokens("github", "u1", for_update=True)
                with pytest.raises(StoreClosedError, match="a call in this transaction failed"):
                    await tx.store_tokens("github", "u2", "lost", None, None)
    assert await store.load_tokens("github", "u2") is None


@on_every_row
async def test_the_refresh_of_the_contract_happens_once(store: AuthTokenStore) -> None:
    """Of many that find the token expired, one refreshes under the lock; the others wait and read its tokens."""
    await store.store_tokens("github", "u1", "old", "rt-0", datetime.now(UTC) - HOUR)
    calls = 0

    async def worker() -> str:
        nonlocal calls
        async with store.transaction() as tx:
            record = await tx.load_tokens("github", "u1", for_update=True)
            assert record is not None
            if not store.is_access_token_valid(record):
                calls += 1
                await asyncio.sleep(0)  # the provider answers
                await tx.store_tokens("github", "u1", "new", "rt-1", datetime.now(UTC) + HOUR)
        return str((await load(store))["access_token"])

    assert await asyncio.gather(*(worker() for _ in range(25))) == ["new"] * 25
    assert calls == 1


@on_every_row
async def test_listing_shows_rows_but_no_token(store: AuthTokenStore) -> None:
    """By user, by provider or all, in the order of UTF-8 bytes, over any page size, with no sealed value opened."""
    keys = [(provider, user) for provider in ("github", "gitlab", "é") for user in ("Z", "a", "b", "ß", "😀")]
    for provider, user in keys:
        await store.store_tokens(provider, user, ACCESS, None if user == "a" else REFRESH, None)

    async def listed(**options: Any) -> list[tuple[str, str]]:
        return [(entry["provider"], entry["user_id"]) async for entry in store.list_tokens(**options)]

    for page_size in (1, 2, 3, 15, 16, 500):
        assert await listed(page_size=page_size) == keys
        assert await listed(provider="gitlab", page_size=page_size) == [key for key in keys if key[0] == "gitlab"]
        assert await listed(user_id="ß", page_size=page_size) == [key for key in keys if key[1] == "ß"]
        assert await listed(provider="é", user_id="b", page_size=page_size) == [("é", "b")]
    assert await listed(provider="none") == []
    blind = AuthTokenStore(backend=store._backend, keyring=Keyring({"other": SOUTH}))
    entries = [entry async for entry in blind.list_tokens(user_id="a")]
    assert [entry["has_refresh_token"] for entry in entries] == [False] * 3
    assert all(blind.needs_reseal(entry) and not store.needs_reseal(entry) for entry in entries)
    assert ACCESS not in repr(entries)


@on_every_row
async def test_rows_may_change_while_they_are_listed(store: AuthTokenStore) -> None:
    """Between pages nothing is held: the listing goes on after a row that is gone, and finds new ones further on."""
    for user in "bdfh":
        await store.store_tokens("github", user, "at", None, None)
    seen = []
    async for entry in store.list_tokens(page_size=1):
        seen.append(entry["user_id"])
        if entry["user_id"] == "d":
            await store.delete_tokens("github", "d")
            await store.delete_tokens("github", "f")
            await store.store_tokens("github", "a", "at", None, None)
            await store.store_tokens("github", "g", "at", None, None)
    assert seen == ["b", "d", "g", "h"]


@on_every_row
async def test_a_new_key_reseals(store: AuthTokenStore) -> None:
    """The tokens, times and generation stay; afterwards the old key can go; a newer write is never overwritten."""
    backend = store._backend
    north = AuthTokenStore(backend=backend, keyring=Keyring({"north": NORTH}))
    both = AuthTokenStore(backend=backend, keyring=Keyring({"south": SOUTH, "north": NORTH}))
    south = AuthTokenStore(backend=backend, keyring=Keyring({"south": SOUTH}))
    await north.store_tokens("github", "u1", ACCESS, REFRESH, datetime.now(UTC), None, extra={"scope": SCOPE})
    with pytest.raises(UnknownKeyError, match="'north'"):
        await south.load_tokens("github", "u1")
    before = await load(both)
    assert both.needs_reseal(before)
    assert not north.needs_reseal(before)
    assert await both.reseal_tokens("github", "u1")
    assert not await both.reseal_tokens("github", "u1")
    assert not await both.reseal_tokens("github", "nobody")
    assert await load(south) == TokenRecord(before | {"key_id": "south"})
    # The loser of a race: its read was before a newer write, its rewrap comes after.
    await north.store_tokens("github", "u1", "newer", REFRESH, None)
    stale = seal_tokens(
        Keyring({"south": SOUTH}),
        TokenKey("github", "u1"),
        access_token="stale",
        refresh_token=None,
        extra=None,
        access_token_expires_at=None,
        refresh_token_expires_at=None,
    )
    assert not await backend.rewrap(TokenKey("github", "u1"), stale, generation=before["generation"])
    assert (await load(both))["access_token"] == "newer"


@on_every_row
async def test_sealed_values_do_not_open_elsewhere(store: AuthTokenStore) -> None:
    """Ciphertexts swapped between rows or columns, flipped or cut are errors, whoever wrote them to the database."""
    backend: Backend = store._backend
    mine, theirs = TokenKey("github", "mine"), TokenKey("github", "theirs")
    for key in (mine, theirs):
        await store.store_tokens(*key, ACCESS, REFRESH, None, extra={"scope": SCOPE})
    rows = await backend.get([mine, theirs])
    good, stolen = (row.tokens for row in rows if row is not None)
    flipped = bytearray(good.access_token)
    flipped[-1] ^= 1
    for bad in (
        replace(good, access_token=stolen.access_token),
        replace(good, refresh_token=stolen.refresh_token),
        replace(good, extra=stolen.extra),
        replace(good, access_token=good.refresh_token or b""),
        replace(good, refresh_token=good.access_token),
        replace(good, access_token=bytes(flipped)),
        replace(good, access_token=good.access_token[:-1]),
        replace(good, access_token=ACCESS.encode()),
        replace(good, access_token=b""),
    ):
        await backend.put({mine: bad})
        with pytest.raises(TamperedError, match="user 'mine'") as caught:
            await store.load_tokens(*mine)
        assert ACCESS not in str(caught.value)
    await backend.put({mine: good})
    restored = await store.load_tokens(*mine)
    assert restored is not None
    assert restored["access_token"] == ACCESS


@on_every_row
async def test_the_largest_tokens(store: AuthTokenStore) -> None:
    """256 KiB each, of letters that take four bytes."""
    largest = "😀" * (64 * 1024)
    await store.store_tokens("github", "u1", largest, largest, None, extra={"id_token": "x" * (256 * 1024 - 20)})
    record = await load(store)
    assert record["access_token"] == record["refresh_token"] == largest


@on_every_row
async def test_a_record_shows_no_token(store: AuthTokenStore) -> None:
    """However it is printed or logged, copied or merged, a record keeps its secrets; as a dict it has them."""
    await store.store_tokens("github", "u1", ACCESS, REFRESH, None, extra={"scope": SCOPE})
    record = await load(store)
    assert isinstance(record, dict)
    assert record["access_token"] == ACCESS
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(record)
    console.print({"inside": [record]})
    log = logging.LogRecord("app", logging.INFO, "app.py", 1, "loaded %s", (record,), None)
    shown = [repr(record), str(record), f"{record}", f"{record!r:>9}", pprint.pformat(record), pprint.pformat([record])]
    shown += [log.getMessage(), console.export_text(), repr({"inside": record}), repr(record.copy())]
    shown += [repr(record | {"more": 1}), repr({"more": 1} | record)]
    for text in shown:
        assert "<redacted>" in text
        assert not [secret for secret in (ACCESS, REFRESH, SCOPE) if secret in text]
    await store.store_tokens("github", "u2", ACCESS, None, None)
    assert "'refresh_token': None" in repr(await load(store, "u2"))


@on_every_row
async def test_nothing_leaks_into_reprs_and_logs(store: AuthTokenStore) -> None:
    """Neither the store nor a sealed row shows a token, a key or a password."""
    await store.store_tokens("github", "u1", ACCESS, REFRESH, None)
    rows = await store._backend.get([TokenKey("github", "u1")])
    for shown in (repr(store), repr(store._backend), repr(rows), repr(store._keyring)):
        assert not [secret for secret in (ACCESS, REFRESH, "tokenstore_test:tokenstore") if secret in shown]


@on_every_row
async def test_a_closed_store_says_so(store: AuthTokenStore) -> None:
    """Every call after aclose() is an error; closing again is none."""
    await store.aclose()
    await store.aclose()
    assert "closed" in repr(store)
    for call in (
        store.setup(),
        store.store_tokens("github", "u1", "at", None, None),
        store.load_tokens("github", "u1"),
        store.delete_tokens("github", "u1"),
        store.reseal_tokens("github", "u1"),
        anext(store.list_tokens()),
        store.transaction().__aenter__(),
    ):
        with pytest.raises(StoreClosedError):
            await call


class Lockless:
    """A backend without the optional ability, over one that has it."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        if name in ("transaction", "lock"):
            raise AttributeError(name)
        return getattr(self._backend, name)


def test_a_backend_without_row_locks_says_so(keyring: Keyring) -> None:
    """Everything else works on it; for_update and transaction() name the reason."""

    async def main() -> None:
        inner: Any = Lockless(open_store("memory://", keyring=keyring)._backend)
        async with AuthTokenStore(backend=inner, keyring=keyring) as store:
            await store.store_tokens("github", "u1", "at", None, None)
            assert (await load(store))["access_token"] == "at"
            with pytest.raises(UnsupportedOperationError, match="no row locks"):
                await store.load_tokens("github", "u1", for_update=True)
            with pytest.raises(UnsupportedOperationError, match="no transactions"):
                async with store.transaction():
                    pass

    asyncio.run(main())
