"""Runs generated programs on stores of one database until one fails, and then searches for a smaller one that fails."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Container, Sequence
from typing import NamedTuple, Self

from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky

from support.generated_programs import AFTER, BEFORE, Program, ProgramRun, Unexpected, stores_over
from tokenstore.protocol import Backend
from tokenstore.testing.history import NotLinearizable, check_history


class ProgramRunner:
    """Three stores on one database, and an event loop to run programs on them. Use it as a context manager.

    Args:
        backends: Backend objects with the same data, which the stores use in turn.
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
        """Run a program on new rows, and check its history.

        Raises:
            NotLinearizable: The history shows a race.
            Unexpected: A step raised an unexpected error.
        """
        self._runner.run(self._run(program))

    async def _run(self, program: Program) -> None:
        run = ProgramRun(self._stores, f"u{next(self._numbers)}.", itertools.count().__next__)
        await run.execute(BEFORE, "first")
        await run.execute(program)
        await run.execute(AFTER, "last")
        check_history(run.history)


class Finding(NamedTuple):
    """The result of a search.

    Attributes:
        violation: How the smallest failing program failed.
        program: That program.
        examples: After how many programs the first one failed.
    """

    violation: NotLinearizable | Unexpected
    program: Program
    examples: int


class _StopSearch(BaseException):
    """Ends a search. Not an `Exception`, so that Hypothesis does not take it for a failure."""


def search(
    run: Callable[[Program], None],
    strategy: st.SearchStrategy[Program],
    *,
    examples: int,
    shrinks: int = 0,
    kinds: Container[str] | None = None,
) -> Finding | None:
    """Run generated programs until one fails, and then search for a smaller one that fails.

    Hypothesis treats a failure that it cannot reproduce as an error in the test. A race often cannot be reproduced, so
    this function keeps the smallest failure itself.

    Args:
        run: Runs and checks one program.
        strategy: Generates the programs.
        examples: How many programs to try.
        shrinks: How many more programs to try after the first failure; 0: none, and the programs are always the same.
        kinds: The kinds of violation to search for; others are ignored. None: all kinds.
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
            raise _StopSearch
        try:
            run(program)
        except (NotLinearizable, Unexpected) as violation:
            if kinds is not None and violation.kind not in kinds:
                return
            first = tried if found is None else found.examples
            if found is None or _size(program) <= _size(found.program):
                found = Finding(violation, program, first)
            if not shrinks:
                raise _StopSearch from None
            raise

    try:
        attempt()
    except (NotLinearizable, Unexpected, Flaky, _StopSearch):
        assert found is not None
        steps = "\n".join(f"{chr(ord('a') + index)}: {steps}" for index, steps in enumerate(found.program))
        found.violation.add_note(f"program {found.examples} failed first; this is the smallest failing one:\n{steps}")
    return found


def _size(program: Program) -> tuple[int, int]:
    return sum(map(len, program)), len(repr(program))
