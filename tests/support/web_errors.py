"""The errors that become responses, and some that do not."""

from __future__ import annotations

from typing import TypeVar

from tokenstore import (
    BackendUnavailableError,
    ConfigurationError,
    ConflictError,
    InsufficientScopeError,
    LockTimeoutError,
    ProviderRefusedError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    RefreshError,
    RefreshTimeoutError,
    TamperedError,
    TokensMissingError,
    TokensNotStoredError,
    TokenStoreError,
)

__all__ = ["LOGINS", "OTHERS", "OUTAGES", "named", "of_row"]

E = TypeVar("E", bound=RefreshError)


def of_row(error: E, provider: str = "github") -> E:
    """The error as a caller of the store gets it."""
    error.provider, error.user_id, error.account = provider, "some-user", "some-account"
    return error


LOGINS: list[RefreshError] = [
    of_row(ReauthorizationRequiredError("some text")),
    of_row(TokensMissingError("some text")),
    of_row(InsufficientScopeError("some text", missing=["a"], granted=[])),
]
"""The user has to log in."""

OUTAGES: list[tuple[TokenStoreError, str]] = [
    (of_row(ProviderUnavailableError("some text", retry_after=7.2)), "8"),
    (of_row(ProviderRefusedError("some text")), "1"),
    (of_row(RefreshTimeoutError("some text")), "1"),
    (of_row(TokensNotStoredError("some text", records=[])), "1"),
    (BackendUnavailableError("some text"), "1"),
    (LockTimeoutError("some text"), "1"),
    (ConflictError("some text"), "1"),
]
"""The provider or the database cannot serve now; with the seconds of ``Retry-After``."""

OTHERS: list[Exception] = [TamperedError("some text"), ConfigurationError("some text"), ValueError("some text")]
"""The application's own."""


def named(value: object) -> str | None:
    """The name of an error in the id of a test."""
    return type(value).__name__ if isinstance(value, Exception) else None
