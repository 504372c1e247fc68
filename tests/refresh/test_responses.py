"""Reading token responses: whatever is wrong with a response, its tokens are not lost."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.refresh_world import World, on_memory
from support.refreshers import NEW
from tokenstore import InvalidInputError, ReauthorizationRequiredError, TokenRecord
from tokenstore.records import from_epoch_us
from tokenstore.refresh.kept import kept_at_refresh, lifetime_of
from tokenstore.refresh.responses import NEVER, UNKNOWN, NewTokens, read_response
from tokenstore.validation import to_epoch_us

NOW = to_epoch_us("now", datetime(2030, 1, 1, tzinfo=UTC))
SECOND = 1_000_000
OLD_EXPIRY = NOW + 77 * SECOND
TOKEN = {"access_token": "at-2"}


def record(**fields: Any) -> TokenRecord:
    """The record that is refreshed."""
    return TokenRecord(
        {
            "access_token": "at-1",
            "refresh_token": "rt-1",
            "access_token_expires_at": from_epoch_us(NOW),
            "refresh_token_expires_at": from_epoch_us(OLD_EXPIRY),
            "updated_at": from_epoch_us(NOW),
            "extra": {},
            **fields,
        }
    )


def read(response: object, default_lifetime: float | None = None, **fields: Any) -> NewTokens:
    return read_response(response, kept_at_refresh(record(**fields), default_lifetime), NOW)


def after(seconds: float) -> int:
    return NOW + round(seconds * SECOND)


# -- tokens ------------------------------------------------------------------------------------------


def test_a_complete_response() -> None:
    """The response has all fields of RFC 6749 section 5.1, and fields that several providers add."""
    response = {
        "access_token": "at-2",
        "token_type": "Bearer",
        "expires_in": 3600,
        "refresh_token": "rt-2",
        "refresh_token_expires_in": 86400,
        "scope": "repo",
    }
    new = read(response, extra={"scope": "old", "id_token": "kept", "expires_in": 7200})
    assert (new.access_token, new.refresh_token) == ("at-2", "rt-2")
    assert (new.expiry.at, new.refresh_token_expires_at) == (after(3600), after(86400))
    assert json.loads(new.extra or "") == {
        "token_type": "Bearer",
        "scope": "repo",
        "id_token": "kept",
        "expires_in": 3600,
    }
    assert "at-2" not in repr(new)
    assert "rt-2" not in repr(new)


@pytest.mark.parametrize("given_token", [{}, {"refresh_token": None}, {"refresh_token": ""}, {"refresh_token": 7}])
def test_without_a_refresh_token_the_old_one_is_kept(given_token: dict[str, Any]) -> None:
    """Its expiry is kept too (RFC 6749 section 6), unless the response contains one."""
    new = read(TOKEN | given_token)
    assert (new.refresh_token, new.refresh_token_expires_at) == ("rt-1", OLD_EXPIRY)
    new = read(TOKEN | given_token | {"refresh_token_expires_in": 10})
    assert (new.refresh_token, new.refresh_token_expires_at) == ("rt-1", after(10))
    new = read(TOKEN | given_token, refresh_token=None, refresh_token_expires_at=None)
    assert (new.refresh_token, new.refresh_token_expires_at) == (None, None)


def test_a_new_refresh_token_does_not_keep_the_old_one_s_expiry() -> None:
    """Without an expiry in the response, that of the new refresh token is unknown."""
    assert read(TOKEN | {"refresh_token": "rt-2"}).refresh_token_expires_at is None


@pytest.mark.parametrize("said", [{}, {"refresh_expires_in": 0}, {"refresh_token_expires_in": "soon"}])
def test_a_refresh_token_that_is_sent_again_keeps_its_expiry(said: dict[str, Any]) -> None:
    """Some providers send the same refresh token with each access token, and its lifetime at the login alone."""
    assert read(TOKEN | {"refresh_token": "rt-1"} | said).refresh_token_expires_at == OLD_EXPIRY
    assert read(TOKEN | {"refresh_token": "rt-1", "refresh_expires_in": 10}).refresh_token_expires_at == after(10)


@pytest.mark.parametrize("response", [None, "at", 7, [], [("access_token", "at")], object(), NEW.items()])
def test_a_response_that_is_not_a_mapping_is_refused(response: object) -> None:
    """The error contains only the type of the response."""
    with pytest.raises(InvalidInputError, match=f"not {type(response).__name__}$"):
        read(response)


@pytest.mark.parametrize("token", [None, "", 7, b"at", "\ud800", "x" * (256 * 1024 + 1)], ids=lambda t: repr(t)[:9])
def test_a_response_without_an_access_token_is_refused(token: object) -> None:
    for response in ({"access_token": token, "refresh_token": "rt-2"}, {"refresh_token": "rt-2"}, {}):
        with pytest.raises(InvalidInputError, match="access_token"):
            read(response)


# -- times -------------------------------------------------------------------------------------------

CENTURIES = 10**10
LIFETIMES: dict[str, tuple[object, float]] = {
    "a number": (3600, 3600),
    "text": ("3600", 3600),
    "a fraction": (3600.5, 3600.5),
    "a fraction as text": (" 3600.5 ", 3600.5),
    "zero": (0, 0),
    "zero as text": ("0", 0),
    "negative": (-5, 0),
    "not a number": (float("nan"), 0),
    "not a number as text": ("nan", 0),
    "infinite": (float("inf"), CENTURIES),
    "infinitely long ago": (float("-inf"), 0),
    "huge": (10**30, CENTURIES),
    "too large for a float": (10**400, CENTURIES),
    "huge as text": ("1e999", CENTURIES),
    "true": (True, 0),
    "words": ("soon", 0),
    "empty": ("", 0),
    "bytes": (b"3600", 0),
    "a list": ([3600], 0),
    "a decimal": (Decimal(3600), 0),
}


@pytest.mark.parametrize(("said", "seconds"), LIFETIMES.values(), ids=LIFETIMES)
def test_a_lifetime_is_counted_from_the_request(said: object, seconds: float) -> None:
    """A lifetime that cannot be read, or is zero, tells nothing: the expiry is unknown."""
    new = read(TOKEN | {"expires_in": said})
    assert new.expiry == ((after(seconds), True) if seconds else UNKNOWN)
    stored = json.loads(new.extra) if new.extra else {}
    assert stored.get("expires_in", 0) == seconds
    assert lifetime_of(record(extra=stored)) == (seconds or None)


@pytest.mark.parametrize("name", ["refresh_token_expires_in", "refresh_expires_in", "x_refresh_token_expires_in"])
@pytest.mark.parametrize(
    ("said", "seconds"), [*LIFETIMES.values(), ("never", 0), (-1, 0)], ids=[*LIFETIMES, "never", "-1"]
)
def test_a_refresh_tokens_lifetime(name: str, said: object, seconds: float) -> None:
    """Zero, less, or what cannot be read says nothing: a refresh token that was just issued has not expired."""
    new = read(TOKEN | {"refresh_token": "rt-2", name: said})
    assert new.refresh_token_expires_at == (after(seconds) if seconds else None)
    kept = read(TOKEN | {name: said})
    assert (kept.refresh_token, kept.refresh_token_expires_at) == ("rt-1", after(seconds) if seconds else OLD_EXPIRY)


MOMENTS: dict[str, tuple[object, int | None]] = {
    "a datetime": (datetime(2030, 1, 1, 1, tzinfo=UTC), after(3600)),
    "a naive one is UTC": (datetime(2030, 1, 1, 1), after(3600)),
    "one with an offset": (datetime(2030, 1, 1, 3, tzinfo=timezone(timedelta(hours=2))), after(3600)),
    "the epoch in seconds": (NOW / SECOND + 3600, after(3600)),
    "as text": (str(NOW // SECOND + 3600), after(3600)),
    "in milliseconds": (NOW // 1000 + 3_600_000, after(3600)),
    "in milliseconds as text": (f" {NOW // 1000 + 3_600_000} ", after(3600)),
    "in microseconds": (after(3600), after(3600)),
    "in nanoseconds": (after(3600) * 1000, after(3600)),
    "Go's form": ("2030-01-01T02:00:00.123456789+01:00", after(3600.123456)),
    "the last second before milliseconds": (10**11 - 1, CENTURIES * SECOND),
    "too large": (10**400, CENTURIES * SECOND),
    "infinite": (float("inf"), CENTURIES * SECOND),
    "in the past": (0, 0),
    "a bool": (True, None),
    "a date": (date(2030, 1, 2), None),
    "words": ("tomorrow", None),
    "not a number": (float("nan"), None),
    "beyond the calendar": (datetime.min.replace(tzinfo=timezone(timedelta(hours=9))), None),
    "a mapping": ({}, None),
}


@pytest.mark.parametrize(("said", "moment"), MOMENTS.values(), ids=MOMENTS)
def test_a_time_of_expiry_can_be_a_datetime_or_a_number_since_the_epoch(said: object, moment: int | None) -> None:
    """A time that cannot be read tells nothing. The lifetime up to the time is stored."""
    for name in ("expires_at", "access_token_expires_at", "expires_on", "expiry_date", "expiry", "expiresAt"):
        new = read(TOKEN | {"refresh_token": "rt-2", name: said, "refresh_token_expires_at": said})
        assert new.expiry == (moment, moment is not None), name
        left = 0.0 if moment is None else max(moment - NOW, 0) / SECOND
        assert new.refresh_token_expires_at == (moment if left else None), name
        assert json.loads(new.extra or "{}") == ({"expires_in": left} if left else {})


@pytest.mark.parametrize(
    ("said", "moment"),
    [
        (3600, after(3600)),
        ("5183999", after(5183999)),
        (after(3600) // SECOND, after(3600)),
        (after(3600) // 1000, after(3600)),
        ("2030-01-01T01:00:00Z", after(3600)),
        (0, None),
        (-1, None),
    ],
)
def test_the_field_expires_holds_a_lifetime_or_a_time(said: object, moment: int | None) -> None:
    """A number is a lifetime if it would be a time before 2002."""
    assert read(TOKEN | {"expires": said}).expiry == (moment, moment is not None)


def test_microsofts_extended_lifetime_counts_if_there_is_no_other() -> None:
    assert read(TOKEN | {"ext_expires_in": 7200, "expires_in": 3600}).expiry.at == after(3600)
    assert read(TOKEN | {"ext_expires_in": 7200}).expiry.at == after(7200)


def test_names_in_camel_case() -> None:
    """Libraries of JavaScript, and some providers, write them so."""
    response = {"accessToken": "at-2", "refreshToken": "rt-2", "expiresIn": 60, "refreshTokenExpiresIn": 600, "x": 1}
    new = read(response)
    assert (new.access_token, new.refresh_token) == ("at-2", "rt-2")
    assert (new.expiry.at, new.refresh_token_expires_at) == (after(60), after(600))
    assert json.loads(new.extra or "") == {"x": 1, "expires_in": 60}


def test_tokens_in_an_object_inside() -> None:
    """Slack puts a user's tokens there. Several such objects, or an error beside it, are not taken apart."""
    inside = {"access_token": "xoxp-1", "expires_in": 60, "scope": "chat:write", "id": "U1"}
    new = read({"ok": True, "team": {"id": "T1"}, "authed_user": inside}, refresh_token=None)
    assert (new.access_token, new.expiry.at) == ("xoxp-1", after(60))
    assert json.loads(new.extra or "") == {
        "ok": True,
        "team": {"id": "T1"},
        "scope": "chat:write",
        "id": "U1",
        "expires_in": 60,
    }
    for unfit in ({"a": inside, "b": inside}, {"list": [inside]}, {"a": {"b": inside}}):
        with pytest.raises(InvalidInputError):
            read(unfit)
    with pytest.raises(ReauthorizationRequiredError):
        read({"error": "invalid_grant", "a": inside})


def test_gos_zero_time_is_never() -> None:
    """It is what Go's `oauth2.Token` holds for a token that does not expire."""
    assert read(TOKEN | {"expiry": "0001-01-01T00:00:00Z"}, default_lifetime=60).expiry == NEVER
    assert read(TOKEN | {"expiry": "0001-01-01T00:00:00Z", "expires_in": 60}).expiry.at == after(60)


def test_the_first_readable_field_counts() -> None:
    """A field that cannot be read does not hide another one."""
    new = read(
        TOKEN | {"refresh_token": "rt-2", "expires_in": "", "expires_at": "soon", "expires_on": after(60) // SECOND}
    )
    assert new.expiry.at == after(60)
    later = {"refresh_token_expires_in": 0, "refresh_expires_in": "", "refresh_token_expires_at": after(60) // SECOND}
    assert read(TOKEN | {"refresh_token": "rt-2"} | later).refresh_token_expires_at == after(60)


def test_a_lifetime_has_priority_over_a_time_of_expiry() -> None:
    """A lifetime does not depend on the clocks of two machines. A field that is None counts as missing."""
    both = {"expires_in": 60, "expires_at": 0, "refresh_token_expires_in": 60, "refresh_token_expires_at": 0}
    new = read(TOKEN | both)
    assert new.expiry.at == new.refresh_token_expires_at == after(60)
    assert read(TOKEN | {"expires_in": None, "expires_at": 0}).expiry.at == 0
    assert read(TOKEN | {"expires_at": None, "access_token_expires_at": 0}).expiry.at == 0
    assert read(TOKEN | dict.fromkeys(both)).expiry == UNKNOWN
    assert read(TOKEN).expiry == UNKNOWN


# -- everything else ---------------------------------------------------------------------------------


def _cycle() -> dict[str, Any]:
    cycle: dict[str, Any] = {}
    cycle["again"] = cycle
    return cycle


UNFIT: dict[str, dict[Any, Any]] = {
    "an object": {"x": object()},
    "bytes": {"x": b"x"},
    "not a number": {"x": float("nan")},
    "a datetime": {"x": datetime(2030, 1, 1)},
    "another kind of key": {7: "x"},
    "a cycle": _cycle(),
    "too large": {"x": "x" * (256 * 1024)},
    "a number of ten thousand digits": {"x": 10**10_000},
}


@pytest.mark.parametrize("unfit", UNFIT.values(), ids=UNFIT)
def test_fields_that_cannot_be_stored_are_left_out(unfit: dict[Any, Any]) -> None:
    """The tokens are stored nevertheless, together with the extra fields that were stored before."""
    new = read(TOKEN | unfit | {"refresh_token": "rt-2", "expires_in": 60}, extra={"scope": "repo"})
    assert (new.access_token, new.refresh_token, new.expiry.at) == ("at-2", "rt-2", after(60))
    assert json.loads(new.extra or "") == {"scope": "repo", "expires_in": 60}


@pytest.mark.parametrize("levels", [32, 900, 100_000])
def test_a_field_that_is_nested_too_deep_is_left_out(levels: int) -> None:
    """The other fields are stored with the tokens."""
    deep: Any = "x"
    for _ in range(levels):
        deep = [deep]
    new = read(TOKEN | {"deep": deep, "scope": "repo"}, extra={"team": "T1"})
    assert (new.access_token, json.loads(new.extra or "")) == ("at-2", {"team": "T1", "scope": "repo"})
    assert json.loads(read(TOKEN | {"list": [[1]]}).extra or "") == {"list": [[1]]}


def test_line_ends_around_a_token_are_no_part_of_it() -> None:
    """A text response may end with one."""
    new = read({"access_token": "at-2\r\n", "refresh_token": "\trt 2\n"})
    assert (new.access_token, new.refresh_token) == ("at-2", "rt 2")


@pytest.mark.parametrize("token", ["a\r\nX-Injected: 1", "a\nb", "a\tb", "é", "a\0", "\x7f", "\n"])
def test_an_access_token_that_no_header_can_carry_is_none(token: str) -> None:
    """A refresh token is kept, because a form can carry it, and the old one may no longer work."""
    with pytest.raises(InvalidInputError, match="access_token"):
        read({"access_token": token, "refresh_token": "rt-2"})
    expected = "rt-1" if token == "\n" else token
    assert read(TOKEN | {"refresh_token": token}).refresh_token == expected


def test_without_a_lifetime_the_token_has_the_previous_one() -> None:
    """That is the stated one, then the one with which the row was written, then the refresher's default."""
    hour_later = {"access_token_expires_at": from_epoch_us(after(3600))}
    for silent in ({}, {"expires_in": None}, {"expires_in": "soon"}, {"expires_in": 0}, {"expires_at": ""}):
        new = read(TOKEN | silent, extra={"expires_in": 60}, default_lifetime=7.0)
        assert (new.expiry, new.extra) == ((after(60), True), '{"expires_in":60.0}')
        new = read(TOKEN | silent, default_lifetime=7.0, **hour_later)
        assert (new.expiry, new.extra) == ((after(3600), True), '{"expires_in":3600.0}')
        new = read(TOKEN | silent, default_lifetime=7.0, extra={"expires_in": 0})
        assert (new.expiry, new.extra) == ((after(7), True), '{"expires_in":7.0}')
        assert read(TOKEN | silent).expiry == UNKNOWN


@pytest.mark.parametrize("left", [-3600, 0, 60])
def test_the_rest_of_a_lifetime_is_no_lifetime(left: float) -> None:
    """A row that was stored just before its token expired says little about the next token."""
    new = read(TOKEN, access_token_expires_at=from_epoch_us(after(left)), extra={})
    assert new.expiry == UNKNOWN


@pytest.mark.parametrize(
    ("said", "lifetime"),
    [(10**400, CENTURIES), (True, None), (None, None), ([60], None), ("60", 60), (-1, 0)],
    ids=lambda v: repr(v)[:9],
)
def test_a_lifetime_that_the_caller_stored(said: object, lifetime: float | None) -> None:
    """``extra`` may come from `store_tokens` with any value; a value that is not a lifetime raises no error."""
    assert lifetime_of(record(extra={"expires_in": said})) == lifetime


@on_memory
async def test_any_stored_extra_fields_allow_a_refresh(world: World) -> None:
    """The fields that the refresh stores in ``extra`` can be read afterwards."""
    deep: Any = "x"
    for _ in range(sys.getrecursionlimit() // 2):
        deep = [deep]
    store = await world.store(refreshers={"github": lambda _: {**NEW, "deep": deep}})
    await store.store_tokens("github", "u1", "at", "rt", world.at(-1), extra={"expires_in": 10**400})
    record = await store.load_fresh_tokens("github", "u1")
    assert record is not None
    assert record["access_token"] == NEW["access_token"]
    loaded = await store.load_tokens("github", "u1")
    assert loaded is not None
    assert loaded["access_token"] == NEW["access_token"]


# -- generated responses -----------------------------------------------------------------------------

_anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=5)
    | st.datetimes()
    | st.timedeltas()
    | st.decimals(),
    lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=3), some, max_size=3),
    max_leaves=5,
)
_names = st.sampled_from(
    [
        *("access_token", "refresh_token", "expires_in", "expires_at", "access_token_expires_at"),
        *("refresh_token_expires_in", "refresh_token_expires_at", "scope", "token_type", "extra"),
    ]
)


class Lazy(Mapping[str, Any]):
    """A mapping that is not a dict."""

    def __init__(self, content: dict[str, Any]) -> None:
        self._content = content

    def __getitem__(self, key: str) -> Any:
        return self._content[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)


@given(
    response=st.dictionaries(_names | st.text(max_size=5), _anything, max_size=6),
    known=st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)
def test_any_mapping_with_an_access_token_is_a_response(response: dict[str, Any], known: dict[str, Any]) -> None:
    """All values read from it can be stored, and a valid refresh token is never dropped."""
    response["access_token"] = "at-2"
    new = read(Lazy(response), extra=known)
    assert new == read(response, extra=known)
    assert new.access_token == "at-2"
    refresh_token = response.get("refresh_token")
    fit = isinstance(refresh_token, str) and refresh_token and refresh_token.isprintable()  # else it may be trimmed
    assert new.refresh_token == refresh_token if fit else new.refresh_token
    for moment in (new.expiry.at, new.refresh_token_expires_at):
        assert moment is None or to_epoch_us("it", from_epoch_us(moment)) == moment
    lifetime = response.get("expires_in")
    if isinstance(lifetime, float | int) and not isinstance(lifetime, bool) and lifetime > 0:
        assert new.expiry.at is not None
        assert new.expiry.at >= NOW
    stored = json.loads(new.extra) if new.extra else {}
    assert not {"access_token", "refresh_token", "expires_at", "refresh_token_expires_in"} & stored.keys()
    known_lifetime = lifetime_of(record(extra=stored))
    assert known_lifetime is None or 0 <= known_lifetime <= CENTURIES


@given(response=_anything)
def test_any_other_object_is_refused(response: object) -> None:
    with pytest.raises(InvalidInputError):
        read(response if not isinstance(response, dict) else {**response, "access_token": 7})


@on_memory
async def test_the_lifetime_begins_when_the_provider_was_called(world: World) -> None:
    """So a slow response does not make a token valid for longer than the provider says."""
    asked: list[datetime] = []

    async def slow(record: TokenRecord) -> Mapping[str, Any]:
        asked.append(world.at(0))
        world.ahead += 100
        await asyncio.sleep(0)
        return NEW

    store = await world.store(refreshers={"github": slow})
    await world.expired(store)
    record = await store.load_fresh_tokens("github", "u1")
    assert record is not None
    expires_at = record["access_token_expires_at"]
    assert expires_at is not None
    assert abs(expires_at - asked[0] - timedelta(seconds=3600)) < timedelta(seconds=5)
