"""From what SQLAlchemy, a driver or the socket raised to the error that callers see."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from tokenstore.errors import BackendError, BackendUnavailableError, TokenStoreError
from tokenstore_sql.connection import ConnectionLostError
from tokenstore_sql.dialect import EXPLANATIONS, Dialect

__all__ = ["mapped"]

T = TypeVar("T")


async def mapped(dialect: Dialect, about: Callable[[], str], operation: Callable[[], Awaitable[T]]) -> T:
    """Run an operation and raise our own error in place of any other.

    The driver's exception is neither cause nor context of ours: it can carry a statement's parameters.
    """
    try:
        return await operation()
    except TokenStoreError:
        raise
    except Exception as error:
        if not isinstance(error, (SQLAlchemyError, ConnectionLostError, OSError, *dialect.driver_errors())):
            raise
        failure = _translate(dialect, about(), error)
    raise failure


def _translate(dialect: Dialect, about: str, error: BaseException) -> BackendError:
    if isinstance(error, PoolTimeoutError):
        return BackendUnavailableError(
            f"{about}: no connection of the pool became free within its pool_timeout; "
            f"a larger pool_size, shorter transactions, or inside a transaction its own methods, help"
        )
    cause = error
    if isinstance(error, ConnectionLostError | DBAPIError) and error.orig is not None:
        cause = error.orig
    lost = isinstance(error, ConnectionLostError) or getattr(error, "connection_invalidated", False)
    kind, code = dialect.classify(cause)
    if kind is BackendError and (isinstance(cause, OSError) or lost):
        kind = BackendUnavailableError
    words = dialect.error_text(cause, code) if code else ""
    if isinstance(cause, OSError):
        words = words or cause.strerror or str(cause)
    details = f"{code}: {words}" if code and words else code or words or type(cause).__name__
    return kind(f"{about}: {EXPLANATIONS[kind]} ({details})", code=code)
