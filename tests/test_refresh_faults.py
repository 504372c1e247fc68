"""`load_fresh_tokens` when the database fails: no pair that a provider has issued is lost, and none is used twice.

The provider is real HTTP, and so are the servers' connections, which are cut from outside. A store beside the faults
shows what the row holds.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import sqlite3
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from unittest import mock

import pytest
from sqlalchemy import make_url

from faults import Cut, Faults, How, When, faulty
from matrix import Row, params, row_named
from refreshes import Refresher, settled
from stepping import stepped
from tokenstore import (
    AuthTokenStore,
    BackendUnavailableError,
    Keyring,
    ProviderUnavailableError,
    TokenRecord,
    TokensNotStoredError,
    open_store,
)
from tokenstore.records import TokenKey, is_leased
from tokenstore.refresh.settings import Settings
from tokenstore.testing.provider import StrictRotatingProvider
from watch import Place, source_of, until

T = TypeVar("T")
Point = tuple[int, When, How]

# How long the access token lasts at the beginning: expired, so that the caller waits, or due, so that nobody does.
EXPIRED, DUE = -1.0, 90.0
MARGIN = 600.0
HOUR = 3600.0
# When the provider wants to be asked again, in seconds.
RETRY = 0.2
# How long a statement may take where one takes for ever: with it go the bounds of all that is in order.
SILENCE = 1.5

_PATIENCE, _SOAK_PATIENCE = 60.0, 300.0
# For one refresh: half a lease, so that none waits for the end of its own.
_RUN_PATIENCE = 15.0

_ONE_OF_EACH = ["sqlite", "postgresql+asyncpg", "mariadb+asyncmy"]
_DRIVERS = [*_ONE_OF_EACH, "postgresql+psycopg", "mariadb+aiomysql"]

every_driver = pytest.mark.parametrize("row", params(names=_DRIVERS))
each_database = pytest.mark.parametrize("row", params(names=_ONE_OF_EACH))
each_server = pytest.mark.parametrize("row", params(names=_ONE_OF_EACH[1:]))
each_cycle = pytest.mark.parametrize(
    ("row", "expires_in"),
    [
        pytest.param(row, expires_in, id=f"{row.name}-{name}", marks=getattr(pytest.mark, row.mark))
        for name, expires_in, rows in (("expired", EXPIRED, _DRIVERS), ("due", DUE, _ONE_OF_EACH))
        for row in map(row_named, rows)
    ],
)
sqlite = pytest.mark.parametrize("row", params(names=["sqlite"]))


class Recorder(Refresher):
    """Keeps what the provider answered, by user.

    Args:
        provider: Whom to call.
        beside: A store that shows whether the row is leased.

    Attributes:
        issued: The answers to each user's refreshes.
        unleased: For whom the provider was called without a lease.
        answered: Called between an answer and its delivery to the store.
        retry_after: What an outage tells callers.
    """

    def __init__(self, provider: StrictRotatingProvider, beside: AuthTokenStore) -> None:
        super().__init__(provider)
        self._backend = beside._backend
        self.issued: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
        self.unleased: list[str] = []
        self.answered: Callable[[], None] = lambda: None
        self.retry_after: float | None = None

    async def __call__(self, record: TokenRecord) -> Mapping[str, Any]:
        row = await self._backend.get(TokenKey("github", record["user_id"]))
        if row is None or not is_leased(row):
            self.unleased.append(record["user_id"])
        try:
            answer = await super().__call__(record)
        except ProviderUnavailableError as error:
            error.retry_after = self.retry_after
            raise
        self.issued[record["user_id"]].append(answer)
        self.answered()
        return answer


@dataclass
class Scene:
    """A table behind faults, a store that goes round them, and a provider."""

    url: str
    keyring: Keyring
    faults: Faults
    direct: AuthTokenStore
    recorder: Recorder
    _users: Iterator[int] = field(default_factory=itertools.count)

    @property
    def provider(self) -> StrictRotatingProvider:
        return self.recorder.provider

    async def log_in(self, expires_in: float = EXPIRED) -> TokenRecord:
        """A new user's grant, in the table with an access token that lasts so long."""
        user = f"u{next(self._users)}"
        grant = self.provider.new_grant(user)
        expires_at = datetime.now(UTC) + timedelta(seconds=expires_in)
        await self.direct.store_tokens("github", user, grant["access_token"], grant["refresh_token"], expires_at)
        return await load(self.direct, user)

    async def open(self, old: TokenRecord, url: str = "", **options: Any) -> AuthTokenStore:
        """Another store, by way of the faults if nothing else is said. It has a connection."""
        options = {"refresh_margin": MARGIN, **options}
        store = open_store(
            url or self.faults.url, keyring=self.keyring, refreshers={"github": self.recorder}, **options
        )
        assert await load(store, old["user_id"]) == old
        return store

    @asynccontextmanager
    async def store(self, old: TokenRecord, url: str = "", **options: Any) -> AsyncIterator[AuthTokenStore]:
        """The same for a while: at its end every connection has been returned."""
        async with await self.open(old, url, **options) as store:
            yield store
            assert checked_out(store) == 0

    @asynccontextmanager
    async def held(self, store: AuthTokenStore, user: str) -> AsyncIterator[asyncio.Task[TokenRecord]]:
        """A caller, whose request has used up the refresh token; the answer comes when the block ends."""
        before = self.provider.stats().requests
        with self.provider.hold():
            caller = asyncio.create_task(fresh(store, user))
            await asyncio.to_thread(self.provider.wait_for_requests, before + 1)
            yield caller

    def go_away(self) -> None:
        """The database is gone, until it is said not to refuse connections any more."""
        self.faults.refuse = True
        self.faults.cut_all()

    async def check(self, old: TokenRecord, told: TokenRecord | None = None) -> None:
        """One refresh has been made and is in the row, which is as one leaves it; the next refresh works."""
        user = old["user_id"]
        [issued] = self.recorder.issued[user]
        assert self.provider.stats().refreshes_by_user[user] == 1
        stored = await load(self.direct, user)
        assert pair(stored) == pair(issued)
        assert stored["generation"] == old["generation"] + 1
        if told is not None:
            assert (pair(told), told["generation"]) == (pair(stored), stored["generation"])
        sealed = await self.direct._backend.get(TokenKey("github", user))
        assert sealed is not None
        assert (sealed.lease_holder, sealed.failure) == (None, None)
        await fresh(self.direct, user, force=True, refresh=self.recorder)
        assert self.provider.stats().refreshes_by_user[user] == 2
        assert self.provider.stats().reuses == 0


@asynccontextmanager
async def scene_of(url: str, keyring: Keyring, patience: float = _PATIENCE) -> AsyncIterator[Scene]:
    """Also sees to it that nothing fails behind everybody's back."""
    problems: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(str(context)))
    async with asyncio.timeout(patience):
        with StrictRotatingProvider() as provider:
            async with open_store(url, keyring=keyring) as direct, faulty(url) as faults:
                await direct.setup()
                recorder = Recorder(provider, direct)
                yield Scene(url, keyring, faults, direct, recorder)
            assert provider.stats().reuses == 0
            assert not recorder.unleased
    assert not problems, problems


def pair(tokens: Mapping[str, Any]) -> tuple[str, str]:
    return tokens["access_token"], tokens["refresh_token"]


async def load(store: AuthTokenStore, user: str) -> TokenRecord:
    record = await store.load_tokens("github", user)
    assert record is not None
    return record


async def fresh(store: AuthTokenStore, user: str, **options: Any) -> TokenRecord:
    record = await store.load_fresh_tokens("github", user, **options)
    assert record is not None
    return record


def checked_out(store: AuthTokenStore) -> int:
    """How many connections are in use."""
    return source_of(store).in_use


@contextmanager
def spied(store: AuthTokenStore) -> Iterator[mock.AsyncMock]:
    """The writes of new tokens, to be counted as they begin."""
    complete = store._backend.complete_lease
    with mock.patch.object(store._backend, "complete_lease", mock.AsyncMock(wraps=complete)) as spy:
        yield spy


@contextmanager
def noted(*what: object) -> Iterator[None]:
    """Which of many runs failed."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"with {', '.join(map(str, what))}")
        raise


# -- connections that are cut --------------------------------------------------------------------------


@dataclass
class Run:
    """What came of a refresh with cuts.

    Attributes:
        sent: Its statements, those of retries included.
        before: How many of them were sent before the provider answered.
        cuts: What was armed.
        failed: Whether the first read failed, before anything had begun.
    """

    sent: list[str]
    before: int
    cuts: list[Cut]
    failed: bool


async def run(scene: Scene, expires_in: float, *points: Point) -> Run:
    """One refresh, cut at these points, of a new store with a connection. What must hold in any case is asserted."""
    old = await scene.log_in(expires_in)
    user = old["user_id"]
    answered: list[int] = []
    told = None
    async with asyncio.timeout(_RUN_PATIENCE), scene.store(old) as store:
        with ExitStack() as stack:
            cuts = [stack.enter_context(scene.faults.cut(*point)) for point in points]
            sent = stack.enter_context(scene.faults.counted())
            scene.recorder.answered = lambda: answered.append(len(sent))
            try:
                told = await fresh(store, user)
            except BackendUnavailableError:
                assert await load(scene.direct, user) == old
                assert not answered, "once the refresh token is used, the caller has to get what it brought"
            await settled(store)
        found = Run(sent, answered[0] if answered else 0, cuts, failed=told is None)
        if told is None:
            told = await fresh(store, user)
            await settled(store)
        await scene.check(old, told if expires_in == EXPIRED else None)
        if expires_in == DUE:
            assert pair(told) == pair(old), "nobody waits for what is not needed yet"
        assert await load(store, user) == await load(scene.direct, user)
    return found


def cuts_at_random(dice: random.Random, faults: Faults, statements: int, count: int) -> list[Point]:
    ways: list[How] = [how for how in faults.ways if how != "silence"]
    whens: list[When] = ["before", "after"]
    return [(dice.randrange(statements), dice.choice(whens), dice.choice(ways)) for _ in range(count)]


@contextmanager
def heard_in_the_end(faults: Faults) -> Iterator[None]:
    """Whatever a test comes to, it can be closed."""
    try:
        yield
    except BaseException:
        faults.cut_all()
        raise


@each_cycle
def test_a_refresh_that_is_cut_at_each_statement(row: Row, url: str, expires_in: float, keyring: Keyring) -> None:
    """Nobody notices: the caller gets the new token, or in the margin the old one, and the new pair is in the row."""

    async def main() -> None:
        async with scene_of(url, keyring) as scene:
            clean = (await run(scene, expires_in)).sent
            for at, statement in enumerate(clean):
                for which, when in enumerate[When](["before", "after"]):
                    how = scene.faults.ways[(at + which) % 2] if row.mark != "sqlite" else "reset"
                    with noted(at, statement, when, how):
                        found = await run(scene, expires_in, (at, when, how))
                        assert found.cuts[0].happened
                        assert not found.failed

    asyncio.run(main())


@pytest.mark.soak
@every_driver
def test_a_hundred_refreshes_of_a_hundred_survive_a_cut(row: Row, url: str, keyring: Keyring) -> None:
    async def main() -> None:
        dice = random.Random(row.name)
        async with scene_of(url, keyring, _SOAK_PATIENCE) as scene:
            clean = (await run(scene, EXPIRED)).sent
            for number in range(100):
                [point] = cuts_at_random(dice, scene.faults, len(clean), 1)
                with noted(number, *point, clean[point[0]]):
                    found = await run(scene, dice.choice((EXPIRED, DUE)), point)
                    assert found.cuts[0].happened
                    assert not found.failed

    asyncio.run(main())


@pytest.mark.soak
@every_driver
def test_a_hundred_refreshes_of_a_hundred_survive_several_cuts(row: Row, url: str, keyring: Keyring) -> None:
    """Also cuts of what earlier ones set off. Two may be too much for the first read, which has begun nothing yet."""

    async def main() -> None:
        dice = random.Random(row.name)
        async with scene_of(url, keyring, _SOAK_PATIENCE) as scene:
            clean = (await run(scene, EXPIRED)).sent
            failed = 0
            for number in range(100):
                points = cuts_at_random(dice, scene.faults, len(clean) + 5, dice.choice((2, 3)))
                with noted(number, *points):
                    failed += (await run(scene, dice.choice((EXPIRED, DUE)), *points)).failed
            assert failed < 20, "most cuts are elsewhere"

    asyncio.run(main())


@each_server
def test_a_connection_that_falls_silent_is_given_up(row: Row, url: str, keyring: Keyring) -> None:
    """At any statement of the write, before it or after it: another connection is tried, and callers get the token."""

    async def main() -> None:
        async with scene_of(url, keyring) as scene:
            clean = await run(scene, EXPIRED)

            async def silenced(at: int, when: When) -> None:
                old = await scene.log_in()
                with noted(at, clean.sent[at], when):
                    async with faulty(url) as faults, scene.store(old, faults.url, refresh_timeout=SILENCE) as store:
                        with heard_in_the_end(faults), faults.cut(at, when, "silence") as cut:
                            async with asyncio.timeout(_RUN_PATIENCE):
                                told = await fresh(store, old["user_id"])
                        assert cut.happened
                        await scene.check(old, told)

            whens: list[When] = ["before", "after"]
            points = itertools.product(range(clean.before, len(clean.sent)), whens)
            async with asyncio.TaskGroup() as group:
                for point in points:
                    group.create_task(silenced(*point))

    asyncio.run(main())


@pytest.mark.parametrize("row", params(names=["mariadb+asyncmy"]))
def test_a_silent_connection_does_not_outlast_the_lease(row: Row, url: str, keyring: Keyring) -> None:
    """Whoever takes over sends a refresh token that is used, and a strict provider then revokes the grant."""

    async def main() -> None:
        async with scene_of(url, keyring) as scene:
            clean = await run(scene, EXPIRED)
            old = await scene.log_in()
            user = old["user_id"]
            scene.provider.latency = 1.0  # of three, which the lease lasts
            async with scene.store(old, refresh_timeout=2.0) as store, scene.store(old, url) as another:
                with heard_in_the_end(scene.faults), scene.faults.cut(clean.before, "before", "silence"):
                    caller = asyncio.create_task(fresh(store, user))
                    await until(lambda: bool(scene.recorder.issued[user]))
                    told = await fresh(another, user)
                    assert pair(told) == pair(await caller)
                await scene.check(old, told)

    asyncio.run(main())


# -- the database is away --------------------------------------------------------------------------------


async def restarted(scene: Scene) -> None:
    """The database goes while the provider answers, and comes back when a write has failed."""
    old = await scene.log_in()
    async with scene.store(old) as store:
        with spied(store) as writes:
            async with scene.held(store, old["user_id"]) as caller:
                scene.go_away()
            await until(lambda: writes.await_count > 1)
            assert not caller.done()
            scene.faults.refuse = False
            told = await caller
        await scene.check(old, told)


@each_database
def test_the_database_restarts_while_the_provider_answers(row: Row, url: str, keyring: Keyring) -> None:
    async def main() -> None:
        async with scene_of(url, keyring) as scene:
            await restarted(scene)

    asyncio.run(main())


@pytest.mark.soak
@each_database
def test_a_hundred_refreshes_of_a_hundred_survive_a_restart(row: Row, url: str, keyring: Keyring) -> None:
    async def main() -> None:
        async with scene_of(url, keyring, _SOAK_PATIENCE) as scene:
            for number in range(100):
                with noted(number):
                    await restarted(scene)

    asyncio.run(main())


@pytest.mark.soak
@each_server
def test_a_server_really_restarts_while_the_provider_answers(row: Row, url: str, keyring: Keyring) -> None:
    """In turn: it is back before the provider answers, and it is not. It is this process's own, as its tests are."""
    server = Place(row, url).server()
    process = server._process
    if process is None:
        pytest.skip("a server named by URL is not ours to restart")

    async def main() -> None:
        async with scene_of(url, keyring, _SOAK_PATIENCE) as scene:
            for number in range(4):
                old = await scene.log_in()
                async with scene.store(old, url) as store:
                    with noted(number), spied(store) as writes:
                        async with scene.held(store, old["user_id"]) as caller:
                            await asyncio.to_thread(process.stop)
                            if number % 2:
                                await asyncio.to_thread(process.start, server._ask_version)
                        if not number % 2:
                            await until(lambda: writes.await_count > 1)
                            assert not caller.done()
                            await asyncio.to_thread(process.start, server._ask_version)
                        told = await caller
                    await scene.check(old, told)

    asyncio.run(main())


@sqlite
@pytest.mark.parametrize("lock_timeout", [0.1, 10.0], ids=["brief", "lasting"])
def test_another_writer_holds_the_file(row: Row, url: str, lock_timeout: float, keyring: Keyring) -> None:
    """For longer than one write waits, or not that long."""

    async def main() -> None:
        async with scene_of(url, keyring) as scene:
            old = await scene.log_in()
            other = sqlite3.connect(make_url(url).database or "", isolation_level=None)
            async with scene.store(old, lock_timeout=lock_timeout) as store:
                with spied(store) as writes:
                    async with scene.held(store, old["user_id"]) as caller:
                        other.execute("BEGIN IMMEDIATE")
                    await until(lambda: writes.await_count > (lock_timeout < 1))
                    await until(lambda: checked_out(store) > 0)
                    assert not caller.done()
                    other.close()
                    told = await caller
                assert writes.await_count == 1 or lock_timeout < 1
                await scene.check(old, told)

    asyncio.run(main())


@pytest.fixture
def _brief_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers are told half a second after the provider's answer. The bounds of all else stay, whatever the machine."""
    monkeypatch.setattr(Settings, "save", 0.5)


@each_database
@pytest.mark.usefixtures("_brief_writes")
def test_callers_are_told_what_cannot_be_stored(row: Row, url: str, keyring: Keyring) -> None:
    """They get the pair with the error; when the database comes back, the same pair is written without another call."""

    async def main() -> None:
        async with scene_of(url, keyring) as scene:
            old = await scene.log_in()
            user = old["user_id"]
            async with scene.store(old) as store:
                scene.recorder.answered = scene.go_away
                with pytest.raises(TokensNotStoredError) as caught:
                    await fresh(store, user)
                scene.recorder.answered = lambda: None
                record = caught.value.record
                assert pair(record) == pair(scene.recorder.issued[user][0])
                assert await load(scene.direct, user) == old
                with pytest.raises(BackendUnavailableError):
                    await fresh(store, user)
                scene.faults.refuse = False
                await settled(store)
                assert pair(await fresh(store, user)) == pair(record)
                await scene.check(old, record)

    asyncio.run(main())


@each_database
@pytest.mark.usefixtures("_brief_writes")
def test_closing_without_a_database_hands_the_tokens_over(row: Row, url: str, keyring: Keyring) -> None:
    """To whoever closes, and to the callers: those who wait still, and those who have been told before."""

    async def main() -> None:
        async with scene_of(url, keyring) as scene:

            async def closed(old: TokenRecord, store: AuthTokenStore, caller: asyncio.Task[TokenRecord]) -> None:
                with pytest.raises(TokensNotStoredError) as by_closing:
                    await store.aclose()
                with pytest.raises(TokensNotStoredError) as by_calling:
                    await caller
                [record] = by_closing.value.records
                [issued] = scene.recorder.issued[old["user_id"]]
                assert pair(record) == pair(by_calling.value.record) == pair(issued)
                assert checked_out(store) == 0
                assert await load(scene.direct, old["user_id"]) == old
                # What the record is for.
                times = record["access_token_expires_at"], record["refresh_token_expires_at"]
                await scene.direct.store_tokens("github", old["user_id"], *pair(record), *times)
                await scene.check(old, record)

            olds = [await scene.log_in() for _ in range(2)]
            stores = [await scene.open(old) for old in olds]
            with spied(stores[0]) as writes:
                with scene.provider.hold():
                    pairs = zip(stores, olds, strict=True)
                    callers = [asyncio.create_task(fresh(store, old["user_id"])) for store, old in pairs]
                    await asyncio.to_thread(scene.provider.wait_for_requests, 2)
                    scene.go_away()
                await until(lambda: writes.await_count > 0)
            first = asyncio.create_task(closed(olds[0], stores[0], callers[0]))
            await asyncio.wait(callers[1:])
            await closed(olds[1], stores[1], callers[1])
            await first

    asyncio.run(main())


# -- the provider is slow, or away -----------------------------------------------------------------------


@each_database
def test_while_the_provider_is_slow_the_database_is_free(row: Row, url: str, keyring: Keyring) -> None:
    """Two hundred callers wait for one answer without a connection; others read and write meanwhile."""

    async def main() -> None:
        async with scene_of(url, keyring) as scene:
            old = await scene.log_in()
            user = old["user_id"]
            async with scene.store(old, url, pool_size=10) as store:
                async with scene.held(store, user) as caller:
                    callers = [caller, *(asyncio.create_task(fresh(store, user)) for _ in range(199))]
                    attempt = store._engine._attempts[TokenKey("github", user)]
                    await until(lambda: attempt.report.joined == 199)
                    for number in range(10):
                        assert checked_out(store) == 0
                        assert await asyncio.gather(*(load(store, user) for _ in range(10))) == [old] * 10
                        assert checked_out(store) == 0
                        expires_at = datetime.now(UTC) + timedelta(seconds=HOUR)
                        other = (f"other{number}", "access", "refresh")
                        await store.store_tokens("github", *other, expires_at)
                        assert pair(await fresh(store, other[0])) == other[1:]
                    assert checked_out(store) == 0
                    assert scene.provider.stats().in_flight == 1
                    assert not any(caller.done() for caller in callers)
                told = await asyncio.gather(*callers)
                assert len({pair(record) for record in told}) == 1
                await scene.check(old, told[0])

    asyncio.run(main())


async def outage(scene: Scene, seconds: float) -> None:
    """The provider is away for so long, and until it has been asked three times; callers keep coming."""
    old = await scene.log_in(DUE)
    user = old["user_id"]
    async with scene.store(old, scene.url) as store:
        scene.recorder.retry_after = RETRY
        scene.provider.outage = True
        began = time.monotonic()
        while scene.provider.stats().requests < 3 or time.monotonic() - began < seconds:
            for record in await asyncio.gather(*(fresh(store, user) for _ in range(10))):
                assert pair(record) == pair(old)
        asked = scene.provider.stats().requests
        assert asked <= 1 + (time.monotonic() - began) / RETRY
        scene.provider.outage = False
        while pair(record := await fresh(store, user)) == pair(old):
            pass
        assert scene.provider.stats().requests <= asked + 2, "one that was on its way, and the one that worked"
        await settled(store)
        await scene.check(old, record)


@each_database
def test_an_outage_of_the_provider_within_the_margin(row: Row, url: str, keyring: Keyring) -> None:
    """No caller sees it: all get the token that is valid still. The provider is asked no sooner than it has told."""

    async def main() -> None:
        async with scene_of(url, keyring) as scene:
            await outage(scene, 0)

    asyncio.run(main())


@pytest.mark.soak
@each_database
def test_an_outage_of_ten_seconds_within_the_margin(row: Row, url: str, keyring: Keyring) -> None:
    async def main() -> None:
        async with scene_of(url, keyring) as scene:
            await outage(scene, 10)

    asyncio.run(main())


# -- callers that go away --------------------------------------------------------------------------------


async def cancelled(scene: Scene, store: AuthTokenStore, at: int, *, alone: bool) -> bool:
    """A caller, cancelled at the n-th wait of its own or of the refresh that it began. Returns whether it was."""
    old = await scene.log_in()
    user = old["user_id"]
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == at:
            caller.cancel()

    perform = store._engine._perform
    with mock.patch.object(store._engine, "_perform", lambda attempt: stepped(perform(attempt), step)):
        caller = asyncio.create_task(stepped(fresh(store, user), step))
        others = [] if alone else [asyncio.create_task(fresh(store, user))]
        await asyncio.wait([caller, *others])
        await settled(store)
    assert checked_out(store) == 0
    issued = scene.recorder.issued[user]
    assert scene.provider.stats().refreshes_by_user.get(user, 0) == len(issued)
    assert pair(await load(scene.direct, user)) == pair(issued[0] if issued else old)
    others.append(asyncio.create_task(fresh(store, user)))
    for other in others:
        assert pair(await other) == pair(issued[0])
    await scene.check(old)
    return caller.cancelled()


@each_database
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "joined"])
def test_a_caller_is_cancelled_at_each_step(row: Row, url: str, alone: bool, keyring: Keyring) -> None:
    """The refresh has not begun, or goes on to its end: what the provider has issued is in the row. Others get it."""

    async def main() -> None:
        async with scene_of(url, keyring) as scene, scene.store(await scene.log_in(), url) as store:
            at = 1
            while True:
                with noted(at):
                    if not await cancelled(scene, store, at, alone=alone):
                        break
                at += 1
            assert at > 10

    asyncio.run(main())
