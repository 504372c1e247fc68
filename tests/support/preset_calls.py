"""Refreshers of presets, with the vendors' hosts replaced by a local one."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import urlsplit

from support.oauth2_calls import ID, SECRET
from support.scripted_endpoint import Endpoint
from tokenstore.integrations.oauth2 import OAuth2Refresher
from tokenstore.integrations.presets import PROVIDERS
from tokenstore.integrations.providers import Placeholders

REQUIRED: Final[Mapping[str, Placeholders]] = MappingProxyType(
    {
        "zendesk": {"subdomain": "acme"},
        "keycloak": {"base_url": "https://sso.example.com/auth", "realm": "main"},
        "auth0": {"domain": "acme.eu.auth0.com"},
        "okta": {"domain": "acme.okta.com"},
    }
)
"""The placeholders that have no default."""


def required(preset: str) -> Any:
    return dict(REQUIRED.get(preset, {}))


def refresher_at(endpoint: Endpoint, preset: str, secret: str | None = SECRET, **options: Any) -> OAuth2Refresher:
    """The preset's refresher, whose URLs have the vendor's paths on the local endpoint."""
    found = PROVIDERS[preset]
    token_url, revocation_url = found.urls(required(preset))
    return OAuth2Refresher(
        _local(endpoint, token_url),
        ID,
        secret,
        revocation_url=revocation_url and _local(endpoint, revocation_url),
        provider=found,
        **options,
    )


def _local(endpoint: Endpoint, url: str) -> str:
    assert url.startswith("https://")
    return f"http://{endpoint.address}{urlsplit(url).path}"
