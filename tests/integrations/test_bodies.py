"""A pair that has arrived is read, whatever its wrapping: media type, charset, compression, faults, a lost end."""

from __future__ import annotations

import gzip
import json
import socket
import zlib
from collections.abc import Mapping
from typing import Any

import pytest

from support.oauth2_calls import GOOD, ID, SECRET, refresh, refusal
from support.scripted_endpoint import FORM, Endpoint, answer, until_the_client_gives_up
from tokenstore import ProviderUnavailableError, ReauthorizationRequiredError
from tokenstore.integrations.oauth2 import OAuth2Refresher

JSON = json.dumps(GOOD).encode()
PAIR = {"access_token": "gho_new", "refresh_token": "ghr_next"}
NAMED = GOOD | {"name": "José"}


def tokens(endpoint: Endpoint, body: bytes, **headers: str) -> dict[str, Any]:
    """What a refresh returns for a response with this body and these headers, and HTTP 200."""
    endpoint.script(answer(body, 200, **headers))
    return refresh(OAuth2Refresher(endpoint.url, ID, SECRET))


@pytest.mark.parametrize(
    "media_type",
    [FORM, "text/plain", "text/html; charset=utf-8", "application/json", "application/octet-stream", "?", ""],
)
def test_a_form_is_read_whatever_its_media_type(endpoint: Endpoint, media_type: str) -> None:
    body = b"access_token=gho_new&refresh_token=ghr_next&expires_in=3600&scope=a+b"
    fields = {**PAIR, "expires_in": "3600", "scope": "a b"}
    assert tokens(endpoint, body, Content_Type=media_type) == fields
    assert tokens(endpoint, b"\xef\xbb\xbf" + body + b"\r\n", Content_Type=media_type) == fields
    endpoint.script(answer(b"error=invalid_grant&error_description=gho_new", 400, Content_Type=media_type))
    assert isinstance(refusal(OAuth2Refresher(endpoint.url, ID, SECRET)), ReauthorizationRequiredError)


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (b"access_token=gho_new&x=%FF&y=\xff&z=%", {"access_token": "gho_new", "x": "ÿ", "y": "ÿ", "z": "%"}),
        (b"access_token=gho+new/=&x=a+b", {"access_token": "gho+new/=", "x": "a b"}),
        (b"access_token=gho%2Bnew&&=&scope=&flag", {"access_token": "gho+new"}),
        (b"access_token=gho_new" + b"&x=1" * 5000, {"access_token": "gho_new", "x": "1"}),
    ],
    ids=["broken percent-encoding and UTF-8", "plus signs that are not encoded", "empty fields", "many fields"],
)
def test_a_form_with_faults_is_read(endpoint: Endpoint, body: bytes, fields: Mapping[str, str]) -> None:
    assert tokens(endpoint, body, Content_Type=FORM) == fields


@pytest.mark.parametrize(
    "body",
    [
        b'<a href="/login?error=x&access_token=gho_new">try again</a>',
        b"an error occurred\naccess_token=gho_new",
        b"gho_new",
        b"token=gho_new",
    ],
)
def test_text_that_only_mentions_a_token_is_no_form(endpoint: Endpoint, body: bytes) -> None:
    endpoint.script(answer(body, 200, Content_Type="text/html"))
    assert refusal(OAuth2Refresher(endpoint.url, ID, SECRET)).code == "invalid_response"


@pytest.mark.parametrize(
    ("encoding", "content_type"),
    [
        ("utf-8", "application/json"),
        ("utf-8", "application/json; charset=iso-8859-1"),
        ("utf-8-sig", "text/plain"),
        ("latin-1", "application/json"),
        ("latin-1", "application/json; charset=utf-8"),
        ("latin-1", 'application/json; charset="ISO-8859-1"'),
        ("cp1252", "application/json; charset=windows-1252"),
        ("utf-16", "application/json"),
        ("utf-16-le", "application/json; charset=utf-16"),
        ("utf-32", ""),
        ("latin-1", "application/json; charset=no-such-charset"),
        ("latin-1", "application/json; charset=hex"),
    ],
)
def test_json_is_read_whatever_its_encoding(endpoint: Endpoint, encoding: str, content_type: str) -> None:
    body = json.dumps(NAMED, ensure_ascii=False).encode(encoding)
    assert tokens(endpoint, body, Content_Type=content_type) == NAMED


def test_the_declared_charset_counts_where_the_body_is_not_utf_8(endpoint: Endpoint) -> None:
    """The second byte of a Japanese letter may look like the backslash that escapes the closing quote."""
    fields = GOOD | {"name": "表"}
    body = json.dumps(fields, ensure_ascii=False).encode("shift_jis")
    assert b"\\" in body
    assert tokens(endpoint, body, Content_Type="application/json; charset=Shift_JIS") == fields


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (JSON[:-1] + b', "name": "Jos\xe9 M\xc3\xbcller"}', GOOD | {"name": "José Müller"}),
        (JSON[:-1] + b', "note": "a\tb\r\nc\x00\x01"}', GOOD | {"note": "a\tb\r\nc\x00\x01"}),
        (b"\xef\xbb\xbf\r\n" + JSON + b"\0", GOOD),
        (b"\0\r\n" + JSON, GOOD),
        (b")]}',\n" + JSON, GOOD),
        (b"while(1);" + JSON, GOOD),
        (b"<br />\n<b>Notice</b>: x in /srv/a.php on line 7<br />\n" + JSON, GOOD),
        (JSON + b"\n<!-- served by 7 -->", GOOD),
        (json.dumps(JSON.decode()).encode(), GOOD),
        (JSON[:-1] + b', "n": ' + b"9" * 5000 + b"}", GOOD | {"n": float("inf")}),
    ],
    ids=[
        "broken UTF-8",
        "control characters",
        "a byte order mark and a NUL",
        "a NUL before it",
        "a prefix against script inclusion",
        "another prefix",
        "a warning before it",
        "a comment after it",
        "encoded twice",
        "a number of 5000 digits",
    ],
)
def test_json_with_faults_is_read(endpoint: Endpoint, body: bytes, fields: Mapping[str, Any]) -> None:
    for media_type in ("application/json", FORM):
        assert tokens(endpoint, body, Content_Type=media_type) == fields


def raw_deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush()


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("utf-8", JSON),
        ("none", JSON),
        ("br", JSON),
        ("gzip", JSON),
        ("deflate", JSON),
        ("deflate", b"access_token=gho_new&refresh_token=ghr_next"),
        ("deflate", json.dumps(GOOD, indent=2).encode()),  # its first bytes look compressed
        ("deflate", zlib.compress(JSON)),
        ("deflate", raw_deflate(JSON)),
        # Compressed, this one begins with a brace.
        ("deflate", raw_deflate(b"\xef\xbb\xbfaccess_token=gho_new&refresh_token=ghr_next")),
        ("identity, gzip", gzip.compress(JSON)),
        ("gzip, gzip", gzip.compress(gzip.compress(JSON))),
        ("", gzip.compress(JSON)),
        ("br", gzip.compress(JSON)),
    ],
    ids=map(str, range(14)),
)
def test_the_body_counts_whatever_its_content_encoding_says(endpoint: Endpoint, coding: str, body: bytes) -> None:
    assert tokens(endpoint, body, Content_Encoding=coding).items() >= PAIR.items()


@pytest.mark.parametrize(
    "body", [gzip.compress(JSON)[:-30], gzip.compress(b"access_token=gho_new")[:-9]], ids=["JSON", "form"]
)
def test_half_a_compressed_body_is_no_pair(endpoint: Endpoint, body: bytes) -> None:
    """The last token in it may be half a token."""
    endpoint.script(answer(body, 200, Content_Encoding="gzip", Content_Type=FORM))
    assert refusal(OAuth2Refresher(endpoint.url, ID, SECRET)).code == "invalid_response"


def hung(body: bytes) -> Any:
    """A response that announces more than its body, and then sends nothing until the client gives up."""

    def step(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + body)
        until_the_client_gives_up(connection)

    return step


@pytest.mark.parametrize("rotation", ["strict", "none"])
@pytest.mark.parametrize("ending", ["cut off", "hangs"])
def test_json_that_is_complete_is_read_although_more_was_announced(
    endpoint: Endpoint, rotation: Any, ending: str
) -> None:
    """A proxy that changes the body and not its Content-Length does not cost the pair, nor a second request."""
    endpoint.script(answer(JSON, 200, Content_Length="5000") if ending == "cut off" else hung(JSON))
    refresher = OAuth2Refresher(endpoint.url, ID, SECRET, rotation=rotation, timeout=0.5)
    assert refresh(refresher) == GOOD
    assert len(endpoint.received) == 1


def test_a_form_that_is_cut_off_is_not_read(endpoint: Endpoint) -> None:
    """Its last token may be half a token."""
    endpoint.script(answer(b"refresh_token=ghr_next&access_token=gho_n", 200, Content_Type=FORM, Content_Length="99"))
    error = refusal(OAuth2Refresher(endpoint.url, ID, SECRET))
    assert isinstance(error, ProviderUnavailableError)
    assert error.code == "network_error"
