"""Merges changes into the application's own fields of a row, so that concurrent updates lose nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tokenstore.errors import ConflictError
from tokenstore.protocol import RowOperations
from tokenstore.records import SealedRecord, TokenKey
from tokenstore.sealing import Sealer
from tokenstore.validation import metadata_json, requested_row

__all__ = ["MetadataUpdate"]

# Compare-and-sets that may fail before the deadline counts: each failure means that another write succeeded.
_TRIES: Final = 20
# How long an update is tried again, in seconds.
_LONGEST: Final = 5.0
# The longest pause before a further try, for each try so far, in seconds.
_PAUSE: Final = 0.002


@dataclass(frozen=True, slots=True, repr=False)
class MetadataUpdate:
    """One update of a row's metadata.

    Attributes:
        sealer: The keys and the namespace.
        key: The row.
        changes: The new fields, checked by :func:`tokenstore.validation.metadata_changes`; None removes a field.
    """

    sealer: Sealer
    key: TokenKey
    changes: Mapping[str, object]

    async def run(
        self, rows: RowOperations, read: Callable[[TokenKey], Awaitable[SealedRecord | None]]
    ) -> dict[str, Any] | None:
        """Read the metadata, merge the changes, and write the result by compare-and-set, until that succeeds.

        Args:
            rows: The rows.
            read: Reads the row; in a transaction with its lock, so that the first write succeeds.

        Returns:
            The new metadata; None if there is no row.

        Raises:
            InvalidInputError: The merged metadata exceeds a limit.
            SealingError: The stored metadata does not open with the keyring.
            ConflictError: Other updates of the row came first each time.
            BackendError: The database refused or failed.
        """
        deadline = time.monotonic() + _LONGEST
        tries = 0
        while True:
            row = requested_row(self.key, await read(self.key))
            if row is None:
                return None
            stored = self.sealer.open_metadata(self.key, row.metadata)
            merged = {
                name: value
                for name, value in {**stored, **self.changes}.items()
                if value is not None or name not in self.changes
            }
            text = metadata_json(merged)
            new: dict[str, Any] = {} if text is None else json.loads(text)  # as every load returns it from now on
            # Also if nothing has changed: in a borrowed session, this write ends the transaction of an earlier load
            # with for_update=True, which would otherwise hold the row's lock.
            sealed = self.sealer.seal_metadata(self.key, text)
            if await rows.set_metadata(self.key, sealed, replacing=row.metadata.value):
                return new
            tries += 1
            if tries >= _TRIES and time.monotonic() > deadline:
                raise ConflictError(f"{self.key}: other updates of the metadata came first; repeat the call")
            await _pause(tries)


async def _pause(tries: int) -> None:
    # Imported here: they make up most of the time of `import tokenstore`, and the caller's event loop has loaded both.
    import asyncio
    import random

    await asyncio.sleep(random.uniform(0, _PAUSE * tries))  # noqa: S311 - spreads the updates of a fleet
