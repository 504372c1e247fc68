"""Several hosts, of which a connection goes to the first that answers and serves.

psycopg tries each host by itself. asyncpg has one timeout for all of them, so a host that accepts connections and never
answers would keep it from the next one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final

from tokenstore_sql.connections.hosts import Host, Hosts, host_of, parts_of

__all__ = ["asyncpg_creator", "hosts_of"]

_log: Final = logging.getLogger("tokenstore.sql.postgres")

_PREFER_STANDBY: Final = "prefer-standby"


def hosts_of(text: str, port: int | None) -> list[Host]:
    """The hosts of the option ``host``: ``first:5432,second:5433``. The folder of a Unix socket is a host, too.

    Args:
        text: The option.
        port: The port of a host that names none.

    Raises:
        ConfigurationError: A part is no host.
    """
    return [
        Host(part, port) if part.startswith("/") else host_of(part, port, ", or the folder of a Unix socket")
        for part in parts_of(text)
    ]


def asyncpg_creator(hosts: Sequence[Host], options: Mapping[str, Any]) -> Callable[..., Coroutine[Any, Any, Any]]:
    """What opens a connection of asyncpg to one of several hosts. Its timeout is that of each host.

    Args:
        hosts: The hosts, in the order in which they are tried first.
        options: The store's options.
    """
    known = Hosts(hosts)

    async def connect(**arguments: Any) -> Any:
        import asyncpg

        left = known.in_order()
        failure: Exception = OSError("there is no host")
        wanted = options.get("target_session_attrs") or os.environ.get("PGTARGETSESSIONATTRS")
        # A preference is a first pass that insists, and a second one over the hosts that answered.
        for attributes in ("standby", "any") if wanted == _PREFER_STANDBY else (wanted,):
            for host in left[:]:
                here = {**arguments, "host": host.name, "port": host.port, "target_session_attrs": attributes}
                try:
                    return await asyncpg.connect(**here)
                except asyncpg.TargetServerAttributeNotMatched as error:
                    failure = error
                except (OSError, asyncpg.CannotConnectNowError, asyncpg.ConnectionDoesNotExistError) as error:
                    _log.info("host %s does not serve: %s", host.name, type(error).__name__)
                    left.remove(host)
                    known.put_last(host)
                    failure = error
        raise failure

    return connect
