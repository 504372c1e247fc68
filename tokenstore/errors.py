"""Every error that tokenstore raises.

::

    TokenStoreError
    ├── InvalidInputError (also ValueError)         a bad argument; nothing was written
    ├── ConfigurationError                          a URL, option or environment that cannot work
    │   ├── UnknownBackendError                     no backend for this URL's scheme
    │   ├── MissingDependencyError (also ImportError)   an extra is not installed
    │   └── UnsupportedOperationError               the backend or its settings do not support this
    ├── TransactionRequiredError                    a row lock was requested outside a transaction
    ├── StoreClosedError                            the store or transaction has ended
    ├── SealingError                                a stored value cannot be opened
    │   ├── UnknownKeyError                         its key is not in the keyring
    │   └── TamperedError                           it was altered, moved, or sealed by another key or namespace
    ├── BackendError                                the database refused or failed
    │   ├── TableMissingError                       the table has not been created
    │   ├── LockTimeoutError (also TimeoutError)    a lock was not free within lock_timeout
    │   ├── ConflictError                           a deadlock, or a serialization failure; repeat the transaction
    │   ├── LoginRefusedError                       a wrong password, user or database name
    │   ├── RowTooLargeError                        the row exceeds a limit of the database
    │   └── BackendUnavailableError                 no connection, a lost one, or a read-only server
    └── RefreshError                                there is no valid access token
        ├── TokensMissingError                      no row, where the caller asked for an error
        ├── InsufficientScopeError                  the token lacks a scope that the caller asked for
        ├── ReauthorizationRequiredError            the user has to log in again
        ├── ProviderUnavailableError                an outage, or no readable response; try again later
        ├── ProviderRefusedError                    the provider refuses this client; an operator has to act
        ├── RefreshTimeoutError (also TimeoutError) another refresh of the row did not end in time
        └── TokensNotStoredError                    new tokens could not be written; the error carries them

No message, cause or attribute contains a token, a key or a URL's password. One exception: ``TokensNotStoredError``
carries records, whose ``repr`` shows no token. An exception of a driver or of a refresher may contain a row's data, so
it is not chained: an error names its type, or its code. The local variables of tokenstore's frames in an error's
traceback are cleared. A pickled ``TokensNotStoredError`` contains the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenstore.records import TokenRecord

__all__ = [
    "BackendError",
    "BackendUnavailableError",
    "ConfigurationError",
    "ConflictError",
    "InsufficientScopeError",
    "InvalidInputError",
    "LockTimeoutError",
    "LoginRefusedError",
    "MissingDependencyError",
    "ProviderRefusedError",
    "ProviderUnavailableError",
    "ReauthorizationRequiredError",
    "RefreshError",
    "RefreshTimeoutError",
    "RowTooLargeError",
    "SealingError",
    "StoreClosedError",
    "TableMissingError",
    "TamperedError",
    "TokenStoreError",
    "TokensMissingError",
    "TokensNotStoredError",
    "TransactionRequiredError",
    "UnknownBackendError",
    "UnknownKeyError",
    "UnsupportedOperationError",
]


class TokenStoreError(Exception):
    """The root of every error that tokenstore raises. Errors can be pickled and copied, with all attributes."""

    def __reduce__(self) -> tuple[object, ...]:
        # Without the constructor, which has arguments that are not among `args`.
        return _rebuilt, (type(self), *self.args), vars(self)


def _rebuilt(kind: type[TokenStoreError], *args: object) -> TokenStoreError:
    error = kind.__new__(kind)
    super(TokenStoreError, error).__init__(*args)
    return error


class InvalidInputError(TokenStoreError, ValueError):
    """An argument is not acceptable. Raised before anything is written, and in the same way on every backend."""


class ConfigurationError(TokenStoreError):
    """A URL, option, key or environment that cannot work; the message says what to change."""


class UnknownBackendError(ConfigurationError):
    """No backend is registered for the URL's scheme; the message lists those that are."""


class MissingDependencyError(ConfigurationError, ImportError):
    """A driver or tool is not installed; the message names the extra that brings it."""


class UnsupportedOperationError(ConfigurationError):
    """The backend, or the configuration of its engine or session, does not support the call; the message says why."""


class TransactionRequiredError(TokenStoreError):
    """``for_update=True`` outside a transaction: the lock would end before the call returned."""


class StoreClosedError(TokenStoreError):
    """The store was closed, or the transaction has ended."""


class SealingError(TokenStoreError):
    """A stored value cannot be opened. Nothing unsealed is ever returned in its place."""


class UnknownKeyError(SealingError):
    """The value was sealed with a key that the keyring does not hold.

    Attributes:
        key_id: The name of the missing key.
    """

    def __init__(self, message: str, *, key_id: str) -> None:
        super().__init__(message)
        self.key_id = key_id


class TamperedError(SealingError):
    """The row was altered outside the store, or is not the requested one.

    A sealed value does not open (altered, truncated, moved from another row or column, sealed in another namespace, or
    sealed by another key that had the same name at another time), or a plain column has a value that no store has
    written.
    """


class BackendError(TokenStoreError):
    """The database refused or failed.

    Attributes:
        code: The SQLSTATE (PostgreSQL), error number (MySQL, MariaDB) or result code name (SQLite), or None.
    """

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class TableMissingError(BackendError):
    """The table, or the SQLite file, does not exist; ``await store.setup()`` or ``tokenstore init`` creates it."""


class LockTimeoutError(BackendError, TimeoutError):
    """A lock was not free within ``lock_timeout`` seconds. Nothing was written; the call may be repeated."""


class ConflictError(BackendError):
    """A deadlock or serialization failure: the transaction was rolled back; repeat it from its first statement."""


class LoginRefusedError(BackendError):
    """The server refuses the login: the password, the user or the database's name is wrong, or a right is missing.

    The message says what to check. Nothing was sent to the table.
    """


class RowTooLargeError(BackendError):
    """The row exceeds a limit of the database, such as MySQL's ``max_allowed_packet``: the same write fails again.

    The message says which limit. Nothing was written.
    """


class BackendUnavailableError(BackendError):
    """The database is unreachable, closed the connection, or accepts no writes.

    If a write raises this error, the database may or may not have carried it out.
    """


class RefreshError(TokenStoreError):
    """There is no valid access token.

    A ``refresh`` callable raises ``ReauthorizationRequiredError``, ``ProviderUnavailableError`` or
    ``ProviderRefusedError`` to say what the provider's response means. The errors that callers of the store get name
    the provider, the user and the account.

    Attributes:
        code: The OAuth error code (RFC 6749 section 5.2), or another short name.
        provider: The row's provider; None in an error that a ``refresh`` callable raised.
        user_id: The row's user id; None in an error that a ``refresh`` callable raised.
        account: The row's account; None in an error that a ``refresh`` callable raised.
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code
        self.provider: str | None = None
        self.user_id: str | None = None
        self.account: str | None = None


class TokensMissingError(RefreshError):
    """``load_fresh_tokens(missing="raise")``: there is no row, so the user has not logged in, or has been deleted."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="tokens_missing")


class InsufficientScopeError(RefreshError):
    """``load_fresh_tokens(scopes=…)``: the user has not granted all of these scopes, and has to log in for them.

    Attributes:
        missing: The scopes that are missing, sorted.
        granted: The scopes that the token has, sorted.
    """

    def __init__(self, message: str, *, missing: Sequence[str], granted: Sequence[str]) -> None:
        super().__init__(message, code="insufficient_scope")
        self.missing = tuple(missing)
        self.granted = tuple(granted)


class ReauthorizationRequiredError(RefreshError):
    """The refresh token is missing, expired, used or revoked: the user has to log in again.

    Stored with the row: later callers get this error without a call of the provider, until new tokens are stored.
    """

    def __init__(self, message: str, *, code: str = "invalid_grant") -> None:
        super().__init__(message, code=code)


class ProviderUnavailableError(RefreshError):
    """The provider was unreachable, too slow or too busy (429), failed (5xx), or sent no readable response.

    Attributes:
        retry_after: Seconds until the provider is called again, or None if unknown. Until then all callers get this
            error without a call.
    """

    def __init__(
        self, message: str, *, code: str = "temporarily_unavailable", retry_after: float | None = None
    ) -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after


class ProviderRefusedError(RefreshError):
    """The provider refuses this client or its requests (``invalid_client`` …): an operator has to act.

    Attributes:
        retry_after: As in :class:`ProviderUnavailableError`.
    """

    def __init__(self, message: str, *, code: str = "invalid_client", retry_after: float | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after


class RefreshTimeoutError(RefreshError, TimeoutError):
    """Another refresh of the row did not end in time, or no place among the provider's calls became free.

    The other refreshes go on; repeat the call.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, code="timeout")


class TokensNotStoredError(RefreshError):
    """The provider issued new tokens that could not be written. The store continues to write them until it is closed.

    Attributes:
        records: The tokens, as ``load_tokens`` would return them. No other copy exists.
    """

    def __init__(self, message: str, *, records: Sequence[TokenRecord]) -> None:
        super().__init__(message, code="not_stored")
        self.records = tuple(records)

    @property
    def record(self) -> TokenRecord:
        """The first of :attr:`records`; ``load_fresh_tokens`` never has more than one."""
        return self.records[0]
