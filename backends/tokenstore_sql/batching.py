"""Requests that have to wait are sent together: one statement, or one trip to a thread, for all of them."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, Final, Generic, TypeVar

from tokenstore.cancellation import wait_through_cancellation
from tokenstore.errors import BackendError

__all__ = ["Batch", "Batches", "SendAlone"]

Q = TypeVar("Q")
A = TypeVar("A")

# A statement that takes longer than this no longer keeps other requests waiting, in seconds.
_OVERDUE: Final = 0.010
# Minimum rows in a batch before the rest is split over a second statement.
_SPLIT_ABOVE: Final = 4


class SendAlone(Exception):  # noqa: N818 - a signal, not an error
    """Tells a caller to send its request by itself: the batch that it was in was refused as a whole."""


class Batch(Generic[Q]):
    """Requests that are sent together.

    Args:
        requests: The requests, if they are known.
        fill: Else: called once, when the batch is ready to be sent; returns the requests that wait at that moment.

    Attributes:
        requests: Empty until :meth:`take` is called, unless the requests were known.
    """

    def __init__(self, requests: Iterable[Q] = (), fill: Callable[[], Iterable[Q]] | None = None) -> None:
        self.requests = list(requests)
        self._fill = fill

    @property
    def is_taken(self) -> bool:
        """Whether the requests are known."""
        return self._fill is None

    def take(self) -> list[Q]:
        """The requests. Call it when the connection is ready: requests that wait at the first call join the batch."""
        if self._fill is not None:
            fill, self._fill = self._fill, None
            self.requests += fill()
        return self.requests


class _Request(Generic[Q, A]):
    """A request that waits for its batch, or for the answer to it.

    Attributes:
        content: The request as its caller passed it.
        answer: The future that its caller waits for.
        batch: The task that sends it, once the request has been taken to be sent.
    """

    __slots__ = ("answer", "batch", "content")

    def __init__(self, content: Q, answer: asyncio.Future[A]) -> None:
        self.content = content
        self.answer = answer
        self.batch: asyncio.Task[None] | None = None


class Batches(ABC, Generic[Q, A]):
    """One kind of request.

    A request is sent at once, by itself, in its caller's task, if no other request waits and fewer than ``width``
    statements are on their way. Other requests wait until one of those statements has its answer, or is overdue. Then
    they are sent together, in as many statements as there may be on their way. After a batch of several requests, the
    next request waits for one turn of the event loop, because others are likely to arrive in that turn. A request joins
    only a batch that has not been sent yet, so its answer is never older than the request.

    Args:
        width: How many statements may be on their way at once, unless some are overdue.
        most: The largest weight of a batch.
    """

    writes: ClassVar[bool] = False
    """Whether the requests change rows. If its request was taken, a cancelled caller then waits until the batch has
    ended, because its write must not be carried out after a later call of the same caller."""

    def __init__(self, *, width: int, most: int) -> None:
        self._width = width
        self._most = most
        self._waiting: deque[_Request[Q, A]] = deque()
        self._sent = 0
        self._preparing = False
        self._last_had_several = False
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @abstractmethod
    async def send(self, batch: Batch[Q]) -> Sequence[A]:
        """Get a connection, take the batch, send it, and return the answers in the order of the requests.

        Raises:
            SendAlone: The database refused the batch as a whole.
        """

    async def send_one(self, request: Q) -> A:
        """Send a request by itself."""
        (answer,) = await self.send(Batch([request]))
        return answer

    def weight(self, request: Q) -> int:
        """A request's weight."""
        return 1

    @abstractmethod
    def restated(self, error: Exception, request: Q) -> Exception:
        """What the caller of one request gets of a batch's error: callers must not share an exception object."""

    async def ask(self, request: Q) -> A:
        """Send a request, by itself or with others, and wait for its answer.

        Raises:
            SendAlone: Send the request again, by itself.
        """
        if self._sent < self._width and not self._waiting and not self._last_had_several:
            self._sent += 1
            try:
                return await self.send_one(request)
            except BackendError as error:
                failure = self.restated(error, request)
            finally:
                self._sent -= 1
                if self._waiting:
                    self._next()
            raise failure
        loop = asyncio.get_running_loop()
        waiting: _Request[Q, A] = _Request(request, loop.create_future())
        self._waiting.append(waiting)
        if self._timer is None:
            self._timer = loop.call_later(_OVERDUE, self._overdue)
        if len(self._waiting) == 1 and self._sent < self._width:
            loop.call_soon(self._next)
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            if self.writes and waiting.batch is not None:
                await wait_through_cancellation([waiting.batch])
            raise

    async def aclose(self) -> None:
        """Wait for the batches that are on their way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _overdue(self) -> None:
        self._timer = None
        if self._waiting:
            self._start()
            self._timer = asyncio.get_running_loop().call_later(_OVERDUE, self._overdue)

    def _next(self) -> None:
        if self._waiting and self._sent < self._width:
            self._start()

    def _start(self) -> None:
        # Requests that arrive while a batch waits for its connection join that batch, so one such batch is enough.
        if not self._preparing:
            self._preparing = True
            task = asyncio.create_task(self._send_together(len(self._waiting)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _send_together(self, early: int) -> None:
        """Send a batch, and answer its requests.

        Args:
            early: How many requests waited when the batch was started. They fail if the batch gets no connection.
        """
        taken: list[_Request[Q, A]] = []
        task = asyncio.current_task()

        def fill() -> Iterable[Q]:
            self._preparing = False
            # Some requests are left for the statements that may go beside this one, so that the database and this
            # process work at the same time.
            statements = max(self._width - self._sent, 0) + 1
            room = min(self._most, max(-(-len(self._waiting) // statements), _SPLIT_ABOVE))
            while self._waiting and room > 0:
                request = self._waiting.popleft()
                if not request.answer.done():  # else its caller has been cancelled
                    request.batch = task
                    taken.append(request)
                    room -= self.weight(request.content)
            self._last_had_several = len(taken) > 1
            self._next()
            return [request.content for request in taken]

        batch = Batch(fill=fill)
        self._sent += 1
        try:
            answers = await self.send(batch)
        except BaseException as error:
            if not batch.is_taken:  # there was no connection, which is the answer to the requests that waited for it
                taken += [self._waiting.popleft() for _ in range(min(early, len(self._waiting)))]
            for request in taken:
                if request.answer.done():
                    continue
                if isinstance(error, Exception):
                    request.answer.set_exception(self.restated(error, request.content))
                else:
                    request.answer.cancel()
            if not isinstance(error, Exception):
                raise
        else:
            for request, answer in zip(taken, answers, strict=True):
                if not request.answer.done():
                    request.answer.set_result(answer)
        finally:
            self._sent -= 1
            if not batch.is_taken:
                self._preparing = False
            self._next()
