"""What vendors document about their token endpoints, as data.

:class:`~tokenstore.integrations.oauth2.OAuth2Refresher` uses it. If a vendor's documentation does not state a rule, the
entry has the safe one. ``docs/providers.md`` shows the table, and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from tokenstore.errors import ConfigurationError

__all__ = ["PROVIDERS", "AuthMethod", "Provider", "Rotation", "provider_named"]

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


PROVIDERS: Mapping[str, Provider] = MappingProxyType(
    {
        # Access tokens live 8 hours, refresh tokens 6 months. The code is what GitHub answers, with HTTP 200.
        "github": Provider(
            "GitHub",
            "{base_url}/login/oauth/access_token",
            placeholders=MappingProxyType({"base_url": "https://github.com"}),
            auth_method="client_secret_post",
            rotation="strict",
            invalid_grant=frozenset({"bad_refresh_token"}),
            otherwise="to end the grant at GitHub, send DELETE /applications/CLIENT_ID/grant to its REST API",
            rule="Once used, the refresh token and the old access token no longer work.",
            documentation="https://docs.github.com/en/apps/creating-github-apps/"
            "authenticating-with-a-github-app/refreshing-user-access-tokens",
        ),
        # Access tokens live 2 hours. The documented request has the login's redirect_uri: give it in extra_parameters.
        "gitlab": Provider(
            "GitLab",
            "{base_url}/oauth/token",
            revocation_url="{base_url}/oauth/revoke",
            placeholders=MappingProxyType({"base_url": "https://gitlab.com"}),
            auth_method="client_secret_post",
            rotation="strict",
            rule="A refresh invalidates the existing access token and refresh token.",
            documentation="https://docs.gitlab.com/api/oauth2/",
        ),
        # Access tokens live an hour. Refresh tokens die after 6 months without use, those of apps under test in 7 days.
        "google": Provider(
            "Google",
            "https://oauth2.googleapis.com/token",
            revocation_url="https://oauth2.googleapis.com/revoke",
            auth_method="client_secret_post",
            rotation="none",
            rule="A refresh issues no new refresh token; the old one stays good.",
            documentation="https://developers.google.com/identity/protocols/oauth2/web-server#offline",
        ),
        # Access tokens live 12 hours; at most two of them are live at a time. How long the grace lasts is not said.
        "slack": Provider(
            "Slack",
            "https://slack.com/api/oauth.v2.access",
            auth_method="client_secret_basic",
            rotation="grace",
            invalid_grant=frozenset({"invalid_refresh_token"}),
            transient=frozenset({"fatal_error", "internal_error", "ratelimited"}),
            wrapper="authed_user",
            otherwise="to end the grant at Slack, call its methods auth.revoke or apps.uninstall",
            rule="The used refresh token is revoked after a short grace period.",
            documentation="https://docs.slack.dev/authentication/using-token-rotation",
        ),
        # Access tokens live 24 hours. The documentation names no grace: strict. A token already revoked is refused.
        "linear": Provider(
            "Linear",
            "https://api.linear.app/oauth/token",
            revocation_url="https://api.linear.app/oauth/revoke",
            auth_method="client_secret_post",
            rotation="strict",
            revocation_fields=("refresh_token", "access_token"),
            rule="A refresh issues a new refresh token; what becomes of the old one is not said.",
            documentation="https://linear.app/developers/oauth-2-0-authentication",
        ),
        # Access tokens live about an hour, refresh tokens 90 days (24 hours for single-page apps).
        "microsoft": Provider(
            "Microsoft",
            "https://login.microsoftonline.com/{tenant}/oauth2/v2.0/token",
            placeholders=MappingProxyType({"tenant": "common"}),
            auth_method="client_secret_post",
            rotation="none",
            invalid_grant=frozenset({"consent_required", "interaction_required"}),
            otherwise="to end every grant of a user at Microsoft, call revokeSignInSessions of Microsoft Graph",
            rule="A refresh issues a new refresh token and does not revoke the old one.",
            documentation="https://learn.microsoft.com/en-us/entra/identity-platform/refresh-tokens",
        ),
        # Access tokens live an hour, refresh tokens 90 days unused and a year in all; reuse after the grace revokes the
        # grant. Beside the documented invalid_grant Atlassian answers the code below, which alone would blame the app.
        "atlassian": Provider(
            "Atlassian",
            "https://auth.atlassian.com/oauth/token",
            auth_method="client_secret_post",
            rotation="grace",
            invalid_grant=frozenset({"unauthorized_client: refresh_token is invalid"}),
            otherwise="the user can remove the app in the settings of the Atlassian account, under connected apps",
            rule="The used refresh token stays good for 10 minutes, for retries.",
            documentation="https://developer.atlassian.com/cloud/oauth/getting-started/refresh-tokens/",
        ),
        # Access tokens live an hour. The documentation does not say what becomes of a used refresh token: strict.
        "spotify": Provider(
            "Spotify",
            "https://accounts.spotify.com/api/token",
            auth_method="client_secret_basic",
            rotation="strict",
            otherwise="the user can remove the app's access on the page of the Spotify account, under apps",
            rule="A refresh token lives 6 months from the login; a refresh does not extend that.",
            documentation="https://developer.spotify.com/documentation/web-api/tutorials/refreshing-tokens",
        ),
        # The endpoints and the authentication are those of Discord's metadata (RFC 8414).
        "discord": Provider(
            "Discord",
            "https://discord.com/api/oauth2/token",
            revocation_url="https://discord.com/api/oauth2/token/revoke",
            auth_method="client_secret_basic",
            rotation="strict",
            rule="A refresh issues a new refresh token; what becomes of the old one is not said.",
            documentation="https://discord.com/developers/docs/topics/oauth2",
        ),
        # Access tokens live 30 minutes, refresh tokens 60 days unused.
        "xero": Provider(
            "Xero",
            "https://identity.xero.com/connect/token",
            auth_method="client_secret_basic",
            rotation="grace",
            otherwise="to end a connection to an organisation, send DELETE /connections/ID to Xero's API",
            rule="If no response came, the used refresh token can be used again for 30 minutes.",
            documentation="https://developer.xero.com/faq/oauth2",
        ),
        # Access tokens live an hour. The revocation endpoint takes access tokens alone.
        "zoom": Provider(
            "Zoom",
            "https://zoom.us/oauth/token",
            auth_method="client_secret_basic",
            rotation="strict",
            otherwise="to end the grant at Zoom, send the access token to https://zoom.us/oauth/revoke",
            rule="A refresh issues a new refresh token, which has to be used from then on.",
            documentation="https://developers.zoom.us/docs/integrations/oauth/",
        ),
    }
)
"""The vendors by the name that ``OAuth2Refresher.for_provider`` takes."""


def provider_named(name: str) -> Provider:
    """The entry of :data:`PROVIDERS`.

    Raises:
        ConfigurationError: There is none of this name.
    """
    if name not in PROVIDERS:
        raise ConfigurationError(f"no preset for {name!r}; there are {', '.join(sorted(PROVIDERS))}")
    return PROVIDERS[name]
