"""`put`: expiries, input that is not a token response, and a terminal."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from support.command_line import ACCESS, REFRESH, RESPONSE, cli, load, shows_no_secret
from support.terminal import Terminal


@pytest.mark.parametrize(
    ("fields", "options", "expected"),
    [
        pytest.param({"expires_in": 600}, [], 600, id="number"),
        pytest.param({"expires_in": "600"}, [], 600, id="string"),
        pytest.param({"expires_in": 600.5}, [], 600.5, id="fraction"),
        pytest.param({}, [], None, id="none"),
        pytest.param({"expires_in": None}, [], None, id="null"),
        pytest.param({"expires_in": 5}, ["--expires-in", "600"], 600, id="option-wins"),
        pytest.param({"expires_at": 4102444800}, [], datetime(2100, 1, 1, tzinfo=UTC), id="unix-time"),
        pytest.param({"expires_at": "4102444800.0"}, [], datetime(2100, 1, 1, tzinfo=UTC), id="unix-string"),
        pytest.param({"expires_at": "2100-01-01T02:00:00+02:00"}, [], datetime(2100, 1, 1, tzinfo=UTC), id="iso"),
        pytest.param({"expires_in": 2**53}, [], 10**10, id="huge"),
        pytest.param({"expires_in": ""}, [], None, id="blank"),
        pytest.param({"expires_in": -1}, [], None, id="negative"),
        pytest.param({"expires_on": "4102444800"}, [], datetime(2100, 1, 1, tzinfo=UTC), id="microsoft"),
        pytest.param({"expiry_date": 4102444800000}, [], datetime(2100, 1, 1, tzinfo=UTC), id="google-milliseconds"),
        pytest.param({"expiry": "2100-01-01T01:00:00.0+01:00"}, [], datetime(2100, 1, 1, tzinfo=UTC), id="go"),
        pytest.param({"expiry": "0001-01-01T00:00:00Z"}, [], None, id="go-never"),
        pytest.param({"expires_at": "2100-01-01"}, [], datetime(2100, 1, 1, tzinfo=UTC), id="naive-is-utc"),
        pytest.param(
            {"expires_in": 5, "expires_at": 4102444800}, [], datetime(2100, 1, 1, tzinfo=UTC), id="absolute-wins"
        ),
        pytest.param(
            {"expires_in": 5}, ["--expires-at", "2100-01-01T00:00Z"], datetime(2100, 1, 1, tzinfo=UTC), id="option"
        ),
    ],
)
def test_put_reads_the_expiry_from_the_response_or_the_option(
    sqlite: str, fields: dict[str, Any], options: list[str], expected: float | datetime | None
) -> None:
    before = datetime.now(UTC)
    done = cli("put", "github", "u1", *options, url=sqlite, stdin=json.dumps({"access_token": ACCESS, **fields}))
    assert done.code == 0, done.err
    record = load(sqlite)
    assert record is not None
    found = record["access_token_expires_at"]
    if isinstance(expected, int | float):
        assert found is not None
        assert before <= found - timedelta(seconds=expected) <= datetime.now(UTC)
    else:
        assert found == expected
    assert (record["refresh_token"], record["extra"].keys() - {"expires_in"}) == (None, set())
    assert record["access_token_expiry_known"] is (expected is not None or "expiry" in fields)


@pytest.mark.parametrize(
    ("document", "options"),
    [
        pytest.param(f"{{'access_token': '{ACCESS}'}}", [], id="not-json"),
        pytest.param(json.dumps([ACCESS]), [], id="array"),
        pytest.param("[" * 200_000 + ACCESS, [], id="deep"),
        pytest.param("", [], id="empty"),
        pytest.param(json.dumps({"refresh_token": REFRESH}), [], id="no-access-token"),
        pytest.param(json.dumps({"access_token": ""}), [], id="empty-access-token"),
        pytest.param(json.dumps({"access_token": [ACCESS]}), [], id="not-text"),
        pytest.param(json.dumps({**RESPONSE, "expires_in": ACCESS}), [], id="expires_in-text"),
        pytest.param(json.dumps({**RESPONSE, "expires_in": True}), [], id="expires_in-bool"),
        pytest.param(json.dumps({**RESPONSE, "expires_in": float("nan")}), [], id="expires_in-nan"),
        pytest.param(json.dumps({"access_token": ACCESS, "expires_at": ACCESS}), [], id="expires_at-text"),
        pytest.param(json.dumps({"access_token": ACCESS, "expires_at": [1]}), [], id="expires_at-array"),
        pytest.param(json.dumps({**RESPONSE, "refresh_token_expires_in": {}}), [], id="refresh-object"),
        pytest.param(json.dumps({**RESPONSE, "pad": "x" * 5_000_000}), [], id="too-long"),
        pytest.param(json.dumps(RESPONSE), ["--expires-in", "5", "--expires-at", "2100-01-01"], id="both-options"),
        pytest.param(json.dumps(RESPONSE), ["--expires-at", "tomorrow"], id="bad-option"),
        pytest.param(json.dumps(RESPONSE), ["--refresh-expires-in", "soon"], id="no-number"),
        pytest.param(json.dumps(RESPONSE), ["--refresh-expires-in", "0"], id="refresh-option-zero"),
    ],
)
def test_put_refuses_input_that_is_not_a_token_response_without_printing_it(
    sqlite: str, document: str, options: list[str]
) -> None:
    done = cli("put", "github", "u1", *options, url=sqlite, stdin=document)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    shows_no_secret(done)
    assert load(sqlite) is None


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(json.dumps(RESPONSE).encode("utf-16"), id="utf-16"),  # as Windows PowerShell writes a file
        pytest.param(json.dumps(RESPONSE).encode("utf-8-sig"), id="byte-order-mark"),
        pytest.param(f"access_token={ACCESS}&refresh_token={REFRESH}&expires_in=600".encode(), id="form"),
    ],
)
def test_put_reads_a_response_as_it_was_received(sqlite: str, document: bytes) -> None:
    """In every encoding and as a form, like a refresh."""
    done = cli("put", "github", "u1", url=sqlite, stdin=document)
    assert done.code == 0, done.err
    record = load(sqlite)
    assert record is not None
    assert (record["access_token"], record["refresh_token"]) == (ACCESS, REFRESH)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"refresh_token_expires_in": 0}, None),
        ({"refresh_token_expires_in": -1}, None),
        ({"refresh_token_expires_in": ""}, None),
        ({"refresh_expires_in": 0}, None),
        ({"refresh_token_expires_at": 0}, None),
        ({"refresh_token_expires_at": 946684800}, None),  # the provider will say whether it has expired
        ({"refresh_token_expires_at": 4102444800000}, datetime(2100, 1, 1, tzinfo=UTC)),
    ],
)
def test_put_understands_a_refresh_tokens_expiry(
    sqlite: str, fields: dict[str, Any], expected: datetime | None
) -> None:
    """Zero or less is unknown, as in a refresh."""
    document = {"access_token": ACCESS, "refresh_token": REFRESH, **fields}
    done = cli("put", "github", "u1", url=sqlite, stdin=json.dumps(document))
    assert done.code == 0, done.err
    record = load(sqlite)
    assert record is not None
    assert record["refresh_token_expires_at"] == expected
    assert record["extra"] == {}


def test_put_takes_an_empty_refresh_token_for_none(sqlite: str) -> None:
    """As a refresh does."""
    done = cli("put", "github", "u1", url=sqlite, stdin=json.dumps({"access_token": ACCESS, "refresh_token": ""}))
    assert done.code == 0, done.err
    record = load(sqlite)
    assert record is not None
    assert record["refresh_token"] is None


def test_put_keeps_a_stored_refresh_token_unless_it_is_told_otherwise(sqlite: str) -> None:
    """The response has none. All other fields are replaced."""
    cli("put", "github", "u1", url=sqlite, stdin=json.dumps(RESPONSE))
    new = json.dumps({"access_token": "new"})
    done = cli("put", "github", "u1", "--if-absent", "--json", url=sqlite, stdin=new)
    first = load(sqlite)
    assert first is not None
    assert (done.code, json.loads(done.out)["extra_fields"]) == (0, sorted(first["extra"]))
    for options, refresh_token in (([], REFRESH), (["--no-keep-refresh-token"], None)):
        done = cli("put", "github", "u1", *options, url=sqlite, stdin=new)
        assert done.code == 0, done.err
        record = load(sqlite)
        assert record is not None
        assert (record["access_token"], record["refresh_token"]) == ("new", refresh_token)
        assert record["extra"].keys() <= {"expires_in"}


def test_put_reads_tokens_in_an_object_inside_and_refuses_an_error(sqlite: str) -> None:
    nested = {"ok": True, "authed_user": {"access_token": ACCESS, "expires_in": 5, "expiresIn": 6}}
    done = cli("put", "slack", "u1", "--expires-in", "600", "--json", url=sqlite, stdin=json.dumps(nested))
    assert done.code == 0, done.err
    expires_at = datetime.fromisoformat(json.loads(done.out)["access_token_expires_at"])
    assert timedelta(seconds=500) < expires_at - datetime.now(UTC) < timedelta(seconds=601)
    done = cli("put", "slack", "u1", url=sqlite, stdin=json.dumps({"error": "invalid_grant"}))
    assert (done.code, "the token response is an error" in done.err) == (5, True)


def test_put_at_a_terminal_asks_without_echo(sqlite: str) -> None:
    terminal = Terminal("put", "github", "u1", "--expires-in", "60", url=sqlite)
    terminal.answer("Access token: ", ACCESS)
    terminal.answer("Refresh token (empty: keep a stored one): ", REFRESH)
    done = terminal.finish()
    assert done.code == 0
    shows_no_secret(done)
    record = load(sqlite)
    assert record is not None
    assert (record["access_token"], record["refresh_token"]) == (ACCESS, REFRESH)
