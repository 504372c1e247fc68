"""A fake database for tests of batching; a test decides when each batch is answered."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from support.fake_clock_loop import until_all_wait
from tokenstore_sql.batching import Batch, Batches


class _Requests(Batches[int, tuple[int, int]]):
    """Sends batches to the test's database."""

    def __init__(self, database: RequestDatabase, *, width: int, most: int) -> None:
        super().__init__(width=width, most=most)
        self._database = database

    async def send(self, batch: Batch[int]) -> Sequence[tuple[int, int]]:
        return await self._database.carry_out(batch.take)

    def restated(self, error: Exception, request: int) -> Exception:
        return type(error)(f"{request}: {error}")


class _RequestsWithSendOne(_Requests):
    """Batching that sends a single request with another method than a batch."""

    async def send_one(self, request: int) -> tuple[int, int]:
        self._database.lone.append(request)
        (answer,) = await self._database.carry_out(lambda: (request,))
        return answer


class Statement:
    """One statement: it waits for a connection, is sent, and is answered."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.connected: asyncio.Future[None] = loop.create_future()
        self.answered: asyncio.Future[None] = loop.create_future()
        self.sender = asyncio.current_task()
        self.requests: Sequence[int] | None = None

    def fail(self, error: Exception) -> None:
        (self.answered if self.connected.done() else self.connected).set_exception(error)


class RequestDatabase:
    """A database whose requests are numbers.

    The answer to a request is its number, and the value of ``clock`` at which its statement was sent.

    Args:
        width: The maximum number of statements at a time.
        most: The maximum number of requests in a statement.
        connected: Whether a statement gets a connection at once; otherwise when the test says so.
        alone: Whether a single request is sent with another method than a batch; ``lone`` records these requests.
    """

    def __init__(self, *, width: int = 1, most: int = 100, connected: bool = True, alone: bool = False) -> None:
        self.connected = connected
        self.statements: list[Statement] = []
        self.lone: list[int] = []
        self.clock = 0
        self.batches = (_RequestsWithSendOne if alone else _Requests)(self, width=width, most=most)
        self.width, self.most = width, most

    async def carry_out(self, take: Callable[[], Sequence[int]]) -> Sequence[tuple[int, int]]:
        statement = Statement()
        self.statements.append(statement)
        try:
            if self.connected:
                statement.connected.set_result(None)
            await statement.connected
            statement.requests = tuple(take())
            sent_at = self.clock
            assert len(statement.requests) <= self.most
            await statement.answered
        finally:
            self.statements.remove(statement)
        return [(request, sent_at) for request in statement.requests]

    def ask(self, *requests: int) -> list[asyncio.Task[tuple[int, int]]]:
        return [asyncio.create_task(self.batches.ask(request)) for request in requests]

    @property
    def sent(self) -> list[Sequence[int]]:
        """The requests of each statement that was sent and not answered yet, oldest first."""
        return [statement.requests for statement in self.statements if statement.requests is not None]

    async def answer(self, at: int = 0) -> None:
        self.statements[at].answered.set_result(None)
        await until_all_wait()


async def numbers(tasks: Sequence[Awaitable[tuple[int, int]]]) -> list[int]:
    return [number for number, _ in await asyncio.gather(*tasks)]
