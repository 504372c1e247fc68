"""Every error that tokenstore raises.

::

    TokenStoreError
    ├── InvalidInputError (also ValueError)         a bad argument; nothing was written
    ├── ConfigurationError                          a URL, option or environment that cannot work
    │   ├── UnknownBackendError                     no backend for this URL's scheme
    │   ├── MissingDependencyError (also ImportError)   an extra is not installed
    │   └── UnsupportedOperationError               the backend or its settings cannot do this
    ├── TransactionRequiredError                    a row lock was asked for outside a transaction
    ├── StoreClosedError                            the store or transaction has ended
    ├── SealingError                                a stored value cannot be opened
    │   ├── UnknownKeyError                         its key is not in the keyring
    │   └── TamperedError                           it was altered, moved, or sealed by a namesake key
    └── BackendError                                the database refused or failed
        ├── TableMissingError                       the table has not been created
        ├── LockTimeoutError (also TimeoutError)    a lock was not free within ``lock_timeout``
        ├── ConflictError                           a concurrent transaction won; repeat this one
        └── BackendUnavailableError                 no connection, a lost one, or a read-only server

No message, cause or attribute holds a token, a key or a URL's password. Where a driver's own exception may carry
row data, it is not chained.
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "BackendUnavailableError",
    "ConfigurationError",
    "ConflictError",
    "InvalidInputError",
    "LockTimeoutError",
    "MissingDependencyError",
    "SealingError",
    "StoreClosedError",
    "TableMissingError",
    "TamperedError",
    "TokenStoreError",
    "TransactionRequiredError",
    "UnknownBackendError",
    "UnknownKeyError",
    "UnsupportedOperationError",
]


class TokenStoreError(Exception):
    """The root of every error that tokenstore raises."""


class InvalidInputError(TokenStoreError, ValueError):
    """An argument is not acceptable. Raised before anything is written, identically on every backend."""


class ConfigurationError(TokenStoreError):
    """A URL, option, key or environment that cannot work; the message says what to change."""


class UnknownBackendError(ConfigurationError):
    """No backend is registered for the URL's scheme; the message lists those that are."""


class MissingDependencyError(ConfigurationError, ImportError):
    """A driver or tool is not installed; the message names the extra that brings it."""


class UnsupportedOperationError(ConfigurationError):
    """The backend, or the way its engine or session is set up, cannot do what was asked; the message says why."""


class TransactionRequiredError(TokenStoreError):
    """``for_update=True`` outside a transaction: the lock would be gone before the call returned."""


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
    """The value does not open: altered, truncated, moved from another row or column, or sealed by a namesake key."""


class BackendError(TokenStoreError):
    """The database refused or failed.

    Attributes:
        code: The SQLSTATE (PostgreSQL), error number (MySQL, MariaDB) or result code name (SQLite), or None.
    """

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class TableMissingError(BackendError):
    """The token table does not exist; ``await store.setup()`` or ``tokenstore init`` creates it."""


class LockTimeoutError(BackendError, TimeoutError):
    """A lock was not free within ``lock_timeout`` seconds. Nothing was written; the call may be repeated."""


class ConflictError(BackendError):
    """A deadlock or serialization failure: this transaction was undone; repeat it from its first statement."""


class BackendUnavailableError(BackendError):
    """The database cannot be reached, went away, or accepts no writes. A write's outcome may be unknown."""
