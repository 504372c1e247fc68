"""Mistakes that a type checker must find.

Both checkers report an ignore that silences nothing, so each line below fails the check once its mistake is accepted.
"""

from datetime import UTC, datetime

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from tokenstore import AuthTokenStore, TokenEntry, TokenRecord, open_store
from tokenstore.protocol import Backend

NOW = datetime.now(UTC)


class NoBackend:
    """Closes, and does nothing else of a backend's."""

    async def aclose(self) -> None:
        """Close nothing."""


def a_sync_session_is_not_enough(session: Session) -> AuthTokenStore:
    """The store is async; a sync session cannot serve it."""
    return AuthTokenStore(db_session=session)  # type: ignore[arg-type]


def a_class_without_the_methods_is_no_backend() -> Backend:
    """A backend has every method of the protocol."""
    return NoBackend()  # type: ignore[return-value]


async def wrong_arguments(store: AuthTokenStore) -> None:
    """Names, types and forgotten arguments."""
    await store.store_tokens("github", "u1", b"token", "refresh", NOW)  # type: ignore[arg-type]
    await store.store_tokens("github", "u1", "token", "refresh", 3600)  # type: ignore[arg-type]
    await store.store_tokens("github", "u1", "token", "refresh")  # type: ignore[call-arg]
    await store.load_tokens("github", "u1", lock=True)  # type: ignore[call-arg]
    await store.load_tokens("github", 1)  # type: ignore[arg-type]


async def a_missing_row_must_be_handled(store: AuthTokenStore) -> str:
    """``load_tokens`` gives None where there is no row."""
    record = await store.load_tokens("github", "u1")
    return str(record["access_token"])  # type: ignore[index]


def a_misspelt_key_is_an_error(record: TokenRecord) -> object:
    """The keys of a record are known."""
    return record["acess_token"]  # type: ignore[call-overload]


def a_misspelt_key_of_get_is_an_error(record: TokenRecord) -> object:
    """The same keys."""
    return record.get("expires_at")  # type: ignore[arg-type]


def a_row_may_have_no_refresh_token(record: TokenRecord) -> str:
    """RFC 6749 section 5.1 makes it optional; ``is_refresh_token_valid`` tells."""
    return record["refresh_token"]  # type: ignore[return-value]


def an_entry_holds_no_token(entry: TokenEntry) -> object:
    """``list_tokens`` opens nothing."""
    return entry["access_token"]  # type: ignore[typeddict-item]


def the_checks_take_a_record(store: AuthTokenStore, record: TokenRecord | None) -> bool:
    """None is not a record that has expired."""
    return store.is_access_token_valid(record)  # type: ignore[arg-type]


def a_store_is_opened_on_one_thing() -> AuthTokenStore:
    """A URL, an engine or a backend."""
    return open_store(None)  # type: ignore[arg-type]


def a_misspelt_option_is_an_error() -> AuthTokenStore:
    """The options of every backend that ships are known."""
    return open_store("sqlite:///tokens.db", lock_timout=5)  # type: ignore[call-arg]


def an_option_has_a_type() -> AuthTokenStore:
    """Seconds are a number."""
    return open_store("sqlite:///tokens.db", lock_timeout="5")  # type: ignore[arg-type]


def a_session_has_no_pool(session: AsyncSession) -> AuthTokenStore:
    """A pool's options belong to a store by URL."""
    return AuthTokenStore(session, pool_size=5)  # type: ignore[call-arg]
