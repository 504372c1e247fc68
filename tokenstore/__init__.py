"""An async, encrypted, race-free store for OAuth tokens on PostgreSQL, MySQL/MariaDB or SQLite."""

from tokenstore.errors import (
    BackendError,
    BackendUnavailableError,
    ConfigurationError,
    ConflictError,
    InvalidInputError,
    LockTimeoutError,
    MissingDependencyError,
    ProviderRefusedError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    RefreshError,
    RefreshTimeoutError,
    SealingError,
    StoreClosedError,
    TableMissingError,
    TamperedError,
    TokensNotStoredError,
    TokenStoreError,
    TransactionRequiredError,
    UnknownBackendError,
    UnknownKeyError,
    UnsupportedOperationError,
)
from tokenstore.keyring import Keyring, generate_key
from tokenstore.records import TokenEntry, TokenRecord
from tokenstore.results import RefreshResult
from tokenstore.store import AuthTokenStore, open_store
from tokenstore.transaction import Transaction

__all__ = [
    "AuthTokenStore",
    "BackendError",
    "BackendUnavailableError",
    "ConfigurationError",
    "ConflictError",
    "InvalidInputError",
    "Keyring",
    "LockTimeoutError",
    "MissingDependencyError",
    "ProviderRefusedError",
    "ProviderUnavailableError",
    "ReauthorizationRequiredError",
    "RefreshError",
    "RefreshResult",
    "RefreshTimeoutError",
    "SealingError",
    "StoreClosedError",
    "TableMissingError",
    "TamperedError",
    "TokenEntry",
    "TokenRecord",
    "TokenStoreError",
    "TokensNotStoredError",
    "Transaction",
    "TransactionRequiredError",
    "UnknownBackendError",
    "UnknownKeyError",
    "UnsupportedOperationError",
    "generate_key",
    "open_store",
]
