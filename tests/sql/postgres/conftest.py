"""Servers for single tests, in addition to the server that the tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support import servers
from support.postgres_servers import programs, start_postgres

StartPostgres = Callable[..., servers.Server]


@pytest.fixture(scope="session", name="start_postgres")
def _start_postgres() -> StartPostgres:
    """Starts another server; see `support.postgres_servers.start_postgres`."""
    programs()
    return start_postgres
