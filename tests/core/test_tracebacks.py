"""Exceptions that leave tokenstore keep no local variable of its frames."""

from __future__ import annotations

import asyncio
import copy
import inspect
import pickle
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import FunctionType
from typing import Any

import pytest

from tokenstore import AuthTokenStore, InvalidInputError, Keyring, Transaction, open_store
from tokenstore.integrations.oauth2 import OAuth2Refresher
from tokenstore.tracebacks import ClearedContext, Hidden, clears_locals

SECRET = "gho_secret"
# They get no secret, raise nothing, or return a ClearedContext.
PLAIN = {"transaction", "seal", "open", "sealed_by"}


def _functions(kind: type) -> dict[str, FunctionType]:
    """The public functions of a class and its bases, and its constructor."""
    found = {}
    for one in kind.__mro__[:-1]:
        for name, value in vars(one).items():
            function = getattr(value, "__func__", value)  # of a class method
            if isinstance(function, FunctionType) and (not name.startswith("_") or name in ("__init__", "__call__")):
                found[f"{one.__name__}.{name}"] = function
    return found


@pytest.mark.parametrize("kind", [AuthTokenStore, Transaction, Keyring, OAuth2Refresher])
def test_every_public_method_clears_its_frames(kind: type) -> None:
    """A new one has to be decorated, too."""
    plain = {name for name, function in _functions(kind).items() if not hasattr(function, "__wrapped__")}
    assert {name.partition(".")[2] for name in plain - {"Transaction.__init__"}} <= PLAIN
    assert hasattr(open_store, "__wrapped__")


def _variables(error: BaseException, function: str) -> list[dict[str, Any]]:
    """The local variables of a function's frames in an error's traceback."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return [dict(frame.f_locals) for frame in frames if frame.f_code.co_name == function]


class _Broken(dict[str, Any]):
    def __contains__(self, name: object) -> bool:
        mine = SECRET
        return bool(mine) and bool(1 / 0)


def test_frames_of_an_application_keep_their_variables(keyring: Keyring) -> None:
    """Its own mistakes are to be found."""
    store = open_store("memory://", keyring=keyring)
    with pytest.raises(ZeroDivisionError) as caught:
        store.is_access_token_valid(_Broken())
    [inside] = _variables(caught.value, "__contains__")
    assert inside["mine"] == SECRET
    assert _variables(caught.value, "_field") == [{}]


def _made(kind: str) -> Callable[[str], Any]:
    """A function of the package's, as far as the decorator can tell, which raises with its argument in a variable."""
    source = {
        "function": "def work(secret):\n    raise ValueError",
        "coroutine": "async def work(secret):\n    raise ValueError",
        "generator": "async def work(secret):\n    yield secret\n    raise ValueError",
    }[kind]
    namespace: dict[str, Any] = {"__name__": "tokenstore.made_by_a_test"}
    exec(source, namespace)
    work: Callable[[str], Any] = clears_locals(namespace["work"])
    return work


@pytest.mark.parametrize("kind", ["function", "coroutine", "generator"])
def test_a_decorated_function_shows_no_variable(kind: str) -> None:
    """Neither its own frame nor the decorator's has the argument; what kind of function it is does not change."""
    work = _made(kind)
    assert inspect.iscoroutinefunction(work) is (kind == "coroutine")
    assert inspect.isasyncgenfunction(work) is (kind == "generator")
    assert list(inspect.signature(work).parameters) == ["secret"]

    async def main() -> None:
        if kind == "generator":
            assert [item async for item in work(SECRET)] == []
        else:
            await work(SECRET)

    with pytest.raises(ValueError, match=r"^$") as caught:
        asyncio.run(main())
    assert _variables(caught.value, "work") == [{}]
    [decorator] = _variables(caught.value, "plain" if kind == "function" else kind)
    assert SECRET not in repr(decorator)


def test_a_context_manager_shows_no_variable() -> None:
    """What the block raised itself is raised as it is."""

    @asynccontextmanager
    async def context() -> AsyncIterator[str]:
        secret = SECRET
        try:
            yield secret
        except KeyError:
            raise InvalidInputError("in place of the block's") from None

    async def main(error: Exception) -> None:
        async with ClearedContext(context()) as found:
            assert found == SECRET
            raise error

    for raised, expected in ((ZeroDivisionError(), ZeroDivisionError), (KeyError(), InvalidInputError)):
        with pytest.raises(expected) as caught:
            asyncio.run(main(raised))
        decorators = _variables(caught.value, "coroutine")
        # The block's own error does not go through the decorator's frame.
        assert bool(decorators) is (expected is InvalidInputError)
        assert SECRET not in repr(decorators)


def test_a_hidden_value_is_shown_by_nothing() -> None:
    hidden = Hidden(SECRET)
    assert hidden.reveal() == SECRET
    assert pickle.loads(pickle.dumps(hidden)).reveal() == copy.deepcopy(hidden).reveal() == SECRET
    assert SECRET not in f"{hidden!r}{hidden}{[getattr(hidden, name) for name in hidden.__slots__]}"
