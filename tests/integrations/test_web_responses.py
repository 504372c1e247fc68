"""The rule of the web frameworks' adapters: which requests show a page, and what the responses contain."""

from __future__ import annotations

import logging

import pytest

from tokenstore.errors import BackendUnavailableError, ProviderUnavailableError
from tokenstore.integrations._web import outage_answer, shows_a_page

_FIREFOX = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


@pytest.mark.parametrize(
    ("headers", "page"),
    [
        ({"sec-fetch-mode": "navigate"}, True),
        ({"sec-fetch-mode": "navigate", "accept": "*/*"}, True),
        ({"sec-fetch-mode": "cors", "accept": _FIREFOX}, False),
        ({"sec-fetch-mode": "same-origin", "accept": "text/html"}, False),
        ({"accept": _FIREFOX}, True),
        ({"accept": "TEXT/HTML"}, True),
        ({"accept": "text/html;level=1, application/json;q=0.9"}, True),
        ({"accept": _FIREFOX, "x-requested-with": "XMLHttpRequest"}, False),
        ({"accept": "application/json, text/html;q=0.9"}, False),
        ({"accept": "text/html;q=0.5, application/json;q=0.500"}, True),
        ({"accept": "text/html;q=0"}, False),
        ({"accept": "text/html;q=0.000, */*"}, False),
        ({"accept": "text/html;q=nan"}, False),
        ({"accept": "text/html;q=9"}, False),
        ({"accept": "text/html;q="}, False),
        ({"accept": "*/*"}, False),
        ({"accept": "text/*"}, False),
        ({"accept": ",;,"}, False),
        ({}, False),
    ],
)
def test_a_browser_s_navigation_shows_a_page(headers: dict[str, str], page: bool) -> None:
    def header(name: str) -> str | None:
        return headers.get(name.lower())

    assert shows_a_page("GET", header) is page
    assert shows_a_page("HEAD", header) is page
    assert not shows_a_page("POST", header)


def test_an_outage_is_logged_because_its_response_does_not_say_it(caplog: pytest.LogCaptureFixture) -> None:
    answer = outage_answer(BackendUnavailableError("no connection to db.internal"))
    assert "db.internal" not in str(answer)
    assert caplog.record_tuples == [
        ("tokenstore.web", logging.WARNING, "BackendUnavailableError: no connection to db.internal")
    ]


@pytest.mark.parametrize(("seconds", "header"), [(None, "1"), (0.0, "1"), (0.2, "1"), (30.0, "30"), (30.01, "31")])
def test_a_client_never_comes_back_before_the_retry_time(seconds: float | None, header: str) -> None:
    assert outage_answer(ProviderUnavailableError("down", retry_after=seconds)).headers["Retry-After"] == header
