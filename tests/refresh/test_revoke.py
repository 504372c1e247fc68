"""`revoke_tokens`: tokens are revoked at the provider first, then the row is deleted."""

from __future__ import annotations

import asyncio
import threading

import pytest

from support.error_text import told
from support.polling import until
from support.refresh_world import World, assert_untouched, on_every_row, on_memory, on_rows, until_waiting
from support.refreshers import NEW, NEW_PAIR, OLD, Gone, Revoker, Script, pair
from support.store_calls import fresh
from tokenstore import (
    AuthTokenStore,
    ConfigurationError,
    ProviderRefusedError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    RefreshError,
    RefreshTimeoutError,
    TokenRecord,
    TokenStoreError,
    UnsupportedOperationError,
)
from tokenstore.records import TokenKey

HOUR = 3600.0
KEY = TokenKey("github", "u1")


async def _in_revocation(world: World) -> tuple[Revoker, AuthTokenStore, asyncio.Task[bool]]:
    """Start revoking an expired row; the refresher waits until its ``answer`` is set. Returns it, store and task."""
    revoker = Revoker()
    revoker.hold()
    store = await world.store(refreshers={"github": revoker})
    await world.expired(store)
    revoking = asyncio.create_task(store.revoke_tokens("github", "u1"))
    await revoker.revoking.wait()
    return revoker, store, revoking


@on_every_row
async def test_tokens_are_revoked_at_the_provider_and_deleted(world: World) -> None:
    """They are revoked first (RFC 7009), and deleted after that."""
    store = await world.store()
    await world.log_in(store, expires_in=HOUR)
    assert await store.revoke_tokens("github", "u1")
    assert await world.sealed() is None
    assert world.provider.stats().revoked_grants == 1
    assert not await store.revoke_tokens("github", "u1")


@on_memory
@pytest.mark.parametrize("end", ["revokes", "exceeds refresh_timeout"])
async def test_revoke_can_be_a_plain_method_which_runs_in_a_thread(world: World, end: str) -> None:
    """A call that exceeds ``refresh_timeout`` deletes nothing, and counts as in flight until its thread ends."""
    goes_on = threading.Event()
    loop = asyncio.get_running_loop()

    class Plain(Script):
        def revoke(self, record: TokenRecord) -> None:
            if end == "revokes":
                loop.call_soon_threadsafe(goes_on.set)
            assert goes_on.wait(10)

    store = await world.store(
        refreshers={"github": Plain()}, refresh_timeout=20.0 if end == "revokes" else 0.05, provider_concurrency=1
    )
    await world.expired(store)
    gate = store._engine._settings.gates.of("github")
    if end == "revokes":
        assert await store.revoke_tokens("github", "u1")
        assert await world.sealed() is None
        return
    with pytest.raises(ProviderUnavailableError, match="timeout"):
        await store.revoke_tokens("github", "u1")
    assert await world.sealed() is not None
    assert gate.in_flight == 1
    goes_on.set()
    await until(lambda: gate.in_flight == 0)


@on_rows("memory", "sqlite")
async def test_an_outage_of_the_provider_keeps_the_row(world: World) -> None:
    """The row has no lease and can be used at once."""
    store = await world.store()
    old = await world.log_in(store)
    world.provider.outage = True
    with pytest.raises(ProviderUnavailableError, match="temporarily_unavailable"):
        await store.revoke_tokens("github", "u1")
    world.provider.outage = False
    assert pair(await world.stored()) == pair(old)
    assert (await fresh(store))["generation"] == old["generation"] + 1


@on_rows("memory", "sqlite")
async def test_revoking_waits_for_a_refresh(world: World) -> None:
    """The new tokens are revoked, not those that the refresh replaced."""
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
async def test_tokens_that_are_being_revoked_are_not_refreshed(world: World) -> None:
    """A valid token is returned until it is deleted; for an expired one, callers wait and then get None."""
    revoker, store, revoking = await _in_revocation(world)
    caller = asyncio.create_task(store.load_fresh_tokens("github", "u1"))
    await until_waiting(store)
    revoker.answer.set()
    assert await revoking
    assert await caller is None
    assert revoker.calls == 0


@on_every_row
async def test_a_new_login_is_not_revoked(world: World) -> None:
    """The user logged in while the old tokens were being revoked; the new tokens stay."""
    revoker, store, revoking = await _in_revocation(world)
    await store.store_tokens("github", "u1", "login-access", "login-refresh", world.at(HOUR))
    revoker.answer.set()
    assert await revoking
    assert revoker.revoked == [OLD]
    assert pair(await world.stored()) == pair(await fresh(store)) == ("login-access", "login-refresh")


@on_memory
async def test_a_cancelled_caller_does_not_stop_a_revocation(world: World) -> None:
    """The provider may have revoked the tokens already, so the revocation continues, and closing waits for it."""
    revoker, store, revoking = await _in_revocation(world)
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
async def test_tokens_with_a_dead_refresh_token_can_be_revoked(world: World, failure: Exception) -> None:
    """Their access token may still be valid."""
    store = await world.store(refreshers={"github": Script(failure)})
    await world.expired(store)
    with pytest.raises(type(failure)):
        await fresh(store)
    revoker = Revoker()
    assert await store.revoke_tokens("github", "u1", refresher=revoker)
    assert revoker.revoked == [OLD]
    assert await world.sealed() is None


@on_memory
async def test_tokens_that_were_refreshed_during_a_revocation_are_revoked_too(world: World) -> None:
    """The row had a failure, so the revocation has no lease; the failure expired meanwhile, and a caller refreshed."""
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
async def test_a_failed_revocation_keeps_the_row_and_raises_an_error_that_names_it(
    world: World, raised: Exception, expected: type[TokenStoreError]
) -> None:
    """The error is one of tokenstore and contains no token; the row has neither lease nor failure."""
    store = await world.store()
    await world.expired(store)
    with pytest.raises(TokenStoreError) as caught:
        await store.revoke_tokens("github", "u1", refresher=Revoker(raised))
    assert type(caught.value) is expected
    assert not any(token in told(caught.value) for token in OLD)
    if isinstance(caught.value, RefreshError):
        assert (caught.value.provider, caught.value.user_id, caught.value.account) == KEY
    await assert_untouched(world, None)


@on_memory
async def test_a_revocation_that_hangs_is_cancelled_after_refresh_timeout(world: World) -> None:
    """After ``refresh_timeout``."""
    store = await world.store(refresh_timeout=0.05)
    await world.expired(store)
    revoker = Revoker()
    revoker.hold()
    with pytest.raises(ProviderUnavailableError, match="in time") as caught:
        await store.revoke_tokens("github", "u1", refresher=revoker)
    assert caught.value.code == "timeout"
    await assert_untouched(world, None)


@on_memory
async def test_revoking_waits_for_another_refresh_for_a_limited_time(world: World) -> None:
    """The limit is the same as for `load_fresh_tokens`."""
    store, interceptor = await world.intercepted(Revoker(), refresh_timeout=0.05)
    old = await world.expired(store)
    assert await interceptor.claim_lease(KEY, generation=old["generation"], holder="stuck", duration=HOUR)
    with pytest.raises(RefreshTimeoutError):
        await store.revoke_tokens("github", "u1")


@on_memory
async def test_a_refresher_without_a_revoke_method_is_an_error(world: World) -> None:
    """The error says what the refresher needs."""
    store = await world.store(refreshers={"github": Script()})
    await world.expired(store)
    with pytest.raises(ConfigurationError, match="delete_tokens"):
        await store.revoke_tokens("github", "u1")
    assert pair(await world.stored()) == OLD
