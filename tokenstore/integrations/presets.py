"""What vendors document about their token endpoints.

If a vendor's documentation does not state a rule, the entry has the safe one. ``docs/providers.md`` shows the table,
and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from tokenstore.errors import ConfigurationError
from tokenstore.integrations.providers import Provider, RevocationRequest

__all__ = ["PROVIDERS", "provider_named"]

_BY_ACCESS_TOKEN: Final = MappingProxyType({"access_token": "token"})

PROVIDERS: Mapping[str, Provider] = MappingProxyType(
    {
        # Access tokens live 8 hours, refresh tokens 6 months. The code is what GitHub answers, with HTTP 200.
        "github": Provider(
            "GitHub",
            "{base_url}/login/oauth/access_token",
            # The REST API. Of a GitHub Enterprise Server it is at base_url/api/v3.
            revocation_url="{api_url}/applications/{client_id}/grant",
            revocation=RevocationRequest(
                method="DELETE",
                auth="basic",
                fields=MappingProxyType({"access_token": "access_token"}),
                json=True,
                hint=False,
            ),
            placeholders=MappingProxyType({"base_url": "https://github.com", "api_url": "https://api.github.com"}),
            auth_method="client_secret_post",
            rotation="strict",
            invalid_grant=frozenset({"bad_refresh_token"}),
            otherwise="to end the grant at GitHub, a refresher needs client_secret, and api_url if it has a base_url",
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
            revocation_url="https://slack.com/api/auth.revoke",
            revocation=RevocationRequest(
                auth="bearer", fields=_BY_ACCESS_TOKEN, revoked=frozenset({"account_inactive", "token_revoked"})
            ),
            auth_method="client_secret_basic",
            rotation="grace",
            invalid_grant=frozenset({"invalid_refresh_token"}),
            transient=frozenset({"fatal_error", "internal_error", "ratelimited"}),
            wrapper="authed_user",
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
            revocation=RevocationRequest(
                fields=MappingProxyType({name: name for name in ("refresh_token", "access_token")}), hint=False
            ),
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
            revocation_url="https://zoom.us/oauth/revoke",
            revocation=RevocationRequest(fields=_BY_ACCESS_TOKEN, hint=False),
            auth_method="client_secret_basic",
            rotation="strict",
            rule="A refresh issues a new refresh token, which has to be used from then on.",
            documentation="https://developers.zoom.us/docs/integrations/oauth/",
        ),
        # Access tokens live as long as the session's timeout, which is a setting and not in the response. base_url is
        # https://test.salesforce.com for sandboxes, or the My Domain's login URL.
        "salesforce": Provider(
            "Salesforce",
            "{base_url}/services/oauth2/token",
            revocation_url="{base_url}/services/oauth2/revoke",
            placeholders=MappingProxyType({"base_url": "https://login.salesforce.com"}),
            auth_method="client_secret_post",
            rotation="strict",
            # Of requests with the same refresh token one at a time is processed.
            transient=frozenset({"invalid_grant: token request is already being processed"}),
            rule="With refresh token rotation, a setting of the app, the used refresh token is invalidated; without it"
            " there is no new one.",
            documentation="https://help.salesforce.com/s/articleView?id=xcloud.remoteaccess_oauth_refresh_token_flow.htm",
        ),
        # Both lifetimes can be asked for: extra_parameters={"expires_in": ..., "refresh_token_expires_in": ...}.
        "zendesk": Provider(
            "Zendesk",
            "https://{subdomain}.zendesk.com/oauth/tokens",
            revocation_url="https://{subdomain}.zendesk.com/api/v2/oauth/tokens/current.json",
            revocation=RevocationRequest(method="DELETE", auth="bearer", fields=_BY_ACCESS_TOKEN),
            placeholders=MappingProxyType({"subdomain": None}),
            auth_method="client_secret_post",
            rotation="strict",
            rule="A refresh deletes the previous access token and refresh token.",
            documentation="https://developer.zendesk.com/api-reference/ticketing/oauth/grant_type_tokens/",
        ),
        # The response has no lifetime. The version of the header is one of the API's, which the endpoint requires.
        "notion": Provider(
            "Notion",
            "https://api.notion.com/v1/oauth/token",
            revocation_url="https://api.notion.com/v1/oauth/revoke",
            revocation=RevocationRequest(fields=_BY_ACCESS_TOKEN, json=True, hint=False),
            auth_method="client_secret_basic",
            rotation="strict",
            json_request=True,
            headers=MappingProxyType({"Notion-Version": "2026-03-11"}),
            rule="A refresh issues a new refresh token; what becomes of the old one is not said.",
            documentation="https://developers.notion.com/reference/refresh-a-token",
        ),
        # Access tokens live 30 minutes. Version 1, which revokes by a URL with the token in it, ends in February 2027.
        "hubspot": Provider(
            "HubSpot",
            "https://api.hubapi.com/oauth/2026-03/token",
            revocation_url="https://api.hubapi.com/oauth/2026-03/token/revoke",
            auth_method="client_secret_post",
            rotation="strict",
            invalid_grant=frozenset({"BAD_REFRESH_TOKEN"}),
            rule="Whether a refresh changes the refresh token, and what becomes of the used one, is not said.",
            documentation="https://developers.hubspot.com/docs/api-reference/latest/authentication/manage-oauth-tokens",
        ),
        # Access tokens live 4 hours. A revocation disables the refresh token that belongs to the access token, too.
        "dropbox": Provider(
            "Dropbox",
            "https://api.dropboxapi.com/oauth2/token",
            revocation_url="https://api.dropboxapi.com/2/auth/token/revoke",
            revocation=RevocationRequest(auth="bearer", fields=_BY_ACCESS_TOKEN),
            auth_method="client_secret_basic",
            rotation="none",
            rule="A refresh token does not expire by itself, and a refresh issues no new one.",
            documentation="https://developers.dropbox.com/oauth-guide",
        ),
        # Access tokens live an hour, refresh tokens 100 days unused and 5 years in all.
        "intuit": Provider(
            "Intuit",
            "https://oauth.platform.intuit.com/oauth2/v1/tokens/bearer",
            revocation_url="https://developer.api.intuit.com/v2/oauth2/tokens/revoke",
            revocation=RevocationRequest(json=True, hint=False),
            auth_method="client_secret_basic",
            rotation="strict",
            rule="The refresh token changes from time to time, and the latest has to be used; how long the old one"
            " stays good is not said.",
            documentation="https://developer.intuit.com/app/developer/qbo/docs/develop/authentication-and-authorization/"
            "oauth-2.0",
        ),
        # base_url ends with /auth for servers before version 17. An offline token has a refresh_expires_in of 0.
        "keycloak": Provider(
            "Keycloak",
            "{base_url}/realms/{realm}/protocol/openid-connect/token",
            revocation_url="{base_url}/realms/{realm}/protocol/openid-connect/revoke",
            placeholders=MappingProxyType({"base_url": None, "realm": None}),
            auth_method="client_secret_post",
            rotation="strict",
            rule="With the realm's setting Revoke Refresh Token a used refresh token is revoked; without it, it stays"
            " good.",
            documentation="https://www.keycloak.org/docs/latest/server_admin/#_timeouts",
        ),
        # A revocation takes refresh tokens alone. A token that is used again revokes all that were issued since.
        "auth0": Provider(
            "Auth0",
            "https://{domain}/oauth/token",
            revocation_url="https://{domain}/oauth/revoke",
            revocation=RevocationRequest(fields=MappingProxyType({"refresh_token": "token"}), hint=False),
            placeholders=MappingProxyType({"domain": None}),
            auth_method="client_secret_post",
            rotation="strict",
            rule="Rotation and its overlap period are settings of the application; reuse revokes the token family.",
            documentation="https://auth0.com/docs/secure/tokens/refresh-tokens/refresh-token-rotation",
        ),
        # The endpoints are those of a custom authorization server; the one named default comes with the organisation.
        "okta": Provider(
            "Okta",
            "https://{domain}/oauth2/{authorization_server}/v1/token",
            revocation_url="https://{domain}/oauth2/{authorization_server}/v1/revoke",
            placeholders=MappingProxyType({"domain": None, "authorization_server": "default"}),
            auth_method="client_secret_basic",
            rotation="strict",
            rule="Rotation and its grace period are settings of the app; reuse invalidates the latest refresh token.",
            documentation="https://developer.okta.com/docs/guides/refresh-tokens/main/",
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
