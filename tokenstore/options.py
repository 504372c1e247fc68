"""The options of a backend, given by keyword or in a URL's query."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import TypedDict

from tokenstore.errors import ConfigurationError, InvalidInputError
from tokenstore.validation import seconds

__all__ = [
    "OptionParser",
    "StoreOptions",
    "TableOptions",
    "identifier",
    "one_of",
    "positive_int",
    "positive_seconds",
    "read_options",
    "switch",
    "text",
]

OptionParser = Callable[[str, object], object]
"""Turns a keyword's value, or a URL's text, into the option's value; raises InvalidInputError."""


class TableOptions(TypedDict, total=False):
    """Keyword options of a store on a borrowed session or engine, for type checkers.

    ``docs/options.md`` says what each means; times are in seconds.
    """

    table: str
    schema: str
    lock_timeout: float


class StoreOptions(TableOptions, total=False):
    """Keyword options of a store by URL, for type checkers: those of every backend that ships with tokenstore.

    Which of them a backend accepts is checked when the store is opened. Options of other backends have to be in the
    URL's query, which type checkers do not read.
    """

    pool_size: int
    pool_timeout: float
    pool_recycle: float
    statement_timeout: float
    connect_timeout: float
    # PostgreSQL, MySQL and MariaDB
    host: str
    password: str | Callable[[], str | Awaitable[str]]
    # PostgreSQL
    application_name: str
    channel_binding: str
    prepared_statements: bool
    passfile: str
    service: str
    sslcert: str
    sslcrl: str
    sslkey: str
    sslmode: str
    sslrootcert: str
    target_session_attrs: str
    # MySQL and MariaDB
    charset: str
    ssl: bool
    ssl_ca: str
    ssl_cert: str
    ssl_key: str
    unix_socket: str


def read_options(
    backend: str, parsers: Mapping[str, OptionParser], query: Mapping[str, object], keywords: Mapping[str, object]
) -> dict[str, object]:
    """Merge a URL's query with keyword options.

    Args:
        backend: What to call the backend in an error.
        parsers: The known options.
        query: Options from the URL, as text.
        keywords: Options from the call.

    Raises:
        ConfigurationError: An option is unknown, given twice, or has an unacceptable value.
    """
    if unknown := sorted((query.keys() | keywords.keys()) - parsers.keys()):
        raise ConfigurationError(
            f"unknown: {', '.join(unknown)}; the options of {backend} are {', '.join(sorted(parsers))}"
        )
    if twice := sorted(query.keys() & keywords.keys()):
        raise ConfigurationError(f"{', '.join(twice)}: in the URL and a keyword argument; pass each option once")
    try:
        return {name: parsers[name](name, value) for name, value in (*query.items(), *keywords.items())}
    except InvalidInputError as error:
        raise ConfigurationError(str(error)) from None


def positive_seconds(name: str, value: object) -> float:
    """A duration in seconds, more than zero."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    return seconds(name, value, positive=True)


def positive_int(name: str, value: object) -> int:
    """A whole number of at least one."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}", value, re.ASCII):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 10**9:
        raise InvalidInputError(f"{name} must be a whole number of at least 1")
    return value


def identifier(name: str, value: object) -> str:
    """A table's or schema's name: ASCII letters, digits and underscores, at most 48 of them.

    The limit leaves room for the index's name within PostgreSQL's 63 bytes.
    """
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,47}", value, re.ASCII):
        raise InvalidInputError(f"{name} must be an identifier of at most 48 ASCII letters, digits and underscores")
    return value


def one_of(*values: str) -> OptionParser:
    """A parser of an option that has one of these values."""

    def parse(name: str, value: object) -> str:
        if not isinstance(value, str) or value not in values:
            raise InvalidInputError(f"{name} must be {' or '.join(values)}")
        return value

    return parse


def switch(name: str, value: object) -> bool:
    """A bool; in a URL ``true`` or ``false``."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value in ("true", "false"):
        return value == "true"
    raise InvalidInputError(f"{name} must be true or false")


def text(name: str, value: object) -> str:
    """Any text."""
    if not isinstance(value, str):
        raise InvalidInputError(f"{name} must be a str")
    return value
