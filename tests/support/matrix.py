"""The one table of backends: what tests, races and benchmarks run on.

A row makes URLs; servers start when the first URL on them is asked for. ``conftest.py`` leaves the tests of a row out
whose server cannot be had, and says so in the summary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex

import pytest

from support import servers


def _always() -> str:
    return ""


@dataclass(frozen=True)
class Row:
    """One backend with one driver.

    Attributes:
        name: What the tests' ids and the summary call it.
        mark: The pytest marker that selects it.
        shared: Whether several processes, and several backend objects in one, can open the same data.
        why_absent: Why the row cannot be run on this machine; empty if it can. May start a server.
    """

    name: str
    mark: str
    shared: bool
    _url: Callable[[Path], str] = field(repr=False)
    why_absent: Callable[[], str] = field(default=_always, repr=False)

    def url_for(self, directory: Path) -> str:
        """A URL whose table or file is new and empty at each call; nothing is set up yet."""
        return self._url(directory)


def _memory(directory: Path) -> str:
    return "memory://"


def _sqlite(directory: Path) -> str:
    return f"sqlite:///{directory.absolute() / f't_{token_hex(8)}.db'}"


def _on(server: Callable[[], servers.Server | None], driver: str) -> Callable[[Path], str]:
    def url(directory: Path) -> str:
        running = server()
        assert running is not None, "a row that is absent was asked for its URL"
        return f"{running.url(driver)}?table=t_{token_hex(8)}"

    return url


ROWS = [
    Row("memory", "memory", False, _memory),
    Row("sqlite", "sqlite", True, _sqlite),
    Row("postgresql+asyncpg", "postgres", True, _on(servers.postgres, "asyncpg")),
    Row("postgresql+psycopg", "postgres", True, _on(servers.postgres, "psycopg")),
    Row("mariadb+aiomysql", "mysql", True, _on(servers.mariadb, "aiomysql")),
    Row("mariadb+asyncmy", "mysql", True, _on(servers.mariadb, "asyncmy")),
    Row("mysql9+asyncmy", "mysql", True, _on(servers.mysql, "asyncmy"), servers.why_no_mysql),
]


def row_named(name: str) -> Row:
    """The row of that name."""
    [row] = [row for row in ROWS if row.name == name]
    return row


def params(*, shared: bool | None = None, names: Collection[str] | None = None) -> list[object]:
    """The rows as pytest parameters, each with its marker; ``shared`` and ``names`` select."""
    chosen = [row for row in ROWS if shared in (None, row.shared) and (names is None or row.name in names)]
    return [pytest.param(row, id=row.name, marks=getattr(pytest.mark, row.mark)) for row in chosen]


every_row = pytest.mark.parametrize("row", params())
"""For a test that takes ``row``: run it on each backend."""

shared_rows = pytest.mark.parametrize("row", params(shared=True))
"""The same, on backends whose data several processes can open."""

server_rows = pytest.mark.parametrize(
    "row", params(names=[row.name for row in ROWS if row.mark in ("postgres", "mysql")])
)
"""The same, on every driver of every server."""

each_database = pytest.mark.parametrize("row", params(names=["sqlite", "postgresql+asyncpg", "mariadb+asyncmy"]))
"""The same, on one row of each database."""

each_server = pytest.mark.parametrize("row", params(names=["postgresql+asyncpg", "mariadb+asyncmy"]))
"""The same, on one row of each server."""

sqlite_row = pytest.mark.parametrize("row", params(names=["sqlite"]))
"""The same, on SQLite."""

postgres_rows = pytest.mark.parametrize("row", params(names=[row.name for row in ROWS if row.mark == "postgres"]))
"""The same, on every driver of PostgreSQL."""

mysql_rows = pytest.mark.parametrize("row", params(names=[row.name for row in ROWS if row.mark == "mysql"]))
"""The same, on every driver of MySQL and MariaDB."""
