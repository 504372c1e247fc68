"""One refresh of one row: it performs the steps that :mod:`tokenstore.refresh.steps` decides on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from tokenstore.errors import (
    BackendError,
    ConflictError,
    LockTimeoutError,
    RefreshTimeoutError,
    RowTooLargeError,
    StoreClosedError,
)
from tokenstore.records import Failure, RefreshableRecord, SealedTokens, TokenKey, TokenRecord
from tokenstore.refresh.backoff import Backoff
from tokenstore.refresh.callables import call_provider
from tokenstore.refresh.failures import (
    BRIEF_FAILURE,
    OUTCOME_OF_ERROR,
    RefresherFailure,
    error_for,
    failure_of,
    not_stored,
)
from tokenstore.refresh.issuing import blank_record, preparation_of, subject_of, without_end
from tokenstore.refresh.kept import kept_at_refresh, lifetime_of, lifetime_setting
from tokenstore.refresh.lease_watch import LeaseWatch
from tokenstore.refresh.loop_end import protect_lease_statement, protect_provider_call, protect_write
from tokenstore.refresh.protected_task import Protection
from tokenstore.refresh.responses import NewTokens, read_response
from tokenstore.refresh.rows import SeenRow, new_holder
from tokenstore.refresh.settings import Settings
from tokenstore.refresh.statements import TRANSIENT_ERRORS, RowStatements
from tokenstore.refresh.steps import (
    Call,
    Claim,
    End,
    Goal,
    Insert,
    Outcome,
    Read,
    Reread,
    Save,
    Settle,
    Step,
    View,
    Wait,
    after_call,
    after_claim,
    after_insert,
    after_read,
    after_reread,
    after_save,
    after_settle,
)
from tokenstore.refresh.telemetry import RefreshReport
from tokenstore.tracebacks import clear_locals
from tokenstore.validation import RequestedRow

__all__ = ["Attempt", "AttemptResult", "LoadSubject", "Refresh"]

Refresh = Callable[[RefreshableRecord], Awaitable[Mapping[str, Any]] | Mapping[str, Any]]
"""Calls the provider with a record's refresh token, and returns the token response (RFC 6749 section 5.1).

A plain function runs in a thread of its own.
"""

LoadSubject = Callable[[TokenKey], Awaitable[TokenRecord]]
"""Loads the row whose token is exchanged, with an access token that is valid for the time of a provider's call."""


@dataclass(frozen=True, slots=True)
class AttemptResult:
    """How a refresh ended. Each caller opens the row, or creates the error, for itself: callers share no object.

    Attributes:
        outcome: How it ended.
        row: The row at its end, if it did not fail.
        error: Creates the error of a refresh that failed.
        known: A failure that the row had already: if it failed, then without a call of the provider.
    """

    outcome: Outcome
    row: RequestedRow | None = None
    error: Callable[[], BaseException] | None = None
    known: Failure | None = None


class Attempt:
    """One refresh of one row, which the callers in this process share.

    Args:
        settings: The store's settings.
        key: The row.
        refresh: Calls the provider.
        goal: What the refresh has to achieve; callers that join may change it.
        step: The first step.
        seen: The row from which the first step follows, if one was read.
        load_subject: Loads the row whose token the provider exchanges for this row's.
        margin: Seconds before a token's expiry in which it is due. Default: the row's own refresh margin.

    Attributes:
        protection: The protection of the task that runs the attempt: from the claim on, a cancellation from outside,
            such as the end of the event loop, waits for the attempt to end.
        result: Set once, however the attempt ends. It never holds an exception.
        report: What is logged and measured.
        settled: Whether this attempt's own refresher failed, and that failure ended the attempt.
        raised: What the refresher raised, in each call that failed.
        unsaved: New tokens that could not be written before the store was closed.
        recovers: Whether the row's last refresh had failed.
    """

    def __init__(
        self,
        settings: Settings,
        key: TokenKey,
        refresh: Refresh,
        goal: Goal,
        step: Step,
        seen: SeenRow | None = None,
        *,
        load_subject: LoadSubject,
        margin: float | None = None,
    ) -> None:
        self.key = key
        self.goal = goal
        self.protection = Protection()
        self.result: asyncio.Future[AttemptResult] = asyncio.get_running_loop().create_future()
        self.report = RefreshReport(key, background=not goal.urgent)
        self.settled = False
        self.raised: list[BaseException] = []
        self.unsaved: TokenRecord | None = None
        self.recovers = False
        self._settings = settings
        self._statements = RowStatements(settings, key, self.protection)
        self._lease_watch = LeaseWatch(settings, key)
        self._refresh = refresh
        self._step = step
        self._seen = seen
        self._margin = margin
        self._default_lifetime = lifetime_setting(refresh, "default_lifetime")
        self._max_lifetime = lifetime_setting(refresh, "max_lifetime")
        self._load_subject = load_subject
        self._subject: TokenRecord | None = None
        self._prepared: object = None
        self._deadline = time.monotonic() + settings.wait
        self._leased_until = float("-inf")
        self._claimed = False
        self._backoff = Backoff()
        # Separate from _backoff, which a successful read resets; otherwise a read-only server would be retried past its
        # limit.
        self._claim_backoff = Backoff()
        self._sealed: SealedTokens | None = None
        self._save_by = float("inf")
        self._refresher_failure: RefresherFailure | None = None
        self._gate = settings.gates.of(key.provider)
        self._admitted = False
        self._closing = False

    def join(self, goal: Goal) -> None:
        """Serve one more caller."""
        mine = self.goal
        self.report.joined += 1
        self.goal = replace(
            mine,
            urgent=mine.urgent or goal.urgent,
            # If a generation was already read and rejected, the result will be newer: a caller that joins with `force`
            # needs no second refresh.
            force=mine.force or (goal.force and mine.seen is None),
            stale=mine.stale if goal.stale is None else goal.stale,
            min_ttl=max(mine.min_ttl, goal.min_ttl),
            force_min_age=min((one.force_min_age for one in (mine, goal) if one.is_forced), default=0.0),
        )

    def close(self, save_by: float) -> None:
        """Stop waiting for other refreshes. New tokens are tried to be written until ``save_by``."""
        self._closing = True
        self._save_by = min(self._save_by, save_by)

    async def run(self) -> AttemptResult:
        """Perform the refresh. Whatever happens, :attr:`result` is set."""
        try:
            with self._settings.telemetry.refresh(self.report):
                result = self._conclude(await self._perform())
        except asyncio.CancelledError:  # before the provider was called
            self._publish(_failed(lambda: StoreClosedError(f"{self.key}: the event loop is closing")))
            raise
        except BaseException as error:  # noqa: BLE001 - the callers raise it
            clear_locals(error)
            failure, place = error, error.__traceback__
            # All callers share this one object, as its type's constructor is unknown. Each raises it with the traceback
            # from here, so that the traceback does not grow.
            result = _failed(lambda: failure.with_traceback(place))
        finally:
            self._leave_gate()
        self._publish(result)
        return result

    async def _perform(self) -> End:
        while not isinstance(self._step, End):
            try:
                if self.protection.interrupted and isinstance(self._step, Read | Wait | Insert | Claim | Call):
                    await self._leave()
                self._protect(self._step)
                self._step = await self._take(self._step)
                if isinstance(self._step, Wait | Save | Settle | End):  # the provider is not called next
                    self._leave_gate()
            except asyncio.CancelledError:
                if not isinstance(self._step, Save | Reread):
                    self.report.outcome = Outcome.LEFT.name.lower()
                    raise
                # The end of the event loop has cancelled a statement. Go on: the new tokens may be the only copy.
                self.protection.guard()
                await self._backoff.pause()
        self.protection.guard()  # until the engine has called the callbacks
        return self._step

    def _protect(self, step: Step) -> None:
        """Set for how long a cancellation from outside has to wait during this step."""
        if isinstance(step, Wait | Insert) or (isinstance(step, Read) and not self._claimed):
            self.protection.lift()
        elif isinstance(step, Read | Claim):
            protect_lease_statement(self.protection)
        elif isinstance(step, Call):
            protect_provider_call(self.protection, self._settings.timeout)
        elif isinstance(step, Save | Reread):
            protect_write(self.protection)
        else:  # the provider's failure has to be stored; this step has a time limit of its own
            self.protection.guard()

    async def _leave(self) -> NoReturn:
        """End before the provider is called, and release the lease, so that the next process need not wait for it."""
        if self._claimed:
            protect_lease_statement(self.protection)
            with suppress(BackendError):
                await self._release(None)
        raise asyncio.CancelledError

    async def _take(self, step: Step) -> Step:
        """Perform one step, and return the next one."""
        match step:
            case Read():
                return await self._read()
            case Wait():
                return await self._wait()
            case Insert():
                return await self._insert(step)
            case Claim():
                return await self._claim(step)
            case Call():
                # If the lease could end before the call does, another process could use the refresh token, too.
                if self._leased_until - time.monotonic() < self._settings.timeout:
                    return await self._claim_anew()
                return after_call(step, await self._call())
            case Save():
                return await self._save(step)
            case Reread():
                return await self._reread(step)
            case Settle():
                return await self._settle(step)
            case End():
                return step

    # -- before the call of the provider -------------------------------------------------------------

    async def _read(self) -> Step:
        # No deadline check here: another process may have stored fresh tokens meanwhile.
        try:
            row = await self._get()
        except TRANSIENT_ERRORS as error:
            await self._backoff.pause(error)
            return Read()
        self.goal, step = after_read(self.goal, self._view(row))
        return step

    async def _wait(self) -> Step:
        self._check_time()
        began = time.monotonic()
        await self._lease_watch.wait(self._last.row)
        self.report.waited += time.monotonic() - began
        return Read()

    async def _insert(self, step: Insert) -> Step:
        self._check_time()
        try:
            await self._statements.insert_empty()
        except TRANSIENT_ERRORS as error:
            await self._claim_backoff.pause(error)
        return after_insert(step)

    async def _claim(self, step: Claim) -> Step:
        self._check_time()
        # Not only after the claim: a row that does not open would keep its lease.
        _ = self._record()
        await self._find_subject()
        await self._prepare()
        if not self._admitted and (pause := await self._enter_gate()):
            return End(Outcome.FAILED, pause)
        # From before the statement is sent: the database grants the lease later, so it cannot end sooner.
        self._leased_until = time.monotonic() + self._settings.lease
        self._claimed = True  # until the database's answer says otherwise
        try:
            granted = await self._statements.claim(step.generation, self.goal.holder)
        except LockTimeoutError:
            granted = self._claimed = False  # the transaction that holds the row's lock may be refreshing the row
        except TRANSIENT_ERRORS as error:
            await self._claim_backoff.pause(error)
            granted = False  # or the database's answer was lost
        else:
            self._claimed = granted
            self._claim_backoff.reset()
        return after_claim(step, granted=granted)

    async def _find_subject(self) -> None:
        """Load the row whose token is exchanged, if there is one.

        Before the gate and the claim: this may be a refresh of its own, and may fail. Then the user has to log in for
        the subject, and nothing is wrong with this row.
        """
        subject = subject_of(self._refresh, self.key)
        if subject is None:
            return
        self._leave_gate()  # the subject's refresh may have to pass it
        self.protection.lift()
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                self._subject = await self._load_subject(subject)
        except TimeoutError:
            raise RefreshTimeoutError(
                f"{self.key}: {subject} got no valid token within {self._settings.wait:g} s; repeat the call"
            ) from None
        self._protect(Claim(self._last.row.generation))

    async def _prepare(self) -> None:
        """Load what the refresher needs. Before the claim: this may fail, and nothing is wrong with this row then."""
        if self._prepared is None and (preparation := preparation_of(self._refresh, self._settings.values, self.key)):
            self.protection.lift()
            self._prepared = await preparation
            self._protect(Claim(self._last.row.generation))

    async def _enter_gate(self) -> Failure | None:
        """Wait for a place among the calls of the provider, without a lease. Returns the failure if it is paused."""
        if pause := self._gate.pause(self._last.now()):
            return pause
        self.protection.lift()
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                self._admitted = await self._gate.enter()
        except TimeoutError:
            raise RefreshTimeoutError(
                f"{self.key}: {self._gate.in_flight} calls of the provider are in flight, and none ended within "
                f"{self._settings.wait:g} s; repeat the call, or raise provider_concurrency"
            ) from None
        pause = self._gate.pause(self._last.now())
        if pause is None:
            self._check_time()
            self._protect(Claim(self._last.row.generation))
        return pause

    def _leave_gate(self) -> None:
        if self._admitted:
            self._admitted = False
            self._gate.leave(self.result.get_loop())

    def _leave_gate_after(self, call: asyncio.Future[Any]) -> None:
        """Keep the place among the calls of the provider until a call that was given up, in a thread, has ended."""
        gate, loop = self._gate, self.result.get_loop()
        if self._admitted:
            self._admitted = False
            call.add_done_callback(lambda _: gate.leave(loop))
        call.add_done_callback(self._note_late_response)

    def _note_late_response(self, call: asyncio.Future[Any]) -> None:
        if not call.cancelled() and call.exception() is None:
            message = "a refresher answered after refresh_timeout, and its tokens are lost: its own timeout is too long"
            self._settings.telemetry.problem(self.key, "late_response", message)

    async def _claim_anew(self) -> Step:
        """Replace a lease whose grant took so long that it could end before the call of the provider does."""
        with suppress(BackendError):
            await self._release(None)
        self._take_new_name()
        return Read()

    # -- the call of the provider --------------------------------------------------------------------

    async def _call(self) -> Failure | None:
        """Call the provider. Seal the new tokens at once, or return the failure that the row gets."""
        record, issued_at = self._record(), self._last.now()
        self.recovers |= self._last.row.failure is not None
        try:
            new = await self._run_refresher(record, issued_at)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - the row must not stay leased
            # A CancelledError is the refresher's own: cancellations from outside are refused during the call.
            self.raised.append(error)
            failed = failure_of(error, record, self._refresh)
            self._refresher_failure = failed = without_end(failed) if self.goal.issues else failed
            self.report.raised = failed.raised
            self._count(failed)
            return failed.failure
        except BaseException:
            with suppress(BackendError):
                await self._release(BRIEF_FAILURE)
            raise
        finally:
            # Timers and tasks that the refresher left behind must not cancel the write of the new tokens.
            self.protection.disown()
        self._gate.succeeded()
        self._sealed = replace(new.sealed(self._settings.sealer, self.key), issued=self.goal.issues)
        self._save_by = min(self._save_by, time.monotonic() + self._settings.save)
        self._backoff.reset()
        return None

    def _count(self, failed: RefresherFailure) -> None:
        """Tell the gate how the call ended; several outages begin a pause."""
        if not failed.outage:
            self._gate.succeeded()
            return
        code = failed.failure.code
        length = self._gate.failed(self.key.user_id, code, self._last.now(), failed.requested)
        if length is not None:
            self._settings.telemetry.paused(self.key, "provider_paused", code, length)

    async def _run_refresher(self, record: TokenRecord, issued_at: int) -> NewTokens:
        with self._settings.telemetry.provider_call(self.report):
            async with asyncio.timeout(self._settings.timeout):
                given: list[object] = [RefreshableRecord(deepcopy(record).items())]  # which it may change
                if self._subject is not None:
                    given.append(RefreshableRecord(self._subject.items()))
                if self._prepared is not None:
                    given.append(self._prepared)
                response: object = await call_provider(self._refresh, given, self._leave_gate_after)
        return read_response(response, kept_at_refresh(record, self._default_lifetime), issued_at)

    async def _settle(self, step: Settle) -> Step:
        try:
            self.settled = await self._release(step.failure)
        except BackendError as error:
            self._settings.telemetry.problem(self.key, "not_settled", "a failure could not be stored", error)
            if step.failure.retry_in is None:
                raise  # only the row shows whether it still has the refresh token that the provider refused
            self.settled = True  # the lease expires by itself
        if not self.settled:
            self._take_new_name()
        return after_settle(step, settled=self.settled)

    # -- the write of new tokens ---------------------------------------------------------------------

    async def _save(self, step: Save) -> Step:
        tried_at = time.monotonic()
        try:
            saved = await self._statements.complete(
                self._issued, step.generation, self.goal.holder, self._write_limit()
            )
        except Exception as error:  # noqa: BLE001 - whatever it was, the new tokens may be the only copy
            if isinstance(error, RowTooLargeError):
                self._save_by = float("-inf")  # more time does not help; the callers can store the tokens elsewhere
            await self._retry_later(error, tried_at)
            return step
        return after_save(step, saved=saved)

    async def _reread(self, step: Reread) -> Step:
        if step.wait:
            await self._lease_watch.wait(self._last.row)
        held, tried_at = self._last, time.monotonic()
        try:
            row = await self._get()
        except Exception as error:  # noqa: BLE001 - whatever it was, the new tokens may be the only copy
            await self._retry_later(error, tried_at)
            return step
        if row is not None and row.tokens == self._sealed:
            self._seen = held
            return End(Outcome.REFRESHED)  # the write was carried out, and its answer was lost
        if row is not None and row.generation == step.generation:
            # Not opened: it is about to be replaced, and need not open with this keyring.
            view: View | None = self._settings.view(row, None, issues=self.goal.issues)
        else:
            view = self._view(row)
        self.goal, following = after_reread(self.goal, step, view)
        if isinstance(following, Save):
            # With a pause: a backend that refuses the write without a reason would otherwise block the event loop.
            await self._retry_later(ConflictError(f"{self.key}: the new tokens were refused"), tried_at)
        return following

    async def _retry_later(self, error: Exception, tried_at: float) -> None:
        """Pause before the next try to write; after ``save_by`` tell the callers, and end if the store is closing."""
        # A try that began before `save_by` does not count: it may have failed because this process was suspended.
        if tried_at > self._save_by:
            row = self._last.renewed(self._issued)
            if self._closing or self.protection.interrupted:
                self.unsaved = self._settings.sealer.open(self.key, row)
                raise not_stored(self.key, self.unsaved)
            if not self.result.done():
                self._settings.telemetry.problem(self.key, "not_stored", "new tokens could not be stored so far", error)
                self._publish(_failed(lambda: not_stored(self.key, self._settings.sealer.open(self.key, row))))
        await self._backoff.pause()

    def _write_limit(self) -> float:
        """A third of the lease that is left: another try has to fit in before another process may take over."""
        left = self._leased_until - time.monotonic()
        return left / 3 if left > 0 else self._settings.timeout

    # -- what the steps share ------------------------------------------------------------------------

    async def _get(self) -> RequestedRow | None:
        row = await self._statements.get()
        self._backoff.reset()
        self._seen = None if row is None else SeenRow(row, time.monotonic())
        return row

    async def _release(self, failure: Failure | None) -> bool:
        return await self._statements.release(self._last.row.generation, self.goal.holder, failure)

    def _take_new_name(self) -> None:
        """Go on as another holder: a release that the server carries out late must not end the next lease."""
        self.goal = replace(self.goal, holder=new_holder(self._settings.lease))
        self._claimed = False

    def _view(self, row: RequestedRow | None) -> View | None:
        """Judge a row. Opens it to learn the token's lifetime."""
        if row is None or (row.tokens.is_empty and not self.goal.issues):
            return None
        return self._settings.view(
            row,
            None if row.tokens.is_empty else lifetime_of(self._settings.sealer.open(self.key, row)),
            margin=self._margin,
            max_lifetime=self._max_lifetime,
            min_ttl=self.goal.min_ttl,
            force_min_age=self.goal.force_min_age,
            issues=self.goal.issues,
        )

    def _record(self) -> TokenRecord:
        """The record of the row as it was read last; one without tokens for an empty row."""
        row = self._last.row
        return blank_record(self.key, row) if row.tokens.is_empty else self._settings.sealer.open(self.key, row)

    def _check_time(self) -> None:
        if self._closing:
            self.report.outcome = Outcome.LEFT.name.lower()
            raise StoreClosedError("this store is closed")
        if time.monotonic() > self._deadline:
            raise RefreshTimeoutError(
                f"{self.key}: no new tokens within {self._settings.wait:g} s, while another refresh or transaction "
                "held the row's lease or lock; repeat the call"
            )

    def _conclude(self, end: End) -> AttemptResult:
        self.report.outcome = end.outcome.name.lower()
        if end.failure is not None:
            failure = end.failure
            met = self._refresher_failure if self.settled else None
            raised = None if met is None else met.raised
            error = error_for(self.key, failure, raised)
            self.report.outcome, self.report.code = OUTCOME_OF_ERROR[type(error)], error.code
            return AttemptResult(
                end.outcome,
                error=lambda: error_for(self.key, failure, raised),
                known=None if self.settled else failure,
            )
        row = None if self._seen is None or end.outcome is Outcome.MISSING else self._seen.row
        if end.outcome is Outcome.REFRESHED:
            row = self._last.renewed(self._issued)
        self.report.generation = None if row is None else row.generation
        return AttemptResult(end.outcome, row)

    def _publish(self, result: AttemptResult) -> None:
        if not self.result.done():
            self.result.set_result(result)

    @property
    def _last(self) -> SeenRow:
        """The row as it was read last."""
        if self._seen is None:
            raise RuntimeError("this step needs a row that was read")
        return self._seen

    @property
    def _issued(self) -> SealedTokens:
        """The new tokens."""
        if self._sealed is None:
            raise RuntimeError("this step needs new tokens of the provider")
        return self._sealed


def _failed(error: Callable[[], BaseException]) -> AttemptResult:
    return AttemptResult(Outcome.FAILED, error=error)
