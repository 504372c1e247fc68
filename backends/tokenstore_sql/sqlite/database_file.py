"""The database file of a store, which can be moved, deleted or replaced while the store has it open."""

from __future__ import annotations

import os
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tokenstore.errors import BackendError, BackendUnavailableError, ConfigurationError, TableMissingError
from tokenstore_sql.sqlite.files import create_private

__all__ = ["DatabaseFile", "FileId", "FileMovedError"]


class FileId(NamedTuple):
    """Which file is at a path, whatever its content."""

    device: int
    inode: int


class FileMovedError(sqlite3.OperationalError):
    """A connection's file is no longer at its path: what was written to it is lost with it."""

    sqlite_errorname = "SQLITE_READONLY_DBMOVED"  # SQLite's own name for this


class DatabaseFile:
    """The database file of one store.

    A connection keeps the file that it has opened, wherever that file goes. If a backup is put in its place, or the
    file is deleted, the connection would go on to read and write a file that nothing else can see.

    The write-ahead log, the ``-wal`` file, holds commits that are not in the database file yet. SQLite cannot tell
    whether the two belong together: opened beside the log of another file, a database is damaged.

    Args:
        path: The file, as an absolute path.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._name = str(path)
        # The file that was opened last, and its log.
        self._opened: FileId | None = None
        self._log: FileId | None = None

    @property
    def uri(self) -> str:
        """The URI that SQLite opens. SQLite creates no file that is missing."""
        return f"{self.path.as_uri()}?mode=rw"

    @property
    def log_path(self) -> Path:
        """The write-ahead log, which lies beside the file itself if the path is a symbolic link."""
        return Path(f"{os.path.realpath(self.path)}-wal")

    def is_at_path(self, opened: FileId) -> bool:
        """Whether a file that was opened is still the one at the path."""
        try:
            # Not by way of Path and FileId, which take longer than the question: each call of a store asks it.
            status = os.stat(self._name)  # noqa: PTH116
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == opened

    def create(self) -> None:
        """Create the file if it is missing.

        Raises:
            ConfigurationError: Its folder does not exist.
            BackendError: There is no such file, and yet its write-ahead log, which SQLite would delete.
        """
        # The log first: another process that creates the database creates the log last.
        if _size_of(self.log_path) and not self.path.exists():
            raise BackendError(
                f"the database file {self.path} was moved or deleted without its write-ahead log, "
                f"{self.log_path.name}, which may hold the last commits: stop every process that uses it, then put the "
                f"file back beside the log, or delete the log and {self.path.name}-shm"
            )
        if not self.path.parent.is_dir():
            raise ConfigurationError(
                f"the folder {self.path.parent} does not exist: create it, or correct the path in the database's URL"
            )
        create_private(self.path)

    def before_opening(self) -> FileId:
        """Say which file is about to be opened.

        Raises:
            TableMissingError: There is no file, and this store has never opened one.
            BackendUnavailableError: The file is gone, or another file lies beside the log of the one that was opened
                last.
        """
        found = _id_of(self.path)
        if found is None and self._opened is None:
            raise TableMissingError(
                f"there is no database file {self.path}: check the path in the database's URL, or create the file with "
                "`await store.setup()` or `tokenstore init`"
            )
        if found is None:
            raise BackendUnavailableError(
                f"the database file {self.path} was moved or deleted while it was in use: put it back, or restore a "
                "backup; `await store.setup()` or `tokenstore init` creates an empty one",
                code=FileMovedError.sqlite_errorname,
            )
        replaced = self._opened is not None and found != self._opened
        if replaced and self._log is not None and self._log == _id_of(self.log_path) and _size_of(self.log_path):
            raise BackendUnavailableError(
                f"the database file {self.path} was replaced, and the write-ahead log of the old file, "
                f"{self.log_path.name}, still lies beside it; together they would be a damaged database. Stop every "
                f"process that uses it, delete {self.log_path.name} and {self.path.name}-shm, and put the new file in "
                "place once more",
                code=FileMovedError.sqlite_errorname,
            )
        return found

    def after_opening(self, opened: FileId) -> None:
        """Remember a file that was opened, and its log."""
        self._opened, self._log = opened, _id_of(self.log_path)


def _id_of(path: Path) -> FileId | None:
    with suppress(OSError):
        status = path.stat()
        return FileId(status.st_dev, status.st_ino)
    return None


def _size_of(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0
