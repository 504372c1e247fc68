"""What the commands print: lines, JSON, tables and a progress bar."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from types import TracebackType
from typing import Any, Final, Self

import rich  # noqa: F401  # so that a missing extra is reported at once, and not in the middle of a command

from tokenstore.errors import TokenStoreError
from tokenstore.escaping import escaped

__all__ = [
    "Listing",
    "format_expiry",
    "format_time",
    "print_error",
    "print_json",
    "print_line",
    "print_table",
    "progress",
]

_ROWS_AT_ONCE: Final = 100


def print_line(text: str) -> None:
    """Print one line to standard output."""
    sys.stdout.write(f"{text}\n")


def print_error(message: str, *, prefix: str = "error: ") -> None:
    """Print one line to standard error. Control characters of the message are escaped."""
    sys.stderr.write(f"{prefix}{escaped(message)}\n")


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object on one line."""
    # json escapes everything but ASCII here, so that control characters of an id do not reach a terminal.
    print_line(json.dumps(value, default=lambda moment: moment.isoformat()))


def format_time(moment: datetime | None) -> str:
    """A time in UTC to the minute; None: "never"."""
    return "never" if moment is None else f"{moment:%Y-%m-%d %H:%M}Z"


def format_expiry(row: Mapping[str, Any]) -> str:
    """When the access token of a record or of a listed row expires."""
    return format_time(row["access_token_expires_at"]) if row["access_token_expiry_known"] else "unknown"


class Listing:
    """A table that is printed while its rows arrive, one line for each row, however many there are.

    Rows are printed in small groups. A column is as wide as its widest cell so far.

    Args:
        columns: The headings.
    """

    def __init__(self, *columns: str) -> None:
        self._columns = columns
        self._widths = [0] * len(columns)
        self._waiting: list[Sequence[str]] = []
        self.rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, TokenStoreError):
            self._print()

    def add(self, cells: Iterable[str]) -> None:
        """Print a row, or keep it until the next rows have arrived."""
        if not self.rows:
            self._waiting.append(self._columns)
        self.rows += 1
        self._waiting.append([escaped(cell) for cell in cells])
        if len(self._waiting) > _ROWS_AT_ONCE:
            self._print()

    def _print(self) -> None:
        from rich.cells import cell_len

        sizes = [[cell_len(cell) for cell in row] for row in self._waiting]
        self._widths = [max(column) for column in zip(self._widths, *sizes, strict=True)]
        for row, lengths in zip(self._waiting, sizes, strict=True):
            padded = (
                cell + " " * (width - length + 3)
                for cell, length, width in zip(row, lengths, self._widths, strict=True)
            )
            print_line("".join(padded).rstrip(" "))
        self._waiting.clear()


def print_table(rows: Iterable[tuple[str, str]]) -> None:
    """Print the names of some values, and the values."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    class RaisingConsole(Console):
        """A console that leaves a closed pipe to :mod:`tokenstore.cli.app`."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 3, 0, 0))
    table.add_column(style="dim")
    for row in rows:
        table.add_row(*(Text(escaped(cell), overflow="fold") for cell in row))
    # A program that reads the output needs one line for each row, however long it is.
    RaisingConsole(width=None if sys.stdout.isatty() else 4000).print(table)


@contextmanager
def progress(total: int) -> Iterator[Callable[[], None]]:
    """Show a progress bar on standard error, if that is a terminal; the function that it yields advances the bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)
