"""A tokenstore backend that keeps rows in one JSON file: an example of a complete backend.

Its URLs are ``jsonfile:///relative.json`` and ``jsonfile:////absolute.json``. One process at a time can open the file;
the tasks of that process share it. Every write replaces the whole file, so the backend is for a few users only. It
implements compare-and-set and no row locks, so ``for_update=True`` is refused.
"""

from __future__ import annotations

import asyncio
import base64
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Self, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from tokenstore.errors import BackendUnavailableError, ConfigurationError, StoreClosedError, TableMissingError
from tokenstore.health import RowFilter, SearchPage
from tokenstore.options import OptionParser, read_options, switch
from tokenstore.records import (
    NO_METADATA,
    DueKey,
    DueRow,
    Failure,
    ScannedRow,
    SealedMetadata,
    SealedRecord,
    SealedTokens,
    TokenKey,
    new_generation,
)

__all__ = ["JsonFileBackend"]

T = TypeVar("T")

_OPTIONS: Final[Mapping[str, OptionParser]] = {"sync": switch}
_US: Final = 1_000_000
_BLOBS: Final = ("access_token", "refresh_token", "extra")
_SEALED: Final = (*(("tokens", name) for name in _BLOBS), ("metadata", "value"))


@dataclass(frozen=True, slots=True)
class _Row:
    tokens: SealedTokens
    generation: int
    created_at: int
    updated_at: int
    due_at: int | None
    lease_holder: str | None = None
    lease_expires_at: int | None = None
    failure_code: str | None = None
    retry_at: int | None = None
    failed_at: int | None = None
    metadata: SealedMetadata = NO_METADATA

    def is_leased(self, now: int) -> bool:
        """Whether a lease is live."""
        return self.lease_expires_at is not None and self.lease_expires_at > now

    def next(self, tokens: SealedTokens, metadata: SealedMetadata | None) -> _Row:
        """Return the row after a write of tokens: the next generation, without lease and failure."""
        kept = self.metadata if metadata is None else metadata
        return _Row(tokens, self.generation + 1, self.created_at, _now(), tokens.due_at, metadata=kept)


_Rows = dict[TokenKey, _Row]


class JsonFileBackend:
    """Rows in one JSON file.

    Args:
        path: The file.
        sync: Whether a write waits until the data is on the disk, so that a power failure cannot undo it.
    """

    def __init__(self, path: Path, *, sync: bool = True) -> None:
        self._path = path
        self._sync = sync
        self._rows: _Rows | None = None  # the file's rows, once it has been read
        self._owner: int | None = None  # the descriptor of the lock file, while this object holds its lock
        self._writing = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    @classmethod
    def from_url(cls, url: str, options: Mapping[str, object]) -> Self:
        """Make a backend for a URL, without opening the file."""
        parts = urlsplit(url)
        if parts.netloc or not parts.path[1:]:
            raise ConfigurationError("expected jsonfile:///relative.json or jsonfile:////absolute.json")
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        checked: dict[str, Any] = read_options("jsonfile://", _OPTIONS, query, options)
        return cls(Path(unquote(parts.path[1:])).absolute(), **checked)

    def __repr__(self) -> str:
        return f"<JsonFileBackend {self._path}>"

    async def setup(self) -> None:
        """Create the file if it is missing."""

        def create(rows: _Rows) -> None:
            pass

        await self._change(create, create=True)

    async def aclose(self) -> None:
        """Finish the current writes and release the file."""
        self._closed = True
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._owner is not None:
            os.close(self._owner)
            self._owner = None

    async def get(self, key: TokenKey) -> SealedRecord | None:
        """Read without a lock: a write replaces the dict and never changes it."""
        row = (await self._read()).get(key)
        return None if row is None else _record(key, row, _now())

    async def put(self, key: TokenKey, tokens: SealedTokens, *, metadata: SealedMetadata | None = None) -> None:
        """Insert or replace a row."""

        def put(rows: _Rows) -> bool:
            row = rows.get(key)
            rows[key] = _new(tokens, metadata) if row is None else row.next(tokens, metadata)
            return True

        await self._change(put)

    async def insert(self, key: TokenKey, tokens: SealedTokens, *, metadata: SealedMetadata | None = None) -> bool:
        """Insert a row if there is none, or only an empty one."""

        def insert(rows: _Rows) -> bool:
            row = rows.get(key)
            if row is not None and (tokens.is_empty or not row.tokens.is_empty):
                return False
            new = _new(tokens, metadata)
            rows[key] = new if row is None else replace(new, generation=row.generation + 1, created_at=row.created_at)
            return True

        return await self._change(insert)

    async def clock(self) -> int:
        """Read the clock that leases, failures and times of writes are measured on."""
        if self._closed:
            raise StoreClosedError("this store is closed")
        return _now()

    async def delete(self, key: TokenKey) -> bool:
        """Delete a row, with its lease if it has one."""
        return await self._change(lambda rows: rows.pop(key, None) is not None)

    async def scan(
        self,
        *,
        provider: str | None = None,
        user_id: str | None = None,
        after: TokenKey | None = None,
        limit: int,
        with_metadata: bool = False,
    ) -> list[ScannedRow]:
        """Read one page. All rows are in memory, so sorting them is cheap enough."""
        rows, now = await self._read(), _now()
        found = [
            (key, row)
            for key, row in rows.items()
            if not row.tokens.is_empty
            and provider in (None, key.provider)
            and user_id in (None, key.user_id)
            and (after is None or _order(key) > _order(after))
        ]
        found.sort(key=lambda item: _order(item[0]))
        return [_scanned(key, row, now, with_metadata) for key, row in found[:limit]]

    async def search(
        self,
        where: RowFilter,
        *,
        provider: str | None = None,
        user_id: str | None = None,
        after: TokenKey | None = None,
        limit: int,
        with_metadata: bool = False,
    ) -> SearchPage:
        """Read one page, and return the rows that the filter finds."""
        page = await self.scan(
            provider=provider, user_id=user_id, after=after, limit=limit, with_metadata=with_metadata
        )
        return SearchPage([row for row in page if where.matches(row)], page[-1].key if len(page) == limit else None)

    async def scan_due(
        self, *, provider: str, within: float, as_of: int | None = None, after: DueKey | None = None, limit: int
    ) -> list[DueRow]:
        """Read one page of due rows. All rows are in memory, so no index is needed."""
        rows, now = await self._read(), _now()
        until = (now if as_of is None else as_of) + round(within * _US)
        found = [
            DueRow(key, row.due_at, row.tokens.access_token_expires_at, row.updated_at, now, row.tokens.is_empty)
            for key, row in rows.items()
            if key.provider == provider and row.due_at is not None and row.due_at <= until
        ]
        found.sort(key=lambda row: row.position)  # code points have the same order as their UTF-8 bytes
        return [row for row in found if after is None or row.position > after][:limit]

    async def claim_lease(self, key: TokenKey, *, generation: int, holder: str, duration: float) -> bool:
        """Claim the row, unless it has a live lease or a failure in force."""

        def claim(row: _Row) -> _Row | None:
            now = _now()
            failed = row.failure_code is not None and (row.retry_at is None or row.retry_at > now)
            if row.is_leased(now) or failed:
                return None
            return replace(row, lease_holder=holder, lease_expires_at=now + round(duration * _US))

        return await self._compare_and_set(key, generation, claim)

    async def complete_lease(
        self,
        key: TokenKey,
        tokens: SealedTokens,
        *,
        generation: int,
        holder: str,
        metadata: SealedMetadata | None = None,
    ) -> bool:
        """Write the tokens, unless another holder's lease is live.

        A holder whose own lease has expired may write, because it can have the only copy of the new tokens.
        """

        def complete(row: _Row) -> _Row | None:
            return None if row.is_leased(_now()) and row.lease_holder != holder else row.next(tokens, metadata)

        return await self._compare_and_set(key, generation, complete)

    async def release_lease(
        self, key: TokenKey, *, generation: int, holder: str, failure: Failure | None = None
    ) -> bool:
        """End the holder's lease, and store the failure if there was one."""

        def release(row: _Row) -> _Row | None:
            if row.lease_holder != holder:
                return None
            ended = replace(
                row, lease_holder=None, lease_expires_at=None, failure_code=None, retry_at=None, failed_at=None
            )
            if failure is None:
                return ended
            failed = replace(ended, failure_code=failure.code, failed_at=_now())
            if failure.retry_in is None:  # not due before the next login
                return replace(failed, due_at=None)
            return replace(failed, retry_at=_now() + round(failure.retry_in * _US))

        return await self._compare_and_set(key, generation, release)

    async def clear_failure(self, key: TokenKey, *, min_age: float = 0.0, as_of: int | None = None) -> bool:
        """Clear the failure, if it is old enough. A dead row is due again."""

        def clear(rows: _Rows) -> bool:
            row = rows.get(key)
            until = (_now() if as_of is None else as_of) - round(min_age * _US)
            if row is None or row.failed_at is None or row.failed_at > until:
                return False
            # What a row without a refresh token was for is not known any more: `issued` is only for the write.
            due_again = replace(row.tokens, issued=False).due_at
            due_at = due_again if row.retry_at is None else row.due_at
            rows[key] = replace(row, failure_code=None, retry_at=None, failed_at=None, due_at=due_at)
            return True

        return await self._change(clear)

    async def rewrap(self, key: TokenKey, tokens: SealedTokens, *, generation: int) -> bool:
        """Replace the sealed fields and the key's name, and nothing else."""

        def rewrap(row: _Row) -> _Row:
            fields = {name: getattr(tokens, name) for name in (*_BLOBS, "key_id")}
            return replace(row, tokens=replace(row.tokens, **fields))

        return await self._compare_and_set(key, generation, rewrap)

    async def set_metadata(self, key: TokenKey, metadata: SealedMetadata, *, replacing: bytes | None) -> bool:
        """Replace the application's own fields, if their sealed value is still the one that the caller read."""

        def set_metadata(rows: _Rows) -> bool:
            row = rows.get(key)
            if row is None or row.metadata.value != replacing:
                return False
            rows[key] = replace(row, metadata=metadata)
            return True

        return await self._change(set_metadata)

    # Every change uses these two methods.

    async def _compare_and_set(self, key: TokenKey, generation: int, change: Callable[[_Row], _Row | None]) -> bool:
        def compare(rows: _Rows) -> bool:
            row = rows.get(key)
            changed = change(row) if row is not None and row.generation == generation else None
            if changed is None:
                return False
            rows[key] = changed
            return True

        return await self._change(compare)

    async def _change(self, change: Callable[[_Rows], T], *, create: bool = False) -> T:
        """Change a copy of the rows and write it, one caller after the other. If the write fails, no row has changed.

        The change runs in a task of the backend, so that cancelling the caller does not cancel it. Otherwise the
        cancelled caller's thread could write to the file at the same time as the next caller's.
        """
        if self._closed:
            raise StoreClosedError("this store is closed")
        task = asyncio.create_task(self._change_alone(change, create=create))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _change_alone(self, change: Callable[[_Rows], T], *, create: bool) -> T:
        async with self._writing:
            if self._rows is None:
                self._rows = await asyncio.to_thread(self._load, create=create)
            rows = dict(self._rows)
            result = change(rows)
            if result:
                await asyncio.to_thread(self._save, rows)
                self._rows = rows
            return result

    async def _read(self) -> _Rows:
        if self._rows is None or self._closed:
            await self._change(lambda _rows: None)
        assert self._rows is not None  # noqa: S101  # for the type checkers
        return self._rows

    # These methods run in a thread, because file operations block.

    def _load(self, *, create: bool) -> _Rows:
        try:
            if not self._path.exists():
                if not create:
                    raise TableMissingError(f"{self._path} does not exist: create it with `await store.setup()`")
                self._take_ownership()
                self._save({})
            self._take_ownership()
            return dict(map(_from_json, json.loads(self._path.read_bytes())))
        except (OSError, ValueError, TypeError, KeyError) as error:
            # `from None`: the exception's text may contain a row.
            reason = error.strerror if isinstance(error, OSError) else "it is not a file of this backend's"
            raise BackendUnavailableError(f"{self._path} cannot be read: {reason}") from None

    def _take_ownership(self) -> None:
        """Lock a second file, because every write replaces the first one."""
        if self._owner is not None:
            return
        descriptor = os.open(f"{self._path}.lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise BackendUnavailableError(f"{self._path} is open in another process, or twice in this one") from None
        self._owner = descriptor

    def _save(self, rows: _Rows) -> None:
        """Replace the file in one step, so that after a crash it is either the old file or the new one."""
        try:
            descriptor, draft = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")  # mode 0600
            try:
                with os.fdopen(descriptor, "w", encoding="ascii") as file:
                    json.dump([_to_json(key, row) for key, row in rows.items()], file)
                    file.flush()
                    if self._sync:
                        os.fsync(descriptor)
                Path(draft).replace(self._path)
            except BaseException:
                with suppress(FileNotFoundError):
                    Path(draft).unlink()
                raise
            if self._sync:
                folder = os.open(self._path.parent, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)
        except OSError as error:
            raise BackendUnavailableError(f"{self._path} cannot be written: {error.strerror}") from None


def _new(tokens: SealedTokens, metadata: SealedMetadata | None) -> _Row:
    return _Row(tokens, new_generation(), _now(), _now(), tokens.due_at, metadata=metadata or NO_METADATA)


def _now() -> int:
    return int(time.time() * _US)


def _order(key: TokenKey) -> tuple[bytes, ...]:
    return tuple(part.encode() for part in key)


def _record(key: TokenKey, row: _Row, now: int) -> SealedRecord:
    failure = None
    if row.failure_code is not None:
        failure = Failure(row.failure_code, None if row.retry_at is None else (row.retry_at - now) / _US)
    return SealedRecord(
        key=key,
        tokens=row.tokens,
        generation=row.generation,
        lease_holder=row.lease_holder,
        lease_expires_in=None if row.lease_expires_at is None else (row.lease_expires_at - now) / _US,
        failure=failure,
        created_at=row.created_at,
        updated_at=row.updated_at,
        as_of=now,
        metadata=row.metadata,
    )


def _scanned(key: TokenKey, row: _Row, now: int, with_metadata: bool) -> ScannedRow:
    return ScannedRow(
        key=key,
        has_refresh_token=row.tokens.refresh_token is not None,
        issued=row.tokens.refresh_token is None and row.due_at is not None,
        access_token_expires_at=row.tokens.access_token_expires_at,
        refresh_token_expires_at=row.tokens.refresh_token_expires_at,
        access_token_expiry_known=row.tokens.access_token_expiry_known,
        key_id=row.tokens.key_id,
        generation=row.generation,
        created_at=row.created_at,
        updated_at=row.updated_at,
        as_of=now,
        failure_code=row.failure_code,
        failed_at=row.failed_at,
        retry_at=row.retry_at,
        lease_expires_at=row.lease_expires_at,
        metadata_key_id=row.metadata.key_id,
        metadata=row.metadata.value if with_metadata else None,
    )


def _to_json(key: TokenKey, row: _Row) -> dict[str, Any]:
    document = {**key._asdict(), **asdict(row)}
    for part, name in _SEALED:
        blob = document[part][name]
        document[part][name] = None if blob is None else base64.b64encode(blob).decode()
    return document


def _from_json(document: dict[str, Any]) -> tuple[TokenKey, _Row]:
    key = TokenKey(*(document.pop(name) for name in TokenKey._fields))
    for part, name in _SEALED:
        text = document[part][name]
        document[part][name] = None if text is None else base64.b64decode(text)
    tokens, metadata = SealedTokens(**document.pop("tokens")), SealedMetadata(**document.pop("metadata"))
    return key, _Row(tokens, **document, metadata=metadata)
