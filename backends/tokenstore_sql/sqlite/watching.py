"""Noticing changes of a database by its files."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from tokenstore_sql.polling import jittered

__all__ = ["wait_for_change"]

# How often to look at the files, in seconds.
_LOOK_EVERY: Final = 0.010
# When to read the row even if the files look the same, in seconds: two writes within one tick of the kernel's clock can
# leave the same time and size behind.
_LONGEST_WATCH: Final = 0.250
# How old a write must be, in seconds, so that a read that came later has certainly seen its transaction.
_RECENT: Final = 0.100
# The pause if there are no files to look at, in seconds.
_PAUSE_WITHOUT_FILES: Final = 0.025


class _Status(NamedTuple):
    inode: int
    size: int
    written_at: float


async def wait_for_change(database: str) -> None:
    """Return when the database may have changed. No statement is sent, and a look at the files costs next to nothing.

    Args:
        database: The path of the database file.
    """
    files = [Path(f"{database}{end}") for end in ("", "-wal")]
    before = _state(files)
    if not before:
        await asyncio.sleep(jittered(_PAUSE_WITHOUT_FILES))
        return
    # The last read may have come before the write that the files show; or the write may not be visible yet, because a
    # commit writes its pages first and then waits for the disk.
    age = time.time() - max(status.written_at for status in before)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + (max(age, _LOOK_EVERY) if age < _RECENT else jittered(_LONGEST_WATCH))
    while loop.time() < deadline:
        await asyncio.sleep(_LOOK_EVERY)
        if _state(files) != before:
            return


def _state(files: Sequence[Path]) -> list[_Status]:
    found = []
    for file in files:
        with suppress(OSError, ValueError):
            status = file.stat()
            found.append(_Status(status.st_ino, status.st_size, status.st_mtime))
    return found
