"""What a caller of ``load_fresh_tokens`` needs, and whether a record has the scopes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tokenstore.errors import ConfigurationError, InsufficientScopeError, InvalidInputError
from tokenstore.records import TokenKey, TokenRecord

__all__ = ["Need", "checked_scopes", "require_audience", "require_scopes"]

_SCOPE: Final = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+")  # RFC 6749 section 3.3


@dataclass(slots=True)
class Need:
    """Which access token one caller needs.

    Attributes:
        force: Whether a token that looks valid is refreshed.
        generation: With ``force``: the generation whose token was refused.
        min_ttl: How long the access token has to remain valid, in seconds.
        force_min_age: A row that was written less than so many seconds ago is not refreshed by force.
    """

    force: bool
    generation: int | None
    min_ttl: float
    force_min_age: float


def checked_scopes(scopes: object) -> frozenset[str]:
    """Check the scopes that a caller needs.

    Raises:
        InvalidInputError: They are one text, or not all scopes of RFC 6749 section 3.3.
    """
    if isinstance(scopes, str) or not isinstance(scopes, Iterable):
        raise InvalidInputError('scopes must be several texts, such as ["read", "write"]')
    found = list(scopes)
    if not all(isinstance(scope, str) and _SCOPE.fullmatch(scope) for scope in found):
        raise InvalidInputError("scopes must hold scopes of RFC 6749 section 3.3: no blanks, quotes or backslashes")
    return frozenset(found)


def require_scopes(key: TokenKey, record: TokenRecord, scopes: frozenset[str], refresher: object) -> None:
    """Check that the user has granted the scopes.

    A provider may leave out the scope of its response if it has granted all that was requested (RFC 6749 section 5.1).
    Then the refresher's attribute ``scope`` tells what was requested. If it tells nothing either, nothing is missing.

    Raises:
        InsufficientScopeError: Some scopes are missing.
    """
    granted = _granted(record["extra"])
    if granted is None:
        granted = _granted({"scope": getattr(refresher, "scope", None)})
    if granted is None or not (missing := sorted(scopes - granted)):
        return
    error = InsufficientScopeError(
        f"{key}: the token lacks the scope {' '.join(missing)}; the user has to log in again and grant it",
        missing=missing,
        granted=sorted(granted),
    )
    error.provider, error.user_id, error.account = key
    raise error


def require_audience(key: TokenKey, record: TokenRecord, refresher: object) -> None:
    """Check that issued tokens are for the refresher's audience, if both name one.

    Raises:
        ConfigurationError: They were issued for another audience.
    """
    wanted, found = getattr(refresher, "audience", None), record["extra"].get("audience")
    if isinstance(wanted, str) and isinstance(found, str) and wanted != found:
        raise ConfigurationError(
            f"{key}: the row's tokens were issued for another audience; each audience needs a row of its own, with "
            "another provider name or account"
        )


def _granted(fields: Mapping[str, Any]) -> frozenset[str] | None:
    """The scopes of a response; None if it has none. Some providers separate them by commas, or send a list."""
    for name in ("scope", "scopes"):
        value = fields.get(name)
        if isinstance(value, str) and value.strip():
            return frozenset((*value.split(), *re.split(r"[\s,]+", value.strip())))
        if isinstance(value, list) and value:
            return frozenset(scope for scope in value if isinstance(scope, str))
    return None
