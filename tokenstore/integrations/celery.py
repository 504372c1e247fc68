"""Closes a synchronous store in the worker processes of Celery; needs the extra ``celery``."""

from __future__ import annotations

from tokenstore.errors import MissingDependencyError
from tokenstore.sync import AuthTokenStore

__all__ = ["install"]


def install(store: AuthTokenStore) -> None:
    """Close a store when a child process of Celery's prefork pool ends.

    Such a child ends without ``atexit``, for example after ``max-tasks-per-child`` tasks. If a token is being refreshed
    in the background then, the provider's new tokens would be lost with the child, and a strict provider revokes the
    grant when the old refresh token comes back. With this function the child waits for the refresh before it ends.

    Call it once for each store, where the store is opened, such as in the module of the Celery application. Each child
    opens its own store at its first call. Other pools need nothing: ``atexit`` closes the store.

    Args:
        store: The store.

    Raises:
        MissingDependencyError: The extra ``celery`` is not installed.
    """
    try:
        from celery.signals import worker_process_shutdown
    except ImportError:
        raise MissingDependencyError(
            'tokenstore.integrations.celery needs Celery: pip install "tokenstore[celery]"'
        ) from None

    def close(**_: object) -> None:
        store.close()

    # Not weak: nothing else refers to the function.
    worker_process_shutdown.connect(close, weak=False, dispatch_uid=f"tokenstore {id(store)}")
