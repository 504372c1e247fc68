"""Values beside the tokens: what is put is what is read, once at most if it is popped, and never after its expiry."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.fresh_store import on_every_row
from tokenstore import (
    AuthTokenStore,
    InvalidInputError,
    Keyring,
    StoreClosedError,
    TamperedError,
    UnsupportedOperationError,
    open_store,
)
from tokenstore.protocol import SupportsValues
from tokenstore.testing.conformance._helpers import until
from tokenstore.value_records import (
    MAX_VALUE_BYTES,
    MAX_VALUE_GROUP_BYTES,
    MAX_VALUE_NAME_BYTES,
    ScannedValue,
    ValueKey,
)
from tokenstore_memory import MemoryBackend

KEYRING = Keyring({"k1": bytes(range(32))})
SECRET = "verifier-s3cr3t"


async def _listed(store: AuthTokenStore, **arguments: Any) -> list[tuple[str, str]]:
    return [(entry["namespace"], entry["name"]) async for entry in store.list_values(**arguments)]


async def _until_expired(store: AuthTokenStore, name: str, namespace: str = "login") -> None:
    async def expired() -> bool:
        return await store.get_value(namespace, name) is None

    await until(expired, "the value has expired")


@on_every_row
async def test_a_value_is_read_as_it_was_put(store: AuthTokenStore) -> None:
    values: list[Any] = [
        None,
        True,
        0,
        -1.5,
        2**80,
        "",
        "é\0\ud800🔑",
        [],
        {},
        {"verifier": SECRET, "deep": [{"": [None]}]},
    ]
    for value in values:
        await store.put_value("login", "state", value)
        assert await store.get_value("login", "state", "missing") == value
    await store.put_value("login", "state", ("a", ("b",)))
    assert await store.get_value("login", "state") == ["a", ["b"]]
    assert await _listed(store) == [("login", "state")]


@on_every_row
async def test_a_missing_value_is_the_default(store: AuthTokenStore) -> None:
    """So a stored None can be told from a missing value."""
    missing = object()
    assert await store.get_value("login", "state") is None
    assert await store.get_value("login", "state", missing) is missing
    assert await store.pop_value("login", "state", default=missing) is missing
    await store.put_value("login", "state", None)
    assert await store.get_value("login", "state", default=missing) is None
    assert await store.pop_value("login", "state", missing) is None
    assert await store.pop_value("login", "state", missing) is missing


@on_every_row
async def test_of_many_callers_one_pops_the_value(store: AuthTokenStore) -> None:
    await store.put_value("login", "state", {"verifier": SECRET}, ttl=600)
    found = await asyncio.gather(*(store.pop_value("login", "state") for _ in range(40)))
    assert [value for value in found if value is not None] == [{"verifier": SECRET}]
    assert await store.get_value("login", "state") is None


@on_every_row
async def test_of_many_callers_one_stores_its_value_where_there_is_none(store: AuthTokenStore) -> None:
    """An expired value counts as none."""
    for ttl in (None, 0.02):
        if ttl is not None:
            await store.put_value("login", "state", "old", ttl=ttl)
            await _until_expired(store, "state")
        puts = (store.put_value("login", "state", number, if_absent=True) for number in range(20))
        stored = await asyncio.gather(*puts)
        assert sorted(stored) == [False] * 19 + [True]
        assert await store.get_value("login", "state") == stored.index(True)
        assert await store.put_value("login", "state", "replaced") is True
        assert await store.pop_value("login", "state") == "replaced"


@on_every_row
async def test_an_expired_value_is_missing(store: AuthTokenStore) -> None:
    """It is neither read, popped, listed nor resealed, and `purge_values` deletes it alone."""
    await store.put_value("login", "short", 1, ttl=0.05)
    await store.put_value("login", "shorter", 2, ttl=timedelta(microseconds=1))
    await store.put_value("login", "long", 3, ttl=timedelta(days=3))
    await store.put_value("clients", "github", 4)
    await _until_expired(store, "short")
    await _until_expired(store, "shorter")
    assert await store.pop_value("login", "short", "missing") == "missing"
    assert await store.reseal_value("login", "short") is False
    assert await _listed(store) == [("clients", "github"), ("login", "long")]
    assert await store.purge_values(batch_size=1) == 2
    assert await store.purge_values() == 0
    assert (await store.get_value("login", "long"), await store.get_value("clients", "github")) == (3, 4)


@on_every_row
async def test_a_value_that_is_put_again_has_the_new_expiry(store: AuthTokenStore) -> None:
    await store.put_value("login", "state", 1, ttl=0.02)
    await _until_expired(store, "state")
    await store.put_value("login", "state", 2)
    assert await store.get_value("login", "state") == 2
    await store.put_value("login", "state", 3, ttl=0.02)
    await _until_expired(store, "state")


@on_every_row
async def test_values_are_deleted_by_namespace(store: AuthTokenStore) -> None:
    for name in ("a", "b", "c"):
        await store.put_value("login", name, 1, ttl=600)
    await store.put_value("Login", "a", 1)
    assert await store.delete_values("login") == 3
    assert await store.delete_values("login") == 0
    assert await _listed(store) == [("Login", "a")]


@on_every_row
async def test_values_are_listed_without_their_contents(store: AuthTokenStore) -> None:
    for number in range(7):
        await store.put_value("login", f"n{number}", SECRET, ttl=3600)
    await store.put_value("clients", "github", SECRET)
    names = [("clients", "github"), *(("login", f"n{number}") for number in range(7))]
    for page_size in (1, 3, 500):
        assert await _listed(store, page_size=page_size) == names
        assert await _listed(store, namespace="login", page_size=page_size) == names[1:]
    first, second, *_ = [entry async for entry in store.list_values()]
    assert first.keys() == {"namespace", "name", "expires_at", "key_id", "created_at", "updated_at"}
    assert (first["expires_at"], first["key_id"]) == (None, "k1")
    assert second["expires_at"] is not None
    assert abs(second["expires_at"] - second["updated_at"] - timedelta(hours=1)) < timedelta(seconds=1)
    assert abs(first["created_at"] - datetime.now(UTC)) < timedelta(hours=0.5)
    assert SECRET not in str(first)


@on_every_row
async def test_tokens_and_values_do_not_affect_each_other(store: AuthTokenStore) -> None:
    await store.store_tokens("login", "state", "at", None, None)
    await store.put_value("login", "state", 1)
    assert await store.delete_tokens("login", "state")
    assert await store.get_value("login", "state") == 1
    await store.store_tokens("login", "state", "at", None, None)
    assert await store.delete_values("login") == 1
    assert await store.load_tokens("login", "state") is not None


@on_every_row
async def test_the_largest_value_and_the_longest_key_are_stored(store: AuthTokenStore) -> None:
    namespace, name = "é" * 127 + "x", "🔑" * 128
    assert (len(namespace.encode()), len(name.encode())) == (MAX_VALUE_GROUP_BYTES, MAX_VALUE_NAME_BYTES)
    value = "x" * (MAX_VALUE_BYTES - 2)
    await store.put_value(namespace, name, value)
    assert await store.get_value(namespace, name) == value
    assert await store.pop_value(namespace, name) == value


# -- arguments -----------------------------------------------------------------------------------------


def _nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels - 1):
        value = [value]
    return value


_LOOP: list[Any] = []
_LOOP.append(_LOOP)

BAD_VALUES: dict[str, tuple[Any, str]] = {
    "NaN": ({"a": float("nan")}, "must be a JSON value"),
    "infinity": (float("inf"), "must be a JSON value"),
    "bytes": (SECRET.encode(), "must be a JSON value"),
    "a datetime": ({SECRET: datetime.now(UTC)}, "must be a JSON value"),
    "a set": ({SECRET}, "must be a JSON value"),
    "a mapping that is no dict": (MappingProxyType({SECRET: 1}), "must be a JSON value"),
    "a key that is no str": ({"a": [{7: SECRET}]}, "must be a JSON value"),
    "a key None": ({None: SECRET}, "must be a JSON value"),
    "too large": ("x" * (MAX_VALUE_BYTES - 1), f"has {MAX_VALUE_BYTES + 1} bytes as JSON"),
    "too large in its escaped form": ("é" * (MAX_VALUE_BYTES // 6 + 1), "bytes as JSON"),
    "33 levels": (_nested(33), "nested more than 32 levels"),
    "100000 levels": (_nested(100_000), "nested more than 32 levels"),
    "itself": (_LOOP, "nested more than 32 levels deep, or contains itself"),
}


@pytest.mark.parametrize(("value", "message"), BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_what_is_no_json_value_is_refused(value: Any, message: str) -> None:
    async def main() -> None:
        async with open_store("memory://", keyring=KEYRING) as store:
            with pytest.raises(InvalidInputError, match=message) as caught:
                await store.put_value("login", "state", value)
            assert SECRET not in str(caught.value)
            assert caught.value.__context__ is None
            assert await store.get_value("login", "state", "missing") == "missing"

    asyncio.run(main())


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=10,
    )
)
def test_every_json_value_is_stored(value: Any) -> None:
    async def main() -> Any:
        async with open_store("memory://", keyring=KEYRING) as store:
            await store.put_value("login", "state", value)
            return await store.get_value("login", "state", "missing")

    assert json.dumps(asyncio.run(main())) == json.dumps(value)


def test_the_deepest_value_is_stored() -> None:
    async def main() -> None:
        async with open_store("memory://", keyring=KEYRING) as store:
            await store.put_value("login", "state", _nested(32))
            assert await store.get_value("login", "state") == _nested(32)

    asyncio.run(main())


BAD_KEYS: list[tuple[Any, Any, str]] = [
    ("", "n", "namespace must not be empty"),
    ("g", "", "name must not be empty"),
    (None, "n", "namespace must be a str, not NoneType"),
    ("g", b"n", "name must be a str, not bytes"),
    ("g" * 256, "n", "namespace has 256 bytes as UTF-8; at most 255 are allowed"),
    ("g", "é" * 257, "name has 514 bytes as UTF-8; at most 512 are allowed"),
    ("g\0", "n", "namespace holds a NUL character"),
    ("g", "\0n", "name holds a NUL character"),
    ("g", "\ud800", "name holds a lone surrogate"),
]


@pytest.mark.parametrize(("namespace", "name", "message"), BAD_KEYS)
def test_keys_are_checked_in_every_call(namespace: Any, name: Any, message: str) -> None:
    async def main() -> None:
        async with open_store("memory://", keyring=KEYRING) as store:
            calls: list[Awaitable[object]] = [
                store.put_value(namespace, name, 1),
                store.get_value(namespace, name),
                store.pop_value(namespace, name),
                store.reseal_value(namespace, name),
            ]
            if message.startswith("namespace"):
                calls += [store.delete_values(namespace)]
                if namespace is not None:
                    calls += [_listed(store, namespace=namespace)]
            for call in calls:
                with pytest.raises(InvalidInputError, match=message):
                    await call

    asyncio.run(main())


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("inf"), 10**9 + 1, "60", True, timedelta(0), timedelta(-1)])
def test_a_time_to_live_is_checked(ttl: Any) -> None:
    async def main() -> None:
        async with open_store("memory://", keyring=KEYRING) as store:
            with pytest.raises(InvalidInputError, match="ttl must be"):
                await store.put_value("login", "state", 1, ttl=ttl)
            assert await store.get_value("login", "state") is None

    asyncio.run(main())


@pytest.mark.parametrize("number", [0, -1, 1.5, True, "x", 10**9])
def test_batch_and_page_sizes_are_checked(number: Any) -> None:
    async def main() -> None:
        async with open_store("memory://", keyring=KEYRING) as store:
            with pytest.raises(InvalidInputError, match="batch_size must be a whole number"):
                await store.purge_values(batch_size=number)
            with pytest.raises(InvalidInputError, match="page_size must be a whole number"):
                await _listed(store, page_size=number)

    asyncio.run(main())


# -- backends, clocks and ends ----------------------------------------------------------------------------


class _WithoutValues:
    """A backend without the methods of the protocol `SupportsValues`."""

    def __init__(self) -> None:
        backend = MemoryBackend()
        for name in {*dir(backend)} - {name for name in dir(SupportsValues) if name.endswith(("_value", "_values"))}:
            if not name.startswith("_"):
                setattr(self, name, getattr(backend, name))

    def __repr__(self) -> str:
        return "<WithoutValues>"


def test_a_backend_that_keeps_no_values_supports_everything_else() -> None:
    async def main() -> None:
        backend: Any = _WithoutValues()
        async with AuthTokenStore(backend=backend, keyring=KEYRING) as store:
            await store.store_tokens("github", "u1", "at", None, None)
            assert await store.load_tokens("github", "u1") is not None
            calls: list[Awaitable[object]] = [
                store.put_value("login", "state", SECRET),
                store.get_value("login", "state"),
                store.pop_value("login", "state"),
                store.delete_values("login"),
                store.purge_values(),
                store.reseal_value("login", "state"),
                _listed(store),
            ]
            for call in calls:
                with pytest.raises(UnsupportedOperationError, match=r"<WithoutValues> keeps no values.*SupportsValues"):
                    await call

    asyncio.run(main())


def test_a_closed_store_has_no_values() -> None:
    async def main() -> None:
        store = open_store("memory://", keyring=KEYRING)
        await store.put_value("login", "state", 1)
        await store.aclose()
        for call in (store.put_value("login", "state", 1), store.get_value("login", "state"), store.purge_values()):
            with pytest.raises(StoreClosedError):
                await call

    asyncio.run(main())


def test_the_database_s_clock_decides_and_not_the_store_s() -> None:
    async def main() -> None:
        now = 1_000_000.0
        backend = MemoryBackend(clock=lambda: now)
        async with AuthTokenStore(backend=backend, keyring=KEYRING, clock=lambda: 0.0) as store:
            await store.put_value("login", "state", 1, ttl=60)
            [entry] = [entry async for entry in store.list_values()]
            assert entry["expires_at"] == datetime.fromtimestamp(now + 60, UTC)
            now += 59.999
            assert await store.get_value("login", "state") == 1
            now += 0.001
            assert await store.get_value("login", "state") is None
            assert await store.purge_values() == 1

    asyncio.run(main())


# -- answers that are not believed ----------------------------------------------------------------------------


class _Listing(MemoryBackend):
    """Lists what a test says."""

    pages: list[list[ScannedValue]]

    async def scan_values(self, **_: Any) -> list[ScannedValue]:
        return self.pages.pop(0)


def _entry(group: Any = "login", name: Any = "a", **changes: Any) -> ScannedValue:
    columns: dict[str, Any] = {"expires_at": None, "key_id": "k1", "created_at": 1, "updated_at": 1, **changes}
    return ScannedValue(ValueKey(group, name), **columns)


def test_values_that_no_store_has_written_are_refused_and_the_others_are_listed() -> None:
    async def main() -> None:
        backend = _Listing()
        async with AuthTokenStore(backend=backend, keyring=KEYRING) as store:
            bad: list[dict[str, Any]] = [
                {"expires_at": 2**62},
                {"expires_at": "soon"},
                {"key_id": "a\nb"},
                {"created_at": None},
                {"updated_at": True},
                {"name": ""},
                {"name": "b\udcff"},
            ]
            for changes in bad:
                backend.pages = [[_entry(), _entry(**{"name": "b", **changes}), _entry(name="c")]]
                found: list[str] = []
                with pytest.raises(TamperedError, match="no store has written"):
                    await _list_into(found, store)
                assert found == ["a", "c"]
            backend.pages = [[_entry(key_id=""), _entry(name="b", key_id="")]]
            with pytest.raises(TamperedError, match=r"name 'a': key_id .* \(1 more values were altered\)"):
                await _listed(store)

    asyncio.run(main())


async def _list_into(names: list[str], store: AuthTokenStore) -> None:
    async for entry in store.list_values():
        names.append(entry["name"])  # noqa: PERF401 - a comprehension would lose the names before the error


@pytest.mark.parametrize(
    "page",
    [
        [_entry("other")],
        [_entry(name="b"), _entry(name="a")],
        [_entry(name="a"), _entry(name="a")],
    ],
    ids=["of another namespace", "not in order", "twice"],
)
def test_a_value_that_was_not_requested_ends_the_list(page: list[ScannedValue]) -> None:
    async def main() -> None:
        backend = _Listing()
        async with AuthTokenStore(backend=backend, keyring=KEYRING) as store:
            backend.pages = [page]
            with pytest.raises(TamperedError, match="was not requested, or is not in order"):
                await _listed(store, namespace="login")

    asyncio.run(main())
