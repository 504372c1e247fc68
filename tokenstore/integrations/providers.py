"""How a vendor's token endpoint differs from the RFCs, as data.

:class:`~tokenstore.integrations.oauth2.OAuth2Refresher` uses it.
:mod:`tokenstore.integrations.presets` has the vendors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from tokenstore.errors import ConfigurationError

__all__ = ["AuthMethod", "Provider", "Rotation"]

AuthMethod = Literal["client_secret_basic", "client_secret_post", "none", "private_key_jwt"]
"""How a client authenticates, by its name in the IANA registry (RFC 8414 section 2)."""

Rotation = Literal["grace", "none", "strict"]
"""What happens to a refresh token that was used.

``strict``: it is invalid at once, and using it again may revoke the grant, so a refresh whose result is unknown is not
repeated. ``grace``: it can be used again for a while. ``none``: it remains valid.
"""


@dataclass(frozen=True, slots=True)
class Provider:
    """A vendor's endpoints, and how they differ from the RFCs.

    Attributes:
        name: The vendor's name, for messages.
        token_url: The token endpoint; may contain placeholders, such as ``{tenant}``.
        revocation_url: The revocation endpoint, with the same placeholders; None: there is none.
        placeholders: The placeholders' names and default values.
        auth_method: How a client with a secret authenticates.
        rotation: What happens to a used refresh token.
        invalid_grant: Error codes that mean ``invalid_grant``: the user has to log in again. They are looked for in the
            fields ``error``, ``errors``, ``error_code``, ``code``, ``status`` and the like, and in the objects and
            lists there; a number is given as text. A ``code: description`` means this only with that
            ``error_description``.
        transient: Error codes of a temporary failure, looked for in the same places.
        wrapper: A field of the response that may contain the tokens, in place of its top level.
        read: For tokens in any other place: gets the parsed response (JSON of any type, or the fields of a form), and
            returns the fields as RFC 6749 names them. If it raises an exception, the response is read as it is.
        is_invalid_grant: For a dead refresh token that no code tells: gets the parsed response of a refusal, and
            returns whether the user has to log in again. An exception counts as no.
        raw_basic: Whether ``client_secret_basic`` sends id and secret as they are, and not encoded as in a form first
            (RFC 6749 section 2.3.1). Many vendors do not decode them; it matters for special characters alone.
        json_request: Whether requests are JSON objects and not forms.
        revocation_fields: The form's field for a refresh token and for an access token that is revoked. The default is
            the one of RFC 7009.
        otherwise: What to do if there is no revocation endpoint.
        rule: The documented rule in one line.
        documentation: The URL of the documentation.
    """

    name: str
    token_url: str
    revocation_url: str | None = None
    placeholders: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    auth_method: AuthMethod = "client_secret_basic"
    rotation: Rotation = "strict"
    invalid_grant: frozenset[str] = frozenset()
    transient: frozenset[str] = frozenset()
    wrapper: str | None = None
    read: Callable[[Any], Mapping[str, Any]] | None = None
    is_invalid_grant: Callable[[Any], bool] | None = None
    raw_basic: bool = False
    json_request: bool = False
    revocation_fields: tuple[str, str] = ("token", "token")
    otherwise: str = ""
    rule: str = ""
    documentation: str = ""

    def urls(self, values: Mapping[str, str | None]) -> tuple[str, str | None]:
        """The token and the revocation endpoint, with the placeholders filled; None stands for the default.

        Raises:
            ConfigurationError: This provider has no such placeholder.
        """
        given = {name: value.rstrip("/") for name, value in values.items() if value is not None}
        if unknown := sorted(given.keys() - self.placeholders.keys()):
            raise ConfigurationError(f"{self.name} takes no {' and no '.join(unknown)}: leave it out")
        token_url, revocation_url = self.token_url, self.revocation_url
        for name, value in {**self.placeholders, **given}.items():
            token_url = token_url.replace(f"{{{name}}}", value)
            revocation_url = revocation_url and revocation_url.replace(f"{{{name}}}", value)
        return token_url, revocation_url

    def token_fields(self, value: Any) -> dict[str, Any]:
        """The fields of a parsed response, under the names of RFC 6749; none if it has no fields."""
        if self.read is not None:
            with suppress(Exception):  # such as a KeyError for a refusal; its text could contain a token
                return dict(self.read(value))
        fields = value if isinstance(value, dict) else {}
        if "access_token" not in fields and isinstance(inner := fields.get(self.wrapper or ""), dict):
            return {**fields, **inner}
        return fields

    def says_invalid_grant(self, value: Any) -> bool:
        """Whether the vendor's own rule takes a parsed response for a dead refresh token."""
        if self.is_invalid_grant is not None:
            with suppress(Exception):
                return bool(self.is_invalid_grant(value))
        return False
