"""A record whose columns are read as one column is the record that is read column by column."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from support.database import Place, app_engine, connection_of
from support.matrix import Row, mysql_rows, params
from support.tagged_tokens import opened
from tokenstore import AuthTokenStore, Keyring, TamperedError, open_store
from tokenstore.records import SealedRecord, TokenKey
from tokenstore.validation import metadata_problem, requested_row
from tokenstore_sql.connections.connection import Connection
from tokenstore_sql.mysql.alchemy import MySQLAlchemyConnection
from tokenstore_sql.mysql.errors import MySQLErrors
from tokenstore_sql.mysql.grammar import MySQLGrammar
from tokenstore_sql.mysql.packing import unpacking
from tokenstore_sql.rows import record_of
from tokenstore_sql.statements.statements import Statements

KEY = {"p": "github", "u": "u1", "a": ""}
FULL: Mapping[str, str] = {
    "refresh_token": "x'00FF3D'",
    "extra": "x''",
    "metadata": "x'00'",
    "metadata_key_id": "'k1'",
    "access_token_expires_at": "-5",
    "refresh_token_expires_at": str(2**63 - 1),
    "access_token_expiry_known": "0",
    "lease_holder": "'worker'",
    "lease_expires_at": str(-(2**63)),
    "failure_code": "'timeout'",
    "retry_at": "0",
}
EMPTY: Mapping[str, str] = dict.fromkeys(("key_id", "metadata_key_id", "lease_holder", "failure_code"), "''")
TEXTS = {
    "like a mark": "'='",
    "like a packed text": "'=k1'",
    "not UTF-8": "x'61FF'",
    "text": "'\u00e9\U0001f600'",
    "a number": "7",
}
SEPARATORS = ("x'00'", "x'6100'", "x'0061'", "x'610062'", "x'003D61003D6200'")


@asynccontextmanager
async def _connections(store: AuthTokenStore, engine: AsyncEngine) -> AsyncIterator[list[Connection]]:
    """A connection of the store's own, and an application's."""
    async with AsyncExitStack() as stack:
        own = await stack.enter_async_context(connection_of(store))
        alchemy = await stack.enter_async_context(engine.connect())
        _ = await alchemy.execution_options(isolation_level="AUTOCOMMIT")
        yield [own, await MySQLAlchemyConnection.of(alchemy, MySQLErrors())]


async def _alter(engine: AsyncEngine, place: Place, values: Mapping[str, str], user: str = "u1") -> None:
    changes = ", ".join(f"{column} = {value}" for column, value in values.items())
    async with engine.begin() as connection:
        await connection.execute(text(f"UPDATE {place.table} SET {changes} WHERE user_id = '{user}'"))


@mysql_rows
def test_a_packed_record_has_the_values_of_the_columns(place: Place, keyring: Keyring) -> None:
    """NULL, no text, any bytes and the largest numbers, on both kinds of connections, in each query for records."""

    async def main() -> None:
        async with opened(place, keyring) as store, app_engine(place) as engine:
            table = _backend(store).table
            plain, packed = (Statements(table, MySQLGrammar(packs=packs)) for packs in (False, True))
            cases: list[Mapping[str, str]] = [{"account": "account"}, FULL, EMPTY]
            cases += ({column: value} for column in EMPTY for value in TEXTS.values())
            cases.append(dict.fromkeys(FULL, "NULL") | {"access_token_expiry_known": "1"})
            async with _connections(store, engine) as connections:
                for case in cases:
                    await _alter(engine, place, case)
                    for connection in connections:
                        ((*values, clock),), _ = await connection.run(plain.get, KEY)
                        many, parameters = packed.get_many([_key("u1"), _key("u2")])
                        for query, given in ((packed.get, KEY), (packed.lock, KEY), (many, parameters)):
                            rows, _ = await connection.run(query, given)
                            found = [(*sealed, *rest) for *sealed, rest in rows]
                            [(*same, later)] = [row for row in found if row[5] == "u1"]
                            assert same == values
                            assert 0 <= later - clock < 60_000_000

    asyncio.run(main())


@mysql_rows
@pytest.mark.parametrize("column", list(EMPTY))
def test_a_separator_in_a_column_is_refused_with_the_column_s_name(place: Place, column: str, keyring: Keyring) -> None:
    """The columns behind it keep their values."""

    async def main() -> None:
        async with opened(place, keyring) as store, app_engine(place) as engine:
            statements = Statements(_backend(store).table, MySQLGrammar(packs=True))
            await _alter(engine, place, {**FULL, "metadata": "NULL", "metadata_key_id": "NULL"})
            await _alter(engine, place, {"lease_expires_at": "created_at", "retry_at": "created_at"})
            await _alter(engine, place, {"refresh_token_expires_at": "NULL"})
            async with _connections(store, engine) as connections:
                sound: Any = record_of((await connections[0].run(statements.get, KEY)).rows)
                assert not _problem(sound)
                for value in SEPARATORS:
                    await _alter(engine, place, {column: value})
                    for connection in connections:
                        record: Any = record_of((await connection.run(statements.get, KEY)).rows)
                        # The other columns are sound.
                        assert f": {column} has a value" in _problem(record)

    asyncio.run(main())


@mysql_rows
def test_numbers_of_another_type_end_no_query(place: Place, keyring: Keyring) -> None:
    """A migration of the application's may have made a column of text of a column of numbers."""

    async def main() -> None:
        async with opened(place, keyring) as store, app_engine(place) as engine:
            statements = Statements(_backend(store).table, MySQLGrammar(packs=True))
            async with engine.begin() as alchemy:
                await alchemy.execute(text(f"ALTER TABLE {place.table} MODIFY generation VARBINARY(64)"))
            async with _connections(store, engine) as connections:
                for value in ("'text'", "''", "'1.5'", "x'31FF'", "x'3100'", "x'310032'", "x'000000'"):
                    await _alter(engine, place, {"generation": value})
                    for connection in connections:
                        query, parameters = statements.get_many([_key("u1"), _key("u2")])
                        rows, _ = await connection.run(query, parameters)
                        records = {record.key: record for row in rows if (record := record_of([row])) is not None}
                        assert requested_row(_key("u2"), records[_key("u2")]) is not None
                        with pytest.raises(TamperedError, match="u1"):
                            requested_row(_key("u1"), records[_key("u1")])

    asyncio.run(main())


@pytest.mark.mysql
@pytest.mark.parametrize(
    "value", [None, "text", 7, b"", b"\0", b"github", b"github\0u1\0\0", b"\xff" * 9, b"\0" * 6, b"\0" * 5]
)
def test_a_hostile_server_s_answer_is_no_record(value: object) -> None:
    """Whatever it sends in place of a packed record: the key is text, and nothing is a number."""
    found = unpacking(3, 2, 2)(value)
    assert len(found) == 7
    assert all(isinstance(part, str) for part in found[:3])
    assert not any(isinstance(part, int) for part in found)


@pytest.mark.parametrize("row", params(names=["mariadb+aiomysql", "mariadb+asyncmy"]))
def test_aiomysql_reads_few_columns(row: Row, url: str, keyring: Keyring) -> None:
    """Asyncmy reads them as they are: in C, that takes less time than unpacking."""

    async def main() -> None:
        async with open_store(url, keyring=keyring) as store, app_engine(Place(row, url)) as engine:
            for each in (store, open_store(engine, keyring=keyring)):
                columns = _backend(each).statements.get.selected_columns
                assert len(columns) == (5 if row.name.endswith("aiomysql") else 20)

    asyncio.run(main())


def _backend(store: AuthTokenStore) -> Any:
    return store._backend


def _problem(record: SealedRecord) -> str:
    """The first column that the core refuses, as a message."""
    try:
        requested_row(record.key, record)
    except TamperedError as error:
        return str(error)
    return metadata_problem(record.key, record.metadata) or ""


def _key(user_id: str) -> TokenKey:
    return TokenKey("github", user_id)
