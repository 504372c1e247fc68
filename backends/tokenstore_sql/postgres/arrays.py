"""Parameters that are arrays, in PostgreSQL's binary format on both drivers.

asyncpg sends every parameter in the binary format. psycopg sends a list as text, and settings of the server change what
that text means: with ``standard_conforming_strings = off`` psycopg doubles the backslashes of binary values, and with
``array_nulls = off`` the server reads NULL as a word. Both would store other bytes than those that were sealed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from struct import pack
from typing import Any, Final

from sqlalchemy import ARRAY, BigInteger, Dialect, LargeBinary, TypeDecorator
from sqlalchemy.types import TypeEngine

__all__ = ["Array", "register_arrays"]


class _TextArray(list[Any]):
    """An array of TEXT."""


class _ByteaArray(list[Any]):
    """An array of BYTEA."""


class _BigintArray(list[Any]):
    """An array of BIGINT."""


def _bigint(value: int) -> bytes:
    return value.to_bytes(8, "big", signed=True)


# From a class of lists to the number of its type on the server, the number of its elements' type, and what encodes an
# element. These numbers are the same on every server.
_ARRAYS: Final[dict[type[list[Any]], tuple[int, int, Callable[[Any], bytes]]]] = {
    _TextArray: (1009, 25, str.encode),
    _ByteaArray: (1001, 17, bytes),
    _BigintArray: (1016, 20, _bigint),
}


class Array(TypeDecorator[list[Any]]):
    """An array of TEXT, BYTEA or BIGINT. On psycopg the connection must know :func:`register_arrays`.

    Args:
        element: The elements' type.
    """

    impl = ARRAY
    cache_ok = True

    def __init__(self, element: TypeEngine[Any]) -> None:
        super().__init__(element)
        self.element = element  # part of the key under which SQLAlchemy keeps compiled statements
        if isinstance(element, LargeBinary):
            self._array: type[list[Any]] = _ByteaArray
        else:
            self._array = _BigintArray if isinstance(element, BigInteger) else _TextArray

    # Not process_bind_param, for which SQLAlchemy makes three calls in place of one.
    def bind_processor(self, dialect: Dialect) -> Any:
        return {"psycopg": self._array}.get(dialect.driver)


def register_arrays(driver: Any) -> None:
    """Teach a connection of psycopg to send these arrays. An application's own lists stay as they are."""
    for cls, dumper in _dumpers().items():
        driver.adapters.register_dumper(cls, dumper)


@cache
def _dumpers() -> dict[type[list[Any]], Any]:
    from psycopg.adapt import Dumper
    from psycopg.pq import Format

    return {
        cls: type(
            f"{cls.__name__}Dumper",
            (Dumper,),
            {"format": Format.BINARY, "oid": number, "dump": _dump(element, encode)},
        )
        for cls, (number, element, encode) in _ARRAYS.items()
    }


def _dump(element: int, encode: Callable[[Any], bytes]) -> Callable[[Any, list[Any]], bytes]:
    def dump(_: Any, values: list[Any]) -> bytes:
        # One dimension, whether there is a NULL, the type of the elements, how many, and the first one's index.
        parts = [pack("!iiIii", 1, None in values, element, len(values), 1)]
        for value in values:
            if value is None:
                parts.append(b"\xff\xff\xff\xff")
            else:
                encoded = encode(value)
                parts += (pack("!i", len(encoded)), encoded)
        return b"".join(parts)

    return dump
