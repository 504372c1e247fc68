"""Tests of reading the rows whose tokens expire soon."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from tokenstore.protocol import Backend
from tokenstore.records import DueKey, DueRow, Failure, TokenKey, empty_tokens
from tokenstore.testing.conformance._helpers import (
    KEY,
    LONG,
    OTHER,
    THIRD,
    fail_refresh,
    put_all,
    read_row,
    sealed,
    store_row,
)
from tokenstore.testing.conformance._testbed import Testbed, on_one_backend

_FIRST_TIME, _LAST_TIME = -62_135_596_800_000_000, 253_402_300_799_999_999
_SECOND = 1_000_000


async def due_rows(backend: Backend, limit: int, *, provider: str = KEY.provider, within: float = 0.0) -> list[DueRow]:
    """Read all due rows of a provider, ``limit`` rows a page."""
    rows: list[DueRow] = []
    while True:
        as_of, after = (rows[0].as_of, rows[-1].position) if rows else (None, None)
        page = await backend.scan_due(provider=provider, within=within, as_of=as_of, after=after, limit=limit)
        assert len(page) <= limit
        rows += page
        if len(page) < limit:
            return rows


async def due_keys(backend: Backend, provider: str = KEY.provider) -> list[TokenKey]:
    return [row.key for row in await due_rows(backend, 100, provider=provider)]


class DueTests(Testbed):
    """Tests of ``scan_due``."""

    @on_one_backend
    async def test_due_rows_are_read_in_order_of_their_times(self, backend: Backend) -> None:
        """Rows that are due at the same time come in order of user id and account, compared as UTF-8 bytes."""
        users, accounts, times = ("Z", "a", "é", "\ufb00", "😀"), ("", "A", "a"), (5, 1, 3)
        keys = [TokenKey("github", user, account) for user, account in product(users, accounts)]
        due = {key: times[number % 3] for number, key in enumerate(keys)}
        await put_all(backend, {key: sealed(access_token_expires_at=time) for key, time in reversed(due.items())})
        await put_all(backend, {key._replace(provider="GitHub"): sealed() for key in keys[:3]})
        expected = sorted(keys, key=lambda key: (due[key], key.user_id.encode(), key.account.encode()))
        for limit in (1, 2, 4, 5, 14, 15, 16):
            rows = await due_rows(backend, limit)
            assert [row.key for row in rows] == expected
            assert [row.due_at for row in rows] == sorted(due.values())
        assert await due_keys(backend, "gitlab") == []

    @on_one_backend
    async def test_due_rows_after_a_position_where_no_row_is(self, backend: Backend) -> None:
        keys = {TokenKey("github", user, account): ord(user) % 3 for user in "bcd" for account in ("", "b")}
        await put_all(backend, {key: sealed(access_token_expires_at=time) for key, time in keys.items()})
        positions = {key: DueKey(time, key.user_id, key.account) for key, time in keys.items()}
        for time, user, account in product(range(-1, 4), "abcde", ("", "a", "b", "c")):
            after = DueKey(time, user, account)
            expected = sorted((key for key in keys if positions[key] > after), key=positions.__getitem__)
            for limit in (1, 2, 10):
                found = await backend.scan_due(provider="github", within=1.0, as_of=0, after=after, limit=limit)
                assert [row.key for row in found] == expected[:limit]

    @on_one_backend
    async def test_a_due_row_has_the_values_of_its_row(self, backend: Backend) -> None:
        await store_row(backend)
        await store_row(backend, OTHER)
        record = await read_row(backend)
        rows = await backend.scan_due(provider=KEY.provider, within=0.0, limit=2)
        due_at = record.tokens.access_token_expires_at
        assert due_at is not None
        assert replace(rows[0], as_of=0) == DueRow(KEY, due_at, due_at, record.updated_at, as_of=0)
        assert [type(value) for value in (rows[0].due_at, rows[0].as_of)] == [int, int]
        assert rows[0].as_of >= record.as_of
        assert rows[0].as_of == rows[1].as_of, "the first page was read as of several times"

    @on_one_backend
    async def test_a_later_page_tells_when_it_was_read(self, backend: Backend) -> None:
        """The argument ``as_of`` sets the end of the sweep; the ``as_of`` of a row is the time of the read."""
        await store_row(backend)
        started = await backend.clock()
        for as_of in (started - 1000 * _SECOND, started + 1000 * _SECOND):
            [row] = await backend.scan_due(provider=KEY.provider, within=2000.0, as_of=as_of, limit=10)
            assert started - _SECOND <= row.as_of <= await backend.clock() + _SECOND

    @on_one_backend
    async def test_rows_are_due_up_to_a_time(self, backend: Backend) -> None:
        """The time is on the database's clock, or on the one of an earlier page; a row at that very time is due."""
        await store_row(backend)
        now = (await read_row(backend)).as_of
        soon, later = now + 1000 * _SECOND, now + 2000 * _SECOND
        await backend.put(KEY, sealed(access_token_expires_at=soon))
        await backend.put(OTHER, sealed(access_token_expires_at=later))

        async def found(within: float, as_of: int | None = None) -> list[TokenKey]:
            page = await backend.scan_due(provider=KEY.provider, within=within, as_of=as_of, limit=10)
            return [row.key for row in page]

        assert await found(0.0) == []
        assert await found(1500.0) == [KEY]
        assert await found(1e9) == [KEY, OTHER]
        assert await found(1000.0, now) == [KEY]
        assert await found(999.999_999, now) == []
        assert await found(0.0, later) == [KEY, OTHER]
        assert await found(0.0, later - 1) == [KEY]

    @on_one_backend
    async def test_due_times_from_the_first_year_to_the_last(self, backend: Backend) -> None:
        times = (_FIRST_TIME, -1, 0, 1, 2**31 * _SECOND, _LAST_TIME)
        keys = {TokenKey("github", f"u{number}"): time for number, time in enumerate(times)}
        await put_all(backend, {key: sealed(access_token_expires_at=time) for key, time in keys.items()})
        found: list[DueRow] = []
        while page := await backend.scan_due(
            provider="github", within=1e9, as_of=_LAST_TIME, after=found[-1].position if found else None, limit=2
        ):
            found += page
        assert [(row.key, row.due_at, row.access_token_expires_at) for row in found] == [
            (key, time, time) for key, time in keys.items()
        ]

    @on_one_backend
    async def test_a_row_without_a_refresh_token_or_an_expiry_is_not_due(self, backend: Backend) -> None:
        """Each write of tokens says anew whether the row is due."""
        for not_due in (sealed(refresh_token=None), sealed(access_token_expires_at=None)):
            await backend.put(KEY, not_due)
            assert await due_keys(backend) == []
            await backend.put(KEY, sealed())
            assert await due_keys(backend) == [KEY]
            await backend.put(KEY, not_due)
            assert await due_keys(backend) == []
        generation = (await read_row(backend)).generation
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        assert await backend.complete_lease(KEY, sealed(), generation=generation, holder="h")
        assert await due_keys(backend) == [KEY]
        assert await backend.delete(KEY)
        assert await due_keys(backend) == []

    @on_one_backend
    async def test_a_refreshed_row_is_due_at_its_new_time(self, backend: Backend) -> None:
        """A refresh in the middle of a sweep moves the row behind the end of the sweep."""
        for number, key in enumerate((KEY, OTHER)):
            await backend.put(key, sealed(access_token_expires_at=number))
        [first] = await backend.scan_due(provider=KEY.provider, within=60.0, limit=1)
        generation = (await read_row(backend, OTHER)).generation
        new = sealed(access_token_expires_at=first.as_of + 3600 * _SECOND)
        assert await backend.claim_lease(OTHER, generation=generation, holder="h", duration=LONG)
        assert [row.key for row in await due_rows(backend, 1)] == [KEY, OTHER], "a lease changes nothing"
        assert await backend.complete_lease(OTHER, new, generation=generation, holder="h")
        after = {"provider": KEY.provider, "as_of": first.as_of, "after": first.position, "limit": 1}
        assert await backend.scan_due(within=60.0, **after) == []  # type: ignore[arg-type]
        [row] = await backend.scan_due(within=3600.0, **after)  # type: ignore[arg-type]
        assert row.key == OTHER

    @on_one_backend
    async def test_a_dead_row_is_not_due_until_new_tokens_are_stored(self, backend: Backend) -> None:
        """A failure with a retry time, or a lease that ends without one, leaves the row due."""
        generation = await store_row(backend)
        for failure in (None, Failure("unavailable", 0.0), Failure("unavailable", -1.0), Failure("unavailable", LONG)):
            await fail_refresh(backend, generation, failure)
            assert await due_keys(backend) == [KEY]
        for key, failure in ((OTHER, None), (THIRD, Failure("invalid_grant"))):
            await fail_refresh(backend, await store_row(backend, key), failure, key)
        assert await due_keys(backend) == [KEY, OTHER]
        assert await due_keys(backend, THIRD.provider) == []
        await backend.put(KEY, sealed())
        await fail_refresh(backend, generation + 1, Failure("invalid_grant"))
        assert await due_keys(backend) == [OTHER]
        assert await backend.rewrap(KEY, sealed("b"), generation=generation + 1)
        assert await due_keys(backend) == [OTHER], "a rewrap has brought a dead row back"
        await backend.put(KEY, sealed())
        assert await due_keys(backend) == [KEY, OTHER]

    @on_one_backend
    async def test_a_dead_row_whose_failure_is_cleared_is_due_again(self, backend: Backend) -> None:
        """It is due if its columns say so: if it has a refresh token and an expiry."""
        issued = sealed(refresh_token=None, refresh_token_expires_at=None, issued=True)
        rows = {
            KEY: sealed(),
            OTHER: issued,
            KEY._replace(account="empty"): empty_tokens(1),
            KEY._replace(account="no expiry"): sealed(access_token_expires_at=None),
        }
        for key, tokens in rows.items():
            assert await backend.insert(key, tokens)
            await fail_refresh(backend, (await read_row(backend, key)).generation, Failure("invalid_grant"), key)
        assert await due_keys(backend) == []
        for key in rows:
            assert await backend.clear_failure(key)
        assert await due_keys(backend) == [KEY]

    @on_one_backend
    async def test_clearing_a_failure_with_a_retry_time_changes_no_due_time(self, backend: Backend) -> None:
        rows = {KEY: sealed(), OTHER: sealed(refresh_token=None, refresh_token_expires_at=None, issued=True)}
        for key, tokens in rows.items():
            await backend.put(key, tokens)
            await fail_refresh(backend, (await read_row(backend, key)).generation, Failure("unavailable", LONG), key)
            assert await backend.clear_failure(key)
        assert await due_keys(backend) == [KEY, OTHER]

    @on_one_backend
    async def test_a_late_completion_makes_a_dead_row_due_again(self, backend: Backend) -> None:
        """Its holder's lease had expired, another refresh marked the row as dead, and then the new tokens arrived."""
        generation = await store_row(backend)
        await fail_refresh(backend, generation, Failure("invalid_grant"))
        assert await due_keys(backend) == []
        assert await backend.complete_lease(KEY, sealed("b"), generation=generation, holder="late")
        assert await due_keys(backend) == [KEY]

    @on_one_backend
    async def test_a_rewrap_changes_no_due_time(self, backend: Backend) -> None:
        generation = await store_row(backend)
        before = await due_rows(backend, 1)
        assert await backend.rewrap(KEY, sealed("b", access_token_expires_at=5), generation=generation)
        after = await due_rows(backend, 1)
        assert [replace(row, as_of=0) for row in after] == [replace(row, as_of=0) for row in before]
