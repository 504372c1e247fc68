"""What a call of `load_fresh_tokens` needs: a time that the token remains valid, and scopes."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import pytest

from support.refresh_world import World, on_every_row, on_memory, until_joined
from support.refreshers import NEW, NEW_PAIR, OLD, Script, pair
from support.store_calls import fresh
from tokenstore import ConfigurationError, InsufficientScopeError, InvalidInputError

HOUR = 3600.0

# -- min_ttl -------------------------------------------------------------------------------------------


@on_every_row
async def test_a_token_that_ends_too_soon_for_the_call_is_refreshed(world: World) -> None:
    """Another call, which needs less, gets the token that is stored."""
    script = Script({**NEW, "expires_in": HOUR})
    store = await world.store(refreshers={"github": script}, refresh_margin=0)
    await world.expired(store, expires_in=600)
    assert pair(await fresh(store)) == pair(await fresh(store, min_ttl=500)) == OLD
    assert script.calls == 0
    assert pair(await fresh(store, min_ttl=700)) == NEW_PAIR
    assert pair(await fresh(store, min_ttl=700)) == NEW_PAIR
    assert script.calls == 1


@on_memory
async def test_a_call_that_needs_more_joins_a_refresh_or_begins_another(world: World) -> None:
    """Two callers at once: one needs a valid token, and one needs a longer time. One refresh serves both."""
    script = Script({**NEW, "expires_in": HOUR})
    script.hold()
    store = await world.store(refreshers={"github": script})
    await world.expired(store)
    calls = [asyncio.create_task(fresh(store, min_ttl=ttl)) for ttl in (0, 2000, 3000)]
    await until_joined(store, 2)
    script.answer.set()
    assert {pair(record) for record in await asyncio.gather(*calls)} == {NEW_PAIR}
    assert script.calls == 1


@on_memory
async def test_tokens_that_never_live_that_long_are_refreshed_at_half_of_their_lifetime(world: World) -> None:
    """Otherwise every call would refresh."""
    script = Script({**NEW, "expires_in": 300})
    store = await world.store(refreshers={"github": script}, refresh_margin=0)
    await world.expired(store)
    for _ in range(10):
        await fresh(store, min_ttl=600)
    assert script.calls == 1
    world.ahead += 151
    for _ in range(10):
        await fresh(store, min_ttl=600)
    assert script.calls == 2


@on_memory
async def test_min_ttl_with_force(world: World) -> None:
    """A young row is returned only if its token remains valid for long enough."""
    script = Script({**NEW, "expires_in": HOUR})
    store = await world.store(refreshers={"github": script})
    await world.expired(store, expires_in=600)
    assert pair(await fresh(store, force=True, force_min_age=60, min_ttl=100)) == OLD
    assert pair(await fresh(store, force=True, force_min_age=60, min_ttl=1000)) == NEW_PAIR
    assert script.calls == 1


# -- scopes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "missing"),
    [
        ({"scope": "read write"}, ()),
        ({"scope": "write  read\tadmin"}, ()),
        ({"scope": "read,write"}, ()),
        ({"scope": "read, write"}, ()),
        ({"scope": ["read", "write", 7]}, ()),
        ({"scopes": ["write", "read"]}, ()),
        ({"scopes": "write read"}, ()),
        ({"scope": "read"}, ("write",)),
        ({"scope": "READ Write"}, ("read", "write")),
        ({"scope": ["readwrite"]}, ("read", "write")),
        ({"scope": "", "scopes": []}, ()),
        ({"scope": None}, ()),
        ({"scope": {"read": True}}, ()),
        ({}, ()),
    ],
)
@on_memory
async def test_scopes_that_the_user_has_not_granted(world: World, extra: dict[str, Any], missing: Any) -> None:
    """If the response names no scope, all that were requested were granted (RFC 6749 section 5.1)."""
    store = await world.store(refreshers={"github": Script()})
    await store.store_tokens("github", "u1", *OLD, None, extra=extra, account="work")
    call = store.load_fresh_tokens("github", "u1", account="work", scopes=["write", "read"])
    if not missing:
        assert pair(await call or {}) == OLD
        return
    with pytest.raises(InsufficientScopeError) as caught:
        await call
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert (error.missing, error.code) == (missing, "insufficient_scope")
        assert set(error.granted) & set(missing) == set()
        assert (error.provider, error.user_id, error.account) == ("github", "u1", "work")
        assert " ".join(missing) in str(error)


@on_memory
async def test_without_a_scope_in_the_response_the_requested_one_counts(world: World) -> None:
    """The refresher's attribute `scope` tells it. An attribute of another type, as a mock has, does not."""
    script: Any = Script()
    store = await world.store(refreshers={"github": script})
    await store.store_tokens("github", "u1", *OLD, None)
    for scope, missing in (("read", ["write"]), (object(), []), ("write read", []), (["read"], ["write"])):
        script.scope = scope
        if missing:
            with pytest.raises(InsufficientScopeError, match="write"):
                await fresh(store, scopes=["write"])
        else:
            assert pair(await fresh(store, scopes={"write"})) == OLD


@on_every_row
async def test_a_refresh_may_narrow_the_scope(world: World) -> None:
    """The scopes of the token that the call returns count."""
    script = Script({**NEW, "scope": "read"})
    store = await world.store(refreshers={"github": script})
    await store.store_tokens("github", "u1", *OLD, world.at(-1), extra={"scope": "read write"})
    with pytest.raises(InsufficientScopeError):
        await fresh(store, scopes=("write",))
    assert pair(await fresh(store, scopes=("read",))) == NEW_PAIR
    assert script.calls == 1


@pytest.mark.parametrize(
    "needs",
    [
        {"scopes": "read write"},
        {"scopes": ["read write"]},
        {"scopes": [""]},
        {"scopes": ['"']},
        {"scopes": [7]},
        {"scopes": 7},
        {"scopes": None},
        {"min_ttl": -1},
        {"min_ttl": "5"},
        {"min_ttl": None},
        {"force_min_age": 5},
    ],
)
@on_memory
async def test_needs_that_cannot_be_met_are_refused(world: World, needs: dict[str, Any]) -> None:
    store = await world.store()
    await world.expired(store, expires_in=HOUR)
    with pytest.raises(InvalidInputError, match=next(iter(needs))):
        await fresh(store, **needs)


# -- no refresher ----------------------------------------------------------------------------------------


@on_every_row
async def test_a_token_that_does_not_expire_needs_no_refresher(world: World) -> None:
    """Any other call without one is an error that says what to pass, also while the token is still valid."""
    store = await world.store(refreshers={})
    await store.store_tokens("github", "u1", *OLD, None)
    assert pair(await fresh(store, scopes=["read"])) == OLD
    with pytest.raises(ConfigurationError, match="no refresher for provider 'github'"):
        await fresh(store, force=True)
    for expires_in in (HOUR, -1):
        await store.store_tokens("github", "u1", *OLD, world.at(expires_in))
        with pytest.raises(ConfigurationError, match="no refresher for provider 'github'"):
            await fresh(store)
    with pytest.raises(ConfigurationError, match="no refresher for provider 'github'"):
        await store.load_fresh_tokens("github", "nobody")
