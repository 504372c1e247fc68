"""Refusals in other shapes than RFC 6749's, and tokens in other places: read by shape, or by the vendor's own rule."""

from __future__ import annotations

from typing import Any

import pytest

from support.oauth2_calls import ACCESS, GOOD, ID, REFRESH, SECRET, refresh, refusal
from support.scripted_endpoint import Endpoint, answer
from tokenstore import ProviderRefusedError, ProviderUnavailableError, ReauthorizationRequiredError, RefreshError
from tokenstore.integrations.oauth2 import OAuth2Refresher
from tokenstore.integrations.providers import Provider

REAUTHORIZE, UNAVAILABLE, REFUSED = ReauthorizationRequiredError, ProviderUnavailableError, ProviderRefusedError
BAD = "bad request"


@pytest.mark.parametrize(
    ("status", "body", "kind", "code"),
    [
        (400, {"errors": [{"errorType": "invalid_grant", "message": REFRESH}]}, REAUTHORIZE, "invalid_grant"),
        (401, {"errors": [{"code": 7}, {"code": "invalid_grant"}]}, REAUTHORIZE, "invalid_grant"),
        (400, {"error": {"code": "invalid_grant"}}, REAUTHORIZE, "invalid_grant"),
        (
            400,
            {"error": {"type": "OAuthException", "errors": [{"reason": "invalid_grant"}]}},
            REAUTHORIZE,
            "invalid_grant",
        ),
        (400, {"error_code": "invalid_grant"}, REAUTHORIZE, "invalid_grant"),
        (400, {"status": "invalid_grant"}, REAUTHORIZE, "invalid_grant"),
        (400, {"error": BAD, "errors": ["invalid_grant"]}, REAUTHORIZE, "invalid_grant"),
        (200, {"errors": [{"errorType": "invalid_grant"}]}, REAUTHORIZE, "invalid_grant"),
        (400, [{"errorCode": "invalid_grant"}], REAUTHORIZE, "invalid_grant"),
        (400, {"errors": [{"errorType": "invalid_client"}]}, REFUSED, "invalid_client"),
        (200, {"error": {"code": "invalid_client"}}, REFUSED, "invalid_client"),
        (400, {"error": {"code": "temporarily_unavailable"}}, UNAVAILABLE, "temporarily_unavailable"),
        (400, {"error": {"code": REFRESH, "token": ACCESS}}, REFUSED, "http_400"),
        (400, {"error": {"code": 190}, "status": "BAD_REFRESH_TOKEN"}, REFUSED, "http_400"),
        (400, {"message": "invalid_grant"}, REFUSED, "http_400"),
        (400, {"error": {"code": 10**30}, "errors": [None, True, 1.5, [[]]]}, REFUSED, "http_400"),
        (400, {"errors": [["x"] * 1000] * 100}, REFUSED, "http_400"),
    ],
)
def test_a_code_of_the_rfc_is_found_by_its_shape(
    endpoint: Endpoint, status: int, body: object, kind: type[RefreshError], code: str
) -> None:
    """In an object, a list or another field than `error`; codes that only a vendor knows are not guessed, nor shown."""
    endpoint.script(answer(body, status))
    error = refusal(OAuth2Refresher(endpoint.url, ID, SECRET))
    assert type(error) is kind
    assert error.code == code


def _vendor(**rules: Any) -> Provider:
    return Provider("Vendor", "https://example.com/token", **rules)


@pytest.mark.parametrize(
    ("rules", "body", "code"),
    [
        ({"invalid_grant": frozenset({"BAD_REFRESH_TOKEN"})}, {"status": "BAD_REFRESH_TOKEN"}, "BAD_REFRESH_TOKEN"),
        (
            {"invalid_grant": frozenset({"refresh_token_not_found"})},
            {"code": 400, "error_code": "refresh_token_not_found", "msg": "x"},
            "refresh_token_not_found",
        ),
        ({"invalid_grant": frozenset({"190"})}, {"error": {"code": 190, "message": REFRESH}}, "190"),
        ({"is_invalid_grant": lambda body: body["fault"]["sub"] == 9}, {"fault": {"sub": 9}}, "http_400"),
    ],
)
def test_a_vendors_own_spelling_of_a_dead_token(
    endpoint: Endpoint, rules: dict[str, Any], body: object, code: str
) -> None:
    endpoint.script(answer(body, 400))
    error = refusal(OAuth2Refresher(endpoint.url, ID, SECRET, provider=_vendor(**rules)))
    assert type(error) is REAUTHORIZE
    assert error.code == code


@pytest.mark.parametrize("body", [{"fault": {}}, [], b"<html>", {"fault": {"sub": 8}}])
def test_a_rule_that_does_not_fit_the_answer_says_no(endpoint: Endpoint, body: object) -> None:
    """Whatever it raises."""
    endpoint.script(answer(body, 400))
    vendor = _vendor(is_invalid_grant=lambda body: body["fault"]["sub"] == 9)
    assert type(refusal(OAuth2Refresher(endpoint.url, ID, SECRET, provider=vendor))) is REFUSED


CAMEL = {"accessToken": "gho_new", "refreshToken": "ghr_next", "expiresIn": 3600}


def from_camel(body: Any) -> dict[str, Any]:
    return {
        "access_token": body["accessToken"],
        "refresh_token": body["refreshToken"],
        "expires_in": body["expiresIn"],
    }


@pytest.mark.parametrize(
    ("read", "body"),
    [
        (from_camel, CAMEL),
        (lambda body: body["data"], {"code": 0, "msg": "ok", "data": GOOD}),
        (lambda body: body["data"]["token"], {"data": {"token": GOOD}, "status": "invalid_grant"}),
        (lambda body: body[0], [GOOD]),
    ],
    ids=["other names", "an envelope", "two levels", "a list"],
)
def test_tokens_in_another_place(endpoint: Endpoint, read: Any, body: object) -> None:
    endpoint.script(answer(body))
    tokens = refresh(OAuth2Refresher(endpoint.url, ID, SECRET, provider=_vendor(read=read)))
    assert tokens.items() >= {"access_token": "gho_new", "refresh_token": "ghr_next", "expires_in": 3600}.items()


def test_a_reader_does_not_hide_a_refusal(endpoint: Endpoint) -> None:
    """It raises an exception for one, or finds nothing there."""
    for body in ({"error": "invalid_grant"}, {"error": "invalid_grant", "data": {}}):
        endpoint.script(answer(body, 400))
        vendor = _vendor(read=lambda body: body["data"])
        assert type(refusal(OAuth2Refresher(endpoint.url, ID, SECRET, provider=vendor))) is REAUTHORIZE
    endpoint.script(answer({"data": 7}))
    error = refusal(OAuth2Refresher(endpoint.url, ID, SECRET, provider=_vendor(read=lambda body: body["data"])))
    assert (type(error), error.code) == (UNAVAILABLE, "invalid_response")


@pytest.mark.parametrize("more", [{"error": "none"}, {"error": "0"}, {"status": "invalid_grant"}, {"errors": ["x"]}])
def test_a_pair_beside_an_unknown_error_is_kept(endpoint: Endpoint, more: dict[str, Any]) -> None:
    """With HTTP 2xx it is the only copy of the pair; only a code that is known to be a refusal counts for more."""
    endpoint.script(answer({**GOOD, **more}))
    assert refresh(OAuth2Refresher(endpoint.url, ID, SECRET)) == {**GOOD, **more}
