"""Opening SQLite's database file."""

from __future__ import annotations

import errno
import os
import secrets
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Final

from tokenstore.errors import UnsupportedOperationError

__all__ = ["BUSY_TIMEOUT_MS", "PRAGMAS", "ClosingConnection", "any_text", "create_private", "require_version"]

# How long SQLite itself may block a thread, in milliseconds. A cancelled task has to wait for that, so the time is
# short; longer waits are in asyncio.
BUSY_TIMEOUT_MS: Final = 100
# FULL: a power failure must not undo the commit of a rotated token. The -wal file grows while a reader keeps an old
# snapshot; the first commit after the next complete checkpoint cuts it to the limit, in bytes. Without such a reader it
# has about 4 MiB.
PRAGMAS: Final = ("journal_mode = WAL", "synchronous = FULL", f"journal_size_limit = {8 * 1024 * 1024}")
# STRICT tables came with 3.37, RETURNING with 3.35, UPSERT with 3.24.
_MIN_VERSION: Final = (3, 37, 0)


def require_version(version: tuple[int, ...]) -> None:
    """Refuse a SQLite library that lacks what the statements use.

    Raises:
        UnsupportedOperationError: It is too old.
    """
    if version < _MIN_VERSION:
        found, needed = (".".join(map(str, numbers)) for numbers in (version, _MIN_VERSION))
        raise UnsupportedOperationError(f"this Python has SQLite {found}; {needed} or later is needed")


class ClosingConnection(sqlite3.Connection):
    """A connection that rolls back before it is closed.

    A cursor that a cancelled task left behind keeps a closed connection alive inside SQLite, and its write lock with
    it, until the garbage collector finds the cursor.
    """

    def close(self) -> None:
        with suppress(sqlite3.Error):
            self.rollback()
        super().close()


def any_text(value: bytes) -> str:
    """The text in a column; a connection's ``text_factory``. Bytes that are not UTF-8 become surrogates.

    A user who can write to the file can put any bytes into a column. Those bytes must not end a query for several rows:
    no text of the core has surrogates, so the core refuses the one row.
    """
    return value.decode(errors="surrogateescape")


def create_private(path: Path) -> None:
    """Create the database file with mode 0600, atomically. A file that exists is left as it is.

    The file is opened and closed under another name, because closing any descriptor of a database file drops every lock
    that this process has on it.
    """
    # Of a symbolic link, the file that it leads to: SQLite would create that one with mode 0644.
    path = Path(os.path.realpath(path))
    if path.exists():
        return
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    try:
        with suppress(FileExistsError):
            os.link(draft, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        # A file system without hard links: here a second store may open the file between these two lines.
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    finally:
        draft.unlink(missing_ok=True)
