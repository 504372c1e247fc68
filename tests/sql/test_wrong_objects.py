"""An object of SQLAlchemy that the store cannot use, or that another function takes: the error says what to write."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlmodel import Session as SQLModelSession

import tokenstore.sync
from support.error_text import assert_silent
from tokenstore import AuthTokenStore, ConfigurationError, Keyring, open_store

SYNC = "this one has no asyncio: pass the database's URL to tokenstore.sync.open_store"


@contextmanager
def _connection(folder: Path) -> Iterator[Any]:
    engine = create_engine(f"sqlite:///{folder}/own.db")
    with engine.connect() as connection:
        yield connection
    engine.dispose()


@pytest.mark.parametrize("take", [lambda given, **of: AuthTokenStore(db_session=given, **of), open_store])
@pytest.mark.parametrize(
    "make",
    [
        Session,
        SQLModelSession,
        lambda connection: scoped_session(sessionmaker(connection)),
        sessionmaker,
        lambda connection: connection,
        lambda connection: connection.engine,
    ],
    ids=["Session", "SQLModel", "scoped_session", "sessionmaker", "Connection", "Engine"],
)
@pytest.mark.sqlite
def test_objects_without_asyncio_are_refused(
    make: Callable[[Any], Any], take: Callable[..., Any], tmp_path: Path, keyring: Keyring
) -> None:
    with _connection(tmp_path) as connection:
        given = make(connection)
        for opener in (take, tokenstore.sync.open_store):
            with pytest.raises(ConfigurationError, match=f"not {type(given).__name__}; {SYNC}"):
                opener(given, keyring=keyring)


def _engine() -> AsyncEngine:
    return create_async_engine("postgresql+asyncpg://someone:hunter2@db.example.com/d")


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (_engine(), "AsyncEngine; pass an engine to open_store"),
        (AsyncConnection(_engine()), r"AsyncConnection; pass AsyncSession\(connection\) to AuthTokenStore"),
        (async_sessionmaker(_engine()), "async_sessionmaker; call it, and pass the session that it returns"),
        ("postgresql://someone:hunter2@db.example.com/d", "str; pass a URL to open_store"),
        (AsyncSession, "type"),
    ],
)
def test_what_is_no_session_is_refused(given: Any, error: str, keyring: Keyring) -> None:
    with pytest.raises(
        ConfigurationError, match=f"^db_session must be a SQLAlchemy AsyncSession, not {error}"
    ) as caught:
        AuthTokenStore(db_session=given, keyring=keyring)
    assert_silent(caught.value, "hunter2")


@pytest.mark.parametrize("opener", [open_store, tokenstore.sync.open_store])
@pytest.mark.parametrize(
    ("given", "error"),
    [
        (AsyncSession(_engine()), r"AsyncSession; pass a session to AuthTokenStore\(db_session="),
        (async_scoped_session(async_sessionmaker(_engine()), scopefunc=int), "async_scoped_session; pass a session to"),
        (async_sessionmaker(_engine()), "async_sessionmaker; call it, and pass the session"),
        (AsyncConnection(_engine()), r"AsyncConnection; pass AsyncSession\(connection\) to AuthTokenStore"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_url_and_no_engine_is_refused(
    given: Any, error: str, opener: Callable[..., Any], keyring: Keyring
) -> None:
    expected = f"^open_store takes a URL, an AsyncEngine or a backend, not {error}"
    with pytest.raises(ConfigurationError, match=expected):
        opener(given, keyring=keyring)


def test_a_scoped_session_outside_of_its_scope_is_refused(keyring: Keyring) -> None:
    """As where the store is made when a module is imported, and no event loop runs."""
    scoped = async_scoped_session(async_sessionmaker(_engine()), scopefunc=asyncio.current_task)
    with pytest.raises(ConfigurationError, match=r"has no session here \(RuntimeError\); make the store where"):
        AuthTokenStore(db_session=scoped, keyring=keyring)  # type: ignore[arg-type]
