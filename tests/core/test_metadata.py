"""The application's own fields: kept beside the tokens, sealed, and changed by the application alone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from support.fresh_store import on_every_row
from support.interceptor import Interceptor
from support.keys import keyring_of
from support.store_calls import load
from tokenstore import (
    AuthTokenStore,
    ConflictError,
    InvalidInputError,
    Keyring,
    SealingError,
    TamperedError,
    UnknownKeyError,
)
from tokenstore.records import MAX_EXTRA_DEPTH, MAX_TOKEN_BYTES, SealedMetadata, SealedRecord, TokenKey, TokenRecord
from tokenstore_memory import MemoryBackend

ME = ("github", "u1")
KEY = TokenKey(*ME)
WORKSPACE = "acme-workspace-secret"
EXPIRED = datetime(2020, 1, 1, tzinfo=UTC)


async def _logged_in(store: AuthTokenStore, **arguments: Any) -> TokenRecord:
    await store.store_tokens(*ME, "gho_1", "ghr_1", None, **arguments)
    return await load(store)


async def _row(store: AuthTokenStore) -> SealedRecord:
    row = await store._backend.get(KEY)
    assert row is not None
    return row


@on_every_row
async def test_an_update_merges_fields_and_changes_nothing_else(store: AuthTokenStore) -> None:
    """A field of None is removed. Tokens, generation, times, lease and failure stay."""
    assert await store.update_metadata(*ME, {"a": 1}) is None
    assert await store.load_tokens(*ME) is None
    before = await _logged_in(store)
    assert (before["metadata"], before["metadata_key_id"]) == ({}, None)
    generation, backend = before["generation"], store._backend
    assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=60)
    leased = await _row(store)
    assert await store.update_metadata(*ME, {"workspace": WORKSPACE, "plan": {"tier": 1}}) == {
        "workspace": WORKSPACE,
        "plan": {"tier": 1},
    }
    assert await store.update_metadata(*ME, {"plan": {"seats": [1, None]}, "workspace": None, "absent": None}) == {
        "plan": {"seats": [1, None]}
    }
    assert await store.update_metadata(*ME, {}) == {"plan": {"seats": [1, None]}}
    after = await load(store)
    assert after == before | {"metadata": {"plan": {"seats": [1, None]}}, "metadata_key_id": "k1"}
    row = await _row(store)
    assert (row.tokens, row.lease_holder, row.updated_at) == (leased.tokens, "h", leased.updated_at)
    assert await store.update_metadata(*ME, {"plan": None}) == {}
    assert await load(store) == before
    assert await store.delete_tokens(*ME)
    assert (await _logged_in(store))["metadata"] == {}


@on_every_row
async def test_only_a_call_that_passes_metadata_replaces_it(store: AuthTokenStore) -> None:
    """A mapping replaces all fields, atomically with the tokens; an empty one removes them; None leaves them."""
    assert (await _logged_in(store, metadata={"a": 1, "b": None}))["metadata"] == {"a": 1, "b": None}
    assert (await _logged_in(store))["metadata"] == {"a": 1, "b": None}
    assert (await _logged_in(store, metadata={"c": 2}))["metadata"] == {"c": 2}
    response = {"access_token": "gho_2", "expires_in": 60}
    record = await store.store_token_response(*ME, response)
    assert (record["metadata"], record["refresh_token"]) == ({"c": 2}, "ghr_1")
    record = await store.store_token_response(*ME, response, metadata={"d": 3})
    assert (record["metadata"], record["refresh_token"]) == ({"d": 3}, "ghr_1")
    record = await store.store_token_response(*ME, response, metadata={"e": 4}, keep_refresh_token=False)
    assert (record["metadata"], record["refresh_token"]) == ({"e": 4}, None)
    assert (await _logged_in(store, metadata={}))["metadata"] == {}
    for if_absent in (True, False):
        for account in ("absent", "present"):
            await store.store_tokens(*ME, "gho_1", "ghr_1", None, account="present", metadata={"kept": True})
            if account == "absent":
                await store.delete_tokens(*ME, account=account)
            record = await store.store_token_response(
                *ME, response, account=account, if_absent=if_absent, metadata={"new": True}
            )
            kept = if_absent and account == "present"
            assert record["metadata"] == ({"kept": True} if kept else {"new": True})
    assert not await store.store_tokens(*ME, "x", None, None, if_absent=True, metadata={"x": 1})
    assert (await load(store))["metadata"] == {}
    await store.delete_tokens(*ME)
    assert await store.store_tokens(*ME, "x", None, None, if_absent=True, metadata={"x": 1})
    assert (await load(store))["metadata"] == {"x": 1}


@on_every_row
async def test_a_refresh_leaves_metadata_as_it_is(store: AuthTokenStore) -> None:
    """Also if the application changes it while the provider is called."""
    await store.store_tokens(*ME, "gho_1", "ghr_1", None, metadata={"a": 1})

    async def refresh(record: Mapping[str, Any]) -> Mapping[str, Any]:
        assert record["metadata"] == {"a": 1}
        assert await asyncio.wait_for(store.update_metadata(*ME, {"b": 2}), 20) == {"a": 1, "b": 2}
        return {"access_token": "gho_2", "expires_in": 3600, "metadata": {"from": "the provider"}}

    record = await store.load_fresh_tokens(*ME, refresh=refresh, force=True, force_min_age=0)
    assert record is not None
    assert record["access_token"] == "gho_2"
    stored = await load(store)
    assert (stored["access_token"], stored["metadata"]) == ("gho_2", {"a": 1, "b": 2})


@on_every_row
async def test_concurrent_updates_of_different_fields_are_all_kept(store: AuthTokenStore) -> None:
    """Beside them tokens are stored and resealed, which no update notices."""
    stores = [
        AuthTokenStore(backend=store._backend, keyring=keyring_of(*names))
        for names in (("north", "south"), ("south", "north"))
    ]
    await _logged_in(stores[0])
    names = [f"field-{number}" for number in range(16)]
    await asyncio.gather(
        *(stores[n % 2].update_metadata(*ME, {name: n}) for n, name in enumerate(names)),
        stores[0].store_tokens(*ME, "gho_2", "ghr_2", None),
        stores[1].reseal_tokens(*ME),
    )
    assert (await load(stores[1]))["metadata"] == {name: n for n, name in enumerate(names)}


@on_every_row
async def test_an_update_takes_part_in_a_transaction(store: AuthTokenStore) -> None:
    """It waits for no lease. After a rollback nothing has changed."""
    record = await _logged_in(store)
    assert await store._backend.claim_lease(KEY, generation=record["generation"], holder="h", duration=60)
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        async with store.transaction() as tx:
            assert await tx.update_metadata(*ME, {"a": 1}) == {"a": 1}
            assert await tx.update_metadata(*ME, {"b": 2}) == {"a": 1, "b": 2}
            assert await tx.update_metadata("github", "nobody", {"b": 2}) is None
            raise ZeroDivisionError
    assert (await load(store))["metadata"] == {}
    async with store.transaction() as tx:
        assert await tx.update_metadata(*ME, {"a": 1}) == {"a": 1}
        seen = await tx.load_tokens(*ME)
        assert seen is not None
        assert seen["metadata"] == {"a": 1}
        await tx.store_tokens(*ME, "gho_2", None, None)
        await tx.store_tokens("github", "u2", "gho_2", None, None, metadata={"c": 3})
        assert await tx.store_tokens("github", "u3", "gho_3", None, None, if_absent=True, metadata={"d": 4})
        record = await tx.store_token_response("github", "u3", {"access_token": "gho_4"}, metadata={"e": 5})
        assert record["metadata"] == {"e": 5}
    assert [(await load(store, user))["metadata"] for user in ("u1", "u2", "u3")] == [{"a": 1}, {"c": 3}, {"e": 5}]


@on_every_row
async def test_updates_in_concurrent_transactions_are_all_kept(store: AuthTokenStore) -> None:
    await _logged_in(store)

    async def update(number: int) -> None:
        async with store.transaction() as tx:
            await tx.update_metadata(*ME, {str(number): number})

    await asyncio.gather(*map(update, range(8)))
    assert (await load(store))["metadata"] == {str(number): number for number in range(8)}


def _nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels - 1):
        value = {"a": value}
    return value


REFUSED: list[tuple[Any, str]] = [
    ([1], "{} must be a mapping or None, not list"),
    ({1: WORKSPACE}, "{} must have str keys"),
    ({"a": {WORKSPACE}}, "{} must hold JSON values only (no NaN, datetime or bytes)"),
    ({"a": float("nan")}, "{} must hold JSON values only (no NaN, datetime or bytes)"),
    (_nested(MAX_EXTRA_DEPTH + 1), "{} is nested more than 32 levels deep, or contains itself"),
    ({"a": "x" * MAX_TOKEN_BYTES}, "{} has 262152 bytes as JSON; at most 262144 are allowed"),
]


def test_metadata_has_the_limits_of_extra(keyring: Keyring) -> None:
    """A refused call has written nothing, and its error shows no value."""

    async def main() -> None:
        store = AuthTokenStore(backend=MemoryBackend(), keyring=keyring)
        before = await _logged_in(store, metadata={"a": 1})
        for value, message in REFUSED:
            for name, call in (
                ("metadata", store.store_tokens(*ME, "gho_2", None, None, metadata=value)),
                ("metadata", store.store_token_response(*ME, {"access_token": "gho_2"}, metadata=value)),
                ("changes", store.update_metadata(*ME, value)),
            ):
                with pytest.raises(InvalidInputError) as caught:
                    await call
                assert str(caught.value) == message.format(name).replace(
                    "mapping or None", "mapping" if name == "changes" else "mapping or None"
                )
                assert caught.value.__cause__ is caught.value.__context__ is None
        with pytest.raises(InvalidInputError, match="changes must be a mapping, not NoneType"):
            await store.update_metadata(*ME, None)  # type: ignore[arg-type]
        assert await load(store) == before
        wide = {"b": "x" * (MAX_TOKEN_BYTES - len('{"b":""}'))}
        with pytest.raises(InvalidInputError, match=r"^metadata has 262150 bytes as JSON"):
            await store.update_metadata(*ME, wide)  # with the field that is stored, it is too long
        assert await load(store) == before
        assert await store.update_metadata(*ME, {"a": None}) == {}
        assert await store.update_metadata(*ME, wide) == wide
        await _logged_in(store, metadata=_nested(MAX_EXTRA_DEPTH))

    asyncio.run(main())


@on_every_row
async def test_metadata_of_maximum_size(store: AuthTokenStore) -> None:
    wide = {"b": "x" * (MAX_TOKEN_BYTES - len('{"b":""}'))}
    assert (await _logged_in(store, metadata=wide))["metadata"] == wide
    for letter in "yz":
        assert await store.update_metadata(*ME, {"b": letter * len(wide["b"])}) == {"b": letter * len(wide["b"])}


def test_no_repr_of_a_record_shows_metadata(keyring: Keyring, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        store = AuthTokenStore(backend=MemoryBackend(), keyring=keyring)
        record = await _logged_in(store, metadata={"workspace": WORKSPACE})
        logging.getLogger("test").warning("%s %r", record, record.copy() | {"more": 1})
        assert WORKSPACE not in caplog.text
        row = await _row(store)
        assert repr(row.metadata) == "<SealedMetadata key_id='k1'>"
        assert WORKSPACE.encode() not in (row.metadata.value or b"")

    asyncio.run(main())


@on_every_row
async def test_resealing_reseals_metadata_with_the_new_key(store: AuthTokenStore) -> None:
    """Each part of the row is found by itself: tokens of the new key may have metadata of the old one."""
    backend, south = store._backend, AuthTokenStore(backend=store._backend, keyring=keyring_of("south"))
    north = AuthTokenStore(backend=backend, keyring=keyring_of("north"))
    both = AuthTokenStore(backend=backend, keyring=keyring_of("south", "north"))
    await _logged_in(north, metadata={"a": 1})
    before = await load(north)
    assert await both.reseal_tokens(*ME)
    assert await load(south) == before | {"key_id": "south", "metadata_key_id": "south"}
    assert not await both.reseal_tokens(*ME)
    await north.store_tokens(*ME, "gho_1", None, None, metadata={"a": 1})
    await both.store_tokens(*ME, "gho_2", None, None)
    record = await load(both)
    assert (record["key_id"], record["metadata_key_id"]) == ("south", "north")
    [entry] = [entry async for entry in both.list_tokens()]
    assert entry["metadata_key_id"] == "north"
    assert both.needs_reseal(record)
    assert both.needs_reseal(entry)
    with pytest.raises(UnknownKeyError, match=r"metadata .*'north'"):
        await south.load_tokens(*ME)
    assert await both.reseal_tokens(*ME)
    after = await load(south)
    assert after == record | {"metadata_key_id": "south"}
    assert not both.needs_reseal(after)


@on_every_row
async def test_metadata_that_was_altered_or_moved_is_refused(store: AuthTokenStore) -> None:
    """A value of another row, column or namespace does not open; metadata_key_id must name the value's key."""
    record = await _logged_in(store, metadata={"a": 1}, extra={"a": 1})
    elsewhere = AuthTokenStore(backend=store._backend, keyring=store._sealer.keyring, namespace="elsewhere")
    theirs: list[SealedMetadata] = []
    for key in (KEY._replace(user_id="u2"), KEY._replace(account="work")):
        await store.store_tokens(key.provider, key.user_id, "a", None, None, account=key.account, metadata={"a": 1})
        found = await store._backend.get(key)
        assert found is not None
        theirs.append(found.metadata)
    good = await _row(store)
    assert good.metadata.value is not None
    for bad in (
        *theirs,
        elsewhere._sealer.seal_metadata(KEY, '{"a": 1}'),
        SealedMetadata(good.tokens.extra, "k1"),
        SealedMetadata(good.metadata.value[:-1], "k1"),
        SealedMetadata(good.metadata.value, "k2"),
        SealedMetadata(good.metadata.value, None),
        SealedMetadata(None, "k1"),
        SealedMetadata(b"", "k1"),
    ):
        stored = await _row(store)
        assert await store._backend.set_metadata(KEY, bad, replacing=stored.metadata.value)
        for call in (store.load_tokens(*ME), store.reseal_tokens(*ME), store.update_metadata(*ME, {"b": 1})):
            with pytest.raises(TamperedError, match="user 'u1'"):
                await call
    await store._backend.put(KEY, replace(good.tokens, extra=good.metadata.value), metadata=good.metadata)
    with pytest.raises(TamperedError, match="extra of"):
        await store.load_tokens(*ME)
    # A login with metadata replaces what does not open.
    assert (await _logged_in(store, metadata={"a": 1}))["metadata"] == record["metadata"]


async def _listed(store: AuthTokenStore, **arguments: Any) -> tuple[dict[str, Any], SealingError | None]:
    found: dict[str, Any] = {}
    try:
        async for entry in store.list_tokens(**arguments, with_metadata=True):
            anything: Any = entry
            for shown in (entry, entry.copy(), anything | {"a": 1}, {"a": 1} | anything):
                assert WORKSPACE not in f"{shown!r} {shown}"
            found[entry["user_id"]] = entry["metadata"]
    except SealingError as error:
        return found, error
    return found, None


@on_every_row
async def test_a_listing_has_metadata_only_if_it_asks_for_it(store: AuthTokenStore) -> None:
    """An entry without metadata is the same entry, and no search reads metadata of other rows."""
    for number in range(5):
        metadata = {"number": number, "workspace": WORKSPACE} if number else None
        expires_at = EXPIRED if number % 2 else None
        await store.store_tokens("github", f"u{number}", "gho_1", "ghr_1", expires_at, metadata=metadata)
    stored = {f"u{n}": {"number": n, "workspace": WORKSPACE} if n else {} for n in range(5)}
    for page_size in (1, 2, 500):
        assert await _listed(store, page_size=page_size) == (stored, None)
    assert await _listed(store, status="expired") == ({user: stored[user] for user in ("u1", "u3")}, None)
    assert await _listed(store, user_prefix="u4", provider="github") == ({"u4": stored["u4"]}, None)
    plain = [entry async for entry in store.list_tokens()]
    full = [dict(entry.items()) async for entry in store.list_tokens(with_metadata=True)]
    assert full == [{**entry, "metadata": stored[entry["user_id"]]} for entry in plain]


@on_every_row
async def test_a_listing_goes_on_behind_metadata_that_does_not_open(store: AuthTokenStore) -> None:
    """Such rows are left out, and the error of the first one is raised at the end."""
    north, south = (AuthTokenStore(backend=store._backend, keyring=keyring_of(name)) for name in ("north", "south"))
    for number in range(5):
        await south.store_tokens("github", f"u{number}", "gho_1", None, EXPIRED, metadata={"number": number})
    await north.store_tokens("github", "u1", "gho_1", None, EXPIRED, metadata={"number": 1})
    for arguments in ({}, {"page_size": 1}, {"status": "reauthorization_required"}):
        found, error = await _listed(south, **arguments)
        assert found == {f"u{n}": {"number": n} for n in (0, 2, 3, 4)}
        assert isinstance(error, UnknownKeyError)
        assert error.key_id == "north"
        assert "user 'u1'" in str(error)
        assert error.__cause__ is error.__context__ is None
    key = TokenKey("github", "u0")
    row = await store._backend.get(key)
    assert row is not None
    bad = SealedMetadata(b"x", "south")
    assert await store._backend.set_metadata(key, bad, replacing=row.metadata.value)
    found, error = await _listed(south)
    assert found == {f"u{n}": {"number": n} for n in (2, 3, 4)}
    assert isinstance(error, TamperedError)
    assert str(error).endswith("(1 more rows do not open)")
    assert len([entry async for entry in south.list_tokens()]) == 5


async def _no_refresh(_: Mapping[str, Any]) -> Mapping[str, Any]:
    pytest.fail("the row does not open, so its refresh token must not be used")


@on_every_row
async def test_a_login_leaves_metadata_that_does_not_open(store: AuthTokenStore) -> None:
    """The tokens are the new response's. Loads raise the error until a call replaces the metadata."""
    north, south = (AuthTokenStore(backend=store._backend, keyring=keyring_of(name)) for name in ("north", "south"))
    await north.store_tokens(*ME, "gho_1", "ghr_1", None, metadata={"a": 1})
    unreadable = (await _row(store)).metadata
    await south.store_tokens(*ME, "gho_2", "ghr_2", None)
    response: dict[str, Any] = {"access_token": "gho_3", "expires_in": 60}
    for metadata, key_id in (
        (unreadable, "north"),
        (SealedMetadata(unreadable.value, None), None),
        (SealedMetadata(None, "north"), None),
    ):
        assert await store._backend.set_metadata(KEY, metadata, replacing=(await _row(store)).metadata.value)
        for more in ({}, {"refresh_token": "ghr_2"}):
            record = await south.store_token_response(*ME, response | more)
            assert (record["access_token"], record["refresh_token"]) == ("gho_3", "ghr_2")
            assert (record["metadata"], record["metadata_key_id"]) == ({}, key_id)
            record = await south.store_token_response(*ME, response, if_absent=True)
            assert (record["metadata"], record["metadata_key_id"]) == ({}, key_id)
        async with south.transaction() as tx:
            assert (await tx.store_token_response(*ME, response))["refresh_token"] == "ghr_2"
        assert (await _row(store)).metadata == metadata
        for call in (
            south.load_tokens(*ME),
            south.load_fresh_tokens(*ME, refresh=_no_refresh),
            south.update_metadata(*ME, {"b": 1}),
        ):
            with pytest.raises(UnknownKeyError if key_id else TamperedError, match="user 'u1'"):
                await call
    record = await south.store_token_response(*ME, response, metadata={"b": 2})
    assert (record["metadata"], record["refresh_token"]) == ({"b": 2}, "ghr_2")


def test_an_update_that_other_writes_always_precede_ends_with_an_error(
    keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenstore.metadata._LONGEST", 0)

    class Busy(Interceptor):
        async def set_metadata(self, key: TokenKey, metadata: SealedMetadata, *, replacing: bytes | None) -> bool:
            self.calls["set_metadata"] += 1
            return False

    async def main() -> None:
        backend = Busy(MemoryBackend())
        store = AuthTokenStore(backend=backend, keyring=keyring)
        await _logged_in(store)
        with pytest.raises(ConflictError, match=r"user 'u1'.*repeat the call"):
            await store.update_metadata(*ME, {"a": 1})
        assert backend.calls["set_metadata"] > 10
        assert (await load(store))["metadata"] == {}

    asyncio.run(main())
