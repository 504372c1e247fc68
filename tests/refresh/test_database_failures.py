"""The database fails before the provider's call, or when a failure is written to the row."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from support.interceptor import Stop, failing
from support.refresh_world import World, assert_untouched, on_memory, on_rows, settled
from support.refreshers import NEW, NEW_PAIR, Script, pair
from support.store_calls import fresh, many
from tokenstore import (
    BackendError,
    BackendUnavailableError,
    LockTimeoutError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    TokenRecord,
)
from tokenstore.refresh import backoff

HOUR = 3600.0


@on_rows("memory", "sqlite")
async def test_a_refresh_whose_claim_s_result_was_lost_recognises_its_own_lease(world: World) -> None:
    """The row names this refresh as the lease holder, so it calls the provider and does not wait for itself."""
    store, interceptor = await world.intercepted(world.refresher)
    await world.log_in(store)
    interceptor.after["claim_lease"] = failing(1)
    records = await many(3, store)
    assert {pair(record) for record in records} == {pair(await world.stored())}
    assert interceptor.calls["claim_lease"] == 1
    assert world.provider.stats().requests == 1


@on_memory
@pytest.mark.parametrize("method", ["get", "claim_lease", "complete_lease", "release_lease"])
async def test_a_statement_that_is_not_answered_is_retried(world: World, method: str) -> None:
    """A dead connection that gives no error delays callers for at most ``refresh_timeout``."""
    failure = ProviderUnavailableError("down") if method == "release_lease" else NEW
    script = Script(failure)
    store, interceptor = await world.intercepted(script, refresh_timeout=0.1)
    await world.expired(store, expires_in=HOUR)
    interceptor.before[method] = Stop()
    [outcome] = await many(1, store, force=True)
    if method == "release_lease":
        assert isinstance(outcome, ProviderUnavailableError)
        await assert_untouched(world, "temporarily_unavailable")
    else:
        assert pair(outcome) == pair(await world.stored()) == NEW_PAIR
    assert script.calls == 1


@on_memory
async def test_the_provider_is_called_only_with_a_lease_that_outlasts_the_call(world: World) -> None:
    """After a slow claim the lease is claimed again, because a call that had to be interrupted could lose a pair."""
    script = Script()
    store, interceptor = await world.intercepted(script, refresh_timeout=0.2)
    await world.expired(store)
    left: list[float | None] = []

    async def look(record: TokenRecord) -> Mapping[str, Any]:
        row = await world.sealed()
        left.append(None if row is None else row.lease_expires_in)
        return await script(record)

    async def dawdle() -> None:
        if interceptor.calls["claim_lease"] == 1:
            await asyncio.sleep(0.15)

    interceptor.after["claim_lease"] = dawdle
    assert pair(await fresh(store, refresh=look)) == NEW_PAIR
    assert left[0] is not None
    assert left[0] > 0.19


@on_memory
@pytest.mark.parametrize("method", ["get", "claim_lease"])
async def test_a_database_that_is_gone_is_an_error_before_the_call(
    world: World, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for a database that can be read but not written: after some retries its error is raised, without a call."""
    monkeypatch.setattr(backoff, "_RETRY_TIMEOUT", 0.1)
    script = Script()
    store, interceptor = await world.intercepted(script, refresh_timeout=1)
    await world.expired(store)
    interceptor.before[method] = failing()
    for error in await many(3, store) + await many(3, store, force=True):
        assert isinstance(error, BackendUnavailableError), repr(error)
    assert script.calls == 0
    interceptor.before.clear()
    assert pair(await fresh(store)) == NEW_PAIR


@on_memory
async def test_a_short_database_failure_does_not_fail_the_refresh(world: World) -> None:
    """After a dead connection or a lock timeout the refresh retries and continues."""
    for method in ("get", "claim_lease"):
        for error in (None, LockTimeoutError("locked")):
            store, interceptor = await world.intercepted(Script())
            await world.expired(store)
            interceptor.before[method] = failing(1, error)
            if method == "get" and error is not None:
                continue  # reads never wait for a lock
            assert pair(await fresh(store)) == NEW_PAIR
            await world.expired(store)
            assert pair(await fresh(store, force=True)) == NEW_PAIR


@on_memory
@pytest.mark.parametrize("gone", [None, BackendError("disk full")], ids=["for a while", "for good"])
async def test_a_failure_that_cannot_be_left_in_the_row(
    world: World, gone: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process's callers still get the failure, except "log in again", because the row may have newer tokens."""
    monkeypatch.setattr(backoff, "_RETRY_TIMEOUT", 0.1)
    for failure, expected in (
        (ProviderUnavailableError("down"), ProviderUnavailableError),
        (ReauthorizationRequiredError("used"), BackendError if gone else BackendUnavailableError),
    ):
        script = Script(failure)
        store, interceptor = await world.intercepted(script)
        await world.expired(store)
        interceptor.before["release_lease"] = failing(error=gone)
        errors = await many(3, store)
        assert {type(error) for error in errors} == {expected}
        assert script.calls == 1
        assert interceptor.calls["release_lease"] == 1 or gone is None


@on_memory
async def test_a_failure_whose_write_s_result_was_lost_is_reported_once(world: World) -> None:
    """The failure is in the row: callers get it, and the listener is called once."""
    told_of: list[ReauthorizationRequiredError] = []
    store, interceptor = await world.intercepted(
        Script(ReauthorizationRequiredError("used")), on_reauthorization_required=told_of.append
    )
    await world.expired(store)
    interceptor.after["release_lease"] = failing(1)
    errors = await many(3, store)
    assert {(type(error), error.code) for error in errors} == {(ReauthorizationRequiredError, "invalid_grant")}
    await settled(store)
    assert len(told_of) == 1
