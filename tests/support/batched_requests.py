"""A database of which a test decides when it answers which batch of requests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from support.waitless_loop import everybody_waits
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


class _WithFastLane(_Requests):
    """Sends single requests another way."""

    async def send_one(self, request: int) -> tuple[int, int]:
        self._database.lone.append(request)
        (answer,) = await self._database.carry_out(lambda: (request,))
        return answer


class Trip:
    """One statement: first it waits for a connection, then it is sent, then answered."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.connected: asyncio.Future[None] = loop.create_future()
        self.answered: asyncio.Future[None] = loop.create_future()
        self.sender = asyncio.current_task()
        self.requests: Sequence[int] | None = None

    def fail(self, error: Exception) -> None:
        (self.answered if self.connected.done() else self.connected).set_exception(error)


class RequestDatabase:
    """Requests are numbers, which count up; an answer is the number and the clock at which the statement was sent."""

    def __init__(self, *, width: int = 1, most: int = 100, connected: bool = True, alone: bool = False) -> None:
        self.connected = connected
        self.trips: list[Trip] = []
        self.lone: list[int] = []
        self.clock = 0
        self.subject = (_WithFastLane if alone else _Requests)(self, width=width, most=most)
        self.width, self.most = width, most

    async def carry_out(self, take: Callable[[], Sequence[int]]) -> Sequence[tuple[int, int]]:
        trip = Trip()
        self.trips.append(trip)
        try:
            if self.connected:
                trip.connected.set_result(None)
            await trip.connected
            trip.requests = tuple(take())
            sent_at = self.clock
            assert len(trip.requests) <= self.most
            await trip.answered
        finally:
            self.trips.remove(trip)
        return [(request, sent_at) for request in trip.requests]

    def ask(self, *requests: int) -> list[asyncio.Task[tuple[int, int]]]:
        return [asyncio.create_task(self.subject.ask(request)) for request in requests]

    @property
    def sent(self) -> list[Sequence[int]]:
        """What is on its way, in the order in which it set out."""
        return [trip.requests for trip in self.trips if trip.requests is not None]

    async def answer(self, at: int = 0) -> None:
        self.trips[at].answered.set_result(None)
        await everybody_waits()


async def numbers(tasks: Sequence[Awaitable[tuple[int, int]]]) -> list[int]:
    return [number for number, _ in await asyncio.gather(*tasks)]
