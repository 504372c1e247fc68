"""The nonces of servers that demand one in each DPoP proof (RFC 9449 sections 8 and 9)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from tokenstore.integrations._dpop_key import target_of

__all__ = ["Nonces"]

_NONCE: Final = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]{1,4096}")  # NQCHAR of RFC 9449 section 8.1, with a limit
_MOST_SERVERS: Final = 256


class Nonces:
    """The last nonce of each server (RFC 9449 section 8.2). Thread-safe."""

    def __init__(self) -> None:
        self._last: dict[str, str] = {}

    def last(self, url: str) -> str | None:
        """The nonce for a request to this URL, if its server has sent one."""
        return self._last.get(_origin(url))

    def note(self, url: str, values: Iterable[str]) -> bool:
        """Remember the nonce of a response.

        Args:
            url: The URL of the request.
            values: The values of the response's header ``DPoP-Nonce``.

        Returns:
            Whether there was one.
        """
        [nonce, *others] = [*values] or [""]
        if others or not _NONCE.fullmatch(nonce):
            return False
        if len(self._last) >= _MOST_SERVERS:
            self._last.clear()
        self._last[_origin(url)] = nonce
        return True


def _origin(url: str) -> str:
    return "/".join(target_of(url).split("/", 3)[:3])
