"""What an attacker who can read and write the tables, and has no key, can see and do. docs/threat-model.md says it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from support.database import Place
from support.matrix import Row, each_database
from support.refreshers import NEW, Script
from support.store_calls import fresh, load
from support.table_writer import TableWriter, table_writer
from tokenstore import (
    AuthTokenStore,
    Keyring,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    RefreshableRecord,
    RefreshTimeoutError,
    TamperedError,
    open_store,
)

HOUR_US = 3_600_000_000
SEALED = ("access_token", "refresh_token", "extra", "metadata")
KEYRING = Keyring({"k1": bytes(range(32))})

Attack = Callable[[AuthTokenStore, TableWriter], Awaitable[None]]


def _in(hours: float) -> datetime:
    return datetime.now(UTC) + timedelta(hours=hours)


def _us(moment: datetime) -> int:
    return int(moment.timestamp() * 1_000_000)


@asynccontextmanager
async def _opened(place: Place, **options: Any) -> AsyncIterator[AuthTokenStore]:
    async with open_store(place.url, keyring=KEYRING, **options) as store:
        await store.setup()
        yield store


async def _store(store: AuthTokenStore, user: str = "u1", *, version: str = "1", hours: float = 1) -> None:
    await store.store_tokens(
        "github",
        user,
        f"access-{version}",
        f"refresh-{version}",
        _in(hours),
        _in(1000),
        extra={"scope": version},
        metadata={"team": version},
    )


def _run(place: Place, attack: Attack, **options: Any) -> None:
    async def main() -> None:
        async with _opened(place, **options) as store, table_writer(place) as writer:
            await attack(store, writer)

    asyncio.run(main())


# ---- What a reader sees


@each_database
def test_a_reader_sees_names_times_and_lengths(place: Place) -> None:
    """Also the names of keys and values. Equal tokens of two users look different."""

    async def attack(store: AuthTokenStore, writer: TableWriter) -> None:
        for user in ("u1", "u2"):
            await _store(store, user)
        await store.put_value("login", "state-1", "verifier")
        one, two = await writer.row("u1"), await writer.row("u2")
        assert (one["provider"], one["user_id"], one["key_id"]) == ("github", "u1", "k1")
        assert _us(_in(0.9)) < one["access_token_expires_at"] < _us(_in(1.1))
        for column in SEALED:
            assert one[column] != two[column]
            assert len(one[column]) == len(two[column])
        overhead = 2 + len("k1") + 12 + 16
        assert len(one["access_token"]) == overhead + len("access-1")
        value = await writer.value("state-1")
        assert (value["namespace"], value["key_id"]) == ("login", "k1")
        assert len(value["value"]) == overhead + len('"verifier"')

    _run(place, attack)


# ---- What a writer cannot do


@each_database
def test_a_sealed_value_opens_nowhere_else(place: Place) -> None:
    """A writer moves each sealed value to another row and another column, and values to other names."""

    async def attack(store: AuthTokenStore, writer: TableWriter) -> None:
        await _store(store, "u1")
        await _store(store, "u2", version="2")
        await store.put_value("login", "state-1", "verifier")
        mine, theirs, value = await writer.row("u1"), await writer.row("u2"), await writer.value("state-1")
        for column in SEALED:
            others = [mine[other] for other in SEALED if other != column]
            for moved in (theirs[column], *others, value["value"]):
                await writer.change("u1", **{column: moved})
                with pytest.raises(TamperedError):
                    await store.load_tokens("github", "u1")
            await writer.change("u1", **{column: mine[column]})
        await writer.put_back(theirs | {"user_id": "u1"})
        with pytest.raises(TamperedError):
            await store.load_tokens("github", "u1")
        await writer.put_value_back(value | {"name": "state-2"})
        with pytest.raises(TamperedError):
            await store.get_value("login", "state-2")
        await writer.put_value_back(value | {"name": "state-2", "value": mine["metadata"]})
        with pytest.raises(TamperedError):
            await store.pop_value("login", "state-2")

    _run(place, attack)


# ---- What a writer can do


@each_database
def test_an_older_row_can_be_put_back(place: Place) -> None:
    """Whole, in parts, or after its deletion. It opens, and no call sees that it is old."""

    async def attack(store: AuthTokenStore, writer: TableWriter) -> None:
        await _store(store)
        old = await writer.row("u1")
        await _store(store, version="2")
        await writer.change("u1", refresh_token=old["refresh_token"], metadata=old["metadata"])
        record = await load(store)
        assert (record["access_token"], record["refresh_token"]) == ("access-2", "refresh-1")
        assert (record["extra"], record["metadata"]) == ({"scope": "2"}, {"team": "1"})
        await writer.put_back(old)
        assert (await load(store))["access_token"] == "access-1"
        assert await store.delete_tokens("github", "u1")
        await writer.put_back(old)
        assert (await load(store))["access_token"] == "access-1"

    _run(place, attack)


@each_database
def test_parts_of_a_row_can_be_removed(place: Place) -> None:
    """A null is not sealed: the record has no refresh token or fields. An emptied row counts as none."""

    async def attack(store: AuthTokenStore, writer: TableWriter) -> None:
        await _store(store)
        await writer.change("u1", refresh_token=None, extra=None, metadata=None, metadata_key_id=None)
        record = await load(store)
        assert record["access_token"] == "access-1"
        assert (record["refresh_token"], record["extra"], record["metadata"]) == (None, {}, {})
        await writer.change("u1", access_token=b"", key_id="")
        assert await store.load_tokens("github", "u1") is None

    _run(place, attack)


@each_database
def test_a_changed_expiry_is_believed(place: Place) -> None:
    """A writer can prevent a refresh, or cause one. Neither gives the writer a token."""
    script = Script()

    async def attack(store: AuthTokenStore, writer: TableWriter) -> None:
        await _store(store, hours=-1)
        await writer.change("u1", access_token_expires_at=_us(_in(5)))
        record = await fresh(store)
        assert (record["access_token"], script.calls) == ("access-1", 0)
        assert store.is_access_token_valid(record)
        await writer.change("u1", access_token_expires_at=_us(_in(-5)))
        assert ((await fresh(store))["access_token"], script.calls) == (NEW["access_token"], 1)
        await writer.change("u1", refresh_token_expires_at=_us(_in(-5)), access_token_expires_at=_us(_in(-5)))
        with pytest.raises(ReauthorizationRequiredError):
            await fresh(store)
        assert script.calls == 1

    _run(place, attack, refreshers={"github": script})


@each_database
def test_a_changed_failure_is_believed(place: Place) -> None:
    """A writer can make a user log in again, and can have a dead refresh token sent once more."""
    script = Script(ReauthorizationRequiredError("revoked"))

    async def attack(store: AuthTokenStore, writer: TableWriter) -> None:
        await _store(store, hours=-1)
        await writer.change("u1", failure_code="invalid_grant", failed_at=_us(_in(-1)), retry_at=None)
        for calls in (0, 1):
            with pytest.raises(ReauthorizationRequiredError):
                await fresh(store)
            assert script.calls == calls
            await writer.change("u1", failure_code=None, failed_at=None, retry_at=None)
        await writer.change("u1", failure_code="timeout", failed_at=_us(_in(0)), retry_at=_us(_in(9)))
        with pytest.raises(ProviderUnavailableError):
            await fresh(store)
        assert script.calls == 1

    _run(place, attack, refreshers={"github": script})


@each_database
def test_a_lease_can_be_ended_or_made_up(place: Place) -> None:
    """Without the lease of a refresh, another one uses the refresh token, too. A long lease stops every refresh."""
    first, second = Script(), Script()

    async def attack(store: AuthTokenStore, writer: TableWriter) -> None:
        await _store(store, hours=-1)
        first.hold()
        refresh = asyncio.create_task(fresh(store))
        await first.called.wait()
        await writer.change("u1", lease_holder=None, lease_expires_at=None)
        async with _opened(place, refreshers={"github": second}) as other:
            assert (await fresh(other))["access_token"] == NEW["access_token"]
        assert (first.calls, second.calls) == (1, 1)
        first.answer.set()
        await refresh
        await writer.change(
            "u1", lease_holder="x/900000", lease_expires_at=_us(_in(200)), access_token_expires_at=_us(_in(-1))
        )
        async with _opened(place, refreshers={"github": second}, refresh_timeout=0.05) as other:
            with pytest.raises(RefreshTimeoutError):
                await fresh(other)
        assert (first.calls, second.calls) == (1, 1)

    _run(place, attack, refreshers={"github": first})


@each_database
def test_a_generation_that_changes_during_a_refresh_costs_the_new_tokens(place: Place) -> None:
    """The refresh takes the row for a newer one, does not store what it got, and uses the old refresh token again."""
    script, used = Script(), []

    async def refresh(record: RefreshableRecord) -> Mapping[str, Any]:
        used.append(record["refresh_token"])
        return await script(record)

    async def attack(store: AuthTokenStore, writer: TableWriter) -> None:
        await _store(store, hours=-1)
        script.hold()
        task = asyncio.create_task(fresh(store))
        await script.called.wait()
        generation = (await writer.row("u1"))["generation"]
        await writer.change("u1", generation=generation + 1, lease_holder=None, lease_expires_at=None)
        script.answer.set()
        await task
        assert used == ["refresh-1", "refresh-1"]

    _run(place, attack, refreshers={"github": refresh})


@each_database
def test_a_value_can_be_put_back_and_its_expiry_changed(place: Place) -> None:
    """A writer can have a popped value popped once more, and an expired one read."""

    async def attack(store: AuthTokenStore, writer: TableWriter) -> None:
        await store.put_value("login", "state-1", "verifier", ttl=3600)
        row = await writer.value("state-1")
        assert await store.pop_value("login", "state-1") == "verifier"
        await writer.put_value_back(row)
        assert await store.pop_value("login", "state-1") == "verifier"
        await writer.put_value_back(row | {"expires_at": row["expires_at"] - 2 * HOUR_US})
        assert await store.get_value("login", "state-1") is None
        await writer.put_value_back(row | {"expires_at": row["expires_at"] + 2 * HOUR_US})
        assert await store.get_value("login", "state-1") == "verifier"

    _run(place, attack)


# ---- Two deployments in one table


@each_database
def test_a_tenant_of_another_namespace_reads_nothing_and_can_destroy(place: Place) -> None:
    """Both have the same keys and the same tables. The other tenant lists names, replaces rows and deletes values."""

    async def attack(ours: AuthTokenStore, writer: TableWriter) -> None:
        await _store(ours)
        await ours.put_value("login", "state-1", "verifier")
        async with _opened(place, namespace="theirs") as theirs:
            with pytest.raises(TamperedError):
                await theirs.load_tokens("github", "u1")
            with pytest.raises(TamperedError):
                await theirs.get_value("login", "state-1")
            assert [entry["user_id"] async for entry in theirs.list_tokens()] == ["u1"]
            assert [entry["name"] async for entry in theirs.list_values()] == ["state-1"]
            with pytest.raises(TamperedError):
                await theirs.pop_value("login", "state-1")
            assert await ours.get_value("login", "state-1") is None
            await theirs.store_tokens("github", "u1", "theirs", None, None)
        with pytest.raises(TamperedError):
            await ours.load_tokens("github", "u1")

    _run(place, attack, namespace="ours")


@each_database
def test_a_row_of_another_table_opens_if_keys_and_namespace_are_the_same(row: Row, url: str, tmp_path: Any) -> None:
    """So a deployment has keys of its own, or at least a namespace."""
    here, there = Place(row, url), Place(row, row.url_for(tmp_path))

    async def main() -> None:
        for namespace, opens in (("", True), ("production", False)):
            async with _opened(there) as staging, _opened(here, namespace=namespace) as production:
                await _store(staging, version="staging")
                await _store(production, version="production")
                async with table_writer(there) as reader, table_writer(here) as writer:
                    await writer.put_back(await reader.row("u1"))
                if opens:
                    assert (await load(production))["access_token"] == "access-staging"
                    continue
                with pytest.raises(TamperedError):
                    await production.load_tokens("github", "u1")

    asyncio.run(main())
