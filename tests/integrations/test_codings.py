"""Bodies that arrive as `br` or `zstd`, although the request asks for no compression."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import httpx
import pytest

from support.oauth2_calls import GOOD, ID, SECRET, record, refresh, refusal
from support.scripted_endpoint import Endpoint, answer
from tokenstore import ProviderRefusedError, ProviderUnavailableError, ReauthorizationRequiredError
from tokenstore.integrations.oauth2 import OAuth2Refresher

brotli: Any = import_module("brotli")  # it has no type hints
zstd: Any = import_module("backports.zstd" if sys.version_info < (3, 14) else "compression.zstd")
JSON = json.dumps(GOOD).encode()
MODULES = {"br": brotli.__name__, "zstd": zstd.__name__}
REMEDIES = {
    "br": 'pip install "brotli>=1.2"',
    "zstd": 'pip install "backports.zstd>=1.0"' if sys.version_info < (3, 14) else "built without zstd",
}
COMPRESS: dict[str, Callable[[bytes], bytes]] = {"br": brotli.compress, "zstd": zstd.compress}
CODINGS = pytest.mark.parametrize("coding", sorted(MODULES))


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Make a coding's module one that is missing; returns the remedy."""

    def remove(coding: str) -> str:
        monkeypatch.setitem(sys.modules, MODULES[coding], None)
        return REMEDIES[coding]

    return remove


def compressed(coding: str, body: bytes, status: int = 200, **headers: str) -> bytes:
    return answer(COMPRESS[coding](body), status, Content_Encoding=coding, **headers)


@CODINGS
def test_a_compressed_pair_is_read_if_the_module_is_there(endpoint: Endpoint, coding: str) -> None:
    endpoint.script(compressed(coding, JSON))
    assert refresh(OAuth2Refresher(endpoint.url, ID, SECRET)) == GOOD
    assert endpoint.received[0].headers["accept-encoding"] == "identity"
    endpoint.script(answer(COMPRESS[coding](COMPRESS[coding](JSON)), Content_Encoding=f"{coding}, {coding}"))
    assert refresh(OAuth2Refresher(endpoint.url, ID, SECRET)) == GOOD
    endpoint.script(compressed(coding, b'{"error": "invalid_grant"}', 400))
    assert type(refusal(OAuth2Refresher(endpoint.url, ID, SECRET))) is ReauthorizationRequiredError


@CODINGS
@pytest.mark.parametrize("rotation", ["strict", "none"])
@pytest.mark.parametrize("status", [200, 400])
def test_without_the_module_the_error_says_what_to_do(
    endpoint: Endpoint, without: Callable[[str], str], coding: str, rotation: Any, status: int
) -> None:
    """The request may have used the refresh token, so the outcome is unknown. A repetition would not be readable."""
    remedy = without(coding)
    endpoint.script(compressed(coding, JSON, status))
    error = refusal(OAuth2Refresher(endpoint.url, ID, SECRET, rotation=rotation))
    assert type(error) is ProviderUnavailableError
    assert error.code == "invalid_response"
    assert f"HTTP {status}" in str(error)
    assert f"Content-Encoding: {coding}" in str(error)
    assert remedy in str(error)
    assert "it is unknown what the request did" in str(error)
    assert len(endpoint.received) == 1


def test_brotli_without_a_limit_of_its_output_counts_as_missing(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 1.2 a body of a few bytes could fill the memory."""

    class Decompressor:
        process = brotli.Decompressor.process

    monkeypatch.setattr(brotli, "Decompressor", Decompressor)
    endpoint.script(compressed("br", JSON))
    assert 'pip install "brotli>=1.2"' in str(refusal(OAuth2Refresher(endpoint.url, ID, SECRET)))


def test_no_coding_is_asked_for_whatever_the_http_client_would_ask_for(endpoint: Endpoint) -> None:
    """Httpx asks for the codings whose packages are installed; a passed client may ask for any."""

    async def main() -> None:
        headers = {"Accept-Encoding": "br, zstd"}
        async with httpx.AsyncClient(trust_env=False, headers=headers) as client:
            await OAuth2Refresher(endpoint.url, ID, SECRET, http_client=client)(record())

    endpoint.script(answer(GOOD))
    asyncio.run(main())
    assert endpoint.received[0].headers["accept-encoding"] == "identity"


@CODINGS
def test_a_broken_body_names_its_coding_and_no_package(endpoint: Endpoint, coding: str) -> None:
    body = COMPRESS[coding](JSON)
    endpoint.script(answer(body[:20] + b"\xff" * 9, Content_Encoding=coding))
    error = refusal(OAuth2Refresher(endpoint.url, ID, SECRET))
    assert f"Content-Encoding: {coding}" in str(error)
    assert "pip" not in str(error)


def test_a_made_up_coding_is_not_shown(endpoint: Endpoint) -> None:
    """The header's text is not the provider's to choose: a token in it would be in the message."""
    endpoint.script(answer(b"\x00\x01", Content_Encoding="gho_new"))
    assert "Content-Encoding: an unknown coding" in str(refusal(OAuth2Refresher(endpoint.url, ID, SECRET)))


@CODINGS
def test_the_status_counts_where_it_says_enough(endpoint: Endpoint, without: Callable[[str], str], coding: str) -> None:
    """A limit, an outage and a redirect are what they are whatever their body says."""
    without(coding)
    endpoint.script(compressed(coding, b"{}", 429, Retry_After="7"))
    error = refusal(OAuth2Refresher(endpoint.url, ID, SECRET))
    assert (error.code, getattr(error, "retry_after", None)) == ("http_429", 7)
    endpoint.script(compressed(coding, b"{}", 302))
    assert type(refusal(OAuth2Refresher(endpoint.url, ID, SECRET))) is ProviderRefusedError


@CODINGS
def test_a_successful_revocation_may_have_any_body(
    endpoint: Endpoint, without: Callable[[str], str], coding: str
) -> None:
    """Only its status counts (RFC 7009 section 2.2)."""
    without(coding)
    endpoint.script(compressed(coding, b"{}"))
    asyncio.run(OAuth2Refresher(endpoint.url, ID, SECRET, revocation_url=endpoint.url).revoke(record()))


@CODINGS
def test_a_body_that_grows_beyond_the_limit_is_not_read(endpoint: Endpoint, coding: str) -> None:
    endpoint.script(compressed(coding, b'{"access_token": "' + b"a" * 50_000_000 + b'"}'))
    assert "more than 1048576 bytes" in str(refusal(OAuth2Refresher(endpoint.url, ID, SECRET)))
