"""The backends that the conformance tests are run on."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar, cast

from tokenstore.protocol import Backend
from tokenstore.registry import backend_for_url
from tokenstore.testing.conformance._helpers import TIMEOUT, until


class Testbed:
    """Opens and closes the backend under test. Override :meth:`make_url`; the other methods have defaults."""

    __test__ = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Without this, pytest would also collect the base classes that a test module imports.
        cls.__test__ = cls.make_url is not Testbed.make_url

    needs_setup: ClassVar[bool] = True
    """Whether the backend fails with TableMissingError until ``setup()`` has run."""

    in_memory: ClassVar[bool] = False
    """Whether the rows are in this process's memory, so that no call waits for a file or a database."""

    def make_url(self, tmp_path: Path) -> str:
        """Return the URL of an empty store: a new file, or a table that does not exist yet."""
        raise NotImplementedError(f"{type(self).__name__} must define make_url(self, tmp_path)")

    def open(self, url: str, **options: Any) -> Backend:
        """Make a backend. The default looks the URL up in the registry, as ``open_store(url)`` does."""
        return backend_for_url(url, options)

    async def close(self, backend: Backend) -> None:
        """Close a backend that :meth:`open` made, and everything else that ``open`` made for it."""
        await backend.aclose()

    @asynccontextmanager
    async def opened(self, url: str, *, setup: bool = True, **options: Any) -> AsyncIterator[Backend]:
        backend = self.open(url, **options)
        try:
            if setup:
                await backend.setup()
            yield backend
        finally:
            await self.close(backend)

    @asynccontextmanager
    async def second(self, url: str, backend: Backend, **options: Any) -> AsyncIterator[Backend]:  # noqa: ARG002
        """Yield the second caller's backend: the same object, unless several processes can open the data."""
        yield backend


def _check(
    arguments: Callable[..., Any], test: Callable[..., Coroutine[Any, Any, None]]
) -> Callable[[Testbed, Path], None]:
    """Make a test of a coroutine function; it runs in a new event loop with the backends that ``arguments`` opens."""

    @functools.wraps(test)
    def run(self: Testbed, tmp_path: Path) -> None:
        url = self.make_url(tmp_path)  # called outside the event loop because it may start a server

        async def main() -> None:
            async with asyncio.timeout(3 * TIMEOUT), arguments(self, url) as opened:
                await test(self, *opened)
            await until(_only_this_task, "all tasks that the backend started have ended")

        asyncio.run(main())

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", "tmp_path")]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what pytest reads
    return cast(Callable[[Testbed, Path], None], run)


async def _only_this_task() -> bool:
    return asyncio.all_tasks() == {asyncio.current_task()}


def on_one_backend(test: Callable[[Any, Any], Coroutine[Any, Any, None]]) -> Callable[[Testbed, Path], None]:
    """Decorate a test of one backend on which ``setup()`` has run."""

    @asynccontextmanager
    async def arguments(bed: Testbed, url: str) -> AsyncIterator[tuple[Backend]]:
        async with bed.opened(url) as backend:
            yield (backend,)

    return _check(arguments, test)


def on_url(test: Callable[[Any, str], Coroutine[Any, Any, None]]) -> Callable[[Testbed, Path], None]:
    """Decorate a test that opens its backends itself."""

    @asynccontextmanager
    async def arguments(_bed: Testbed, url: str) -> AsyncIterator[tuple[str]]:
        yield (url,)

    return _check(arguments, test)


def on_two_backends(
    **options: Any,
) -> Callable[[Callable[[Any, Any, Any], Coroutine[Any, Any, None]]], Callable[[Testbed, Path], None]]:
    """Decorate a test of two callers that have a backend each, made with these options."""

    @asynccontextmanager
    async def arguments(bed: Testbed, url: str) -> AsyncIterator[tuple[Backend, Backend]]:
        async with bed.opened(url, **options) as backend, bed.second(url, backend, **options) as other:
            yield backend, other

    return lambda test: _check(arguments, test)
