"""An answer of the token endpoint is either tokens or one of three errors."""

from __future__ import annotations

import asyncio
import json
import re
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.oauth2_calls import ACCESS, GOOD, ID, REFRESH, ROTATIONS, SECRET, record, refresh, refusal
from support.scripted_endpoint import FORM, Endpoint, answer
from tokenstore import ProviderRefusedError, ProviderUnavailableError, ReauthorizationRequiredError, RefreshError
from tokenstore.integrations import _answers
from tokenstore.integrations.oauth2 import OAuth2Refresher
from tokenstore.integrations.presets import PROVIDERS
from tokenstore.integrations.providers import Rotation

# -- kinds of answers ------------------------------------------------------------------------------

REAUTHORIZE, UNAVAILABLE, REFUSED = ReauthorizationRequiredError, ProviderUnavailableError, ProviderRefusedError


@pytest.mark.parametrize(
    ("preset", "status", "body", "kind", "code"),
    [
        ("", 400, {"error": "invalid_grant", "error_description": REFRESH}, REAUTHORIZE, "invalid_grant"),
        ("", 200, {"error": "invalid_grant", **GOOD}, REAUTHORIZE, "invalid_grant"),
        ("", 500, {"error": "invalid_grant"}, REAUTHORIZE, "invalid_grant"),
        ("", 400, {"error": "bad_refresh_token"}, REFUSED, "bad_refresh_token"),
        ("", 401, {"error": "invalid_client"}, REFUSED, "invalid_client"),
        ("", 400, {"error": "unauthorized_client"}, REFUSED, "unauthorized_client"),
        ("", 400, {"error": "invalid_request"}, REFUSED, "invalid_request"),
        ("", 400, {"error": "unsupported_grant_type"}, REFUSED, "unsupported_grant_type"),
        ("", 400, {"error": "invalid_scope"}, REFUSED, "invalid_scope"),
        ("", 404, b"<html>", REFUSED, "http_404"),
        ("", 403, [], REFUSED, "http_403"),
        ("", 400, {"error": {"message": "x"}}, REFUSED, "http_400"),
        ("", 400, {"error": f"refused {REFRESH}"}, REFUSED, "http_400"),
        ("", 400, {"error": REFRESH}, REFUSED, "http_400"),
        ("", 400, {"error": f"x-{ACCESS}"}, REFUSED, "http_400"),
        ("", 400, {"error": "gho_new", "access_token": "gho_new"}, REFUSED, "http_400"),
        ("", 400, {"error": "E" * 65}, REFUSED, "http_400"),
        ("", 200, {"error": "access_denied"}, REFUSED, "access_denied"),
        ("", 429, {"error": "slow_down"}, UNAVAILABLE, "slow_down"),
        ("", 408, b"", UNAVAILABLE, "http_408"),
        ("", 500, b"<html>", UNAVAILABLE, "http_500"),
        ("", 503, {"error": "temporarily_unavailable"}, UNAVAILABLE, "temporarily_unavailable"),
        ("", 400, {"error": "temporarily_unavailable"}, UNAVAILABLE, "temporarily_unavailable"),
        ("", 400, {"error": "server_error"}, UNAVAILABLE, "server_error"),
        ("", 200, b"", UNAVAILABLE, "invalid_response"),
        ("", 204, b"", UNAVAILABLE, "invalid_response"),
        ("", 200, b"<html>gho_new</html>", UNAVAILABLE, "invalid_response"),
        ("", 200, b"\xff\xfe\xff", UNAVAILABLE, "invalid_response"),
        ("", 200, b"[" * 100_000, UNAVAILABLE, "invalid_response"),
        ("", 200, b'{"access_token": "gho_new"', UNAVAILABLE, "invalid_response"),
        ("", 200, [GOOD], UNAVAILABLE, "invalid_response"),
        ("", 200, {}, UNAVAILABLE, "invalid_response"),
        ("", 200, {"access_token": ""}, UNAVAILABLE, "invalid_response"),
        ("", 200, {"access_token": 7}, UNAVAILABLE, "invalid_response"),
        ("", 200, {"access_token": "\ud800"}, UNAVAILABLE, "invalid_response"),
        ("", 200, {"authed_user": GOOD}, UNAVAILABLE, "invalid_response"),
        ("github", 200, {"error": "bad_refresh_token"}, REAUTHORIZE, "bad_refresh_token"),
        ("github", 200, {"error": "incorrect_client_credentials"}, REFUSED, "incorrect_client_credentials"),
        ("slack", 200, {"ok": False, "error": "invalid_refresh_token"}, REAUTHORIZE, "invalid_refresh_token"),
        ("slack", 200, {"ok": False, "error": "bad_client_secret"}, REFUSED, "bad_client_secret"),
        ("slack", 200, {"ok": False, "error": "internal_error"}, UNAVAILABLE, "internal_error"),
        ("slack", 429, {"ok": False, "error": "ratelimited"}, UNAVAILABLE, "ratelimited"),
        ("slack", 200, {"ok": False, **GOOD}, REFUSED, "http_200"),
        ("microsoft", 400, {"error": "interaction_required"}, REAUTHORIZE, "interaction_required"),
        ("microsoft", 400, {"error": "consent_required"}, REAUTHORIZE, "consent_required"),
        (
            "atlassian",
            403,
            {"error": "unauthorized_client", "error_description": "refresh_token is invalid"},
            REAUTHORIZE,
            "unauthorized_client",
        ),
        (
            "atlassian",
            401,
            {"error": "unauthorized_client", "error_description": "something else"},
            REFUSED,
            "unauthorized_client",
        ),
    ],
)
def test_each_kind_of_answer_raises_its_error(
    endpoint: Endpoint, preset: str, status: int, body: object, kind: type[RefreshError], code: str
) -> None:
    """The error code decides, then the status. The error contains only a harmless code, never a description."""
    endpoint.script(answer(body, status))
    error = refusal(OAuth2Refresher(endpoint.url, ID, SECRET, provider=PROVIDERS.get(preset)))
    assert type(error) is kind
    assert error.code == code
    assert len(endpoint.received) == 1
    assert (PROVIDERS[preset].name if preset else "127.0.0.1") in str(error)


def test_slack_s_tokens_can_be_inside_authed_user(endpoint: Endpoint) -> None:
    """The tokens in `authed_user` are used if the top level has none; the other fields are kept."""
    endpoint.script(answer({"ok": True, "team": {"id": "T1"}, "authed_user": {"id": "U1", **GOOD}}))
    tokens = refresh(OAuth2Refresher(endpoint.url, ID, SECRET, provider=PROVIDERS["slack"]))
    assert tokens.items() >= {"access_token": "gho_new", "refresh_token": "ghr_next", "id": "U1"}.items()
    assert tokens["team"] == {"id": "T1"}
    endpoint.script(answer({"ok": True, "access_token": "xoxb", "authed_user": {"access_token": "xoxp"}}))
    assert refresh(OAuth2Refresher(endpoint.url, ID, SECRET, provider=PROVIDERS["slack"]))["access_token"] == "xoxb"


@pytest.mark.parametrize("media_type", [FORM, f"{FORM.upper()} ; charset=utf-8"])
def test_an_answer_can_be_form_encoded(endpoint: Endpoint, media_type: str) -> None:
    """GitHub encodes its answers and errors as a form unless the request asks for JSON."""
    endpoint.script(answer(b"access_token=gho%2Bnew&expires_in=28800&scope=&x=%C3%BC+y", 200, Content_Type=media_type))
    tokens = refresh(OAuth2Refresher(endpoint.url, ID, SECRET))
    assert tokens == {"access_token": "gho+new", "expires_in": "28800", "x": "ü y"}
    endpoint.script(answer(b"error=invalid_grant&error_description=x", 200, Content_Type=media_type))
    assert type(refusal(OAuth2Refresher(endpoint.url, ID, SECRET))) is REAUTHORIZE


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(endpoint: Endpoint, status: int) -> None:
    """It would send the secret to another server. Also with a client that otherwise follows redirects."""
    endpoint.script(answer(GOOD, status, Location=endpoint.url))

    async def main() -> None:
        async with httpx.AsyncClient(trust_env=False, follow_redirects=True) as client:
            with pytest.raises(ProviderRefusedError, match="redirect") as caught:
                await OAuth2Refresher(endpoint.url, ID, SECRET, http_client=client)(record())
            assert caught.value.code == "redirect"

    asyncio.run(main())
    assert type(refusal(OAuth2Refresher(endpoint.url, ID, SECRET, rotation="none"))) is REFUSED
    assert len(endpoint.received) == 2


NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "date", "expected"),
    [
        ("0", None, 0),
        ("120", None, 120),
        ("00120", None, 120),
        ("3601", None, 3600),
        ("9" * 5000, None, 3600),
        ("-5", None, None),
        ("1.5", None, 1.5),
        ("120.5", None, 120.5),
        ("3600.5", None, 3600),
        ("1.5.5", None, None),
        (".5", None, None),
        ("soon", None, None),
        ("", None, None),
        ("٣", None, None),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), NOW, 90),
        (format_datetime(NOW - timedelta(seconds=90), usegmt=True), NOW, 0),
        (format_datetime(NOW + timedelta(days=90), usegmt=True), NOW, 3600),
        ("Monday, 23-Nov-26 12:01:00 GMT", NOW, 60),
        ("Mon Nov 23 12:01:00 2026", NOW, 60),
        ("Mon, 23 Nov 99999 12:01:00 GMT", NOW, None),
        ("Mon, 23 Nov 2026 12:01:00 +9999", NOW, None),
    ],
)
def test_retry_after_is_read_as_seconds_or_a_date(value: str, date: datetime | None, expected: float | None) -> None:
    """A date is compared with the server's clock (RFC 9110 section 10.2.3). The time is between zero and an hour."""
    headers = [
        (b"Retry-After", value.encode()),
        (b"Date", format_datetime(date, usegmt=True).encode() if date else b""),
    ]
    assert _answers.retry_after(httpx.Headers(headers)) == expected


def test_without_a_date_header_retry_after_is_compared_with_this_machine_s_clock() -> None:
    """The server's clock is not known."""
    soon = datetime.now(UTC) + timedelta(seconds=100)
    wait = _answers.retry_after(httpx.Headers({"Retry-After": format_datetime(soon, usegmt=True), "Date": "today"}))
    assert wait is not None
    assert 90 < wait <= 100


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize(("status", "kind"), [(429, UNAVAILABLE), (503, UNAVAILABLE), (403, REFUSED)])
def test_retry_after_is_passed_on_and_prevents_a_second_attempt(
    endpoint: Endpoint, status: int, kind: type[RefreshError], rotation: Rotation
) -> None:
    """A provider that names a retry time is not called again before it, with any kind of rotation."""
    endpoint.script(answer({}, status, Retry_After="30"))
    error = refusal(OAuth2Refresher(endpoint.url, ID, SECRET, rotation=rotation))
    assert isinstance(error, kind)
    assert isinstance(error, ProviderUnavailableError | ProviderRefusedError)
    assert error.retry_after == 30
    assert len(endpoint.received) == 1


# -- generated answers -----------------------------------------------------------------------------

BODIES = st.binary(max_size=200) | st.builds(
    lambda value: json.dumps(value).encode(),
    st.dictionaries(
        st.sampled_from(["access_token", "error", "error_description", "ok", "expires_in", "authed_user", "x"]),
        st.none()
        | st.booleans()
        | st.floats()
        | st.text(max_size=20)
        | st.sampled_from(["invalid_grant", REFRESH, ACCESS, SECRET, "server_error"])
        | st.dictionaries(st.just("access_token"), st.text(max_size=5)),
    ),
)


@given(
    body=BODIES,
    status=st.sampled_from([200, 201, 204, 302, 400, 401, 403, 429, 500, 503]) | st.integers(200, 599),
    media_type=st.sampled_from(["application/json", FORM, "text/html", ""]),
    coding=st.sampled_from(["", "", "", "gzip", "identity", "br"]),
    retry_after=st.none() | st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]), max_size=20),
    preset=st.none() | st.sampled_from(sorted(PROVIDERS)),
)
def test_any_answer_is_tokens_or_one_of_three_errors(
    target: Endpoint,
    body: bytes,
    status: int,
    media_type: str,
    coding: str,
    retry_after: str | None,
    preset: str | None,
) -> None:
    """This is true for every generated answer, and no error contains a secret."""
    length = "" if status in (204, 304) else str(len(body))
    headers = {"Retry-After": retry_after or "", "Content-Type": media_type, "Content-Encoding": coding}
    sent = b"" if status in (204, 304) else body
    target.script(answer(sent, status, **{**headers, "Content-Length": length}))
    vendor = PROVIDERS.get(preset or "")
    refresher = OAuth2Refresher(target.url, ID, SECRET, provider=vendor, rotation="strict")
    try:
        tokens = asyncio.run(refresher(record()))
    except (ReauthorizationRequiredError, ProviderUnavailableError, ProviderRefusedError) as error:
        assert re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", error.code)  # noqa: PT017 - both outcomes are allowed
        wait = getattr(error, "retry_after", None)
        assert wait is None or 0 <= wait <= 3600
        text = f"{error}{error.code}{error!r}{error.__cause__}{error.__context__}"
        assert not [secret for secret in (REFRESH, ACCESS, SECRET) if secret in text]
    else:
        assert isinstance(tokens["access_token"], str)
        assert tokens["access_token"]
