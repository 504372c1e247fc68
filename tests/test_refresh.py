"""The refresh engine within one process: one call of the provider for all, and no rotated token lost.

Two stores with backends of their own stand for two processes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncSession

from refreshes import (
    NEW,
    OLD,
    Meddler,
    Refresher,
    Script,
    Stop,
    World,
    failing,
    on_every_row,
    on_memory,
    on_rows,
    settled,
    told,
    until_joined,
    until_waiting,
)
from tokenstore import (
    AuthTokenStore,
    BackendError,
    BackendUnavailableError,
    ConfigurationError,
    InvalidInputError,
    Keyring,
    LockTimeoutError,
    ProviderRefusedError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    RefreshError,
    RefreshResult,
    RefreshTimeoutError,
    StoreClosedError,
    TokenRecord,
    TokensNotStoredError,
    TokenStoreError,
    UnsupportedOperationError,
    open_store,
)
from tokenstore.records import SealedRecord, SealedTokens, TokenKey
from tokenstore.refresh import backoff
from tokenstore.refresh.settings import Settings
from tokenstore.refresh.steps import Validity
from tokenstore.refresh.telemetry import Telemetry
from tokenstore_memory import MemoryBackend
from watch import Place, app_engine, source_of, until

HOUR = 3600.0
KEY = TokenKey("github", "u1")


async def fresh(store: AuthTokenStore, user: str = "u1", **options: Any) -> TokenRecord:
    record = await store.load_fresh_tokens("github", user, **options)
    assert record is not None
    return record


async def many(count: int, *stores: AuthTokenStore, **options: Any) -> list[Any]:
    """So many callers of each store at once: records, or the errors that they got."""
    calls = [fresh(store, **options) for store in stores for _ in range(count)]
    return await asyncio.gather(*calls, return_exceptions=True)


def pair(record: Mapping[str, Any]) -> tuple[str, str]:
    return record["access_token"], record["refresh_token"]


NEW_PAIR = pair(NEW)


# -- a valid token -----------------------------------------------------------------------------------


@on_memory
async def test_a_valid_token_costs_one_read(world: World) -> None:
    """No lock, no lease, no call; where there is no row, the same."""
    script = Script()
    store, meddler = await world.meddled(script)
    await world.expired(store, expires_in=HOUR)
    meddler.calls.clear()
    assert pair(await fresh(store)) == OLD
    assert await store.load_fresh_tokens("github", "nobody") is None
    assert await store.load_fresh_tokens("github", "nobody", refresh=script, force=True) is None
    assert not await store.revoke_tokens("github", "nobody", refresher=Refresher(world.provider))
    assert meddler.calls == {"get": 4}
    assert script.calls == 0


@on_memory
async def test_without_anybody_to_refresh_nothing_is_read(world: World) -> None:
    """It is an error while the token is valid still, rather than an hour later."""
    store, meddler = await world.meddled()
    store = await world.store(meddler, refreshers={})
    await world.expired(store, expires_in=HOUR)
    meddler.calls.clear()
    for call in (
        store.load_fresh_tokens("github", "u1"),
        store.load_fresh_tokens("github", "nobody", force=True),
        anext(store.refresh_due(within=60, provider="github")),
        store.revoke_tokens("github", "u1"),
    ):
        with pytest.raises(ConfigurationError, match="'github'"):
            await call
    assert not meddler.calls


@on_memory
async def test_arguments_are_checked(world: World) -> None:
    """Before anything is read, called or written."""
    script: Any = Script()
    store, meddler = await world.meddled(script)
    bad: list[Awaitable[Any]] = [
        store.load_fresh_tokens("", "u1"),
        store.load_fresh_tokens("github", "u\0"),
        store.load_fresh_tokens("github", "u1", generation=1),
        *(store.load_fresh_tokens("github", "u1", force=True, generation=wrong) for wrong in (True, "1", 1.0)),  # type: ignore[arg-type]
        *(anext(store.refresh_due(within=wrong)) for wrong in (-1, True, float("nan"), "60", None)),  # type: ignore[arg-type]
        anext(store.refresh_due(within=timedelta(seconds=-1))),
        anext(store.refresh_due(within=60, concurrency=0)),
        anext(store.refresh_due(within=60, page_size=0)),
        anext(store.refresh_due(within=60, provider="")),
        anext(store.refresh_due(within=60, refresh=script)),
        store.revoke_tokens("github", ""),
    ]
    for call in bad:
        with pytest.raises(InvalidInputError):
            await call
    assert not meddler.calls
    assert script.calls == 0
    settings: list[dict[str, Any]] = [{"refresh_margin": -1}, {"refresh_timeout": 0}, {"refresh_timeout": float("inf")}]
    for wrong in settings:
        with pytest.raises(InvalidInputError):
            AuthTokenStore(backend=meddler, keyring=world.keyring, **wrong)


@on_memory
async def test_a_closed_store_refreshes_nothing(world: World) -> None:
    store = await world.store()
    await store.aclose()
    for call in (
        store.load_fresh_tokens("github", "u1"),
        anext(store.refresh_due(within=60)),
        store.revoke_tokens("github", "u1"),
    ):
        with pytest.raises(StoreClosedError):
            await call


@on_rows("sqlite")
async def test_a_borrowed_session_cannot_refresh(world: World) -> None:
    """It ends with its caller, and a refresh does not."""
    async with app_engine(Place(world.row, world.url)) as engine, AsyncSession(engine) as session:
        store = AuthTokenStore(session, keyring=world.keyring, refreshers={"github": Script()})
        for call in (
            store.load_fresh_tokens("github", "u1"),
            anext(store.refresh_due(within=60)),
            store.revoke_tokens("github", "u1"),
        ):
            with pytest.raises(UnsupportedOperationError, match="open_store"):
                await call


# -- an expired token --------------------------------------------------------------------------------


@on_every_row
async def test_tasks_join_one_refresh(world: World) -> None:
    """One call for fifty; each gets a record of its own; while the provider is slow, others go about their business."""
    store = await world.store()
    old = await world.log_in(store)
    with world.provider.hold():
        callers = [asyncio.create_task(fresh(store)) for _ in range(50)]
        await world.requests(1)
        await until_joined(store, 49)
        if world.row.mark != "memory":
            assert source_of(store).in_use == 0
        await store.store_tokens("github", "u2", *OLD, world.at(HOUR))
        assert pair(await fresh(store, "u2")) == OLD
        assert await store.load_tokens("github", "u1") == old
        assert not any(caller.done() for caller in callers)
    records = await asyncio.gather(*callers)
    assert {pair(record) for record in records} == {pair(await world.stored())} != {pair(old)}
    assert {record["generation"] for record in records} == {old["generation"] + 1}
    assert world.provider.stats().requests == 1
    read = await fresh(store)
    assert abs(read["updated_at"] - records[0]["updated_at"]) < timedelta(seconds=5)
    assert read == {**records[0], "updated_at": read["updated_at"]}
    records[0]["extra"]["scope"] = records[0]["access_token"] = "spoilt"
    assert "spoilt" not in {
        value for record in records[1:] for value in (record["access_token"], *record["extra"].values())
    }


@on_every_row
async def test_two_stores_make_one_call(world: World) -> None:
    """The one that comes second waits, and reads what the first one stored."""
    one, two = await world.store(), await world.store()
    await world.log_in(one)
    with world.provider.hold():
        first = asyncio.create_task(fresh(one))
        await world.requests(1)
        others = [asyncio.create_task(fresh(two)) for _ in range(5)]
        await until_waiting(two)
    records = await asyncio.gather(first, *others)
    assert {pair(record) for record in records} == {pair(await world.stored())}
    assert world.provider.stats().requests == 1


@on_every_row
async def test_many_stores_at_once_make_one_call(world: World) -> None:
    """Nobody is first: all claim at the same moment, beside some who lock the row by hand."""
    stores = [await world.store() for _ in range(3)]
    await world.log_in(stores[0])

    async def by_hand(store: AuthTokenStore) -> TokenRecord:
        async with store.transaction() as tx:
            record = await tx.load_tokens("github", "u1", for_update=True)
            assert record is not None
            if store.is_access_token_valid(record):
                return record
            new = await world.refresher(record)
            await tx.store_tokens("github", "u1", new["access_token"], new["refresh_token"], world.at(HOUR))
        return await world.stored()

    calls = [call(store) for store in stores for call in (fresh, by_hand, fresh)]
    records = await asyncio.gather(*calls)
    assert {pair(record) for record in records} == {pair(await world.stored())}
    assert world.provider.stats().requests == 1


@on_every_row
async def test_a_dead_holder_is_survived(world: World) -> None:
    """Its lease ends by itself, on the database's clock; then somebody else makes the call."""
    store = await world.store()
    old = await world.log_in(store)
    backend = store._backend
    assert await backend.claim_lease(KEY, generation=old["generation"], holder="dead", duration=0.2)
    records = await many(3, store)
    assert {pair(record) for record in records} == {pair(await world.stored())}
    assert world.provider.stats().requests == 1


@on_memory
async def test_waiting_for_others_has_an_end(world: World) -> None:
    """Three times the longest call; the row is left as it is, and a later caller may have better luck."""
    script = Script()
    store, meddler = await world.meddled(script, refresh_timeout=0.05)
    old = await world.expired(store)
    assert await meddler.claim_lease(KEY, generation=old["generation"], holder="stuck", duration=HOUR)
    errors = await many(3, store)
    assert {type(error) for error in errors} == {RefreshTimeoutError}
    assert await meddler.release_lease(KEY, generation=old["generation"], holder="stuck")
    assert pair(await fresh(store)) == NEW_PAIR


# -- the refresh margin ------------------------------------------------------------------------------


@on_every_row
async def test_within_the_margin_nobody_waits(world: World) -> None:
    """Callers of two stores get the token that is valid still, at once; one of them refreshes behind their backs."""
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
async def test_an_outage_within_the_margin_is_nobodys_error(world: World) -> None:
    """Nor is there a second call before the time that the provider asked for."""
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
async def test_a_dead_refresh_token_within_the_margin_serves_to_the_end(world: World) -> None:
    """The access token is still good: callers get it, without a call; and the error when it is not good any more."""
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
async def test_a_caller_in_need_joins_the_background(world: World) -> None:
    """A refresh that nobody waited for is waited for once the token has expired, or is refused."""
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


def test_the_skew_is_the_last_moment(keyring: Keyring) -> None:
    """With a margin no larger than the skew, a token is refreshed from when `is_access_token_valid` says no."""

    async def refreshed(remaining: float, margin: float) -> tuple[bool, bool]:
        now = datetime(2030, 1, 1, tzinfo=UTC)
        script = Script()
        backend = MemoryBackend(clock=now.timestamp)
        store = open_store(
            backend,
            keyring=keyring,
            clock=now.timestamp,
            refreshers={"github": script},
            refresh_margin=margin,
        )
        async with store:
            await store.store_tokens("github", "u1", *OLD, now + timedelta(seconds=remaining))
            record = await store.load_tokens("github", "u1")
            assert record is not None
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
async def test_a_token_that_lasts_less_than_the_skew_is_served(world: World) -> None:
    """It is as new as it gets: all who waited for it get it, in both stores, from one call."""
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
    """Between half and all of ``refresh_margin`` beyond the skew, and at most the last quarter of a usable life."""
    settings = Settings(MemoryBackend(), keyring, Telemetry(), margin=margin, timeout=20)
    found = _validity(settings, _row(user, generation, remaining_us), lifetime)
    remaining = remaining_us / 1e6
    widest = max(margin - 60, 0)
    if lifetime is not None:
        widest = min(widest, max(lifetime - 60, 0) / 4)
    if remaining <= 60:
        assert found is (Validity.SHORT if remaining else Validity.EXPIRED)
    elif remaining > 60 + widest + 1e-5:
        assert found is Validity.FRESH
    elif remaining < 60 + widest / 2 - 1e-5:
        assert found is Validity.DUE


def test_margins_are_spread(keyring: Keyring) -> None:
    """Tokens that were issued together are not refreshed together: not those of many users, nor of one for ever."""
    settings = Settings(MemoryBackend(), keyring, Telemetry(), margin=300, timeout=20)
    rows = {
        "users": [_row(f"user-{n}", 7, 240_000_000) for n in range(400)],
        "generations": [_row("u1", n, 240_000_000) for n in range(400)],
    }
    for name, some in rows.items():
        due = sum(_validity(settings, row, None) is Validity.DUE for row in some)
        assert 150 < due < 250, name


# -- force -------------------------------------------------------------------------------------------


@on_memory
async def test_force_refreshes_a_valid_token_once(world: World) -> None:
    """Callers at the same time share one refresh; those who come later make another."""
    store = await world.store()
    old = await world.log_in(store, expires_in=HOUR)
    with world.provider.hold():
        calls = [asyncio.create_task(fresh(store, force=True)) for _ in range(20)]
        await world.requests(1)
        await until_joined(store, 19)
    records = await asyncio.gather(*calls)
    assert {record["generation"] for record in records} == {old["generation"] + 1}
    assert (await fresh(store, force=True))["generation"] == old["generation"] + 2
    assert world.provider.stats().requests == 2


@on_every_row
async def test_after_a_401_the_generation_is_refreshed_once(world: World) -> None:
    """A hundred callers of two stores found the same token refused: one call, whether they come together or later."""
    one, two = await world.store(), await world.store()
    old = await world.log_in(one, expires_in=HOUR)
    records = await many(25, one, two, force=True, generation=old["generation"])
    records += await many(25, one, two, force=True, generation=old["generation"])
    assert {pair(record) for record in records} == {pair(await world.stored())} != {pair(old)}
    assert world.provider.stats().requests == 1


@on_memory
async def test_an_old_generation_does_not_hide_a_newer_one(world: World) -> None:
    """Of two callers at once, one comes with a token that was replaced long ago, the other with the present one."""
    for order in (1, -1):
        script = Script()
        store = await world.store(refreshers={"github": script})
        old = (await world.expired(store, expires_in=HOUR))["generation"]
        present = (await world.expired(store, expires_in=HOUR))["generation"]
        generations = [old, present][::order]
        records = await asyncio.gather(*(fresh(store, force=True, generation=one) for one in generations))
        assert present < records[generations.index(present)]["generation"], "the caller got back what it found refused"
        assert script.calls == 1


@on_memory
async def test_force_asks_nobody_where_a_failure_holds(world: World) -> None:
    """The provider has said no, or not yet; a valid token does not change that."""
    script = Script(ProviderUnavailableError("down", retry_after=60))
    store = await world.store(refreshers={"github": script})
    await world.expired(store, expires_in=HOUR)
    for _ in range(3):
        with pytest.raises(ProviderUnavailableError):
            await fresh(store, force=True)
    assert script.calls == 1
    assert pair(await fresh(store)) == OLD


# -- what a refresh callable does --------------------------------------------------------------------


@on_memory
async def test_a_plain_function_will_do(world: World) -> None:
    """It has made its call by the time it returns."""
    store = await world.store(refreshers={"github": lambda record: NEW})
    await world.expired(store)
    assert pair(await fresh(store)) == NEW_PAIR
    assert (await world.stored())["extra"] == {"scope": "read write", "expires_in": 3600}


@on_memory
async def test_a_provider_that_does_not_rotate(world: World) -> None:
    """Its answer has no refresh token, and the old one stays (RFC 6749 section 6)."""
    world.provider.rotate = False
    store = await world.store()
    old = await world.log_in(store)
    for _ in range(2):
        record = await fresh(store, force=True)
        assert record["refresh_token"] == old["refresh_token"]
        assert record["access_token"] != old["access_token"]
    assert world.provider.stats().refreshes == 2


@on_memory
@pytest.mark.parametrize(
    "answer",
    [None, [], "at", {}, {"access_token": ""}, {"access_token": None}, {"access_token": b"at"}, {"error": "x"}],
)
async def test_what_is_no_token_response_changes_nothing(world: World, answer: Any) -> None:
    """It counts as an outage; the row keeps its tokens, and nobody's lease."""
    store = await world.store(refreshers={"github": lambda record: answer})
    await world.expired(store)
    with pytest.raises(ProviderUnavailableError) as caught:
        await fresh(store)
    assert caught.value.code == "invalid_response"
    await _assert_untouched(world, "invalid_response")


async def _assert_untouched(world: World, code: str | None) -> None:
    row = await world.sealed()
    assert row is not None
    assert row.lease_holder is None
    assert (row.failure.code if row.failure else None) == code
    assert pair(await world.stored()) == OLD


class Gone(Exception):
    pass


@on_memory
@pytest.mark.parametrize(
    ("raised", "expected", "code"),
    [
        (ReauthorizationRequiredError("x"), ReauthorizationRequiredError, "invalid_grant"),
        (
            ReauthorizationRequiredError("x", code="bad_refresh_token"),
            ReauthorizationRequiredError,
            "bad_refresh_token",
        ),
        (ProviderUnavailableError("x"), ProviderUnavailableError, "temporarily_unavailable"),
        (ProviderUnavailableError("x", code="é" * 99), ProviderUnavailableError, "unreadable_code"),
        (ProviderUnavailableError("x", code=None), ProviderUnavailableError, "unreadable_code"),  # type: ignore[arg-type]
        (ProviderRefusedError("x"), ProviderRefusedError, "invalid_client"),
        (ProviderRefusedError("x", code="app_suspended"), ProviderRefusedError, "app_suspended"),
        (TimeoutError("x"), ProviderUnavailableError, "timeout"),
        (Gone("x"), ProviderUnavailableError, "refresh_failed"),
        (KeyError("refresh_token"), ProviderUnavailableError, "refresh_failed"),
        (StoreClosedError("another store's"), ProviderUnavailableError, "refresh_failed"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__),
)
async def test_what_a_callable_raises(world: World, raised: Exception, expected: type[RefreshError], code: str) -> None:
    """One of three errors, which names the row and has the callable's own as its cause; each caller gets its own."""
    script = Script(raised)
    store = await world.store(refreshers={"github": script})
    await world.expired(store)
    errors = await many(3, store)
    assert {type(error) for error in errors} == {expected}
    assert len({id(error) for error in errors}) == 3
    for error in errors:
        assert (error.code, error.provider, error.user_id) == (code, "github", "u1")
        assert error.__cause__ is raised
        assert "'u1'" in str(error)
    assert script.calls == 1
    await _assert_untouched(world, code)


def _chained(token: str) -> Exception:
    try:
        try:
            raise ValueError(f"body: {token}")
        except ValueError as error:
            raise Gone("no") from error
    except Gone as error:
        return error


def _hidden(token: str) -> Exception:
    try:
        try:
            raise ValueError(f"body: {token}")
        except ValueError:
            raise ProviderUnavailableError("no") from None
    except ProviderUnavailableError as error:
        return error


def _noted(token: str) -> Exception:
    error = Gone("no")
    error.add_note(token)
    return error


LEAKS: dict[str, Callable[[str], BaseException]] = {
    "its text": lambda token: Gone(f"refresh_token={token} was refused"),
    "its arguments": lambda token: Gone("no", {"refresh_token": token}),
    "its cause": _chained,
    "its hidden context": _hidden,
    "its note": _noted,
    "a group": lambda token: ExceptionGroup("several", [Gone(token)]),
    "Reauthorization": lambda token: ReauthorizationRequiredError(f"{token} is used"),
    "Unavailable": lambda token: ProviderUnavailableError(f"no answer for {token}"),
    "Refused": lambda token: ProviderRefusedError(f"no client of {token}", code="app_suspended"),
    "a code": lambda token: ProviderRefusedError("no", code=token),
    "a timeout": lambda token: TimeoutError(f"no answer for {token}"),
}


@on_memory
@pytest.mark.parametrize("leak", LEAKS)
async def test_what_a_callable_raises_may_hold_tokens(
    world: World, leak: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Then it is not chained: neither the error nor a log says it, and no later caller of the row. Its class stays."""
    caplog.set_level(logging.DEBUG)
    told_of: list[BaseException] = []
    for token in OLD:
        raised = LEAKS[leak](token)
        one = await world.store(refreshers={"github": Script(raised)}, on_reauthorization_required=told_of.append)
        two = await world.store(refreshers={"github": Script()})
        await world.expired(one)
        errors = await many(2, one) + await many(1, two)
        assert len({type(error) for error in errors[:2]}) == 1
        if isinstance(raised, RefreshError):
            assert isinstance(errors[0], type(raised))
        for error in errors + told_of:
            assert isinstance(error, RefreshError)
            assert token not in told(error)
    assert not any(token in str(vars(record)) for record in caplog.records for token in OLD)


@on_memory
async def test_a_call_that_hangs_is_ended(world: World) -> None:
    """After ``refresh_timeout``; others need not wait for the lease's end."""
    script = Script()
    script.hold()
    store = await world.store(refreshers={"github": script}, refresh_timeout=0.05)
    await world.expired(store)
    errors = await many(3, store)
    assert {(type(error), error.code) for error in errors} == {(ProviderUnavailableError, "timeout")}
    await _assert_untouched(world, "timeout")
    script.answer.set()
    world.ahead += 10
    assert pair(await fresh(store)) == NEW_PAIR


@on_memory
@pytest.mark.parametrize("end", ["answers", "fails"])
async def test_a_call_that_does_not_end_when_told(world: World, end: str) -> None:
    """What it brings in the end counts: it may be the only copy of a live pair."""

    async def stubborn(record: TokenRecord) -> Mapping[str, Any]:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        if end == "fails":
            raise Gone
        return NEW

    store = await world.store(refreshers={"github": stubborn}, refresh_timeout=0.05)
    await world.expired(store)
    if end == "answers":
        assert pair(await fresh(store)) == pair(await world.stored()) == NEW_PAIR
    else:
        with pytest.raises(ProviderUnavailableError, match="refresh_failed"):
            await fresh(store)
        await _assert_untouched(world, "refresh_failed")


@on_memory
async def test_a_call_that_was_cancelled_by_others(world: World) -> None:
    """A callable that waits for a task of its own, which somebody cancels, has failed: nobody is closing anything."""

    async def tricked(record: TokenRecord) -> Mapping[str, Any]:
        task = asyncio.create_task(asyncio.sleep(HOUR))
        asyncio.get_running_loop().call_soon(task.cancel)
        await task
        raise AssertionError

    store = await world.store(refreshers={"github": tricked})
    await world.expired(store)
    for error in await many(3, store):
        assert isinstance(error, ProviderUnavailableError), repr(error)
        assert error.code == "refresh_failed"
    await _assert_untouched(world, "refresh_failed")


class Outcome(BaseException):
    """What pytest.fail raises is no Exception either."""


@on_memory
async def test_no_exception_leaves_callers_waiting(world: World) -> None:
    """Whatever it is: they get it, and the row is not leased."""
    store = await world.store(refreshers={"github": Script(Outcome("must not be called"))})
    await world.expired(store)
    async with asyncio.timeout(5):
        for error in await asyncio.gather(fresh(store), fresh(store), return_exceptions=True):
            assert isinstance(error, Outcome)
    row = await world.sealed()
    assert row is not None
    assert row.lease_holder is None


@on_memory
async def test_a_callable_may_keep_and_change_what_it_gets(world: World) -> None:
    """The record is its own: what it does to it changes nothing about what is stored."""

    async def careless(record: TokenRecord) -> Mapping[str, Any]:
        record["extra"]["scope"] = object()
        record["refresh_token"] = "mine"
        record.clear()
        return {"access_token": "new-access"}

    store = await world.store(refreshers={"github": careless})
    await world.expired(store)
    assert pair(await fresh(store)) == pair(await world.stored()) == ("new-access", OLD[1])
    assert (await world.stored())["extra"] == {"scope": "read"}


@on_memory
async def test_callers_share_the_first_ones_callable(world: World) -> None:
    """What is passed wins over ``refreshers``; those who join get the tokens of the refresh that they joined."""
    first, second, third = Script(), Script(), Script()
    first.hold()
    store = await world.store(refreshers={"github": third})
    await world.expired(store)
    calls = [asyncio.create_task(fresh(store, refresh=script)) for script in (first, second, None)]
    await until_joined(store, 2)
    first.answer.set()
    assert {pair(record) for record in await asyncio.gather(*calls)} == {NEW_PAIR}
    assert [script.calls for script in (first, second, third)] == [1, 0, 0]


# -- failures are shared -----------------------------------------------------------------------------


@on_every_row
async def test_a_dead_refresh_token_is_tried_once(world: World) -> None:
    """Of many callers of two stores one finds out; new tokens work at once."""
    told_of: list[ReauthorizationRequiredError] = []
    one = await world.store(on_reauthorization_required=told_of.append)
    two = await world.store(on_reauthorization_required=told_of.append)
    await world.expired(one)
    count = 200 if world.row.mark == "memory" else 20
    errors = await many(count, one, two) + await many(3, one, two, force=True)
    assert {type(error) for error in errors} == {ReauthorizationRequiredError}
    assert {error.code for error in errors} == {"invalid_grant"}
    assert world.provider.stats().requests == 1
    assert [(error.provider, error.user_id) for error in told_of] == [KEY]
    new = await world.log_in(two)
    assert (await fresh(one))["generation"] == new["generation"] + 1
    assert world.provider.stats().requests == 2


@on_memory
@pytest.mark.parametrize(
    ("error", "elsewhere"),
    [
        (ProviderUnavailableError("x", retry_after=100), ProviderUnavailableError),
        (ProviderRefusedError("x", code="invalid_client", retry_after=100), ProviderRefusedError),
        (ProviderRefusedError("x", code="unauthorized_client", retry_after=100), ProviderRefusedError),
        (ProviderRefusedError("x", code="app_suspended", retry_after=100), ProviderUnavailableError),
    ],
    ids=["unavailable", "invalid_client", "unauthorized_client", "a code of its own"],
)
async def test_a_failure_holds_for_as_long_as_was_asked(
    world: World, error: Exception, elsewhere: type[RefreshError]
) -> None:
    """No call before, in neither store; one after. The codes of RFC 6749 keep their class in the other store, too."""
    script = Script(error, NEW)
    one, two = (await world.store(refreshers={"github": script}), await world.store(refreshers={"github": script}))
    await world.expired(one)
    for passed in (0, 50, 99):
        world.ahead += passed - world.ahead
        for store, expected in ((one, type(error) if passed == 0 else elsewhere), (two, elsewhere)):
            with pytest.raises(RefreshError) as caught:
                await fresh(store)
            assert isinstance(caught.value, ProviderUnavailableError | ProviderRefusedError)
            assert type(caught.value) is expected
            assert caught.value.retry_after == pytest.approx(100 - passed, abs=1)
            assert caught.value.code == getattr(error, "code", None)
    assert script.calls == 1
    world.ahead += 2
    assert pair(await fresh(two)) == NEW_PAIR
    assert script.calls == 2


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
async def test_a_failure_holds_for_a_while_unless_told(world: World, error: Exception, low: float, high: float) -> None:
    """Seconds for an outage, a minute where an operator has to act, an hour at most; nonsense says nothing."""
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
async def test_without_a_good_refresh_token_nobody_is_called(world: World, kind: str) -> None:
    """Where none was issued, or where it has expired on the database's clock."""
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


# -- the row changes while the provider is asked -----------------------------------------------------


@on_every_row
@pytest.mark.parametrize("answer", ["tokens", "invalid_grant"])
async def test_a_new_login_wins(world: World, answer: str) -> None:
    """Its tokens stay, and callers get them without an error, whatever the provider says to the old refresh token."""
    script = Script(NEW if answer == "tokens" else ReauthorizationRequiredError("used"))
    script.hold()
    store = await world.store(refreshers={"github": script})
    await world.expired(store)
    callers = [asyncio.create_task(fresh(store)) for _ in range(3)]
    await script.called.wait()
    await store.store_tokens("github", "u1", "login-access", "login-refresh", world.at(HOUR))
    script.answer.set()
    records = await asyncio.gather(*callers)
    assert {pair(record) for record in records} == {("login-access", "login-refresh")} == {pair(await world.stored())}
    row = await world.sealed()
    assert row is not None
    assert (row.lease_holder, row.failure) == (None, None)
    assert script.calls == 1


@on_memory
async def test_a_new_login_that_has_expired_is_refreshed(world: World) -> None:
    """The refresh goes on with the newer refresh token."""
    store = await world.store()
    await world.log_in(store)
    with world.provider.hold():
        caller = asyncio.create_task(fresh(store))
        await world.requests(1)
        login = await world.log_in(store)
    record = await caller
    assert record["generation"] == login["generation"] + 1
    assert pair(record) == pair(await world.stored())
    assert world.provider.stats().refreshes == 2


@on_rows("memory", "sqlite")
@pytest.mark.parametrize("answer", ["tokens", "invalid_grant"])
async def test_a_deleted_row_stays_deleted(world: World, answer: str) -> None:
    """Callers get None."""
    script = Script(NEW if answer == "tokens" else ReauthorizationRequiredError("used"))
    script.hold()
    store = await world.store(refreshers={"github": script})
    await world.expired(store)
    callers = [asyncio.create_task(store.load_fresh_tokens("github", "u1")) for _ in range(3)]
    await script.called.wait()
    assert await store.delete_tokens("github", "u1")
    script.answer.set()
    assert await asyncio.gather(*callers) == [None] * 3
    assert await world.sealed() is None


@on_every_row
async def test_a_row_that_is_resealed_meanwhile_is_refreshed(world: World) -> None:
    """Another key changes no generation and no lease."""
    script = Script()
    script.hold()
    store = await world.store(refreshers={"github": script})
    old = await world.expired(store)
    caller = asyncio.create_task(fresh(store))
    await script.called.wait()
    keys = Keyring({"k2": bytes(32), "k1": bytes(range(32))})
    newer = await world.store(keyring=keys, refreshers={"github": script})
    assert await newer.reseal_tokens("github", "u1")
    script.answer.set()
    record = await caller
    assert (pair(record), record["generation"]) == (NEW_PAIR, old["generation"] + 1)
    assert record == await newer.load_tokens("github", "u1") | {"updated_at": record["updated_at"]}  # type: ignore[operator]


# -- cancellation ------------------------------------------------------------------------------------


@on_every_row
async def test_cancelled_callers_do_not_cancel_the_refresh(world: World) -> None:
    """Some or all of them: the row holds the new pair, which the provider will ask for."""
    store = await world.store()
    old = await world.log_in(store)
    with world.provider.hold():
        callers = [asyncio.create_task(fresh(store)) for _ in range(5)]
        await world.requests(1)
        await until_joined(store, 4)
        for caller in callers:
            caller.cancel()
        assert all(
            isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*callers, return_exceptions=True)
        )
    new = await world.until_saved(store)
    assert new["generation"] == old["generation"] + 1
    assert (await fresh(store, force=True))["generation"] == new["generation"] + 1


@on_memory
@pytest.mark.parametrize("stage", ["claim_lease", "complete_lease"])
@pytest.mark.parametrize("carried_out", [False, True])
async def test_a_caller_is_cancelled_at_any_stage(world: World, stage: str, carried_out: bool) -> None:
    """What has begun comes to its end; the next caller gets the new pair, and so does one who had joined."""
    script = Script()
    store, meddler = await world.meddled(script)
    await world.expired(store)
    stop = Stop()
    (meddler.after if carried_out else meddler.before)[stage] = stop
    caller, joined = asyncio.create_task(fresh(store)), asyncio.create_task(fresh(store))
    await stop.reached.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    stop.go_on.set()
    assert pair(await joined) == pair(await world.until_saved(store)) == NEW_PAIR
    assert script.calls == 1


@on_memory
async def test_a_caller_that_is_cancelled_while_reading_has_begun_nothing(world: World) -> None:
    script = Script()
    store, meddler = await world.meddled(script)
    await world.expired(store)
    meddler.before["get"] = stop = Stop()
    caller = asyncio.create_task(fresh(store))
    await stop.reached.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    await settled(store)
    assert script.calls == 0
    assert pair(await fresh(store)) == NEW_PAIR


# -- closing -----------------------------------------------------------------------------------------


@on_every_row
async def test_closing_waits_for_a_refresh(world: World) -> None:
    """The new pair is in the row before the connections are gone; who waits gets it."""
    store = await world.store()
    old = await world.log_in(store)
    with world.provider.hold():
        caller = asyncio.create_task(fresh(store))
        await world.requests(1)
        closing = asyncio.create_task(store.aclose())
        await until(lambda: store._engine._closing)
        with pytest.raises(StoreClosedError):
            await fresh(store)
    await closing
    assert pair(await caller) == pair(await world.stored()) != pair(old)


@on_every_row
async def test_a_cancelled_close_loses_no_tokens(world: World) -> None:
    """Its caller goes away, as at the end of a deadline: the refresh comes to its end all the same."""
    store = await world.store()
    old = await world.log_in(store)
    with world.provider.hold():
        caller = asyncio.create_task(fresh(store))
        await world.requests(1)
        closing = asyncio.create_task(store.aclose())
        await until(lambda: store._engine._closing)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
    records = await asyncio.gather(caller, return_exceptions=True)
    await store.aclose()
    assert pair(await world.stored()) != pair(old), records
    assert pair(records[0]) == pair(await world.stored())  # type: ignore[arg-type]


@on_memory
async def test_closing_waits_for_nobody_elses_refresh(world: World) -> None:
    """Who waits for another holder's lease hears that the store is closed."""
    store, meddler = await world.meddled(Script())
    old = await world.expired(store)
    assert await meddler.claim_lease(KEY, generation=old["generation"], holder="other", duration=HOUR)
    caller = asyncio.create_task(fresh(store))
    await until_waiting(store)
    await store.aclose()
    with pytest.raises(StoreClosedError):
        await caller


async def _cancel_everything() -> set[asyncio.Task[Any]]:
    """What `asyncio.run` does at its end. Returns the tasks that go on all the same."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    _, pending = await asyncio.wait(tasks, timeout=3)
    return pending


@on_rows("memory", "sqlite")
@pytest.mark.parametrize("carried_out", [False, True])
async def test_a_loop_that_ends_saves_what_was_issued(world: World, carried_out: bool) -> None:
    """With a new pair in hand, the cancellation of all tasks is no reason to lose it."""
    store, meddler = await world.meddled(Script())
    await world.expired(store)
    stop = Stop()
    (meddler.after if carried_out else meddler.before)["complete_lease"] = stop
    caller = asyncio.create_task(fresh(store))
    await stop.reached.wait()
    assert not await _cancel_everything()
    assert caller.cancelled()
    assert pair(await world.stored()) == NEW_PAIR


@on_memory
async def test_a_loop_that_ends_without_a_database_ends(world: World) -> None:
    """Tokens in hand are tried to be written for as long as ever, not for ever: Ctrl-C ends the program."""
    store, meddler = await world.meddled(Script(), refresh_timeout=0.05)
    await world.expired(store)
    meddler.before["complete_lease"] = failing()
    caller = asyncio.create_task(fresh(store))
    await until(lambda: meddler.calls["complete_lease"] > 0)
    left = await _cancel_everything()
    meddler.before.clear()
    await asyncio.gather(caller, *left, return_exceptions=True)
    assert not left, "the program would not have ended"
    with suppress(TokensNotStoredError):
        await store.aclose()


@on_memory
async def test_a_loop_that_ends_during_the_call_waits_for_the_new_pair(world: World) -> None:
    """The caller ends at once. The refresh ends when the provider has answered and the pair is stored."""
    script = Script()
    script.hold()
    store = await world.store(refreshers={"github": script})
    await world.expired(store)
    caller = asyncio.create_task(fresh(store))
    await script.called.wait()
    asyncio.get_running_loop().call_later(0.01, script.answer.set)
    assert not await _cancel_everything()
    assert caller.cancelled()
    assert pair(await world.stored()) == NEW_PAIR


# -- the database fails ------------------------------------------------------------------------------


@on_rows("memory", "sqlite")
async def test_saving_is_tried_again(world: World) -> None:
    """The new pair is written once the database is back; there is one call, and one notice."""
    news: list[TokenRecord] = []
    store, meddler = await world.meddled(world.refresher, on_refreshed=news.append)
    old = await world.log_in(store)
    meddler.before["complete_lease"] = failing(2)
    records = await many(5, store)
    assert {pair(record) for record in records} == {pair(await world.stored())} != {pair(old)}
    assert [pair(record) for record in news] == [pair(records[0])]
    assert meddler.calls["complete_lease"] == 3
    assert world.provider.stats().requests == 1


@on_every_row
async def test_the_answer_to_saving_is_lost(world: World) -> None:
    """The row tells that the tokens were written: they are not written twice, nor bought twice."""
    news: list[TokenRecord] = []
    store, meddler = await world.meddled(world.refresher, on_refreshed=news.append)
    old = await world.log_in(store)
    meddler.after["complete_lease"] = failing(1)
    records = await many(5, store)
    new = await world.stored()
    assert new["generation"] == old["generation"] + 1
    assert {(pair(record), record["generation"]) for record in records} == {(pair(new), new["generation"])}
    await settled(store)
    assert [pair(record) for record in news] == [pair(new)]
    assert world.provider.stats().requests == 1


@on_rows("memory", "sqlite")
async def test_the_answer_to_the_claim_is_lost(world: World) -> None:
    """The row names this refresh as its holder, so that it makes the call, rather than wait for itself."""
    store, meddler = await world.meddled(world.refresher)
    await world.log_in(store)
    meddler.after["claim_lease"] = failing(1)
    records = await many(3, store)
    assert {pair(record) for record in records} == {pair(await world.stored())}
    assert meddler.calls["claim_lease"] == 1
    assert world.provider.stats().requests == 1


@on_memory
async def test_callers_are_told_when_saving_takes_too_long(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """The error carries the only copy, which shows nowhere; the same pair is written when the database is back."""
    caplog.set_level(logging.DEBUG)
    news: list[TokenRecord] = []
    script = Script()
    store, meddler = await world.meddled(script, refresh_timeout=0.05, on_refreshed=news.append)
    old = await world.expired(store)
    meddler.before["complete_lease"] = failing()
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
    meddler.before.clear()
    assert pair(await world.until_saved(store)) == NEW_PAIR
    assert [pair(record) for record in news] == [NEW_PAIR]
    assert pair(await fresh(store)) == NEW_PAIR
    assert script.calls == 1


@on_memory
async def test_closing_hands_over_what_cannot_be_stored(world: World) -> None:
    """Every row's tokens, in one error; closing again has nothing more to say."""
    store, meddler = await world.meddled(Script(), refresh_timeout=0.05)
    for user in ("u1", "u2"):
        await world.expired(store, user)
    meddler.before["complete_lease"] = failing()
    callers = [asyncio.create_task(fresh(store, user)) for user in ("u1", "u2")]
    await until(lambda: meddler.calls["complete_lease"] >= 2)
    with pytest.raises(TokensNotStoredError) as caught:
        await store.aclose()
    assert {record["user_id"]: pair(record) for record in caught.value.records} == {"u1": NEW_PAIR, "u2": NEW_PAIR}
    assert not any(secret in told(caught.value) for secret in (*OLD, *NEW_PAIR))
    for error in await asyncio.gather(*callers, return_exceptions=True):
        assert isinstance(error, TokensNotStoredError)
    await store.aclose()


@on_memory
async def test_closing_saves_what_can_be_stored_after_all(world: World) -> None:
    """The database comes back while the store closes."""
    store, meddler = await world.meddled(Script(), refresh_timeout=0.2)
    await world.expired(store)
    meddler.before["complete_lease"] = failing(3)
    caller = asyncio.create_task(fresh(store))
    await until(lambda: meddler.calls["complete_lease"] >= 1)
    await store.aclose()
    assert pair(await caller) == pair(await world.stored()) == NEW_PAIR


@on_memory
@pytest.mark.parametrize(
    "error",
    [LockTimeoutError("locked"), BackendError("disk full"), StoreClosedError("closed"), RuntimeError("a driver's own")],
    ids=lambda error: type(error).__name__,
)
async def test_no_error_of_the_database_drops_tokens(world: World, error: Exception) -> None:
    """Whatever its class, a failed write of the only copy is tried again."""
    store, meddler = await world.meddled(Script())
    await world.expired(store)
    meddler.before["complete_lease"] = failing(2, error)
    assert pair(await fresh(store)) == pair(await world.stored()) == NEW_PAIR


@on_memory
@pytest.mark.parametrize("method", ["get", "claim_lease", "complete_lease", "release_lease"])
async def test_a_statement_without_an_answer_is_sent_again(world: World, method: str) -> None:
    """A connection that is dead without a word keeps nobody waiting: not for longer than a provider may take."""
    failure = ProviderUnavailableError("down") if method == "release_lease" else NEW
    script = Script(failure)
    store, meddler = await world.meddled(script, refresh_timeout=0.1)
    await world.expired(store, expires_in=HOUR)
    meddler.before[method] = Stop()
    [outcome] = await many(1, store, force=True)
    if method == "release_lease":
        assert isinstance(outcome, ProviderUnavailableError)
        await _assert_untouched(world, "temporarily_unavailable")
    else:
        assert pair(outcome) == pair(await world.stored()) == NEW_PAIR
    assert script.calls == 1


@on_memory
async def test_a_call_begins_with_a_lease_that_outlasts_it(world: World) -> None:
    """If the answer to the claim was slow, the lease is claimed anew: a call that is cut short may lose a pair."""
    script = Script()
    store, meddler = await world.meddled(script, refresh_timeout=0.2)
    await world.expired(store)
    left: list[float | None] = []

    async def look(record: TokenRecord) -> Mapping[str, Any]:
        row = await world.sealed()
        left.append(None if row is None else row.lease_expires_in)
        return await script(record)

    async def dawdle() -> None:
        if meddler.calls["claim_lease"] == 1:
            await asyncio.sleep(0.15)

    meddler.after["claim_lease"] = dawdle
    assert pair(await fresh(store, refresh=look)) == NEW_PAIR
    assert left[0] is not None
    assert left[0] > 0.19


@on_memory
@pytest.mark.parametrize("method", ["get", "claim_lease"])
async def test_a_database_that_is_gone_is_an_error_before_the_call(
    world: World, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that can be read and not written, too: after some patience, and with its own error; nobody was called."""
    monkeypatch.setattr(backoff, "_RETRY_TIMEOUT", 0.1)
    script = Script()
    store, meddler = await world.meddled(script, refresh_timeout=1)
    await world.expired(store)
    meddler.before[method] = failing()
    for error in await many(3, store) + await many(3, store, force=True):
        assert isinstance(error, BackendUnavailableError), repr(error)
    assert script.calls == 0
    meddler.before.clear()
    assert pair(await fresh(store)) == NEW_PAIR


@on_memory
async def test_a_short_disturbance_is_nobodys_error(world: World) -> None:
    """A connection that was dead, a lock that somebody held: the refresh goes on."""
    for method in ("get", "claim_lease"):
        for error in (None, LockTimeoutError("locked")):
            store, meddler = await world.meddled(Script())
            await world.expired(store)
            meddler.before[method] = failing(1, error)
            if method == "get" and error is not None:
                continue  # reading waits for no lock
            assert pair(await fresh(store)) == NEW_PAIR
            await world.expired(store)
            assert pair(await fresh(store, force=True)) == NEW_PAIR


@on_memory
@pytest.mark.parametrize("gone", [None, BackendError("disk full")], ids=["for a while", "for good"])
async def test_a_failure_that_cannot_be_left_in_the_row(
    world: World, gone: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The callers of this process get it all the same, unless it is a verdict on a token that the row may not hold."""
    monkeypatch.setattr(backoff, "_RETRY_TIMEOUT", 0.1)
    for failure, expected in (
        (ProviderUnavailableError("down"), ProviderUnavailableError),
        (ReauthorizationRequiredError("used"), BackendError if gone else BackendUnavailableError),
    ):
        script = Script(failure)
        store, meddler = await world.meddled(script)
        await world.expired(store)
        meddler.before["release_lease"] = failing(error=gone)
        errors = await many(3, store)
        assert {type(error) for error in errors} == {expected}
        assert script.calls == 1
        assert meddler.calls["release_lease"] == 1 or gone is None


@on_memory
async def test_the_answer_to_leaving_a_failure_is_lost(world: World) -> None:
    """It is in the row: the callers get it, and the listener is told once."""
    told_of: list[ReauthorizationRequiredError] = []
    store, meddler = await world.meddled(
        Script(ReauthorizationRequiredError("used")), on_reauthorization_required=told_of.append
    )
    await world.expired(store)
    meddler.after["release_lease"] = failing(1)
    errors = await many(3, store)
    assert {(type(error), error.code) for error in errors} == {(ReauthorizationRequiredError, "invalid_grant")}
    await settled(store)
    assert len(told_of) == 1


# -- the lease is lost while the provider is asked ---------------------------------------------------


class Overtaken:
    """A refresh whose lease runs out while the provider is slow, and another one that has taken over."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.slow, self.quick = Script(), Script()

    async def begin(self, quick: Script) -> None:
        self.quick = quick
        self.slow.hold()
        self.one, self.meddler = await self.world.meddled(self.slow)
        self.two = await self.world.store(refreshers={"github": quick})
        self.old = await self.world.expired(self.one)
        self.late = asyncio.create_task(fresh(self.one))
        await self.slow.called.wait()
        self.world.ahead += 31  # a lease lasts 30 s


OTHER = {"access_token": "other-access", "refresh_token": "other-refresh", "expires_in": 3600}


@on_memory
async def test_late_tokens_are_saved_if_the_other_gave_up(world: World) -> None:
    """What the row holds is still what they were issued for, and they may be the only live pair."""
    race = Overtaken(world)
    await race.begin(Script(ProviderUnavailableError("down", retry_after=HOUR)))
    with pytest.raises(ProviderUnavailableError):
        await fresh(race.two)
    race.slow.answer.set()
    assert pair(await race.late) == pair(await world.stored()) == pair(await fresh(race.two)) == NEW_PAIR


@on_memory
async def test_late_tokens_are_saved_if_the_other_died(world: World) -> None:
    """Its lease has run out as well, or runs out in the end."""
    for left in (-1, 0.05):
        race = Overtaken(world)
        await race.begin(Script())
        claimed = await race.meddler.claim_lease(
            KEY, generation=race.old["generation"], holder="dead", duration=1 + left
        )
        assert claimed
        world.ahead += 1
        race.slow.answer.set()
        assert pair(await race.late) == pair(await world.stored()) == NEW_PAIR


@on_memory
async def test_late_tokens_wait_for_the_other(world: World) -> None:
    """Beside a live lease nothing is written: saved when the other fails."""
    race = Overtaken(world)
    quick = Script(ProviderUnavailableError("down"))
    quick.hold()
    await race.begin(quick)
    other = asyncio.create_task(fresh(race.two))
    await quick.called.wait()
    race.slow.answer.set()
    await until(lambda: race.meddler.calls["complete_lease"] == 1)
    assert pair(await world.stored()) == OLD
    quick.answer.set()
    with pytest.raises(ProviderUnavailableError):
        await other
    assert pair(await race.late) == pair(await world.stored()) == NEW_PAIR


@on_memory
async def test_late_tokens_are_dropped_if_there_are_newer_ones(world: World) -> None:
    """The caller gets the newer ones, without an error."""
    race = Overtaken(world)
    await race.begin(Script(OTHER))
    assert pair(await fresh(race.two)) == pair(OTHER)
    race.slow.answer.set()
    assert pair(await race.late) == pair(await world.stored()) == pair(OTHER)
    assert (race.slow.calls, race.quick.calls) == (1, 1)


@on_memory
async def test_a_late_failure_is_no_verdict_on_newer_tokens(world: World) -> None:
    """A refusal of the refresh token that the other one has used: the caller gets the other's tokens."""
    race = Overtaken(world)
    race.slow = Script(ReauthorizationRequiredError("used"))
    await race.begin(Script(OTHER))
    assert pair(await fresh(race.two)) == pair(OTHER)
    race.slow.answer.set()
    assert pair(await race.late) == pair(await world.stored()) == pair(OTHER)


# -- clocks ------------------------------------------------------------------------------------------


@on_every_row
async def test_machines_whose_clocks_differ_agree(world: World) -> None:
    """Expiry and leases run on the database's clock; what was issued for eight hours is valid on all of them."""
    world.provider.access_token_lifetime = 8 * HOUR
    clocks = [lambda skew=skew: datetime.now(UTC).timestamp() + skew for skew in (-HOUR, 0, HOUR)]
    stores = [await world.store(clock=clock) for clock in clocks]
    await world.log_in(stores[0], expires_in=30)
    records = await many(2, *stores)
    assert {pair(record) for record in records} == {pair(await world.stored())}
    assert world.provider.stats().requests == 1
    assert all(store.is_access_token_valid(records[0]) for store in stores)


# -- refresh_due -------------------------------------------------------------------------------------


async def due(store: AuthTokenStore, **options: Any) -> list[RefreshResult]:
    return [result async for result in store.refresh_due(**options)]


@on_every_row
async def test_what_is_due_is_refreshed_once(world: World) -> None:
    """By two machines at once, page by page; each of them tells what became of every due row, and of no other."""
    one, two = await world.store(), await world.store()
    for user in "aceg":
        await world.log_in(one, user, expires_in=500)
    await world.log_in(one, "b", expires_in=700)
    await one.store_tokens("github", "d", "at", None, world.at(500))
    await one.store_tokens("github", "f", "at", "rt", None)
    await one.store_tokens("gitlab", "a", "at", "rt", world.at(500))
    options = {"within": timedelta(seconds=600), "provider": "github", "concurrency": 2, "page_size": 2}
    mine, theirs = await asyncio.gather(due(one, **options), due(two, **options))
    for results in (mine, theirs):
        assert {(result.provider, result.error) for result in results} == {("github", None)}
        assert {result.outcome for result in results} <= {"refreshed", "not_due", "busy"}
        users = [result.user_id for result in results]
        assert len(set(users)) == len(users)
        assert set(users) <= set("aceg")
    refreshed = [result.user_id for result in mine + theirs if result.outcome == "refreshed"]
    assert sorted(refreshed) == list("aceg")
    assert world.provider.stats().refreshes_by_user == dict.fromkeys("aceg", 1)
    assert await due(one, **options) == []


@on_memory
async def test_refresh_due_keeps_to_its_concurrency(world: World) -> None:
    """As many as that at once, and never one more."""
    script = Script()
    script.hold()
    in_flight = most = 0

    async def counting(record: TokenRecord) -> Mapping[str, Any]:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        if in_flight == 3:
            script.answer.set()
        await script(record)
        await asyncio.sleep(0)
        in_flight -= 1
        return NEW

    store = await world.store(refreshers={"github": counting})
    users = [f"u{n}" for n in range(10)]
    for user in users:
        await world.expired(store, user)
    results = await due(store, within=0, concurrency=3, page_size=4)
    assert sorted(result.user_id for result in results) == users
    assert {result.outcome for result in results} == {"refreshed"}
    assert most == 3


@on_memory
async def test_refresh_due_tells_of_failures(world: World) -> None:
    """One row's error stops no other; it names the row."""

    async def moody(record: TokenRecord) -> Mapping[str, Any]:
        if record["user_id"] == "b":
            raise ReauthorizationRequiredError("used")
        if record["user_id"] == "c":
            raise Gone(record["refresh_token"])
        return NEW

    store, meddler = await world.meddled(moody)
    for user in "abcd":
        await world.expired(store, user)
    results = {result.user_id: result for result in await due(store, within=60)}
    assert {user: result.outcome for user, result in results.items()} == {
        "a": "refreshed",
        "b": "failed",
        "c": "failed",
        "d": "refreshed",
    }
    assert isinstance(results["b"].error, ReauthorizationRequiredError)
    assert isinstance(results["c"].error, ProviderUnavailableError)
    assert results["c"].error.user_id == "c"
    assert results["a"].error is None
    assert OLD[1] not in repr(results)
    meddler.before["claim_lease"] = failing(error=BackendError("no space"))
    await world.expired(store, "a")
    results = {result.user_id: result for result in await due(store, within=60)}
    assert {user: type(result.error) for user, result in results.items()} == {
        "a": BackendError,
        "b": ReauthorizationRequiredError,
        "c": ProviderUnavailableError,
    }


@on_memory
async def test_refresh_due_of_several_providers(world: World) -> None:
    """All that have a refresher, in turn; or one, with a callable of the caller's."""
    hub, lab, mine = Script(), Script(), Script()
    store = await world.store(refreshers={"github": hub, "gitlab": lab})
    for provider in ("github", "gitlab", "slack"):
        await store.store_tokens(provider, "u1", *OLD, world.at(-1))
    results = await due(store, within=60)
    assert sorted((result.provider, result.outcome) for result in results) == [
        ("github", "refreshed"),
        ("gitlab", "refreshed"),
    ]
    assert await due(store, within=60) == []
    [result] = await due(store, within=60, provider="slack", refresh=mine)
    assert (result.provider, result.outcome) == ("slack", "refreshed")
    assert [script.calls for script in (hub, lab, mine)] == [1, 1, 1]
    assert await due(await world.store(refreshers={}), within=60) == []


@on_memory
async def test_refresh_due_says_busy_and_gone(world: World) -> None:
    """A row that somebody is refreshing is left to them; one that was deleted since it was listed is gone."""
    script = Script()
    store, meddler = await world.meddled(script)
    busy = await world.expired(store, "a")
    assert await meddler.claim_lease(TokenKey("github", "a"), generation=busy["generation"], holder="x", duration=HOUR)
    await world.expired(store, "b")

    async def delete() -> None:
        await meddler.backend.delete(TokenKey("github", "b"))

    meddler.before["get"] = delete
    results = await due(store, within=60)
    assert sorted((result.user_id, result.outcome) for result in results) == [("a", "busy"), ("b", "gone")]
    assert script.calls == 0


@on_memory
async def test_an_iteration_that_ends_early_leaves_nothing_hanging(world: World) -> None:
    """Refreshes that have begun come to their end; those that have not do not begin."""
    script = Script()
    store = await world.store(refreshers={"github": script})
    users = [f"u{n}" for n in range(8)]
    for user in users:
        await world.expired(store, user)
    async with aclosing(store.refresh_due(within=60, concurrency=2, page_size=3)) as results:
        async for result in results:
            assert result.outcome == "refreshed"
            script.hold()
            break
    script.answer.set()
    await settled(store)
    assert len(asyncio.all_tasks()) == 1
    states = [pair(await world.stored(user)) for user in users]
    assert states.count(NEW_PAIR) == script.calls <= 3
    assert [row.lease_holder for user in users if (row := await world.sealed(user))] == [None] * 8


@on_memory
async def test_a_row_that_is_needed_while_it_is_refreshed_ahead_of_time(world: World) -> None:
    """A caller with an expired token joins what `refresh_due` has begun."""
    script = Script()
    script.hold()
    store = await world.store(refreshers={"github": script})
    await world.expired(store)
    results = asyncio.create_task(due(store, within=60))
    await script.called.wait()
    caller = asyncio.create_task(fresh(store))
    await until_joined(store, 1)
    script.answer.set()
    assert pair(await caller) == NEW_PAIR
    assert [result.outcome for result in await results] == ["refreshed"]
    assert script.calls == 1


# -- revoke_tokens -----------------------------------------------------------------------------------


@on_every_row
async def test_tokens_are_revoked_and_forgotten(world: World) -> None:
    """At the provider first (RFC 7009), then here."""
    store = await world.store()
    await world.log_in(store, expires_in=HOUR)
    assert await store.revoke_tokens("github", "u1")
    assert await world.sealed() is None
    assert world.provider.stats().revoked_grants == 1
    assert not await store.revoke_tokens("github", "u1")


@on_rows("memory", "sqlite")
async def test_an_outage_keeps_what_was_to_be_revoked(world: World) -> None:
    """The row is as usable as before, at once."""
    store = await world.store()
    old = await world.log_in(store)
    world.provider.outage = True
    with pytest.raises(ProviderUnavailableError, match="503"):
        await store.revoke_tokens("github", "u1")
    world.provider.outage = False
    assert pair(await world.stored()) == pair(old)
    assert (await fresh(store))["generation"] == old["generation"] + 1


class Revoker(Script):
    """A refresher whose revocation can be held back as well."""

    def __init__(self, error: BaseException | None = None) -> None:
        super().__init__()
        self.error = error
        self.revoking = asyncio.Event()
        self.revoked: list[tuple[object, object]] = []

    async def revoke(self, record: TokenRecord) -> None:
        self.revoking.set()
        await self.answer.wait()
        if self.error is not None:
            raise self.error
        self.revoked.append(pair(record))


@on_rows("memory", "sqlite")
async def test_revoking_waits_for_a_refresh(world: World) -> None:
    """It is the new tokens that have to be revoked."""
    revoker = Revoker()
    revoker.hold()
    one, two = (await world.store(refreshers={"github": revoker}), await world.store(refreshers={"github": revoker}))
    await world.expired(one)
    caller = asyncio.create_task(fresh(one))
    await revoker.called.wait()
    revoking = asyncio.create_task(two.revoke_tokens("github", "u1"))
    revoker.answer.set()
    assert pair(await caller) == NEW_PAIR
    assert await revoking
    assert revoker.revoked == [NEW_PAIR]
    assert await world.sealed() is None


@on_rows("memory", "sqlite")
async def test_nobody_refreshes_what_is_being_revoked(world: World) -> None:
    """A valid token is served until it is gone, an expired one is waited for; then there is none."""
    revoker = Revoker()
    revoker.hold()
    store = await world.store(refreshers={"github": revoker})
    await world.expired(store)
    revoking = asyncio.create_task(store.revoke_tokens("github", "u1"))
    await revoker.revoking.wait()
    caller = asyncio.create_task(store.load_fresh_tokens("github", "u1"))
    await until_waiting(store)
    revoker.answer.set()
    assert await revoking
    assert await caller is None
    assert revoker.calls == 0


@on_every_row
async def test_a_new_login_is_not_revoked(world: World) -> None:
    """It came while the old tokens were being revoked, and stays."""
    revoker = Revoker()
    revoker.hold()
    store = await world.store(refreshers={"github": revoker})
    await world.expired(store)
    revoking = asyncio.create_task(store.revoke_tokens("github", "u1"))
    await revoker.revoking.wait()
    await store.store_tokens("github", "u1", "login-access", "login-refresh", world.at(HOUR))
    revoker.answer.set()
    assert await revoking
    assert revoker.revoked == [OLD]
    assert pair(await world.stored()) == pair(await fresh(store)) == ("login-access", "login-refresh")


@on_memory
async def test_a_cancelled_caller_does_not_stop_a_revocation(world: World) -> None:
    """It has begun at the provider; closing waits for it."""
    revoker = Revoker()
    revoker.hold()
    store = await world.store(refreshers={"github": revoker})
    await world.expired(store)
    revoking = asyncio.create_task(store.revoke_tokens("github", "u1"))
    await revoker.revoking.wait()
    revoking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await revoking
    closing = asyncio.create_task(store.aclose())
    await asyncio.sleep(0)
    assert not closing.done()
    revoker.answer.set()
    await closing
    assert await world.sealed() is None


@on_memory
@pytest.mark.parametrize(
    "failure", [ReauthorizationRequiredError("x"), ProviderUnavailableError("x", retry_after=HOUR)]
)
async def test_what_can_no_longer_be_refreshed_can_be_revoked(world: World, failure: Exception) -> None:
    """The access token may be good still."""
    store = await world.store(refreshers={"github": Script(failure)})
    await world.expired(store)
    with pytest.raises(type(failure)):
        await fresh(store)
    revoker = Revoker()
    assert await store.revoke_tokens("github", "u1", refresher=revoker)
    assert revoker.revoked == [OLD]
    assert await world.sealed() is None


@on_memory
async def test_what_was_refreshed_during_a_revocation_is_revoked_too(world: World) -> None:
    """While a failure holds no lease can be claimed, and it may end meanwhile."""
    script = Script(ProviderUnavailableError("x", retry_after=1), NEW)
    store = await world.store(refreshers={"github": script})
    await world.expired(store)
    with pytest.raises(ProviderUnavailableError):
        await fresh(store)
    revoker = Revoker()
    revoker.hold()
    revoking = asyncio.create_task(store.revoke_tokens("github", "u1", refresher=revoker))
    await until(lambda: revoker.revoking.is_set() or script.calls > 1)
    world.ahead += 2
    caller = asyncio.create_task(store.load_fresh_tokens("github", "u1"))
    await until(lambda: caller.done() or bool(store._engine._attempts))
    revoker.answer.set()
    assert await revoking
    await caller
    assert await world.sealed() is None


@on_memory
@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ProviderUnavailableError("x", code="server_error"), ProviderUnavailableError),
        (ProviderRefusedError("x"), ProviderRefusedError),
        (UnsupportedOperationError("this provider has no way to revoke"), UnsupportedOperationError),
        (TimeoutError("x"), ProviderUnavailableError),
        (Gone("x"), ProviderUnavailableError),
        (Gone(OLD[1]), ProviderUnavailableError),
        (ProviderUnavailableError(OLD[1]), ProviderUnavailableError),
    ],
    ids=["unavailable", "refused", "unsupported", "timeout", "anything", "anything with a token", "a token"],
)
async def test_a_revocation_that_fails(world: World, raised: Exception, expected: type[TokenStoreError]) -> None:
    """One of the library's errors, which holds no token and names the row; the row stays, without lease or failure."""
    store = await world.store()
    await world.expired(store)
    with pytest.raises(TokenStoreError) as caught:
        await store.revoke_tokens("github", "u1", refresher=Revoker(raised))
    assert type(caught.value) is expected
    assert not any(token in told(caught.value) for token in OLD)
    if isinstance(caught.value, RefreshError):
        assert (caught.value.provider, caught.value.user_id) == KEY
    await _assert_untouched(world, None)


@on_memory
async def test_a_revocation_that_hangs_is_ended(world: World) -> None:
    """After ``refresh_timeout``."""
    store = await world.store(refresh_timeout=0.05)
    await world.expired(store)
    revoker = Revoker()
    revoker.hold()
    with pytest.raises(ProviderUnavailableError, match="in time") as caught:
        await store.revoke_tokens("github", "u1", refresher=revoker)
    assert caught.value.code == "timeout"
    await _assert_untouched(world, None)


@on_memory
async def test_revoking_waits_for_others_within_bounds(world: World) -> None:
    """As long as `load_fresh_tokens` does."""
    store, meddler = await world.meddled(Revoker(), refresh_timeout=0.05)
    old = await world.expired(store)
    assert await meddler.claim_lease(KEY, generation=old["generation"], holder="stuck", duration=HOUR)
    with pytest.raises(RefreshTimeoutError):
        await store.revoke_tokens("github", "u1")


@on_memory
async def test_a_callable_that_cannot_revoke(world: World) -> None:
    """The error says what would do."""
    store = await world.store(refreshers={"github": Script()})
    await world.expired(store)
    with pytest.raises(ConfigurationError, match="delete_tokens"):
        await store.revoke_tokens("github", "u1")
    assert pair(await world.stored()) == OLD


# -- events ------------------------------------------------------------------------------------------


@on_memory
@pytest.mark.parametrize("kind", ["plain", "coroutine", "raising", "raising coroutine"])
async def test_listeners_are_told_once(world: World, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Of new tokens, and of a dead refresh token; what they raise is logged without its text, and is nobody's error."""
    told_of: list[Any] = []

    def plain(news: Any) -> None:
        told_of.append(news)
        if kind.startswith("raising"):
            raise Gone(OLD[1])

    async def coroutine(news: Any) -> None:
        await asyncio.sleep(0)
        plain(news)

    listener = coroutine if kind.endswith("coroutine") else plain
    script = Script(NEW, ReauthorizationRequiredError("used"))
    options: dict[str, Any] = {"on_refreshed": listener, "on_reauthorization_required": listener}
    store = await world.store(refreshers={"github": script}, **options)
    await world.expired(store)
    records = await many(3, store)
    await settled(store)
    assert [(pair(news), news["generation"]) for news in told_of] == [(NEW_PAIR, records[0]["generation"])]
    errors = await many(3, store, force=True) + await many(2, store, force=True)
    await settled(store)
    _, error = told_of
    assert isinstance(error, ReauthorizationRequiredError)
    assert (error.provider, error.user_id) == KEY
    assert all(isinstance(other, ReauthorizationRequiredError) and other is not error for other in errors)
    problems = [record for record in caplog.records if record.levelno >= logging.WARNING and "callback" in record.msg]
    assert len([record for record in caplog.records if "callback" in record.getMessage()]) == (
        2 if kind.startswith("raising") else 0
    )
    assert not any(OLD[1] in str(vars(record)) for record in problems + caplog.records)


@on_memory
async def test_only_the_store_that_refreshed_tells(world: World) -> None:
    """Others read what it stored."""
    news: dict[str, list[TokenRecord]] = {"one": [], "two": []}
    script = Script()
    script.hold()
    one = await world.store(refreshers={"github": script}, on_refreshed=news["one"].append)
    two = await world.store(refreshers={"github": script}, on_refreshed=news["two"].append)
    await world.expired(one)
    first = asyncio.create_task(fresh(one))
    await script.called.wait()
    second = asyncio.create_task(fresh(two))
    await until_waiting(two)
    script.answer.set()
    await asyncio.gather(first, second)
    await settled(one)
    assert (len(news["one"]), len(news["two"])) == (1, 0)


@on_memory
async def test_a_listener_may_use_the_store(world: World) -> None:
    """The refresh that it is told of has ended."""
    found: list[object] = []

    async def listener(record: TokenRecord) -> None:
        found.append(pair(await fresh(store)))

    store = await world.store(refreshers={"github": Script()}, on_refreshed=listener)
    await world.expired(store)
    await fresh(store)
    await settled(store)
    assert found == [NEW_PAIR]


@on_memory
async def test_a_listener_that_does_not_end_stops_nobody(world: World) -> None:
    """Closing waits for it as long as for a provider; and a listener that closes the store does not wait for itself."""
    stores: list[AuthTokenStore] = []

    async def hang(record: TokenRecord) -> None:
        await asyncio.Event().wait()

    async def close(record: TokenRecord) -> None:
        await stores[-1].aclose()

    for listener in (hang, close):
        stores.append(await world.store(refreshers={"github": Script()}, on_refreshed=listener, refresh_timeout=0.05))
        await world.expired(stores[-1])
        assert pair(await fresh(stores[-1])) == NEW_PAIR
        await stores[-1].aclose()


# -- backends with fewer and with more abilities -----------------------------------------------------


@on_every_row
async def test_the_least_backend_will_do(world: World) -> None:
    """Without row locks and without watching, everything works."""
    one, _ = await world.meddled(world.refresher)
    two, _ = await world.meddled(world.refresher)
    await world.log_in(one)
    records = await many(5, one, two)
    assert {pair(record) for record in records} == {pair(await world.stored())}
    assert world.provider.stats().requests == 1
    [result] = await due(one, within=2 * HOUR)
    assert result.outcome == "refreshed"
    assert await two.revoke_tokens("github", "u1")
    assert await world.sealed() is None


class Refusing(Meddler):
    """A backend whose every write of a refresh is refused, against the protocol."""

    async def complete_lease(self, key: TokenKey, tokens: SealedTokens, *, generation: int, holder: str) -> bool:
        self.calls["complete_lease"] += 1
        return False


@on_memory
async def test_a_refusal_without_a_reason_hangs_nobody(world: World) -> None:
    """The tokens are in hand and nobody is in the way: callers are told in time, and so is who closes the store."""
    backend = Refusing(world.backend())
    store = await world.store(backend, refreshers={"github": Script()}, refresh_timeout=0.05)
    await world.expired(store)
    for error in await many(3, store):
        assert isinstance(error, TokensNotStoredError)
        assert pair(error.record) == NEW_PAIR
    assert backend.calls["complete_lease"] < 50
    with pytest.raises(TokensNotStoredError):
        await store.aclose()


class Watcher(Meddler):
    """A backend that can be watched, or cannot."""

    def __init__(self, backend: Any) -> None:
        super().__init__(backend)
        self.changed = asyncio.Event()

    async def watch(self, key: TokenKey) -> None:
        await self._pass("watch", self.changed.wait)


@on_memory
async def test_a_backend_that_can_be_watched_is(world: World) -> None:
    """In place of reading it at a fixed pace; but no longer than the lease lasts."""
    store, _ = await world.meddled(Script())
    watcher = Watcher(world.backend())
    two = await world.store(watcher, refreshers={"github": Script()})
    old = await world.expired(store)
    assert await watcher.claim_lease(KEY, generation=old["generation"], holder="other", duration=0.2)
    assert pair(await fresh(two)) == NEW_PAIR
    assert watcher.calls["watch"] == 1


@on_memory
@pytest.mark.parametrize("error", [None, RuntimeError("a driver's own")], ids=["unavailable", "anything"])
async def test_a_watch_that_fails_is_no_reason_to_fail(world: World, error: Exception | None) -> None:
    """Neither for who waits, nor for who has tokens in hand beside somebody else's lease."""
    slow = Script()
    slow.hold()
    watcher = Watcher(world.backend())
    watcher.before["watch"] = failing(error=error)
    store = await world.store(watcher, refreshers={"github": slow})
    old = await world.expired(store)
    claim = {"generation": old["generation"], "holder": "other"}
    assert await watcher.claim_lease(KEY, duration=0.1, **claim)
    caller = asyncio.create_task(fresh(store))
    await slow.called.wait()
    world.ahead += 31
    assert await watcher.claim_lease(KEY, duration=0.1, **claim)
    slow.answer.set()
    assert pair(await caller) == pair(await world.stored()) == NEW_PAIR
    assert watcher.calls["watch"] >= 2
