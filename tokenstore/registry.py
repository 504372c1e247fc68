"""From a URL, an engine or a session to the backend that serves it.

The table of built-in backends is the only place where the core names a backend. It comes before the entry points of the
group ``tokenstore.backends`` (name: the URL's scheme; value: ``module:Class``, see
:class:`tokenstore.protocol.BackendFactory`), so that an installed package cannot replace the backend of a scheme.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, cast

from tokenstore.errors import ConfigurationError, UnknownBackendError
from tokenstore.protocol import Backend, BackendFactory, BorrowedSession

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["ENTRY_POINT_GROUP", "backend_for_engine", "backend_for_session", "backend_for_url", "schemes"]

ENTRY_POINT_GROUP: Final = "tokenstore.backends"

_POSTGRES: Final = "tokenstore_sql.postgres.backend:PostgresBackend"
_MYSQL: Final = "tokenstore_sql.mysql.backend:MySQLBackend"
_BUILT_IN: Final[Mapping[str, str]] = {
    "memory": "tokenstore_memory:MemoryBackend",
    "sqlite": "tokenstore_sql.sqlite.backend:SQLiteBackend",
    "postgresql": _POSTGRES,
    "postgres": _POSTGRES,
    "mysql": _MYSQL,
    "mariadb": _MYSQL,
}
"""From a scheme, without the driver that may follow after a plus sign, to the backend that ships with tokenstore."""
_ENGINE: Final = "tokenstore_sql.databases:backend_for_engine"
_SESSION: Final = "tokenstore_sql.session:SessionBackend"


def schemes() -> list[str]:
    """The URL schemes that :func:`tokenstore.open_store` takes, sorted; a ``+driver`` may follow those of servers."""
    return sorted({*_BUILT_IN, *(point.name for point in _installed())})


def backend_for_url(url: str, options: Mapping[str, object]) -> Backend:
    """Make the backend that the URL's scheme names; nothing is connected yet.

    Raises:
        UnknownBackendError: No backend has this scheme.
        ConfigurationError: The URL or an option is not acceptable, or a driver is missing.
    """
    scheme, separator, _ = url.partition("://")
    if not separator or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme, re.ASCII):
        # The text is not shown, as it may contain a password.
        raise ConfigurationError(f"not a URL of the form scheme://…; known schemes: {', '.join(schemes())}")
    scheme = scheme.lower()
    if target := _BUILT_IN.get(scheme.partition("+")[0]):
        factory = _load(target)
    else:
        points = _installed(scheme)
        if not points:
            raise UnknownBackendError(f"no backend for {scheme}://; known schemes: {', '.join(schemes())}")
        if len({point.value for point in points}) > 1:
            owners = ", ".join(sorted(point.value for point in points))
            raise ConfigurationError(f"several installed packages claim {scheme}://: {owners}; uninstall all but one")
        factory = points[0].load()
    return cast(BackendFactory, factory).from_url(url, options)


def backend_for_engine(engine: object, options: Mapping[str, object]) -> Backend:
    """Wrap a SQLAlchemy ``AsyncEngine``, which the caller disposes of."""
    return cast(Backend, _load(_ENGINE)(engine, options))


def backend_for_session(session: object, options: Mapping[str, object]) -> BorrowedSession:
    """Wrap a borrowed SQLAlchemy ``AsyncSession``."""
    return cast(BorrowedSession, _load(_SESSION)(session, options))


def _installed(scheme: str | None = None) -> list[EntryPoint]:
    # Imported here: this takes half as long as importing the core, and a built-in scheme does not need it.
    from importlib.metadata import entry_points

    return [point for point in entry_points(group=ENTRY_POINT_GROUP) if scheme in (None, point.name)]


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)
