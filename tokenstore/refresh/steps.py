"""What a refresh does next: the protocol as pure functions.

:mod:`tokenstore.refresh.attempt` performs each step, and calls the function for the step's result to get the next step.
No function here waits, fails or reads a clock, so that tests can search every interleaving of several refreshes.

A row's *generation* is a number that changes with every write of tokens. Its *lease* is a claim on the row by one
refresh, the lease holder. The refresh *margin* is the time before a token's expiry in which the token is refreshed in
the background.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from tokenstore.records import Failure

__all__ = [
    "Call",
    "Claim",
    "End",
    "Goal",
    "Insert",
    "Outcome",
    "Read",
    "Reread",
    "Save",
    "Settle",
    "Step",
    "Validity",
    "View",
    "Wait",
    "after_call",
    "after_claim",
    "after_insert",
    "after_read",
    "after_reread",
    "after_save",
    "after_settle",
]


class Validity(Enum):
    """How long an access token remains valid."""

    FRESH = "beyond the refresh margin"
    DUE = "valid, but within the refresh margin"
    SHORT = "within the clock skew of its expiry"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class View:
    """The facts about a row on which a refresh decides, from one read.

    Attributes:
        generation: The row's generation.
        validity: How long its access token remains valid.
        refreshable: Whether the provider gives new tokens for the row: it has a refresh token that has not expired, or
            the provider issues tokens without one.
        lease_holder: The holder of a lease that has not expired, or None.
        failure: The failure that forbids a refresh now, or None.
        is_young: Whether the row was written so recently that force refreshes it no more.
    """

    generation: int
    validity: Validity
    refreshable: bool = True
    lease_holder: str | None = None
    failure: Failure | None = None
    is_young: bool = False


@dataclass(frozen=True, slots=True)
class Goal:
    """What a refresh has to achieve.

    Attributes:
        holder: The refresh's name as a lease holder. No other refresh has it.
        urgent: Whether a caller waits for a valid token. If not, the row's token is still valid, and the refresh may be
            left to another process.
        force: Whether the first generation that is read counts as stale, even if its token looks valid.
        stale: The generation whose access token the provider refused, even if the token looks valid.
        seen: The last generation that this refresh has read and rejected.
        min_ttl: How long the access token has to remain valid, in seconds; :attr:`View.validity` takes it into account.
        force_min_age: Up to which age a row is young, in seconds; :attr:`View.is_young` takes it into account.
        issues: Whether the provider issues tokens without a refresh token, so that a missing row gets some.
    """

    holder: str
    urgent: bool = True
    force: bool = False
    stale: int | None = None
    seen: int | None = None
    min_ttl: float = 0.0
    force_min_age: float = 0.0
    issues: bool = False

    @property
    def is_forced(self) -> bool:
        """Whether a token that looks valid may be refreshed."""
        return self.force or self.stale is not None

    def is_met_by(self, row: View) -> bool:
        """Whether the row already has tokens that achieve this goal."""
        if row.generation == self.seen or (not row.is_young and (self.force or row.generation == self.stale)):
            return False
        if self.seen is not None and row.validity is Validity.SHORT:
            return True  # newly issued: a provider may issue tokens that last less than the clock skew
        return row.validity is Validity.FRESH or (self.urgent and row.validity is Validity.DUE)


class Outcome(Enum):
    """How a refresh ends."""

    REFRESHED = "this refresh stored new tokens"
    SERVED = "the row already has valid tokens"
    MISSING = "there is no row"
    FAILED = "the refresh token is not usable, or the provider failed"
    LEFT = "another process is refreshing, and no caller here waits"


@dataclass(frozen=True, slots=True)
class Read:
    """Read the row."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait a while for another refresh's lease to end, then read the row."""


@dataclass(frozen=True, slots=True)
class Insert:
    """Insert an empty row, without a lease, if there is still none; then read it."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Claim the lease of this generation."""

    generation: int


@dataclass(frozen=True, slots=True)
class Call:
    """Call the provider with this generation's refresh token, or have tokens issued for an empty row.

    The refresh holds the lease, but no connection or lock.
    """

    generation: int


@dataclass(frozen=True, slots=True)
class Save:
    """Write the tokens that the provider issued for this generation's refresh token."""

    generation: int


@dataclass(frozen=True, slots=True)
class Reread:
    """Read the row after a refused write of new tokens.

    Attributes:
        generation: The generation that was refreshed.
        wait: Whether to wait a while first, because another refresh holds the row's lease.
    """

    generation: int
    wait: bool = False


@dataclass(frozen=True, slots=True)
class Settle:
    """Release the lease, and store the failure for later callers."""

    generation: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class End:
    """The refresh has ended."""

    outcome: Outcome
    failure: Failure | None = None


Step = Read | Wait | Insert | Claim | Call | Save | Reread | Settle | End

_NO_REFRESH_TOKEN = Failure("no_refresh_token")


def after_read(goal: Goal, row: View | None) -> tuple[Goal, Step]:
    """Decide on the row as it was read."""
    if row is None:
        return goal, Insert() if goal.issues and goal.urgent else End(Outcome.MISSING)
    if goal.is_met_by(row):
        return goal, End(Outcome.SERVED)
    goal = replace(goal, force=False, seen=row.generation)
    if row.failure is not None:
        return goal, End(Outcome.FAILED, row.failure)
    if row.lease_holder == goal.holder:
        return goal, Call(row.generation)  # the claim was granted, and the database's answer was lost
    if row.lease_holder is not None:
        return goal, Wait() if goal.urgent else End(Outcome.LEFT)
    if not row.refreshable:
        return goal, End(Outcome.FAILED, _NO_REFRESH_TOKEN)
    return goal, Claim(row.generation)


def after_insert(_: Insert) -> Step:
    """Read the row, whoever inserted it. Only a claim of its lease allows a call of the provider."""
    return Read()


def after_claim(step: Claim, *, granted: bool) -> Step:
    """Call the provider if the claim was granted, which also shows that the database accepts small writes.

    Not granted means that another refresh was faster, or that the database's answer was lost.
    """
    return Call(step.generation) if granted else Read()


def after_call(step: Call, failure: Failure | None) -> Step:
    """Save the tokens that the provider issued, or store its failure."""
    return Save(step.generation) if failure is None else Settle(step.generation, failure)


def after_save(step: Save, *, saved: bool) -> Step:
    """If the write was refused, read the row: it has changed, another refresh has its lease, or an answer was lost."""
    return End(Outcome.REFRESHED) if saved else Reread(step.generation)


def after_reread(goal: Goal, step: Reread, row: View | None) -> tuple[Goal, Step]:
    """Repeat the write if the row still has the generation that was refreshed.

    If the generation has changed, the row has newer tokens, or these tokens: an earlier write was carried out.
    """
    if row is None or row.generation != step.generation:
        return after_read(replace(goal, seen=step.generation), row)
    if row.lease_holder not in (None, goal.holder):
        return goal, Reread(step.generation, wait=True)
    return goal, Save(step.generation)


def after_settle(step: Settle, *, settled: bool) -> Step:
    """End with the failure if it was stored. If the database refused it, there are newer tokens or another holder.

    ``settled`` may be False only if the database refused the release, not if its answer was lost. Otherwise the next
    read could show this refresh's own lease, and the refresh would call the provider again.
    """
    return End(Outcome.FAILED, step.failure) if settled else Read()
