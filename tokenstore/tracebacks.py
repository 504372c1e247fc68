"""What may be said of an exception whose text may contain a secret: its type, and the lines of code it went through."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from types import FrameType
from typing import Final

__all__ = ["OWN_PACKAGES", "described", "is_own", "module_of"]

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
    modules = [_name_of(frame) for frame, _ in _lines(error)]
    return bool(modules) and modules[-1].partition(".")[0] in OWN_PACKAGES


def module_of(function: object) -> str | None:
    """The module in which a callable, or the class of a callable object, is defined."""
    while isinstance(function, partial):
        function = function.func
    module: object = getattr(function, "__module__", None)
    return module if isinstance(module, str) else None


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
