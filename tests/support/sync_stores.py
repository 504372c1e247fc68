"""Stores without ``await``: their loop thread, and programs that use them in a process of their own."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tokenstore.sync import AuthTokenStore
from tokenstore.sync.loop_thread import _Process, loop_thread
from tokenstore.sync.waiting import _ThreadWaiter

__all__ = ["Open", "ended_loop_thread", "interrupted", "run_program"]

Open = Callable[..., AuthTokenStore]
"""Opens a store with the options of ``open_store``."""


@contextmanager
def ended_loop_thread() -> Iterator[None]:
    """End the loop thread afterwards, as ``atexit`` does, so that the next call starts another one."""
    try:
        yield
    finally:
        thread, _Process.thread = _Process.thread, None
        if thread is not None:
            thread.end()


def interrupted(call: Callable[[], object]) -> None:
    """Interrupt a call of the main thread while it waits for its result, as Ctrl-C does."""
    main = threading.main_thread().ident
    assert main is not None
    assert main == threading.get_ident()

    def interrupt_once_it_waits() -> None:
        frame = sys._current_frames()[main]
        if frame.f_code is _ThreadWaiter.wait.__code__:
            signal.pthread_kill(main, signal.SIGINT)
        else:
            _ = asyncio.get_running_loop().call_later(0.005, interrupt_once_it_waits)

    loop_thread().submit(interrupt_once_it_waits)
    _ = call()


def run_program(program: str, *arguments: str, timeout: float = 180.0) -> str:
    """Run a Python program with warnings as errors. Return what it prints; it must end well and write no error.

    A program that does not end in time shows where its threads are.
    """
    command = [sys.executable, "-X", "faulthandler", "-W", "error", "-c", program, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            printed, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)
            printed, errors = process.communicate()
    told = f"it printed {printed!r} and ended with {process.returncode}:\n{errors}"
    assert (process.returncode, errors) == (0, ""), told
    return printed
