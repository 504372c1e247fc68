"""The options of `open_store`: equal as keywords and in a URL, typed, and checked before a connection is opened."""

from __future__ import annotations

from typing import Any, get_type_hints

import pytest

from support.matrix import Row, every_row
from tokenstore import ConfigurationError, Keyring, TokenStoreError, open_store
from tokenstore.options import StoreOptions, TableOptions
from tokenstore_sql.backend import SQLBackend
from tokenstore_sql.mysql.backend import MySQLBackend
from tokenstore_sql.options import POOL_OPTIONS, TABLE_OPTIONS
from tokenstore_sql.postgres.backend import PostgresBackend
from tokenstore_sql.sqlite.backend import SQLiteBackend


@every_row
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "soon", "", None, True, [], 1e10])
def test_an_invalid_option_is_refused_before_a_connection_is_opened(
    row: Row, url: str, value: Any, keyring: Keyring
) -> None:
    with pytest.raises(TokenStoreError) as caught:
        open_store(url, keyring=keyring, lock_timeout=value)
    assert str(caught.value).startswith("lock_timeout must be ")


def test_the_typed_options_are_exactly_the_options_of_the_backends() -> None:
    """So type checkers know every keyword option."""
    backends: list[type[SQLBackend]] = [SQLiteBackend, PostgresBackend, MySQLBackend]
    of_drivers = {name for backend in backends for name in backend.driver_options}
    assert get_type_hints(TableOptions).keys() == TABLE_OPTIONS.keys()
    assert get_type_hints(StoreOptions).keys() == {*TABLE_OPTIONS, *POOL_OPTIONS, *of_drivers}


@every_row
def test_an_option_can_be_a_keyword_or_in_the_url_but_not_both(row: Row, url: str, keyring: Keyring) -> None:
    """It has the same meaning in both places. Unknown and invalid options are errors."""
    bare = url.partition("?")[0]
    open_store(bare, keyring=keyring, lock_timeout=3)
    open_store(f"{bare}?lock_timeout=3", keyring=keyring)
    refused: list[tuple[str, dict[str, Any], str]] = [
        (f"{bare}?lock_timeout=3", {"lock_timeout": 3}, "in the URL and a keyword argument"),
        (f"{bare}?lock_tiemout=3", {}, r"unknown: lock_tiemout; the options of .* are .*lock_timeout"),
        (bare, {"colour": "red"}, "unknown: colour"),
        (bare, {"lock_timeout": 0}, "lock_timeout must be more than zero"),
        (bare, {"lock_timeout": float("nan")}, "lock_timeout must be more than zero"),
        (f"{bare}?lock_timeout=soon", {}, "lock_timeout must be a number of seconds"),
    ]
    if row.name != "memory":
        refused += [
            (f"{bare}?table=a;drop", {}, "table must be an identifier"),
            (bare, {"table": "x" * 49}, "table must be an identifier"),
            (f"{bare}?pool_size=0", {}, "pool_size must be a whole number"),
            (bare, {"pool_size": True}, "pool_size must be a whole number"),
        ]
    for target, options, message in refused:
        with pytest.raises(ConfigurationError, match=message):
            open_store(target, keyring=keyring, **options)
