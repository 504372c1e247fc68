"""What a synchronous store and its transactions share.

Each method is one call of the async method of the same name, which has the logic and the documentation. They are
written out, and not generated, so that type checkers, editors and readers see each signature;
``tests/sync/test_same_api.py`` compares them with the async ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import Any, Literal, TypeGuard, TypeVar, overload

from tokenstore.operations import TokenOperations as AsyncTokenOperations
from tokenstore.records import CLOCK_SKEW, RefreshableRecord, TokenRecord
from tokenstore.tracebacks import clears_locals

__all__ = ["TokenOperations"]

T = TypeVar("T")


class TokenOperations(ABC):
    """What a synchronous store and its transactions have in common."""

    @property
    @abstractmethod
    def _tokens(self) -> AsyncTokenOperations:
        """The async store or transaction."""

    @abstractmethod
    def _run(self, work: Callable[[AsyncTokenOperations], Awaitable[T]]) -> T:
        """Run a call of the async store or transaction in the loop thread, and wait for its result."""

    @overload
    def store_tokens(
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
    def store_tokens(
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
    def store_tokens(
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
        """Insert or replace the tokens of one user: see :meth:`tokenstore.AuthTokenStore.store_tokens`."""
        row = provider, user_id, access_token, refresh_token, access_token_expires_at, refresh_token_expires_at
        if if_absent:
            return self._run(
                lambda tokens: tokens.store_tokens(
                    *row, account=account, extra=extra, metadata=metadata, if_absent=True
                )
            )
        self._run(lambda tokens: tokens.store_tokens(*row, account=account, extra=extra, metadata=metadata))
        return None

    @clears_locals
    def store_token_response(
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
        """Store the token response of a login: see :meth:`tokenstore.AuthTokenStore.store_token_response`."""
        return self._run(
            lambda tokens: tokens.store_token_response(
                provider,
                user_id,
                response,
                account=account,
                metadata=metadata,
                keep_refresh_token=keep_refresh_token,
                if_absent=if_absent,
            )
        )

    @clears_locals
    def update_metadata(
        self, provider: str, user_id: str, changes: Mapping[str, Any], *, account: str = ""
    ) -> dict[str, Any] | None:
        """Change the application's own fields: see :meth:`tokenstore.AuthTokenStore.update_metadata`."""
        return self._run(lambda tokens: tokens.update_metadata(provider, user_id, changes, account=account))

    @clears_locals
    def load_tokens(
        self, provider: str, user_id: str, for_update: bool = False, *, account: str = ""
    ) -> TokenRecord | None:
        """Read the tokens of one user: see :meth:`tokenstore.AuthTokenStore.load_tokens`."""
        return self._run(lambda tokens: tokens.load_tokens(provider, user_id, for_update, account=account))

    @clears_locals
    def delete_tokens(self, provider: str, user_id: str, *, account: str = "") -> bool:
        """Delete the tokens of one user: see :meth:`tokenstore.AuthTokenStore.delete_tokens`."""
        return self._run(lambda tokens: tokens.delete_tokens(provider, user_id, account=account))

    @clears_locals
    def is_access_token_valid(self, token_record: Mapping[str, Any], clock_skew_seconds: float = CLOCK_SKEW) -> bool:
        """Whether the access token is valid: see :meth:`tokenstore.AuthTokenStore.is_access_token_valid`."""
        return self._tokens.is_access_token_valid(token_record, clock_skew_seconds)

    @overload
    def is_refresh_token_valid(self, token_record: TokenRecord) -> TypeGuard[RefreshableRecord]: ...
    @overload
    def is_refresh_token_valid(self, token_record: Mapping[str, Any]) -> bool: ...
    @clears_locals
    def is_refresh_token_valid(self, token_record: Mapping[str, Any]) -> bool:
        """Whether a refresh token is valid: see :meth:`tokenstore.AuthTokenStore.is_refresh_token_valid`."""
        return self._tokens.is_refresh_token_valid(token_record)

    @clears_locals
    def needs_reseal(self, token_record: Mapping[str, Any]) -> bool:
        """Whether a row has another key than the primary one: see :meth:`tokenstore.AuthTokenStore.needs_reseal`."""
        return self._tokens.needs_reseal(token_record)
