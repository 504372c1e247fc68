"""Services of libpq's connection service file, for asyncpg. psycopg has them from libpq itself."""

from __future__ import annotations

import configparser
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokenstore.errors import ConfigurationError

__all__ = ["service_of"]


def service_of(options: Mapping[str, Any]) -> dict[str, str]:
    """The part of asyncpg's DSN that names a service; empty if neither the option nor ``PGSERVICE`` names one.

    asyncpg does not see ``PGSERVICE``. For a service that its file lacks it would connect to this machine.

    Raises:
        ConfigurationError: The service is not in the file that asyncpg reads.
    """
    service = options.get("service") or os.environ.get("PGSERVICE")
    if not service:
        return {}
    file = Path(os.environ.get("PGSERVICEFILE") or Path.home() / ".pg_service.conf")
    found = configparser.ConfigParser(interpolation=None, strict=False)
    # The error is raised below, without the parser's exception, which shows a line of the file.
    with suppress(configparser.Error, OSError, UnicodeDecodeError):
        _ = found.read(file)
    if service not in found:
        raise ConfigurationError(
            f"the service {service} is not in {file}, or the file cannot be read; PGSERVICEFILE names another file. "
            "postgresql+psycopg:// also reads the system's file"
        )
    return {"service": service}
