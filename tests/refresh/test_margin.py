"""The refresh margin: within it callers do not wait, and refreshes are spread over it."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.refresh_world import World, on_every_row, on_memory, settled, until_joined
from support.refreshers import NEW, NEW_PAIR, OLD, Script, pair
from support.store_calls import due, fresh, many
from tokenstore import Keyring, ProviderUnavailableError, ReauthorizationRequiredError, open_store
from tokenstore.records import SealedRecord, SealedTokens, TokenKey
from tokenstore.refresh.settings import Settings
from tokenstore.refresh.steps import Validity
from tokenstore.refresh.telemetry import Telemetry
from tokenstore.sealing import Sealer
from tokenstore_memory import MemoryBackend

HOUR = 3600.0


@on_every_row
async def test_within_the_margin_callers_get_the_valid_token_at_once(world: World) -> None:
    """Of the callers of two stores, one starts a refresh in the background."""
    one, two = await world.store(refresh_margin=600), await world.store(refresh_margin=600)
    old = await world.log_in(one, expires_in=90)
    with world.provider.hold():
        records = await many(10, one)
        await world.requests(1)
        records += await many(10, two) + await many(10, one)
        assert {pair(record) for record in records} == {pair(old)}
    new = await world.until_saved(one)
    assert pair(new) != pair(old)
    assert {pair(record) for record in await many(3, one, two)} == {pair(new)}
    assert world.provider.stats().requests == 1


@on_memory
async def test_an_outage_within_the_margin_raises_no_error(world: World) -> None:
    """The provider is not called again before the retry time that it named."""
    script = Script(ProviderUnavailableError("down", retry_after=20), NEW)
    one = await world.store(refreshers={"github": script}, refresh_margin=600)
    two = await world.store(refreshers={"github": script}, refresh_margin=600)
    await world.expired(one, expires_in=150)
    for store in (one, two, one):
        assert pair(await fresh(store)) == OLD
        await settled(store)
    assert script.calls == 1
    world.ahead += 21
    assert pair(await fresh(two)) == OLD
    await settled(two)
    assert script.calls == 2
    assert pair(await fresh(one)) == NEW_PAIR


@on_memory
async def test_with_a_dead_refresh_token_callers_get_the_access_token_until_it_expires(world: World) -> None:
    """Until then the provider is not called again; afterwards callers get the error."""
    script = Script(ReauthorizationRequiredError("revoked"))
    told_of: list[ReauthorizationRequiredError] = []
    store = await world.store(
        refreshers={"github": script}, refresh_margin=600, on_reauthorization_required=told_of.append
    )
    await world.expired(store, expires_in=150)
    for _ in range(3):
        assert pair(await fresh(store)) == OLD
        await settled(store)
    assert (script.calls, len(told_of)) == (1, 1)
    world.ahead += 100
    for _ in range(3):
        with pytest.raises(ReauthorizationRequiredError, match="invalid_grant"):
            await fresh(store)
    assert (script.calls, len(told_of)) == (1, 1)


@on_memory
async def test_a_caller_whose_token_has_expired_joins_the_background_refresh(world: World) -> None:
    """So does a caller whose token was refused."""
    script = Script()
    script.hold()
    store = await world.store(refreshers={"github": script}, refresh_margin=600)
    await world.expired(store, expires_in=150)
    assert pair(await fresh(store)) == OLD
    await script.called.wait()
    forced = asyncio.create_task(fresh(store, force=True))
    world.ahead += 100
    waiting = asyncio.create_task(fresh(store))
    await until_joined(store, 2)
    script.answer.set()
    assert {pair(record) for record in await asyncio.gather(forced, waiting)} == {NEW_PAIR}
    assert script.calls == 1


def test_with_a_margin_up_to_the_skew_a_token_is_refreshed_once_it_is_not_valid(keyring: Keyring) -> None:
    """Validity is what `is_access_token_valid` returns."""

    async def refreshed(remaining: float, margin: float) -> tuple[bool, bool]:
        now = datetime(2030, 1, 1, tzinfo=UTC)
        issued, script = now - timedelta(hours=1), Script()
        clock = iter([issued.timestamp()])
        store = open_store(
            MemoryBackend(clock=lambda: next(clock, now.timestamp())),
            keyring=keyring,
            clock=now.timestamp,
            refreshers={"github": script},
            refresh_margin=margin,
        )
        async with store:
            await store.store_tokens("github", "u1", *OLD, now + timedelta(seconds=remaining))
            record = await store.load_tokens("github", "u1")
            assert record is not None
            assert record["updated_at"] == issued
            await fresh(store)
            await settled(store)
            return script.calls == 1, store.is_access_token_valid(record)

    async def main() -> None:
        for remaining in (-HOUR, -1, 0, 0.000001, 1, 59, 59.999999, 60, 60.000001, 61, 120, HOUR):
            for margin in (0, 30, 60):
                called, valid = await refreshed(remaining, margin)
                assert called is not valid, (remaining, margin)

    asyncio.run(main())


@on_memory
@pytest.mark.parametrize("lifetime", [60, 61, 30, 90, 119, 5])
async def test_a_short_lived_token_is_used_for_half_of_its_life(world: World, lifetime: int) -> None:
    """Twenty loads are one refresh, by two stores, whether a refresh or a login issued the token."""
    world.provider.access_token_lifetime = lifetime
    one, two = await world.store(), await world.store()
    await world.log_in(one)
    records = [await fresh(store) for store in (one, two) * 10]
    assert world.provider.stats().requests == 1
    assert {pair(record) for record in records} == {pair(await world.stored())}
    world.ahead += lifetime / 2 - 1
    await fresh(one)
    await settled(one)
    refreshed = world.provider.stats().requests
    assert refreshed <= 2, "one in the background"
    world.ahead += lifetime * 0.75
    records = [await fresh(store) for store in (one, two) * 10]
    assert world.provider.stats().requests == refreshed + 1

    grant = world.provider.new_grant("u2")
    tokens = grant["access_token"], grant["refresh_token"]
    await one.store_tokens("github", "u2", *tokens, world.at(lifetime))
    for store in (one, two) * 10:
        assert pair(await fresh(store, "u2")) == tokens
    assert "u2" not in world.provider.stats().refreshes_by_user
    world.ahead += lifetime / 2 + 1
    assert pair(await fresh(one, "u2")) != tokens


@on_memory
async def test_refresh_due_knows_short_lived_tokens(world: World) -> None:
    """A token of a minute is not due as soon as it is issued."""
    store = await world.store(refreshers={"github": Script()})
    await store.store_tokens("github", "u1", *OLD, world.at(60))
    assert await due(store, within=0) == []
    assert await due(store, within=20) == []
    world.ahead += 31
    assert [result.outcome for result in await due(store, within=0)] == ["refreshed"]


@on_memory
async def test_a_new_token_with_a_lifetime_below_the_skew_is_returned(world: World) -> None:
    """No newer token can be had, so all waiting callers of both stores get it, from one call of the provider."""
    world.provider.access_token_lifetime = 30
    one, two = await world.store(), await world.store()
    await world.log_in(one)
    with world.provider.hold():
        calls = [asyncio.create_task(fresh(store)) for store in (one, one, two, two)]
        await world.requests(1)
        await until_joined(one, 1)
        await until_joined(two, 1)
    records = await asyncio.gather(*calls)
    assert {pair(record) for record in records} == {pair(await world.stored())}
    assert world.provider.stats().requests == 1


_us = st.integers(0, 10**12)


def _row(user: str, generation: int, remaining_us: int) -> SealedRecord:
    tokens = SealedTokens(b"", b"", None, remaining_us, None, "k1")
    return SealedRecord(TokenKey("github", user), tokens, generation, None, None, None, 0, 0, as_of=0)


def _validity(settings: Settings, row: SealedRecord, lifetime: float | None) -> Validity:
    return settings.view(row, lifetime).validity


@given(
    margin=st.floats(0, 1e6),
    lifetime=st.none() | st.floats(0, 1e7),
    user=st.text(max_size=5),
    generation=st.integers(1, 2**48),
    remaining_us=_us,
)
def test_the_margin_of_a_row_has_bounds(
    keyring: Keyring, margin: float, lifetime: float | None, user: str, generation: int, remaining_us: int
) -> None:
    """It is between half and all of ``refresh_margin`` plus the skew, and at most a quarter of the usable lifetime."""
    settings = Settings(MemoryBackend(), Sealer(keyring), Telemetry(), margin=margin, timeout=20)
    found = _validity(settings, _row(user, generation, remaining_us), lifetime)
    remaining = remaining_us / 1e6
    life = remaining if lifetime is None else lifetime  # the row was written when it was read
    skew = min(60, life / 2)
    widest = min(max(margin - skew, 0), (life - skew) / 4)
    if remaining <= skew:
        assert found is (Validity.SHORT if remaining else Validity.EXPIRED)
    elif remaining > skew + widest + 1e-5:
        assert found is Validity.FRESH
    elif remaining < skew + widest / 2 - 1e-5:
        assert found is Validity.DUE


def test_margins_are_spread(keyring: Keyring) -> None:
    """Tokens of many users that were issued together are refreshed at different times; each generation has another."""
    settings = Settings(MemoryBackend(), Sealer(keyring), Telemetry(), margin=300, timeout=20)
    rows = {
        "users": [_row(f"user-{n}", 7, 240_000_000) for n in range(400)],
        "generations": [_row("u1", n, 240_000_000) for n in range(400)],
    }
    for name, some in rows.items():
        count = sum(_validity(settings, row, HOUR) is Validity.DUE for row in some)
        assert 150 < count < 250, name
