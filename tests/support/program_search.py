"""Runs generated programs on the stores of one database until one fails, and then smaller ones."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Container, Sequence
from typing import NamedTuple, Self

from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky

from support.generated_programs import AFTER, BEFORE, Program, Stage, Unexpected, stores_over
from tokenstore.protocol import Backend
from tokenstore.testing.history import NotLinearizable, check_history


class Lab:
    """Stores over some backends of one database, and a loop to run programs on them; a context manager.

    Args:
        backends: Objects over the same data; there are three stores, which take them in turn.
    """

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._stores = stores_over(backends)
        self._runner = asyncio.Runner()
        self._numbers = itertools.count()

    def __enter__(self) -> Self:
        self._runner.run(self._stores[0].tokens.setup())
        return self

    def __exit__(self, *exc_info: object) -> None:
        async def close() -> None:
            for store in self._stores:
                await store.tokens.aclose()

        with self._runner:
            self._runner.run(close())

    def run(self, program: Program) -> None:
        """Run a program on fresh rows and check what happened.

        Raises:
            NotLinearizable: A race showed.
            Unexpected: A step raised what it should not.
        """
        self._runner.run(self._run(program))

    async def _run(self, program: Program) -> None:
        stage = Stage(self._stores, f"u{next(self._numbers)}.", itertools.count().__next__)
        await stage.play(BEFORE, "first")
        await stage.play(program)
        await stage.play(AFTER, "last")
        check_history(stage.history)


class Finding(NamedTuple):
    """What a search found: how the smallest program failed, and after how many programs the first one did."""

    violation: NotLinearizable | Unexpected
    program: Program
    examples: int


class _Enough(BaseException):
    """Ends a search; not an `Exception`, so that Hypothesis lets it pass."""


def search(
    run: Callable[[Program], None],
    strategy: st.SearchStrategy[Program],
    *,
    examples: int,
    shrinks: int = 0,
    kinds: Container[str] | None = None,
) -> Finding | None:
    """Run generated programs until one fails, and then smaller ones.

    Hypothesis takes a failure that does not come again for a mistake in the test. Races are like that, so the smallest
    failure is kept here.

    Args:
        run: Runs and checks one program.
        strategy: Where programs come from.
        examples: How many programs to try.
        shrinks: How many more to try once one has failed; 0: none, and the same programs every time.
        kinds: Which violations to look for; others are passed over. None: all.
    """
    found: Finding | None = None
    tried = 0

    @settings(
        max_examples=examples,
        derandomize=not shrinks,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        verbosity=Verbosity.quiet,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    @given(strategy)
    def attempt(program: Program) -> None:
        nonlocal found, tried
        tried += 1
        if found is not None and tried > found.examples + shrinks:
            raise _Enough
        try:
            run(program)
        except (NotLinearizable, Unexpected) as violation:
            if kinds is not None and violation.kind not in kinds:
                return
            first = tried if found is None else found.examples
            if found is None or _size(program) <= _size(found.program):
                found = Finding(violation, program, first)
            if not shrinks:
                raise _Enough from None
            raise

    try:
        attempt()
    except (NotLinearizable, Unexpected, Flaky, _Enough):
        assert found is not None
        steps = "\n".join(f"{chr(ord('a') + index)}: {steps}" for index, steps in enumerate(found.program))
        found.violation.add_note(f"program {found.examples} was the first to fail, and this is the smallest:\n{steps}")
    return found


def _size(program: Program) -> tuple[int, int]:
    return sum(map(len, program)), len(repr(program))
