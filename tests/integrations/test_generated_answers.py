"""Generated answers of a token endpoint, over real HTTP into a store: a pair that a person could read is stored."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import zlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.oauth2_calls import ACCESS, ID, REFRESH, SECRET, show_no_secret
from support.scripted_endpoint import FORM, Endpoint, answer
from tokenstore import Keyring, RefreshError, TokenRecord, open_store
from tokenstore.integrations.oauth2 import OAuth2Refresher
from tokenstore.integrations.presets import PROVIDERS

SOAK = settings(max_examples=10_000)


@dataclass(frozen=True)
class Said:
    """An answer, and the pair in it; without a refresh token the old one stays."""

    pair: tuple[str, str]
    body: bytes
    headers: dict[str, str]
    status: int = 200


def raw_deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush()


TOKEN = st.from_regex(r"[A-Za-z0-9_~+/.-]{1,40}=?", fullmatch=True)
TEXT = st.text(max_size=12) | st.text(st.characters(max_codepoint=255), max_size=12)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda some: st.lists(some, max_size=3) | st.dictionaries(TEXT, some, max_size=3),
    max_leaves=5,
)
NUMBER: st.SearchStrategy[Any] = (
    st.integers()
    | st.floats()
    | st.sampled_from(["", "0", "-1", "never", "3600", "1e999", " 7 ", None, True, [], {}, 10**400, 2**53])
    | st.integers(10**9, 2 * 10**18)
    | st.datetimes().map(datetime.isoformat)
)
NUMBERS = st.dictionaries(
    st.sampled_from(
        [
            *("expires_in", "expires_at", "expires_on", "expiry_date", "expiry", "access_token_expires_at"),
            *("refresh_token_expires_in", "refresh_expires_in", "refresh_token_expires_at", "ext_expires_in"),
        ]
    ),
    NUMBER,
    max_size=3,
)
# What a pair may stand beside. Not `error` with a code of the RFC, nor `"ok": false`: these are refusals.
NEIGHBOURS = st.dictionaries(
    st.sampled_from(["scope", "token_type", "id_token", "name", "data", "status", "errors", "message", "authed_user"])
    | st.from_regex(r"[a-z]{1,3}", fullmatch=True).map("x_".__add__),
    VALUE,
    max_size=4,
) | st.just({"error": "none"})
CONTENT_TYPES = st.sampled_from(
    [
        *("application/json", "application/json; charset=utf-8", "application/json;charset=ISO-8859-1", "text/html"),
        *("text/plain; charset=no-such", "text/javascript", FORM, "", "?", "application/json; charset", "a/b; =;;"),
    ]
)
CODINGS = st.sampled_from(["", "", "identity", "utf-8", "br", "gzip", "deflate", "gzip, deflate"])


@st.composite
def answers(draw: st.DrawFn) -> Said:
    access, refresh = draw(TOKEN), draw(st.none() | TOKEN)
    fields: dict[str, Any] = draw(NEIGHBOURS) | draw(NUMBERS) | {"access_token": access}
    if refresh is not None:
        fields["refresh_token"] = refresh
    fields = dict(draw(st.permutations(list(fields.items()))))
    body = draw(form_bodies(fields) if draw(st.integers(0, 3)) == 0 else json_bodies(fields))
    coding = draw(CODINGS)
    packers: list[Any] = [bytes, bytes, gzip.compress, *([zlib.compress, raw_deflate] if "deflate" in coding else [])]
    compress = draw(st.sampled_from(packers))
    headers = {"Content-Type": draw(CONTENT_TYPES), "Content-Encoding": coding}
    return Said((access, refresh or REFRESH), compress(body), headers, draw(st.sampled_from([200, 200, 201, 203])))


@st.composite
def json_bodies(draw: st.DrawFn, fields: dict[str, Any]) -> bytes:
    text = json.dumps(fields, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 2])))
    shape = draw(st.sampled_from(["plain"] * 4 + ["twice", "before", "after"]))
    if shape == "twice":
        text = json.dumps(text)
    elif shape == "before":
        text = draw(st.sampled_from([")]}',\n", "while(1);", "<b>Notice</b>: x in a.php\n", "\0\r\n"])) + text
    elif shape == "after":
        text += draw(st.sampled_from(["\0", "\n<!-- x -->", ";", "\r\n\r\n"]))
    elif draw(st.booleans()):  # control characters that are not escaped
        text = re.sub(r"\\[nrt]", "\t", text) if "\\\\" not in text else text
    encoding = draw(st.sampled_from(["utf-8"] * 3 + ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1"]))
    if encoding.startswith("utf-16") and (shape == "before" or (encoding != "utf-16" and shape != "plain")):
        encoding = "utf-8"  # what is in front looks like another encoding's mark, or there is none
    data = text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")
    if encoding in ("utf-8", "latin-1") and shape == "plain" and draw(st.booleans()):
        end = data.rindex(b"}")
        data = (
            data[:end] + b', "broken": "' + draw(st.sampled_from([b"\xff", b"\xc3", b"\xe2\x82", b"Jos\xe9 M"])) + b'"}'
        )
    return data


@st.composite
def form_bodies(draw: st.DrawFn, fields: dict[str, Any]) -> bytes:
    texts = {name: str(value)[:2000] if abs_int(value) else value for name, value in fields.items()}
    text = urlencode(texts, errors="replace")
    return draw(
        st.sampled_from(
            [
                text.encode(),
                b"\xef\xbb\xbf" + text.encode() + b"\n",
                text.encode() + b"&broken=%FF\xff&=&x&%",
                # Tokens that are not encoded, as by a program that writes `access_token=$token`.
                "&".join(f"{k}={v}" for k, v in fields.items() if k in ("access_token", "refresh_token")).encode(),
            ]
        )
    )


def abs_int(value: object) -> bool:
    return not isinstance(value, int) or abs(value) < 10**1000


def check_pair_is_stored(endpoint: Endpoint, keyring: Keyring, said: Said) -> None:
    endpoint.script(answer(said.body, said.status, **{**said.headers, "Content-Length": str(len(said.body))}))

    async def main() -> TokenRecord | None:
        refreshers = {"github": OAuth2Refresher(endpoint.url, ID, SECRET)}
        async with open_store("memory://", keyring=keyring, refreshers=refreshers) as store:
            expired = datetime.now(UTC) - timedelta(hours=1)
            await store.store_tokens("github", "u1", ACCESS, REFRESH, expired)
            await store.load_fresh_tokens("github", "u1")
            return await store.load_tokens("github", "u1")

    record = asyncio.run(main())
    assert record is not None
    assert (record["access_token"], record["refresh_token"]) == said.pair
    expiry = record["refresh_token_expires_at"]
    assert expiry is None or expiry > datetime.now(UTC) - timedelta(seconds=60), "a refresh token was just issued"
    assert len(endpoint.received) == 1


def check_any_answer(endpoint: Endpoint, keyring: Keyring, said: Said, preset: str) -> None:
    endpoint.script(answer(said.body, said.status, **{**said.headers, "Content-Length": str(len(said.body))}))

    async def main() -> None:
        refresher = OAuth2Refresher(endpoint.url, ID, SECRET, provider=PROVIDERS.get(preset), rotation="strict")
        async with open_store("memory://", keyring=keyring, refreshers={"github": refresher}) as store:
            expired = datetime.now(UTC) - timedelta(hours=1)
            await store.store_tokens("github", "u1", ACCESS, REFRESH, expired)
            try:
                await store.load_fresh_tokens("github", "u1")
            except RefreshError as error:  # any other error is a finding
                show_no_secret(error)
                assert re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", error.code)  # noqa: PT017 - either outcome is good

    asyncio.run(main())


def damaged() -> st.SearchStrategy[Said]:
    """Answers of any status with bytes cut out of them or put in, and errors with secrets in them."""
    errors = st.dictionaries(
        st.sampled_from(["error", "errors", "error_description", "status", "code", "ok", "error_code"]),
        VALUE | st.sampled_from([REFRESH, ACCESS, SECRET, "invalid_grant", "invalid_client", f"x {REFRESH}", False]),
        max_size=4,
    ).map(lambda fields: json.dumps(fields).encode())

    def damage(said: Said, at: int, gone: int, new: bytes, status: int) -> Said:
        at %= len(said.body) + 1
        body = said.body[:at] + new + said.body[at + gone :]
        return Said(said.pair, body, said.headers, status)

    statuses = st.sampled_from([200, 200, 200, 302, 400, 401, 403, 429, 500, 503])
    damages = st.builds(damage, answers(), st.integers(0, 5000), st.integers(0, 9), st.binary(max_size=4), statuses)
    headers = st.fixed_dictionaries({"Content-Type": CONTENT_TYPES, "Content-Encoding": CODINGS})
    return damages | st.builds(Said, st.just(("", "")), errors | st.binary(max_size=99), headers, statuses)


PRESETS = st.sampled_from(["", *sorted(PROVIDERS)])


@settings(derandomize=True, max_examples=200)
@given(said=answers())
def test_a_readable_pair_is_stored(target: Endpoint, keyring: Keyring, said: Said) -> None:
    """Whatever its media type, charset, compression, neighbours and numbers; for one request."""
    check_pair_is_stored(target, keyring, said)


@settings(derandomize=True, max_examples=200)
@given(said=damaged(), preset=PRESETS)
def test_any_other_answer_is_a_typed_error(target: Endpoint, keyring: Keyring, said: Said, preset: str) -> None:
    """With a harmless code and without a secret, if it is not a pair all the same."""
    check_any_answer(target, keyring, said, preset)


@pytest.mark.soak
@SOAK
@given(said=answers())
def test_ten_thousand_readable_pairs_are_stored(target: Endpoint, keyring: Keyring, said: Said) -> None:
    check_pair_is_stored(target, keyring, said)


@pytest.mark.soak
@SOAK
@given(said=damaged(), preset=PRESETS)
def test_ten_thousand_other_answers_are_typed_errors(
    target: Endpoint, keyring: Keyring, said: Said, preset: str
) -> None:
    check_any_answer(target, keyring, said, preset)
