"""One refresh of one row: the steps that :mod:`tokenstore.refresh.steps` asks for, performed."""

from __future__ import annotations

import asyncio
import inspect
import math
import random
import re
import secrets
import time
import traceback
import zlib
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Final, NoReturn, TypeVar
from urllib.parse import quote

from tokenstore.errors import (
    BackendError,
    BackendUnavailableError,
    ConflictError,
    InvalidInputError,
    LockTimeoutError,
    ProviderRefusedError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    RefreshError,
    RefreshTimeoutError,
    StoreClosedError,
    TokensNotStoredError,
)
from tokenstore.keyring import Keyring
from tokenstore.protocol import Backend, SupportsWatching
from tokenstore.records import (
    CLOCK_SKEW,
    Failure,
    SealedRecord,
    SealedTokens,
    TokenKey,
    TokenRecord,
    has_failed,
    is_leased,
)
from tokenstore.refresh.protected_task import Protection
from tokenstore.refresh.responses import lifetime_of, read_response
from tokenstore.refresh.steps import (
    Call,
    Claim,
    End,
    Goal,
    Outcome,
    Read,
    Reread,
    Save,
    Settle,
    Step,
    Validity,
    View,
    Wait,
    after_call,
    after_claim,
    after_read,
    after_reread,
    after_save,
    after_settle,
)
from tokenstore.refresh.telemetry import Report, Telemetry
from tokenstore.sealing import open_record, seal_tokens
from tokenstore.validation import requested_row

__all__ = [
    "Attempt",
    "Refresh",
    "Result",
    "Seen",
    "Settings",
    "explained",
    "guard_call",
    "guard_claim",
    "harmless",
    "new_name",
    "pause",
    "validity",
]

T = TypeVar("T")

Refresh = Callable[[TokenRecord], Awaitable[Mapping[str, Any]]]
"""Calls the provider with a record's refresh token, and returns the token response (RFC 6749 section 5.1)."""

_US = 1_000_000
_RETRY, _REFUSED_RETRY, _LONGEST_RETRY = 5.0, 60.0, 3600.0
_PATIENCE = 3.0
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.02, 1.0
# How long the end of an event loop waits for a lease to be claimed and released again, in seconds.
_LEAVE_GRACE = 5.0
# A refresher that ignores the cancellation at `refresh_timeout` is cancelled again this much later, in seconds, if the
# event loop is ending.
_CALL_GRACE = 1.0
# A statement that writes new tokens is given this much time when the event loop is ending, in seconds. Then it is
# cancelled, as its connection may be dead, and sent again.
_SAVE_GRACE = 1.0
# Errors of the token endpoint that an operator has to mend (RFC 6749 section 5.2).
_REFUSALS: Final = frozenset(
    {"invalid_client", "invalid_request", "invalid_scope", "unauthorized_client", "unsupported_grant_type"}
)
_TRANSIENT = (BackendUnavailableError, ConflictError, LockTimeoutError)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the refreshes of one store have in common.

    Attributes:
        backend: The rows.
        keyring: The keys.
        telemetry: What is told to operators.
        margin: ``refresh_margin`` in seconds.
        timeout: ``refresh_timeout`` in seconds.
    """

    backend: Backend
    keyring: Keyring
    telemetry: Telemetry
    margin: float
    timeout: float

    @property
    def lease(self) -> float:
        """A lease outlives the provider's call, with time to get it and to write what the call brings."""
        return self.timeout * 1.5

    @property
    def wait(self) -> float:
        """A refresh waits for others until a dead holder's lease and another one's call have ended."""
        return self.timeout * 3

    @property
    def save(self) -> float:
        """How long new tokens are tried to be written before callers are told; it goes on after that."""
        return self.timeout * 1.5

    def view(self, row: SealedRecord, lifetime: float | None, margin: float | None = None) -> View:
        """A row, judged on the database's clock, so that machines whose clocks differ agree.

        Args:
            row: The row.
            lifetime: How long its access token lives in all, in seconds, if that is known.
            margin: How long before its expiry the token is due, in seconds; default: the row's share of ``margin``.
        """
        tokens = row.tokens
        if margin is None:
            margin = self._margin_of(row, lifetime)
        refresh_expires_at = tokens.refresh_token_expires_at
        return View(
            generation=row.generation,
            validity=validity(tokens.access_token_expires_at, row.as_of, margin),
            refreshable=tokens.refresh_token is not None
            and (refresh_expires_at is None or refresh_expires_at > row.as_of),
            lease_holder=row.lease_holder if is_leased(row) else None,
            failure=row.failure if has_failed(row) else None,
        )

    def _margin_of(self, row: SealedRecord, lifetime: float | None) -> float:
        """The refresh margin of one version of a row, in seconds before its access token expires.

        Spread, so that tokens which were issued together are not refreshed together; and at most the last quarter of
        the token's usable life, or a short-lived one would be due as soon as it is issued.
        """
        margin = self.margin
        if lifetime is not None:
            margin = min(margin, CLOCK_SKEW + max(lifetime - CLOCK_SKEW, 0.0) / 4)
        spread = zlib.crc32(f"{row.key.provider}\0{row.key.user_id}\0{row.generation}".encode()) / 2**32
        return CLOCK_SKEW + max(margin - CLOCK_SKEW, 0.0) * (0.5 + spread / 2)


@dataclass(frozen=True, slots=True)
class Seen:
    """A row as it was read, and when: seconds of :func:`time.monotonic`."""

    row: SealedRecord
    at: float

    def now(self) -> int:
        """The database's clock, from what it said then: never ahead of it."""
        return self.row.as_of + int((time.monotonic() - self.at) * _US)

    def renewed(self, tokens: SealedTokens) -> SealedRecord:
        """The row with its next tokens as it is, or will be, stored, but for a moment in ``updated_at``."""
        return replace(
            self.row,
            tokens=tokens,
            generation=self.row.generation + 1,
            lease_holder=None,
            lease_expires_in=None,
            failure=None,
            updated_at=self.now(),
        )


@dataclass(frozen=True, slots=True)
class Result:
    """How a refresh ended. Each caller opens the row, or makes the error, for itself: they do not share an object."""

    outcome: Outcome
    row: SealedRecord | None = None
    error: Callable[[], BaseException] | None = None


class _Backoff:
    """Longer and longer pauses, until patience ends."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self.reset()

    def reset(self) -> None:
        self._until: float | None = None
        self._pause = _SHORTEST_PAUSE

    async def pause(self, error: BackendError | None = None) -> None:
        """Wait, or raise the error if it has gone on for too long; without one, there is no end to patience."""
        now = time.monotonic()
        if self._until is None:
            self._until = now + self._patience
        if error is not None and now >= self._until:
            raise error
        await asyncio.sleep(self._pause * _jitter(0.5, 1.0))
        self._pause = min(self._pause * 2, _LONGEST_PAUSE)


class Attempt:
    """One refresh of one row, and those in this process who wait for it.

    Args:
        settings: The store's.
        key: The row.
        refresh: Who calls the provider.
        goal: What it is for; callers who join may change it.
        step: The first step.
        seen: The row that this step was decided from, if one was read.
        margin: In place of the row's own refresh margin, in seconds.

    Attributes:
        protection: Of the task that runs it: from the claim on, a cancellation from outside, such as the end of the
            event loop, waits for the end of the attempt.
        result: Set once, however the attempt ends: it never holds an exception.
        report: What operators are told.
        settled: Whether the failure that it ended with is one that it met, and left to others.
        unsaved: New tokens that could not be written before the store was closed.
    """

    def __init__(
        self,
        settings: Settings,
        key: TokenKey,
        refresh: Refresh,
        goal: Goal,
        step: Step,
        seen: Seen | None = None,
        *,
        margin: float | None = None,
    ) -> None:
        self.key = key
        self.goal = goal
        self.protection = Protection()
        self.result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self.report = Report(key, background=not goal.urgent)
        self.settled = False
        self.unsaved: TokenRecord | None = None
        self._settings = settings
        self._backend = settings.backend
        self._refresh = refresh
        self._step = step
        self._seen = seen
        self._margin = margin
        self._deadline = time.monotonic() + settings.wait
        self._leased_until = float("-inf")
        self._claimed = False
        self._backoff = _Backoff(_PATIENCE)
        self._claiming = _Backoff(_PATIENCE)  # of its own: that the row can be read does not help it
        self._sealed: SealedTokens | None = None
        self._save_by = float("inf")
        self._cause: Exception | None = None
        self._refused = False
        self._closing = False

    def join(self, goal: Goal) -> None:
        """Serve one more caller."""
        mine = self.goal
        self.report.joined += 1
        self.goal = replace(
            mine,
            urgent=mine.urgent or goal.urgent,
            # Once this attempt has found a generation wanting, whatever it ends with is another one.
            force=mine.force or (goal.force and mine.seen is None),
            stale=mine.stale if goal.stale is None else goal.stale,
        )

    def close(self, save_by: float) -> None:
        """Wait for nobody any more; tokens in hand are tried to be written until ``save_by``."""
        self._closing = True
        self._save_by = min(self._save_by, save_by)

    async def run(self) -> Result:
        """Perform it; whatever happens, :attr:`result` is set."""
        try:
            with self._settings.telemetry.refresh(self.report):
                result = self._conclude(await self._perform())
        except asyncio.CancelledError:  # before the provider was called
            self._publish(_failed(lambda: StoreClosedError(f"{self.key}: the event loop is closing")))
            raise
        except BaseException as error:  # noqa: BLE001 - it is for those who wait
            failure, place = error, error.__traceback__
            # The one object for all, as nobody can tell how to make another; each raises it from here anew.
            result = _failed(lambda: failure.with_traceback(place))
        self._publish(result)
        return result

    async def _perform(self) -> End:
        while not isinstance(self._step, End):
            try:
                if self.protection.interrupted and isinstance(self._step, Read | Wait | Claim | Call):
                    await self._leave()
                self._protect(self._step)
                self._step = await self._take(self._step)
            except asyncio.CancelledError:
                if not isinstance(self._step, Save | Reread):
                    self.report.outcome = Outcome.LEFT.name.lower()
                    raise
                # The end of the event loop has cancelled a statement. This may be the only copy of the tokens.
                self.protection.guard()
                await self._backoff.pause()
        self.protection.guard()  # the engine has yet to tell the listeners
        return self._step

    def _protect(self, step: Step) -> None:
        """Say for how long a cancellation from outside has to wait during this step."""
        if isinstance(step, Wait) or (isinstance(step, Read) and not self._claimed):
            self.protection.lift()
        elif isinstance(step, Read | Claim):
            guard_claim(self.protection)
        elif isinstance(step, Call):
            guard_call(self.protection, self._settings.timeout)
        elif isinstance(step, Save | Reread) and not self.protection.interrupted:
            self.protection.guard(grace=_SAVE_GRACE)
        else:  # new tokens, or the provider's verdict, have to get into the row: these steps have bounds of their own
            self.protection.guard()

    async def _leave(self) -> NoReturn:
        """The task was cancelled before the provider was called: the next job need not wait for this lease."""
        if self._claimed:
            guard_claim(self.protection)
            with suppress(BackendError):
                await self._release(None)
        raise asyncio.CancelledError

    async def _take(self, step: Step) -> Step:
        """Perform one step, and return the next."""
        match step:
            case Read():
                return await self._read()
            case Wait():
                return await self._wait()
            case Claim():
                return await self._claim(step)
            case Call():
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

    async def _read(self) -> Step:
        # However late it is: what the row holds by now may be what is wanted.
        try:
            row = await self._fetch()
        except _TRANSIENT as error:
            await self._backoff.pause(error)
            return Read()
        self.goal, step = after_read(self.goal, self._judged(row))
        return step

    async def _wait(self) -> Step:
        self._check_time()
        began = time.monotonic()
        await pause(self._backend, self._last.row)
        self.report.waited += time.monotonic() - began
        return Read()

    async def _claim(self, step: Claim) -> Step:
        self._check_time()
        # It cannot end sooner than this, however long the statement takes.
        self._leased_until = time.monotonic() + self._settings.lease
        self._claimed = True  # unless the database says otherwise
        try:
            granted = await self._answered(
                self._backend.claim_lease(
                    self.key, generation=step.generation, holder=self.goal.holder, duration=self._settings.lease
                )
            )
        except LockTimeoutError:
            granted = self._claimed = False  # whoever holds the row's lock may be refreshing it
        except _TRANSIENT as error:
            await self._claiming.pause(error)
            granted = False  # or the answer was lost
        else:
            self._claimed = granted
            self._claiming.reset()
        return after_claim(step, granted=granted)

    async def _claim_anew(self) -> Step:
        """The answer to the claim was so slow that the lease could end before the call, which may lose a pair then."""
        with suppress(BackendError):
            await self._release(None)
        self._take_new_name()
        return Read()

    async def _call(self) -> Failure | None:
        """Call the provider; what it issues is sealed at once, its refusal becomes a failure to share."""
        record, issued_at = open_record(self._settings.keyring, self.key, self._last.row), self._last.now()
        try:
            with self._settings.telemetry.provider_call(self.report):
                async with asyncio.timeout(self._settings.timeout):
                    response: object = self._refresh(deepcopy(record))  # its own, to change as it likes
                    if inspect.isawaitable(response):  # if not, it was no coroutine function, and has refreshed already
                        response = await response
            new = read_response(response, record, issued_at)
        except ReauthorizationRequiredError as error:
            return self._failure(error, record, None)
        except ProviderUnavailableError as error:
            return self._failure(error, record, _retry_in(error.retry_after, _RETRY))
        except ProviderRefusedError as error:
            self._refused = True
            return self._failure(error, record, _retry_in(error.retry_after, _REFUSED_RETRY))
        except Exception as error:  # noqa: BLE001 - whatever it was, the row must not stay leased
            self._cause = harmless(error, record)
            code = {TimeoutError: "timeout", InvalidInputError: "invalid_response"}.get(type(error), "refresh_failed")
            return Failure(code, _retry_in(None, _RETRY))
        except asyncio.CancelledError:
            # The refresher's own affair, such as a task that it waited for: cancellations from outside are refused.
            return Failure("refresh_failed", _retry_in(None, _RETRY))
        except BaseException:
            with suppress(BackendError):
                await self._release(Failure("refresh_failed", _RETRY))
            raise
        finally:
            # Timers and tasks that the refresher left behind must not cancel the writing of the new tokens.
            self.protection.disown()
        self._sealed = seal_tokens(
            self._settings.keyring,
            self.key,
            access_token=new.access_token,
            refresh_token=new.refresh_token,
            extra=new.extra,
            access_token_expires_at=new.access_token_expires_at,
            refresh_token_expires_at=new.refresh_token_expires_at,
        )
        self._save_by = min(self._save_by, time.monotonic() + self._settings.save)
        self._backoff.reset()
        return None

    def _failure(self, error: RefreshError, record: TokenRecord, retry_in: float | None) -> Failure:
        """What the callable's own verdict leaves to others."""
        self._cause = harmless(error, record)
        return Failure("unreadable_code" if _holds_token(str(error.code), record) else _code(error.code), retry_in)

    async def _save(self, step: Save) -> Step:
        tried_at = time.monotonic()
        try:
            saved = await self._answered(
                self._backend.complete_lease(
                    self.key, self._issued, generation=step.generation, holder=self.goal.holder
                ),
                self._write_limit(),
            )
        except Exception as error:  # noqa: BLE001 - whatever it was, this may be the only copy
            await self._persist(error, tried_at)
            return step
        return after_save(step, saved=saved)

    async def _reread(self, step: Reread) -> Step:
        if step.wait:
            await pause(self._backend, self._last.row)
        held, tried_at = self._last, time.monotonic()
        try:
            row = await self._fetch()
        except Exception as error:  # noqa: BLE001 - whatever it was, this may be the only copy
            await self._persist(error, tried_at)
            return step
        if row is not None and row.tokens == self._sealed:
            self._seen = held
            return End(Outcome.REFRESHED)  # the answer was lost, the tokens were not
        if row is not None and row.generation == step.generation:
            view: View | None = self._settings.view(row, None)  # it need not open: it is about to be replaced
        else:
            view = self._judged(row)
        self.goal, following = after_reread(self.goal, step, view)
        if isinstance(following, Save):  # never at once: a backend that refuses for no reason would block the loop
            await self._persist(ConflictError(f"{self.key}: the new tokens were refused"), tried_at)
        return following

    async def _persist(self, error: Exception, tried_at: float) -> None:
        """New tokens could not be written: try again, tell the callers when it takes too long, give up on closing."""
        # A try that began in time may have failed for no other reason than that this process was suspended.
        if tried_at > self._save_by:
            row = self._last.renewed(self._issued)
            if self._closing or self.protection.interrupted:
                self.unsaved = open_record(self._settings.keyring, self.key, row)
                raise _not_stored(self.key, self.unsaved)
            if not self.result.done():
                self._settings.telemetry.problem(self.key, "not_stored", "new tokens could not be stored so far", error)
                self._publish(
                    _failed(lambda: _not_stored(self.key, open_record(self._settings.keyring, self.key, row)))
                )
        await self._backoff.pause()

    async def _settle(self, step: Settle) -> Step:
        try:
            self.settled = await self._release(step.failure)
        except BackendError as error:
            self._settings.telemetry.problem(self.key, "not_settled", "a failure could not be stored", error)
            if step.failure.retry_in is None:
                raise  # only the row could tell whether the dead refresh token is still the row's
            self.settled = True  # the lease ends by itself
        if not self.settled:
            self._take_new_name()
        return after_settle(step, settled=self.settled)

    async def _release(self, failure: Failure | None) -> bool:
        self._backoff.reset()
        unsure = False
        while True:
            try:
                released = await self._answered(
                    self._backend.release_lease(
                        self.key, generation=self._last.row.generation, holder=self.goal.holder, failure=failure
                    )
                )
                return released or (unsure and failure is not None and await self._is_left(failure))
            except _TRANSIENT as error:
                unsure = True
                await self._backoff.pause(error)

    def _take_new_name(self) -> None:
        """Go on as another holder: a release that is still on its way in the server must not end the next lease."""
        self.goal = replace(self.goal, holder=new_name())
        self._claimed = False

    async def _is_left(self, failure: Failure) -> bool:
        """Whether the failure is in the row: the lease was ended, and the answer lost."""
        row = requested_row(self.key, await self._answered(self._backend.get(self.key)))
        if row is None or row.generation != self._last.row.generation or row.lease_holder is not None:
            return False
        return row.failure is not None and row.failure.code == failure.code

    async def _fetch(self) -> SealedRecord | None:
        row = requested_row(self.key, await self._answered(self._backend.get(self.key)))
        self._backoff.reset()
        self._seen = None if row is None else Seen(row, time.monotonic())
        return row

    def _write_limit(self) -> float:
        """While the lease lasts there has to be time for another try, or others come and use the old token again."""
        left = self._leased_until - time.monotonic()
        return left / 3 if left > 0 else self._settings.timeout

    async def _answered(self, call: Awaitable[T], limit: float | None = None) -> T:
        """A connection that is dead without a word must not keep a refresh waiting; another one may be alive."""
        limit = limit or self._settings.timeout
        scope = asyncio.timeout(limit)
        try:
            async with scope:
                return await call
        except TimeoutError:
            if not scope.expired():
                raise
        except asyncio.CancelledError:
            if not self.protection.holds:
                raise
            # Not this task, but one of the backend's, which the end of the event loop has cancelled as well.
            raise BackendUnavailableError(f"{self.key}: the event loop has cancelled the statement") from None
        raise BackendUnavailableError(f"{self.key}: no answer of the database within {limit:g} s")

    def _judged(self, row: SealedRecord | None) -> View | None:
        if row is None:
            return None
        lifetime = lifetime_of(open_record(self._settings.keyring, self.key, row))
        return self._settings.view(row, lifetime, self._margin)

    def _check_time(self) -> None:
        if self._closing:
            self.report.outcome = Outcome.LEFT.name.lower()
            raise StoreClosedError("this store is closed")
        if time.monotonic() > self._deadline:
            raise RefreshTimeoutError(
                f"{self.key}: no new tokens within {self._settings.wait:g} s, while others held the row's lease or "
                "lock; repeat the call"
            )

    def _conclude(self, end: End) -> Result:
        self.report.outcome = end.outcome.name.lower()
        if end.failure is not None:
            failure, cause = end.failure, self._cause if self.settled else None
            refused = self.settled and self._refused
            error = explained(self.key, failure, cause, refused=refused)
            self.report.outcome, self.report.code = _REPORTED[type(error)], error.code
            return Result(end.outcome, error=lambda: explained(self.key, failure, cause, refused=refused))
        row = None if self._seen is None else self._seen.row
        if end.outcome is Outcome.REFRESHED:
            row = self._last.renewed(self._issued)
        self.report.generation = None if row is None else row.generation
        return Result(end.outcome, row)

    def _publish(self, result: Result) -> None:
        if not self.result.done():
            self.result.set_result(result)

    @property
    def _last(self) -> Seen:
        """The row as it was read last."""
        if self._seen is None:
            raise RuntimeError("this step follows from a row")
        return self._seen

    @property
    def _issued(self) -> SealedTokens:
        """The new tokens."""
        if self._sealed is None:
            raise RuntimeError("this step follows from a call of the provider")
        return self._sealed


def guard_claim(protection: Protection) -> None:
    """Protect the claim of a lease, and its release: the end of the event loop waits for them, but not for long."""
    protection.guard(grace=_LEAVE_GRACE)


def guard_call(protection: Protection, timeout: float) -> None:
    """Protect a call of the provider, which ends by itself after so many seconds."""
    protection.guard(limit=timeout + _CALL_GRACE)


async def pause(backend: Backend, row: SealedRecord) -> None:
    """Wait until it is worth reading a row again whose lease somebody else holds: not beyond the lease's end."""
    longest = _LONGEST_PAUSE
    if row.lease_expires_in is not None:
        longest = min(longest, max(row.lease_expires_in, 0.0) + _SHORTEST_PAUSE)
    with suppress(TimeoutError):
        async with asyncio.timeout(longest):
            if isinstance(backend, SupportsWatching):
                with suppress(Exception):  # the caller may have new tokens in hand
                    await backend.watch(row.key)
                    return
            await asyncio.sleep(_SHORTEST_PAUSE * _jitter(1.0, 1.5))


def validity(expires_at: int | None, now: int, margin: float) -> Validity:
    """How long an access token is still good for.

    Args:
        expires_at: Microseconds since the epoch, or None for "never".
        now: Microseconds since the epoch.
        margin: Seconds before its expiry from which on it is due.
    """
    remaining = float("inf") if expires_at is None else (expires_at - now) / _US
    if remaining <= 0:
        return Validity.EXPIRED
    if remaining <= CLOCK_SKEW:
        return Validity.SHORT
    return Validity.DUE if remaining <= margin else Validity.FRESH


def new_name() -> str:
    """A name for leases that nobody else has."""
    return secrets.token_hex(16)


_REPORTED: Final[Mapping[type[RefreshError], str]] = {
    ReauthorizationRequiredError: "reauthorization_required",
    ProviderRefusedError: "provider_refused",
    ProviderUnavailableError: "provider_unavailable",
}


def explained(
    key: TokenKey, failure: Failure, cause: Exception | None = None, *, refused: bool = False
) -> RefreshError:
    """What a failure means to callers, whether this process met it (the cause) or read it in the row."""
    code, retry_in = failure.code, failure.retry_in
    error: RefreshError
    if retry_in is None:
        error = ReauthorizationRequiredError(
            f"{key}: there is no refresh token that is still good ({code}); the user has to log in again", code=code
        )
    elif code in _REFUSALS or refused:
        error = ProviderRefusedError(
            f"{key}: the provider refuses this client ({code}): check its registration; "
            f"no other attempt is made for {retry_in:.0f} s",
            code=code,
            retry_after=retry_in,
        )
    else:
        error = ProviderUnavailableError(
            f"{key}: the provider could not be reached, or gave no sensible answer ({code}); "
            f"no other attempt is made for {retry_in:.0f} s",
            code=code,
            retry_after=retry_in,
        )
    error.provider, error.user_id = key
    error.__cause__ = cause
    return error


def _not_stored(key: TokenKey, record: TokenRecord) -> TokensNotStoredError:
    error = TokensNotStoredError(
        f"{key}: the provider issued new tokens, which could not be stored; `record` holds the only copy",
        records=[record],
    )
    error.provider, error.user_id = key
    return error


def _failed(error: Callable[[], BaseException]) -> Result:
    return Result(Outcome.FAILED, error=error)


def _code(code: object) -> str:
    """An error code that is fit for a column, a message and a log."""
    known = isinstance(code, str) and re.fullmatch(r"[A-Za-z0-9_.:-]{1,64}", code, re.ASCII)
    return str(code) if known else "unreadable_code"


def _retry_in(wanted: object, otherwise: float) -> float:
    if isinstance(wanted, int | float) and not math.isnan(wanted):
        return float(min(max(wanted, 0.0), _LONGEST_RETRY))
    return otherwise * _jitter(0.8, 1.2)


def harmless(error: Exception, record: TokenRecord) -> Exception | None:
    """A callable's own exception, to chain; None if it holds a token of the record, or anything that it chains does."""
    chain: list[BaseException] = [error]
    try:
        for link in chain:  # which grows
            following = (link.__cause__, link.__context__, *getattr(link, "exceptions", ()))
            chain += [one for one in following if one is not None and all(one is not known for known in chain)]
        texts = [[*traceback.format_exception(one, chain=False), repr((one.args, one.__dict__))] for one in chain]
    except Exception:  # noqa: BLE001 - it cannot even be shown
        return None
    return None if any(_holds_token(text, record) for some in texts for text in some) else error


def _holds_token(text: str, record: TokenRecord) -> bool:
    """Whether a text holds one of the record's tokens: as it is, as `repr` writes it, or as it stands in a URL."""
    tokens = [token for token in (record["access_token"], record["refresh_token"]) if token]
    return any(spelt in text for token in tokens for spelt in (token, repr(token)[1:-1], quote(token, safe="")))


def _jitter(low: float, high: float) -> float:
    return random.uniform(low, high)  # noqa: S311 - keeps a fleet out of step; no secret depends on it
