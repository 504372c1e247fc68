"""From an entry of Django's setting ``DATABASES`` to the URL of the same database."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote, urlencode

from tokenstore.errors import ConfigurationError
from tokenstore.tracebacks import clears_locals

__all__ = ["database_url"]

_SCHEMES: Final = {"postgresql": "postgresql+psycopg", "postgis": "postgresql+psycopg", "mysql": "mysql"}
# Options that the store has under the same name, and with the same meaning.
_SAME: Final = {
    "postgresql+psycopg": frozenset(
        {
            "application_name",
            "channel_binding",
            "connect_timeout",
            "passfile",
            "sslcert",
            "sslcrl",
            "sslkey",
            "sslmode",
            "sslrootcert",
            "target_session_attrs",
        }
    ),
    "mysql": frozenset({"charset", "connect_timeout", "unix_socket"}),
}
# Options of Django's own connections, which say nothing about where the database is and how to get there.
_OF_DJANGO: Final = {
    "postgresql+psycopg": frozenset({"client_encoding", "isolation_level", "pool", "server_side_binding"}),
    "mysql": frozenset({"init_command", "isolation_level", "sql_mode"}),
}
_TLS_FILES: Final = {"ca": "ssl_ca", "cert": "ssl_cert", "key": "ssl_key"}


@clears_locals
def database_url(database: Mapping[str, Any]) -> str:
    """Make the URL of a database of Django, for the setting ``TOKENSTORE``.

    ``"URL": database_url(DATABASES["default"])`` takes the application's database. The store has connections of its
    own: it takes no part in transactions of Django, and the tests of Django's test runner need another ``TOKENSTORE``.

    Args:
        database: An entry of ``DATABASES`` with Django's own backend for PostgreSQL, PostGIS, MySQL or SQLite. On
            PostgreSQL the URL is for psycopg, which Django uses as well.

    Raises:
        ConfigurationError: The backend is another one, or an option is not known here. Write the URL yourself then.
    """
    kind = str(database.get("ENGINE", "")).rpartition(".")[2]
    name = str(database.get("NAME") or "")
    if not name or "?" in name:
        raise ConfigurationError("no URL can be made for a database without NAME, or with a question mark in it")
    if kind == "sqlite3" and name != ":memory:" and not name.startswith("file:"):
        return f"sqlite:///{name}"
    scheme = _SCHEMES.get(kind)
    if scheme is None:
        raise ConfigurationError(f"no URL can be made for the ENGINE {kind} with this NAME: write the URL yourself")
    query = _query(scheme, database.get("OPTIONS") or {})
    host, port = str(database.get("HOST") or ""), str(database.get("PORT") or "")
    if host.startswith("/"):  # a Unix socket: its folder on PostgreSQL, its file on MySQL
        query["unix_socket" if scheme == "mysql" else "host"] = host
        host = ""
    user, password = (quote(str(database.get(part) or ""), safe="") for part in ("USER", "PASSWORD"))
    login = f"{user}:{password}@" if password else f"{user}@" if user else ""
    place = f"[{host}]" if ":" in host else host
    return f"{scheme}://{login}{place}{port and ':' + port}/{name}{'?' + urlencode(query) if query else ''}"


def _query(scheme: str, options: Mapping[str, Any]) -> dict[str, str]:
    query = {name: str(value) for name, value in options.items() if name in _SAME[scheme]}
    unknown = options.keys() - _SAME[scheme] - _OF_DJANGO[scheme]
    files = options.get("ssl")
    if scheme == "mysql" and isinstance(files, Mapping) and files.keys() <= _TLS_FILES.keys():
        unknown -= {"ssl"}
        query |= {_TLS_FILES[name]: str(path) for name, path in files.items()}
    if unknown:
        raise ConfigurationError(
            f"the OPTIONS {', '.join(sorted(unknown))} may decide where the database is, or how safe the way to it is, "
            "and cannot be translated: write the URL yourself"
        )
    return query
