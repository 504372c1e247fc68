"""The refresh engine: at most one call of the provider for all tasks, processes and machines.

Callers in this process join one attempt (:mod:`tokenstore.refresh.attempt`). The attempt belongs to the store: a
cancelled caller does not cancel it, and closing the store waits for it. ``docs/refresh.md`` describes the protocol.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Coroutine, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar

from tokenstore.errors import (
    ConfigurationError,
    InvalidInputError,
    ReauthorizationRequiredError,
    RefreshTimeoutError,
    StoreClosedError,
    TokensNotStoredError,
)
from tokenstore.health import REFUSED
from tokenstore.records import Failure, TokenKey, TokenRecord
from tokenstore.refresh.attempt import Attempt, AttemptResult, Refresh
from tokenstore.refresh.due import refresh_due
from tokenstore.refresh.failures import error_for, tokens_missing
from tokenstore.refresh.issuing import issues_tokens, subject_of
from tokenstore.refresh.kept import lifetime_of, lifetime_setting
from tokenstore.refresh.loop_end import protect_provider_call
from tokenstore.refresh.needs import Need, checked_scopes, require_audience, require_scopes
from tokenstore.refresh.protected_task import Protection
from tokenstore.refresh.revoke import Revocation, SupportsRevocation
from tokenstore.refresh.rows import SeenRow, new_holder, read_row
from tokenstore.refresh.settings import Settings
from tokenstore.refresh.steps import Claim, End, Goal, Insert, Outcome, Read, Step, Validity, View, after_read
from tokenstore.results import ProviderCallFailure, RefreshResult
from tokenstore.tracebacks import clear_locals, clears_locals
from tokenstore.validation import RequestedRow

__all__ = ["OnError", "OnReauthorizationRequired", "OnRefreshed", "RefreshEngine"]

T = TypeVar("T")


OnRefreshed = Callable[[TokenRecord], Awaitable[None] | None]
"""Called with the new record, in the process that refreshed, after the new tokens were stored."""

OnReauthorizationRequired = Callable[[ReauthorizationRequiredError], Awaitable[None] | None]
"""Called in the process whose refresh found a refresh token that is not usable, once for each such token."""

OnError = Callable[[ProviderCallFailure], Awaitable[None] | None]
"""Called with what a refresher raised, in the process that called the refresher, once for each call that failed."""


class RefreshEngine:
    """The refreshes of one store.

    Args:
        settings: The store's settings.
        refreshers: For each provider, the callable that calls it.
        on_refreshed: Called after a refresh.
        on_reauthorization_required: Called when a refresh token is not usable.
        on_recovered: Called after a refresh of a row whose last refresh had failed.
        on_error: Called when a refresher has raised an exception.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        refreshers: Mapping[str, Refresh],
        on_refreshed: OnRefreshed | None = None,
        on_reauthorization_required: OnReauthorizationRequired | None = None,
        on_recovered: OnRefreshed | None = None,
        on_error: OnError | None = None,
    ) -> None:
        self._settings = settings
        self._refreshers = refreshers
        self._on_refreshed = on_refreshed
        self._on_reauthorization_required = on_reauthorization_required
        self._on_recovered = on_recovered
        self._on_error = on_error
        self._attempts: dict[TokenKey, Attempt] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._unsaved: list[TokenRecord] = []
        self._closing = False

    async def load(
        self,
        key: TokenKey,
        refresh: Refresh | None,
        *,
        force: bool,
        generation: int | None,
        min_ttl: float,
        force_min_age: float,
        scopes: Collection[str],
        raise_missing: bool,
    ) -> TokenRecord | None:
        """What ``load_fresh_tokens`` does."""
        need, scopes = Need(force, generation, min_ttl, force_min_age), checked_scopes(scopes)
        refresh = self._refreshers.get(key.provider) if refresh is None else refresh
        if refresh is None:
            record = await self._load_unlimited(key, need)
        else:
            record = await self._load(key, refresh, need)
        if record is None:
            if raise_missing:
                raise tokens_missing(key)
            return None
        if issues_tokens(refresh):
            require_audience(key, record, refresh)
        if scopes:
            require_scopes(key, record, scopes, refresh)
        return record

    async def _load(self, key: TokenKey, refresh: Refresh, need: Need) -> TokenRecord | None:
        recovers = retried = False
        while True:
            look = self._forced if need.force else self._first_look
            found = await look(key, refresh, need)
            if isinstance(found, TokenRecord | None):
                return found
            if isinstance(found, Attempt):
                found.recovers = recovers
                found = await self._join(found)
            result = found
            if result.error is not None:
                known = result.known
                if known is None or retried or (cleared := await self._clears(known, key, refresh, need)) is None:
                    raise result.error()
                retried, recovers = True, cleared
                continue
            if result.outcome is Outcome.LEFT:
                continue
            if result.row is None:
                return None
            record = self._settings.sealer.open(key, result.row)
            # A caller that needed less may have begun the attempt that this one has joined.
            view = self._view(result.row, record, refresh, need)
            refused = result.row.generation == need.generation and not view.is_young
            if result.outcome is Outcome.REFRESHED or not (refused or _ends_soon(view, need)):
                return record

    async def _forced(self, key: TokenKey, refresh: Refresh, need: Need) -> Attempt:
        """The attempt of a caller with ``force``."""
        goal = replace(
            self._goal(refresh, need),
            force=need.generation is None,
            stale=need.generation,
            force_min_age=need.force_min_age,
        )
        return self._new_attempt(key, refresh, goal, Read())

    async def _first_look(
        self, key: TokenKey, refresh: Refresh, need: Need
    ) -> TokenRecord | Attempt | AttemptResult | None:
        """Read the row.

        Returns:
            The record if its token is valid now, also if its refresh has just begun in the background; the attempt that
            gets new tokens; the result with the failure that forbids one; or None if there is no row.
        """
        issues = issues_tokens(refresh)
        row = await read_row(self._settings.backend, key, empty=issues)
        if row is None:
            return self._new_attempt(key, refresh, self._goal(refresh, need), Insert()) if issues else None
        seen = SeenRow(row, time.monotonic())
        record = None if row.tokens.is_empty else self._settings.sealer.open(key, row)
        view = self._view(row, record, refresh, need)
        if view.validity is Validity.FRESH:
            return record
        due = view.validity is Validity.DUE
        goal, step = after_read(replace(self._goal(refresh, need), urgent=not due), view)
        if isinstance(step, Claim) and (pause := self._settings.gates.of(key.provider).pause(seen.now())):
            step = End(Outcome.FAILED, pause)
        if due:
            if isinstance(step, Claim) and self._running(key) is None and not self._closing:
                self._start(self._new_attempt(key, refresh, goal, step, seen))
            return record
        if isinstance(step, End) and (known := step.failure) is not None:
            return AttemptResult(Outcome.FAILED, error=lambda: error_for(key, known), known=known)
        return self._new_attempt(key, refresh, goal, step, seen)

    def _goal(self, refresh: Refresh, need: Need) -> Goal:
        return Goal(new_holder(self._settings.lease), min_ttl=need.min_ttl, issues=issues_tokens(refresh))

    def _view(self, row: RequestedRow, record: TokenRecord | None, refresh: Refresh, need: Need) -> View:
        return self._settings.view(
            row,
            None if record is None else lifetime_of(record),
            max_lifetime=lifetime_setting(refresh, "max_lifetime"),
            min_ttl=need.min_ttl,
            force_min_age=need.force_min_age,
            issues=issues_tokens(refresh),
        )

    async def _clears(self, known: Failure, key: TokenKey, refresh: Refresh, need: Need) -> bool | None:
        """Clear a failure that the row had already, if there is a reason to call the provider again.

        Returns:
            Whether it was cleared; False: another caller has just done so. None: there is no reason.
        """
        clear = self._settings.backend.clear_failure
        if need.force and known.code.startswith(REFUSED):
            # An operator may have mended why the provider refused the client.
            return await clear(key, min_age=need.force_min_age)
        subject = subject_of(refresh, key)
        row = None if subject is None else await read_row(self._settings.backend, subject)
        if row is None:
            return None
        # If the row whose token is exchanged got new tokens after the failure, as by a login.
        return await clear(key, as_of=row.updated_at - 1) or None

    def _new_attempt(
        self,
        key: TokenKey,
        refresh: Refresh,
        goal: Goal,
        step: Step,
        seen: SeenRow | None = None,
        *,
        margin: float | None = None,
    ) -> Attempt:
        return Attempt(self._settings, key, refresh, goal, step, seen, load_subject=self._load_subject, margin=margin)

    async def _load_subject(self, subject: TokenKey) -> TokenRecord:
        """Load the row whose token is exchanged for another row's tokens."""
        record = await self.load(
            subject,
            None,
            force=False,
            generation=None,
            min_ttl=self._settings.timeout,
            force_min_age=0.0,
            scopes=(),
            raise_missing=True,
        )
        assert record is not None  # noqa: S101 - for the type checkers: a missing row raises an error
        return record

    async def _load_unlimited(self, key: TokenKey, need: Need) -> TokenRecord | None:
        """Load a token that does not expire, which needs no refresher."""
        row = None if need.force else await read_row(self._settings.backend, key)
        if row is None or row.tokens.access_token_expires_at is not None:
            raise _no_refresher(key.provider)
        return self._settings.sealer.open(key, row)

    def refresh_due(
        self, *, within: float, provider: str | None, refresh: Refresh | None, concurrency: int, page_size: int
    ) -> AsyncGenerator[RefreshResult, None]:
        """What ``refresh_due`` does."""
        if provider is None and refresh is not None:
            raise InvalidInputError("refresh=… needs provider=…; open_store(refreshers=…) takes several providers")
        names = sorted(self._refreshers) if provider is None else [provider]
        refreshers = {name: self._refresher(name, refresh) for name in names}
        return refresh_due(
            self._settings,
            refreshers,
            self._new_attempt,
            self._join,
            within=within,
            concurrency=concurrency,
            page_size=page_size,
        )

    async def revoke(self, key: TokenKey, refresher: object) -> bool:
        """What ``revoke_tokens`` does."""
        found = self._refreshers.get(key.provider) if refresher is None else refresher
        if not isinstance(found, SupportsRevocation):
            raise ConfigurationError(
                f"revoke_tokens needs a refresher with a method `revoke` for provider {key.provider!r}: pass "
                "refresher=…, or call delete_tokens to delete the tokens without revoking them"
            )
        revocation = Revocation(self._settings, key, found)
        return await asyncio.shield(self._own(revocation.protection, self._revoke(key, revocation)))

    @clears_locals
    async def _revoke(self, key: TokenKey, revocation: Revocation) -> bool:
        """Revoke, as one of the provider's limited number of calls. A pause does not delay it."""
        gate, loop = self._settings.gates.of(key.provider), asyncio.get_running_loop()
        revocation.protection.lift()
        try:
            async with asyncio.timeout(self._settings.wait):
                while not await gate.enter():
                    pass
        except TimeoutError:
            raise RefreshTimeoutError(
                f"{key}: {gate.in_flight} calls of the provider are in flight, and none ended within "
                f"{self._settings.wait:g} s; repeat the call, or raise provider_concurrency"
            ) from None
        try:
            return await revocation.run()
        finally:
            if revocation.still_running is None:
                gate.leave(loop)
            else:
                revocation.still_running.add_done_callback(lambda _: gate.leave(loop))
            if revocation.raised is not None:
                self._tell_of_errors(key, "revoke", [revocation.raised])

    async def aclose(self) -> None:
        """Wait for the refreshes and revocations in progress.

        Afterwards :meth:`raise_unsaved` hands over the new tokens that could not be written.
        """
        self._closing = True
        save_by = time.monotonic() + self._settings.save
        for attempt in self._attempts.values():
            attempt.close(save_by)
        here, cancelled = asyncio.get_running_loop(), False
        while tasks := [task for task in self._tasks if task.get_loop() is here and not task.done()]:
            try:
                _ = await asyncio.wait(tasks)
            except asyncio.CancelledError:  # the event loop is closing, and has cancelled the tasks, too
                cancelled = True
        if cancelled:
            raise asyncio.CancelledError

    def raise_unsaved(self) -> None:
        """Hand over, once, the new tokens that could not be written.

        Raises:
            TokensNotStoredError: There are such tokens; the error carries them.
        """
        if self._unsaved:
            records, self._unsaved = self._unsaved, []
            raise TokensNotStoredError(
                f"the store was closed, and new tokens of {len(records)} rows could not be stored: `records` has the "
                "only copies",
                records=records,
            )

    def _running(self, key: TokenKey) -> Attempt | None:
        attempt = self._attempts.get(key)
        # An attempt of an event loop that was closed will never end.
        return attempt if attempt and attempt.result.get_loop() is asyncio.get_running_loop() else None

    def _start(self, attempt: Attempt) -> None:
        if self._closing:
            raise StoreClosedError("this store is closed")
        self._attempts[attempt.key] = attempt
        _ = self._own(attempt.protection, self._perform(attempt))

    async def _join(self, attempt: Attempt) -> AttemptResult:
        """Wait for this process's refresh of the row: the one in progress, or this attempt."""
        running = self._running(attempt.key)
        if running is None:
            self._start(running := attempt)
        else:
            running.join(attempt.goal)
        return await asyncio.shield(running.result)

    @clears_locals
    async def _perform(self, attempt: Attempt) -> None:
        try:
            result = await attempt.run()
        finally:
            if self._attempts.get(attempt.key) is attempt:
                del self._attempts[attempt.key]
            if attempt.unsaved is not None:
                self._unsaved.append(attempt.unsaved)
                attempt.unsaved = None
        key, protection = attempt.key, attempt.protection
        self._tell_of_errors(key, "refresh", attempt.raised)
        if result.outcome is Outcome.REFRESHED and result.row is not None:
            row, opened = result.row, self._settings.sealer.open
            if self._on_refreshed is not None:
                await self._tell(key, "on_refreshed", protection, self._on_refreshed, opened(key, row))
            if self._on_recovered is not None and attempt.recovers:
                await self._tell(key, "on_recovered", protection, self._on_recovered, opened(key, row))
        if attempt.settled and result.error is not None and self._on_reauthorization_required is not None:
            error = result.error()
            if isinstance(error, ReauthorizationRequiredError):
                callback = self._on_reauthorization_required
                await self._tell(key, "on_reauthorization_required", protection, callback, error)

    def _tell_of_errors(
        self, key: TokenKey, operation: Literal["refresh", "revoke"], raised: list[BaseException]
    ) -> None:
        """Call ``on_error``, in tasks of its own: callers must not wait for it."""
        while raised and self._on_error is not None:
            error = raised.pop(0)
            clear_locals(error)  # those of the refresher's frames stay
            failure, protection = ProviderCallFailure(*key, operation, error), Protection()
            _ = self._own(protection, self._tell(key, "on_error", protection, self._on_error, failure))

    @clears_locals
    async def _tell(
        self,
        key: TokenKey,
        name: str,
        protection: Protection,
        callback: Callable[[T], Awaitable[None] | None],
        argument: T,
    ) -> None:
        # Protected from the end of the event loop: the callback is called in no other process.
        protect_provider_call(protection, self._settings.timeout)
        try:
            async with asyncio.timeout(self._settings.timeout):  # so that the store can be closed
                answer = callback(argument)
                if inspect.isawaitable(answer):
                    await answer
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - the refresh has ended, whatever it raises
            # A CancelledError is the callback's own, such as that of a task that it awaited.
            self._settings.telemetry.problem(key, name, f"the callback {name} raised", error)

    def _refresher(self, provider: str, refresh: Refresh | None) -> Refresh:
        found = self._refreshers.get(provider) if refresh is None else refresh
        if found is None:
            raise _no_refresher(provider)
        return found

    def _own(self, protection: Protection, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run work in a task that goes on without its caller, and that :meth:`aclose` waits for."""
        task = protection.start(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _ends_soon(view: View, need: Need) -> bool:
    return need.min_ttl > 0 and view.validity in (Validity.SHORT, Validity.EXPIRED)


def _no_refresher(provider: str) -> ConfigurationError:
    return ConfigurationError(
        f"no refresher for provider {provider!r}: pass refresh=…, or open_store(…, refreshers={{{provider!r}: …}})"
    )
