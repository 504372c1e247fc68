"""Several hosts of one database, of which a connection goes to the first that serves."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

from tokenstore.errors import ConfigurationError

__all__ = ["Host", "Hosts", "host_of", "parts_of", "split_url"]

# A name or an IPv4 address, or an IPv6 address in brackets; each may have a port.
_HOST: Final = re.compile(r"(?:\[(?P<ipv6>[^]]+)\]|(?P<name>[^:/\[\]]+))(?::(?P<port>[0-9]{1,5}))?")
# A URL around its hosts. SQLAlchemy takes URLs apart in the same way, but knows one host only.
_URL: Final = re.compile(r"(?P<before>[^:/?]+://(?:[^:/]*(?::[^@]*)?@)?)(?P<hosts>[^/?]*)(?P<after>.*)", re.DOTALL)


class Host(NamedTuple):
    """Where a server is.

    Attributes:
        name: A name, or an address.
        port: Its port; None: the driver's default.
    """

    name: str
    port: int | None


class Hosts:
    """Hosts in the order in which they are tried: a host that failed comes last, until others have failed, too.

    So a connection is opened at the host that served last. Most connections of a pool then lead to one host, and a host
    that does not answer costs its time-out once, not with each new connection.

    Args:
        hosts: The hosts, in the order in which they are tried first.
    """

    def __init__(self, hosts: Iterable[Host]) -> None:
        self._hosts = list(hosts)

    def in_order(self) -> list[Host]:
        """The hosts, in the order in which to try them now."""
        return self._hosts[:]

    def put_last(self, host: Host) -> None:
        """Try the other hosts first from now on."""
        self._hosts.remove(host)
        self._hosts.append(host)


def split_url(url: str) -> tuple[str, str | None]:
    """Take several hosts out of a URL: ``mysql://user@first:3306,second/database``.

    Returns:
        The URL without its hosts, and the hosts; the URL as it is and None if it names one host, or none.
    """
    found = _URL.fullmatch(url)
    if found is None or "," not in found["hosts"]:
        return url, None
    return found["before"] + found["after"], found["hosts"]


def parts_of(text: str) -> list[str]:
    """The hosts of a list that are separated by commas."""
    return [part.strip() for part in text.split(",")]


def host_of(part: str, port: int | None, also: str = "") -> Host:
    """One host: a name, or an address, with a port or without.

    Args:
        part: The host as it was written.
        port: The port of a host that names none.
        also: The other forms that a host can have, for the error.

    Raises:
        ConfigurationError: It is no host.
    """
    found = _HOST.fullmatch(part)
    own_port = None if found is None or found["port"] is None else int(found["port"])
    if found is None or not (own_port is None or 0 < own_port < 2**16):
        raise ConfigurationError(
            f"host: {part!r} is no host; expected a name or an address, with a port or without, as in "
            f"db1:5432,db2:5432 or [::1]:5432{also}"
        )
    return Host(found["ipv6"] or found["name"], port if own_port is None else own_port)
