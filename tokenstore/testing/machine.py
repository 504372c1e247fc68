"""A Hypothesis state machine that compares a backend with the in-memory backend, operation by operation.

It runs sequences of all operations of :class:`tokenstore.protocol.Backend`, alone, concurrently, and in transactions
that commit or roll back, but none on values. It compares each result, and after each step all rows. If the two backends
differ, the error names the fields, and Hypothesis prints the shortest sequence that it found::

    def test_agreement(tmp_path):
        check_agreement(lambda: backend_for_url(f"mine://{tmp_path}", {}))

Each row's generations start at a random number, so the machine compares by how much they grow. Of times it compares
which operations change them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar

from tokenstore.errors import MissingDependencyError
from tokenstore.health import STATUSES, RowFilter
from tokenstore.protocol import Backend, SupportsRowLocks
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
    empty_tokens,
)
from tokenstore.registry import backend_for_url

try:
    from hypothesis import settings as hypothesis_settings
    from hypothesis import strategies as st
    from hypothesis.stateful import (
        RuleBasedStateMachine,
        initialize,
        invariant,
        precondition,
        rule,
        run_state_machine_as_test,
    )
except ImportError:
    raise MissingDependencyError(
        'tokenstore.testing.machine needs Hypothesis: pip install "tokenstore[testing]"'
    ) from None

__all__ = ["agreement_machine", "check_agreement"]

T = TypeVar("T")

_LONG = 10_000.0
"""Seconds; a lease that does not expire during a run."""
_SHORT = 0.002
"""Seconds; for a lease or a failure whose end the machine waits for."""
_TIMEOUT = 20.0

# Few keys, so that operations use the same rows. Some are equal under some collations, and their order as UTF-8 differs
# from that as UTF-16 and from the alphabetical one.
_KEYS = [
    TokenKey("github", "bob"),
    TokenKey("github", "bob", "work"),
    TokenKey("GitHub", "bob"),
    TokenKey("github", "bob "),
    TokenKey("github", "bob", "Work"),
    TokenKey("github", "e\u0301"),
    TokenKey("\ufb00", "é"),
    TokenKey("\ufb00", "😀"),
]
_HOLDERS = ["h1", "h2", "H1"]

_keys = st.sampled_from(_KEYS)
_holders = st.sampled_from(_HOLDERS)
_ages = st.sampled_from([0, 0, 0, 1, 2])  # 0: the newest generation seen of a key, 1: the one before
# None of them lies between the model's clock and the backend's.
_times = st.one_of(
    st.none(),
    st.sampled_from([-62_135_596_800_000_000, -1, 0, 253_402_300_799_999_999]),
    st.integers(0, 2**50),
    st.integers(2**52, 2**57),
)
_blobs = st.binary(min_size=1, max_size=40)
_tokens = st.builds(
    SealedTokens,
    _blobs,
    st.none() | _blobs,
    st.none() | _blobs,
    _times,
    _times,
    st.sampled_from("kK"),
    st.booleans(),
    st.booleans(),
)
# Tokens of several writes at once: a row that was read does not tell which of two writes it is that differ in `issued`.
_logged_in = _tokens.map(lambda tokens: replace(tokens, issued=False))
_tokens_or_none = _tokens | st.builds(empty_tokens, st.integers(0, 2**50))
_durations = st.sampled_from([0.0, 3600.0])
# Few values, so that a replacement often names the stored one.
_metadata = st.just(NO_METADATA) | st.builds(
    SealedMetadata, st.sampled_from([b"1", b"2", b"2 "]), st.sampled_from("kK")
)
_with_metadata = st.none() | st.none() | _metadata
_replaced = st.sampled_from([None, b"1", b"2", b"2 "])
_failures = st.none() | st.builds(
    Failure,
    st.sampled_from(["invalid_grant", "unavailable", "refused/invalid_client"]),
    st.sampled_from([None, _SHORT, _LONG]),
)
# Between, before and after the keys.
_places = st.builds(
    TokenKey,
    st.sampled_from(["G", "GitHub", "github", "h", "\ufb00"]),
    st.sampled_from(["a", "bob", "c", "é!", "z"]),
    st.sampled_from(["", "X", "x"]),
)
_due_positions = st.builds(
    DueKey,
    st.sampled_from([-62_135_596_800_000_000, -1, 0, 2**50]),
    st.sampled_from(["a", "bob", "c", "é!", "z"]),
    st.sampled_from(["", "X", "x"]),
)
_operations = st.one_of(
    st.tuples(st.just("lock"), _keys),
    st.tuples(st.just("get"), _keys),
    st.tuples(st.just("put"), _keys, _tokens),
    st.tuples(st.just("insert"), _keys, _tokens_or_none),
    st.tuples(st.just("delete"), _keys),
    st.tuples(st.just("set_metadata"), _keys, _metadata, _replaced),
    st.tuples(st.just("rollback")),
)


class _ModelBackend(Backend, SupportsRowLocks, Protocol):
    """The model's type: a backend that also has row locks."""


class _RolledBack(Exception):  # not an error: ends a transaction with a roll-back
    pass


@dataclass
class _Clock:
    """The model's clock, which advances only when the machine sets it."""

    now: float = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


def _model(clock: _Clock) -> _ModelBackend:
    # Made by URL, because the core must not import a backend; a URL cannot carry the clock.
    backend: Any = backend_for_url("memory://", {})
    backend._clock = clock
    model: _ModelBackend = backend
    return model


def check_agreement(open_backend: Callable[[], Backend], settings: hypothesis_settings | None = None) -> None:
    """Run the machine as a test.

    Args:
        open_backend: Makes a backend whose rows may be deleted. It is called once; the test sets the backend up and
            closes it.
        settings: Hypothesis's settings; default: those of the loaded profile. After a failure Hypothesis shortens the
            sequence for up to five minutes; without ``Phase.shrink`` among its ``phases`` it reports the first one.
    """
    with asyncio.Runner() as runner:

        async def opened() -> Backend:
            backend = open_backend()
            await backend.setup()
            return backend

        backend = runner.run(opened())
        try:
            run_state_machine_as_test(agreement_machine(runner, backend), settings=settings)
        finally:
            runner.run(backend.aclose())


def agreement_machine(runner: asyncio.Runner, backend: Backend) -> type[RuleBasedStateMachine]:
    """Make the machine's class for a backend on which ``setup()`` has run in the runner's event loop."""

    class AgreementMachine(_Machine):
        _runner = runner
        _backend = backend

    return AgreementMachine


class _Machine(RuleBasedStateMachine):
    _runner: asyncio.Runner
    _backend: Backend

    def __init__(self) -> None:
        super().__init__()
        self._clock = _Clock()
        self._model = _model(self._clock)
        # All generations seen of a key, newest last, as pairs of the model's number and the backend's.
        self._generations: dict[TokenKey, list[tuple[int, int]]] = {}
        self._created: dict[tuple[TokenKey, int], int] = {}
        self._updated: dict[tuple[TokenKey, int], int] = {}
        self._run(self._clear())

    def teardown(self) -> None:
        self._run(self._model.aclose())

    @initialize(tokens=_tokens)
    def begin(self, tokens: SealedTokens) -> None:
        """Start with rows, because most faults need an existing row."""
        for key in _KEYS[:4]:
            self.put(key, tokens)

    # Single operations

    @rule(key=_keys, tokens=_tokens, metadata=_with_metadata)
    def put(self, key: TokenKey, tokens: SealedTokens, metadata: SealedMetadata | None = None) -> None:
        self._agree(lambda backend, _: backend.put(key, tokens, metadata=metadata))

    @rule(key=_keys, tokens=_tokens_or_none, metadata=_with_metadata)
    def insert(self, key: TokenKey, tokens: SealedTokens, metadata: SealedMetadata | None) -> None:
        self._agree(lambda backend, _: backend.insert(key, tokens, metadata=metadata))

    @rule(key=_keys, metadata=_metadata, replacing=_replaced)
    def set_metadata(self, key: TokenKey, metadata: SealedMetadata, replacing: bytes | None) -> None:
        self._agree(lambda backend, _: backend.set_metadata(key, metadata, replacing=replacing))

    @rule(key=_keys)
    def delete(self, key: TokenKey) -> None:
        self._agree(lambda backend, _: backend.delete(key))

    @rule(key=_keys)
    def get(self, key: TokenKey) -> None:
        self._agree(lambda backend, _: backend.get(key))

    @rule(
        provider=st.none() | st.sampled_from([*{key.provider for key in _KEYS}, "nobody"]),
        user_id=st.none() | st.sampled_from([*{key.user_id for key in _KEYS}, "nobody"]),
        after=st.none() | _keys | _places,
        limit=st.integers(1, 16),
        with_metadata=st.booleans(),
    )
    def scan(
        self, provider: str | None, user_id: str | None, after: TokenKey | None, limit: int, with_metadata: bool
    ) -> None:
        self._agree(
            lambda backend, _: backend.scan(
                provider=provider, user_id=user_id, after=after, limit=limit, with_metadata=with_metadata
            )
        )

    @rule(
        provider=st.sampled_from([*{key.provider for key in _KEYS}, "nobody"]),
        within=st.sampled_from([0.0, 0.000_001, 1e9]),
        as_of=st.sampled_from([-62_135_596_800_000_000, -1, 0, 2**51, 253_402_300_799_999_999]),
        after=st.none() | _due_positions | st.integers(0, 3),
        limit=st.integers(1, 16),
    )
    def scan_due(self, provider: str, within: float, as_of: int, after: DueKey | int | None, limit: int) -> None:
        """Read a page after a position; a number stands for the position of so many rows that are due."""
        if isinstance(after, int):
            due = self._run(self._model.scan_due(provider=provider, within=within, as_of=as_of, limit=after + 1))
            after = due[-1].position if due else None
        self._agree(
            lambda backend, _: backend.scan_due(provider=provider, within=within, as_of=as_of, after=after, limit=limit)
        )

    @rule(tokens=_tokens, after=st.integers(0, 3), limit=st.integers(1, 4))
    def scan_rows_that_are_due_at_once(self, tokens: SealedTokens, after: int, limit: int) -> None:
        """Make the rows of a provider due at one time, because random times are seldom equal, and read a page."""
        together = replace(tokens, refresh_token=b"r", access_token_expires_at=0)
        for key in _KEYS:
            if key.provider == _KEYS[0].provider:
                self.put(key, together)
        self.scan_due(_KEYS[0].provider, 0.0, 0, after, limit)

    @rule(key=_keys, age=_ages, holder=_holders, brief=st.booleans())
    def claim(self, key: TokenKey, age: int, holder: str, brief: bool) -> None:
        """Claim a lease; if it is brief, wait until it has expired."""
        duration = _SHORT if brief else _LONG
        granted = self._agree(
            lambda backend, which: backend.claim_lease(
                key, generation=self._generation(key, age)[which], holder=holder, duration=duration
            )
        )
        if granted and brief:
            self._wait_out(key)

    @rule(key=_keys, age=_ages, holder=_holders, tokens=_tokens, metadata=_with_metadata)
    def complete(
        self, key: TokenKey, age: int, holder: str, tokens: SealedTokens, metadata: SealedMetadata | None = None
    ) -> None:
        self._agree(
            lambda backend, which: backend.complete_lease(
                key, tokens, generation=self._generation(key, age)[which], holder=holder, metadata=metadata
            )
        )

    @rule(key=_keys, age=_ages, holder=_holders, failure=_failures)
    def release(self, key: TokenKey, age: int, holder: str, failure: Failure | None) -> None:
        released = self._agree(
            lambda backend, which: backend.release_lease(
                key, generation=self._generation(key, age)[which], holder=holder, failure=failure
            )
        )
        if released and failure is not None and failure.retry_in == _SHORT:
            self._wait_out(key)

    @rule(key=_keys, young=st.booleans())
    def clear_failure(self, key: TokenKey, young: bool) -> None:
        """The model's clock goes on by a second each step; so a failure is young or old on both."""
        self._agree(lambda backend, _: backend.clear_failure(key, min_age=_LONG if young else 0.0))

    @rule(
        status=st.none() | st.sampled_from(sorted(STATUSES)),
        margin=_durations,
        within=st.none() | _durations,
        prefix=st.none() | st.sampled_from(["b", "bob", "bob ", "e", "e\u0301", "é", "z", "\U0010ffff"]),
        provider=st.none() | st.sampled_from([*{key.provider for key in _KEYS}, "nobody"]),
        after=st.none() | _keys | _places,
        limit=st.integers(1, 16),
        with_metadata=st.booleans(),
    )
    def search(
        self,
        status: str | None,
        margin: float,
        within: float | None,
        prefix: str | None,
        provider: str | None,
        after: TokenKey | None,
        limit: int,
        with_metadata: bool,
    ) -> None:
        """Search page after page. A backend may read more rows for one page than another does."""
        where = RowFilter(status, margin, within, prefix)

        async def everything(backend: Backend) -> list[ScannedRow]:
            found: list[ScannedRow] = []
            begin = after
            while True:
                page = await backend.search(
                    where, provider=provider, after=begin, limit=limit, with_metadata=with_metadata
                )
                found += page.rows
                if page.end is None:
                    return found
                assert begin is None or page.end > begin
                begin = page.end

        self._agree(lambda backend, _: everything(backend))

    @rule(key=_keys, age=_ages, tokens=_tokens)
    def rewrap(self, key: TokenKey, age: int, tokens: SealedTokens) -> None:
        self._agree(lambda backend, which: backend.rewrap(key, tokens, generation=self._generation(key, age)[which]))

    @rule(
        data=st.data(),
        brief=st.booleans(),
        tokens=_tokens,
        failure=_failures,
        ending=st.sampled_from("cr-"),
        ended_by=st.sampled_from(["h1", "h1", "h2"]),
    )
    def refresh(
        self,
        data: st.DataObject,
        brief: bool,
        tokens: SealedTokens,
        failure: Failure | None,
        ending: str,
        ended_by: str,
    ) -> None:
        """Claim and end a lease of an existing row in one step, because random single steps seldom do both."""
        existing = [key for key in _KEYS if self._run(self._model.get(key)) is not None]
        if existing:
            key = data.draw(st.sampled_from(existing))
            self.claim(key, 0, "h1", brief)
            if ending == "c":
                self.complete(key, 0, ended_by, tokens)
            elif ending == "r":
                self.release(key, 0, ended_by, failure)

    # Concurrent operations, whose order does not matter or can be derived from the results

    @rule(entries=st.dictionaries(_keys, _tokens, min_size=2, max_size=6), reads=st.lists(_keys, max_size=3))
    def put_different_rows_at_once(self, entries: dict[TokenKey, SealedTokens], reads: list[TokenKey]) -> None:
        self._at_once(
            *(self._backend.put(key, tokens) for key, tokens in entries.items()),
            *(self._backend.get(key) for key in reads),
            self._backend.scan(limit=3),
        )
        for key, tokens in entries.items():
            self._run(self._model.put(key, tokens))

    @rule(key=_keys, versions=st.lists(_logged_in, min_size=2, max_size=5))
    def put_one_row_at_once(self, key: TokenKey, versions: list[SealedTokens]) -> None:
        self._at_once(*(self._backend.put(key, tokens) for tokens in versions))
        self._catch_up(key, versions)

    @rule(key=_keys, versions=st.lists(_logged_in, min_size=2, max_size=5))
    def insert_at_once(self, key: TokenKey, versions: list[SealedTokens]) -> None:
        inserted = self._at_once(*(self._backend.insert(key, tokens) for tokens in versions))
        winner = versions[inserted.index(True)] if True in inserted else versions[0]
        expected = self._run(self._model.insert(key, winner))
        assert inserted.count(True) == expected, f"{inserted.count(True)} of {len(versions)} inserts succeeded"

    @rule(key=_keys, age=_ages, brief=st.booleans(), number=st.integers(2, 6))
    def claim_at_once(self, key: TokenKey, age: int, brief: bool, number: int) -> None:
        of_model, of_backend = self._generation(key, age)
        holders = [f"claimer-{i}" for i in range(number)]
        duration = _SHORT if brief else _LONG

        def claim(backend: Backend, generation: int, holder: str) -> Awaitable[bool]:
            # Long leases, so that none expires before all claims have been made; a brief lease is ended by a release.
            return backend.claim_lease(key, generation=generation, holder=holder, duration=_LONG)

        granted = self._at_once(*(claim(self._backend, of_backend, holder) for holder in holders))
        winner = holders[granted.index(True)] if True in granted else holders[0]
        expected = self._run(claim(self._model, of_model, winner))
        assert granted.count(True) == expected, f"{granted.count(True)} of {number} claims were granted"
        if expected and duration == _SHORT:
            self._agree(
                lambda backend, which: backend.release_lease(
                    key, generation=(of_model, of_backend)[which], holder=winner
                )
            )

    @rule(key=_keys, versions=st.lists(_metadata, min_size=2, max_size=5), replacing=_replaced)
    def set_metadata_at_once(self, key: TokenKey, versions: list[SealedMetadata], replacing: bytes | None) -> None:
        """One after the other: if a write stores the value that it replaces, the next one succeeds, too."""
        versions = [metadata for metadata in versions if metadata.value != replacing]
        done = self._at_once(*(self._backend.set_metadata(key, metadata, replacing=replacing) for metadata in versions))
        for metadata in [versions[done.index(True)]] if True in done else versions:
            expected = self._run(self._model.set_metadata(key, metadata, replacing=replacing))
            assert done.count(True) == expected, f"{done.count(True)} of {len(versions)} replacements succeeded"

    @rule(key=_keys, number=st.integers(2, 4))
    def delete_at_once(self, key: TokenKey, number: int) -> None:
        deleted = self._at_once(*(self._backend.delete(key) for _ in range(number)))
        assert deleted.count(True) == self._run(self._model.delete(key)), f"deleted: {deleted}"

    @rule(key=_keys, age=_ages, tokens=st.lists(_tokens, min_size=3, max_size=3))
    def complete_and_put_at_once(self, key: TokenKey, age: int, tokens: list[SealedTokens]) -> None:
        """A lease is either completed before a concurrent put, or not at all."""
        of_model, of_backend = self._generation(key, age)
        completed, _ = self._at_once(
            self._backend.complete_lease(key, tokens[0], generation=of_backend, holder="h1"),
            self._backend.put(key, tokens[1]),
        )
        if completed:
            assert self._run(self._model.complete_lease(key, tokens[0], generation=of_model, holder="h1"))
        self._run(self._model.put(key, tokens[1]))

    # Transactions

    @precondition(lambda self: isinstance(self._backend, SupportsRowLocks))
    @rule(operations=st.lists(_operations, min_size=1, max_size=5), commits=st.booleans())
    def transaction(self, operations: list[tuple[Any, ...]], commits: bool) -> None:
        async def run(backend: SupportsRowLocks) -> list[object]:
            answers: list[object] = []
            try:
                async with backend.transaction() as transaction:
                    for name, *arguments in operations:
                        named = {"replacing": arguments.pop()} if name == "set_metadata" else {}
                        answer = await getattr(transaction, name)(*arguments, **named)
                        answers.append(_outline(answer))
                    if not commits:
                        raise _RolledBack
            except _RolledBack:
                pass
            return answers

        assert isinstance(self._backend, SupportsRowLocks)
        found, expected = self._run(run(self._backend)), self._run(run(self._model))
        assert found == expected, f"the backend returned {found}, the model {expected}"

    @precondition(lambda self: isinstance(self._backend, SupportsRowLocks))
    @rule(key=_keys, versions=st.lists(_logged_in, min_size=2, max_size=4))
    def lock_and_put_at_once(self, key: TokenKey, versions: list[SealedTokens]) -> None:
        async def one(backend: SupportsRowLocks, tokens: SealedTokens) -> tuple[SealedTokens | None, SealedTokens]:
            async with backend.transaction() as transaction:
                record = await transaction.lock(key)
                await transaction.put(key, tokens)
                return (None if record is None else record.tokens), tokens

        assert isinstance(self._backend, SupportsRowLocks)
        known = self._run(self._model.get(key))
        steps = self._at_once(*(one(self._backend, tokens) for tokens in versions))
        self._catch_up(key, versions)
        if known is not None:  # an existing row's lock puts the transactions in order: each reads the one before it
            before, after = [step[0] for step in steps], [known.tokens, *(step[1] for step in steps)]
            assert all(tokens in after for tokens in before), "a locking read returned tokens that were never stored"

    # After each step

    @invariant()
    def same_rows(self) -> None:
        self._clock.now += 1  # so that each step of the model has a different time
        self._agree(lambda backend, _: backend.scan(limit=1000, with_metadata=True))
        for key in _KEYS:
            self.get(key)
        for provider in {key.provider for key in _KEYS}:
            self.scan_due(provider, 0.0, 253_402_300_799_999_999, None, 1000)

    # Helpers

    def _run(self, operation: Awaitable[T]) -> T:
        async def bounded() -> T:
            async with asyncio.timeout(_TIMEOUT):
                return await operation

        # Not runner.run(): it sets a signal handler on every call, which makes it ten times slower.
        return self._runner.get_loop().run_until_complete(bounded())

    def _at_once(self, *operations: Awaitable[Any]) -> list[Any]:
        async def gathered() -> list[Any]:
            return list(await asyncio.gather(*operations))

        return self._run(gathered())

    async def _clear(self) -> None:
        for key in _KEYS:  # and not those of a scan, which leaves out empty rows
            await self._backend.delete(key)
        assert await self._backend.scan(limit=1) == [], "a deleted row is still in the scan"

    def _agree(self, operation: Callable[[Backend, int], Awaitable[T]]) -> T:
        """Call the model (index 0), then the backend (1); compare their results and return the backend's."""
        expected = self._run(operation(self._model, 0))
        found = self._run(operation(self._backend, 1))
        different = "; ".join(_differences(_outline(found), _outline(expected)))
        assert not different, f"{different}\nthe backend returned {found}, the model {expected}"
        if isinstance(found, list) and isinstance(expected, list):
            for record, model_record in zip(found, expected, strict=True):
                if record is not None and not isinstance(record, DueRow):
                    self._compare_numbers(record, model_record)
        return found

    def _compare_numbers(self, record: SealedRecord | ScannedRow, expected: SealedRecord | ScannedRow) -> None:
        key = record.key
        seen = self._generations.setdefault(key, [])
        pair = (expected.generation, record.generation)
        if pair not in seen:
            assert pair[1] not in {number for _, number in seen}, f"generation {pair[1]} of {key} was used twice"
            if seen and self._created.get((key, expected.created_at)) is not None:
                advanced = (pair[0] - seen[-1][0], pair[1] - seen[-1][1])
                assert advanced[0] == advanced[1], (
                    f"the generation of {key} grew by {advanced[1]}, not by {advanced[0]}"
                )
            seen.append(pair)
        # The model's times are all different: wherever two of them are equal, the backend's must be equal too.
        assert record.created_at == self._created.setdefault((key, expected.created_at), record.created_at)
        assert record.updated_at == self._updated.setdefault((key, expected.generation), record.updated_at)
        assert record.created_at <= record.updated_at <= record.as_of

    def _generation(self, key: TokenKey, age: int) -> tuple[int, int]:
        seen = self._generations.get(key, [])
        return seen[-1 - age] if age < len(seen) else (1, 1)

    def _wait_out(self, key: TokenKey) -> None:
        """Wait until the row's lease and failure have expired by the database's clock; advance the model's clock."""

        async def expired() -> None:
            deadline = time.monotonic() + _TIMEOUT
            while True:
                record = await self._backend.get(key)
                assert record is not None
                left = [record.lease_expires_in, None if record.failure is None else record.failure.retry_in]
                if all(seconds is None or seconds < 0 or seconds > 1 for seconds in left):
                    return
                assert time.monotonic() < deadline, f"the lease or failure did not expire within {_TIMEOUT} s"
                await asyncio.sleep(_SHORT)

        self._run(expired())
        self._clock.now += 1

    def _catch_up(self, key: TokenKey, versions: Sequence[SealedTokens]) -> None:
        """Repeat concurrent puts of one row on the model; the last one is the one whose tokens the backend has."""
        record = self._run(self._backend.get(key))
        assert record is not None
        assert record.tokens in versions, "the stored tokens are from none of the concurrent writes"
        others = list(versions)
        others.remove(record.tokens)
        for tokens in (*others, record.tokens):
            self._run(self._model.put(key, tokens))


def _differences(found: object, expected: object, name: str = "the result") -> Iterator[str]:
    """Tell in which fields of which rows two results differ."""
    if found == expected:
        return
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            yield from _differences(one, other, f"{name}[{index}]")
    elif type(found) is type(expected) and is_dataclass(found):
        for field in fields(found):
            one, other = getattr(found, field.name), getattr(expected, field.name)
            yield from _differences(one, other, f"{name}.{field.name}")
    else:
        yield f"{name} is {found!r} in the backend and {expected!r} in the model"


def _outline(answer: object) -> object:
    """Remove the numbers that differ between backends from a result."""
    if isinstance(answer, list):
        return [_outline(element) for element in answer]
    if isinstance(answer, ScannedRow):
        now = answer.as_of
        return replace(
            answer,
            generation=0,
            created_at=0,
            updated_at=0,
            as_of=0,
            failed_at=None if answer.failed_at is None else int(answer.failed_at <= now),
            retry_at=None if answer.retry_at is None else int(answer.retry_at <= now),
            lease_expires_at=None if answer.lease_expires_at is None else int(answer.lease_expires_at <= now),
        )
    if isinstance(answer, DueRow):
        return replace(answer, updated_at=0, as_of=0)
    if isinstance(answer, SealedRecord):
        lease, failure = answer.lease_expires_in, answer.failure
        return replace(
            answer,
            generation=0,
            created_at=0,
            updated_at=0,
            as_of=0,
            lease_expires_in=None if lease is None else float(lease > 0),
            failure=failure
            and Failure(failure.code, None if failure.retry_in is None else float(failure.retry_in > 0)),
        )
    return answer
