"""What bites a store on any database: isolation, pools, cancellation, forks, loops, and what an error may say."""

from __future__ import annotations

import asyncio
import base64
import logging
import subprocess
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from support import server_processes
from support.database import Place, app_engine, source_of
from support.matrix import ROWS, Row, params, shared_rows
from support.polling import until
from tokenstore import (
    AuthTokenStore,
    BackendError,
    BackendUnavailableError,
    ConflictError,
    Keyring,
    LockTimeoutError,
    UnsupportedOperationError,
    open_store,
)

SECRETS = ("gho_plaintext_access", "ghr_plaintext_refresh")
ACCESS, REFRESH = SECRETS
LEVELS = ["AUTOCOMMIT", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
SQLITE_LEVELS = ["AUTOCOMMIT", "SERIALIZABLE"]

servers_rows = pytest.mark.parametrize(
    "row", params(shared=True, names=[row.name for row in ROWS if row.mark in ("postgres", "mysql")])
)
"""The rows with a server that can be asked who waits."""


@pytest.fixture
def place(row: Row, url: str) -> Place:
    return Place(row, url)


def _in(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


async def _store(store: Any, tag: str, user_id: str = "u1") -> None:
    await store.store_tokens("github", user_id, tag, REFRESH, _in(3600))


async def _tag(store: Any, user_id: str = "u1", *, for_update: bool = False) -> str | None:
    record = await store.load_tokens("github", user_id, for_update)
    return None if record is None else str(record["access_token"])


@asynccontextmanager
async def _opened(place: Place, keyring: Keyring, **options: Any) -> AsyncIterator[AuthTokenStore]:
    """A store by URL whose table exists and holds two rows."""
    async with open_store(place.url, keyring=keyring, **options) as store:
        await store.setup()
        for user_id in ("u1", "u2"):
            await _store(store, "old", user_id)
        yield store


def _whole(store: AuthTokenStore) -> bool:
    return source_of(store).in_use == 0


# ---- Isolation levels


def _levels() -> Iterator[object]:
    for param in params(names=["sqlite", "postgresql+asyncpg", "postgresql+psycopg", "mariadb+asyncmy"]):
        [row] = param.values  # type: ignore[attr-defined]
        for level in SQLITE_LEVELS if row.mark == "sqlite" else LEVELS:
            yield pytest.param(row, level, id=f"{row.name}-{level}", marks=getattr(pytest.mark, row.mark))


every_level = pytest.mark.parametrize(("row", "level"), list(_levels()))


@every_level
def test_a_lock_holds_on_an_engine_of_any_isolation_level(place: Place, level: str, keyring: Keyring) -> None:
    """A second caller waits, then reads what the first stored, whatever level the application chose for its engine."""

    async def main() -> None:
        async with AsyncExitStack() as stack:
            engines = [await stack.enter_async_context(app_engine(place, isolation_level=level)) for _ in range(2)]
            first, second = (open_store(engine, keyring=keyring, **place.options) for engine in engines)
            await first.setup()
            await _store(first, "old")

            async def read_under_lock() -> str | None:
                async with second.transaction() as tx:
                    return await _tag(tx, for_update=True)

            async with first.transaction() as tx:
                assert await _tag(tx, for_update=True) == "old"
                waiter = asyncio.create_task(read_under_lock())
                await place.until_waiting(second)
                assert not waiter.done()
                await _store(tx, "new")
            assert await waiter == "new"

    asyncio.run(main())


@every_level
def test_a_session_of_any_isolation_level_never_shows_old_tokens_under_the_lock(
    place: Place, level: str, keyring: Keyring
) -> None:
    """In a caller's transaction that has read already, a lock gives the newest tokens or a ConflictError.

    In autocommit mode, where no lock would be held, it is refused.
    """

    async def main() -> tuple[str, str | None]:
        async with (
            _opened(place, keyring, lock_timeout=1) as other,
            app_engine(place, isolation_level=level) as engine,
            AsyncSession(engine) as session,
            session.begin(),
        ):
            _ = await session.connection()
            store = AuthTokenStore(session, keyring=keyring, **place.options)
            assert await _tag(store) == "old"
            newest = "new"
            try:
                await _store(other, newest)
            except LockTimeoutError:  # here a plain read locks, too
                assert (place.row.mark, level) == ("mysql", "SERIALIZABLE")
                newest = "old"
            return newest, await _tag(store, for_update=True)

    if level == "AUTOCOMMIT" and place.row.mark != "sqlite":
        with pytest.raises(UnsupportedOperationError, match=r"autocommit mode.*READ COMMITTED"):
            asyncio.run(main())
        return
    try:
        newest, locked = asyncio.run(main())
    except ConflictError:
        assert level in ("REPEATABLE READ", "SERIALIZABLE")
    else:
        assert locked == newest


@every_level
def test_a_session_whose_transaction_the_store_begins_locks_at_any_level(
    place: Place, level: str, keyring: Keyring
) -> None:
    """The three steps on two sessions of one level: the second waits, reads the first one's tokens, makes no call."""

    async def main() -> None:
        calls = 0

        async def refresh(engine: AsyncEngine) -> str | None:
            nonlocal calls
            async with AsyncSession(engine) as session:
                store = AuthTokenStore(session, keyring=keyring, **place.options)
                if await _tag(store, for_update=True) == "old":
                    calls += 1
                    await _store(store, "new")
            async with AsyncSession(engine) as session:
                return await _tag(AuthTokenStore(session, keyring=keyring, **place.options))

        async with _opened(place, keyring), app_engine(place, isolation_level=level) as engine:
            assert await asyncio.gather(*(refresh(engine) for _ in range(4))) == ["new"] * 4
            assert calls == 1

    asyncio.run(main())


# ---- Pools


@shared_rows
def test_waiters_for_one_row_leave_the_pool_to_others(place: Place, keyring: Keyring) -> None:
    """50 tasks wait for one locked row with two connections: other rows are read meanwhile, without delay."""

    async def main() -> None:
        async with _opened(place, keyring, pool_size=2) as store:

            async def wait() -> str | None:
                async with store.transaction() as tx:
                    return await _tag(tx, for_update=True)

            async with place.held():
                waiters = [asyncio.create_task(wait()) for _ in range(25)]
                waiters += [asyncio.create_task(_store(store, "new")) for _ in range(25)]
                await place.until_waiting(store)
                started = time.monotonic()
                for _ in range(20):
                    assert await _tag(store, "u2") == "old"
                assert time.monotonic() - started < 1
                assert not any(waiter.done() for waiter in waiters)
            await asyncio.gather(*waiters)
            assert _whole(store)

    asyncio.run(main())


@shared_rows
@pytest.mark.parametrize("call", [_tag, lambda store: _store(store, "x")], ids=["load", "store"])
def test_a_nested_call_on_the_only_connection_ends_in_an_error(
    place: Place, call: Callable[[AuthTokenStore], Awaitable[object]], keyring: Keyring
) -> None:
    """A store's method inside its own transaction, with one connection: no dead-lock, but an error in bounded time."""

    async def main() -> None:
        async with _opened(place, keyring, pool_size=1, pool_timeout=0.3, lock_timeout=0.3) as store:
            async with store.transaction() as tx:
                await _tag(tx, for_update=True)
                started = time.monotonic()
                with pytest.raises(
                    (BackendUnavailableError, LockTimeoutError), match=r"pool_timeout|lock was not free"
                ):
                    await call(store)
                assert time.monotonic() - started < 2
                await _store(tx, "new")
            assert await _tag(store) == "new"

    asyncio.run(main())


# ---- Cancellation


_SETTINGS = {
    "postgres": ["SHOW lock_timeout", "SHOW transaction_isolation", "SHOW statement_timeout"],
    "mysql": [
        "SELECT @@innodb_lock_wait_timeout",
        "SHOW VARIABLES WHERE variable_name RLIKE '^(tx|transaction)_isolation$'",
        "SELECT @@autocommit",
    ],
    "sqlite": ["PRAGMA busy_timeout"],
}


async def _settings(engine: AsyncEngine, row: Row, connections: int) -> list[list[list[tuple[object, ...]]]]:
    """Each connection's settings, several at a time so that all of a pool are seen."""
    async with AsyncExitStack() as stack:
        queries, found = _SETTINGS[row.mark], []
        for _ in range(connections):
            connection = await stack.enter_async_context(engine.connect())
            found.append([[tuple(row) for row in await connection.exec_driver_sql(query)] for query in queries])
        return found


async def _in_transaction(store: AuthTokenStore) -> None:
    async with store.transaction() as tx:
        await _tag(tx, for_update=True)
        await tx.store_tokens("github", "u1", "new", None, None)
        await tx.store_tokens("github", "u2", "new", None, None)


async def _alone(store: AuthTokenStore) -> None:
    await _store(store, "new")


@shared_rows
@pytest.mark.parametrize("action", [_alone, _in_transaction])
@pytest.mark.parametrize("own", [True, False], ids=["own", "engine"])
def test_cancelled_anywhere_leaves_the_old_or_the_new_and_nothing_else(
    place: Place, action: Callable[[AuthTokenStore], Awaitable[None]], own: bool, keyring: Keyring
) -> None:
    """Cancelled at points all over a call: the row is old or new, connections are back and have their settings."""

    async def main() -> None:
        async with (
            _opened(place, keyring) as other,
            app_engine(place, pool_size=2, max_overflow=0) as borrowed,
            open_store(
                place.url if own else borrowed,
                keyring=keyring,
                **cast(dict[str, Any], {"pool_size": 2} if own else place.options),
            ) as store,
        ):
            # A store's own have settings of its own making.
            before = None if own else await _settings(borrowed, place.row, 2)
            started = time.perf_counter()
            await action(store)
            took = time.perf_counter() - started
            for point in range(16):
                await _store(other, "old")
                await _store(other, "old", "u2")
                task = asyncio.ensure_future(action(store))
                if point % 2:
                    for _ in range(point):
                        await asyncio.sleep(0)
                else:
                    await asyncio.sleep(took * point / 13)
                task.cancel()
                await asyncio.wait([task])
                await until(lambda: _whole(store))
                tags = [await _tag(other), await _tag(other, "u2")]
                assert tags[0] in ("old", "new")
                if action is _in_transaction:
                    assert tags[0] == tags[1], "half of a transaction"
            await place.until_idle()
            if not own:
                assert await _settings(borrowed, place.row, 2) == before
            await asyncio.gather(*(action(store) for _ in range(4)))

    asyncio.run(main())


async def _lock_on_session(engine: AsyncEngine, place: Place, keyring: Keyring) -> None:
    async with AsyncSession(engine) as session:
        await _tag(AuthTokenStore(session, keyring=keyring, **place.options), for_update=True)


async def _store_on_session(engine: AsyncEngine, place: Place, keyring: Keyring) -> None:
    async with AsyncSession(engine) as session:
        await _store(AuthTokenStore(session, keyring=keyring, **place.options), "ghost")


async def _lock_on_engine(engine: AsyncEngine, place: Place, keyring: Keyring) -> None:
    async with open_store(engine, keyring=keyring, **place.options) as store, store.transaction() as tx:
        await _tag(tx, for_update=True)


async def _store_on_engine(engine: AsyncEngine, place: Place, keyring: Keyring) -> None:
    async with open_store(engine, keyring=keyring, **place.options) as store:
        await _store(store, "ghost")


async def _store_by_url(engine: AsyncEngine, place: Place, keyring: Keyring) -> None:
    async with open_store(place.url, keyring=keyring) as store:
        await _store(store, "ghost")


@servers_rows
@pytest.mark.parametrize(
    "wait", [_lock_on_session, _store_on_session, _lock_on_engine, _store_on_engine, _store_by_url]
)
def test_a_cancelled_waiter_is_gone_from_the_server_too(
    place: Place, wait: Callable[[AsyncEngine, Place, Keyring], Awaitable[None]], keyring: Keyring
) -> None:
    """The server drops the statement before the lock is free: it can neither take the lock nor write later on."""

    async def main() -> None:
        async with _opened(place, keyring) as other, app_engine(place) as engine:
            async with place.held():
                waiter = asyncio.ensure_future(wait(engine, place, keyring))
                await place.until_waiting()
                started = time.monotonic()
                waiter.cancel()
                await asyncio.wait([waiter])
                assert waiter.cancelled()
                assert time.monotonic() - started < 1
                await until(lambda: place.waiting() == 0)
            assert await _tag(other) == "old"
            await _store(other, "next")
            await place.until_idle()
            assert await _tag(other) == "next"

    asyncio.run(main())


# ---- Errors


def _silent(error: BaseException, *secrets: str) -> None:
    """Neither the error nor anything chained to it, shown or not, holds a secret."""
    seen: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        current = todo.pop()
        if current is None or current in seen:
            continue
        seen.append(current)
        todo += [current.__cause__, current.__context__]
        shown = [str(current), repr(current), *traceback.format_exception(current), repr(vars(current))]
        for secret in (*SECRETS, *secrets):
            assert not any(secret in text for text in shown)


def _password(place: Place) -> str:
    return make_url(place.engine_url).password or "no password here"


@servers_rows
@pytest.mark.parametrize("what", ["port", "password", "database"])
def test_an_unreachable_database_is_unavailable(place: Place, what: str, keyring: Keyring) -> None:
    """Nobody listens, a wrong password, an unknown database: one class of error, with the code, without the URL."""
    url = make_url(place.engine_url)
    secret = "a-wrong-password"
    changed = {
        "port": url.set(port=server_processes.free_port(), password=secret),
        "password": url.set(password=secret),
        "database": url.set(database="no_such_database"),
    }[what]

    async def main() -> None:
        async with open_store(changed.render_as_string(hide_password=False), keyring=keyring) as store:
            for action in (store.setup(), _alone(store), _tag(store), _in_transaction(store)):
                with pytest.raises(BackendUnavailableError) as caught:
                    await action
                _silent(caught.value, secret, _password(place))
                if what != "port":
                    assert caught.value.code in ("28P01", "3D000", "08000", "1045", "1049", "1044")

    asyncio.run(main())


async def _terminate_all(place: Place) -> None:
    """End every session of the database, and wait until they are gone."""
    server = place.server()
    if place.row.mark == "postgres":
        query = (
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        assert all(ended for (ended,) in await asyncio.to_thread(server.execute, query))
        return
    query = "SELECT id FROM information_schema.processlist WHERE db = database() AND id <> connection_id()"
    rows = await asyncio.to_thread(server.execute, query)
    for (thread,) in rows:
        await asyncio.to_thread(server.execute, f"KILL {thread}")
    await until(lambda: not set(server.execute(query)) & set(rows))


@servers_rows
def test_a_terminated_connection_fails_its_transaction_and_no_other_call(place: Place, keyring: Keyring) -> None:
    """What was under way ends in BackendUnavailableError, uncommitted; calls after that find a live connection."""

    async def main() -> None:
        async with _opened(place, keyring) as store:
            with pytest.raises(BackendUnavailableError) as caught:  # noqa: PT012
                async with store.transaction() as tx:
                    await _store(tx, ACCESS)
                    await _terminate_all(place)
                    await _tag(tx)
            _silent(caught.value, _password(place))
            with pytest.raises(BackendUnavailableError):  # noqa: PT012
                async with store.transaction() as tx:
                    await _store(tx, ACCESS)
                    await _terminate_all(place)
            assert await _tag(store) == "old"
            await asyncio.gather(*(_tag(store) for _ in range(5)))
            await _terminate_all(place)
            await _store(store, "new")
            assert await _tag(store) == "new"
            assert _whole(store)

    asyncio.run(main())


@shared_rows
@pytest.mark.parametrize("on", ["url", "session"])
def test_a_lock_that_is_held_too_long_is_a_timeout_that_leaves_nothing(place: Place, on: str, keyring: Keyring) -> None:
    """Both a lock and a write end with LockTimeoutError about when they should, and everything is as before."""

    async def main() -> None:
        async with AsyncExitStack() as stack:
            other = await stack.enter_async_context(_opened(place, keyring))
            engine = await stack.enter_async_context(app_engine(place, pool_size=2, max_overflow=0))
            before = await _settings(engine, place.row, 2)

            async def make() -> AuthTokenStore:
                if on == "url":
                    return await stack.enter_async_context(open_store(place.url, keyring=keyring, lock_timeout=0.3))
                session = await stack.enter_async_context(AsyncSession(engine))
                return AuthTokenStore(session, keyring=keyring, lock_timeout=0.3, **place.options)

            async def lock(store: AuthTokenStore) -> None:
                await (_in_transaction(store) if on == "url" else _tag(store, for_update=True))

            async def fails(store: AuthTokenStore, action: Callable[[AuthTokenStore], Awaitable[None]]) -> None:
                started = time.monotonic()
                with pytest.raises(LockTimeoutError, match=r"github.*u1") as caught:
                    await action(store)
                assert 0.25 < time.monotonic() - started < 2.5
                _silent(caught.value, _password(place))

            stores = [await make(), await make()]
            async with place.held():
                await asyncio.gather(fails(stores[0], lock), fails(stores[1], lambda store: _store(store, ACCESS)))
                assert await _tag(other) == "old"
            await place.until_idle()
            assert await _settings(engine, place.row, 2) == before
            for store in stores:
                await _store(store, "new")

    asyncio.run(main())


@servers_rows
def test_of_two_transactions_that_wait_for_each_other_one_wins(place: Place, keyring: Keyring) -> None:
    """The server ends the dead-lock: one commits, the other gets ConflictError and has written nothing."""

    async def main() -> None:
        async with _opened(place, keyring) as one, open_store(place.url, keyring=keyring) as two:
            met = asyncio.Barrier(2)

            async def lock_both(store: AuthTokenStore, order: list[str], tag: str) -> str:
                async with store.transaction() as tx:
                    await _tag(tx, order[0], for_update=True)
                    await met.wait()
                    await _tag(tx, order[1], for_update=True)
                    for user_id in order:
                        await _store(tx, tag, user_id)
                return tag

            outcomes = await asyncio.gather(
                lock_both(one, ["u1", "u2"], "one"), lock_both(two, ["u2", "u1"], "two"), return_exceptions=True
            )
            [winner] = [outcome for outcome in outcomes if isinstance(outcome, str)]
            [loser] = [outcome for outcome in outcomes if not isinstance(outcome, str)]
            assert isinstance(loser, ConflictError)
            assert loser.code in ("40P01", "1213")
            assert [await _tag(one), await _tag(one, "u2")] == [winner, winner]

    asyncio.run(main())


@shared_rows
def test_no_log_line_or_error_holds_a_token_a_key_or_the_password(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """With every logger at DEBUG, SQLAlchemy's echo among them: round trips, lock timeouts and refused rows."""
    key = bytes(range(200, 232))
    keyring = Keyring({"secret": key})
    secrets = [
        *SECRETS,
        _password(place),
        key.hex(),
        repr(key)[2:-1],
        base64.urlsafe_b64encode(key).decode().rstrip("="),
        base64.b64encode(key).decode().rstrip("="),
    ]
    caplog.set_level(logging.DEBUG)
    for name in ("sqlalchemy", "sqlalchemy.engine", "sqlalchemy.pool", "aiosqlite", "asyncpg", "psycopg", "aiomysql"):
        caplog.set_level(logging.DEBUG, logger=name)

    async def main() -> None:
        async with _opened(place, keyring, lock_timeout=0.3) as store, app_engine(place, echo="debug") as engine:
            on_engine = open_store(engine, keyring=keyring, lock_timeout=0.3, **place.options)

            async def refused(each: AuthTokenStore, user_id: str) -> None:
                with pytest.raises(BackendError) as caught:
                    await each.store_tokens("github", user_id, ACCESS, REFRESH, _in(60))
                _silent(caught.value, *secrets)

            for each in (store, on_engine):
                await each.store_tokens("github", "u1", ACCESS, REFRESH, _in(60), extra={"id_token": ACCESS})
                assert await _tag(each) == ACCESS
            async with place.held():
                await asyncio.gather(refused(store, "u1"), refused(on_engine, "u1"))
            await _refuse_writes(place)
            await asyncio.gather(refused(store, "u9"), refused(on_engine, "u9"))

    asyncio.run(main())
    assert len(caplog.records) > 20
    text = caplog.text + "".join(repr(record.args) + repr(record.__dict__) for record in caplog.records)
    for secret in secrets:
        assert secret not in text


async def _refuse_writes(place: Place) -> None:
    """Let the table refuse every new row, as a database's own rule might, quoting what it refuses where it does so."""
    async with app_engine(place) as engine, engine.begin() as connection:
        if place.row.mark == "sqlite":
            await connection.exec_driver_sql(
                f"CREATE TRIGGER refuse BEFORE INSERT ON {place.table} BEGIN SELECT RAISE(ABORT, 'refused'); END"
            )
        elif place.row.mark == "postgres":
            await connection.exec_driver_sql(
                f"ALTER TABLE {place.table} ADD CONSTRAINT refuse CHECK (created_at < 0) NOT VALID"
            )
        else:
            await connection.exec_driver_sql(
                f"CREATE TRIGGER refuse_{place.table} BEFORE INSERT ON {place.table} FOR EACH ROW "
                "SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'refused'"
            )


# ---- Loops, forks, tasks


# Connections that went with their loop, or stayed with the parent process, warn when they are collected: what a program
# does that opens its store once and calls asyncio.run() or os.fork() all the same. So these run as programs.
_STORE = """
import asyncio, os, sys, warnings
warnings.simplefilter("ignore")
from tokenstore import Keyring, open_store
store = open_store(sys.argv[1], keyring=Keyring({"k1": bytes(range(32))}))
async def put(tag):
    await asyncio.gather(*(store.store_tokens("github", f"{tag}{n}", tag, None, None) for n in range(4)))
    async with store.transaction() as tx:
        record = await tx.load_tokens("github", f"{tag}0", for_update=True)
    assert record["access_token"] == tag
"""

_LOOPS = f"""{_STORE}
asyncio.run(store.setup())
for tag in ("first", "second", "third"):
    asyncio.run(put(tag))
asyncio.run(store.aclose())
print("done")
"""

# The loop does not run while the process forks: two that poll for the same sockets would take each other's answers.
_FORK = f"""{_STORE}
with asyncio.Runner() as runner:
    runner.run(store.setup())
    runner.run(put("before"))
    children = []
    for number in range(2):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                asyncio.run(asyncio.wait_for(put(f"child{{number}}"), 20))
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    runner.run(put("parent"))
    for pid in children:
        _, status = os.waitpid(pid, 0)
        assert status == 0, status
    runner.run(put("after"))
    runner.run(store.aclose())
print("done")
"""


@shared_rows
@pytest.mark.parametrize("program", [_LOOPS, _FORK], ids=["loops", "fork"])
def test_a_store_goes_on_in_another_loop_or_process(row: Row, program: str, tmp_path: Path) -> None:
    """After a second ``asyncio.run``, or in the child of a fork, a store opens new connections by itself.

    The parent of a fork goes on with its own.
    """
    done = subprocess.run(
        [sys.executable, "-c", program, row.url_for(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@shared_rows
def test_tasks_started_in_a_transaction_are_not_in_it(place: Place, keyring: Keyring) -> None:
    """Children of ``gather`` inside the block use the store, not the transaction: they do not see its writes."""

    async def main() -> None:
        async with _opened(place, keyring) as store:
            with pytest.raises(KeyError):  # noqa: PT012
                async with store.transaction() as tx:
                    await _store(tx, "uncommitted")
                    assert await _tag(tx) == "uncommitted"
                    assert [*await asyncio.gather(_tag(store), _tag(store))] == ["old", "old"]
                    if place.row.mark != "sqlite":  # which has one writer at a time
                        await asyncio.gather(_store(store, "own", "u2"), _store(store, "own", "u3"))
                    raise KeyError
            assert await _tag(store) == "old"
            if place.row.mark != "sqlite":
                assert [await _tag(store, "u2"), await _tag(store, "u3")] == ["own", "own"]

    asyncio.run(main())
