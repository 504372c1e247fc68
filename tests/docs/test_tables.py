"""The tables and numbers of the documentation match the code."""

from __future__ import annotations

import builtins
import re
from pathlib import Path

import pytest
import typer
from sqlalchemy import MetaData
from sqlalchemy.dialects import mysql, postgresql, sqlite

import tokenstore_memory
from support.pages import (
    BACKENDS,
    CLI,
    ERRORS,
    LIMITS,
    LOCKING,
    OPTIONS,
    PAGES,
    PROJECT,
    README,
    SCHEMA,
    SEALED_FORMAT,
    SEALING,
    STACKS,
    VALUES,
    codes,
    named,
    prose,
    table,
)
from tokenstore import errors
from tokenstore.cancellation import FINISH_GRACE
from tokenstore.cli.app import app
from tokenstore.cli.exits import EXIT_CODES
from tokenstore.protocol import Backend
from tokenstore.records import (
    MAX_ACCOUNT_BYTES,
    MAX_EXTRA_DEPTH,
    MAX_NAMESPACE_BYTES,
    MAX_PROVIDER_BYTES,
    MAX_TOKEN_BYTES,
    MAX_USER_ID_BYTES,
)
from tokenstore.registry import _BUILT_IN
from tokenstore.testing import conformance
from tokenstore.value_records import MAX_VALUE_BYTES, MAX_VALUE_GROUP_BYTES, MAX_VALUE_NAME_BYTES
from tokenstore.values import ValueOperations
from tokenstore_sql import calls, token_table, values_table
from tokenstore_sql import options as sql_options
from tokenstore_sql.mysql import backend as mysql_backend
from tokenstore_sql.postgres import backend as postgres_backend
from tokenstore_sql.schema import DEFAULT_TABLE
from tokenstore_sql.sqlite import backend as sqlite_backend
from tokenstore_sql.sqlite import files as sqlite_files
from tokenstore_sql.statements.statements import Statements


def test_the_limits_of_a_key_count_the_longest_sealed_value() -> None:
    """Each text of the longest place has two bytes before it; the header has two and the key's name."""
    longest = [MAX_NAMESPACE_BYTES, MAX_PROVIDER_BYTES, MAX_USER_ID_BYTES, MAX_ACCOUNT_BYTES, len("refresh_token")]
    associated = 2 + 32 + sum(2 + size for size in longest)
    assert f"{MAX_TOKEN_BYTES} bytes of plaintext and {associated} bytes of associated data" in prose(SEALING)
    assert f"at most {MAX_TOKEN_BYTES} bytes" in prose(SEALED_FORMAT)
    assert f"at most {MAX_EXTRA_DEPTH} levels deep" in prose(SEALED_FORMAT)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_errors_that_a_page_names_exist(page: Path) -> None:
    names = set(re.findall(r"\b[A-Z]\w+Error\b", page.read_text("utf-8")))
    assert names <= {*errors.__all__, *dir(builtins)}


def test_the_errors_page_names_every_error() -> None:
    assert {*errors.__all__} <= {*re.findall(r"\b[A-Z]\w+Error\b", ERRORS.read_text("utf-8"))}
    listed = {name for name, *_ in table(ERRORS, "error")} - {"---"}
    roots = {"`TokenStoreError`", "`RefreshError`", "`SealingError`"}
    assert listed == {f"`{name}`" for name in errors.__all__} - roots


SQL = {
    "PostgreSQL": postgres_backend.PostgresBackend,
    "MySQL": mysql_backend.MySQLBackend,
    "SQLite": sqlite_backend.SQLiteBackend,
}


def test_the_table_of_urls_matches_the_registry() -> None:
    """The table has each built-in scheme with its driver and the extra that installs the driver."""
    found = {}
    for schemes_cell, driver, install in table(README, "URL scheme"):
        for scheme in codes(schemes_cell):
            found[scheme.removesuffix("://")] = (driver, "".join(codes(install)).strip("[]"))
    expected = {}
    for backend in SQL.values():
        for scheme, url_driver in backend.drivers.items():
            expected[scheme] = (url_driver.partition("+")[2], backend.extras.get(url_driver, ""))
    memory = found.pop("memory")
    assert found == expected
    assert memory[1] == ""
    assert {scheme.partition("+")[0] for scheme in found} | {"memory"} == _BUILT_IN.keys()
    assert {extra for _, extra in found.values()} - {""} <= PROJECT["optional-dependencies"].keys()


def test_the_table_of_options_matches_the_code() -> None:
    """The table has each option with its default and the databases that accept it."""
    every = {"memory", *SQL}
    groups = {"all": every, "SQL": {*SQL}, "SQL, but not SQLite": {*SQL} - {"SQLite"}}
    found: dict[str, set[str]] = {name: set() for name in every}
    defaults = {}
    for names, where, default, _ in table(OPTIONS, "option"):
        for name in codes(names):
            defaults[name] = default.strip("`")
            for place in groups.get(where) or set(where.split(", ")):
                found[place].add(name)
    expected = {
        name: {*sql_options.TABLE_OPTIONS, *sql_options.POOL_OPTIONS, *backend.driver_options}
        for name, backend in SQL.items()
    }
    expected["SQLite"].remove("schema")  # SQLite knows the option only to refuse it with a reason
    expected["memory"] = {*tokenstore_memory._OPTIONS}
    assert found == expected
    assert list(defaults)[:3] == list(sql_options.TABLE_OPTIONS), "with an engine or session only the first three apply"

    assert defaults["table"] == DEFAULT_TABLE
    for name, value in {**sql_options.POOL_DEFAULTS, "lock_timeout": sql_options.LOCK_TIMEOUT}.items():
        assert float(defaults[name]) == value
    assert float(defaults["connect_timeout"]) == postgres_backend._asyncpg_arguments({})["timeout"]
    assert (defaults["prepared_statements"], defaults["ssl"]) == ("true", "false")
    assert "statement_cache_size" not in postgres_backend._asyncpg_arguments({})
    assert mysql_backend._tls({}) is None


def test_the_exit_codes_and_commands_match_the_command_line() -> None:
    codes_of_the_help = re.findall(r"(\d+) [^;.]+", EXIT_CODES)
    assert [code for code, _ in table(CLI, "exit code")] == codes_of_the_help
    # An attribute of Click that typer's type annotations do not have.
    names = list(getattr(typer.main.get_command(app), "commands"))  # noqa: B009
    assert [name.strip("`") for name, *_ in table(CLI, "command")] == names


def test_the_table_of_columns_matches_the_schema() -> None:
    kinds = [module.dialect() for module in (postgresql, mysql, sqlite)]
    expected = [
        [column.name, *(column.type.compile(dialect=kind) for kind in kinds), "yes" if column.nullable else "no"]
        for column in token_table(MetaData()).columns
    ]
    assert [[cell.strip("`") for cell in row[:5]] for row in table(SCHEMA, "column")] == expected


def test_the_table_of_the_columns_of_values_matches_the_schema() -> None:
    kinds = [module.dialect() for module in (postgresql, mysql, sqlite)]
    values = values_table(MetaData())
    expected = [
        [column.name, *(column.type.compile(dialect=kind) for kind in kinds), "yes" if column.nullable else "no"]
        for column in values.columns
    ]
    assert [[cell.strip("`") for cell in row[:5]] for row in table(SCHEMA, "column of values")] == expected
    assert {f"`{values.name}`", *(f"`{index.name}`" for index in values.indexes)} <= {
        *re.findall("`[^`]+`", prose(SCHEMA).replace("`_values`", f"`{values.name}`"))
    }


def test_the_page_of_values_names_the_methods_and_the_limits() -> None:
    methods = {text.partition("(")[0] for cells in table(VALUES, "method") for text in codes(cells[0])}
    assert methods == {name for name in vars(ValueOperations) if not name.startswith("_")}
    text = prose(VALUES)
    assert f"A namespace has 1 to {MAX_VALUE_GROUP_BYTES} bytes of UTF-8, a name 1 to {MAX_VALUE_NAME_BYTES}" in text
    assert f"at most {MAX_VALUE_BYTES} bytes as JSON" in text
    assert f"at most {MAX_EXTRA_DEPTH} levels" in text


def test_the_table_of_locks_matches_the_dialects() -> None:
    found = {what: dict(zip(SQL, cells, strict=True)) for what, *cells in table(LOCKING, "")}
    dialects = {name: backend.dialect_class(1.0) for name, backend in SQL.items()}
    for name, module in (("PostgreSQL", postgresql), ("MySQL", mysql)):
        lock = Statements(token_table(MetaData()), dialects[name].grammar).lock
        statement = str(lock.compile(dialect=module.dialect()))
        [clause] = codes(found["the lock"][name])
        assert f" {clause}" in statement
        assert found["isolation"][name] == dialects[name].isolation_level
        code = found["on timeout"][name].partition(" ")[0]
        assert dialects[name].errors.classes[code] is errors.LockTimeoutError
    assert codes(found["the lock"]["SQLite"]) == ["BEGIN IMMEDIATE"]


def test_the_pages_state_the_constants_of_the_code() -> None:
    """Timeouts, versions and lengths in the text have the values of the code."""
    locking, limits = prose(LOCKING), prose(LIMITS)
    assert f"a busy timeout of {sqlite_files.BUSY_TIMEOUT_MS} ms" in locking
    assert calls._SERVER_GRACE == 1.0
    assert "one second after `lock_timeout`" in locking
    assert FINISH_GRACE == 0.5
    assert "half a second" in locking
    assert f"version {'.'.join(map(str, sqlite_files._MIN_VERSION[:2]))} or later" in limits
    assert f"1 to {MAX_PROVIDER_BYTES} bytes of UTF-8, a user id 1 to {MAX_USER_ID_BYTES}" in limits
    assert f"an account at most {MAX_ACCOUNT_BYTES}, a namespace at most {MAX_NAMESPACE_BYTES}" in limits
    assert f"most {MAX_TOKEN_BYTES}" in limits
    assert f"have at most {MAX_EXTRA_DEPTH} levels" in limits


def test_the_backend_guide_names_every_protocol_method_and_class() -> None:
    methods = [name for cells in table(BACKENDS, "method") for name in codes(cells[0])]
    assert sorted(methods) == sorted(name for name in vars(Backend) if not name.startswith("_"))
    classes = [name for cells in table(BACKENDS, "class") for name in codes(cells[0])]
    assert {*classes, "Testbed", "sealed"} == {*conformance.__all__}


def test_the_table_of_stacks_has_the_versions_that_the_extras_require() -> None:
    floors = {
        name.lower(): floor
        for requirements in PROJECT["optional-dependencies"].values()
        for name, floor in re.findall(r"([\w-]+)>=([\d.]+)", " ".join(requirements))
    }
    clients = {"httpx", "httpx2", "requests", "aiohttp", "authlib", "slack_sdk", "mcp"}
    names = {*clients, "django", "fastapi", "flask", "starlette", "celery", "pytest"}
    found = {}
    for library, _, extra, oldest, _ in table(STACKS, "library"):
        [first, *_] = re.split(r"[ ,]", library.lower())
        found[first] = oldest
        if extra != "none":
            assert codes(extra)[0] in PROJECT["optional-dependencies"]
            assert oldest
    assert {name: found[name] for name in names} == {name: floors[name] for name in names}
    assert found["opentelemetry"] == floors["opentelemetry-api"]
