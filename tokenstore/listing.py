"""Reads rows page by page, and checks that each of them was requested and can be believed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from tokenstore.errors import SealingError, TamperedError, UnknownKeyError
from tokenstore.escaping import escaped
from tokenstore.health import RowFilter
from tokenstore.protocol import Backend
from tokenstore.records import (
    MAX_ACCOUNT_BYTES,
    MAX_USER_ID_BYTES,
    DueKey,
    DueRow,
    ScannedRow,
    SealedMetadata,
    TokenKey,
)
from tokenstore.sealing import Sealer
from tokenstore.validation import due_row_problem, due_time_problem, key_problem, scanned_row_problem
from tokenstore.value_records import ScannedValue, ValueKey

__all__ = [
    "RefusedRow",
    "checked_rows",
    "open_metadata",
    "scan_due_rows",
    "scan_providers",
    "scan_rows",
    "search_rows",
]

TokenRowT = TypeVar("TokenRowT", ScannedRow, DueRow)
RowT = TypeVar("RowT", ScannedRow, DueRow, ScannedValue)
PositionT = TypeVar("PositionT", TokenKey, DueKey, ValueKey)


# No key of a provider sorts behind this user id with this account.
_LAST_USER_ID = "\U0010ffff" * (MAX_USER_ID_BYTES // 4)
_LAST_ACCOUNT = "\U0010ffff" * (MAX_ACCOUNT_BYTES // 4)


@dataclass(frozen=True, slots=True)
class RefusedRow:
    """A row with a value that no store has written, or that does not open.

    Attributes:
        key: The row's key. Characters that cannot be printed are escaped.
        problem: What is wrong with the row.
        missing_key: The name of the key that is not in the keyring, if that is the problem.
    """

    key: TokenKey
    problem: str
    missing_key: str | None = None

    def error(self, more: str = "") -> SealingError:
        """The error for this row, with ``more`` behind the problem."""
        if self.missing_key is not None:
            return UnknownKeyError(self.problem + more, key_id=self.missing_key)
        return TamperedError(self.problem + more)


def scan_rows(
    backend: Backend, *, provider: str | None, user_id: str | None = None, page_size: int, with_metadata: bool = False
) -> AsyncGenerator[ScannedRow | RefusedRow, None]:
    """Iterate over rows in ascending order of their keys, by short queries for each page.

    A row that was altered ends nothing: it is yielded as a :class:`RefusedRow`, and the rows behind it follow.

    Args:
        backend: The rows.
        provider: Only this provider's rows.
        user_id: Only this user's rows.
        page_size: Rows in each page.
        with_metadata: Whether to read the sealed metadata, too.

    Raises:
        TamperedError: The database answered with a row of another provider or user, or with one that is not in order.
            Otherwise a refresher could get another provider's token, or the iteration might never end.
        BackendError: The database refused or failed.
    """

    async def read(after: TokenKey | None, limit: int) -> list[ScannedRow]:
        return await backend.scan(
            provider=provider, user_id=user_id, after=after, limit=limit, with_metadata=with_metadata
        )

    return _refused_apart(
        checked_rows(
            read,
            position=lambda row: row.key,
            position_problem=lambda row: key_problem(row.key),
            is_requested=lambda row: _is_among(row.key, provider, user_id),
            row_problem=scanned_row_problem,
            page_size=page_size,
        )
    )


def scan_due_rows(
    backend: Backend, *, provider: str, within: float, page_size: int
) -> AsyncGenerator[DueRow | RefusedRow, None]:
    """As :func:`scan_rows`, over a provider's rows that are due within some seconds, in order of the times.

    The seconds count from the first page, so that the iteration ends although time goes on.
    """
    as_of: int | None = None

    async def read(after: DueKey | None, limit: int) -> list[DueRow]:
        nonlocal as_of
        page = await backend.scan_due(provider=provider, within=within, as_of=as_of, after=after, limit=limit)
        if as_of is None:
            as_of = next((row.as_of for row in page if due_row_problem(row) is None), None)
        return page

    return _refused_apart(
        checked_rows(
            read,
            position=lambda row: row.position,
            position_problem=lambda row: key_problem(row.key) or due_time_problem(row),
            is_requested=lambda row: row.key.provider == provider,
            row_problem=due_row_problem,
            page_size=page_size,
        )
    )


async def scan_providers(backend: Backend) -> AsyncGenerator[str, None]:
    """Iterate over the providers that have rows, in ascending order, by a query for one row of each.

    Raises:
        BackendError: The database refused or failed.
    """
    after: TokenKey | None = None
    limit = 1
    while True:
        page = await backend.scan(after=after, limit=limit)
        row = page[-1] if len(page) == limit else None
        if row is None:
            return
        if key_problem(row.key) is not None:
            limit += 1  # no page can begin behind this row
            continue
        if after is not None and row.key <= after:
            raise TamperedError(f"the database listed the row of {row.key}, which is not in order")
        if after is None or row.key.provider != after.provider:
            yield row.key.provider
        after, limit = max(row.key, TokenKey(row.key.provider, _LAST_USER_ID, _LAST_ACCOUNT)), 1


async def checked_rows(
    read: Callable[[PositionT | None, int], Awaitable[list[RowT]]],
    *,
    position: Callable[[RowT], PositionT],
    position_problem: Callable[[RowT], str | None],
    is_requested: Callable[[RowT], bool],
    row_problem: Callable[[RowT], str | None],
    page_size: int,
) -> AsyncGenerator[tuple[RowT, str | None], None]:
    """Iterate over rows in an order in which the database reads them page by page, each with what is wrong with it.

    Args:
        read: Reads a page: the rows after a position, up to a number.
        position: The position of a row.
        position_problem: Why no page can begin behind a row; None if one can.
        is_requested: Whether a row belongs to the list.
        row_problem: Names the column of a row whose value no store has written; None if there is none.
        page_size: Rows in each page.

    Raises:
        TamperedError: The database answered with a row that was not requested, or is not in order.
        BackendError: The database refused or failed.
    """
    after: PositionT | None = None
    # The rows behind `after` with an impossible position. No page can begin behind one, so the next has them again.
    unplaced = 0
    while True:
        limit, seen = page_size + unplaced, unplaced
        page = await read(after, limit)
        for number, row in enumerate(page):
            if problem := position_problem(row):
                if number < seen:
                    continue
                unplaced += 1
            else:
                # Comparing the strings is right: code points have the same order as their UTF-8 bytes.
                here = position(row)
                if not is_requested(row) or (after is not None and here <= after):
                    raise _not_requested(row.key)
                after, unplaced = here, 0
                problem = row_problem(row)
            yield row, problem
        if len(page) < limit:
            return


async def _refused_apart(
    rows: AsyncGenerator[tuple[TokenRowT, str | None], None],
) -> AsyncGenerator[TokenRowT | RefusedRow, None]:
    async with aclosing(rows):
        async for row, problem in rows:
            yield row if problem is None else _refused(row, problem)


def _refused(row: ScannedRow | DueRow, problem: str) -> RefusedRow:
    return RefusedRow(TokenKey(*map(escaped, map(str, row.key))), problem)


async def search_rows(
    backend: Backend,
    where: RowFilter,
    *,
    provider: str | None,
    user_id: str | None,
    page_size: int,
    with_metadata: bool = False,
) -> AsyncGenerator[ScannedRow | RefusedRow, None]:
    """Iterate over the rows that a filter finds, in ascending order of their keys.

    Args:
        backend: The rows.
        where: The filter.
        provider: Only this provider's rows.
        user_id: Only this user's rows.
        page_size: Rows that each query reads, whether it finds them or not.
        with_metadata: Whether to read the sealed metadata of the rows that are found, too.

    Raises:
        TamperedError: As in :func:`scan_rows`.
        BackendError: The database refused or failed.
    """
    after: TokenKey | None = None
    limit = page_size
    while True:
        page = await backend.search(
            where, provider=provider, user_id=user_id, after=after, limit=limit, with_metadata=with_metadata
        )
        if page.end is not None and key_problem(page.end):
            limit += page_size  # no query can begin behind an impossible key
            continue
        last = after
        for row in page.rows:
            problem = key_problem(row.key)
            if problem is None:
                if not _is_among(row.key, provider, user_id) or (last is not None and row.key <= last):
                    raise _not_requested(row.key)
                last, problem = row.key, scanned_row_problem(row)
            yield row if problem is None else _refused(row, problem)
        if page.end is None:
            return
        if after is not None and page.end <= after:
            raise _not_requested(page.end)
        after, limit = page.end, page_size


def open_metadata(row: ScannedRow | RefusedRow, sealer: Sealer) -> tuple[ScannedRow | RefusedRow, dict[str, Any]]:
    """Open the metadata of a listed row. If it does not open, the row is a :class:`RefusedRow`."""
    if isinstance(row, RefusedRow):
        return row, {}
    try:
        return row, sealer.open_metadata(row.key, SealedMetadata(row.metadata, row.metadata_key_id))
    except UnknownKeyError as error:
        return RefusedRow(row.key, str(error), error.key_id), {}
    except TamperedError as error:
        return RefusedRow(row.key, str(error)), {}


def _is_among(key: TokenKey, provider: str | None, user_id: str | None) -> bool:
    """Whether the row is one of this provider and user, where they are named."""
    return provider in (None, key.provider) and user_id in (None, key.user_id)


def _not_requested(key: TokenKey | ValueKey) -> TamperedError:
    return TamperedError(f"the database listed the row of {key}, which was not requested, or is not in order")
