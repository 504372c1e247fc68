"""The placeholders in the URLs of presets: which are needed, and which values they may have."""

from __future__ import annotations

from typing import Any

import pytest

from support.oauth2_calls import GOOD, ID, SECRET, refresh
from support.preset_calls import REQUIRED, required
from support.scripted_endpoint import Endpoint, answer
from tokenstore import ConfigurationError
from tokenstore.integrations.oauth2 import OAuth2Refresher
from tokenstore.integrations.presets import PROVIDERS
from tokenstore.integrations.providers import PLACEHOLDERS, Provider


@pytest.mark.parametrize(
    ("preset", "values", "token_url", "revocation_url"),
    [
        (
            "gitlab",
            {"base_url": "https://git.example.com/gitlab/"},
            "https://git.example.com/gitlab/oauth/token",
            "https://git.example.com/gitlab/oauth/revoke",
        ),
        (
            "microsoft",
            {"tenant": "contoso.com"},
            "https://login.microsoftonline.com/contoso.com/oauth2/v2.0/token",
            None,
        ),
        (
            "salesforce",
            {"base_url": "https://acme--dev.sandbox.my.salesforce.com"},
            "https://acme--dev.sandbox.my.salesforce.com/services/oauth2/token",
            "https://acme--dev.sandbox.my.salesforce.com/services/oauth2/revoke",
        ),
        (
            "salesforce",
            {"base_url": None},
            "https://login.salesforce.com/services/oauth2/token",
            "https://login.salesforce.com/services/oauth2/revoke",
        ),
        (
            "zendesk",
            {"subdomain": "acme"},
            "https://acme.zendesk.com/oauth/tokens",
            "https://acme.zendesk.com/api/v2/oauth/tokens/current.json",
        ),
        (
            "keycloak",
            {"base_url": "https://sso.example.com:8443/auth", "realm": "my_realm-1"},
            "https://sso.example.com:8443/auth/realms/my_realm-1/protocol/openid-connect/token",
            "https://sso.example.com:8443/auth/realms/my_realm-1/protocol/openid-connect/revoke",
        ),
        (
            "auth0",
            {"domain": "login.acme.com"},
            "https://login.acme.com/oauth/token",
            "https://login.acme.com/oauth/revoke",
        ),
        (
            "okta",
            {"domain": "acme.okta.com"},
            "https://acme.okta.com/oauth2/default/v1/token",
            "https://acme.okta.com/oauth2/default/v1/revoke",
        ),
        (
            "okta",
            {"domain": "acme.okta.com", "authorization_server": "aus1"},
            "https://acme.okta.com/oauth2/aus1/v1/token",
            "https://acme.okta.com/oauth2/aus1/v1/revoke",
        ),
        (
            "github",
            {"base_url": "https://git.example.com", "api_url": "https://git.example.com/api/v3"},
            "https://git.example.com/login/oauth/access_token",
            "https://git.example.com/api/v3/applications/{client_id}/grant",
        ),
    ],
)
def test_placeholders_are_filled(
    preset: str, values: dict[str, str | None], token_url: str, revocation_url: str | None
) -> None:
    """None stands for the default."""
    assert PROVIDERS[preset].urls(values) == (token_url, revocation_url)


def test_tokens_of_another_server_are_not_sent_to_the_vendor_s_own() -> None:
    """A GitHub Enterprise Server's API has an address of its own; without it there is no revocation."""
    assert PROVIDERS["github"].urls({})[1] == "https://api.github.com/applications/{client_id}/grant"
    assert PROVIDERS["github"].urls({"base_url": "https://github.com/"})[1] is not None
    assert PROVIDERS["github"].urls({"base_url": "https://git.example.com"})[1] is None
    refresher = OAuth2Refresher.for_provider("github", client_id=ID, base_url="https://git.example.com")
    assert not refresher.can_revoke


def test_a_request_goes_to_the_filled_url(endpoint: Endpoint) -> None:
    endpoint.script(answer(GOOD))
    base_url = f"http://{endpoint.address}/auth"
    refresh(
        OAuth2Refresher.for_provider("keycloak", client_id=ID, client_secret=SECRET, base_url=base_url, realm="a.b")
    )
    assert endpoint.received[0].line == "POST /auth/realms/a.b/protocol/openid-connect/token HTTP/1.1"


@pytest.mark.parametrize(("preset", "name"), [(preset, name) for preset in REQUIRED for name in required(preset)])
def test_a_placeholder_without_a_default_must_be_given(preset: str, name: str) -> None:
    values = required(preset)
    del values[name]
    for left_out in (values, {**values, name: None}):
        with pytest.raises(ConfigurationError, match=f"{PROVIDERS[preset].name} needs {name}$"):
            OAuth2Refresher.for_provider(preset, client_id=ID, client_secret=SECRET, **left_out)


def test_what_a_provider_does_not_take_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Google takes no base_url and no tenant"):
        OAuth2Refresher.for_provider("google", client_id=ID, base_url="https://example.com", tenant="x")
    with pytest.raises(ConfigurationError, match="there are atlassian, auth0, discord, dropbox, github"):
        OAuth2Refresher.for_provider("gitea", client_id=ID)
    with pytest.raises(ConfigurationError, match="Keycloak needs base_url and realm"):
        OAuth2Refresher.for_provider("keycloak", client_id=ID)


EVIL: list[Any] = [
    *("evil.com/", "/evil.com", "a/b", "a\\b", "a@b", "a:b", "evil.com?", "evil.com#", "a b", " a", "a\n", "", "."),
    *("..", "a..b", "../a", "%2e%2e", "a%2fb", "{realm}", "https://evil.com", "münchen", "a\x00", 7, ["a"]),
]
PARTS = [
    *(("zendesk", "subdomain"), ("keycloak", "realm"), ("auth0", "domain"), ("okta", "domain")),
    *(("okta", "authorization_server"), ("microsoft", "tenant")),
]


@pytest.mark.parametrize("value", EVIL)
@pytest.mark.parametrize(("preset", "name"), PARTS)
def test_a_part_of_a_url_has_no_special_characters(preset: str, name: str, value: Any) -> None:
    """They would make the rest of the URL another part: the secret would go to another host or path."""
    with pytest.raises(ConfigurationError, match=f"^{name} must consist of"):
        OAuth2Refresher.for_provider(preset, client_id=ID, **{**required(preset), name: value})


@pytest.mark.parametrize(
    "value",
    [
        *(
            "https://evil.com?",
            "https://evil.com/?x=",
            "https://evil.com#",
            "https://user@evil.com",
            "https://a:b@evil.com",
        ),
        *(
            "https://evil.com/..",
            "https://evil.com/a/../b",
            "https://evil.com/.",
            "https://evil.com//a",
            "evil.com",
            "",
        ),
        *(
            "https://",
            "https:///a",
            "https://evil.com/a b",
            " https://evil.com",
            "https://evil.com\n",
            "ftp://evil.com",
        ),
        *("https://evil.com/%2e%2e", "https://evil.com\\a", "https://evil.com/{realm}", "https://{realm}", 7),
    ],
)
@pytest.mark.parametrize(("preset", "name"), [("keycloak", "base_url"), ("gitlab", "base_url"), ("github", "api_url")])
def test_a_server_s_url_has_nothing_that_a_path_cannot_follow(preset: str, name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name} must be the URL of a server"):
        OAuth2Refresher.for_provider(preset, client_id=ID, **{**required(preset), name: value})


def test_a_server_s_url_is_checked_as_any_other() -> None:
    with pytest.raises(ConfigurationError, match="must be https"):
        OAuth2Refresher.for_provider("keycloak", client_id=ID, base_url="http://sso.example.com", realm="a")


def test_an_own_provider_may_have_placeholders() -> None:
    own = Provider("Acme", "https://{domain}/token", placeholders={"domain": None})
    assert own.urls({"domain": "acme.example"}) == ("https://acme.example/token", None)
    assert {name for found in PROVIDERS.values() for name in found.placeholders} == {*PLACEHOLDERS}
