"""Several hosts, of which a connection goes to the first that answers and serves.

psycopg tries each host by itself. asyncpg has one timeout for all of them, so a host that accepts connections and never
answers would keep it from the next one.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final, NamedTuple

from tokenstore.errors import ConfigurationError

__all__ = ["Host", "asyncpg_creator", "hosts_of"]

_log: Final = logging.getLogger("tokenstore.sql.postgres")

# A name or IPv4 address, an IPv6 address in brackets, or the folder of a Unix socket; each may have a port.
_HOST: Final = re.compile(r"(?P<folder>/.*)|(?:\[(?P<ipv6>[^]]+)\]|(?P<name>[^:/\[\]]+))(?::(?P<port>[0-9]{1,5}))?")
_PREFER_STANDBY: Final = "prefer-standby"


class Host(NamedTuple):
    """Where a server is.

    Attributes:
        name: A name, an address, or the folder of a Unix socket.
        port: Its port; None: the driver's default.
    """

    name: str
    port: int | None


def hosts_of(text: str, port: int | None) -> list[Host]:
    """The hosts of the option ``host``: ``first:5432,second:5433``.

    Args:
        text: The option.
        port: The port of a host that names none.

    Raises:
        ConfigurationError: A part is no host.
    """
    hosts = []
    for part in text.split(","):
        if (found := _HOST.fullmatch(part.strip())) is None:
            raise ConfigurationError(
                f"host: {part!r} is no host; expected a name or an address, with a port or without, as in "
                "db1:5432,db2:5432 or [::1]:5432, or the folder of a Unix socket"
            )
        own_port = found["port"]
        hosts.append(Host(found["folder"] or found["ipv6"] or found["name"], int(own_port) if own_port else port))
    return hosts


def asyncpg_creator(hosts: Sequence[Host], options: Mapping[str, Any]) -> Callable[..., Coroutine[Any, Any, Any]]:
    """What opens a connection of asyncpg to one of several hosts. Its timeout is that of each host.

    Args:
        hosts: The hosts, in the order in which they are tried.
        options: The store's options.
    """

    async def connect(**arguments: Any) -> Any:
        import asyncpg

        left = list(hosts)
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
                    failure = error
        raise failure

    return connect
