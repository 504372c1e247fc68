"""A valid token takes one read; calls with wrong arguments, or that cannot refresh, are refused."""

from __future__ import annotations

from collections.abc import Awaitable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from support.database import Place, app_engine
from support.refresh_world import World, on_memory, on_rows
from support.refreshers import OLD, Refresher, Script, pair
from support.store_calls import fresh
from tokenstore import (
    AuthTokenStore,
    ConfigurationError,
    InvalidInputError,
    StoreClosedError,
    TokensMissingError,
    UnsupportedOperationError,
)

HOUR = 3600.0


@on_memory
async def test_a_valid_token_takes_one_read(world: World) -> None:
    """There is no lock, no lease and no call of the provider; the same is true without a row."""
    script = Script()
    store, interceptor = await world.intercepted(script)
    await world.expired(store, expires_in=HOUR)
    interceptor.calls.clear()
    assert pair(await fresh(store)) == OLD
    assert await store.load_fresh_tokens("github", "nobody") is None
    assert await store.load_fresh_tokens("github", "nobody", refresh=script, force=True) is None
    assert not await store.revoke_tokens("github", "nobody", refresher=Refresher(world.provider))
    assert interceptor.calls == {"get": 4}
    assert script.calls == 0


@on_memory
@pytest.mark.parametrize("force", [False, True])
async def test_a_missing_row_is_an_error_if_the_caller_asks_for_one(world: World, force: bool) -> None:
    """The error names the row. So does that of a row which is deleted while its refresh is under way."""
    script = Script()
    store = await world.store(refreshers={"github": script})
    await world.expired(store, expires_in=HOUR)
    assert (await store.load_fresh_tokens("github", "u1", missing="raise"))["access_token"] == OLD[0]
    with pytest.raises(TokensMissingError, match=r"user 'nobody', account 'work': no tokens are stored") as caught:
        await store.load_fresh_tokens("github", "nobody", account="work", force=force, missing="raise")
    error = caught.value
    assert (error.code, error.provider, error.user_id, error.account) == ("tokens_missing", "github", "nobody", "work")
    assert script.calls == 0
    with pytest.raises(InvalidInputError, match="missing must be"):
        await store.load_fresh_tokens("github", "u1", missing="error")  # type: ignore[call-overload]


@on_memory
async def test_a_call_without_a_refresher_is_an_error_while_the_token_is_valid(world: World) -> None:
    """The error comes at once, not only when the token has expired."""
    store, interceptor = await world.intercepted()
    store = await world.store(interceptor, refreshers={})
    await world.expired(store, expires_in=HOUR)
    interceptor.calls.clear()
    for call in (
        store.load_fresh_tokens("github", "u1"),
        store.load_fresh_tokens("github", "nobody", force=True),
        anext(store.refresh_due(within=60, provider="github")),
        store.revoke_tokens("github", "u1"),
    ):
        with pytest.raises(ConfigurationError, match="'github'"):
            await call
    assert interceptor.calls == {"get": 1}  # a token that never expires would need no refresher


@on_memory
async def test_arguments_are_checked(world: World) -> None:
    """Wrong arguments are refused before a row is read or written and before the provider is called."""
    script: Any = Script()
    store, interceptor = await world.intercepted(script)
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
    assert not interceptor.calls
    assert script.calls == 0
    settings: list[dict[str, Any]] = [{"refresh_margin": -1}, {"refresh_timeout": 0}, {"refresh_timeout": float("inf")}]
    for wrong in settings:
        with pytest.raises(InvalidInputError):
            AuthTokenStore(backend=interceptor, keyring=world.keyring, **wrong)


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
    """A session ends with its caller, but a refresh may last longer."""
    async with app_engine(Place(world.row, world.url)) as engine, AsyncSession(engine) as session:
        store = AuthTokenStore(session, keyring=world.keyring, refreshers={"github": Script()})
        for call in (
            store.load_fresh_tokens("github", "u1"),
            anext(store.refresh_due(within=60)),
            store.revoke_tokens("github", "u1"),
        ):
            with pytest.raises(UnsupportedOperationError, match="open_store"):
                await call
