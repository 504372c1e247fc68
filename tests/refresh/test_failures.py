"""Failures are stored in the row, shared by all callers, and expire at their retry time."""

from __future__ import annotations

from datetime import timedelta

import pytest

from support.refresh_world import World, on_every_row, on_memory
from support.refreshers import NEW, NEW_PAIR, OLD, Gone, Script, pair
from support.store_calls import fresh, many
from tokenstore import ProviderRefusedError, ProviderUnavailableError, ReauthorizationRequiredError, RefreshError
from tokenstore.records import TokenKey

KEY = TokenKey("github", "u1")


@on_every_row
async def test_a_dead_refresh_token_is_sent_once(world: World) -> None:
    """Of many callers of two stores, one calls the provider; new tokens work at once."""
    told_of: list[ReauthorizationRequiredError] = []
    one = await world.store(on_reauthorization_required=told_of.append)
    two = await world.store(on_reauthorization_required=told_of.append)
    await world.expired(one)
    count = 200 if world.row.mark == "memory" else 20
    errors = await many(count, one, two) + await many(3, one, two, force=True)
    assert {type(error) for error in errors} == {ReauthorizationRequiredError}
    assert {error.code for error in errors} == {"invalid_grant"}
    assert world.provider.stats().requests == 1
    assert [(error.provider, error.user_id, error.account) for error in told_of] == [KEY]
    new = await world.log_in(two)
    assert (await fresh(one))["generation"] == new["generation"] + 1
    assert world.provider.stats().requests == 2


@on_memory
@pytest.mark.parametrize(
    "error",
    [
        ProviderUnavailableError("x", retry_after=100),
        ProviderUnavailableError("x", code="invalid_client", retry_after=100),
        ProviderRefusedError("x", code="invalid_client", retry_after=100),
        ProviderRefusedError("x", code="incorrect_client_credentials", retry_after=100),
        ProviderRefusedError("x", code="a" * 56, retry_after=100),
    ],
    ids=["unavailable", "an outage with a code of a refusal", "invalid_client", "a code of its own", "a long code"],
)
async def test_a_failure_holds_until_the_retry_time_of_the_error(
    world: World, error: ProviderUnavailableError | ProviderRefusedError
) -> None:
    """Neither store calls the provider before that time. Every caller gets the same class of error and code."""
    script = Script(error, NEW)
    one, two = (await world.store(refreshers={"github": script}), await world.store(refreshers={"github": script}))
    await world.expired(one)
    for passed in (0, 50, 99):
        world.ahead += passed - world.ahead
        for store in (one, two):
            with pytest.raises(RefreshError) as caught:
                await fresh(store)
            assert isinstance(caught.value, ProviderUnavailableError | ProviderRefusedError)
            assert type(caught.value) is type(error)
            assert caught.value.retry_after == pytest.approx(100 - passed, abs=1)
            assert caught.value.code == error.code
    assert script.calls == 1
    world.ahead += 2
    assert pair(await fresh(two)) == NEW_PAIR
    assert script.calls == 2


@on_every_row
async def test_a_refusal_stays_one_for_later_callers(world: World) -> None:
    """The kind of the failure is stored with it, on every backend. A code that is too long for it is not shown."""
    for user, code in (("u1", "incorrect_client_credentials"), ("u2", "a" * 57)):
        script = Script(ProviderRefusedError("x", code=code, retry_after=100))
        one, two = (await world.store(refreshers={"github": script}), await world.store(refreshers={"github": script}))
        await world.expired(one, user)
        for store in (one, two):
            with pytest.raises(ProviderRefusedError, match="refuses this client") as caught:
                await fresh(store, user)
            assert caught.value.code == (code if len(code) < 57 else "unreadable_code")
        assert script.calls == 1


@on_memory
@pytest.mark.parametrize(
    ("error", "low", "high"),
    [
        (ProviderUnavailableError("x"), 4, 6),
        (Gone("x"), 4, 6),
        (ProviderRefusedError("x"), 48, 72),
        (ProviderUnavailableError("x", retry_after=-5), 0, 0),
        (ProviderUnavailableError("x", retry_after=1e9), 3600, 3600),
        (ProviderUnavailableError("x", retry_after=float("inf")), 3600, 3600),
        (ProviderUnavailableError("x", retry_after=float("nan")), 4, 6),
        (ProviderUnavailableError("x", retry_after="soon"), 4, 6),  # type: ignore[arg-type]
        (ProviderUnavailableError("x", retry_after=timedelta(seconds=9)), 4, 6),  # type: ignore[arg-type]
    ],
    ids=["unavailable", "anything", "refused", "negative", "long", "inf", "nan", "text", "timedelta"],
)
async def test_without_a_retry_time_a_failure_holds_for_a_default_time(
    world: World, error: Exception, low: float, high: float
) -> None:
    """Seconds for an outage, a minute if an operator has to act, at most an hour; invalid retry times are ignored."""
    store = await world.store(refreshers={"github": Script(error)})
    await world.expired(store)
    with pytest.raises(type(error) if isinstance(error, RefreshError) else ProviderUnavailableError) as caught:
        await fresh(store)
    said = getattr(caught.value, "retry_after", None)
    assert said is not None
    assert low <= said <= high
    row = await world.sealed()
    assert row is not None
    assert row.failure is not None
    assert row.failure.retry_in == pytest.approx(said, abs=1)
    assert row.lease_holder is None


@on_memory
@pytest.mark.parametrize("kind", ["none", "expired"])
async def test_without_a_valid_refresh_token_the_provider_is_not_called(world: World, kind: str) -> None:
    """No refresh token was issued, or it has expired by the database's clock."""
    script = Script()
    store = await world.store(refreshers={"github": script})
    if kind == "none":
        await store.store_tokens("github", "u1", OLD[0], None, world.at(-1))
    else:
        await store.store_tokens("github", "u1", *OLD, world.at(-1), world.at(-1))
    for force in (False, True):
        with pytest.raises(ReauthorizationRequiredError, match="log in again") as caught:
            await fresh(store, force=force)
        assert caught.value.code == "no_refresh_token"
    assert script.calls == 0
