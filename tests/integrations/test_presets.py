"""The presets of providers, and their table in the documentation."""

from __future__ import annotations

import re
from typing import Any

import pytest

from support.oauth2_calls import GOOD, ID, SECRET, refresh, refusal
from support.paths import DOCS
from support.preset_calls import required
from support.scripted_endpoint import Endpoint, answer
from tokenstore import (
    ConfigurationError,
    ProviderRefusedError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
)
from tokenstore.integrations.oauth2 import OAuth2Refresher
from tokenstore.integrations.presets import PROVIDERS
from tokenstore.integrations.providers import Provider

PAGE = DOCS / "providers.md"


REAUTHORIZE, UNAVAILABLE, REFUSED = ReauthorizationRequiredError, ProviderUnavailableError, ProviderRefusedError


@pytest.mark.parametrize("preset", sorted(PROVIDERS))
def test_a_preset_makes_a_refresher(preset: str) -> None:
    """The client's id and secret and what has no default are enough; the refresher does what the vendor documents."""
    found = PROVIDERS[preset]
    values = required(preset)
    refresher = OAuth2Refresher.for_provider(preset, client_id=ID, client_secret=SECRET, timeout=5, **values)
    assert repr(refresher) == f"<OAuth2Refresher {found.name} {found.auth_method} rotation={found.rotation}>"
    assert refresher.can_revoke is (found.revocation_url is not None)
    assert refresher.timeout == 5
    urls = [url for url in found.urls(values) if url]
    assert all(url.startswith("https://") and "{" not in url.replace("{client_id}", "") for url in urls)
    assert found.documentation.startswith("https://")
    assert "client_secret" not in repr(OAuth2Refresher.for_provider(preset, client_id=ID, **values))


def test_base_url_and_tenant_are_accepted_only_where_they_apply(endpoint: Endpoint) -> None:
    """GitHub and GitLab accept `base_url` for self-hosted servers, and Microsoft accepts `tenant`."""
    assert PROVIDERS["gitlab"].urls({"base_url": "https://git.example.com/gitlab/"}) == (
        "https://git.example.com/gitlab/oauth/token",
        "https://git.example.com/gitlab/oauth/revoke",
    )
    assert PROVIDERS["microsoft"].urls({"tenant": "contoso.com"}) == (
        "https://login.microsoftonline.com/contoso.com/oauth2/v2.0/token",
        None,
    )
    endpoint.script(answer(GOOD))
    base_url = f"http://{endpoint.address}"
    refresh(OAuth2Refresher.for_provider("github", client_id=ID, client_secret=SECRET, base_url=base_url))
    assert endpoint.received[0].line == "POST /login/oauth/access_token HTTP/1.1"
    with pytest.raises(ConfigurationError, match="Google takes no base_url and no tenant"):
        OAuth2Refresher.for_provider("google", client_id=ID, base_url="https://example.com", tenant="x")
    with pytest.raises(ConfigurationError, match="there are atlassian, discord, github"):
        OAuth2Refresher.for_provider("gitea", client_id=ID)


def test_options_have_priority_over_a_preset(endpoint: Endpoint) -> None:
    """The preset can be from the table or the application's own."""
    own = Provider("Acme", endpoint.url, auth_method="client_secret_post", invalid_grant=frozenset({"no_more"}))
    endpoint.script(answer(GOOD))
    options: dict[str, Any] = {"rotation": "none", "auth_method": "client_secret_basic", "scope": "x"}
    refresher = OAuth2Refresher.for_provider(own, client_id=ID, client_secret=SECRET, **options)
    assert repr(refresher) == "<OAuth2Refresher Acme client_secret_basic rotation=none>"
    refresh(refresher)
    assert endpoint.received[0].form["scope"] == "x"
    endpoint.script(answer({"error": "no_more"}, 400))
    assert type(refusal(refresher)) is REAUTHORIZE


def test_the_documented_table_matches_the_presets() -> None:
    """The table in docs/providers.md has every preset with its data."""
    text = PAGE.read_text("utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]
    presets = {row[0].strip("`"): row[1:] for row in rows if row[0].strip("`") in PROVIDERS}
    assert list(presets) == list(PROVIDERS)
    for preset, (
        vendor,
        arguments,
        token_url,
        revocation_url,
        tokens,
        auth_method,
        rotation,
        codes,
        rule,
    ) in presets.items():
        found = PROVIDERS[preset]
        assert vendor == f"[{found.name}]({found.documentation})"
        shown = [f"`{name}`" + (f" (`{default}`)" if default else "") for name, default in found.placeholders.items()]
        assert arguments == (", ".join(shown) or "none")
        assert token_url == f"`{found.token_url}`"
        assert revocation_url.strip("`").removeprefix("DELETE ") == (found.revocation_url or "none")
        assert revocation_url.startswith("`DELETE ") is (found.revocation.method == "DELETE")
        assert re.findall(r"`([^`]+)`", tokens) == (list(found.revocation.fields) if found.revocation_url else [])
        assert auth_method == f"`{found.auth_method}`"
        assert rotation == f"`{found.rotation}`"
        assert re.findall(r"`([^`]+)`", codes) == sorted(found.invalid_grant)
        assert rule == found.rule
