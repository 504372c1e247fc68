"""Loads and stores of single rows. Several that wait at the same time share a statement."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from copy import copy
from typing import Final

from tokenstore.errors import BackendError, BackendUnavailableError, LoginRefusedError, TamperedError
from tokenstore.records import SealedRecord, SealedTokens, TokenKey
from tokenstore_sql.batching import Batch, Batches, SendAlone
from tokenstore_sql.calls import StoreCalls
from tokenstore_sql.rows import Rows, record_of

__all__ = ["Loads", "Stores"]

Entry = tuple[TokenKey, SealedTokens]

# How many sealed bytes weigh as much as another row: servers limit the size of a statement.
_ROW_BYTES: Final = 16 * 1024
_NO_LOCK: Final = nullcontext()


class Loads(Batches[TokenKey, SealedRecord | None]):
    """Reads of single rows.

    Args:
        calls: The road that they take.
    """

    def __init__(self, calls: StoreCalls) -> None:
        super().__init__(width=calls.dialect.statements_at_once, most=calls.statements.grammar.most_at_once)
        self._calls = calls

    async def load(self, key: TokenKey) -> SealedRecord | None:
        """Read one row."""
        try:
            return await self.ask(key)
        except SendAlone:
            return await self.send_one(key)

    async def send(self, batch: Batch[TokenKey], *, again: bool = True) -> Sequence[SealedRecord | None]:
        try:
            return await self._calls.read(batch.requests, lambda rows: rows.get_many(batch.take()), again=again)
        except TamperedError:
            if len(batch.requests) > 1:
                raise SendAlone from None  # one row cannot be read; the callers of the others get theirs
            raise

    async def send_one(self, request: TokenKey) -> SealedRecord | None:
        """The fast lane: most calls read one row for one caller, so no layer is passed that can be left out.

        Whatever goes wrong, the read is sent again on the ordinary road, which tells errors apart.
        """
        source = self._calls.source
        if (connection := source.take()) is None:
            (row,) = await self.send(Batch([request]))
            return row
        try:
            with self._calls.read_deadline.limited(TimeoutError):
                rows, _ = await connection.run(
                    self._calls.statements.get,
                    {"p": request.provider, "u": request.user_id, "a": request.account},
                )
            return record_of(rows)
        except Exception:  # noqa: BLE001, S110 - see above
            pass
        finally:
            _ = source.put_back(connection)
        if connection.lost:
            source.discard_idle()
        (row,) = await self.send(Batch([request]), again=False)
        return row

    def restated(self, error: Exception, request: TokenKey) -> Exception:
        return _restated(self._calls, error, request)


class Stores(Batches[Entry, None]):
    """Writes of single rows. The database carries out a batch as a whole, or refuses it as a whole.

    Args:
        calls: The road that they take.
    """

    writes = True

    def __init__(self, calls: StoreCalls) -> None:
        super().__init__(width=calls.dialect.statements_at_once, most=calls.statements.grammar.most_at_once)
        self._calls = calls

    async def store(self, key: TokenKey, tokens: SealedTokens) -> None:
        """Write one row."""
        # Take the row's local lock before batching: one contended row must not delay the whole batch.
        async with self._calls.local_lock([key]) if self._calls.dialect.locks_rows else _NO_LOCK:
            try:
                await self.ask((key, tokens))
            except SendAlone:
                await self.send_one((key, tokens))

    async def send(self, batch: Batch[Entry]) -> Sequence[None]:
        keys: list[TokenKey] = [key for key, _ in batch.requests]

        async def put(rows: Rows) -> None:
            entries = batch.take()
            keys[:] = [key for key, _ in entries]
            await rows.put_many(entries)

        try:
            await self._calls.write(keys, put, locked=self._calls.dialect.locks_rows)
        except (BackendUnavailableError, LoginRefusedError):
            raise
        except BackendError:
            if len(keys) > 1:
                raise SendAlone from None
            raise
        return [None] * len(keys)

    def weight(self, request: Entry) -> int:
        tokens = request[1]
        size = sum(map(len, filter(None, (tokens.access_token, tokens.refresh_token, tokens.extra))))
        return 1 + size // _ROW_BYTES

    def restated(self, error: Exception, request: Entry) -> Exception:
        return _restated(self._calls, error, request[0])


def _restated(calls: StoreCalls, error: Exception, key: TokenKey) -> Exception:
    """What one caller gets of an error that is about several rows, or about the table."""
    if not isinstance(error, BackendError):
        return copy(error)
    whole = f"{calls.about([])}: "
    if not str(error).startswith(whole):
        return error
    return type(error)(f"{key}: {str(error).removeprefix(whole)}", code=error.code)
