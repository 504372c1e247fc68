"""What ``refresh_due`` reports about each row, and what ``on_error`` gets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tokenstore.errors import TokenStoreError

__all__ = ["ProviderCallFailure", "RefreshOutcome", "RefreshResult"]

RefreshOutcome = Literal["refreshed", "not_due", "busy", "gone", "dead", "deferred", "failed"]
"""What happened to a row that ``refresh_due`` found."""


@dataclass(frozen=True, slots=True)
class RefreshResult:
    """What ``refresh_due`` did with one row.

    Attributes:
        provider: The row's provider.
        user_id: The row's user.
        account: The row's account; empty for a user who has one.
        outcome: ``refreshed``; ``not_due`` (another process had refreshed the row already); ``busy`` (another process
            is refreshing it); ``gone`` (the row was deleted); ``dead`` (the refresh token has expired, or
            another process has just learned that the user has to log in again: no call was made); ``deferred`` (an
            earlier call failed, and the provider is not called again before the row's retry time); ``failed`` (a new
            failure).
        error: With ``dead``, ``deferred`` and ``failed``: what ``load_fresh_tokens`` would raise. Else None.
    """

    provider: str
    user_id: str
    account: str
    outcome: RefreshOutcome
    error: TokenStoreError | None = None


@dataclass(frozen=True, slots=True)
class ProviderCallFailure:
    """A refresher's exception, as the callback ``on_error`` gets it. Its ``repr`` does not show the exception.

    The errors of callers say the exception's type and place alone, because its text, its attributes, and the local
    variables of its traceback may contain tokens and the client's secret. The same holds for a log of this exception.

    Attributes:
        provider: The row's provider.
        user_id: The row's user.
        account: The row's account; empty for a user who has one.
        operation: ``refresh``, or ``revoke`` for a call of the refresher's ``revoke``.
        error: The exception, with its causes and its traceback.
    """

    provider: str
    user_id: str
    account: str
    operation: Literal["refresh", "revoke"]
    error: BaseException = field(repr=False)
