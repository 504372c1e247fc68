"""The refresh protocol as pure functions: what happens to a row, and what a refresh does next.

The first half is what one statement of a backend does to a row; the memory backend runs it as it stands, the others
are tested against that. The second half is the refresh itself: :mod:`tokenstore.refresh` performs each step and asks
here for the next one. Nothing in this module waits, fails or reads a clock, so that tests can search every
interleaving of several refreshes. ``docs/refresh.md`` tells the story.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Generic, TypeVar

from tokenstore.records import Failure

__all__ = [
    "Call",
    "Claim",
    "End",
    "Goal",
    "Outcome",
    "Read",
    "Reread",
    "Row",
    "Save",
    "Settle",
    "Step",
    "Validity",
    "View",
    "Wait",
    "after_call",
    "after_claim",
    "after_read",
    "after_reread",
    "after_save",
    "after_settle",
    "claimed",
    "completed",
    "released",
    "written",
]

T = TypeVar("T")

# What a statement does to a row. Times are whole numbers on the database's clock, in whatever unit its caller counts.


@dataclass(frozen=True, slots=True)
class Row(Generic[T]):
    """A stored row, as far as the protocol is concerned."""

    tokens: T
    generation: int
    lease_holder: str | None = None
    lease_expires_at: int | None = None
    failure_code: str | None = None
    retry_at: int | None = None

    def is_leased(self, now: int) -> bool:
        """Whether somebody's lease is live."""
        return self.lease_expires_at is not None and self.lease_expires_at > now

    def has_failed(self, now: int) -> bool:
        """Whether a failure forbids a refresh: for good, or for the time being."""
        return self.failure_code is not None and (self.retry_at is None or self.retry_at > now)


def written(row: Row[T], tokens: T) -> Row[T]:
    """New tokens: the next generation, without lease and failure."""
    return Row(tokens, row.generation + 1)


def claimed(row: Row[T], *, generation: int, holder: str, now: int, duration: int) -> Row[T] | None:
    """A lease: refused (None) on another generation, beside a live lease, and while a failure holds."""
    if row.generation != generation or row.is_leased(now) or row.has_failed(now):
        return None
    return replace(row, lease_holder=holder, lease_expires_at=now + duration)


def completed(row: Row[T], tokens: T, *, generation: int, holder: str, now: int) -> Row[T] | None:
    """The tokens that a refresh of this generation brought, unless somebody else holds a live lease.

    A holder that lost its lease may still have the only copy of a live pair; what it refreshed from is still what the
    row holds.
    """
    if row.generation != generation or (row.is_leased(now) and row.lease_holder != holder):
        return None
    return written(row, tokens)


def released(
    row: Row[T], *, generation: int, holder: str, failure: tuple[str, int | None] | None = None
) -> Row[T] | None:
    """The end of this holder's lease, with a code and a time to retry (None: never) for later callers, or nothing."""
    if row.generation != generation or row.lease_holder != holder:
        return None
    code, retry_at = failure or (None, None)
    return replace(row, lease_holder=None, lease_expires_at=None, failure_code=code, retry_at=retry_at)


# What a refresh sees, wants, and does next.


class Validity(Enum):
    """How long an access token is still good for."""

    FRESH = "beyond the refresh margin"
    DUE = "valid, but within the refresh margin"
    SHORT = "within the clock skew of its expiry"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class View:
    """A row as one read shows it.

    Attributes:
        generation: The row's.
        validity: Of its access token.
        refreshable: Whether there is a refresh token that has not expired.
        lease_holder: Whose lease is live, or None.
        failure: What forbids a refresh now, or None.
    """

    generation: int
    validity: Validity
    refreshable: bool = True
    lease_holder: str | None = None
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Goal:
    """What a refresh is for.

    Attributes:
        holder: Its name on leases, which no other refresh has.
        urgent: Whether a caller waits for a valid token; else the row's is valid still, and the refresh may be left to
            somebody else.
        force: The first generation that is read counts as stale, valid or not.
        stale: The generation whose access token somebody found refused, valid or not.
        seen: The last generation that this refresh has read and found wanting.
    """

    holder: str
    urgent: bool = True
    force: bool = False
    stale: int | None = None
    seen: int | None = None

    def is_met_by(self, row: View) -> bool:
        """Whether this row is what the refresh was for."""
        if self.force or row.generation in (self.stale, self.seen):
            return False
        if self.seen is not None and row.validity is Validity.SHORT:
            return True  # as new as it gets: a provider may issue tokens that last less than the skew
        return row.validity is Validity.FRESH or (self.urgent and row.validity is Validity.DUE)


class Outcome(Enum):
    """How a refresh ends."""

    REFRESHED = "this refresh stored new tokens"
    SERVED = "the row already holds what was wanted"
    MISSING = "there is no row"
    FAILED = "the refresh token is no good, or the provider is not"
    LEFT = "somebody else is refreshing, and nobody here waits"


@dataclass(frozen=True, slots=True)
class Read:
    """Read the row."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Let somebody else's lease go on for a while, then read the row."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Claim the lease of this generation."""

    generation: int


@dataclass(frozen=True, slots=True)
class Call:
    """Call the provider with this generation's refresh token, holding the lease and nothing else."""

    generation: int


@dataclass(frozen=True, slots=True)
class Save:
    """Write the tokens that the provider issued for this generation's refresh token."""

    generation: int


@dataclass(frozen=True, slots=True)
class Reread:
    """With tokens in hand that could not be written: read the row, after a while if somebody else holds its lease."""

    generation: int
    wait: bool = False


@dataclass(frozen=True, slots=True)
class Settle:
    """Release the lease, leaving the failure to later callers."""

    generation: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class End:
    """Nothing more to do."""

    outcome: Outcome
    failure: Failure | None = None


Step = Read | Wait | Claim | Call | Save | Reread | Settle | End

_NO_REFRESH_TOKEN = Failure("no_refresh_token")


def after_read(goal: Goal, row: View | None) -> tuple[Goal, Step]:
    """Decide from the row."""
    if row is None:
        return goal, End(Outcome.MISSING)
    if goal.is_met_by(row):
        return goal, End(Outcome.SERVED)
    goal = replace(goal, force=False, seen=row.generation)
    if row.failure is not None:
        return goal, End(Outcome.FAILED, row.failure)
    if row.lease_holder == goal.holder:
        return goal, Call(row.generation)  # the answer to the claim was lost
    if row.lease_holder is not None:
        return goal, Wait() if goal.urgent else End(Outcome.LEFT)
    if not row.refreshable:
        return goal, End(Outcome.FAILED, _NO_REFRESH_TOKEN)
    return goal, Claim(row.generation)


def after_claim(step: Claim, *, granted: bool) -> Step:
    """Granted, which also shows that the database can be written; or somebody else was quicker; or nobody knows."""
    return Call(step.generation) if granted else Read()


def after_call(step: Call, failure: Failure | None) -> Step:
    """The provider issued tokens, or failed."""
    return Save(step.generation) if failure is None else Settle(step.generation, failure)


def after_save(step: Save, *, saved: bool) -> Step:
    """Written; or the row has changed, or the lease was lost, or the answer was."""
    return End(Outcome.REFRESHED) if saved else Reread(step.generation)


def after_reread(goal: Goal, step: Reread, row: View | None) -> tuple[Goal, Step]:
    """Tokens of this generation are void once the row has another: newer ones, or these same ones."""
    if row is None or row.generation != step.generation:
        return after_read(replace(goal, seen=step.generation), row)
    if row.lease_holder not in (None, goal.holder):
        return goal, Reread(step.generation, wait=True)
    return goal, Save(step.generation)


def after_settle(step: Settle, *, settled: bool) -> Step:
    """The failure counts if it was this generation's; else there are newer tokens, or another holder, to look at.

    Not settled means that the database refused, never that nobody knows: the lease that is read then could be this
    refresh's own, which would call the provider again.
    """
    return End(Outcome.FAILED, step.failure) if settled else Read()
