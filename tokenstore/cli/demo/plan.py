"""What the demo's processes agree on: the plan, the messages between them, and the results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, NamedTuple

from tokenstore.keyring import Keyring
from tokenstore.store import AuthTokenStore, open_store

__all__ = [
    "OWN_OPTIONS",
    "PROVIDER",
    "TITLES",
    "USER",
    "USERS",
    "DemoReport",
    "Mode",
    "Plan",
    "Role",
    "Round",
    "TaskResult",
    "WorkerFailure",
]

PROVIDER: Final = "strict"
"""The provider of every row."""

USERS: Final = 300
"""How many rows the table has."""

USER: Final = "user-137"
"""The user whose token has expired."""

OWN_OPTIONS: Final = frozenset({"table", "pool_size", "lock_timeout"})
"""Options that the demo sets itself."""

_LOCK_TIMEOUT: Final = 30.0
# For each process. The connections of all processes stay far below a server's usual limit of 100.
_POOL_SIZE: Final = 4

Role = Literal["refreshed", "waited"]
"""How a task got its token: by its own call of the provider, or from another task's call."""

Mode = Literal["fresh", "row_lock", "neither"]
"""The three rounds."""

TITLES: Final[Mapping[Mode, str]] = {
    "fresh": "load_fresh_tokens",
    "row_lock": "Row lock",
    "neither": "Neither",
}
"""The heading of each round."""


@dataclass(frozen=True, slots=True)
class Round:
    """What happened while all tasks needed the expired token of one user at the same moment.

    Attributes:
        requests: Calls of the provider's token endpoint.
        refreshes: Those that issued new tokens.
        reuses: Those that sent a refresh token that had been used already.
        grant_alive: Whether the provider accepts the stored access token and has not revoked the grant.
        refreshed: Tasks that got new tokens from the provider by their own call.
        waited: Tasks that got new tokens from another task's call.
        working: Tasks whose access token the provider accepted after the round.
        errors: The errors of the other tasks, and how many tasks had each of them.
        connections: Connections to the database that all processes together held while the provider was answering;
            None if no task called it.
        wait_p50: The median time until a waiting task had its token, in seconds.
        wait_max: The longest of these times, in seconds.
    """

    requests: int
    refreshes: int
    reuses: int
    grant_alive: bool
    refreshed: int
    waited: int
    working: int
    errors: Mapping[str, int]
    connections: int | None
    wait_p50: float | None
    wait_max: float | None


@dataclass(frozen=True, slots=True)
class DemoReport:
    """The three rounds, on one database."""

    database: str
    processes: int
    tasks: int
    users: int
    latency: float
    seconds: float
    fresh: Round
    row_lock: Round
    neither: Round

    @property
    def passed(self) -> bool:
        """Whether the lease and the lock worked: one call, no reuse, no error, and a working token for each task."""
        return all(
            (found.requests, found.refreshes, found.reuses, found.working) == (1, 1, 0, self.processes * self.tasks)
            and found.grant_alive
            and not found.errors
            for found in (self.fresh, self.row_lock)
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True, slots=True)
class Plan:
    """What a worker process has to know. It is sent through a pipe, so that ``ps`` does not show the key or URL."""

    url: str
    table: str
    key: str
    base_url: str
    token_url: str
    client_id: str
    client_secret: str
    tasks: int

    @property
    def database(self) -> str:
        """The kind of database, such as ``sqlite``."""
        return self.url.partition(":")[0].partition("+")[0]

    def open_store(self) -> AuthTokenStore:
        """Open a store on the demo's table."""
        options: dict[str, Any] = {"table": self.table, "pool_size": _POOL_SIZE, "lock_timeout": _LOCK_TIMEOUT}
        return open_store(self.url, keyring=Keyring.from_string(self.key), **options)


class TaskResult(NamedTuple):
    """How one task ended, and after how many seconds."""

    role: Role | Literal["failed"]
    seconds: float
    error: str = ""


class WorkerFailure(NamedTuple):
    """Why a worker process ended early."""

    message: str
