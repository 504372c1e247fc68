"""A new pair of tokens that cannot be stored is stored later, and callers get an error in time."""

from __future__ import annotations

import logging

import pytest

from support.error_text import told
from support.interceptor import failing
from support.refresh_world import World, on_every_row, on_memory, on_rows, settled
from support.refreshers import NEW_PAIR, OLD, Script, pair
from support.store_calls import fresh, many
from tokenstore import BackendError, LockTimeoutError, StoreClosedError, TokenRecord, TokensNotStoredError


@on_rows("memory", "sqlite")
async def test_storing_the_new_pair_is_retried(world: World) -> None:
    """It succeeds once the database is available; the provider and the listener are called once."""
    news: list[TokenRecord] = []
    store, interceptor = await world.intercepted(world.refresher, on_refreshed=news.append)
    old = await world.log_in(store)
    interceptor.before["complete_lease"] = failing(2)
    records = await many(5, store)
    assert {pair(record) for record in records} == {pair(await world.stored())} != {pair(old)}
    assert [pair(record) for record in news] == [pair(records[0])]
    assert interceptor.calls["complete_lease"] == 3
    assert world.provider.stats().requests == 1


@on_every_row
async def test_tokens_whose_write_s_result_was_lost_are_not_written_again(world: World) -> None:
    """The row shows that they were stored, so there is no second write and no second call of the provider."""
    news: list[TokenRecord] = []
    store, interceptor = await world.intercepted(world.refresher, on_refreshed=news.append)
    old = await world.log_in(store)
    interceptor.after["complete_lease"] = failing(1)
    records = await many(5, store)
    new = await world.stored()
    assert new["generation"] == old["generation"] + 1
    assert {(pair(record), record["generation"]) for record in records} == {(pair(new), new["generation"])}
    await settled(store)
    assert [pair(record) for record in news] == [pair(new)]
    assert world.provider.stats().requests == 1


@on_memory
async def test_callers_get_an_error_with_the_tokens_if_storing_takes_too_long(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """No text or log contains the tokens; the same pair is stored once the database is available."""
    caplog.set_level(logging.DEBUG)
    news: list[TokenRecord] = []
    script = Script()
    store, interceptor = await world.intercepted(script, refresh_timeout=0.05, on_refreshed=news.append)
    old = await world.expired(store)
    interceptor.before["complete_lease"] = failing()
    errors = await many(3, store) + await many(2, store) + await many(1, store, force=True)
    for error in errors:
        assert isinstance(error, TokensNotStoredError)
        assert (error.code, error.provider, error.user_id) == ("not_stored", "github", "u1")
        assert pair(error.record) == NEW_PAIR
        assert error.record["generation"] == old["generation"] + 1
        for secret in (*OLD, *NEW_PAIR):
            assert secret not in told(error)
            assert secret not in caplog.text
    errors[0].record["extra"].clear()
    errors[0].record["access_token"] = "spoilt"
    assert all(pair(error.record) == NEW_PAIR and error.record["extra"] for error in errors[1:])
    assert not news
    interceptor.before.clear()
    assert pair(await world.until_saved(store)) == NEW_PAIR
    assert [pair(record) for record in news] == [NEW_PAIR]
    assert pair(await fresh(store)) == NEW_PAIR
    assert script.calls == 1


@on_memory
@pytest.mark.parametrize(
    "error",
    [LockTimeoutError("locked"), BackendError("disk full"), StoreClosedError("closed"), RuntimeError("a driver's own")],
    ids=lambda error: type(error).__name__,
)
async def test_no_error_of_the_database_drops_tokens(world: World, error: Exception) -> None:
    """A failed write of the only copy is retried after any class of error."""
    store, interceptor = await world.intercepted(Script())
    await world.expired(store)
    interceptor.before["complete_lease"] = failing(2, error)
    assert pair(await fresh(store)) == pair(await world.stored()) == NEW_PAIR
