"""The refresh engine: at most one call of the provider for all tasks, processes and machines.

Callers in this process join one attempt (:mod:`tokenstore.refresh.attempt`). The attempt belongs to the store: a
cancelled caller does not cancel it, and closing the store waits for it. ``docs/refresh.md`` describes the protocol.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from copy import deepcopy
from typing import Any, Final, Protocol, TypeVar, runtime_checkable

from tokenstore.errors import (
    BackendError,
    BackendUnavailableError,
    ConfigurationError,
    ConflictError,
    InvalidInputError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    RefreshError,
    RefreshTimeoutError,
    StoreClosedError,
    TokensNotStoredError,
    TokenStoreError,
)
from tokenstore.listing import scan_rows
from tokenstore.protocol import SupportsRowLocks
from tokenstore.records import SealedRecord, TokenKey, TokenRecord, has_failed, is_leased
from tokenstore.refresh.attempt import (
    Attempt,
    Refresh,
    Result,
    Seen,
    Settings,
    explained,
    guard_call,
    guard_claim,
    harmless,
    new_name,
    pause,
    validity,
)
from tokenstore.refresh.protected_task import Protection
from tokenstore.refresh.responses import lifetime_of
from tokenstore.refresh.steps import Claim, End, Goal, Outcome, Read, Step, Validity, after_read
from tokenstore.results import RefreshOutcome, RefreshResult
from tokenstore.sealing import open_record
from tokenstore.validation import requested_row

__all__ = [
    "OnReauthorizationRequired",
    "OnRefreshed",
    "RefreshEngine",
    "SupportsRevocation",
]

T = TypeVar("T")

OnRefreshed = Callable[[TokenRecord], Awaitable[None] | None]
"""Told, in the process that refreshed, after new tokens were stored."""

OnReauthorizationRequired = Callable[[ReauthorizationRequiredError], Awaitable[None] | None]
"""Told, in the process whose refresh found that a refresh token is no longer good, once for each such token."""


@runtime_checkable
class SupportsRevocation(Protocol):
    """What a refresher has to have for ``revoke_tokens``."""

    async def revoke(self, record: TokenRecord, /) -> None:
        """Revoke the record's tokens at the provider (RFC 7009); tokens that it does not know are no error."""
        ...


_NAMED: Final[Mapping[Outcome, RefreshOutcome]] = {
    Outcome.REFRESHED: "refreshed",
    Outcome.SERVED: "not_due",
    Outcome.LEFT: "busy",
    Outcome.MISSING: "gone",
    Outcome.FAILED: "failed",
}


class RefreshEngine:
    """The refreshes of one store.

    Args:
        settings: What they have in common.
        refreshers: For each provider, who calls it.
        on_refreshed: Told of new tokens.
        on_reauthorization_required: Told of refresh tokens that are no longer good.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        refreshers: Mapping[str, Refresh],
        on_refreshed: OnRefreshed | None = None,
        on_reauthorization_required: OnReauthorizationRequired | None = None,
    ) -> None:
        self._settings = settings
        self._backend = settings.backend
        self._refreshers = refreshers
        self._on_refreshed = on_refreshed
        self._on_reauthorization_required = on_reauthorization_required
        self._attempts: dict[TokenKey, Attempt] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._unsaved: list[TokenRecord] = []
        self._closing = False

    async def load(
        self, key: TokenKey, refresh: Refresh | None, *, force: bool = False, generation: int | None = None
    ) -> TokenRecord | None:
        """What ``load_fresh_tokens`` does."""
        refresh = self._refresher(key.provider, refresh)
        while True:
            step: Step = Read()
            seen = None
            if force:
                goal = Goal(new_name(), force=generation is None, stale=generation)
            else:
                row = await self._get(key)
                if row is None:
                    return None
                seen, record = Seen(row, time.monotonic()), open_record(self._settings.keyring, key, row)
                view = self._settings.view(row, lifetime_of(record))
                if view.validity is Validity.FRESH:
                    return record
                due = view.validity is Validity.DUE
                goal, step = after_read(Goal(new_name(), urgent=not due), view)
                if due:
                    if isinstance(step, Claim) and self._running(key) is None and not self._closing:
                        self._start(Attempt(self._settings, key, refresh, goal, step, seen))
                    return record
                if isinstance(step, End) and step.failure is not None:
                    raise explained(key, step.failure)
            result = await self._join(Attempt(self._settings, key, refresh, goal, step, seen))
            if result.error is not None:
                raise result.error()
            if result.outcome is Outcome.LEFT:
                continue
            if result.row is None:
                return None
            if result.row.generation != generation:  # else it was joined by somebody who had found another one refused
                return open_record(self._settings.keyring, key, result.row)

    async def refresh_due(
        self, *, within: float, provider: str | None, refresh: Refresh | None, concurrency: int, page_size: int
    ) -> AsyncGenerator[RefreshResult, None]:
        """What ``refresh_due`` does."""
        if provider is None and refresh is not None:
            raise InvalidInputError("refresh goes with one provider; give open_store(refreshers=…) for several")
        by_provider = {
            name: self._refresher(name, refresh)
            for name in (sorted(self._refreshers) if provider is None else [provider])
        }
        pending: set[asyncio.Task[RefreshResult]] = set()
        try:
            for name, refresher in by_provider.items():
                async for key in self._due(name, within, page_size):
                    attempt = Attempt(
                        self._settings, key, refresher, Goal(new_name(), urgent=False), Read(), margin=within
                    )
                    pending.add(asyncio.create_task(self._named(attempt)))
                    if len(pending) >= concurrency:
                        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                        for task in done:
                            yield task.result()
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield task.result()
        finally:
            for task in pending:
                task.cancel()  # who waits, not the refresh

    async def revoke(self, key: TokenKey, refresher: object) -> bool:
        """What ``revoke_tokens`` does."""
        found = self._refreshers.get(key.provider) if refresher is None else refresher
        if not isinstance(found, SupportsRevocation):
            raise ConfigurationError(
                f"revoke_tokens needs a refresher with a method `revoke` for provider {key.provider!r}; "
                "delete_tokens forgets the tokens without telling the provider"
            )
        protection = Protection()
        return await asyncio.shield(self._own(protection, self._revoke(key, found, protection)))

    async def aclose(self) -> None:
        """Let what has begun come to its end.

        :meth:`raise_unsaved` then hands over new tokens that could not be written even now.
        """
        self._closing = True
        save_by = time.monotonic() + self._settings.save
        for attempt in self._attempts.values():
            attempt.close(save_by)
        here, cancelled = asyncio.get_running_loop(), False
        while tasks := [task for task in self._tasks if task.get_loop() is here and not task.done()]:
            try:
                _ = await asyncio.wait(tasks)
            except asyncio.CancelledError:  # the event loop is closing; so do they
                cancelled = True
        if cancelled:
            raise asyncio.CancelledError

    def raise_unsaved(self) -> None:
        """Hand over, once, the new tokens that could not be written.

        Raises:
            TokensNotStoredError: There are some; the error carries them.
        """
        if self._unsaved:
            records, self._unsaved = self._unsaved, []
            raise TokensNotStoredError(
                f"closed while new tokens of {len(records)} rows could not be stored: `records` holds the only copies",
                records=records,
            )

    async def _get(self, key: TokenKey) -> SealedRecord | None:
        try:
            row = await self._backend.get(key)
        except (BackendUnavailableError, ConflictError):  # one dead connection of a pool is no outage
            row = await self._backend.get(key)
        return requested_row(key, row)

    def _running(self, key: TokenKey) -> Attempt | None:
        attempt = self._attempts.get(key)
        # One that its event loop left behind when it was closed will never end.
        return attempt if attempt and attempt.result.get_loop() is asyncio.get_running_loop() else None

    def _start(self, attempt: Attempt) -> None:
        if self._closing:
            raise StoreClosedError("this store is closed")
        self._attempts[attempt.key] = attempt
        _ = self._own(attempt.protection, self._perform(attempt))

    async def _join(self, attempt: Attempt) -> Result:
        """Wait for this process's refresh of the row: the one that runs, or this one."""
        running = self._running(attempt.key)
        if running is None:
            self._start(running := attempt)
        else:
            running.join(attempt.goal)
        return await asyncio.shield(running.result)

    async def _perform(self, attempt: Attempt) -> None:
        try:
            result = await attempt.run()
        finally:
            if self._attempts.get(attempt.key) is attempt:
                del self._attempts[attempt.key]
            if attempt.unsaved is not None:
                self._unsaved.append(attempt.unsaved)
        if result.outcome is Outcome.REFRESHED and result.row is not None and self._on_refreshed is not None:
            record = open_record(self._settings.keyring, attempt.key, result.row)
            await self._tell(attempt, "on_refreshed", self._on_refreshed, record)
        if attempt.settled and result.error is not None and self._on_reauthorization_required is not None:
            error = result.error()
            if isinstance(error, ReauthorizationRequiredError):
                listener = self._on_reauthorization_required
                await self._tell(attempt, "on_reauthorization_required", listener, error)

    async def _tell(
        self, attempt: Attempt, name: str, listener: Callable[[T], Awaitable[None] | None], news: T
    ) -> None:
        # Although the event loop is ending: no other process will be told.
        guard_call(attempt.protection, self._settings.timeout)
        try:
            async with asyncio.timeout(self._settings.timeout):  # or the store could not be closed
                answer = listener(news)
                if inspect.isawaitable(answer):
                    await answer
        except Exception as error:  # noqa: BLE001 - what is stored is stored, whatever the listener makes of it
            self._settings.telemetry.problem(attempt.key, name, f"the callback {name} raised", error)

    def _refresher(self, provider: str, refresh: Refresh | None) -> Refresh:
        found = self._refreshers.get(provider) if refresh is None else refresh
        if found is None:
            raise ConfigurationError(
                f"nobody to refresh the tokens of provider {provider!r}: pass refresh=…, or "
                f"open_store(…, refreshers={{{provider!r}: …}})"
            )
        return found

    def _own(self, protection: Protection, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run what has to end before the store closes, although its caller may go away."""
        task = protection.start(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _due(self, provider: str, within: float, page_size: int) -> AsyncGenerator[TokenKey, None]:
        rows = scan_rows(self._backend, provider=provider, page_size=page_size)
        async with aclosing(rows):
            async for row in rows:
                if (
                    row.has_refresh_token
                    and validity(row.access_token_expires_at, row.as_of, within) is not Validity.FRESH
                ):
                    yield row.key

    async def _named(self, attempt: Attempt) -> RefreshResult:
        try:
            result = await self._join(attempt)
            if result.error is not None:
                raise result.error()
        except TokenStoreError as error:
            return RefreshResult(*attempt.key, "failed", error)
        return RefreshResult(*attempt.key, _NAMED[result.outcome])

    async def _revoke(self, key: TokenKey, refresher: SupportsRevocation, protection: Protection) -> bool:
        holder = new_name()
        row = await self._hold(key, holder, protection)
        if row is None:
            return False
        leased = not has_failed(row)
        record = open_record(self._settings.keyring, key, row)
        failure: Exception | None = None
        # From here on the provider may have the request. What it revokes has to be deleted as well.
        guard_call(protection, self._settings.timeout)
        try:
            async with asyncio.timeout(self._settings.timeout):
                await refresher.revoke(deepcopy(record))
        except Exception as error:  # noqa: BLE001 - whatever it was, the row must not stay leased
            failure = error
        except asyncio.CancelledError:  # of a task that the refresher waited for
            failure = ProviderUnavailableError(f"{key}: the revocation was cancelled", code="revocation_failed")
        except BaseException:
            await self._unhold(key, row.generation, holder, protection)
            raise
        finally:
            protection.disown()
        if failure is not None:  # raised here, where it gets no context
            await self._unhold(key, row.generation, holder, protection)
            raise _not_revoked(key, failure, record)
        forgotten = await self._forget_surely(key, row.generation, protection)
        if not forgotten and not leased:
            # The failure has ended meanwhile, and somebody has refreshed: those tokens are no less to be revoked.
            _ = await self._revoke(key, refresher, protection)
        return True

    async def _hold(self, key: TokenKey, holder: str, protection: Protection) -> SealedRecord | None:
        """Keep everybody from refreshing what is about to be revoked: by a lease, or a failure that is there."""
        deadline = time.monotonic() + self._settings.wait
        while True:
            protection.lift()
            row = await self._get(key)
            if row is None or has_failed(row):
                return row
            if not is_leased(row) and await self._claim(key, row.generation, holder, protection):
                return row
            if time.monotonic() > deadline:
                raise RefreshTimeoutError(f"{key}: others kept refreshing this row; repeat the call")
            await pause(self._backend, row)

    async def _claim(self, key: TokenKey, generation: int, holder: str, protection: Protection) -> bool:
        """Claim the lease, or have it released again if the event loop is ending."""
        guard_claim(protection)
        try:
            claimed = await self._backend.claim_lease(
                key, generation=generation, holder=holder, duration=self._settings.lease
            )
        except asyncio.CancelledError:
            if not protection.interrupted:
                raise
            claimed = True  # the statement may have been carried out
        if claimed and protection.interrupted:
            await self._unhold(key, generation, holder, protection)
            protection.lift()
        return claimed

    async def _unhold(self, key: TokenKey, generation: int, holder: str, protection: Protection) -> None:
        guard_claim(protection)
        with suppress(BackendError, asyncio.CancelledError):  # the lease ends by itself
            _ = await self._backend.release_lease(key, generation=generation, holder=holder)

    async def _forget_surely(self, key: TokenKey, generation: int, protection: Protection) -> bool:
        """Delete what was revoked, although the end of the event loop cancels tasks that the backend waits for."""
        protection.guard(grace=self._settings.timeout)
        while True:
            try:
                return await self._forget(key, generation)
            except asyncio.CancelledError:
                if not (protection.interrupted and protection.holds):
                    raise
                await asyncio.sleep(0)

    async def _forget(self, key: TokenKey, generation: int) -> bool:
        """Delete what was revoked, and not what the user's next login has stored meanwhile."""
        if isinstance(self._backend, SupportsRowLocks):
            async with self._backend.transaction() as transaction:
                row = requested_row(key, await transaction.lock(key))
                return row is not None and row.generation == generation and await transaction.delete(key)
        row = await self._get(key)
        return row is not None and row.generation == generation and await self._backend.delete(key)


def _not_revoked(key: TokenKey, error: Exception, record: TokenRecord) -> TokenStoreError:
    """What callers of ``revoke_tokens`` get: one of the library's own errors, which holds no token."""
    cause = harmless(error, record)
    if isinstance(cause, TokenStoreError):
        failed = cause
    elif isinstance(error, TimeoutError):
        failed = ProviderUnavailableError(f"{key}: the provider did not answer in time", code="timeout")
    else:
        failed = ProviderUnavailableError(
            f"{key}: the tokens could not be revoked ({type(error).__name__}); they are still stored",
            code="revocation_failed",
        )
        failed.__cause__ = cause
    if isinstance(failed, RefreshError):
        failed.provider, failed.user_id = key
    return failed
