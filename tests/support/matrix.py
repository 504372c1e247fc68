"""The table of backends on which the tests run.

A row of this table makes URLs. A server starts when the first URL on it is made. ``conftest.py`` deselects the tests of
a row whose server cannot be installed, and names the row in the summary.
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
        name: The row's name in test ids and in the summary.
        mark: The pytest marker that selects it.
        shared: Whether several processes, and several backend objects in one, can open the same data.
        why_absent: Returns why the row cannot run on this machine; empty if it can. May start a server.
    """

    name: str
    mark: str
    shared: bool
    _url: Callable[[Path], str] = field(repr=False)
    why_absent: Callable[[], str] = field(default=_always, repr=False)

    def url_for(self, directory: Path) -> str:
        """Return a URL of a new table or file, which does not exist until ``setup()`` is called."""
        return self._url(directory)


def _memory(directory: Path) -> str:
    return "memory://"


def _sqlite(directory: Path) -> str:
    return f"sqlite:///{directory.absolute() / f't_{token_hex(8)}.db'}"


def _on(server: Callable[[], servers.Server | None], driver: str) -> Callable[[Path], str]:
    def url(directory: Path) -> str:
        running = server()
        assert running is not None, "this row's server cannot run here: check why_absent() first"
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
    """Return the row with this name."""
    [row] = [row for row in ROWS if row.name == name]
    return row


def params(*, shared: bool | None = None, names: Collection[str] | None = None) -> list[object]:
    """The rows as pytest parameters, each with its marker; ``shared`` and ``names`` select."""
    chosen = [row for row in ROWS if shared in (None, row.shared) and (names is None or row.name in names)]
    return [pytest.param(row, id=row.name, marks=getattr(pytest.mark, row.mark)) for row in chosen]


every_row = pytest.mark.parametrize("row", params())
"""Run a test that has the parameter ``row`` on each backend and driver."""

shared_rows = pytest.mark.parametrize("row", params(shared=True))
"""The same, only on backends whose data several processes can open."""

server_rows = pytest.mark.parametrize(
    "row", params(names=[row.name for row in ROWS if row.mark in ("postgres", "mysql")])
)
"""The same, only on database servers, with every driver."""

each_database = pytest.mark.parametrize("row", params(names=["sqlite", "postgresql+asyncpg", "mariadb+asyncmy"]))
"""The same, on each database with one driver."""

each_server = pytest.mark.parametrize("row", params(names=["postgresql+asyncpg", "mariadb+asyncmy"]))
"""The same, on each database server with one driver."""

sqlite_row = pytest.mark.parametrize("row", params(names=["sqlite"]))
"""The same, only on SQLite."""

postgres_rows = pytest.mark.parametrize("row", params(names=[row.name for row in ROWS if row.mark == "postgres"]))
"""The same, only on PostgreSQL, with every driver."""

mysql_rows = pytest.mark.parametrize("row", params(names=[row.name for row in ROWS if row.mark == "mysql"]))
"""The same, only on MySQL and MariaDB, with every driver."""
