"""The presets of providers, and their table in the documentation."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import urlsplit

import pytest

from support.oauth2_calls import GOOD, ID, REFRESH, SECRET, refresh, refusal
from support.paths import DOCS
from support.preset_calls import refresher_at, required
from support.scripted_endpoint import Endpoint, answer
from tokenstore import (
    ProviderRefusedError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    RefreshError,
)
from tokenstore.integrations.oauth2 import OAuth2Refresher
from tokenstore.integrations.presets import PROVIDERS
from tokenstore.integrations.providers import Provider
from tokenstore.refresh.kept import Kept
from tokenstore.refresh.responses import read_response

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


# A response with the fields that the vendor documents, and what the store keeps of it: the lifetimes of the two tokens
# in seconds, and fields of `extra`.
EXAMPLES: dict[str, tuple[dict[str, Any], int | None, int | None, set[str]]] = {
    "salesforce": (
        {
            "access_token": "00DB0000000TfcR!AQQAQFhoK8vTMg_rKA.esrJ2bCs.example",
            "signature": "CMJ4l+CCaPQiKjoOEwEig9H4wqhpuLSk4J2urAe+fVg=",
            "scope": "refresh_token api",
            "instance_url": "https://yourInstance.salesforce.com",
            "id": "https://login.salesforce.com/id/00Dx0000000BV7z/005x00000012Q9P",
            "token_type": "Bearer",
            "issued_at": "1278448384422",
        },
        None,
        None,
        {"issued_at", "signature", "id", "instance_url"},
    ),
    "zendesk": (
        {
            "access_token": "gErypPlm4dOVgGRvA1ZzMH5MQ3nLo8bo",
            "refresh_token": "31048ba4d7c601302f3173f243da835f",
            "token_type": "bearer",
            "scope": "read",
            "expires_in": 172800,
            "refresh_token_expires_in": 7776000,
        },
        172800,
        7776000,
        {"scope"},
    ),
    "notion": (
        {
            "access_token": "ntn_example",
            "token_type": "bearer",
            "refresh_token": "nrt_example",
            "bot_id": "3c90c3cc-0d44-4b50-8888-8dd25736052a",
            "workspace_icon": None,
            "workspace_name": "Acme",
            "workspace_id": "3c90c3cc-0d44-4b50-8888-8dd25736052a",
            "owner": {"type": "user", "user": {"id": "3c90c3cc-0d44-4b50-8888-8dd25736052a", "object": "user"}},
            "duplicated_template_id": None,
            "request_id": "3c90c3cc-0d44-4b50-8888-8dd25736052a",
        },
        None,
        None,
        {"bot_id", "workspace_id", "owner"},
    ),
    "hubspot": (
        {
            "token_use": "access_token",
            "token_type": "bearer",
            "refresh_token": "6f18f21e-a743-4509-b7fd-1a5e632fffa1",
            "access_token": "CN2zlYnmLBICAQIYgZXFLyCWp1Yoy_9example",
            "expires_in": 1800,
            "hub_id": 123,
            "scopes": ["oauth"],
            "user_id": 123,
        },
        1800,
        None,
        {"hub_id", "scopes", "user_id"},
    ),
    "dropbox": ({"access_token": "sl.u.example", "token_type": "bearer", "expires_in": 14400}, 14400, None, set()),
    "intuit": (
        {
            "token_type": "bearer",
            "expires_in": 3600,
            "refresh_token": "AB11730384727example",
            "x_refresh_token_expires_in": 8726400,
            "access_token": "eyJlbmMiOiJBMTI4Q0JDLUhTMjU2IiwiYWxnIjoiZGlyIn0..example",
        },
        3600,
        8726400,
        {"token_type"},
    ),
    "keycloak": (
        {
            "access_token": "eyJhbGci.example",
            "expires_in": 60,
            "refresh_expires_in": 225,
            "refresh_token": "eyJhbGci.next",
            "token_type": "Bearer",
            "not-before-policy": 0,
            "session_state": "db0815aa-3ac9-429c-9f59-f789bbe1953b",
            "scope": "openid profile email",
        },
        60,
        225,
        {"session_state", "not-before-policy"},
    ),
    "auth0": (
        {
            "access_token": "eyJ.example",
            "refresh_token": "GEbRxBN.example",
            "id_token": "eyJ.id",
            "token_type": "Bearer",
            "scope": "openid offline_access",
            "expires_in": 86400,
        },
        86400,
        None,
        {"id_token", "scope"},
    ),
    "okta": (
        {
            "token_type": "Bearer",
            "expires_in": 3600,
            "access_token": "eyJhbGciOiJSUzI1NiJ9.example",
            "scope": "offline_access openid",
            "refresh_token": "MIOf-U1zQbyfa3MUfJHhvnUqIut9ClH0xjlDXGJAyqo",
        },
        3600,
        None,
        {"scope"},
    ),
}


@pytest.mark.parametrize("preset", sorted(EXAMPLES))
def test_a_response_with_the_vendor_s_fields_is_read(endpoint: Endpoint, preset: str) -> None:
    """The request goes to the vendor's path; the tokens, their lifetimes and the vendor's further fields are kept."""
    body, lifetime, refresh_lifetime, further = EXAMPLES[preset]
    endpoint.script(answer(body))
    fields = refresh(refresher_at(endpoint, preset))
    assert fields == body
    [request] = endpoint.received
    found = PROVIDERS[preset]
    assert request.line == f"POST {urlsplit(found.urls(required(preset))[0]).path} HTTP/1.1"
    assert request.headers.items() >= {name.lower(): value for name, value in found.headers.items()}.items()
    sent = json.loads(request.body) if found.json_request else request.form
    assert sent.items() >= {"grant_type": "refresh_token", "refresh_token": REFRESH}.items()
    assert ("client_secret" in sent) is (found.auth_method == "client_secret_post")
    assert ("authorization" in request.headers) is (found.auth_method == "client_secret_basic")

    new = read_response(fields, Kept(REFRESH), issued_at=1_000_000)
    assert new.access_token == body["access_token"]
    assert new.refresh_token == body.get("refresh_token", REFRESH)
    assert new.expiry.at == (lifetime and (lifetime + 1) * 1_000_000)
    assert new.refresh_token_expires_at == (refresh_lifetime and (refresh_lifetime + 1) * 1_000_000)
    assert json.loads(new.extra or "{}").keys() >= further


def test_a_keycloak_offline_token_does_not_expire(endpoint: Endpoint) -> None:
    """Its `refresh_expires_in` is 0."""
    endpoint.script(answer({**EXAMPLES["keycloak"][0], "refresh_expires_in": 0}))
    fields = refresh(refresher_at(endpoint, "keycloak"))
    assert read_response(fields, Kept(REFRESH), issued_at=1_000_000).refresh_token_expires_at is None


def test_notion_gets_json_and_the_version_of_its_api(endpoint: Endpoint) -> None:
    endpoint.script(answer(EXAMPLES["notion"][0]))
    refresh(refresher_at(endpoint, "notion"))
    headers = endpoint.received[0].headers
    assert headers["notion-version"] == "2026-03-11"
    assert headers["content-type"] == "application/json"
    assert headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    ("preset", "status", "body", "kind", "code"),
    [
        (
            "salesforce",
            400,
            {"error": "invalid_grant", "error_description": "expired access/refresh token"},
            REAUTHORIZE,
            "invalid_grant",
        ),
        # Another request with this refresh token is under way; the refresh token is good.
        (
            "salesforce",
            400,
            {"error": "invalid_grant", "error_description": "token request is already being processed"},
            UNAVAILABLE,
            "temporarily_unavailable",
        ),
        ("salesforce", 400, {"error": "invalid_client_id"}, REFUSED, "invalid_client_id"),
        (
            "zendesk",
            400,
            {
                "error": "invalid_grant",
                "error_description": "The provided access grant is invalid, expired, or revoked",
            },
            REAUTHORIZE,
            "invalid_grant",
        ),
        (
            "notion",
            400,
            {"object": "error", "status": 400, "code": "invalid_grant", "message": "Invalid code: it was revoked."},
            REAUTHORIZE,
            "invalid_grant",
        ),
        (
            "notion",
            400,
            {"object": "error", "status": 400, "code": "missing_version", "message": "Notion-Version header"},
            REFUSED,
            "http_400",
        ),
        ("notion", 429, {"object": "error", "status": 429, "code": "rate_limited"}, UNAVAILABLE, "http_429"),
        (
            "hubspot",
            400,
            {
                "error": "invalid_grant",
                "error_description": "refresh token is invalid, expired or revoked",
                "status": "BAD_REFRESH_TOKEN",
                "message": "refresh token is invalid, expired or revoked",
            },
            REAUTHORIZE,
            "BAD_REFRESH_TOKEN",
        ),
        (
            "hubspot",
            400,
            {"status": "BAD_REFRESH_TOKEN", "message": "missing or invalid refresh token"},
            REAUTHORIZE,
            "BAD_REFRESH_TOKEN",
        ),
        (
            "dropbox",
            400,
            {"error": "invalid_grant", "error_description": "refresh token is invalid or revoked"},
            REAUTHORIZE,
            "invalid_grant",
        ),
        (
            "intuit",
            400,
            {"error": "invalid_grant", "error_description": "Incorrect or invalid refresh token"},
            REAUTHORIZE,
            "invalid_grant",
        ),
        ("intuit", 401, {"error": "invalid_client"}, REFUSED, "invalid_client"),
        (
            "keycloak",
            400,
            {"error": "invalid_grant", "error_description": "Token is not active"},
            REAUTHORIZE,
            "invalid_grant",
        ),
        (
            "auth0",
            403,
            {"error": "invalid_grant", "error_description": "Unknown or invalid refresh token."},
            REAUTHORIZE,
            "invalid_grant",
        ),
        (
            "okta",
            400,
            {"error": "invalid_grant", "error_description": "The refresh token is invalid or expired."},
            REAUTHORIZE,
            "invalid_grant",
        ),
    ],
)
def test_the_vendor_s_own_errors_are_understood(
    endpoint: Endpoint, preset: str, status: int, body: object, kind: type[RefreshError], code: str
) -> None:
    endpoint.script(answer(body, status))
    error = refusal(refresher_at(endpoint, preset))
    assert (type(error), error.code) == (kind, code)
    assert len(endpoint.received) == 1


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
