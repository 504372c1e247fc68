"""A fake driver without a network, and a fake server; a test decides how each attempt to connect ends."""

from __future__ import annotations

import asyncio
from typing import Any

from tokenstore import BackendUnavailableError
from tokenstore_sql.connections.connection import StatementResult
from tokenstore_sql.connections.driver import DriverConnection
from tokenstore_sql.connections.pool import Pool

TIMEOUT, RECYCLE = 10.0, 1800.0


class DriverError(Exception):
    pass


class FakeConnection(DriverConnection):
    """A connection without a server.

    Attributes:
        hang: For a statement, the event that it waits for.
        fail: Statements that raise an error, after which the connection is dead.
    """

    def __init__(self, number: int, server: FakeServer) -> None:
        self.number, self.server = number, server
        self.closed = self.dead = self.forgotten = False
        self.sent: list[str] = []
        self.hang: dict[str, asyncio.Event] = {}
        self.fail = set(server.failing)
        dialect: Any = FakeDialect()
        compiler: Any = dialect
        super().__init__(None, compiler, dialect, "BEGIN", server.connect)
        self.opened_at = self.used_at = asyncio.get_running_loop().time()

    def __repr__(self) -> str:
        return f"<{self.number}>"

    def is_closed(self) -> bool:
        return self.closed or self.dead

    def socket(self) -> None:
        """None."""

    async def send(self, sql: str, arguments: Any, returns_rows: bool) -> StatementResult:
        assert not self.closed, "a closed connection is used"
        self.sent.append(sql)
        if sql in self.hang:
            await self.hang[sql].wait()
        if sql in self.fail:
            self.dead = True
            raise DriverError("connection lost")
        return StatementResult((), 0)

    async def close(self) -> None:
        assert not self.closed, "closed twice"
        self.closed = True
        self.server.open.discard(self)

    def forget(self) -> None:
        self.forgotten = True
        self.server.open.discard(self)


class FakeDialect:
    """The methods that a connection needs of its dialect and of SQLAlchemy's."""

    dialect = None

    def classify(self, error: BaseException) -> tuple[type[Exception], None]:
        return BackendUnavailableError, None

    def code(self, error: BaseException) -> None:
        """Return None: this driver's errors have no code."""

    def ends_connection(self, error: BaseException) -> bool:
        return True

    def driver_errors(self) -> tuple[type[Exception], ...]:
        return (DriverError,)


class FakeServer:
    """Opens connections. ``answers`` says how each of the next attempts ends: after an event, or with an error."""

    def __init__(self) -> None:
        self.made: list[FakeConnection] = []
        self.open: set[FakeConnection] = set()
        self.opening = 0
        self.failing: set[str] = set()
        self.answers: list[asyncio.Event | type[BaseException] | None] = []

    async def connect(self) -> DriverConnection:
        self.opening += 1
        try:
            answer = self.answers.pop(0) if self.answers else None
            if isinstance(answer, asyncio.Event):
                await answer.wait()
            elif answer is not None:
                raise answer
        finally:
            self.opening -= 1
        connection = FakeConnection(len(self.made) + 1, self)
        self.made.append(connection)
        self.open.add(connection)
        return connection

    def pool(self, size: int = 1, **options: float) -> Pool:
        return Pool(self.connect, size=size, **{"timeout": TIMEOUT, "recycle": RECYCLE, **options})


async def acquired(pool: Pool, *, transactional: bool = False, write: bool = False) -> FakeConnection:
    connection = await pool.acquire(transactional=transactional, write=write)
    assert isinstance(connection, FakeConnection)
    return connection


def acquiring(pool: Pool, *, transactional: bool = False, write: bool = False) -> asyncio.Task[FakeConnection]:
    return asyncio.create_task(acquired(pool, transactional=transactional, write=write))


async def used_up(pool: Pool, count: int) -> list[FakeConnection]:
    return [await acquired(pool) for _ in range(count)]
