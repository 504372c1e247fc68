"""New tokens that no later try can write, because they are too large for the database."""

from __future__ import annotations

import pytest

from support.interceptor import failing
from support.refresh_world import World, on_memory
from support.refreshers import NEW_PAIR, Script, pair
from support.store_calls import fresh
from tokenstore import RowTooLargeError, TokensNotStoredError


@on_memory
async def test_tokens_that_are_too_large_are_handed_over_after_one_try(world: World) -> None:
    """More time does not help. The store goes on trying, in case the database's limit is raised."""
    store, interceptor = await world.intercepted(Script())
    await world.expired(store)
    interceptor.before["complete_lease"] = failing(error=RowTooLargeError("too large"))
    with pytest.raises(TokensNotStoredError) as caught:
        await fresh(store)
    assert pair(caught.value.record) == NEW_PAIR
    assert interceptor.calls["complete_lease"] == 1
    del interceptor.before["complete_lease"]
    assert pair(await world.until_saved(store)) == NEW_PAIR
