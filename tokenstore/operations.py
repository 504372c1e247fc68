"""What a store and its transactions share: storing, loading and deleting one row's tokens, and the validity checks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, overload

from tokenstore.errors import InvalidInputError
from tokenstore.metadata import MetadataUpdate
from tokenstore.protocol import RowOperations
from tokenstore.records import CLOCK_SKEW, RefreshableRecord, SealedRecord, TokenKey, TokenRecord
from tokenstore.sealing import Sealer
from tokenstore.tracebacks import clears_locals
from tokenstore.validation import (
    extra_json,
    metadata_changes,
    metadata_json,
    optional_epoch_us,
    requested_row,
    seconds,
    token_key,
    token_text,
)

if TYPE_CHECKING:
    from tokenstore.logins import Login

__all__ = ["Clock", "TokenOperations"]

Clock = Callable[[], float]
"""Seconds since the epoch."""

_US = 1_000_000


class TokenOperations(ABC):
    """What a store and its transactions have in common."""

    _sealer: Sealer
    _clock: Clock
    _refreshers: Mapping[str, Any]

    @abstractmethod
    def _rows(self) -> RowOperations:
        """The rows to read and write. Raises StoreClosedError if the store or transaction has ended."""

    @abstractmethod
    async def _store_login(self, login: Login) -> TokenRecord:
        """Store a token response."""

    @abstractmethod
    async def _lock(self, key: TokenKey) -> SealedRecord | None:
        """Lock and read a row. Raises an error where a lock cannot be held."""

    @abstractmethod
    async def _read_for_metadata(self, key: TokenKey) -> SealedRecord | None:
        """Read a row whose metadata will be changed: in a transaction with its lock, but waiting for no lease."""

    @overload
    async def store_tokens(
        self,
        provider: str,
        user_id: str,
        access_token: str,
        refresh_token: str | None,
        access_token_expires_at: datetime | None,
        refresh_token_expires_at: datetime | None = None,
        *,
        account: str = "",
        extra: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        if_absent: Literal[False] = False,
    ) -> None: ...
    @overload
    async def store_tokens(
        self,
        provider: str,
        user_id: str,
        access_token: str,
        refresh_token: str | None,
        access_token_expires_at: datetime | None,
        refresh_token_expires_at: datetime | None = None,
        *,
        account: str = "",
        extra: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        if_absent: Literal[True],
    ) -> bool: ...
    @clears_locals
    async def store_tokens(
        self,
        provider: str,
        user_id: str,
        access_token: str,
        refresh_token: str | None,
        access_token_expires_at: datetime | None,
        refresh_token_expires_at: datetime | None = None,
        *,
        account: str = "",
        extra: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        if_absent: bool = False,
    ) -> bool | None:
        """Insert or replace the tokens of one user at one provider, atomically.

        What is passed is what is stored: it replaces every field of an earlier row, also by None, except ``metadata``.
        Tokens, ``extra`` and ``metadata`` are encrypted first.

        Args:
            provider: The provider's name: 1 to 255 UTF-8 bytes, no NUL. Compared byte for byte.
            user_id: The user's id: 1 to 512 UTF-8 bytes, no NUL. Compared byte for byte.
            access_token: At most 256 KiB of printable ASCII characters and spaces, as RFC 6749 appendix A has it.
            refresh_token: As the access token; None if none was issued (RFC 6749 section 5.1 makes it optional).
            access_token_expires_at: When the access token expires; a naive datetime is UTC; None means never.
            refresh_token_expires_at: When the refresh token expires; a naive datetime is UTC; None means never.
            account: Tells several accounts of the user at the provider apart, each with tokens of its own: at most 255
                UTF-8 bytes, no NUL. Compared byte for byte. Default: the empty name, for a user who has one account.
            extra: Further fields of the token response (``scope``, ``token_type``, ``id_token`` …): JSON values,
                at most 256 KiB as JSON, with at most 32 levels of objects and arrays, ``extra`` itself among them.
            metadata: Fields of the application's own, with the limits of ``extra``. A mapping replaces all stored ones,
                in the same atomic write; an empty one removes them. Default: None, which leaves them as they are.
            if_absent: Store the tokens only if there is no row yet. So an import from another table, which may be
                repeated, never replaces what a login or a refresh has stored meanwhile.

        Returns:
            With ``if_absent=True``: whether the tokens were stored. Otherwise None.

        Raises:
            InvalidInputError: An argument is not acceptable; nothing was written.
            LockTimeoutError: Another transaction held the row's lock for too long; nothing was written.
            BackendError: The database refused or failed.
        """
        key = token_key(provider, user_id, account)
        access_token = token_text("access_token", access_token)
        if refresh_token is not None:
            refresh_token = token_text("refresh_token", refresh_token)
        expires_at = optional_epoch_us("access_token_expires_at", access_token_expires_at)
        refresh_expires_at = optional_epoch_us("refresh_token_expires_at", refresh_token_expires_at)
        sealed = self._sealer.seal(
            key,
            access_token=access_token,
            refresh_token=refresh_token,
            extra=extra_json(extra),
            access_token_expires_at=expires_at,
            refresh_token_expires_at=refresh_expires_at,
        )
        own = None if metadata is None else self._sealer.seal_metadata(key, metadata_json(metadata))
        if if_absent:
            return await self._rows().insert(key, sealed, metadata=own)
        await self._rows().put(key, sealed, metadata=own)
        return None

    @clears_locals
    async def store_token_response(
        self,
        provider: str,
        user_id: str,
        response: Mapping[str, Any],
        *,
        account: str = "",
        metadata: Mapping[str, Any] | None = None,
        keep_refresh_token: bool = True,
        if_absent: bool = False,
    ) -> TokenRecord:
        """Store the token response of a login as the provider sent it (RFC 6749 section 5.1).

        Reads ``access_token``, ``refresh_token`` and the fields that tell their expiry: ``expires_in``, ``expires_at``,
        ``refresh_token_expires_in`` and other spellings, which ``docs/logins.md`` lists. Lifetimes begin now, by the
        database's clock. All other fields are stored as ``extra``. If no field tells the access token's expiry, it has
        the lifetime of the stored token, or else the refresher's ``default_lifetime``; without one, its expiry is
        unknown, and ``access_token_expiry_known`` is False.

        Many providers issue a refresh token at a user's first login alone. So a response without one keeps the stored
        one, also if a refresh replaces it at the same time. It is not kept if both the response and the stored row name
        the provider's account (by ``sub`` or ``id``, or in an ID token), and the names differ.

        Args:
            provider: The provider's name, as for :meth:`store_tokens`.
            user_id: The user's id, as for :meth:`store_tokens`.
            response: The token response, parsed: a mapping. Its tokens may be in an object inside, as in Slack's.
            account: Which of the user's accounts; default: the empty name, for a user who has one.
            keep_refresh_token: Whether a response without a refresh token keeps the stored one.
            if_absent: Store the tokens only if there is no row yet.
            metadata: Fields of the application's own, as for :meth:`store_tokens`: a mapping replaces all stored fields
                together with the tokens. Default: None, which leaves them as they are.

        Returns:
            The record of the row as it is now: with ``if_absent=True`` that of the earlier row, if there was one.
            Stored metadata that does not open is no reason to refuse a login: it stays as it is, and the returned
            record has none.

        Raises:
            InvalidInputError: An argument is not acceptable, or the response has no access token; nothing was written.
            ReauthorizationRequiredError: The response is the error ``invalid_grant``; nothing was written.
            ProviderRefusedError: The response is another error of RFC 6749, such as ``invalid_client``.
            ProviderUnavailableError: The response is ``server_error`` or ``temporarily_unavailable``.
            LockTimeoutError: Another transaction held the row's lock, or a refresh its lease, for too long.
            ConflictError: Other writes of the row came first.
            SealingError: The response has no refresh token, and the row that has one does not open with the keyring.
            BackendError: The database refused or failed.
        """
        key = token_key(provider, user_id, account)
        # Imported here: a store that is given no responses needs neither.
        from tokenstore.logins import Login
        from tokenstore.refresh.kept import lifetime_setting

        login = Login(
            self._sealer,
            key,
            response,
            default_lifetime=lifetime_setting(self._refreshers.get(key.provider), "default_lifetime"),
            keep_refresh_token=keep_refresh_token,
            if_absent=if_absent,
            metadata=None if metadata is None else self._sealer.seal_metadata(key, metadata_json(metadata)),
        )
        return await self._store_login(login)

    @clears_locals
    async def update_metadata(
        self, provider: str, user_id: str, changes: Mapping[str, Any], *, account: str = ""
    ) -> dict[str, Any] | None:
        """Change fields of a row's metadata, which are the application's own: no token response touches them.

        The changes are merged with the stored fields at the top level, atomically: of concurrent updates of different
        fields, also from several processes, none is lost. Tokens, generation, times, a failure and a refresh in
        progress stay as they are, and the call waits for no refresh.

        In a transaction the call takes part in it, and takes the row's lock. In a borrowed session it takes part in the
        session's transaction; without one, it commits.

        Args:
            provider: The provider's name.
            user_id: The user's id.
            changes: The new values by field: JSON values, with the limits of ``extra`` in :meth:`store_tokens`. None
                removes the field; a None inside a value is stored as JSON's null.
            account: Which of the user's accounts; default: the empty name, for a user who has one.

        Returns:
            The metadata as it is now, or None if there is no row.

        Raises:
            InvalidInputError: An argument is not acceptable, or the merged metadata is too large; nothing was written.
            LockTimeoutError: Another transaction held the row's lock for too long; nothing was written.
            ConflictError: Other updates of the row came first for 5 s; nothing was written.
            UnknownKeyError: The metadata was sealed with a key that is not in the keyring.
            TamperedError: The row was altered outside the store, was sealed in another namespace, or is not the
                requested one.
            BackendError: The database refused or failed.
        """
        key = token_key(provider, user_id, account)
        update = MetadataUpdate(self._sealer, key, metadata_changes(changes))
        return await update.run(self._rows(), self._read_for_metadata)

    @clears_locals
    async def load_tokens(
        self, provider: str, user_id: str, for_update: bool = False, *, account: str = ""
    ) -> TokenRecord | None:
        """Read the tokens of one user at one provider.

        Args:
            provider: The provider's name.
            user_id: The user's id.
            for_update: Also take the row's lock until the transaction ends: a second caller waits, then reads what the
                first one stored. The lock also waits for a refresh of :meth:`AuthTokenStore.load_fresh_tokens`. Needs
                ``store.transaction()`` or a borrowed session.
            account: Which of the user's accounts; default: the empty name, for a user who has one.

        Returns:
            A dict (its ``repr`` shows no token; see :class:`~tokenstore.TokenRecord` for its keys), or None if there
            is no row.

        Raises:
            InvalidInputError: An argument is not acceptable.
            TransactionRequiredError: ``for_update=True`` outside a transaction.
            LockTimeoutError: The lock was not free within ``lock_timeout``.
            UnknownKeyError: The row was sealed with a key that is not in the keyring.
            TamperedError: The row was altered outside the store, was sealed in another namespace, or is not the
                requested one.
            BackendError: The database refused or failed.
        """
        key = token_key(provider, user_id, account)
        if for_update:
            row = requested_row(key, await self._lock(key))
        else:
            row = requested_row(key, await self._rows().get(key))
        return None if row is None else self._sealer.open(key, row)

    @clears_locals
    async def delete_tokens(self, provider: str, user_id: str, *, account: str = "") -> bool:
        """Delete the tokens of one user at one provider: those of one account, and of no other.

        Args:
            provider: The provider's name.
            user_id: The user's id.
            account: Which of the user's accounts; default: the empty name, for a user who has one.

        Returns:
            Whether there was a row.

        Raises:
            InvalidInputError: An argument is not acceptable.
            BackendError: The database refused or failed.
        """
        return await self._rows().delete(token_key(provider, user_id, account))

    @clears_locals
    def is_access_token_valid(self, token_record: Mapping[str, Any], clock_skew_seconds: float = CLOCK_SKEW) -> bool:
        """Whether the access token is valid: the time plus the skew is before its expiry.

        Args:
            token_record: A record of ``load_tokens``, or another mapping with ``access_token_expires_at``.
            clock_skew_seconds: How long before its expiry a token counts as expired, in seconds.

        Raises:
            InvalidInputError: The record has no such key, or no datetime there, or the skew is negative.
        """
        skew = seconds("clock_skew_seconds", clock_skew_seconds)
        expires_at = optional_epoch_us("access_token_expires_at", _field(token_record, "access_token_expires_at"))
        return expires_at is None or self._clock() + skew < expires_at / _US

    @overload
    def is_refresh_token_valid(self, token_record: TokenRecord) -> TypeGuard[RefreshableRecord]: ...
    @overload
    def is_refresh_token_valid(self, token_record: Mapping[str, Any]) -> bool: ...
    @clears_locals
    def is_refresh_token_valid(self, token_record: Mapping[str, Any]) -> bool:
        """Whether there is a refresh token that has not expired. One without an expiry does not expire.

        Args:
            token_record: A record of ``load_tokens``, or another mapping with ``refresh_token`` and
                ``refresh_token_expires_at``.

        Raises:
            InvalidInputError: The record has no such key, or no datetime there.
        """
        if _field(token_record, "refresh_token") is None:
            return False
        expires_at = optional_epoch_us("refresh_token_expires_at", _field(token_record, "refresh_token_expires_at"))
        return expires_at is None or self._clock() < expires_at / _US

    @clears_locals
    def needs_reseal(self, token_record: Mapping[str, Any]) -> bool:
        """Whether a part of a record, or of an entry of a listing, was not sealed with the keyring's primary key.

        The tokens and the metadata may have been sealed with different keys. For a record, the sealed values tell. For
        an entry, whose values are not read, only the columns ``key_id`` and ``metadata_key_id`` tell, which anyone who
        can write to the table can change: do not remove a key because of them.
        """
        primary = self._sealer.keyring.primary
        # An entry of `list_values` has no metadata.
        return _field(token_record, "key_id") != primary or token_record.get("metadata_key_id") not in (None, primary)


def _field(record: object, name: str) -> Any:
    if not isinstance(record, Mapping):
        raise InvalidInputError(f"token_record must be a record from load_tokens, not {type(record).__name__}")
    if name not in record:
        raise InvalidInputError(f"token_record has no {name!r}; pass what load_tokens returned")
    return record[name]
