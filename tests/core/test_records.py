"""Records: exact times, validity with a clock skew, and no token in any repr."""

from __future__ import annotations

import io
import json
import logging
import pprint
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from support.fresh_store import on_every_row
from support.paths import DOCS
from support.store_calls import load
from tokenstore import AuthTokenStore, Keyring, TokenRecord, open_store
from tokenstore.records import TokenKey, from_epoch_us
from tokenstore.validation import to_epoch_us


def test_the_pages_warn_of_what_a_record_does_not_hide() -> None:
    """Code that walks through a record as through any dict sees the tokens."""
    record = TokenRecord(access_token=ACCESS)
    assert ACCESS in json.dumps(record)
    for text in (str(TokenRecord.__doc__), (DOCS / "threat-model.md").read_text("utf-8")):
        assert "json.dumps(record)" in text


@given(st.datetimes())
@example(datetime.min)
@example(datetime.max)
@example(datetime(1969, 12, 31, 23, 59, 59, 999999))
def test_times_are_converted_exactly_to_the_microsecond(moment: datetime) -> None:
    """Times from the year 1 to 9999 are converted to microseconds since the epoch and back without loss."""
    since = moment - datetime(1970, 1, 1)
    microseconds = (since.days * 86400 + since.seconds) * 10**6 + since.microseconds
    assert to_epoch_us("it", moment) == microseconds
    found = from_epoch_us(microseconds)
    assert found == datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds)
    assert found == moment.replace(tzinfo=UTC)
    assert found.tzinfo is UTC


HOUR = timedelta(hours=1)
ACCESS, REFRESH, SCOPE = "gho_access-secret", "ghr_refresh-secret", "repo-secret"


def test_a_token_is_valid_while_now_plus_skew_is_before_its_expiry(keyring: Keyring) -> None:
    """The limit is exact to the microsecond; the skew does not apply to refresh tokens."""
    now = datetime(2030, 1, 1, tzinfo=UTC)
    store = open_store("memory://", keyring=keyring, clock=now.timestamp)
    tick = timedelta(microseconds=1)
    for skew in (0, 60, 300.5):
        edge = now + timedelta(seconds=skew)
        assert not store.is_access_token_valid({"access_token_expires_at": edge}, clock_skew_seconds=skew)
        assert store.is_access_token_valid({"access_token_expires_at": edge + tick}, clock_skew_seconds=skew)
    assert not store.is_access_token_valid({"access_token_expires_at": now + timedelta(seconds=60)})
    assert store.is_access_token_valid({"access_token_expires_at": (now + 2 * HOUR).replace(tzinfo=None)})
    refresh: dict[str, Any] = {"refresh_token": "rt", "refresh_token_expires_at": now}
    assert not store.is_refresh_token_valid(refresh)
    assert store.is_refresh_token_valid(refresh | {"refresh_token_expires_at": now + tick})
    assert not store.is_refresh_token_valid({"refresh_token": None, "refresh_token_expires_at": None})


@on_every_row
async def test_no_text_of_a_record_contains_a_token(store: AuthTokenStore) -> None:
    """A record that is printed, logged, copied or merged shows no token; its items contain them."""
    await store.store_tokens("github", "u1", ACCESS, REFRESH, None, extra={"scope": SCOPE})
    record = await load(store)
    assert isinstance(record, dict)
    assert record["access_token"] == ACCESS
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(record)
    console.print({"inside": [record]})
    log = logging.LogRecord("app", logging.INFO, "app.py", 1, "loaded %s", (record,), None)
    shown = [repr(record), str(record), f"{record}", f"{record!r:>9}", pprint.pformat(record), pprint.pformat([record])]
    shown += [log.getMessage(), console.export_text(), repr({"inside": record}), repr(record.copy())]
    shown += [repr(record | {"more": 1}), repr({"more": 1} | record)]
    for text in shown:
        assert "<redacted>" in text
        assert not [secret for secret in (ACCESS, REFRESH, SCOPE) if secret in text]
    await store.store_tokens("github", "u2", ACCESS, None, None)
    assert "'refresh_token': None" in repr(await load(store, "u2"))


@on_every_row
async def test_no_repr_of_a_store_or_sealed_row_contains_a_secret(store: AuthTokenStore) -> None:
    """The secrets are tokens, keys and the password."""
    await store.store_tokens("github", "u1", ACCESS, REFRESH, None)
    row = await store._backend.get(TokenKey("github", "u1"))
    for shown in (repr(store), repr(store._backend), repr(row), repr(store._sealer)):
        assert not [secret for secret in (ACCESS, REFRESH, "tokenstore_test:tokenstore") if secret in shown]
