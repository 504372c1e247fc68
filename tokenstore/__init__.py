"""An async, encrypted, race-free store for OAuth tokens on PostgreSQL, MySQL/MariaDB or SQLite.

PYTEST_DONT_REWRITE: this word keeps pytest, which finds the plugin of tokenstore.testing in the same distribution, from
warning that the package was imported before pytest began.
"""

from tokenstore.errors import (
    BackendError,
    BackendUnavailableError,
    ConfigurationError,
    ConflictError,
    InsufficientScopeError,
    InvalidInputError,
    LockTimeoutError,
    LoginRefusedError,
    MissingDependencyError,
    ProviderRefusedError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    RefreshError,
    RefreshTimeoutError,
    RowTooLargeError,
    SealingError,
    StoreClosedError,
    TableMissingError,
    TamperedError,
    TokensMissingError,
    TokensNotStoredError,
    TokenStoreError,
    TransactionRequiredError,
    UnknownBackendError,
    UnknownKeyError,
    UnsupportedOperationError,
)
from tokenstore.health import TokenEntry, TokenEntryWithMetadata
from tokenstore.keyring import Keyring, generate_key
from tokenstore.records import MigrationResult, RefreshableRecord, TokenRecord
from tokenstore.results import ProviderCallFailure, RefreshResult
from tokenstore.store import AuthTokenStore, open_store
from tokenstore.transaction import Transaction
from tokenstore.value_records import ValueEntry

__all__ = [
    "AuthTokenStore",
    "BackendError",
    "BackendUnavailableError",
    "ConfigurationError",
    "ConflictError",
    "InsufficientScopeError",
    "InvalidInputError",
    "Keyring",
    "LockTimeoutError",
    "LoginRefusedError",
    "MigrationResult",
    "MissingDependencyError",
    "ProviderCallFailure",
    "ProviderRefusedError",
    "ProviderUnavailableError",
    "ReauthorizationRequiredError",
    "RefreshError",
    "RefreshResult",
    "RefreshTimeoutError",
    "RefreshableRecord",
    "RowTooLargeError",
    "SealingError",
    "StoreClosedError",
    "TableMissingError",
    "TamperedError",
    "TokenEntry",
    "TokenEntryWithMetadata",
    "TokenRecord",
    "TokenStoreError",
    "TokensMissingError",
    "TokensNotStoredError",
    "Transaction",
    "TransactionRequiredError",
    "UnknownBackendError",
    "UnknownKeyError",
    "UnsupportedOperationError",
    "ValueEntry",
    "generate_key",
    "open_store",
]
