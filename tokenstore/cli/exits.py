"""The exit codes of the command line."""

from __future__ import annotations

from typing import Final

from tokenstore.errors import BackendError, RefreshError, SealingError, TokenStoreError

__all__ = [
    "BROKEN_PIPE",
    "DATABASE",
    "EXIT_CODES",
    "INPUT_OUTPUT",
    "INTERRUPTED",
    "NOT_FOUND",
    "PROVIDER_FAILED",
    "SEALING",
    "USAGE",
    "exit_code_of",
]

NOT_FOUND, USAGE, DATABASE, SEALING, PROVIDER_FAILED, INPUT_OUTPUT = range(1, 7)
INTERRUPTED, BROKEN_PIPE = 130, 141
EXIT_CODES: Final = (
    "Exit codes: 0 done; 1 no such row, or declined; 2 usage or configuration; 3 the database refused or cannot be "
    "reached; 4 a stored value does not open; 5 a refresh failed in this run; 6 input or output failed; "
    "130 interrupted; 141 output pipe closed."
)
"""The last paragraph of ``tokenstore --help``."""


def exit_code_of(error: TokenStoreError) -> int:
    """The exit code of a command that ended with this error."""
    for kind, code in ((BackendError, DATABASE), (SealingError, SEALING), (RefreshError, PROVIDER_FAILED)):
        if isinstance(error, kind):
            return code
    return USAGE
