"""Several hosts, such as the nodes of a Galera cluster, of which a connection goes to the first that serves."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

from tokenstore.errors import BackendUnavailableError
from tokenstore_sql.connections.hosts import Host, Hosts, host_of, parts_of
from tokenstore_sql.mysql.errors import READ_ONLY, MySQLErrors
from tokenstore_sql.mysql.opening import Opener

__all__ = ["HostsOpener", "hosts_of"]

_log: Final = logging.getLogger("tokenstore.sql.mysql")

_ERRORS: Final = MySQLErrors()


def hosts_of(text: str, port: int | None) -> list[Host]:
    """The hosts of the option ``host``: ``first:3306,second:3307``.

    Args:
        text: The option.
        port: The port of a host that names none.

    Raises:
        ConfigurationError: A part is no host.
    """
    return [host_of(part, port) for part in parts_of(text)]


class HostsOpener:
    """Opens a connection to the first host that serves. The connect timeout is that of each host.

    A server that accepts no writes, such as a replica, is used only if no other host serves.

    Args:
        hosts: The hosts, in the order in which they are tried first.
        opener: Opens a connection to one host.
    """

    def __init__(self, hosts: list[Host], opener: Opener) -> None:
        self._hosts = Hosts(hosts)
        self._opener = opener

    async def open(self, arguments: Mapping[str, Any]) -> Any:
        """Open a connection.

        Args:
            arguments: The driver's arguments, without those for the host and for TLS.

        Raises:
            Exception: The driver's error of the last host that was tried, or of a host that refuses the login.
        """
        failure: Exception = OSError("there is no host")
        read_only: list[Host] = []
        for host in self._hosts.in_order():
            try:
                return await self._open(host, arguments, must_serve_writes=True)
            except Exception as error:  # noqa: BLE001 - raised again, unless another host may serve
                failure = self._noted(host, error, failure)
                if _ERRORS.code(error) in READ_ONLY:
                    read_only.append(host)
        for host in read_only:
            try:
                return await self._open(host, arguments, must_serve_writes=False)
            except Exception as error:  # noqa: BLE001 - raised again, unless another host may serve
                failure = self._noted(host, error, failure)
        raise failure

    async def _open(self, host: Host, arguments: Mapping[str, Any], *, must_serve_writes: bool) -> Any:
        where = {"host": host.name} | ({} if host.port is None else {"port": host.port})
        return await self._opener.open({**arguments, **where}, must_serve_writes=must_serve_writes)

    def _noted(self, host: Host, error: Exception, before: Exception) -> Exception:
        """The failure of all hosts so far. Raises an error that would be the same at every host."""
        if not isinstance(error, OSError) and _ERRORS.classify(error)[0] is not BackendUnavailableError:
            raise error
        _log.info("host %s does not serve: %s", host.name, _ERRORS.code(error) or type(error).__name__)
        self._hosts.put_last(host)
        # A caller waits for a slot that becomes free, so that this failure counts more than others.
        return before if _ERRORS.has_no_free_slot(before) else error
