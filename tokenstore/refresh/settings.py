"""What the refreshes of one store share: the backend, the keys, and how long a token, a lease or a wait lasts."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

from tokenstore.protocol import Backend
from tokenstore.records import CLOCK_SKEW, SealedRecord, SealedTokens, has_failed, is_leased
from tokenstore.refresh.gates import ProviderGates
from tokenstore.refresh.steps import Validity, View
from tokenstore.refresh.telemetry import Telemetry
from tokenstore.sealing import Sealer

__all__ = ["Settings", "lifetime_when_stored", "skew_of", "validity"]

_US = 1_000_000


@dataclass(frozen=True, slots=True)
class Settings:
    """What the refreshes of one store share.

    Attributes:
        backend: The rows.
        sealer: The keys, and the namespace.
        telemetry: Logs, metrics and spans.
        margin: ``refresh_margin`` in seconds.
        timeout: ``refresh_timeout`` in seconds.
        gates: Limit the calls of each provider.
        values: The store's values, for refreshers that need one.
    """

    backend: Backend
    sealer: Sealer
    telemetry: Telemetry
    margin: float
    timeout: float
    gates: ProviderGates = field(default_factory=ProviderGates)
    values: object = None

    @property
    def lease(self) -> float:
        """How long a lease lasts: longer than the call, so that its result can be written under the lease."""
        return self.timeout * 1.5

    @property
    def wait(self) -> float:
        """How long a refresh waits: until a crashed holder's lease has expired, and another holder's call has ended."""
        return self.timeout * 3

    @property
    def save(self) -> float:
        """How long the write of new tokens is tried before callers get an error. The tries go on after that."""
        return self.timeout * 1.5

    def view(
        self,
        row: SealedRecord,
        lifetime: float | None,
        *,
        margin: float | None = None,
        max_lifetime: float | None = None,
        min_ttl: float = 0.0,
        force_min_age: float = 0.0,
        issues: bool = False,
    ) -> View:
        """Judge a row by the database's clock, so that machines with different clocks agree.

        Args:
            row: The row.
            lifetime: The stated lifetime of its access token, in seconds. None: it counts from the write of the row.
            margin: How long before its expiry the token is due, in seconds. Default: the row's part of ``margin``.
            max_lifetime: How long a token with an unknown expiry is used, in seconds. None: until it is refused.
            min_ttl: How long the token has to remain valid, in seconds.
            force_min_age: Up to which age the row is young, in seconds.
            issues: Whether the provider issues tokens without a refresh token.
        """
        tokens = row.tokens
        expires_at = _refreshed_by(tokens, row.updated_at, max_lifetime)
        if lifetime is None:
            lifetime = lifetime_when_stored(expires_at, row.updated_at)
        if margin is None:
            margin = self._margin_of(row, lifetime)
        skew = skew_of(lifetime)
        if min_ttl > skew:
            # A token that never lives that long would be refreshed by every call.
            skew = min_ttl if min_ttl < lifetime else max(skew, lifetime / 2)
        refresh_expires_at = tokens.refresh_token_expires_at
        return View(
            generation=row.generation,
            validity=Validity.EXPIRED if tokens.is_empty else validity(expires_at, row.as_of, margin, skew),
            refreshable=issues
            or (tokens.refresh_token is not None and (refresh_expires_at is None or refresh_expires_at > row.as_of)),
            lease_holder=row.lease_holder if is_leased(row) else None,
            failure=row.failure if has_failed(row) else None,
            is_young=row.as_of - row.updated_at < force_min_age * _US,
        )

    def _margin_of(self, row: SealedRecord, lifetime: float) -> float:
        """The refresh margin of one generation of a row, in seconds before its access token expires.

        It differs between rows, so that tokens that were issued together are not refreshed together. It is at most the
        last quarter of the token's usable life; otherwise a short-lived token would be due as soon as it is issued.
        """
        skew = skew_of(lifetime)
        margin = min(self.margin, skew + (lifetime - skew) / 4)
        spread = zlib.crc32("\0".join((*row.key, str(row.generation))).encode()) / 2**32
        return skew + max(margin - skew, 0.0) * (0.5 + spread / 2)


def _refreshed_by(tokens: SealedTokens, updated_at: int, max_lifetime: float | None) -> int | None:
    """When an access token expires or, if that is unknown, has been used for its longest time.

    Args:
        tokens: The row's tokens.
        updated_at: When the row was written: microseconds since the epoch.
        max_lifetime: How long a token with an unknown expiry is used, in seconds. None: until it is refused.

    Returns:
        Microseconds since the epoch; None: there is no such time.
    """
    if tokens.access_token_expires_at is None and not tokens.access_token_expiry_known and max_lifetime is not None:
        return updated_at + round(max_lifetime * _US)
    return tokens.access_token_expires_at


def lifetime_when_stored(expires_at: int | None, updated_at: int) -> float:
    """How long an access token had to live when its row was written, in seconds.

    Args:
        expires_at: Microseconds since the epoch, or None: no known expiry.
        updated_at: Microseconds since the epoch.
    """
    return float("inf") if expires_at is None else max((expires_at - updated_at) / _US, 0.0)


def skew_of(lifetime: float) -> float:
    """How long before its expiry an access token of this lifetime counts as expired, both in seconds.

    The clock skew, or half of a shorter life: otherwise a token of a minute would be refreshed by every load.
    """
    return min(CLOCK_SKEW, lifetime / 2)


def validity(expires_at: int | None, now: int, margin: float, skew: float) -> Validity:
    """How long an access token remains valid.

    Args:
        expires_at: Microseconds since the epoch, or None: no known expiry.
        now: Microseconds since the epoch.
        margin: How long before its expiry the token is due, in seconds.
        skew: How long before its expiry it counts as expired, in seconds.
    """
    remaining = float("inf") if expires_at is None else (expires_at - now) / _US
    if remaining <= 0:
        return Validity.EXPIRED
    if remaining <= skew:
        return Validity.SHORT
    return Validity.DUE if remaining <= margin else Validity.FRESH
