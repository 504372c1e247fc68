"""What ``refresh_due`` reports about each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokenstore.errors import TokenStoreError

__all__ = ["RefreshOutcome", "RefreshResult"]

RefreshOutcome = Literal["refreshed", "not_due", "busy", "gone", "failed"]
"""What happened to a row that ``refresh_due`` found."""


@dataclass(frozen=True, slots=True)
class RefreshResult:
    """What ``refresh_due`` did with one row.

    Attributes:
        provider: The row's provider.
        user_id: The row's user.
        outcome: ``refreshed``; ``not_due`` (another process had refreshed the row already); ``busy`` (another process
            is refreshing it); ``gone`` (the row was deleted); ``failed``.
        error: Why the refresh failed, or None.
    """

    provider: str
    user_id: str
    outcome: RefreshOutcome
    error: TokenStoreError | None = None
