"""Several columns read as one, for a driver that takes long for each column.

The values are separated by NUL. A number is its digits, and a text of the primary key is itself. Any other text has a
mark before it, so that no text is like NULL, which is nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from sqlalchemy import ColumnElement, LargeBinary, TypeDecorator, func, literal_column

__all__ = ["packed", "unpacking"]

# Binary literals, because a session's settings decide the character set of others, and whether '' is NULL.
_SEPARATOR: Final[ColumnElement[bytes]] = literal_column("x'00'")
_MARK: Final[ColumnElement[bytes]] = literal_column("x'3D'")
_NOTHING: Final[ColumnElement[bytes]] = literal_column("x''")
# No UTF-8 text has this byte. It replaces a separator in a text, which no store writes there: so the core refuses the
# text, and the columns behind it keep their places.
_REPLACEMENT: Final[ColumnElement[bytes]] = literal_column("x'FF'")


def packed(
    key: Sequence[ColumnElement[Any]], texts: Sequence[ColumnElement[Any]], numbers: Sequence[ColumnElement[Any]]
) -> ColumnElement[Any]:
    """One column whose values are returned as sequences of the values of several columns.

    Args:
        key: The columns of the primary key. A row is found by a key that holds no NUL.
        texts: Other columns of text.
        numbers: Columns of whole numbers.
    """
    values = [
        *key,
        *(_or_nothing(func.concat(_MARK, func.replace(text, _SEPARATOR, _REPLACEMENT))) for text in texts),
        *map(_or_nothing, numbers),
    ]
    return func.concat_ws(_SEPARATOR, *values, type_=_Packed(len(key), len(texts), len(numbers)))


def _or_nothing(value: ColumnElement[Any]) -> ColumnElement[Any]:
    return func.ifnull(value, _NOTHING)


class _Packed(TypeDecorator[Sequence[Any]]):
    """The type of such a column; the arguments are the numbers of columns."""

    impl = LargeBinary
    cache_ok = True

    def __init__(self, key: int, texts: int, numbers: int) -> None:
        super().__init__()
        self.key, self.texts, self.numbers = key, texts, numbers

    # As for Utf8Binary.
    def result_processor(self, dialect: Any, coltype: object) -> Any:
        return unpacking(self.key, self.texts, self.numbers)


def unpacking(key: int, texts: int, numbers: int) -> Callable[[object], Sequence[object]]:
    """A function from a packed value to the values of so many columns.

    It raises nothing. Any bytes can arrive, because a user who can write to the table can alter it, and they must not
    end a query for several rows. Where there is no value, the function returns one that the core refuses.
    """
    first_number = key + texts
    size = first_number + numbers

    def unpack(value: object) -> Sequence[object]:
        fields = value.decode(errors="surrogateescape").split("\0") if isinstance(value, bytes) else []
        if len(fields) != size:
            # A column of numbers was altered to another type. The key, at the front, still says which row this is.
            fields += [""] * key
            return [*fields[:key], *[None] * texts, *[""] * numbers]
        found: list[Any] = fields[:key]
        found += [field[1:] if field else None for field in fields[key:first_number]]
        try:
            found += [int(field) if field else None for field in fields[first_number:]]
        except ValueError:
            found += map(_number, fields[first_number:])
        return found

    return unpack


def _number(digits: str) -> int | str | None:
    try:
        return int(digits) if digits else None
    except ValueError:
        return digits
