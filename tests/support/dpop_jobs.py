"""A job of worker processes that make DPoP keys."""

from __future__ import annotations

from collections.abc import Sequence

from support.broken_backends import Fault
from support.workers import Link
from tokenstore.integrations.dpop import DPoP

__all__ = ["make_keys"]


async def make_keys(link: Link, url: str, users: Sequence[str], fault: Fault | None = None) -> list[str]:
    """Load the key of each user, which makes it; return the thumbprints."""
    (one, *_) = await link.open(url, fault)
    _ = await one.tokens.get_value("dpop", "connects")
    link.meet()
    return [(await DPoP().key(one.tokens, "acme", user)).thumbprint for user in users]
