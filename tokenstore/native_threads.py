"""Threads of the operating system, and functions that run in one.

gevent's ``monkey.patch_all()`` replaces Python's threads by greenlets, which all run in one thread, and its locks and
queues by ones for greenlets. An event loop, and work that blocks, need a thread of their own, so this module goes to
what was there before. It never imports gevent itself.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from importlib import import_module
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import asyncio

__all__ = ["greenlets_for_threads", "in_thread", "is_coroutine_function", "note_hub", "original", "start_thread"]

T = TypeVar("T")


def greenlets_for_threads() -> bool:
    """Whether gevent has replaced threads by greenlets in this process."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))


def original(module: str, name: str) -> Any:
    """The object that a module of the standard library had under a name before gevent replaced it, if it has."""
    monkey = sys.modules.get("gevent.monkey")
    return getattr(import_module(module), name) if monkey is None else monkey.get_original(module, name)


def start_thread(work: Callable[[], object], name: str) -> None:
    """Run a function in a new daemon thread, which does not keep the interpreter from ending.

    Raises:
        RuntimeError: There can be no more threads: the machine has a limit, or the interpreter is ending.
    """
    if not greenlets_for_threads():
        threading.Thread(target=work, name=name, daemon=True).start()
        return

    # If patched functions have given the thread a hub by its end, that is left as it is: sockets may still refer to it.
    original("_thread", "start_new_thread")(work, ())


def is_coroutine_function(function: object) -> bool:
    """Whether a callable is an ``async def`` function, or an object whose ``__call__`` is one."""
    return iscoroutinefunction(function) or iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


class _Greenlets:
    main_hub: Any = None


def note_hub(hub: Any) -> None:
    """Remember gevent's hub of the main thread, in which :func:`in_thread` then runs functions."""
    if hub.main_hub:
        _Greenlets.main_hub = hub


def in_thread(function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
    """Run a function in a thread of its own, in a copy of this context.

    After gevent's monkey-patching that is a greenlet of the main thread, as for any thread of the application: what the
    function uses, such as pooled connections, belongs to the main thread's hub.

    Returns:
        Its result or exception, for the running event loop. If it is cancelled, the function runs on.

    Raises:
        RuntimeError: There can be no more threads.
    """
    import asyncio  # imported here: `import tokenstore` must not load it

    loop, context = asyncio.get_running_loop(), copy_context()
    done: asyncio.Future[T] = loop.create_future()
    # Otherwise asyncio would log the exception, whose text may contain a token, if nobody awaits it any more.
    done.add_done_callback(_note_exception)

    def work() -> None:
        nonlocal args
        answer: Any = None
        failure: BaseException | None = None
        try:
            answer = context.run(function, *args)
        except BaseException as error:  # noqa: BLE001 - the caller gets it
            failure = error
        finally:
            args = ()
        with suppress(RuntimeError):  # the event loop has been closed
            _ = loop.call_soon_threadsafe(_settle, done, answer, failure)
        del answer, failure

    if _Greenlets.main_hub is not None:
        _Greenlets.main_hub.loop.run_callback_threadsafe(sys.modules["gevent"].spawn, work)
        return done
    try:
        start_thread(work, "tokenstore-call")
    except RuntimeError:
        # Since Python 3.12 an interpreter that is ending starts no thread. The executor may have one already.
        _ = loop.run_in_executor(None, work)
    return done


def _note_exception(done: asyncio.Future[Any]) -> None:
    if not done.cancelled():
        _ = done.exception()


def _settle(done: asyncio.Future[Any], answer: object, failure: BaseException | None) -> None:
    if done.done():
        return
    if isinstance(failure, StopIteration):  # which a future refuses, as a coroutine does
        failure = RuntimeError("the function raised StopIteration")
    if failure is not None:
        done.set_exception(failure)
    else:
        done.set_result(answer)
