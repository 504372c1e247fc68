"""The presets of providers, and their table in the documentation."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs

import pytest

from support.oauth2_calls import GOOD, ID, SECRET, record, refresh, refusal
from support.paths import DOCS
from support.scripted_endpoint import Endpoint, answer
from tokenstore import ConfigurationError, ProviderRefusedError, ProviderUnavailableError, ReauthorizationRequiredError
from tokenstore.integrations.oauth2 import OAuth2Refresher
from tokenstore.integrations.presets import PROVIDERS
from tokenstore.integrations.providers import Provider

PAGE = DOCS / "providers.md"


REAUTHORIZE, UNAVAILABLE, REFUSED = ReauthorizationRequiredError, ProviderUnavailableError, ProviderRefusedError


@pytest.mark.parametrize("preset", sorted(PROVIDERS))
def test_a_preset_makes_a_refresher(preset: str) -> None:
    """Only the client's id and secret are needed; the refresher does what the provider documents."""
    found = PROVIDERS[preset]
    refresher = OAuth2Refresher.for_provider(preset, client_id=ID, client_secret=SECRET, timeout=5)
    assert repr(refresher) == f"<OAuth2Refresher {found.name} {found.auth_method} rotation={found.rotation}>"
    assert refresher.can_revoke is (found.revocation_url is not None)
    assert refresher.timeout == 5
    assert all(url is None or (url.startswith("https://") and "{" not in url) for url in found.urls({}))
    assert "client_secret" not in repr(OAuth2Refresher.for_provider(preset, client_id=ID))


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


def test_linear_s_revocation_request_names_the_field_by_the_kind_of_token(endpoint: Endpoint) -> None:
    """Linear's revocation endpoint differs from RFC 7009."""
    linear = replace(PROVIDERS["linear"], token_url=endpoint.url, revocation_url=endpoint.url)
    refresher = OAuth2Refresher.for_provider(linear, client_id=ID, client_secret=SECRET)
    endpoint.script(answer(b""))
    asyncio.run(refresher.revoke(record()))
    asyncio.run(refresher.revoke(record(None)))
    assert [parse_qs(request.body).keys() - {"client_id", "client_secret"} for request in endpoint.received] == [
        {"refresh_token"},
        {"access_token"},
    ]


def test_the_documented_table_matches_the_presets() -> None:
    """The table in docs/providers.md has every preset with its data."""
    text = PAGE.read_text("utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]
    presets = {row[0].strip("`"): row[1:] for row in rows if row[0].strip("`") in PROVIDERS}
    assert list(presets) == list(PROVIDERS)
    for preset, (vendor, token_url, revocation_url, auth_method, rotation, codes, rule) in presets.items():
        found = PROVIDERS[preset]
        assert vendor == f"[{found.name}]({found.documentation})"
        assert token_url == f"`{found.token_url}`"
        assert revocation_url == (f"`{found.revocation_url}`" if found.revocation_url else "none")
        assert auth_method == f"`{found.auth_method}`"
        assert rotation == f"`{found.rotation}`"
        assert re.findall(r"`([^`]+)`", codes) == sorted(found.invalid_grant)
        assert rule == found.rule
