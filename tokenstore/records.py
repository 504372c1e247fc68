"""The types of what is stored: row keys, sealed rows and opened records."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeGuard, overload

__all__ = [
    "CLOCK_SKEW",
    "EMPTY_ROW_LIFETIME",
    "EPOCH",
    "MAX_ACCOUNT_BYTES",
    "MAX_EXTRA_DEPTH",
    "MAX_GENERATION",
    "MAX_NAMESPACE_BYTES",
    "MAX_PROVIDER_BYTES",
    "MAX_TOKEN_BYTES",
    "MAX_USER_ID_BYTES",
    "MICROSECOND",
    "NO_METADATA",
    "DueKey",
    "DueRow",
    "Failure",
    "MigrationResult",
    "RedactedDict",
    "RefreshableRecord",
    "ScannedRow",
    "SealedMetadata",
    "SealedRecord",
    "SealedTokens",
    "TokenKey",
    "TokenRecord",
    "empty_tokens",
    "from_epoch_us",
    "has_failed",
    "is_leased",
    "new_generation",
    "optional_datetime",
]

MAX_PROVIDER_BYTES = 255
"""The longest provider name, in UTF-8 bytes."""

MAX_USER_ID_BYTES = 512
"""The longest user id, in UTF-8 bytes."""

MAX_ACCOUNT_BYTES = 255
"""The longest account name, in UTF-8 bytes. It may be empty."""

MAX_NAMESPACE_BYTES = 255
"""The longest name of a store's namespace, in UTF-8 bytes. It may be empty."""

MAX_TOKEN_BYTES = 256 * 1024
"""The longest token, and the longest JSON form of ``extra`` and of ``metadata``, in UTF-8 bytes."""

MAX_EXTRA_DEPTH: Final = 32
"""The most levels of objects and arrays in ``extra`` and ``metadata``, which are the first level themselves.

Deeper values break recursions.
"""

MAX_GENERATION: Final = 2**62
"""No row reaches this generation. A row that has it was altered, and its next generations could end the column."""

CLOCK_SKEW: Final = 60.0
"""How long before its expiry an access token counts as expired, in seconds."""

EMPTY_ROW_LIFETIME: Final = 86_400.0
"""How long an empty row is kept, in seconds; then the next sweep deletes it."""

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
"""The zero of all stored times."""

MICROSECOND: Final = timedelta(microseconds=1)
"""The unit of all stored times."""


class TokenKey(NamedTuple):
    """The identity of a row. Compared byte for byte as UTF-8: no case folding, no normalising, no trimming.

    The account tells several accounts of one user at one provider apart; it is empty for a user who has one. A provider
    has at most 255 bytes, a user id 512, an account 255; no part contains a NUL.
    """

    provider: str
    user_id: str
    account: str = ""

    def __str__(self) -> str:
        account = f", account {self.account!r}" if self.account else ""
        return f"provider {self.provider!r}, user {self.user_id!r}{account}"


# No code assigns to a field of the next five classes, because several callers may share one object. The classes are not
# frozen: creating a frozen object takes three times as long, and backends create some for each read.


@dataclass(slots=True, unsafe_hash=True)
class Failure:
    """Why the last refresh of this generation failed.

    Attributes:
        code: The OAuth error code (RFC 6749 section 5.2) or another short name; at most 64 ASCII characters. After
            ``refused/`` it is one for which the provider refuses the client.
        retry_in: Seconds until a refresh may be tried again, by the database's clock. None: no refresh is tried until
            new tokens are stored.
    """

    code: str
    retry_in: float | None = None


@dataclass(slots=True, unsafe_hash=True, repr=False)
class SealedTokens:
    """One write as a backend sees it: sealed bytes, and the plain columns beside them.

    An *empty* row has no tokens yet, and no key: ``key_id`` and ``access_token`` are empty, and ``refresh_token`` and
    ``extra`` are None. It is there to be leased while the provider issues its first tokens.

    A sealed value has at most :data:`MAX_TOKEN_BYTES` and 62 more bytes.

    Attributes:
        access_token: The sealed access token.
        refresh_token: The sealed refresh token, or None where none was issued.
        extra: The sealed JSON of further response fields, or None.
        access_token_expires_at: Microseconds since the epoch, or None: no known expiry.
        refresh_token_expires_at: Microseconds since the epoch, or None: no known expiry.
        key_id: The name of the key that sealed every field of this write: at most 32 ASCII characters.
        access_token_expiry_known: Whether it is known when the access token expires. If it is, an
            ``access_token_expires_at`` of None means "never".
        issued: Whether the provider issues such tokens without a refresh token, again and again. Only for the write: a
            row that was read always says False. So store :attr:`due_at` with the row, which depends on it.
    """

    access_token: bytes
    refresh_token: bytes | None
    extra: bytes | None
    access_token_expires_at: int | None
    refresh_token_expires_at: int | None
    key_id: str
    access_token_expiry_known: bool = True
    issued: bool = field(default=False, compare=False)

    def __repr__(self) -> str:
        return f"<SealedTokens key_id={self.key_id!r}>"

    @property
    def is_empty(self) -> bool:
        """Whether these are the tokens of an empty row: none."""
        return not self.key_id

    @property
    def due_at(self) -> int | None:
        """When a sweep refreshes the row: when its access token expires, in microseconds since the epoch.

        None: no sweep refreshes it, because it can get no new tokens, or its access token never expires.
        """
        return None if self.refresh_token is None and not self.issued else self.access_token_expires_at


def empty_tokens(deleted_at: int) -> SealedTokens:
    """The tokens of an empty row.

    Args:
        deleted_at: When a sweep may delete the row: microseconds since the epoch.
    """
    return SealedTokens(b"", None, None, deleted_at, None, "", issued=True)


@dataclass(slots=True, unsafe_hash=True, repr=False)
class SealedMetadata:
    """The application's own fields of one row as a backend sees them. No write of tokens changes them by itself.

    Attributes:
        value: The sealed JSON, or None: there are no fields. Each sealing gives different bytes, so that the bytes name
            one version of the fields.
        key_id: The name of the key that sealed the value, which may be another one than that of the tokens. None
            without a value.
    """

    value: bytes | None
    key_id: str | None

    def __repr__(self) -> str:
        return f"<SealedMetadata key_id={self.key_id!r}>"


NO_METADATA: Final = SealedMetadata(None, None)
"""The metadata of a row without fields of the application's."""


@dataclass(slots=True, unsafe_hash=True)
class SealedRecord:
    """One stored row as a backend returns it.

    Attributes:
        key: The row's provider, user id and account.
        tokens: The sealed values.
        generation: The number of this version of the row. Each write adds one; see :func:`new_generation`.
        lease_holder: The name of the refresh that holds the lease, or None. An expired lease may still be shown.
        lease_expires_in: Seconds until the lease expires, by the database's clock (negative: expired), or None.
        failure: The shared outcome of the last refresh of this generation, or None.
        created_at: Microseconds since the epoch, by the database's clock.
        updated_at: Microseconds since the epoch, by the database's clock.
        as_of: The database's clock when the row was read, in microseconds since the epoch.
        metadata: The application's own fields, sealed.
    """

    key: TokenKey
    tokens: SealedTokens
    generation: int
    lease_holder: str | None
    lease_expires_in: float | None
    failure: Failure | None
    created_at: int
    updated_at: int
    as_of: int
    metadata: SealedMetadata = NO_METADATA


@dataclass(slots=True, unsafe_hash=True)
class ScannedRow:
    """One stored row without its sealed tokens.

    Attributes:
        key: As in :class:`SealedRecord`.
        has_refresh_token: Whether the row has a refresh token.
        issued: Whether the row is due although it has no refresh token, so that the provider issues its tokens.
        access_token_expires_at: As in :class:`SealedTokens`.
        refresh_token_expires_at: As in :class:`SealedTokens`.
        access_token_expiry_known: As in :class:`SealedTokens`.
        key_id: As in :class:`SealedTokens`.
        generation: As in :class:`SealedRecord`.
        created_at: As in :class:`SealedRecord`.
        updated_at: As in :class:`SealedRecord`.
        as_of: As in :class:`SealedRecord`.
        failure_code: The code of the last refresh of this generation, if it failed.
        failed_at: When it failed: microseconds since the epoch, by the database's clock.
        retry_at: When the provider may be called again: microseconds since the epoch. None with a failure: not before
            new tokens are stored.
        lease_expires_at: When the lease expires or expired: microseconds since the epoch; None: there is none.
        metadata_key_id: The name of the key that sealed the metadata. None: there is none.
        metadata: The sealed metadata, if it was asked for; else None.
    """

    key: TokenKey
    has_refresh_token: bool
    issued: bool
    access_token_expires_at: int | None
    refresh_token_expires_at: int | None
    access_token_expiry_known: bool
    key_id: str
    generation: int
    created_at: int
    updated_at: int
    as_of: int
    failure_code: str | None = None
    failed_at: int | None = None
    retry_at: int | None = None
    lease_expires_at: int | None = None
    metadata_key_id: str | None = None
    metadata: bytes | None = field(default=None, repr=False)


class MigrationResult(NamedTuple):
    """What a migration of the tables has done, or would do.

    Attributes:
        found: The version that the tables had.
        version: The version that they have now, or would have.
        steps: What was changed, or would be, for operators; in order.
    """

    found: int
    version: int
    steps: tuple[str, ...]


class DueKey(NamedTuple):
    """The position of a row in the order in which a sweep reads the rows of one provider."""

    due_at: int
    user_id: str
    account: str = ""


@dataclass(slots=True, unsafe_hash=True)
class DueRow:
    """One stored row as a sweep reads it, to refresh the tokens that expire soon.

    Attributes:
        key: The row's provider, user id and account.
        due_at: The ``due_at`` of its tokens: microseconds since the epoch.
        access_token_expires_at: Microseconds since the epoch, or None for "never".
        updated_at: When its tokens were stored, by the database's clock, in microseconds since the epoch.
        as_of: The database's clock when the page was read, in microseconds since the epoch, whatever time
            :meth:`tokenstore.protocol.Backend.scan_due` was called with.
        is_empty: Whether the row is empty: it is old, and to be deleted.
    """

    key: TokenKey
    due_at: int
    access_token_expires_at: int | None
    updated_at: int
    as_of: int
    is_empty: bool = False

    @property
    def position(self) -> DueKey:
        """Where the next page begins if this is the last row of a page."""
        return DueKey(self.due_at, self.key.user_id, self.key.account)


_Text = Literal["provider", "user_id", "account", "access_token", "key_id"]
_Expiry = Literal["access_token_expires_at", "refresh_token_expires_at"]
_Time = Literal["created_at", "updated_at"]
_OptionalText = Literal["refresh_token", "metadata_key_id"]
_Fields = Literal["extra", "metadata"]
_Key = Literal[_Text, _OptionalText, _Expiry, _Time, _Fields, "generation", "access_token_expiry_known"]


class RedactedDict(dict[str, Any]):
    """A dict whose ``repr`` and ``str`` do not show the values that are secret, so that it can be logged."""

    __slots__ = ()

    _SECRET = frozenset({"access_token", "refresh_token", "extra", "metadata"})

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{key!r}: {'<redacted>' if key in self._SECRET and value else repr(value)}" for key, value in self.items()
        )
        return f"{{{shown}}}"

    def __rich_repr__(self) -> Iterable[tuple[str, object]]:
        # rich.pretty walks into dicts unless told otherwise.
        for key, value in self.items():
            yield key, "<redacted>" if key in self._SECRET and value else value

    def copy(self) -> RedactedDict:
        """A shallow copy, as redacted as this one."""
        return RedactedDict(self.items())

    def __or__(self, other: Mapping[str, Any]) -> RedactedDict:  # type: ignore[override]
        return RedactedDict(dict(self.items()) | dict(other))

    def __ror__(self, other: Mapping[str, Any]) -> RedactedDict:  # type: ignore[override]
        return RedactedDict(dict(other) | dict(self.items()))


class TokenRecord(RedactedDict):
    """One row's decrypted tokens: a ``dict`` whose ``repr`` and ``str`` show no token.

    Anything that walks through a dict sees the tokens: ``json.dumps(record)``, ``pickle``, a web framework's response,
    an error tracker that records local variables. Pass on the fields that are needed, never the record.

    Keys: ``provider``, ``user_id``, ``account``, ``access_token``, ``refresh_token`` (None: none issued),
    ``access_token_expires_at`` and ``refresh_token_expires_at`` (aware UTC datetimes; None: no known expiry),
    ``access_token_expiry_known`` (bool: whether the access token's expiry is known, so that None means never),
    ``extra`` (a dict of further response fields), ``metadata`` (a dict of the application's own fields),
    ``generation`` (int, changes with every write of tokens), ``key_id``, ``metadata_key_id`` (None: no metadata),
    ``created_at`` and ``updated_at`` (aware UTC datetimes).

    A type checker knows the type of each value and reports any other key. ``dict(record.items())`` is a plain ``dict``
    of the same, to which it lets any key be added.
    """

    __slots__ = ()

    if TYPE_CHECKING:
        # Narrower than dict's, which take any string. A TypedDict would say the same, but it is no `dict`.

        @overload  # type: ignore[override]
        def __getitem__(self, key: _Text, /) -> str: ...
        @overload
        def __getitem__(self, key: _OptionalText, /) -> str | None: ...
        @overload
        def __getitem__(self, key: _Expiry, /) -> datetime | None: ...
        @overload
        def __getitem__(self, key: _Time, /) -> datetime: ...
        @overload
        def __getitem__(self, key: Literal["generation"], /) -> int: ...
        @overload
        def __getitem__(self, key: Literal["access_token_expiry_known"], /) -> bool: ...
        @overload
        def __getitem__(self, key: _Fields, /) -> dict[str, Any]: ...
        def __getitem__(self, key: str, /) -> Any: ...

        def get(self, key: _Key, default: object = None, /) -> Any:  # type: ignore[override]
            """As ``dict.get``."""

        def __setitem__(self, key: _Key, value: Any, /) -> None: ...  # type: ignore[override]

    def copy(self) -> TokenRecord:
        """A shallow copy, as redacted as this one."""
        return TokenRecord(self.items())

    def __or__(self, other: Mapping[str, Any]) -> TokenRecord:  # type: ignore[override]
        return TokenRecord(dict(self.items()) | dict(other))

    def __ror__(self, other: Mapping[str, Any]) -> TokenRecord:  # type: ignore[override]
        return TokenRecord(dict(other) | dict(self.items()))


class RefreshableRecord(TokenRecord):
    """A record with a refresh token: what a refresher is called with, and what ``is_refresh_token_valid`` accepted."""

    __slots__ = ()

    if TYPE_CHECKING:

        @overload  # type: ignore[override]
        def __getitem__(self, key: Literal[_Text, "refresh_token"], /) -> str: ...
        @overload
        def __getitem__(self, key: _OptionalText, /) -> str | None: ...
        @overload
        def __getitem__(self, key: _Expiry, /) -> datetime | None: ...
        @overload
        def __getitem__(self, key: _Time, /) -> datetime: ...
        @overload
        def __getitem__(self, key: Literal["generation"], /) -> int: ...
        @overload
        def __getitem__(self, key: Literal["access_token_expiry_known"], /) -> bool: ...
        @overload
        def __getitem__(self, key: _Fields, /) -> dict[str, Any]: ...
        def __getitem__(self, key: str, /) -> Any: ...


def is_leased(row: SealedRecord | None) -> TypeGuard[SealedRecord]:
    """Whether there is a row, and a lease on it that has not expired."""
    return row is not None and row.lease_expires_in is not None and row.lease_expires_in > 0


def has_failed(row: SealedRecord) -> bool:
    """Whether the row has a failure that still forbids a refresh, permanently or until its retry time."""
    return row.failure is not None and (row.failure.retry_in is None or row.failure.retry_in > 0)


def new_generation() -> int:
    """The first generation of a new row: random, so that a row deleted and stored again repeats no earlier number.

    A compare-and-set on an old generation therefore fails after a delete, too. Below 2**48: exact in JSON, and far
    from the end of a 64-bit column.
    """
    return int.from_bytes(os.urandom(6), "big") or 1


def from_epoch_us(microseconds: int) -> datetime:
    """An aware UTC datetime from microseconds since the epoch."""
    return EPOCH + microseconds * MICROSECOND


def optional_datetime(microseconds: int | None) -> datetime | None:
    """As :func:`from_epoch_us`; None stays None."""
    return None if microseconds is None else from_epoch_us(microseconds)
