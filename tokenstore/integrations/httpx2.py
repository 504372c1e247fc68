"""Sends a user's fresh access token with the requests of httpx2; needs the extra ``httpx2``.

::

    async with httpx2.AsyncClient() as client:  # one pooled client for all users
        auth = StoreAuth(store, "github", "user-123", origins=["https://api.github.com"])
        response = await client.get("https://api.github.com/user", auth=auth)
"""

from __future__ import annotations

from tokenstore.errors import MissingDependencyError
from tokenstore.integrations._httpx_flow import HttpxFlow

try:
    import httpx2
except ImportError:
    raise MissingDependencyError(
        'tokenstore.integrations.httpx2 needs httpx2: pip install "tokenstore[httpx2]"'
    ) from None

__all__ = ["StoreAuth"]


class StoreAuth(HttpxFlow, httpx2.Auth):
    """Authenticates requests of ``httpx2`` as one user: :class:`tokenstore.integrations.httpx.StoreAuth` for httpx2.

    The arguments, the rules and the errors are the same. **Never pass it to a client that serves several users**.
    """

    bytes_type = httpx2.ByteStream
    stream_type = httpx2.SyncByteStream
