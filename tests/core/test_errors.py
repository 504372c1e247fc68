"""The tree of error classes."""

from __future__ import annotations

import copy
import importlib
import inspect
import multiprocessing
import pickle
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

import tokenstore
import tokenstore.errors
from support.source_files import MODULES
from support.unstored_tokens import RECORD, fail_to_store
from tokenstore import TokenRecord, TokensNotStoredError

ARGUMENTS: dict[str, Any] = {
    "message": "what happened",
    "code": "some_code",
    "key_id": "k1",
    "records": [RECORD, RECORD],
    "retry_after": 5.0,
    "orig": ValueError("a driver's"),
    "status": 503,
    "error": "server_error",
    "description": "what happened",
    "headers": {"Allow": "GET"},
    "kind": "stale read",
    "operations": [],
    "missing": ["write"],
    "granted": ["read"],
}
"""For each parameter of an error's constructor, an argument."""


def test_the_tree_in_the_docstring_matches_the_error_classes() -> None:
    """The tree in the docstring of ``errors`` is the tree of classes, and the package exports all of them."""
    drawn = re.findall(
        r"(\w+Error)\b", str(tokenstore.errors.__doc__).partition("::")[2].partition("\n\nNo message")[0]
    )
    assert set(tokenstore.errors.__all__) <= set(drawn)
    for name in tokenstore.errors.__all__:
        error = getattr(tokenstore.errors, name)
        assert issubclass(error, tokenstore.TokenStoreError)
        assert getattr(tokenstore, name) is error


def _error_classes() -> list[type[BaseException]]:
    """Every public exception of the packages; the private ones leave no process."""
    for name in MODULES:
        importlib.import_module(name)

    def below(kind: type[BaseException]) -> Iterator[type[BaseException]]:
        for child in kind.__subclasses__():
            yield child
            yield from below(child)

    found = {kind for kind in below(BaseException) if kind.__module__ in MODULES and not kind.__name__.startswith("_")}
    return sorted(found, key=lambda kind: kind.__qualname__)


def _made(kind: type[BaseException]) -> BaseException:
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    named = {one.name: ARGUMENTS[one.name] for one in parameters if one.kind is one.KEYWORD_ONLY}
    positional = [ARGUMENTS[one.name] for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
    return kind(*(positional or ["what happened"]), **named)


@pytest.mark.parametrize("kind", _error_classes(), ids=lambda kind: kind.__name__)
def test_every_error_pickles(kind: type[BaseException]) -> None:
    """And can be copied: the type, the message and all attributes stay."""
    error = _made(kind)
    error.add_note("a note")
    vars(error).update({"provider": "github", "user_id": "u1"} if hasattr(error, "provider") else {})
    copies = [pickle.loads(pickle.dumps(error, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for one in (*copies, copy.copy(error), copy.deepcopy(error)):
        assert type(one) is kind
        assert str(one) == str(error)
        assert repr(one.args) == repr(error.args)
        assert getattr(one, "msg", None) == getattr(error, "msg", None), "ImportError's own"
        assert repr(vars(one)) == repr(vars(error))
        assert vars(one).keys() == vars(error).keys()


def test_an_error_of_an_application_pickles() -> None:
    """An error keeps its type, message and attributes, whatever arguments its constructor takes."""
    error = _OfAnApplication(7)
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), str(found), found.number) == (_OfAnApplication, "number 7", 7)


class _OfAnApplication(tokenstore.ProviderRefusedError):
    def __init__(self, number: int) -> None:
        super().__init__(f"number {number}", code="own")
        self.number = number


def test_a_process_pool_hands_over_tokens_that_could_not_be_stored() -> None:
    """They are the only copy."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool, pytest.raises(TokensNotStoredError) as caught:
        pool.submit(fail_to_store).result()
    assert caught.value.records == (RECORD, RECORD)
    assert type(caught.value.record) is TokenRecord
    assert caught.value.record["refresh_token"] == "rt"
    assert (caught.value.code, caught.value.provider) == ("not_stored", "github")
