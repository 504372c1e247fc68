"""What a strict provider counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Counters", "ProviderStats"]


@dataclass(frozen=True, slots=True)
class ProviderStats:
    """Counters of a :class:`StrictRotatingProvider` since it was made. All of them but ``in_flight`` only grow."""

    requests: int
    """``POST /token`` requests that were received completely, whatever the response."""
    refreshes: int
    """Successful refreshes; each one issued new tokens."""
    replays: int
    """Requests with a used refresh token that succeeded because they came within ``grace`` seconds."""
    reuses: int
    """Requests with a used refresh token or code that were refused, including those for a revoked grant."""
    revoked_grants: int
    """Grants that were revoked: by the reuse of a refresh token or code, through ``/revoke``, or by the user."""
    rejected_clients: int
    """Requests refused with ``invalid_client``."""
    in_flight: int
    """``POST /token`` requests that have taken effect and are not answered yet."""
    max_in_flight: int
    """The highest value that ``in_flight`` has had."""
    refreshes_by_user: Mapping[str, int]
    """Successful refreshes per user; users without one are absent."""
    issues: int
    """Access tokens that were issued without a refresh token: for the client itself, or in an exchange."""


@dataclass(slots=True)
class Counters:
    """The numbers of a :class:`ProviderStats`, as they change."""

    requests: int = 0
    replays: int = 0
    reuses: int = 0
    revoked_grants: int = 0
    rejected_clients: int = 0
    in_flight: int = 0
    max_in_flight: int = 0
    refreshes: Counter[str] = field(default_factory=Counter)
    issues: int = 0

    def snapshot(self) -> ProviderStats:
        """The numbers as they are now."""
        return ProviderStats(
            requests=self.requests,
            refreshes=self.refreshes.total(),
            replays=self.replays,
            reuses=self.reuses,
            revoked_grants=self.revoked_grants,
            rejected_clients=self.rejected_clients,
            in_flight=self.in_flight,
            max_in_flight=self.max_in_flight,
            refreshes_by_user=dict(self.refreshes),
            issues=self.issues,
        )
