"""Reads rows page by page, and checks that each of them was requested."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from tokenstore.errors import TamperedError
from tokenstore.protocol import Backend
from tokenstore.records import ScannedRow, TokenKey

__all__ = ["scan_rows"]


async def scan_rows(
    backend: Backend, *, provider: str | None, user_id: str | None = None, page_size: int
) -> AsyncGenerator[ScannedRow, None]:
    """Iterate over rows in ascending order of their keys, by one short query a page.

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
    while True:
        page = await backend.scan(provider=provider, user_id=user_id, after=after, limit=page_size)
        for row in page:
            # Comparing the strings is right: code points have the same order as their UTF-8 bytes.
            in_order = after is None or row.key > after
            if not in_order or provider not in (None, row.key.provider) or user_id not in (None, row.key.user_id):
                raise TamperedError(
                    f"the database listed the row of {row.key}, which was not requested, or is not in order"
                )
            after = row.key
            yield row
        if len(page) < page_size:
            return
