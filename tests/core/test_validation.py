"""All backends accept and refuse the same arguments, and no error contains a secret."""

from __future__ import annotations

import asyncio
import enum
import traceback
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from support.matrix import Row, every_row
from tokenstore import AuthTokenStore, InvalidInputError, Keyring, TokenStoreError, open_store
from tokenstore.records import MAX_ACCOUNT_BYTES, MAX_PROVIDER_BYTES, MAX_TOKEN_BYTES, MAX_USER_ID_BYTES

SECRET = "s3cr3t"
"""A part of every token; no message may contain it."""


class Colour(str, enum.Enum):  # noqa: UP042  # not StrEnum, because the str() of this kind is not its value
    RED = "red"


NOT_TEXT = st.sampled_from(
    [None, 0, 1.5, True, b"bytes", ["list"], ("a", "b"), object, float("nan"), datetime(2026, 1, 1)]
)
BAD_TEXT = st.sampled_from(["", "\0", "a\0b", "\ud800", "\udcc3\udca9", "ok\udfff"])
# Lengths around each limit, in characters of one to four bytes.
LONG_TEXT = st.builds(
    lambda limit, more, character: character * (limit // len(character.encode())) + "x" * more,
    st.sampled_from([MAX_PROVIDER_BYTES, MAX_USER_ID_BYTES, MAX_ACCOUNT_BYTES]),
    st.integers(0, 2),
    st.sampled_from(["a", "é", "€", "🔑"]),
)
# Few different texts, so that generated calls use the same rows; some databases treat some of them as equal.
KEY_TEXT = st.one_of(
    st.sampled_from(
        ["bob", "Bob", "bob ", "bob\t", "é", "e\u0301", "ß", "ss", "%", "_", "'; --", "\\", "🔑", Colour.RED]
    ),
    st.text(min_size=1, max_size=3),
)
KEY_PART = st.one_of(KEY_TEXT, KEY_TEXT, KEY_TEXT, LONG_TEXT, BAD_TEXT, NOT_TEXT)
# What RFC 6749 calls VSCHAR.
VISIBLE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=5)
TOKEN_TEXT = st.builds(lambda text: SECRET + text, VISIBLE)
TOKEN = st.one_of(
    TOKEN_TEXT,
    TOKEN_TEXT,
    st.builds(lambda text: SECRET + text, st.text(max_size=5) | LONG_TEXT),
    st.sampled_from([SECRET + "\ud800", SECRET + "\0", "", SECRET.encode(), [SECRET], {"a": SECRET}, None, 0, True]),
    st.sampled_from([SECRET + "x" * (MAX_TOKEN_BYTES - len(SECRET) + more) for more in (0, 1)]),
)
OFFSETS = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
TIME = st.one_of(
    st.none(),
    st.datetimes(),
    st.datetimes(timezones=OFFSETS),
    st.builds(lambda moment, zone: moment.replace(tzinfo=zone), st.sampled_from([datetime.min, datetime.max]), OFFSETS),
    st.sampled_from([0, 1767225600, 1.5, "2026-01-01", "", date(2026, 1, 1), timedelta(1), False, UTC]),
)


def _cycle() -> dict[str, Any]:
    cycle: dict[str, Any] = {"a": SECRET}
    cycle["self"] = cycle
    return cycle


def _deep() -> Any:
    deep: Any = SECRET
    for _ in range(100_000):
        deep = [deep]
    return {"deep": deep}


def _nested(levels: int) -> dict[str, Any]:
    nested: dict[str, Any] = {"a": SECRET}
    for number in range(levels - 1):
        nested = {"a": nested, "b": [1]} if number % 2 else {"a": nested}
    return nested


VISIBLE_RULE = "only printable ASCII and spaces are allowed (RFC 6749 appendix A)"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
EXTRA = st.one_of(
    st.none(),
    st.dictionaries(st.text(max_size=4), JSON, max_size=3),
    st.sampled_from([
        {}, {"a": SECRET, 1: "b"}, {"nan": float("nan")}, {"inf": float("inf")}, {"when": datetime(2026, 1, 1)},
        {"bytes": SECRET.encode()}, {"set": {SECRET}}, [SECRET], SECRET, 1, _cycle(), _deep(), {"tuple": (1, SECRET)},
        {"big": SECRET * (MAX_TOKEN_BYTES // len(SECRET))}, {"lone": "\ud800"}, {None: SECRET},
    ]),
)  # fmt: skip
Call = tuple[str, tuple[Any, ...], dict[str, Any]]


def calls() -> st.SearchStrategy[Call]:
    key = (KEY_PART, KEY_PART)
    account = {"account": st.just("") | KEY_PART}
    times = st.fixed_dictionaries(
        {}, optional={"refresh_token_expires_at": TIME, "extra": EXTRA, "metadata": EXTRA, **account}
    )
    only_account = st.fixed_dictionaries({}, optional=account)
    valid = st.tuples(KEY_TEXT, KEY_TEXT, TOKEN_TEXT, TOKEN_TEXT | st.none(), st.datetimes())
    return st.one_of(
        st.tuples(st.just("store_tokens"), valid, times),
        st.tuples(st.just("store_tokens"), st.tuples(*key, TOKEN, TOKEN, TIME), times),
        st.tuples(st.just("store in transaction"), st.tuples(*key, TOKEN, TOKEN, TIME), times),
        st.tuples(st.just("load_tokens"), st.tuples(*key), only_account),
        st.tuples(st.just("load_tokens"), st.tuples(*key, st.booleans()), only_account),
        st.tuples(st.just("load in transaction"), st.tuples(*key, st.booleans()), only_account),
        st.tuples(st.just("delete_tokens"), st.tuples(*key), only_account),
        st.tuples(st.just("reseal_tokens"), st.tuples(*key), only_account),
        st.tuples(st.just("update_metadata"), st.tuples(*key, EXTRA), only_account),
        st.tuples(
            st.just("list_tokens"),
            st.just(()),
            st.fixed_dictionaries(
                {},
                optional={
                    "provider": KEY_PART,
                    "user_id": KEY_PART,
                    "page_size": st.integers(-1, 5) | st.sampled_from([None, True, 1.0, "1", 10**6]),
                },
            ),
        ),
    )


def _shown(answer: Any) -> Any:
    """Remove the values that may differ between stores from an answer."""
    if isinstance(answer, dict):
        return {name: answer[name] for name in answer if name not in ("generation", "created_at", "updated_at")}
    return [_shown(element) for element in answer] if isinstance(answer, list) else answer


async def verdict(store: AuthTokenStore, call: Call) -> tuple[object, ...]:
    """Return the result of a call: its answer, or the type and text of its error."""
    name, arguments, keywords = call
    try:
        if name == "list_tokens":
            answer: Any = [entry async for entry in store.list_tokens(**keywords)]
        elif name.endswith("in transaction"):
            async with store.transaction() as tx:
                method = tx.store_tokens if name.startswith("store") else tx.load_tokens
                answer = await method(*arguments, **keywords)
        else:
            answer = await getattr(store, name)(*arguments, **keywords)
    except TokenStoreError as error:
        everything = "".join(traceback.format_exception(error, limit=0)) + repr(error) + repr(vars(error))
        assert SECRET not in everything, "an error contains a token"
        chain: BaseException | None = error
        while chain is not None:
            assert SECRET not in str(chain) + repr(chain.args), "an error's cause or context contains a token"
            chain = chain.__cause__ or chain.__context__
        return type(error), str(error)
    return ("answer", _shown(answer))


@every_row
def test_each_call_has_the_same_result_as_on_the_memory_backend(row: Row, url: str, keyring: Keyring) -> None:
    with asyncio.Runner() as runner:
        run = runner.get_loop().run_until_complete

        async def opened(target: str) -> AuthTokenStore:
            store = open_store(target, keyring=keyring)
            await store.setup()
            return store

        model, store = run(opened("memory://")), run(opened(url))

        @settings(max_examples=3 * settings().max_examples)
        @given(st.lists(calls(), min_size=2, max_size=6))
        @example([("store_tokens", ("p", "\udcc3\udca9", SECRET, SECRET, None), {})])
        @example([("store_tokens", ("p", "u", SECRET, SECRET + "\ud800", None), {})])
        @example(
            [("store_tokens", ("p", "u", SECRET, None, datetime.min.replace(tzinfo=timezone(timedelta(hours=1)))), {})]
        )
        def check(steps: list[Call]) -> None:
            for step in [*steps, ("list_tokens", (), {})]:
                found, expected = run(verdict(store, step)), run(verdict(model, step))
                assert found == expected, step[0]

        try:
            check()
        finally:
            run(store.aclose())
            run(model.aclose())


GOOD: dict[str, Any] = {
    "provider": "github",
    "user_id": "u",
    "access_token": SECRET,
    "refresh_token": SECRET,
    "access_token_expires_at": datetime(2030, 1, 1),
}


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("provider", "", "provider must not be empty"),
        ("provider", None, "provider must be a str, not NoneType"),
        ("provider", b"github", "provider must be a str, not bytes"),
        ("provider", "a" * 256, "provider has 256 bytes as UTF-8; at most 255 are allowed"),
        ("provider", "é" * 128, "provider has 256 bytes as UTF-8; at most 255 are allowed"),
        ("user_id", "a\0", "user_id holds a NUL character, which PostgreSQL cannot store"),
        ("user_id", "\ud800", "user_id holds a lone surrogate and cannot be encoded as UTF-8"),
        ("user_id", "🔑" * 129, "user_id has 516 bytes as UTF-8; at most 512 are allowed"),
        ("user_id", 7, "user_id must be a str, not int"),
        ("account", "a" * 256, "account has 256 bytes as UTF-8; at most 255 are allowed"),
        ("account", "é" * 128, "account has 256 bytes as UTF-8; at most 255 are allowed"),
        ("account", "a\0", "account holds a NUL character, which PostgreSQL cannot store"),
        ("account", "\0", "account holds a NUL character, which PostgreSQL cannot store"),
        ("account", "\udfff", "account holds a lone surrogate and cannot be encoded as UTF-8"),
        ("account", None, "account must be a str, not NoneType"),
        ("account", 0, "account must be a str, not int"),
        ("account", b"", "account must be a str, not bytes"),
        ("access_token", None, "access_token must be a str, not NoneType"),
        ("access_token", "", "access_token must not be empty"),
        ("access_token", SECRET + "\ud800", "access_token holds a lone surrogate and cannot be encoded as UTF-8"),
        ("access_token", "x" * (256 * 1024 + 1), "access_token has 262145 bytes as UTF-8; at most 262144 are allowed"),
        ("refresh_token", "", "refresh_token must not be empty"),
        ("refresh_token", 0, "refresh_token must be a str, not int"),
        ("access_token_expires_at", 3600, "access_token_expires_at must be a datetime or None, not int"),
        ("access_token_expires_at", "2030", "access_token_expires_at must be a datetime or None, not str"),
        ("access_token_expires_at", date(2030, 1, 1), "access_token_expires_at must be a datetime or None, not date"),
        (
            "refresh_token_expires_at",
            datetime.max.replace(tzinfo=timezone(timedelta(hours=-1))),
            "refresh_token_expires_at is outside the years 1 to 9999 in UTC",
        ),
        ("extra", [1], "extra must be a mapping or None, not list"),
        ("extra", {1: SECRET}, "extra must have str keys"),
        ("extra", {"a": {SECRET}}, "extra must hold JSON values only (no NaN, datetime or bytes)"),
        ("extra", {"a": float("nan")}, "extra must hold JSON values only (no NaN, datetime or bytes)"),
        ("extra", _cycle(), "extra is nested more than 32 levels deep, or contains itself"),
        ("extra", _deep(), "extra is nested more than 32 levels deep, or contains itself"),
        ("extra", _nested(33), "extra is nested more than 32 levels deep, or contains itself"),
        ("extra", {"a": [[_nested(31)]]}, "extra is nested more than 32 levels deep, or contains itself"),
        *(
            (name, SECRET + character, f"{name} holds a character that no token may have: {VISIBLE_RULE}")
            for name in ("access_token", "refresh_token")
            for character in ("\r\nX-Injected: 1", "\n", "\t", "\0", "\x7f", "é", "\u2028", "🔑")
        ),
    ],
)
def test_a_refusal_names_the_argument_and_the_rule(argument: str, value: Any, message: str, keyring: Keyring) -> None:
    async def main() -> None:
        async with open_store("memory://", keyring=keyring) as store:
            with pytest.raises(InvalidInputError) as caught:
                await store.store_tokens(**GOOD | {argument: value})
            assert str(caught.value) == message
            assert isinstance(caught.value, ValueError)
            assert caught.value.__cause__ is None
            assert caught.value.__context__ is None, "the chained exception would contain the value"
            assert [entry async for entry in store.list_tokens()] == [], "a row was written"

    asyncio.run(main())


@every_row
def test_arguments_of_maximum_length_are_stored(row: Row, url: str, keyring: Keyring) -> None:
    """Each argument has exactly its maximum length. A str subclass is stored as its text."""
    big = "".join(map(chr, range(0x20, 0x7F))) * (MAX_TOKEN_BYTES // 95) + "x" * (MAX_TOKEN_BYTES % 95)
    wide = {"a": "x" * (MAX_TOKEN_BYTES - len('{"a":""}'))}

    async def main() -> None:
        async with open_store(url, keyring=keyring) as store:
            await store.setup()
            provider, user = "é" * (MAX_PROVIDER_BYTES // 2) + "x", "🔑" * (MAX_USER_ID_BYTES // 4)
            account = "x" + "é" * (MAX_ACCOUNT_BYTES // 2)
            await store.store_tokens(provider, user, big, big[::-1], None, account=account, extra=wide)
            record = await store.load_tokens(provider, user, account=account)
            assert record is not None
            assert (record["access_token"], record["refresh_token"], record["extra"]) == (big, big[::-1], wide)
            await store.store_tokens(Colour.RED, Colour.RED, Colour.RED, Colour.RED, None, account=Colour.RED)
            record = await store.load_tokens("red", "red", account="red")
            assert record is not None
            assert (record["access_token"], type(record["access_token"]), record["provider"]) == ("red", str, "red")
            await store.store_tokens("red", "deep", "at", "rt", None, extra=_nested(32))
            record = await store.load_tokens("red", "deep")
            assert record is not None
            assert record["extra"] == _nested(32)

    asyncio.run(main())
