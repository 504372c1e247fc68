"""``refresh_due``: refresh all rows whose access token expires soon."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from contextlib import AsyncExitStack, aclosing
from typing import Final

from tokenstore.errors import TokenStoreError
from tokenstore.listing import RefusedRow, scan_due_rows
from tokenstore.protocol import Backend
from tokenstore.records import CLOCK_SKEW, TokenKey
from tokenstore.refresh.attempt import Attempt, AttemptResult, Refresh
from tokenstore.refresh.issuing import issues_tokens
from tokenstore.refresh.rows import delete_version, new_holder
from tokenstore.refresh.settings import Settings, lifetime_when_stored, skew_of, validity
from tokenstore.refresh.steps import Goal, Outcome, Read, Validity
from tokenstore.results import RefreshOutcome, RefreshResult
from tokenstore.validation import requested_row

__all__ = ["Join", "due_keys", "refresh_due"]

Join = Callable[[Attempt], Awaitable[AttemptResult]]
"""Waits for this process's refresh of a row: the one in progress, or the attempt that is passed."""

# Seconds. Long enough for the deletion; if this process dies before it, the next load waits for no longer.
_DELETION_LEASE: Final = 5.0

_PUBLIC_OUTCOMES: Final[Mapping[Outcome, RefreshOutcome]] = {
    Outcome.REFRESHED: "refreshed",
    Outcome.SERVED: "not_due",
    Outcome.LEFT: "busy",
    Outcome.MISSING: "gone",
    Outcome.FAILED: "failed",
}


async def refresh_due(
    settings: Settings,
    refreshers: Mapping[str, Refresh],
    new_attempt: Callable[..., Attempt],
    join: Join,
    *,
    within: float,
    concurrency: int,
    page_size: int,
) -> AsyncGenerator[RefreshResult, None]:
    """Refresh the due rows of some providers, and yield what happened to each row as its refresh ends.

    Args:
        settings: The store's settings.
        refreshers: For each provider whose rows are refreshed, the callable that calls it.
        new_attempt: Makes an attempt; the arguments are those of :class:`Attempt` from ``key`` to ``margin``.
        join: Starts an attempt, or joins the one in progress.
        within: Refresh tokens that expire within this time, in seconds.
        concurrency: The most refreshes at a time.
        page_size: Rows in each query.
    """
    pending: dict[asyncio.Task[RefreshResult], str] = {}
    async with AsyncExitStack() as stack:
        rows = {
            provider: await stack.enter_async_context(aclosing(due_keys(settings.backend, provider, within, page_size)))
            for provider in refreshers
        }
        try:
            while True:
                while len(pending) < concurrency and (provider := _next_provider(rows, pending, concurrency)):
                    key = await anext(rows[provider], None)
                    if key is None:
                        del rows[provider]
                        continue
                    if isinstance(key, RefusedRow):
                        yield RefreshResult(*key.key, "failed", key.error())
                        continue
                    refresh = refreshers[provider]
                    goal = Goal(new_holder(settings.lease), urgent=False, issues=issues_tokens(refresh))
                    attempt = new_attempt(key, refresh, goal, Read(), margin=within)
                    pending[asyncio.create_task(_result_of(attempt, join))] = provider
                if not pending:
                    break
                done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    del pending[task]
                for task in done:
                    yield task.result()
        finally:
            for task in pending:
                task.cancel()  # ends the wait for the refresh, not the refresh


def _next_provider(
    rows: Collection[str], pending: Mapping[asyncio.Task[RefreshResult], str], concurrency: int
) -> str | None:
    """The provider with the fewest refreshes in progress among those that have rows left.

    Each has its share of the concurrency, so that a provider that hangs does not keep the others waiting.
    """
    count = Counter(pending.values())
    provider = min(rows, key=lambda name: count[name], default=None)
    share = max(concurrency // len(rows), 1) if rows else 0
    return provider if provider is not None and count[provider] < share else None


async def due_keys(
    backend: Backend, provider: str, within: float, page_size: int
) -> AsyncGenerator[TokenKey | RefusedRow, None]:
    """Iterate over the keys of a provider's rows that are due, in the order of their times. Deletes old empty rows.

    Args:
        backend: The rows.
        provider: Whose rows.
        within: Only rows whose access tokens expire within this time, in seconds.
        page_size: Rows in each query.
    """
    # A token also counts as expired within the skew of its expiry, which is shorter for a short-lived token. So the
    # database returns all rows within the longest skew, and each one is judged by its own.
    rows = scan_due_rows(backend, provider=provider, within=max(within, CLOCK_SKEW), page_size=page_size)
    began: int | None = None
    async with aclosing(rows):
        async for row in rows:
            if isinstance(row, RefusedRow):
                yield row
                continue
            if row.is_empty:
                if row.due_at <= row.as_of:
                    await _delete_empty(backend, row.key)
                continue
            if began is None:
                began = row.as_of
            # A row that was written since the sweep began may be due again, if its new token lives for less than
            # `within`. It waits for the next sweep: otherwise this one might refresh the row again and again. If the
            # database's clock was set back, `updated_at` may be in the future, and says nothing.
            if began < row.updated_at <= row.as_of:
                continue
            expires_at = row.access_token_expires_at
            skew = skew_of(lifetime_when_stored(expires_at, row.updated_at))
            if validity(expires_at, row.as_of, within, skew) is not Validity.FRESH:
                yield row.key


async def _delete_empty(backend: Backend, key: TokenKey) -> None:
    """Delete an empty row, unless a refresh is about to get tokens for it."""
    row = requested_row(key, await backend.get(key), empty=True)
    if row is not None and row.tokens.is_empty:
        generation, holder = row.generation, new_holder(_DELETION_LEASE)
        if await backend.claim_lease(key, generation=generation, holder=holder, duration=_DELETION_LEASE):
            _ = await delete_version(backend, key, generation)


async def _result_of(attempt: Attempt, join: Join) -> RefreshResult:
    failed: RefreshOutcome = "failed"
    try:
        result = await join(attempt)
        if result.known is not None:
            failed = "dead" if result.known.retry_in is None else "deferred"
        if result.error is not None:
            raise result.error()
    except TokenStoreError as error:
        # Without its traceback, which would keep the attempt alive.
        return RefreshResult(*attempt.key, failed, error.with_traceback(None))
    return RefreshResult(*attempt.key, _PUBLIC_OUTCOMES[result.outcome])
