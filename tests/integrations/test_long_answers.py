"""Answers that are too long, or compressed."""

from __future__ import annotations

import gzip
import json
import socket
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress

import pytest

from support.oauth2_calls import GOOD, ID, SECRET, refresh, refusal
from support.scripted_endpoint import Endpoint, Step, answer
from tokenstore import ProviderUnavailableError
from tokenstore.integrations import _answers
from tokenstore.integrations.oauth2 import OAuth2Refresher


def flood(connection: socket.socket) -> None:
    """Send chunks without end."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    with suppress(OSError):
        while True:
            connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")


@pytest.mark.parametrize(
    "step",
    [answer(b" " * (_answers.MAX_BYTES + 1)), answer(b" " * 2_000_000, 400), flood],
    ids=["one byte too many", "an error", "without end"],
)
def test_an_answer_over_the_limit_is_not_read_to_its_end(endpoint: Endpoint, step: Step) -> None:
    """The Content-Length does not matter, and the request is not repeated."""

    def send(connection: socket.socket) -> None:
        with suppress(OSError):
            connection.sendall(step) if isinstance(step, bytes) else step(connection)

    endpoint.script(send)
    error = refusal(OAuth2Refresher(endpoint.url, ID, SECRET, rotation="none"))
    assert isinstance(error, ProviderUnavailableError)
    assert error.code == "invalid_response"
    assert len(endpoint.received) == 1


def test_an_answer_of_exactly_the_limit_is_read(endpoint: Endpoint) -> None:
    """Only longer answers are refused."""
    body = json.dumps(GOOD).encode().ljust(_answers.MAX_BYTES)
    endpoint.script(answer(body))
    assert refresh(OAuth2Refresher(endpoint.url, ID, SECRET)) == GOOD


@pytest.mark.parametrize(
    ("coding", "compress"), [("gzip", gzip.compress), ("X-GZip ", gzip.compress), ("deflate", zlib.compress)]
)
def test_a_compressed_answer_is_read(endpoint: Endpoint, coding: str, compress: Callable[[bytes], bytes]) -> None:
    """The request did not ask for compression, but the answer may contain the only copy of the tokens."""
    endpoint.script(answer(compress(json.dumps(GOOD).encode()), 200, Content_Encoding=coding))
    assert refresh(OAuth2Refresher(endpoint.url, ID, SECRET)) == GOOD


def test_a_compressed_answer_is_not_decompressed_beyond_the_limit(endpoint: Endpoint) -> None:
    """The limit applies to the decompressed size, and decompression stops there."""
    bomb = gzip.compress(bytes(64 * 1024 * 1024))
    assert len(bomb) < _answers.MAX_BYTES
    endpoint.script(answer(bomb, 200, Content_Encoding="gzip"))
    refresher = OAuth2Refresher(endpoint.url, ID, SECRET)
    tracemalloc.start()
    try:
        assert refusal(refresher).code == "invalid_response"
        assert tracemalloc.get_traced_memory()[1] < 16 * 1024 * 1024
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("coding", "body"), [("gzip", b"no gzip"), ("br", b"{}"), ("gzip, gzip", b"{}")])
def test_an_answer_with_an_unreadable_content_coding_is_an_outage(endpoint: Endpoint, coding: str, body: bytes) -> None:
    endpoint.script(answer(body, 200, Content_Encoding=coding))
    assert refusal(OAuth2Refresher(endpoint.url, ID, SECRET)).code == "invalid_response"
