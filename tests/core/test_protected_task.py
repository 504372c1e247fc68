"""A protected task refuses cancellations from outside, and its own timeouts, task groups and cancel scopes work."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import Context
from typing import Any

import anyio
import httpx
import pytest
import uvloop

from tokenstore.refresh.protected_task import Protection
from tokenstore.testing.provider import StrictRotatingProvider, refresh_over_http

Work = Callable[[], Coroutine[Any, Any, Any]]


class Expected(Exception):
    pass


def _default() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def _uvloop() -> asyncio.AbstractEventLoop:
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def _eager() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    loop.set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009 - not in Python 3.11
    return loop


_LOOPS = {"asyncio": _default, "uvloop": _uvloop}
if sys.version_info >= (3, 12):
    _LOOPS["eager tasks"] = _eager


@pytest.fixture(params=list(_LOOPS.values()), ids=list(_LOOPS))
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """`asyncio.run` with one kind of event loop; an error that the event loop reports as unhandled fails the test."""

    def run(main: Coroutine[Any, Any, Any]) -> Any:
        problems: list[str] = []

        def loop_factory() -> asyncio.AbstractEventLoop:
            loop: asyncio.AbstractEventLoop = request.param()
            loop.set_exception_handler(lambda _, context: problems.append(str(context)))
            return loop

        try:
            with asyncio.Runner(loop_factory=loop_factory) as runner:
                return runner.run(main)
        finally:
            main.close()  # if the test was skipped for this event loop
            assert not problems, problems

    return run


Run = Callable[[Coroutine[Any, Any, Any]], Any]


async def loop_steps(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


# -- cancellations from outside ------------------------------------------------------------------------


def test_a_cancellation_from_outside_is_refused(run: Run) -> None:
    async def main() -> None:
        answer = asyncio.get_running_loop().create_future()

        async def work() -> Any:
            return await answer

        protection = Protection()
        task = protection.start(work())
        await loop_steps(2)
        assert not task.cancel()
        assert task.cancelling() == 0
        assert protection.interrupted
        await loop_steps(2)
        answer.set_result("answer")
        assert await task == "answer"
        assert not task.cancel(), "a task that has ended"

    run(main())


def test_a_task_that_is_cancelled_before_its_first_step_runs(run: Run) -> None:
    async def main() -> None:
        async def work() -> str:
            return "ran"

        task = Protection().start(work())
        assert not task.cancel()
        assert await task == "ran"

    run(main())


def test_cancellations_at_every_step_of_the_event_loop_are_refused(run: Run) -> None:
    """Cancel scopes of anyio and some shutdown handlers cancel like that."""

    async def main() -> None:
        async def work() -> str:
            async with asyncio.timeout(60), asyncio.TaskGroup() as group:
                children = [group.create_task(loop_steps(50)) for _ in range(3)]
            assert not any(child.cancelled() for child in children)
            return "done"

        task = Protection().start(work())
        while not task.done():
            for other in asyncio.all_tasks() - {asyncio.current_task()}:
                other.cancel()
            await asyncio.sleep(0)
        assert await task == "done"

    run(main())


@pytest.mark.parametrize("nested", [False, True], ids=["child", "grandchild"])
@pytest.mark.parametrize("kind", ["itself", "create_task", "wait_for", "gather", "TaskGroup", "anyio"])
def test_the_end_of_the_event_loop_waits_for_the_task_and_for_tasks_that_it_started(
    run: Run, kind: str, nested: bool
) -> None:
    done: list[str] = []

    async def request() -> None:
        await loop_steps(20)
        await asyncio.to_thread(lambda: None)
        done.append("request")

    async def started(work: Work) -> None:
        if kind == "itself":
            await work()
        elif kind == "create_task":
            await asyncio.create_task(work())
        elif kind == "wait_for":
            await asyncio.wait_for(work(), 60)
        elif kind == "gather":
            await asyncio.gather(work(), loop_steps(30))
        elif kind == "TaskGroup":
            async with asyncio.TaskGroup() as group:
                group.create_task(work())
        else:
            async with anyio.create_task_group() as scoped:
                scoped.start_soon(work)

    async def work() -> None:
        await started((lambda: started(request)) if nested else request)
        done.append("work")

    async def main() -> None:
        main.task = Protection().start(work())  # type: ignore[attr-defined]
        await loop_steps(3)

    run(main())
    assert done == ["request", "work"]


def test_a_task_that_the_work_leaves_behind_is_cancelled_when_the_work_ends(run: Run) -> None:
    """The end of the event loop has already cancelled that task once; it must not keep the event loop from ending."""
    ends: list[str] = []

    async def background() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ends.append("background")

    async def work() -> None:
        work.task = asyncio.create_task(background())  # type: ignore[attr-defined]
        await loop_steps(10)
        ends.append("work")

    async def main() -> None:
        main.task = Protection().start(work())  # type: ignore[attr-defined]
        await loop_steps(3)

    run(main())
    assert ends == ["work", "background"]


def test_a_task_that_outlives_the_work_can_be_cancelled(run: Run) -> None:
    async def main() -> None:
        async def work() -> asyncio.Task[bool]:
            return asyncio.create_task(asyncio.Event().wait())

        task = await Protection().start(work())
        await loop_steps(2)
        assert task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())


# -- the work's own cancellations ------------------------------------------------------------------------


async def _asyncio_timeout() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await asyncio.Event().wait()


async def _asyncio_timeout_at_once() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await asyncio.Event().wait()


async def _nested_timeouts() -> None:
    async def twice() -> None:
        async with asyncio.timeout(0.02):
            await _asyncio_timeout()
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await twice()


async def _wait_for() -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.Event().wait(), 0.01)


async def _anyio_fail_after() -> None:
    with pytest.raises(TimeoutError):
        with anyio.fail_after(0.01):
            await anyio.sleep_forever()


async def _anyio_move_on_after() -> None:
    with anyio.move_on_after(0.01) as scope:
        while True:  # ends only after more than one cancellation
            with suppress(asyncio.CancelledError):
                await anyio.sleep_forever()
            if scope.cancel_called:
                await anyio.sleep_forever()
    assert scope.cancelled_caught


async def _failing_task_group() -> None:
    async def fail() -> None:
        await loop_steps(2)
        raise Expected

    waiting: list[asyncio.Task[bool]] = []

    async def together() -> None:
        async with asyncio.TaskGroup() as group:
            waiting.append(group.create_task(asyncio.Event().wait()))
            group.create_task(fail())
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as caught:
        await together()
    assert isinstance(caught.value.exceptions[0], Expected)
    assert waiting[0].cancelled()


async def _task_group_that_fails_before_its_tasks_begin() -> None:
    async def together() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.Event().wait())
            raise Expected

    with pytest.raises(ExceptionGroup):
        await together()


async def _failing_anyio_task_group() -> None:
    async def fail() -> None:
        await loop_steps(2)
        raise Expected

    async def together() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep_forever)
            group.start_soon(fail)
            await anyio.sleep_forever()

    with pytest.raises(ExceptionGroup):
        await together()


async def _cancelled_task() -> None:
    task = asyncio.create_task(asyncio.Event().wait())
    asyncio.get_running_loop().call_soon(task.cancel)
    with pytest.raises(asyncio.CancelledError):
        await task


async def _task_that_cancels_itself() -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().call_soon(task.cancel)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.Event().wait()
    task.uncancel()


async def _httpx_timeout() -> None:
    with StrictRotatingProvider() as provider, provider.hold():
        client = {"client_id": provider.client_id, "client_secret": provider.client_secret}
        with pytest.raises(httpx.ReadTimeout):
            await refresh_over_http(
                provider.token_url, provider.new_grant("user")["refresh_token"], **client, timeout=0.1
            )


@pytest.mark.parametrize("interrupted", [False, True], ids=["undisturbed", "cancelled from outside"])
@pytest.mark.parametrize(
    "work",
    [
        _asyncio_timeout,
        _asyncio_timeout_at_once,
        _nested_timeouts,
        _wait_for,
        _anyio_fail_after,
        _anyio_move_on_after,
        _failing_task_group,
        _task_group_that_fails_before_its_tasks_begin,
        _failing_anyio_task_group,
        _cancelled_task,
        _task_that_cancels_itself,
        _httpx_timeout,
    ],
)
def test_the_work_can_cancel_itself_and_its_tasks(run: Run, work: Work, interrupted: bool) -> None:
    async def main() -> None:
        async def child() -> None:
            await work()

        async def both() -> None:
            await work()
            await asyncio.create_task(child())

        task = Protection().start(both())
        async with asyncio.timeout(20):
            while not task.done():
                for other in asyncio.all_tasks() - {asyncio.current_task()} if interrupted else ():
                    other.cancel()
                await asyncio.wait([task], timeout=0.001)
        await task

    run(main())


def test_an_error_that_the_work_raises_is_the_error_of_the_task(run: Run) -> None:
    async def main() -> None:
        async def fail() -> None:
            raise Expected

        with pytest.raises(Expected):
            await Protection().start(fail())

        async def cancelled() -> None:
            raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError):
            await Protection().start(cancelled())

    run(main())


# -- the duration of the protection ------------------------------------------------------------------------


def test_work_without_protection_is_cancelled(run: Run) -> None:
    async def main() -> None:
        protection = Protection()

        async def work() -> None:
            protection.lift()
            await asyncio.Event().wait()

        task = protection.start(work())
        await loop_steps(2)
        assert task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())


def test_lifting_the_protection_raises_a_cancellation_that_was_refused(run: Run) -> None:
    async def main() -> None:
        protection, go_on = Protection(), asyncio.Event()

        async def work() -> None:
            await go_on.wait()
            protection.lift()
            raise AssertionError

        task = protection.start(work())
        await loop_steps(2)
        assert not task.cancel()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())


@pytest.mark.parametrize("bound", ["limit", "grace"])
def test_work_that_never_ends_is_cancelled_when_its_protection_runs_out(run: Run, bound: str) -> None:
    """Also if the end of the event loop cancels it only once, before the protection has expired."""
    cancelled: list[bool] = []

    async def main() -> None:
        protection = Protection()

        async def work() -> None:
            protection.guard(**{bound: 0.05})
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(protection.holds)
                raise

        main.task = protection.start(work())  # type: ignore[attr-defined]
        await loop_steps(3)

    run(main())
    assert cancelled == [False]


def test_protection_can_be_prolonged_after_a_cancellation_was_refused(run: Run) -> None:
    done: list[str] = []

    async def main() -> None:
        protection = Protection()

        async def work() -> None:
            protection.guard(limit=0.25)
            await loop_steps(5)
            protection.guard()
            await asyncio.sleep(0.3)  # longer than the first duration of the protection
            done.append("work")

        main.task = protection.start(work())  # type: ignore[attr-defined]
        await loop_steps(3)

    run(main())
    assert done == ["work"]


def test_a_timer_that_was_disowned_cannot_cancel_the_task(run: Run) -> None:
    """For example, a timer that a refresher did not stop expires while the new tokens are written."""

    async def main() -> None:
        protection, fired = Protection(), asyncio.Event()

        async def work() -> str:
            task = asyncio.current_task()
            assert task is not None
            loop = asyncio.get_running_loop()
            loop.call_later(0.01, task.cancel)
            loop.call_later(0.02, fired.set)
            protection.disown()
            await fired.wait()
            await _asyncio_timeout()
            return "done"

        assert await protection.start(work()) == "done"

    run(main())


def test_a_task_that_was_started_before_keeps_its_own_timers(run: Run) -> None:
    async def main() -> None:
        protection = Protection()

        async def work() -> None:
            child = asyncio.create_task(_asyncio_timeout())
            await loop_steps(2)
            protection.disown()
            await child

        async with asyncio.timeout(20):
            await protection.start(work())

    run(main())


# -- the application's own tasks and factories -------------------------------------------------------------


def test_tasks_of_others_are_not_protected(run: Run) -> None:
    async def main() -> None:
        go_on = asyncio.Event()
        task = Protection().start(go_on.wait())
        await loop_steps(2)
        other = asyncio.create_task(asyncio.Event().wait())
        await loop_steps(2)
        assert other.cancel()
        go_on.set()
        await task
        with pytest.raises(asyncio.CancelledError):
            await other

    run(main())


def test_protected_tasks_do_not_cancel_each_other(run: Run) -> None:
    """A refresher may use another store, whose refresh goes on although this one is cancelled."""

    async def main() -> None:
        go_on = asyncio.Event()
        inner: list[asyncio.Task[Any]] = []

        async def outer() -> None:
            inner.append(Protection().start(go_on.wait()))
            await loop_steps(2)
            assert not inner[0].cancel()

        await Protection().start(outer())
        go_on.set()
        assert await inner[0]

    run(main())


def test_a_child_task_with_its_own_context_is_not_protected(run: Run) -> None:
    async def main() -> None:
        async def work() -> None:
            child = asyncio.create_task(_asyncio_timeout(), context=Context())
            assert type(child) is asyncio.Task
            await child

        await Protection().start(work())

    run(main())


def test_an_application_s_task_factory_makes_the_child_tasks() -> None:
    made: list[str] = []

    def factory(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
        made.append(work.__qualname__)
        return asyncio.Task(work, loop=loop, **options)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_task_factory(factory)

        async def work() -> None:
            await asyncio.create_task(loop_steps(1))

        await Protection().start(work())
        assert loop.get_task_factory() is factory

    asyncio.run(main())
    assert made[0] == "loop_steps"


def test_between_steps_the_event_loop_has_its_own_task_factory(run: Run) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        before = loop.get_task_factory()

        async def child() -> None:
            for _ in range(5):
                await asyncio.sleep(0)

        task = Protection().start(child())
        while not task.done():
            assert loop.get_task_factory() is before
            await asyncio.sleep(0)
        assert loop.get_task_factory() is before

    run(main())


def test_child_tasks_keep_their_names_and_show_their_coroutines(run: Run) -> None:
    async def main() -> None:
        async def work() -> None:
            task = asyncio.create_task(loop_steps(3), name="the child")
            assert task.get_name() == "the child"
            assert "loop_steps" in repr(task)
            await task

        await Protection().start(work())

    run(main())
