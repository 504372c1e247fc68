"""The grants of a strict provider's users, and the tokens and codes of each."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Code", "Grant", "Grants"]


@dataclass(slots=True, eq=False)
class Grant:
    """What one user has granted at one login. Times are seconds since the epoch."""

    user: str
    scope: str
    access: str = field(default="", repr=False)
    access_scope: str = ""
    access_expires: float = 0.0
    refresh: str = field(default="", repr=False)
    refresh_expires: float | None = None
    previous: str = field(default="", repr=False)  # the refresh token consumed last, for `grace`
    rotated_at: float = 0.0
    revoked: bool = False
    dpop_jkt: str | None = None  # the thumbprint of the key that the refresh token is bound to (RFC 9449)
    access_jkt: str | None = None  # and the access token


@dataclass(slots=True, eq=False)
class Code:
    """An authorization code (RFC 6749 section 4.1.2) for a grant that has no tokens yet."""

    grant: Grant
    redirect_uri: str
    challenge: str
    expires: float
    used: bool = False


class Grants:
    """All grants of one provider. Not thread-safe.

    Args:
        clock: Seconds since the epoch.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._refresh_tokens: dict[str, Grant] = {}  # all that were issued, so that a used one is recognised
        self._access_tokens: dict[str, Grant] = {}  # only the last one of each grant that is not revoked
        self._codes: dict[str, Code] = {}  # all that were issued

    def add_code(self, code: Code) -> str:
        """Issue an authorization code."""
        name = f"ac_{secrets.token_urlsafe(32)}"
        self._codes[name] = code
        return name

    def find_code(self, code: str) -> Code | None:
        """The authorization code, also if it has expired or was used."""
        return self._codes.get(code)

    def find_refresh_token(self, token: str) -> Grant | None:
        """The grant of a refresh token, also of one that has expired or was used."""
        return self._refresh_tokens.get(token)

    def find_valid_access_token(self, token: str) -> Grant | None:
        """The grant of an access token that is valid now."""
        grant = self._access_tokens.get(token)
        return grant if grant is not None and self.clock() < grant.access_expires else None

    def issue_access_token(self, grant: Grant, scope: str, lifetime: float) -> None:
        """Issue an access token, which replaces the grant's last one. The lifetime is in seconds."""
        self.end_access_token(grant.access)
        grant.access = f"at_{secrets.token_urlsafe(32)}"
        grant.access_scope = scope
        grant.access_expires = self.clock() + lifetime
        self._access_tokens[grant.access] = grant

    def issue_refresh_token(self, grant: Grant, lifetime: float | None) -> None:
        """Issue a refresh token, which consumes the grant's last one. The lifetime is in seconds; None: unlimited."""
        now = self.clock()
        grant.previous, grant.rotated_at = grant.refresh, now
        grant.refresh = f"rt_{secrets.token_urlsafe(32)}"
        grant.refresh_expires = None if lifetime is None else now + lifetime
        self._refresh_tokens[grant.refresh] = grant

    def end_access_token(self, token: str) -> None:
        """Make an access token unknown."""
        self._access_tokens.pop(token, None)

    def expire_access_tokens(self, user: str) -> None:
        """Let the access tokens of a user expire now."""
        for grant in self._access_tokens.values():
            if grant.user == user:
                grant.access_expires = min(grant.access_expires, self.clock())

    def revoke(self, grant: Grant) -> int:
        """Revoke a grant. Returns how many grants this has revoked: 0 or 1."""
        self.end_access_token(grant.access)
        revoked, grant.revoked = not grant.revoked, True
        return int(revoked)

    def revoke_user(self, user: str) -> int:
        """Revoke all grants of a user. Returns how many this has revoked."""
        codes = (code.grant for code in self._codes.values())
        grants = {*self._refresh_tokens.values(), *self._access_tokens.values(), *codes}
        return sum(self.revoke(grant) for grant in grants if grant.user == user)

    def response(self, grant: Grant, *, with_refresh: bool) -> dict[str, Any]:
        """The token response of a grant's last tokens (RFC 6749 section 5.1)."""
        now = self.clock()

        def seconds(expires: float) -> int:
            return max(0, int(expires - now + 1e-3))  # 3600 s must not come out as 3599

        response: dict[str, Any] = {
            "access_token": grant.access,
            "token_type": "Bearer" if grant.access_jkt is None else "DPoP",
            "expires_in": seconds(grant.access_expires),
            "scope": grant.access_scope,
        }
        if with_refresh:
            response["refresh_token"] = grant.refresh
        if grant.refresh_expires is not None:
            response["refresh_token_expires_in"] = seconds(grant.refresh_expires)
        return response
