"""Checks of what enters the core: arguments from callers, and rows from the database.

The core checks every argument once, before a backend receives it. So all backends accept and refuse the same values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, NewType

from tokenstore.errors import InvalidInputError, TamperedError
from tokenstore.records import (
    EPOCH,
    MAX_ACCOUNT_BYTES,
    MAX_EXTRA_DEPTH,
    MAX_GENERATION,
    MAX_NAMESPACE_BYTES,
    MAX_PROVIDER_BYTES,
    MAX_TOKEN_BYTES,
    MAX_USER_ID_BYTES,
    MICROSECOND,
    DueRow,
    ScannedRow,
    SealedMetadata,
    SealedRecord,
    TokenKey,
)
from tokenstore.value_records import (
    MAX_VALUE_BYTES,
    MAX_VALUE_GROUP_BYTES,
    MAX_VALUE_NAME_BYTES,
    ScannedValue,
    ValueKey,
    ValueRow,
)

__all__ = [
    "RequestedRow",
    "RequestedValue",
    "extra_json",
    "key_problem",
    "metadata_changes",
    "metadata_json",
    "metadata_problem",
    "namespace_text",
    "optional_epoch_us",
    "plain_text",
    "requested_row",
    "requested_value",
    "scanned_row_problem",
    "scanned_value_problem",
    "seconds",
    "to_epoch_us",
    "token_key",
    "token_text",
    "too_deep",
    "value_group",
    "value_json",
    "value_key",
    "value_key_problem",
]

_encode_json: Final = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
_LONGEST_SECONDS = 10**9  # over 31 years; fits every database's integers as microseconds
_LONGEST_AGE = 10**11  # of a lease or failure that has expired, in seconds: since the year 1
_MIN_US = (datetime.min.replace(tzinfo=UTC) - EPOCH) // MICROSECOND
_MAX_US = (datetime.max.replace(tzinfo=UTC) - EPOCH) // MICROSECOND
_SEALED_OR_NONE = (bytes, type(None))
_MAX_NAME = 64  # characters of a key's name, a lease holder's name and a failure's code


def token_key(provider: object, user_id: object, account: object = "") -> TokenKey:
    """Check the parts of a key. The account alone may be empty."""
    return TokenKey(
        _key_part("provider", provider, MAX_PROVIDER_BYTES),
        _key_part("user_id", user_id, MAX_USER_ID_BYTES),
        "" if _is_empty(account) else _key_part("account", account, MAX_ACCOUNT_BYTES),
    )


def value_group(namespace: object) -> str:
    """Check the namespace of values."""
    return _key_part("namespace", namespace, MAX_VALUE_GROUP_BYTES)


def value_key(namespace: object, name: object) -> ValueKey:
    """Check the parts of a value's key."""
    return ValueKey(value_group(namespace), _key_part("name", name, MAX_VALUE_NAME_BYTES))


def _key_part(name: str, value: object, limit: int) -> str:
    text = _text(name, value, limit)
    if "\0" in text:
        raise InvalidInputError(f"{name} holds a NUL character, which PostgreSQL cannot store")
    return text


def namespace_text(value: object) -> str:
    """Check the name of a store's namespace. It may be empty."""
    text = "" if _is_empty(value) else _text("namespace", value, MAX_NAMESPACE_BYTES)
    if "\0" in text:
        raise InvalidInputError("namespace holds a NUL character")
    return text


def token_text(name: str, value: object) -> str:
    """Check a token: a non-empty ``str`` of at most :data:`MAX_TOKEN_BYTES`, of printable ASCII characters and spaces.

    RFC 6749 appendix A.12 and A.17 allow no other characters (VSCHAR). A line end in a token would end the header in
    which it is sent, and begin another one.
    """
    text = plain_text(name, value)
    if not (text.isascii() and text.isprintable()):
        raise InvalidInputError(
            f"{name} holds a character that no token may have: only printable ASCII and spaces are allowed "
            "(RFC 6749 appendix A)"
        )
    return text


def plain_text(name: str, value: object) -> str:
    """Check a text: a non-empty ``str`` of at most :data:`MAX_TOKEN_BYTES`."""
    return _text(name, value, MAX_TOKEN_BYTES)


def _is_empty(value: object) -> bool:
    return isinstance(value, str) and not value


def _text(name: str, value: object, limit: int) -> str:
    if type(value) is str and value.isascii() and 0 < len(value) <= limit:
        return value  # the usual case, checked without encoding: each ASCII character is one byte
    if not isinstance(value, str):
        raise InvalidInputError(f"{name} must be a str, not {type(value).__name__}")
    text = str.__str__(value)  # drivers may not accept a subclass of str, such as an enum
    if not text:
        raise InvalidInputError(f"{name} must not be empty")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        # Raised below, outside this block: otherwise the error's context, the encoding error, would show the value.
        size = -1
    if size < 0:
        raise InvalidInputError(f"{name} holds a lone surrogate and cannot be encoded as UTF-8")
    if size > limit:
        raise InvalidInputError(f"{name} has {size} bytes as UTF-8; at most {limit} are allowed")
    return text


def to_epoch_us(name: str, value: object) -> int:
    """Check a datetime and convert it to microseconds since the epoch; a naive one is UTC, never local time."""
    if not isinstance(value, datetime):
        raise InvalidInputError(f"{name} must be a datetime or None, not {type(value).__name__}")
    if value.utcoffset() is None:
        value = value.replace(tzinfo=UTC)
    microseconds = (value - EPOCH) // MICROSECOND
    if not _MIN_US <= microseconds <= _MAX_US:
        raise InvalidInputError(f"{name} is outside the years 1 to 9999 in UTC")
    return microseconds


def optional_epoch_us(name: str, value: object) -> int | None:
    """As :func:`to_epoch_us`; None stays None."""
    return None if value is None else to_epoch_us(name, value)


def extra_json(value: object) -> str | None:
    """Check ``extra`` and serialise it: a mapping with ``str`` keys and JSON values, or None. Empty counts as None."""
    return None if value is None else _json_object("extra", value)


def metadata_json(value: object) -> str | None:
    """As :func:`extra_json`, for ``metadata``."""
    return None if value is None else _json_object("metadata", value)


def metadata_changes(value: object) -> dict[str, object]:
    """Check the changes of ``update_metadata`` as :func:`extra_json` does, and copy them. They must not be None."""
    if not isinstance(value, Mapping):
        raise InvalidInputError(f"changes must be a mapping, not {type(value).__name__}")
    text = _json_object("changes", value)
    copy: dict[str, object] = {} if text is None else json.loads(text)
    return copy


def _json_object(name: str, value: object) -> str | None:
    """Check a mapping with ``str`` keys and JSON values, and serialise it; None if it is empty."""
    if not isinstance(value, Mapping):
        raise InvalidInputError(f"{name} must be a mapping or None, not {type(value).__name__}")
    if not all(isinstance(key, str) for key in value):
        raise InvalidInputError(f"{name} must have str keys")
    try:
        text = _encode_json(dict(value))
    except (TypeError, ValueError, RecursionError):
        text = ""  # the error is raised below: otherwise its context, json's error, could show a value
    if too_deep(value, MAX_EXTRA_DEPTH):
        raise InvalidInputError(f"{name} is nested more than {MAX_EXTRA_DEPTH} levels deep, or contains itself")
    if not text:
        raise InvalidInputError(f"{name} must hold JSON values only (no NaN, datetime or bytes)")
    if len(text) > MAX_TOKEN_BYTES:
        raise InvalidInputError(f"{name} has {len(text)} bytes as JSON; at most {MAX_TOKEN_BYTES} are allowed")
    return None if text == "{}" else text


def value_json(value: object) -> str:
    """Check a value and serialise it: any JSON value. Unlike json's own encoder, refuses keys that are no ``str``."""
    try:
        text = _encode_json(value)
    except (TypeError, ValueError, RecursionError):
        text = ""  # the error is raised below: otherwise its context, json's error, could show a value
    if too_deep(value, MAX_EXTRA_DEPTH):
        raise InvalidInputError(f"value is nested more than {MAX_EXTRA_DEPTH} levels deep, or contains itself")
    if not text or not _has_str_keys(value):
        raise InvalidInputError("value must be a JSON value (no NaN, datetime or bytes, and no keys that are no str)")
    if len(text) > MAX_VALUE_BYTES:
        raise InvalidInputError(f"value has {len(text)} bytes as JSON; at most {MAX_VALUE_BYTES} are allowed")
    return text


def _has_str_keys(value: object) -> bool:
    """Whether all objects in a JSON value, which :func:`too_deep` has accepted, have keys that are ``str``."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _has_str_keys(child) for key, child in value.items())
    return not isinstance(value, list | tuple) or all(map(_has_str_keys, value))


def too_deep(value: object, levels: int) -> bool:
    """Whether a JSON value has more than so many levels of objects and arrays. A value that contains itself has."""
    level = [value]
    for _ in range(levels + 1):
        # By identity, so that a value that is in several places is looked at once.
        inside = {id(one): one for one in level if isinstance(one, Mapping | list | tuple)}.values()
        if not inside:
            return False
        level = [child for one in inside for child in (one.values() if isinstance(one, Mapping) else one)]
    return True


def seconds(name: str, value: object, *, positive: bool = False) -> float:
    """Check a duration in seconds: a number, zero or more (``positive``: more than zero)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidInputError(f"{name} must be a number of seconds, not {type(value).__name__}")
    if not 0 <= value <= _LONGEST_SECONDS or (positive and value == 0):  # also refuses NaN
        lower = "more than" if positive else "at least"
        raise InvalidInputError(f"{name} must be {lower} zero and at most {_LONGEST_SECONDS}")
    return float(value)


# -- rows from the database ---------------------------------------------------------------------------


RequestedRow = NewType("RequestedRow", SealedRecord)
"""A row that :func:`requested_row` has checked."""


def requested_row(key: TokenKey, row: SealedRecord | None, *, empty: bool = False) -> RequestedRow | None:
    """Check that the database answered with the requested row, or with none, and that the row's values are possible.

    Anyone who can write to the table can put any value into a column that is not sealed. Without this check, such a
    value would fail somewhere later: a generation that cannot grow, for example, only after the provider has already
    replaced the refresh token.

    Args:
        key: The row's key.
        row: The database's answer.
        empty: Whether an empty row is returned, too. Default: it counts as no row.

    Raises:
        TamperedError: The database answered with another row, or a column holds a value that the store never writes.
    """
    if row is None:
        return None
    if row.key != key:
        raise TamperedError(f"{key}: the database answered with another row, that of {row.key}")
    if column := _impossible_column(row):
        raise TamperedError(_impossible(key, column))
    return None if row.tokens.is_empty and not empty else RequestedRow(row)


def key_problem(key: TokenKey) -> str | None:
    """Why no store has written a row with this key, which the database listed; None if one may have."""
    try:
        _ = token_key(*key)
    except InvalidInputError as error:
        return f"{key}: no store has written a row with this key: {error}"
    return None


def metadata_problem(key: TokenKey, metadata: SealedMetadata) -> str | None:
    """As :func:`scanned_row_problem`, for a row's metadata."""
    column = _impossible_metadata(metadata)
    return None if column is None else _impossible(key, column)


def scanned_row_problem(row: ScannedRow) -> str | None:
    """Which column of a listed row holds a value that the store never writes, as a message; None if there is none."""
    for column, possible in (
        ("access_token_expires_at", row.access_token_expires_at is None or _is_time(row.access_token_expires_at)),
        ("refresh_token_expires_at", row.refresh_token_expires_at is None or _is_time(row.refresh_token_expires_at)),
        ("access_token_expiry_known", isinstance(row.access_token_expiry_known, bool)),
        ("key_id", _is_name(row.key_id)),
        ("metadata_key_id", row.metadata_key_id is None or _is_name(row.metadata_key_id)),
        ("generation", _is_generation(row.generation)),
        ("created_at", _is_time(row.created_at)),
        ("updated_at", _is_time(row.updated_at)),
        ("the database's clock", _is_time(row.as_of)),
        ("failure_code", row.failure_code is None or _is_name(row.failure_code)),
        ("failed_at", row.failed_at is None or _is_time(row.failed_at)),
        ("retry_at", row.retry_at is None or _is_time(row.retry_at)),
        ("lease_expires_at", row.lease_expires_at is None or _is_time(row.lease_expires_at)),
    ):
        if not possible:
            return _impossible(row.key, column)
    return None


def due_time_problem(row: DueRow) -> str | None:
    """Why no store has written a row that is due at this time; None if one may have."""
    return None if _is_time(row.due_at) else _impossible(row.key, "due_at")


def due_row_problem(row: DueRow) -> str | None:
    """As :func:`scanned_row_problem`, for a row that is due."""
    for column, possible in (
        ("access_token_expires_at", row.access_token_expires_at is None or _is_time(row.access_token_expires_at)),
        ("updated_at", _is_time(row.updated_at)),
        ("the database's clock", _is_time(row.as_of)),
    ):
        if not possible:
            return _impossible(row.key, column)
    return due_time_problem(row)


RequestedValue = NewType("RequestedValue", ValueRow)
"""A value's row that :func:`requested_value` has checked."""


def requested_value(key: ValueKey, row: ValueRow | None) -> RequestedValue | None:
    """As :func:`requested_row`, for a value.

    Raises:
        TamperedError: The database answered with another value, or a column holds what the store never writes.
    """
    if row is None:
        return None
    if row.key != key:
        raise TamperedError(f"{key}: the database answered with another value, that of {row.key}")
    for column, possible in (
        ("value", type(row.value.sealed) is bytes),
        ("version", _is_generation(row.version)),
        *_possible_in_both(row, row.value.key_id),
    ):
        if not possible:
            raise TamperedError(_impossible_value(key, column))
    return RequestedValue(row)


def value_key_problem(key: ValueKey) -> str | None:
    """As :func:`key_problem`, for a value."""
    try:
        _ = value_key(*key)
    except InvalidInputError as error:
        return f"{key}: no store has written a value with this key: {error}"
    return None


def scanned_value_problem(row: ScannedValue) -> str | None:
    """As :func:`scanned_row_problem`, for a value."""
    for column, possible in _possible_in_both(row, row.key_id):
        if not possible:
            return _impossible_value(row.key, column)
    return None


def _possible_in_both(row: ValueRow | ScannedValue, key_id: object) -> tuple[tuple[str, bool], ...]:
    """For each column that a row and an entry of the list have, whether the store may have written its value."""
    return (
        ("expires_at", row.expires_at is None or _is_time(row.expires_at)),
        ("key_id", _is_name(key_id)),
        ("created_at", _is_time(row.created_at)),
        ("updated_at", _is_time(row.updated_at)),
    )


def _impossible_value(key: ValueKey, column: str) -> str:
    return (
        f"{key}: {column} has a value that no store has written, so the row was altered. Restore it from a backup, or "
        "delete it with `pop_value`, which raises this error, too"
    )


def _impossible(key: TokenKey, column: str) -> str:
    return (
        f"{key}: {column} has a value that no store has written, so the row was altered. Restore it from a backup, or "
        "delete it and let the user log in again"
    )


def _impossible_column(row: SealedRecord) -> str | None:
    """The first column with a value that the store never writes."""
    tokens: Any = row.tokens
    failure = row.failure
    # One test after the other, without a loop: each load makes them.
    if not isinstance(tokens.access_token, bytes):
        return "access_token"
    if not isinstance(tokens.refresh_token, _SEALED_OR_NONE):
        return "refresh_token"
    if not isinstance(tokens.extra, _SEALED_OR_NONE):
        return "extra"
    if tokens.access_token_expires_at is not None and not _is_time(tokens.access_token_expires_at):
        return "access_token_expires_at"
    if tokens.refresh_token_expires_at is not None and not _is_time(tokens.refresh_token_expires_at):
        return "refresh_token_expires_at"
    if tokens.access_token_expiry_known not in (True, False):
        return "access_token_expiry_known"
    if not (_is_name(tokens.key_id) or _has_no_tokens(tokens)):
        return "key_id"
    if not _is_generation(row.generation):
        return "generation"
    if row.lease_holder is not None and not _is_name(row.lease_holder):
        return "lease_holder"
    if row.lease_expires_in is not None and not _is_duration(row.lease_expires_in):
        return "lease_expires_at"
    if failure is not None:
        if not _is_name(failure.code):
            return "failure_code"
        if failure.retry_in is not None and not _is_duration(failure.retry_in):
            return "retry_at"
    if not _is_time(row.created_at):
        return "created_at"
    if not _is_time(row.updated_at):
        return "updated_at"
    return None if _is_time(row.as_of) else "the database's clock"


def _impossible_metadata(metadata: SealedMetadata) -> str | None:
    """As :func:`_impossible_column`. Either both columns are null, or neither is."""
    value: Any = metadata.value
    if value is None:
        return None if metadata.key_id is None else "metadata_key_id"
    if not isinstance(value, bytes):
        return "metadata"
    return None if _is_name(metadata.key_id) else "metadata_key_id"


def _has_no_tokens(tokens: Any) -> bool:
    """Whether these are the tokens of an empty row."""
    return (tokens.key_id, tokens.access_token, tokens.refresh_token, tokens.extra) == ("", b"", None, None)


def _is_time(value: object) -> bool:
    return type(value) is int and _MIN_US <= value <= _MAX_US


def _is_duration(value: object) -> bool:
    """Whether a value is a number of seconds from or until now; NaN is none."""
    return isinstance(value, int | float) and -_LONGEST_AGE <= value <= _LONGEST_SECONDS


def _is_generation(value: object) -> bool:
    return type(value) is int and 0 <= value < MAX_GENERATION


def _is_name(value: object) -> bool:
    """Whether a value is fit for messages, logs and terminals: short, of printable ASCII characters."""
    return type(value) is str and 0 < len(value) <= _MAX_NAME and value.isascii() and value.isprintable()
