"""Storing and loading: all fields are read back unchanged, on every backend."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from support.fresh_store import on_every_row
from support.store_calls import load
from tokenstore import AuthTokenStore, StoreClosedError

HOUR = timedelta(hours=1)
ACCESS, REFRESH, SCOPE = "gho_access-secret", "ghr_refresh-secret", "repo-secret"


@on_every_row
async def test_store_tokens_stores_exactly_its_arguments(store: AuthTokenStore) -> None:
    """All fields are read back; a second ``store_tokens`` keeps no field of the first."""
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
async def test_times_of_any_time_zone_are_read_back_in_utc(store: AuthTokenStore) -> None:
    """A naive datetime is taken as UTC, an offset is converted, and microseconds are kept, from the year 1 to 9999."""
    naive = datetime(2040, 6, 1, 12, 0, 0, 123456)  # naive, like the result of utcnow()
    zoned = datetime(2040, 6, 1, 17, 45, 0, 123456, tzinfo=timezone(timedelta(hours=5, minutes=45)))
    for given in (naive, zoned):
        await store.store_tokens("github", "u1", "at", "rt", given)
        loaded = (await load(store))["access_token_expires_at"]
        assert loaded is not None
        assert loaded == datetime(2040, 6, 1, 12, 0, 0, 123456, tzinfo=UTC)
        assert loaded.tzinfo is UTC
    for extreme in (datetime.min, datetime.max, datetime(1969, 12, 31), datetime(2038, 1, 20)):
        await store.store_tokens("github", "u1", "at", "rt", extreme, extreme)
        record = await load(store)
        assert record["access_token_expires_at"] == record["refresh_token_expires_at"] == extreme.replace(tzinfo=UTC)


@on_every_row
async def test_an_expiry_of_zero_is_expired_and_does_not_mean_never(store: AuthTokenStore) -> None:
    """`expires_in: 0` and the epoch itself are expired; only None means that a token never expires."""
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


@on_every_row
async def test_tokens_of_the_maximum_size_are_stored(store: AuthTokenStore) -> None:
    """Each token has 256 KiB."""
    largest = "x" * (256 * 1024)
    await store.store_tokens("github", "u1", largest, largest, None, extra={"id_token": "x" * (256 * 1024 - 20)})
    record = await load(store)
    assert record["access_token"] == record["refresh_token"] == largest


@on_every_row
async def test_calls_of_a_closed_store_raise_store_closed_error(store: AuthTokenStore) -> None:
    """``aclose()`` itself can be called again."""
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


@on_every_row
async def test_if_absent_stores_only_where_there_is_no_row(store: AuthTokenStore) -> None:
    """So a repeated import never replaces what a login or a refresh stored meanwhile."""
    arguments = ("github", "u1", "imported", "imported-refresh", None)
    assert await store.store_tokens(*arguments, if_absent=True) is True
    await store.store_tokens("github", "u1", "newer", None, None)
    assert await store.store_tokens(*arguments, if_absent=True) is False
    assert await store.store_tokens(*arguments, if_absent=True, account="work") is True
    record = await store.load_tokens("github", "u1")
    assert record is not None
    assert (record["access_token"], record["refresh_token"]) == ("newer", None)
