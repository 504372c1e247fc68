"""The types of the values that a store keeps beside tokens: keys, sealed values and rows.

A value's key is a namespace and a name, as the public methods call them. The core's code calls the first part *group*,
because its word *namespace* is the store's own: that of ``open_store(namespace=…)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple, TypedDict

__all__ = [
    "MAX_VALUE_BYTES",
    "MAX_VALUE_GROUP_BYTES",
    "MAX_VALUE_NAME_BYTES",
    "ScannedValue",
    "SealedValue",
    "ValueEntry",
    "ValueKey",
    "ValueRow",
]

MAX_VALUE_GROUP_BYTES: Final = 255
"""The longest namespace of a value, in UTF-8 bytes."""

MAX_VALUE_NAME_BYTES: Final = 512
"""The longest name of a value, in UTF-8 bytes."""

MAX_VALUE_BYTES: Final = 256 * 1024
"""The longest JSON form of a value, in bytes."""


class ValueKey(NamedTuple):
    """The identity of a value. Compared byte for byte as UTF-8: no case folding, no normalising, no trimming.

    The group has at most 255 bytes, the name 512; neither contains a NUL.

    Attributes:
        group: What the public methods call the value's namespace.
        name: The value's name in it.
    """

    group: str
    name: str

    def __str__(self) -> str:
        return f"namespace {self.group!r}, name {self.name!r}"


@dataclass(slots=True, unsafe_hash=True, repr=False)
class SealedValue:
    """One write of a value as a backend sees it.

    Attributes:
        sealed: The sealed JSON.
        key_id: The name of the key that sealed it.
    """

    sealed: bytes
    key_id: str

    def __repr__(self) -> str:
        return f"<SealedValue key_id={self.key_id!r}>"


@dataclass(slots=True, unsafe_hash=True)
class ValueRow:
    """One stored value as a backend returns it.

    Attributes:
        key: The value's group and name.
        value: The sealed value.
        expires_at: Microseconds since the epoch, by the database's clock, or None for "never".
        version: A number that every write of the value replaces, and resealing does not.
        created_at: When the value was first stored, in microseconds since the epoch, by the database's clock. A value
            that is put after an earlier one has expired is a new one.
        updated_at: When the value was last put, in microseconds since the epoch, by the database's clock.
    """

    key: ValueKey
    value: SealedValue
    expires_at: int | None
    version: int
    created_at: int
    updated_at: int


@dataclass(slots=True, unsafe_hash=True)
class ScannedValue:
    """One stored value without its sealed bytes; the fields are those of :class:`ValueRow`."""

    key: ValueKey
    expires_at: int | None
    key_id: str
    created_at: int
    updated_at: int


class ValueEntry(TypedDict):
    """A value as ``list_values`` shows it: everything but the sealed value, which is neither read nor opened."""

    namespace: str
    name: str
    expires_at: datetime | None
    key_id: str
    created_at: datetime
    updated_at: datetime
