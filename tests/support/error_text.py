"""The complete text of an error, to search it for secrets."""

from __future__ import annotations

import traceback


def told(error: BaseException) -> str:
    """Return the text of an error and of all errors chained to it, including those that tracebacks hide."""
    found: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and all(one is not other for other in found):
            found.append(one)
            waiting += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
    parts = [[*traceback.format_exception(one), repr(one), repr(one.args), repr(vars(one))] for one in found]
    return "\n".join(text for part in parts for text in part)


def assert_silent(error: BaseException, *secrets: str) -> None:
    """Assert that neither the error nor any error chained to it contains a secret."""
    text = told(error)
    for secret in secrets:
        assert secret not in text
