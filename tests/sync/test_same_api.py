"""The synchronous store has the methods of the async one, with the same arguments, defaults and results."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any

import pytest

import tokenstore
from tokenstore import sync

# Names that only the synchronous store has, and the other way round.
_ASYNC_NAMES = {"aclose": "close", "__aenter__": "__enter__", "__aexit__": "__exit__"}
_OWN_NAMES = {"aio", "run"}
_OVERLOADED = {"list_tokens", "store_tokens", "load_fresh_tokens", "is_refresh_token_valid"}


def _names(kind: type) -> set[str]:
    public = {name for name in dir(kind) if not name.startswith("_")}
    return public | {name for name in ("__aenter__", "__aexit__", "__enter__", "__exit__") if hasattr(kind, name)}


def _as_sync(annotation: str) -> str:
    """The annotation that a synchronous function has in place of an async one's."""
    for before, after in (
        ("AsyncIterator[", "Iterator["),
        ("AbstractAsyncContextManager[", "AbstractContextManager["),
    ):
        annotation = annotation.replace(before, after)
    if annotation.startswith("AsyncGenerator["):
        annotation = annotation.replace("AsyncGenerator[", "Generator[").replace(", None]", ", None, None]")
    return annotation


def _described(function: Callable[..., Any]) -> tuple[list[Any], str]:
    signature = inspect.signature(function)
    parameters = [(one.name, one.kind, one.default, one.annotation) for one in signature.parameters.values()]
    return parameters, _as_sync(signature.return_annotation)


def _pairs(async_kind: type, sync_kind: type) -> list[Any]:
    return [
        pytest.param(getattr(async_kind, name), getattr(sync_kind, _ASYNC_NAMES.get(name, name)), id=name)
        for name in sorted(_names(async_kind))
    ]


@pytest.mark.parametrize(
    ("async_kind", "sync_kind"),
    [(tokenstore.AuthTokenStore, sync.AuthTokenStore), (tokenstore.Transaction, sync.Transaction)],
    ids=["store", "transaction"],
)
def test_both_have_the_same_methods(async_kind: type, sync_kind: type) -> None:
    expected = {_ASYNC_NAMES.get(name, name) for name in _names(async_kind)}
    assert _names(sync_kind) - _OWN_NAMES == expected


@pytest.mark.parametrize(
    ("async_function", "sync_function"),
    [
        *_pairs(tokenstore.AuthTokenStore, sync.AuthTokenStore),
        *_pairs(tokenstore.Transaction, sync.Transaction),
        pytest.param(tokenstore.open_store, sync.open_store, id="open_store"),
    ],
)
def test_both_have_the_same_arguments_defaults_and_results(
    async_function: Callable[..., Any], sync_function: Callable[..., Any]
) -> None:
    assert not inspect.iscoroutinefunction(sync_function)
    assert _described(sync_function) == _described(async_function)
    overloads = [_described(one) for one in typing.get_overloads(async_function)]
    assert [_described(one) for one in typing.get_overloads(sync_function)] == overloads
    assert len(overloads) == (2 if sync_function.__name__ in _OVERLOADED else 0)
