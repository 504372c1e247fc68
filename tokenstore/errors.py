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
    ├── BackendError                                the database refused or failed
    │   ├── TableMissingError                       the table has not been created
    │   ├── LockTimeoutError (also TimeoutError)    a lock was not free within ``lock_timeout``
    │   ├── ConflictError                           a concurrent transaction won; repeat this one
    │   └── BackendUnavailableError                 no connection, a lost one, or a read-only server
    └── RefreshError                                no valid access token could be had
        ├── ReauthorizationRequiredError            only a new login of the user helps
        ├── ProviderUnavailableError                an outage, or no sensible answer; try again later
        ├── ProviderRefusedError                    the provider refuses this client; an operator has to act
        ├── RefreshTimeoutError (also TimeoutError) somebody else's refresh did not end in time
        └── TokensNotStoredError                    new tokens could not be written; the error carries them

No message, cause or attribute holds a token, a key or a URL's password, but for the records of
:class:`TokensNotStoredError`, whose ``repr`` shows none. Where a driver's own exception may carry row data, it is not
chained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenstore.records import TokenRecord

__all__ = [
    "BackendError",
    "BackendUnavailableError",
    "ConfigurationError",
    "ConflictError",
    "InvalidInputError",
    "LockTimeoutError",
    "MissingDependencyError",
    "ProviderRefusedError",
    "ProviderUnavailableError",
    "ReauthorizationRequiredError",
    "RefreshError",
    "RefreshTimeoutError",
    "SealingError",
    "StoreClosedError",
    "TableMissingError",
    "TamperedError",
    "TokenStoreError",
    "TokensNotStoredError",
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


class RefreshError(TokenStoreError):
    """No valid access token could be had.

    A ``refresh`` callable raises one of the three subclasses that speak of the provider to tell what its answer means;
    what callers of the store get names the provider and the user.

    Attributes:
        code: The OAuth error code (RFC 6749 section 5.2), or another short name.
        provider: Whose tokens; None where a ``refresh`` callable raised it.
        user_id: Likewise.
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code
        self.provider: str | None = None
        self.user_id: str | None = None


class ReauthorizationRequiredError(RefreshError):
    """The refresh token is missing, expired, used or revoked: only a new login of the user helps.

    Kept with the row: every later caller gets it without a call of the provider, until new tokens are stored.
    """

    def __init__(self, message: str, *, code: str = "invalid_grant") -> None:
        super().__init__(message, code=code)


class ProviderUnavailableError(RefreshError):
    """The provider could not be reached, was too slow, too busy (429), failed (5xx), or gave no sensible answer.

    Attributes:
        retry_after: Seconds until it is worth trying again, where known. Until then every caller gets this error
            without a call of the provider.
    """

    def __init__(
        self, message: str, *, code: str = "temporarily_unavailable", retry_after: float | None = None
    ) -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after


class ProviderRefusedError(RefreshError):
    """The provider refuses this client, or the request as such (``invalid_client`` …): an operator has to act.

    Attributes:
        retry_after: As with :class:`ProviderUnavailableError`.
    """

    def __init__(self, message: str, *, code: str = "invalid_client", retry_after: float | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after


class RefreshTimeoutError(RefreshError, TimeoutError):
    """A refresh, here or in another process, did not end in time. It goes on; the call may be repeated."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="timeout")


class TokensNotStoredError(RefreshError):
    """The provider issued new tokens, and they could not be written. The store keeps trying until it is closed.

    Attributes:
        records: The tokens, as ``load_tokens`` would return them: the only copy.
    """

    def __init__(self, message: str, *, records: Sequence[TokenRecord]) -> None:
        super().__init__(message, code="not_stored")
        self.records = tuple(records)

    @property
    def record(self) -> TokenRecord:
        """The first of :attr:`records`; ``load_fresh_tokens`` never has more than one."""
        return self.records[0]
