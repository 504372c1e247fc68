"""A request of a user: with which headers it is sent, and what a 401 means."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

from tokenstore.tracebacks import Hidden

if TYPE_CHECKING:
    from tokenstore.integrations._nonces import Nonces

__all__ = ["NONCE", "PROOF", "BearerToken", "Exchange", "Refusal", "refuses_token"]

PROOF: Final = "DPoP"
"""The header of a proof."""

NONCE: Final = "DPoP-Nonce"
"""The header in which a server sends its nonce."""


# A parameter of a challenge (RFC 9110 section 11.6.1). A quoted value is one unit, whatever text is inside of it.
_PARAMETER: Final = re.compile(r'([A-Za-z0-9_-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')


class BearerToken(NamedTuple):
    """An access token that was loaded for a request.

    Attributes:
        generation: The generation of its row.
        header: The value of the header ``Authorization`` (RFC 6750 section 2.1, RFC 9449 section 7.1).
        prove: Makes a DPoP proof for a method and a URL; None: the token is not bound to a key.
    """

    generation: int
    header: Hidden[str]
    prove: Callable[[str, str], str] | None = None


class Refusal(Enum):
    """What a 401 is about, if the request may be sent again."""

    TOKEN = "the access token is not valid"  # noqa: S105 - no token
    PROOF = "the request needs a DPoP proof that is made anew"


class Exchange:
    """A request of a user, its redirects and repetitions: what they are sent with, and what a 401 means.

    Args:
        token: The token that was loaded for it.
        nonces: The nonces of APIs, if there is a DPoP key.

    Attributes:
        token: The token for the next sending.
    """

    def __init__(self, token: BearerToken, nonces: Nonces | None) -> None:
        self.token = token
        self._sent = [token]
        self._nonces = nonces
        self._answered: set[str] = set()

    def headers(self, method: str, url: str) -> dict[str, str]:
        """The headers of the next sending, with a DPoP proof that is made for it."""
        prove, headers = self.token.prove, {"Authorization": self.token.header.reveal()}
        return headers if prove is None else {**headers, PROOF: prove(method, url)}

    def has_sent(self, header: str | bytes | None) -> bool:
        """Whether a request has the token. A redirect to another origin has removed it, or replaced it by others."""
        return any(token.header.reveal() == header for token in self._sent)

    def refusal(
        self, url: str, status: int, challenges: Collection[str], nonces: Iterable[str], *, proven: bool
    ) -> Refusal | None:
        """What a response says about the request, if it may be sent again.

        Args:
            url: The URL of the request that was answered.
            status: The HTTP status.
            challenges: The values of the header ``WWW-Authenticate``.
            nonces: The values of the header ``DPoP-Nonce``.
            proven: Whether that request had its :meth:`headers`. A redirected one has no proof of its own.
        """
        has_nonce = self._nonces is not None and self._nonces.note(url, nonces)
        if status != 401:
            return None
        if self.token.prove is not None and not proven:
            return self._once("no proof", Refusal.PROOF)
        if self.token.prove is not None and has_nonce and "use_dpop_nonce" in _errors_in(challenges):
            return self._once("no nonce", Refusal.PROOF)
        return self._once("token", Refusal.TOKEN) if refuses_token(challenges) else None

    def _once(self, reason: str, refusal: Refusal) -> Refusal | None:
        """The refusal, if it is the first one for this reason: no request is sent again and again."""
        is_first = reason not in self._answered
        self._answered.add(reason)
        return refusal if is_first else None

    def renew(self, fresh: BearerToken) -> bool:
        """Take the token that replaced the refused one. Returns whether it is another one."""
        if fresh.generation == self.token.generation:
            return False
        self.token = fresh
        self._sent.append(fresh)
        return True


def refuses_token(challenges: Iterable[str]) -> bool:
    """Whether a 401 with these challenges is about the validity of the access token, so that a new one may help.

    That is the error ``invalid_token``, and a 401 without an error. A 403 with ``insufficient_scope`` is not about it.
    """
    errors = _errors_in(challenges)
    return not errors or "invalid_token" in errors


def _errors_in(challenges: Iterable[str]) -> set[str]:
    """The error codes of a 401 (RFC 6750 section 3.1, RFC 9449 section 7.1)."""
    parameters = [found for value in challenges for found in _PARAMETER.findall(value)]
    return {quoted or bare for name, quoted, bare in parameters if name.lower() == "error"}
