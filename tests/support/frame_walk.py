"""Looks for secrets in what an error keeps alive: the local variables of the frames in its tracebacks.

Error trackers and rich tracebacks print these variables.
"""

from __future__ import annotations

import asyncio
import base64
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import BuiltinFunctionType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any
from urllib.parse import quote, quote_plus

from support.source_files import PACKAGES
from tokenstore import TokensNotStoredError

_DEPTH = 7
_OURS = tuple(str(Path(str(package.__file__)).parent) for package in PACKAGES)
_OPAQUE = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, FrameType, asyncio.AbstractEventLoop)


def forms(secret: str | bytes) -> set[str]:
    """The forms in which a repr or a request may hold a secret."""
    data = secret.encode() if isinstance(secret, str) else secret
    found = {repr(data)[2:-1], data.hex(), base64.b64encode(data).decode(), base64.urlsafe_b64encode(data).decode()}
    if isinstance(secret, str):
        found |= {secret, repr(secret)[1:-1], quote(secret, safe=""), quote_plus(secret)}
    return {form.rstrip("=") for form in found}


@dataclass
class Walk:
    """Error paths, walked one after the other.

    Attributes:
        secrets: What no error may hold.
        paths: The names of the error paths walked.
    """

    secrets: Iterable[str | bytes]
    paths: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._forms = set().union(*map(forms, self.secrets))

    def look_for(self, *secrets: str | bytes) -> None:
        """Look for these, too."""
        self._forms.update(*map(forms, secrets))

    def through(self, error: BaseException, path: str, *, frames_alone: bool = False) -> None:
        """Walk through one error; AssertionError says in which variable a secret is.

        Args:
            error: The error.
            path: How it came about.
            frames_alone: Whether the error itself may hold secrets, because it is an application's.
        """
        self.paths.append(f"{path}: {type(error).__name__}")
        found = list(dict.fromkeys(self._leaks(error, frames_alone)))
        assert not found, f"{self.paths[-1]}: {found}"

    def call(self, path: str, function: Callable[..., object], *arguments: Any, **keywords: Any) -> None:
        """Walk through the error of a call."""
        try:
            function(*arguments, **keywords)
        except Exception as error:  # noqa: BLE001 - whatever it is
            self.through(error, path)
        else:
            raise AssertionError(f"{path}: no error")

    async def wait(self, path: str, call: Awaitable[object]) -> None:
        """Walk through the error of an awaitable."""
        try:
            await call
        except Exception as error:  # noqa: BLE001 - whatever it is
            self.through(error, path)
        else:
            raise AssertionError(f"{path}: no error")

    def _leaks(self, error: BaseException, frames_alone: bool) -> Iterator[str]:
        chain = [error]
        for link in chain:
            following = (link.__cause__, link.__context__, *getattr(link, "exceptions", ()))
            chain += [one for one in following if one is not None and all(one is not other for other in chain)]
            for frame, line in traceback.walk_tb(link.__traceback__):
                if frame.f_code.co_filename.startswith(_OURS):
                    for name, value in frame.f_locals.items():
                        where = f"{name} of {frame.f_code.co_qualname}:{line}"
                        yield from self._in(value, where, _DEPTH, set())
            if not frames_alone:
                yield from self._in(link, "the error", _DEPTH, set())

    def _in(self, value: object, where: str, depth: int, seen: set[int]) -> Iterator[str]:
        if id(value) in seen or isinstance(value, _OPAQUE):
            return
        seen.add(id(value))
        with suppress(Exception):  # not each repr works
            text = repr(value)
            if isinstance(value, BaseException):
                text += str(value)
            if any(form in text for form in self._forms):
                yield where
        if depth:
            for name, inner in _parts(value):
                yield from self._in(inner, f"{where}.{name}", depth - 1, seen)


def _parts(value: object) -> Iterator[tuple[str, object]]:
    """What is inside of a value, whatever its repr hides."""
    if isinstance(value, Mapping):
        yield from ((str(type(name)), name) for name in list(value))
        yield from ((repr(name), inner) for name, inner in list(value.items()))
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((str(at), inner) for at, inner in enumerate(list(value)))
    if isinstance(value, BaseException):
        yield "args", value.args
    attributes = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            with suppress(AttributeError):
                attributes[slot] = getattr(value, slot)
    if isinstance(value, TokensNotStoredError):
        del attributes["records"]  # documented: the only copies of new tokens
    yield from attributes.items()
