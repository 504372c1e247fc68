"""Requests that have to wait go together: one statement, or one trip to a thread, for all of them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, TypeVar

from tokenstore.cancellation import wait_through_cancellation
from tokenstore.errors import BackendError

__all__ = ["Alone", "Batches", "Take"]

Q = TypeVar("Q")
A = TypeVar("A")
Take = Callable[[], Sequence[Q]]
"""Called when everything is ready to send: whoever waits by then comes along, and nobody later."""

# What is on its way for longer than this no longer keeps others waiting, in seconds.
_OVERDUE: Final = 0.010
# So many go together although there could be another statement.
_WORTH_ONE: Final = 4


class Alone(Exception):  # noqa: N818 - a signal, not an error
    """Tells a caller to send its request by itself: those that went together have come to nothing."""


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


class Batches(Generic[Q, A]):
    """One kind of request.

    A request that finds nobody waiting, and fewer than ``width`` statements on their way, goes at once, by itself, in
    its caller's task. Others wait until one of those has its answer, or is overdue; then they go together, in as many
    statements as there may be on their way. Where the last ones went together, the next waits for one turn of the event
    loop, which takes no time, as others are likely to come in that turn. A request joins only what has not been sent
    yet, so that its answer is never older than itself.

    Args:
        alone: A shorter way for a request that goes by itself.
        carry_out: Gets a connection, calls ``take`` once, sends what that gives, and returns the answers in order.
        width: How many statements are on their way at once, unless some are overdue.
        most: How much goes together at most, by weight.
        weight: A request's weight; default: 1.
        writes: Whether the requests change rows. A cancelled caller whose request was taken then waits until the batch
            has ended: its write must not be carried out after a later call of the caller's.
        restate: From an error and a request to what its caller gets, as nobody can share an exception.
    """

    def __init__(
        self,
        carry_out: Callable[[Take[Q]], Awaitable[Sequence[A]]],
        *,
        alone: Callable[[Q], Awaitable[A]] | None = None,
        width: int,
        most: int,
        weight: Callable[[Q], int] = lambda _: 1,
        writes: bool = False,
        restate: Callable[[Exception, Q], Exception],
    ) -> None:
        self._carry_out = carry_out
        self._alone = alone
        self._width = width
        self._most = most
        self._weight = weight
        self._writes = writes
        self._restate = restate
        self._waiting: deque[_Request[Q, A]] = deque()
        self._sent = 0
        self._preparing = False
        self._in_company = False
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(self, request: Q) -> A:
        """Send a request, by itself or with others, and wait for its answer.

        Raises:
            Alone: Send it again, by itself.
        """
        if self._sent < self._width and not self._waiting and not self._in_company:
            self._sent += 1
            try:
                if self._alone is not None:
                    return await self._alone(request)
                (answer,) = await self._carry_out(lambda: (request,))
                return answer
            except BackendError as error:
                failure = self._restate(error, request)
            finally:
                self._sent -= 1
                if self._waiting:
                    self._next()
            raise failure
        loop = asyncio.get_running_loop()
        waiting = _Request[Q, A](request, loop.create_future())
        self._waiting.append(waiting)
        if self._timer is None:
            self._timer = loop.call_later(_OVERDUE, self._overdue)
        if len(self._waiting) == 1 and self._sent < self._width:
            loop.call_soon(self._next)
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            if self._writes and waiting.batch is not None:
                await wait_through_cancellation([waiting.batch])
            raise

    async def aclose(self) -> None:
        """Wait for what is on its way."""
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
        # Whoever comes while a batch waits for its connection will go with it: one such is enough.
        if not self._preparing:
            self._preparing = True
            task = asyncio.create_task(self._send_together(len(self._waiting)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _send_together(self, early: int) -> None:
        taken: list[_Request[Q, A]] = []
        preparing = True
        batch = asyncio.current_task()

        def take() -> Sequence[Q]:
            nonlocal preparing
            preparing = self._preparing = False
            # What could go beside this one is left a part, so that the database and this process work at the same time.
            statements = max(self._width - self._sent, 0) + 1
            room = min(self._most, max(-(-len(self._waiting) // statements), _WORTH_ONE))
            while self._waiting and room > 0:
                request = self._waiting.popleft()
                if not request.answer.done():  # else its caller has been cancelled
                    request.batch = batch
                    taken.append(request)
                    room -= self._weight(request.content)
            self._in_company = len(taken) > 1
            self._next()
            return [request.content for request in taken]

        self._sent += 1
        try:
            answers = await self._carry_out(take)
        except BaseException as error:
            if preparing:  # there was nothing to send over: that is the answer to those who had waited so long
                taken = [self._waiting.popleft() for _ in range(min(early, len(self._waiting)))]
            for request in taken:
                if request.answer.done():
                    continue
                if isinstance(error, Exception):
                    request.answer.set_exception(self._restate(error, request.content))
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
            if preparing:
                self._preparing = False
            self._next()
