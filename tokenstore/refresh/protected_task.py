"""Tasks that the end of an event loop waits for instead of cancelling them.

``asyncio.run`` cancels every task when its coroutine has ended, and then waits for them. So do Flask's ``async def``
views, asgiref's ``async_to_sync``, and many shutdown handlers. For a refresh that is harmful: the provider may have
received the refresh token already. If the request is cancelled then, the provider issues new tokens that no process
receives, the next refresh sends the used refresh token, and a strict provider revokes the grant.

Catching ``CancelledError`` does not help, as by then the request is lost. Therefore a protected task refuses the
cancellation itself: its ``cancel()`` returns False. The event loop then waits for the task, as it waits for every task
that it has cancelled.

Only cancellations from outside are refused. The work may cancel itself: ``asyncio.timeout``, ``TaskGroup``, anyio's
cancel scopes and aiohttp's timers all call ``cancel()``, and have to go on working. Their timers, callbacks and child
tasks run in copies of the context in which they were started, and the context of a protected task holds a mark. A
``cancel()`` that is called where that mark is set comes from the work itself.

Tasks that the work starts, as ``asyncio.wait_for`` does before Python 3.12, are protected in the same way. The event
loop cancels each task by itself, so an unprotected child task would lose the request although its parent is protected.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from time import monotonic
from types import TracebackType
from typing import Any, Final, TypeVar

__all__ = ["Protection"]

T = TypeVar("T")

_mark: Final[ContextVar[object]] = ContextVar("tokenstore_protected_task", default=None)

_FOREVER: Final = float("inf")

# Python 3.12 and newer.
_eager_task_factory: Final[object] = getattr(asyncio, "eager_task_factory", None)
_create_eager_task_factory: Final[Any] = getattr(asyncio, "create_eager_task_factory", None)


class Protection:
    """What a protected task and the tasks that it starts have in common.

    A task that is started with :meth:`start` is protected from its first step on: a task that is cancelled before that
    would never run, and callers that wait for its result would wait for ever. From then on the work says what may be
    interrupted, with :meth:`guard` and :meth:`lift`.

    Attributes:
        interrupted: Whether a cancellation from outside was refused or let through.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._until = _FOREVER
        self._grace = _FOREVER
        self._ended = False
        self._mark = object()
        self._postponed: set[_ProtectedTask[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def holds(self) -> bool:
        """Whether a cancellation from outside would be refused now."""
        return monotonic() < self._until

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run the work in a protected task; once for each protection."""
        self._loop = asyncio.get_running_loop()
        context = copy_context()
        context.run(_mark.set, self._mark)
        work = self._to_the_end(work)
        return _ProtectedTask(_Stepped(work, self), self, None, loop=self._loop, context=context)

    def guard(self, *, limit: float = _FOREVER, grace: float = _FOREVER) -> None:
        """Refuse cancellations from outside.

        A cancellation that was refused is delivered when the protection runs out, if the task has not ended by then:
        work that never ends must not keep the event loop from ending.

        Args:
            limit: How long the protection lasts, in seconds.
            grace: How long it lasts at most once the task is, or has been, cancelled from outside, in seconds.
        """
        self._grace = grace
        self._until = monotonic() + (min(limit, grace) if self.interrupted else limit)
        self._set_timer()

    def lift(self) -> None:
        """Let cancellations from outside through.

        Raises:
            asyncio.CancelledError: One has been refused before.
        """
        self._until = -_FOREVER
        if self.interrupted:
            raise asyncio.CancelledError

    def disown(self) -> None:
        """From now on, treat a cancellation by anything that the work has started so far as one from outside.

        To be called in the task itself, for example after a refresher has returned. Otherwise a timer that the
        refresher left behind could cancel the writing of the new tokens.
        """
        self._mark = object()
        _ = _mark.set(self._mark)

    async def _to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return await work
        finally:
            self._until = -_FOREVER
            self._ended = True
            self._deliver(besides=asyncio.current_task())

    def _refuses(self, task: _ProtectedTask[Any]) -> bool:
        if not self.interrupted:
            self.interrupted = True
            self._until = min(self._until, monotonic() + self._grace)
        if not self.holds:
            return False
        self._postponed.add(task)
        self._set_timer()
        return True

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._loop is not None and self._postponed and self._until < _FOREVER:
            # Not the running loop: `asyncio.run` cancels its tasks while the loop stands still.
            self._timer = self._loop.call_later(max(self._until - monotonic(), 0.0), self._deliver_if_due)

    def _deliver_if_due(self) -> None:
        self._timer = None
        if self.holds:  # the event loop's clock is coarser, or the protection was prolonged
            self._set_timer()
        else:
            self._deliver()

    def _deliver(self, besides: asyncio.Task[Any] | None = None) -> None:
        """Cancel, at last, those tasks whose cancellation was refused."""
        postponed, self._postponed = self._postponed, set()
        self._set_timer()
        for task in postponed:
            if task is not besides:
                _ = asyncio.Task.cancel(task)

    def _child_factory(self, before: object) -> Any:
        """A task factory in place of the event loop's own, whose tasks are protected; None if there is none."""
        if before is None:
            return self._create_child
        if before is _eager_task_factory:
            # Made by asyncio, so that anyio recognizes it: anyio does not let it start the tasks of its groups eagerly.
            return _create_eager_task_factory(self._new_child)
        return None  # the application's own task factory: only that can make its tasks

    def _create_child(
        self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T], **options: Any
    ) -> asyncio.Task[T]:
        return self._new_child(work, loop=loop, **options)

    def _new_child(
        self, work: Coroutine[Any, Any, T], *, context: Context | None = None, **options: Any
    ) -> asyncio.Task[T]:
        mark = _mark.get() if context is None else context.get(_mark)
        if mark is None:  # in a context of its own, its own timers would look like cancellations from outside
            return asyncio.Task(work, context=context, **options)
        return _ProtectedTask(_Stepped(work, self), self, mark, context=context, **options)


class _ProtectedTask(asyncio.Task[T]):
    """A task that refuses cancellations from outside for as long as its protection holds.

    Args:
        work: What it does.
        protection: The protection.
        mark: For a task that the work started, the mark that its context and its own timers have.
        options: Those of ``asyncio.Task``.
    """

    def __init__(
        self, work: Coroutine[Any, Any, T], protection: Protection, mark: object | None, **options: Any
    ) -> None:
        # Set first: a task that is started eagerly runs its first step in `super().__init__`.
        self._protection = protection
        self._mark = mark
        super().__init__(work, **options)

    def cancel(self, msg: Any | None = None) -> bool:
        here = _mark.get()
        inside = here is not None and (here is self._protection._mark or here is self._mark)
        if self.done() or inside or not self._protection._refuses(self):
            return super().cancel(msg)
        return False


class _Stepped(Coroutine[Any, Any, T]):
    """A coroutine whose child tasks are protected.

    While one step of it runs, nothing else runs in the event loop. So the task factory that the loop has during that
    step makes the tasks of this coroutine alone.
    """

    def __init__(self, work: Coroutine[Any, Any, T], protection: Protection) -> None:
        self._work = work
        self._protection = protection

    def __await__(self) -> Any:
        return self._work.__await__()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)  # asyncio, anyio and debuggers ask a coroutine for its frame and its state

    def send(self, value: Any, /) -> Any:
        return self._step(self._work.send, value)

    def throw(self, error: Any, value: Any = None, traceback: TracebackType | None = None, /) -> Any:
        if value is None and traceback is None:
            return self._step(self._work.throw, error)
        return self._step(self._work.throw, error, value, traceback)

    def close(self) -> None:
        self._work.close()

    def _step(self, step: Callable[..., Any], *given: Any) -> Any:
        protection = self._protection
        if protection._ended:
            return step(*given)
        loop = asyncio.get_running_loop()
        before = loop.get_task_factory()
        factory = protection._child_factory(before)
        if factory is None:
            return step(*given)
        loop.set_task_factory(factory)
        try:
            return step(*given)
        finally:
            if loop.get_task_factory() is factory:
                loop.set_task_factory(before)
