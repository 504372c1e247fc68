"""The store without ``await``, for Flask, Django, Celery and scripts.

:class:`AuthTokenStore` describes the rules.
"""

from tokenstore.sync.store import AuthTokenStore, open_store
from tokenstore.sync.transaction import Transaction

__all__ = ["AuthTokenStore", "Transaction", "open_store"]
