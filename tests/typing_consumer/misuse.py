"""Mistakes that a type checker must find.

Both type checkers report an unused ``type: ignore``, so each such line fails the check if its mistake is not found.
"""

from datetime import UTC, datetime

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from tokenstore import AuthTokenStore, TokenEntry, TokenRecord, open_store
from tokenstore.protocol import Backend

NOW = datetime.now(UTC)


class NoBackend:
    """A class that lacks all methods of a backend but one."""

    async def aclose(self) -> None:
        """Close nothing."""


def a_sync_session_is_not_enough(session: Session) -> AuthTokenStore:
    """The store needs an async session, not a synchronous one."""
    return AuthTokenStore(db_session=session)  # type: ignore[arg-type]


def a_class_without_the_methods_is_no_backend() -> Backend:
    """A backend needs all methods of the protocol."""
    return NoBackend()  # type: ignore[return-value]


async def wrong_arguments(store: AuthTokenStore) -> None:
    """Wrong types, missing arguments and unknown names."""
    await store.store_tokens("github", "u1", b"token", "refresh", NOW)  # type: ignore[call-overload]
    await store.store_tokens("github", "u1", "token", "refresh", 3600)  # type: ignore[call-overload]
    await store.store_tokens("github", "u1", "token", "refresh")  # type: ignore[call-overload]
    await store.load_tokens("github", "u1", lock=True)  # type: ignore[call-arg]
    await store.load_tokens("github", 1)  # type: ignore[arg-type]
    await store.load_tokens("github", "u1", account=None)  # type: ignore[arg-type]
    await store.delete_tokens("github", "u1", "work")  # type: ignore[call-arg]
    await store.update_metadata("github", "u1", None)  # type: ignore[arg-type]


async def a_missing_row_must_be_handled(store: AuthTokenStore) -> str:
    """``load_tokens`` returns None if there is no row."""
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
    """An entry of ``list_tokens`` has no tokens."""
    return entry["access_token"]  # type: ignore[typeddict-item]


def an_entry_has_metadata_only_if_it_was_asked_for(entry: TokenEntry) -> object:
    """So it must have been listed with ``with_metadata=True``."""
    return entry["metadata"]  # type: ignore[typeddict-item]


def the_checks_take_a_record(store: AuthTokenStore, record: TokenRecord | None) -> bool:
    """None is not a record."""
    return store.is_access_token_valid(record)  # type: ignore[arg-type]


def a_store_is_opened_on_one_thing() -> AuthTokenStore:
    """A store needs a URL, an engine or a backend."""
    return open_store(None)  # type: ignore[arg-type]


def a_misspelt_option_is_an_error() -> AuthTokenStore:
    """The options of all shipped backends are known, so a misspelled one is an error."""
    return open_store("sqlite:///tokens.db", lock_timout=5)  # type: ignore[call-arg]


def an_option_has_a_type() -> AuthTokenStore:
    """A number of seconds is not a string."""
    return open_store("sqlite:///tokens.db", lock_timeout="5")  # type: ignore[arg-type]


def a_session_has_no_pool(session: AsyncSession) -> AuthTokenStore:
    """Options of the pool are only for a store by URL."""
    return AuthTokenStore(session, pool_size=5)  # type: ignore[call-arg]
