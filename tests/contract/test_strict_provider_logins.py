"""The strict provider's logins: authorization codes with PKCE, and users who withdraw their consent."""

from __future__ import annotations

import httpx
import pytest

from support.provider_requests import (
    CALLBACK,
    CHALLENGE,
    VERIFIER,
    Clock,
    authorize,
    outcome,
    redeem,
    redirected,
    refresh,
    resource,
)
from tokenstore.testing.provider import StrictRotatingProvider


def code_of(response: httpx.Response) -> str:
    return redirected(response)["code"]


def test_the_verifier_and_challenge_of_the_rfc_match() -> None:
    """The example of RFC 7636, appendix B."""
    assert CHALLENGE == "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"


def test_a_code_is_redeemed_for_the_tokens_of_the_user(provider: StrictRotatingProvider, http: httpx.Client) -> None:
    redirect = redirected(authorize(http, scope="read"))
    assert redirect.keys() == {"code", "state"}
    assert redirect["state"] == "s t&1"
    response = redeem(http, redirect["code"])
    tokens = response.json()
    assert response.headers["Cache-Control"] == "no-store"
    assert (tokens["expires_in"], tokens["scope"]) == (3600, "read")
    assert resource(http, tokens["access_token"]).json() == {"user": "alice", "scope": "read"}
    assert refresh(http, tokens["refresh_token"]).status_code == 200
    assert provider.stats().refreshes_by_user == {"alice": 1}


def test_without_a_login_hint_the_provider_s_user_logs_in(provider: StrictRotatingProvider, http: httpx.Client) -> None:
    provider.user = "bob"
    redirect = redirected(authorize(http, login_hint=None, state=None))
    assert redirect.keys() == {"code"}
    assert resource(http, redeem(http, redirect["code"]).json()["access_token"]).json()["user"] == "bob"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"code_challenge": None}, "invalid_request"),
        ({"code_challenge_method": None}, "invalid_request"),
        ({"code_challenge_method": "plain", "code_challenge": VERIFIER}, "invalid_request"),
        ({"code_challenge": CHALLENGE[:-1]}, "invalid_request"),
        ({"response_type": "token"}, "unsupported_response_type"),
        ({"response_type": None}, "invalid_request"),
    ],
)
def test_a_refused_authorization_request_redirects_with_an_error_and_the_state(
    provider: StrictRotatingProvider, http: httpx.Client, changes: dict[str, str | None], error: str
) -> None:
    redirect = redirected(authorize(http, **changes))
    assert redirect.keys() == {"error", "error_description", "state"}
    assert (redirect["error"], redirect["state"]) == (error, "s t&1")


@pytest.mark.parametrize(
    "changes",
    [
        {"client_id": "another"},
        {"client_id": None},
        {"redirect_uri": None},
        {"redirect_uri": "/callback"},
        {"redirect_uri": "https://app.example.com/#fragment"},
        {"redirect_uri": "https://app.example.com/\r\nSet-Cookie: a=b"},
    ],
)
def test_no_redirect_leads_to_a_uri_that_cannot_be_trusted(
    provider: StrictRotatingProvider, http: httpx.Client, changes: dict[str, str | None]
) -> None:
    response = authorize(http, **changes)
    assert outcome(response) == (400, "invalid_request")
    assert "Location" not in response.headers


def test_registered_redirect_uris_are_compared_as_strings(provider: StrictRotatingProvider, http: httpx.Client) -> None:
    provider.redirect_uris = [CALLBACK]
    assert code_of(authorize(http))
    assert outcome(authorize(http, redirect_uri=f"{CALLBACK}&more=1")) == (400, "invalid_request")


def test_a_repeated_parameter_is_refused(provider: StrictRotatingProvider, http: httpx.Client) -> None:
    response = http.get("/authorize?client_id=demo-client&client_id=demo-client", auth=None)
    assert outcome(response) == (400, "invalid_request")


def test_a_user_who_refuses_is_redirected_with_access_denied(
    provider: StrictRotatingProvider, http: httpx.Client
) -> None:
    provider.consents = False
    assert redirected(authorize(http))["error"] == "access_denied"


@pytest.mark.parametrize(
    "changes",
    [
        {"code_verifier": VERIFIER[:-1] + "X"},
        {"code_verifier": CHALLENGE},
        {"code_verifier": "short"},
        {"redirect_uri": "https://app.example.com/other"},
    ],
)
def test_a_wrong_verifier_or_redirect_uri_is_refused_and_consumes_the_code(
    provider: StrictRotatingProvider, http: httpx.Client, changes: dict[str, str]
) -> None:
    code = code_of(authorize(http))
    assert outcome(redeem(http, code, **changes)) == (400, "invalid_grant")
    assert outcome(redeem(http, code)) == (400, "invalid_grant")


@pytest.mark.parametrize("missing", ["code", "code_verifier", "redirect_uri"])
def test_a_token_request_without_a_parameter_is_refused(
    provider: StrictRotatingProvider, http: httpx.Client, missing: str
) -> None:
    assert outcome(redeem(http, code_of(authorize(http)), **{missing: ""})) == (400, "invalid_request")


def test_reuse_of_a_code_revokes_its_grant(provider: StrictRotatingProvider, http: httpx.Client) -> None:
    code = code_of(authorize(http))
    tokens = redeem(http, code).json()
    assert outcome(redeem(http, code)) == (400, "invalid_grant")
    assert outcome(resource(http, tokens["access_token"])) == (401, "invalid_token")
    assert outcome(refresh(http, tokens["refresh_token"])) == (400, "invalid_grant")
    assert (provider.stats().reuses, provider.stats().revoked_grants) == (1, 1)


def test_a_code_expires(provider: StrictRotatingProvider, http: httpx.Client, clock: Clock) -> None:
    codes = [code_of(authorize(http)) for _ in range(2)]
    clock.now += 59
    assert redeem(http, codes[0]).status_code == 200
    clock.now += 1
    assert outcome(redeem(http, codes[1])) == (400, "invalid_grant")
    assert outcome(redeem(http, "ac_unknown")) == (400, "invalid_grant")


def test_a_user_who_withdraws_the_consent_loses_all_grants_and_codes(
    provider: StrictRotatingProvider, http: httpx.Client
) -> None:
    code = code_of(authorize(http))
    first, second, other = (provider.new_grant(user) for user in ("alice", "alice", "bob"))
    provider.revoke_user("alice")
    for tokens in (first, second):
        assert outcome(resource(http, tokens["access_token"])) == (401, "invalid_token")
        assert outcome(refresh(http, tokens["refresh_token"])) == (400, "invalid_grant")
    assert outcome(redeem(http, code)) == (400, "invalid_grant")
    assert refresh(http, other["refresh_token"]).status_code == 200
    assert (provider.stats().revoked_grants, provider.stats().reuses) == (3, 0)


def test_access_tokens_can_be_expired_before_their_time(provider: StrictRotatingProvider, http: httpx.Client) -> None:
    alice, bob = provider.new_grant("alice"), provider.new_grant("bob")
    provider.expire_access_tokens("alice")
    response = resource(http, alice["access_token"])
    assert outcome(response) == (401, "invalid_token")
    assert response.headers["WWW-Authenticate"] == 'Bearer realm="tokenstore.testing", error="invalid_token"'
    assert resource(http, bob["access_token"]).status_code == 200
    assert refresh(http, alice["refresh_token"]).status_code == 200
