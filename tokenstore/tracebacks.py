"""Exceptions without secrets: what may be said of a foreign one, and frames without local variables.

An exception keeps the frames that it went through, and with them their local variables: tokens, keys and URLs with
passwords. Error trackers and rich tracebacks print these variables. So every public function and method clears them in
the frames of tokenstore's own files before an exception leaves it (:func:`clears_locals`). The frames of an
application, for example of a refresher, stay as they are.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, aclosing, suppress
from functools import partial, wraps
from types import FrameType, TracebackType
from typing import Any, Final, Generic, TypeVar, cast

__all__ = [
    "OWN_PACKAGES",
    "ClearedContext",
    "Hidden",
    "clear_locals",
    "clears_locals",
    "described",
    "is_own",
    "module_of",
]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

OWN_PACKAGES: Final = frozenset({"tokenstore", "tokenstore_memory", "tokenstore_sql"})
"""The packages that a tokenstore distribution installs."""

_NAME: Final = re.compile(r"[\w.<>]{1,200}")


def described(error: BaseException, module: str | None = None) -> str:
    """An exception's type and place, without its text: ``httpx.ConnectError at httpx._transports:118, from app:41``.

    Args:
        error: The exception, as it was caught.
        module: Also name the last line of this module that the exception went through, unless it was raised there.
    """
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    lines = [(_name_of(frame), line) for frame, line in _lines(error)]
    text = _safe(name)
    if lines:
        text += f" at {_safe(lines[-1][0])}:{lines[-1][1]}"
        inside = [line for line in lines if line[0] == module]
        if inside and inside[-1] != lines[-1]:
            text += f", from {_safe(inside[-1][0])}:{inside[-1][1]}"
    return text


def is_own(error: BaseException) -> bool:
    """Whether code of tokenstore raised the exception."""
    frames = [frame for frame, _ in _lines(error)]
    return bool(frames) and _is_ours(frames[-1])


def module_of(function: object) -> str | None:
    """The module in which a callable, or the class of a callable object, is defined."""
    while isinstance(function, partial):
        function = function.func
    module: object = getattr(function, "__module__", None)
    return module if isinstance(module, str) else None


def clear_locals(error: BaseException) -> None:
    """Clear the local variables of tokenstore's own frames in an exception's tracebacks, and those it chains.

    A frame that is still running keeps its variables.
    """
    chain = [error]
    for link in chain:  # the loop appends to this list
        following = (link.__cause__, link.__context__, *getattr(link, "exceptions", ()))
        chain += [one for one in following if one is not None and all(one is not known for known in chain)]
        for frame, _ in _lines(link):
            if _is_ours(frame):
                with suppress(RuntimeError):  # it is still running
                    frame.clear()


def clears_locals(function: F) -> F:
    """Decorate a function so that its exceptions show no local variable of it, nor of tokenstore's functions below it.

    It may be a coroutine function, or an asynchronous generator function. The decorator's own frame, which stays in the
    traceback, forgets the arguments.
    """
    if inspect.isasyncgenfunction(function):

        @wraps(function)
        async def generator(*args: Any, **kwargs: Any) -> Any:
            item: Any = None
            try:
                async with aclosing(function(*args, **kwargs)) as items:
                    del args, kwargs
                    async for item in items:
                        yield item
            except BaseException as error:
                clear_locals(error)
                raise
            finally:
                del item

        return cast(F, generator)

    if inspect.iscoroutinefunction(function):

        @wraps(function)
        async def coroutine(*args: Any, **kwargs: Any) -> Any:
            try:
                return await function(*args, **kwargs)
            except BaseException as error:
                clear_locals(error)
                raise
            finally:
                del args, kwargs

        return cast(F, coroutine)

    @wraps(function)
    def plain(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            clear_locals(error)
            raise
        finally:
            del args, kwargs

    return cast(F, plain)


class ClearedContext(AbstractAsyncContextManager[T]):
    """A context manager around another one, of whose frames an exception shows no local variable.

    Args:
        inner: The other one.
    """

    def __init__(self, inner: AbstractAsyncContextManager[T]) -> None:
        self._inner = inner

    @clears_locals
    async def __aenter__(self) -> T:
        return await self._inner.__aenter__()

    @clears_locals
    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return await self._inner.__aexit__(exc_type, exc, traceback)


class Hidden(Generic[T]):
    """Holds a secret that an object needs. Neither its ``repr`` nor its attributes show it.

    Args:
        value: The secret.
    """

    __slots__ = ("reveal",)

    def __init__(self, value: T) -> None:
        self.reveal: Callable[[], T] = lambda: value

    def __repr__(self) -> str:
        return "<hidden>"

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.reveal(),)  # a pickle has the secret, as it has to


def _is_ours(frame: FrameType) -> bool:
    return _name_of(frame).partition(".")[0] in OWN_PACKAGES


def _lines(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """The frames that an exception went through, the one that raised it last, and the line in each of them."""
    place = error.__traceback__
    while place is not None:
        yield place.tb_frame, place.tb_lineno
        place = place.tb_next


def _name_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "?"))


def _safe(name: str) -> str:
    """A name made by code may be any text, and contain a secret."""
    return name if _NAME.fullmatch(name) else "?"
