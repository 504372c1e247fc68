"""How a vendor's token endpoint differs from the RFCs, as data.

:class:`~tokenstore.integrations.oauth2.OAuth2Refresher` uses it.
:mod:`tokenstore.integrations.presets` has the vendors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal, TypedDict

from tokenstore.errors import ConfigurationError

__all__ = ["PLACEHOLDERS", "AuthMethod", "Placeholders", "Provider", "RevocationRequest", "Rotation"]

AuthMethod = Literal["client_secret_basic", "client_secret_post", "none", "private_key_jwt"]
"""How a client authenticates, by its name in the IANA registry (RFC 8414 section 2)."""

Rotation = Literal["grace", "none", "strict"]
"""What happens to a refresh token that was used.

``strict``: it is invalid at once, and using it again may revoke the grant, so a refresh whose result is unknown is not
repeated. ``grace``: it can be used again for a while. ``none``: it remains valid.
"""


class Placeholders(TypedDict, total=False):
    """Placeholders of URLs, which are arguments of ``OAuth2Refresher.for_provider``. None stands for the default.

    Attributes:
        base_url: The URL of a self-hosted server, of a Salesforce login host or My Domain.
        api_url: The URL of the REST API that belongs to ``base_url``.
        tenant: Microsoft's tenant.
        subdomain: Zendesk's subdomain.
        domain: The host of an Auth0 tenant or an Okta organisation, or its own domain.
        realm: Keycloak's realm.
        authorization_server: The id of Okta's custom authorization server.
    """

    base_url: str | None
    api_url: str | None
    tenant: str | None
    subdomain: str | None
    domain: str | None
    realm: str | None
    authorization_server: str | None


PLACEHOLDERS: Final = tuple(Placeholders.__annotations__)
"""The names of :class:`Placeholders`."""

# A part of a URL: no slash, colon, @ and the like, which would make the rest of the template another part.
_PART: Final = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
# A URL that a path can be appended to: no user, query and fragment, and no folder that consists of dots.
_SERVER: Final = re.compile(r"https?://[^\s/?#@\\%{}]+(/(?!\.+(/|$))[A-Za-z0-9._~-]+)*")


@dataclass(frozen=True, slots=True)
class RevocationRequest:
    """How a vendor's revocation differs from RFC 7009.

    Attributes:
        method: The HTTP method.
        auth: What authenticates the request: the ``client`` as in a refresh, the client by HTTP ``basic``, or the
            revoked access token itself (``bearer``).
        fields: The kinds of tokens that the endpoint takes, the preferred one first, each with its field in the body.
            With ``bearer`` there is no body.
        json: Whether the body is a JSON object and not a form, even if a refresh is a form.
        hint: Whether the body has a ``token_type_hint``.
        revoked: Error codes that mean that the grant has already ended.
    """

    method: Literal["POST", "DELETE"] = "POST"
    auth: Literal["client", "basic", "bearer"] = "client"
    fields: Mapping[str, str] = field(
        default_factory=lambda: MappingProxyType({"refresh_token": "token", "access_token": "token"})
    )
    json: bool = False
    hint: bool = True
    revoked: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Provider:
    """A vendor's endpoints, and how they differ from the RFCs.

    Attributes:
        name: The vendor's name, for messages.
        token_url: The token endpoint; may contain placeholders, such as ``{tenant}``.
        revocation_url: The revocation endpoint, with the same placeholders and ``{client_id}``; None: there is none.
        revocation: How a revocation differs from RFC 7009.
        placeholders: The placeholders' names and default values; None: there is no default. One at the beginning of a
            URL is the URL of a server, any other one a part of a URL without special characters.
        auth_method: How a client with a secret authenticates.
        rotation: What happens to a used refresh token.
        invalid_grant: Error codes that mean ``invalid_grant``: the user has to log in again. They are looked for in the
            fields ``error``, ``errors``, ``error_code``, ``code``, ``status`` and the like, and in the objects and
            lists there; a number is given as text. A ``code: description`` means this only with that
            ``error_description``.
        transient: Error codes of a temporary failure, looked for in the same places. A ``code: description`` counts
            before ``invalid_grant``.
        wrapper: A field of the response that may contain the tokens, in place of its top level.
        read: For tokens in any other place: gets the parsed response (JSON of any type, or the fields of a form), and
            returns the fields as RFC 6749 names them. If it raises an exception, the response is read as it is.
        is_invalid_grant: For a dead refresh token that no code tells: gets the parsed response of a refusal, and
            returns whether the user has to log in again. An exception counts as no.
        raw_basic: Whether ``client_secret_basic`` sends id and secret as they are, and not encoded as in a form first
            (RFC 6749 section 2.3.1). Many vendors do not decode them; it matters for special characters alone.
        json_request: Whether requests are JSON objects and not forms.
        headers: More headers of each request.
        otherwise: What to do if there is no revocation endpoint.
        rule: The documented rule in one line.
        documentation: The URL of the documentation.
    """

    name: str
    token_url: str
    revocation_url: str | None = None
    revocation: RevocationRequest = field(default_factory=RevocationRequest)
    placeholders: Mapping[str, str | None] = field(default_factory=lambda: MappingProxyType({}))
    auth_method: AuthMethod = "client_secret_basic"
    rotation: Rotation = "strict"
    invalid_grant: frozenset[str] = frozenset()
    transient: frozenset[str] = frozenset()
    wrapper: str | None = None
    read: Callable[[Any], Mapping[str, Any]] | None = None
    is_invalid_grant: Callable[[Any], bool] | None = None
    raw_basic: bool = False
    json_request: bool = False
    headers: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    otherwise: str = ""
    rule: str = ""
    documentation: str = ""

    def urls(self, values: Mapping[str, str | None]) -> tuple[str, str | None]:
        """The token and the revocation endpoint, with the placeholders filled; None stands for the default.

        The vendor's own revocation endpoint is left out if the tokens are those of another server.

        Raises:
            ConfigurationError: This provider has no such placeholder, there is no default for one, or a value would
                change the host or the path of the URL.
        """
        given = {name: value for name, value in values.items() if value is not None}
        if unknown := sorted(given.keys() - self.placeholders.keys()):
            raise ConfigurationError(f"{self.name} takes no {' and no '.join(unknown)}: leave it out")
        filled = {**self.placeholders, **{name: self._checked(name, value) for name, value in given.items()}}
        if missing := sorted(name for name, value in filled.items() if value is None):
            raise ConfigurationError(f"{self.name} needs {' and '.join(missing)}")
        token_url, revocation_url = self.token_url, self.revocation_url
        moved = {name for name in filled if self._is_server(name) and filled[name] != self.placeholders[name]}
        if moved and revocation_url and revocation_url.startswith("{"):
            revocation_url = next((revocation_url for name in moved if revocation_url.startswith(f"{{{name}}}")), None)
        for name, value in filled.items():
            token_url = token_url.replace(f"{{{name}}}", value or "")
            revocation_url = revocation_url and revocation_url.replace(f"{{{name}}}", value or "")
        return token_url, revocation_url

    def _is_server(self, name: str) -> bool:
        return any((url or "").startswith(f"{{{name}}}") for url in (self.token_url, self.revocation_url))

    def _checked(self, name: str, value: object) -> str:
        """A placeholder's value that cannot change the host or the path of the URL in a way that is not meant."""
        if self._is_server(name):
            if isinstance(value, str) and _SERVER.fullmatch(server := value.rstrip("/")):
                return server
            raise ConfigurationError(
                f"{name} must be the URL of a server, such as https://example.com or https://example.com/path"
            )
        if isinstance(value, str) and _PART.fullmatch(value):
            return value
        raise ConfigurationError(
            f"{name} must consist of ASCII letters, digits, hyphens and underscores, and single dots between them: it"
            " becomes a part of the URL"
        )

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
