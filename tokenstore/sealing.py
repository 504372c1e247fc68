"""Seals the tokens or the value of one write, and opens what one row has sealed."""

from __future__ import annotations

import json
from typing import Any, Final

from tokenstore.errors import SealingError, TamperedError
from tokenstore.keyring import Keyring, place_of
from tokenstore.records import (
    NO_METADATA,
    SealedMetadata,
    SealedTokens,
    TokenKey,
    TokenRecord,
    from_epoch_us,
    optional_datetime,
)
from tokenstore.validation import RequestedRow, RequestedValue, metadata_problem
from tokenstore.value_records import SealedValue, ValueKey

__all__ = ["Sealer"]

# The field of a value in its associated data. No field of a token row may have this name: it keeps the two kinds apart.
_VALUE: Final = "value"


class Sealer:
    """The keys and the namespace of one store: seals the tokens of its writes, and opens the values of its rows.

    Args:
        keyring: The keys.
        namespace: Bound to every value, so that what was sealed in one namespace does not open in another.
    """

    __slots__ = ("_namespace", "keyring")

    def __init__(self, keyring: Keyring, namespace: str = "") -> None:
        self.keyring = keyring
        self._namespace = namespace

    def __repr__(self) -> str:
        return f"<Sealer {self.keyring!r}>"

    def seal(
        self,
        key: TokenKey,
        *,
        access_token: str,
        refresh_token: str | None,
        extra: str | None,
        access_token_expires_at: int | None,
        refresh_token_expires_at: int | None,
        access_token_expiry_known: bool = True,
    ) -> SealedTokens:
        """Seal one write with the keyring's primary key.

        Args:
            key: The row's key, which is bound to every value.
            access_token: Checked by :func:`tokenstore.validation.token_text`.
            refresh_token: Checked in the same way, or None.
            extra: The JSON that :func:`tokenstore.validation.extra_json` made, or None.
            access_token_expires_at: Microseconds since the epoch, or None: no known expiry.
            refresh_token_expires_at: Microseconds since the epoch, or None: no known expiry.
            access_token_expiry_known: See :class:`SealedTokens`.
        """
        seal, place = self.keyring.seal, place_of(key, self._namespace)
        return SealedTokens(
            access_token=seal(key, "access_token", access_token, place),
            refresh_token=None if refresh_token is None else seal(key, "refresh_token", refresh_token, place),
            extra=None if extra is None else seal(key, "extra", extra, place),
            access_token_expires_at=access_token_expires_at,
            refresh_token_expires_at=refresh_token_expires_at,
            key_id=self.keyring.primary,
            access_token_expiry_known=access_token_expiry_known,
        )

    def seal_metadata(self, key: TokenKey, metadata: str | None) -> SealedMetadata:
        """Seal the application's own fields of one row with the keyring's primary key.

        Args:
            key: The row's key, which is bound to the value.
            metadata: The JSON that :func:`tokenstore.validation.metadata_json` made, or None: no fields.
        """
        if metadata is None:
            return NO_METADATA
        sealed = self.keyring.seal(key, "metadata", metadata, place_of(key, self._namespace))
        return SealedMetadata(sealed, self.keyring.primary)

    def open_metadata(self, key: TokenKey, sealed: SealedMetadata) -> dict[str, Any]:
        """Open the application's own fields of one row.

        Args:
            key: The requested row. The value opens for this key only.
            sealed: The database's answer.

        Raises:
            UnknownKeyError: It was sealed with a key that is not in the keyring.
            TamperedError: It was altered outside the store, or sealed in another namespace.
        """
        if sealed is NO_METADATA:
            return {}
        if problem := metadata_problem(key, sealed):
            raise TamperedError(problem)
        if sealed.value is None:
            return {}
        text = self.keyring.open(key, "metadata", sealed.value, place_of(key, self._namespace))
        if not self.keyring.sealed_by(str(sealed.key_id), sealed.value):
            raise TamperedError(
                f"{key}: the column metadata_key_id is not the key that sealed the metadata; it was altered"
            )
        return _object_of(key, "metadata", text)

    def open(self, key: TokenKey, row: RequestedRow, *, despite_metadata: bool = False) -> TokenRecord:
        """Open every value of a row.

        Args:
            key: The requested row. The values open for this key only.
            row: The database's answer, which :func:`tokenstore.validation.requested_row` has checked.
            despite_metadata: Open the row also if its metadata does not open. The record has none then.

        Raises:
            UnknownKeyError: The row was sealed with a key that is not in the keyring.
            TamperedError: The row was altered outside the store, or sealed in another namespace.
        """
        tokens = row.tokens
        unseal, place = self.keyring.open, place_of(key, self._namespace)
        access_token = unseal(key, "access_token", tokens.access_token, place)
        refresh_token = extra = None
        if tokens.refresh_token is not None:
            refresh_token = unseal(key, "refresh_token", tokens.refresh_token, place)
        if tokens.extra is not None:
            extra = unseal(key, "extra", tokens.extra, place)
        # The column is plain text, which anyone who can write to the table can change. It tells an operator who is
        # about to remove a key which rows still need that key: a row with another key's name could not be read
        # afterwards.
        named, key_id = self.keyring.sealed_by, tokens.key_id
        if not (
            named(key_id, tokens.access_token)
            and (tokens.refresh_token is None or named(key_id, tokens.refresh_token))
            and (tokens.extra is None or named(key_id, tokens.extra))
        ):
            raise TamperedError(f"{key}: the column key_id is not the key that sealed the row; it was altered")
        metadata: dict[str, Any] = {}
        metadata_key_id = row.metadata.key_id
        try:
            metadata = self.open_metadata(key, row.metadata)
        except SealingError:
            if not despite_metadata:
                raise
            if metadata_problem(key, row.metadata):
                metadata_key_id = None
        return TokenRecord(
            provider=key.provider,
            user_id=key.user_id,
            account=key.account,
            access_token=access_token,
            refresh_token=refresh_token,
            access_token_expires_at=optional_datetime(tokens.access_token_expires_at),
            refresh_token_expires_at=optional_datetime(tokens.refresh_token_expires_at),
            access_token_expiry_known=tokens.access_token_expiry_known,
            extra={} if extra is None else _object_of(key, "extra", extra),
            metadata=metadata,
            generation=row.generation,
            key_id=tokens.key_id,
            metadata_key_id=metadata_key_id,
            created_at=from_epoch_us(row.created_at),
            updated_at=from_epoch_us(row.updated_at),
        )

    def seal_value(self, key: ValueKey, text: str) -> SealedValue:
        """Seal a value with the keyring's primary key.

        Args:
            key: The value's key, which is bound to it.
            text: The JSON that :func:`tokenstore.validation.value_json` made.
        """
        sealed = self.keyring.seal(key, _VALUE, text, place_of(key, self._namespace))
        return SealedValue(sealed, self.keyring.primary)

    def open_value(self, key: ValueKey, row: RequestedValue) -> str:
        """Open a value. Returns its JSON.

        Args:
            key: The requested key. The value opens for this key only.
            row: The database's answer, which :func:`tokenstore.validation.requested_value` has checked.

        Raises:
            UnknownKeyError: The value was sealed with a key that is not in the keyring.
            TamperedError: The row was altered outside the store, or sealed in another namespace of a store.
        """
        text = self.keyring.open(key, _VALUE, row.value.sealed, place_of(key, self._namespace))
        # As in `open`: an operator who is about to remove a key goes by this column.
        if not self.keyring.sealed_by(row.value.key_id, row.value.sealed):
            raise TamperedError(f"{key}: the column key_id is not the key that sealed the value; it was altered")
        return text


def _object_of(key: TokenKey, field: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None  # the error is raised below: otherwise its context, json's error, would show the text
    if not isinstance(value, dict):
        raise TamperedError(f"{field} of {key} is not a JSON object: another program sealed it")
    return value
