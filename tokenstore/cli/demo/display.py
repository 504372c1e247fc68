"""What the demo prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Self

from tokenstore.cli.demo.plan import TITLES, USERS, DemoReport, Plan, Round, TaskResult

__all__ = ["Display"]


class Display:
    """Prints the demo to standard output: progress bars on a terminal, lines elsewhere, nothing if ``quiet``."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._total = total
        self._console = Console(quiet=quiet, highlight=False)
        self._live = self._console.is_terminal and not quiet
        # Without a terminal, rich would break lines at 80 columns.
        self._console.soft_wrap = not self._live
        note = TextColumn("{task.fields[note]}")
        columns = (TextColumn("{task.description}"), BarColumn(12), MofNCompleteColumn(), note)
        self._progress = Progress(*columns, console=self._console, disable=not self._live)

    def introduce(self, plan: Plan, processes: int, tasks: int, latency: float) -> None:
        """Print what the demo is about to do."""
        self._console.print(
            f"[bold]{processes} processes with {tasks} tasks each want one expired token at the same moment.[/]\n"
            f"The store: {plan.database}, {USERS} users, in a new table that is dropped at the end.\n"
            f"The provider: on the loopback interface, answers in {latency:g} s, issues a new refresh token each time\n"
            "and revokes the user's grant if a refresh token is used twice.\n"
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()

    def begin(self, title: str) -> None:
        """Begin a round."""
        self._title = f"{title:{max(map(len, TITLES.values()))}}"
        self._roles: Counter[str] = Counter()
        self._by = 0
        self._bar = self._progress.add_task(self._title, total=self._total, note="")

    def advance(self, number: int, outcome: TaskResult) -> None:
        """Show the result of one task of a worker process."""
        self._roles[outcome.role] += 1
        if outcome.role == "refreshed":
            self._by = number + 1
        self._progress.update(self._bar, advance=1, note=self._note())

    def end(self) -> None:
        """End a round."""
        if not self._live:
            self._console.print(f"{self._title}  {self._note()}")

    def _note(self) -> str:
        refreshed = self._roles["refreshed"]
        notes = [f"process {self._by} refreshed" if refreshed == 1 else f"{refreshed} refreshed"]
        notes += [f"{self._roles[role]} {role}" for role in ("waited", "failed") if self._roles[role]]
        return ", ".join(notes)

    def conclude(self, report: DemoReport) -> None:
        """Print the table of all rounds."""
        from rich import box
        from rich.table import Table

        rounds = dict(zip(TITLES.values(), (report.fresh, report.row_lock, report.neither), strict=True))
        table = Table("", box=box.SIMPLE_HEAD, pad_edge=False)
        for title, found in rounds.items():
            table.add_column(title, header_style="bold", style="green" if found.working == self._total else "red")

        def row(label: str, cell: Callable[[Round], str]) -> None:
            table.add_row(label, *map(cell, rounds.values()))

        row("Calls of the provider", lambda found: str(found.requests))
        row("  that got new tokens", lambda found: str(found.refreshes))
        row("  with a used refresh token", lambda found: str(found.reuses))
        row("Connections held meanwhile", lambda found: _or_dash(found.connections))
        row("Median wait", lambda found: _or_dash(found.wait_p50, ".1f", " s"))
        row("Longest wait", lambda found: _or_dash(found.wait_max, ".1f", " s"))
        row("Tasks with an error", lambda found: str(sum(found.errors.values())))
        row("Tasks with a working token", lambda found: f"{found.working} of {self._total}")
        row("The user's grant", lambda found: "alive" if found.grant_alive else "revoked")
        self._console.print(table)
        for title, found in rounds.items():
            for error, count in found.errors.items():
                self._console.print(f"{title}, {count} times: {error}", markup=False)
        verdict = (
            "[green]Lease and lock held:[/] one refresh served every task"
            if report.passed
            else "[red]Lease or lock did not hold:[/] please report this with the output of `tokenstore demo --json`"
        )
        self._console.print(f"{verdict} ({report.seconds:.0f} s).")


def _or_dash(number: float | None, form: str = "", unit: str = "") -> str:
    return "-" if number is None else f"{number:{form}}{unit}"
