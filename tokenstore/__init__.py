"""An async, encrypted, race-free store for OAuth tokens on PostgreSQL, MySQL/MariaDB or SQLite."""

from tokenstore.errors import (
    BackendError,
    BackendUnavailableError,
    ConfigurationError,
    ConflictError,
    InvalidInputError,
    LockTimeoutError,
    MissingDependencyError,
    SealingError,
    StoreClosedError,
    TableMissingError,
    TamperedError,
    TokenStoreError,
    TransactionRequiredError,
    UnknownBackendError,
    UnknownKeyError,
    UnsupportedOperationError,
)
from tokenstore.keyring import Keyring, generate_key
from tokenstore.records import TokenEntry, TokenRecord
from tokenstore.store import AuthTokenStore, Transaction, open_store

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
    "SealingError",
    "StoreClosedError",
    "TableMissingError",
    "TamperedError",
    "TokenEntry",
    "TokenRecord",
    "TokenStoreError",
    "Transaction",
    "TransactionRequiredError",
    "UnknownBackendError",
    "UnknownKeyError",
    "UnsupportedOperationError",
    "generate_key",
    "open_store",
]
