"""Reads rows page by page, and checks that each of them was requested and can be believed."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass

from tokenstore.errors import TamperedError
from tokenstore.escaping import escaped
from tokenstore.health import RowFilter
from tokenstore.protocol import Backend
from tokenstore.records import ScannedRow, TokenKey
from tokenstore.validation import key_problem, scanned_row_problem

__all__ = ["RefusedRow", "scan_rows", "search_rows"]


@dataclass(frozen=True, slots=True)
class RefusedRow:
    """A row with a value that no store has written.

    Attributes:
        key: The row's key. Characters that cannot be printed are escaped.
        problem: What is wrong with the row.
    """

    key: TokenKey
    problem: str

    def error(self) -> TamperedError:
        """The error for this row."""
        return TamperedError(self.problem)


async def scan_rows(
    backend: Backend, *, provider: str | None, user_id: str | None = None, page_size: int
) -> AsyncGenerator[ScannedRow | RefusedRow, None]:
    """Iterate over rows in ascending order of their keys, by one short query a page.

    A row that was altered ends nothing: it is yielded as a :class:`RefusedRow`, and the rows behind it follow.

    Args:
        backend: The rows.
        provider: Only this provider's rows.
        user_id: Only this user's rows.
        page_size: Rows in each query.

    Raises:
        TamperedError: The database answered with a row of another provider or user, or with one that is not in order.
            Otherwise a refresher could get another provider's token, or the iteration might never end.
        BackendError: The database refused or failed.
    """
    after: TokenKey | None = None
    # The rows behind `after` with an impossible key. No query can begin behind one, so the next page has them again.
    keyless = 0
    while True:
        limit, seen = page_size + keyless, keyless
        page = await backend.scan(provider=provider, user_id=user_id, after=after, limit=limit)
        for position, row in enumerate(page):
            if problem := key_problem(row.key):
                if position < seen:
                    continue
                keyless += 1
            else:
                # Comparing the strings is right: code points have the same order as their UTF-8 bytes.
                in_order = after is None or row.key > after
                if not in_order or provider not in (None, row.key.provider) or user_id not in (None, row.key.user_id):
                    raise _not_requested(row.key)
                after, keyless = row.key, 0
                problem = scanned_row_problem(row)
            yield row if problem is None else RefusedRow(TokenKey(*map(escaped, map(str, row.key))), problem)
        if len(page) < limit:
            return


async def search_rows(
    backend: Backend, where: RowFilter, *, provider: str | None, user_id: str | None, page_size: int
) -> AsyncGenerator[ScannedRow | RefusedRow, None]:
    """Iterate over the rows that a filter finds, in ascending order of their keys.

    Args:
        backend: The rows.
        where: The filter.
        provider: Only this provider's rows.
        user_id: Only this user's rows.
        page_size: Rows that each query reads, whether it finds them or not.

    Raises:
        TamperedError: As in :func:`scan_rows`.
        BackendError: The database refused or failed.
    """
    after: TokenKey | None = None
    limit = page_size
    while True:
        page = await backend.search(where, provider=provider, user_id=user_id, after=after, limit=limit)
        if page.end is not None and key_problem(page.end):
            limit += page_size  # no query can begin behind an impossible key
            continue
        last = after
        for row in page.rows:
            problem = key_problem(row.key)
            if problem is None:
                in_order = last is None or row.key > last
                if not in_order or provider not in (None, row.key.provider) or user_id not in (None, row.key.user_id):
                    raise _not_requested(row.key)
                last, problem = row.key, scanned_row_problem(row)
            yield row if problem is None else RefusedRow(TokenKey(*map(escaped, map(str, row.key))), problem)
        if page.end is None:
            return
        if after is not None and page.end <= after:
            raise _not_requested(page.end)
        after, limit = page.end, page_size


def _not_requested(key: TokenKey) -> TamperedError:
    return TamperedError(f"the database listed the row of {key}, which was not requested, or is not in order")
