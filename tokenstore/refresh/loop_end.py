"""How long the end of an event loop waits for each step of a refresh.

:mod:`tokenstore.refresh.protected_task` explains why a refresh refuses a cancellation from outside. A refresh says here
which step it is about to do, and each step has a limit of its own.
"""

from __future__ import annotations

from tokenstore.refresh.protected_task import Protection

__all__ = ["protect_lease_statement", "protect_provider_call", "protect_write"]

# The claim of a lease and its release: the event loop waits for them this long, in seconds.
_LEASE_GRACE = 5.0
# A refresher that ignores the cancellation at `refresh_timeout` is cancelled again this much later, in seconds, if the
# event loop is ending.
_CALL_GRACE = 1.0
# A statement that writes new tokens is given this much time when the event loop is ending, in seconds. Then it is
# cancelled, because its connection may be dead, and sent again.
_WRITE_GRACE = 1.0


def protect_lease_statement(protection: Protection) -> None:
    """Protect the claim of a lease, or its release."""
    protection.guard(grace=_LEASE_GRACE)


def protect_provider_call(protection: Protection, timeout: float) -> None:
    """Protect a call of the provider, which ends by itself after ``timeout`` seconds."""
    protection.guard(limit=timeout + _CALL_GRACE)


def protect_write(protection: Protection) -> None:
    """Protect the write of new tokens. It is never given up: once the event loop ends, only a statement is cut off."""
    if protection.interrupted:
        protection.guard()
    else:
        protection.guard(grace=_WRITE_GRACE)
