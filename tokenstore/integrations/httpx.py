"""Sends a user's fresh access token with the requests of httpx; needs the extra ``httpx``.

::

    async with httpx.AsyncClient() as client:  # one pooled client for all users
        auth = StoreAuth(store, "github", "user-123", origins=["https://api.github.com"])
        response = await client.get("https://api.github.com/user", auth=auth)
"""

from __future__ import annotations

from tokenstore.errors import MissingDependencyError
from tokenstore.integrations._httpx_flow import HttpxFlow

try:
    import httpx
except ImportError:
    raise MissingDependencyError('tokenstore.integrations.httpx needs httpx: pip install "tokenstore[httpx]"') from None

__all__ = ["StoreAuth"]


class StoreAuth(HttpxFlow, httpx.Auth):
    """Authenticates requests of ``httpx`` as one user, with an access token that is fresh, or is refreshed first.

    Make one for a user or a request, and pass it with each request: ``client.get(url, auth=StoreAuth(…))``. Making one
    costs nothing. **Never pass it to a client that serves several users**: every request of that client would be
    sent as this user. An instance may be used in any number of requests at once.

    - **Where the token goes.** To ``origins`` alone. A request to another origin is sent without it, and not refused: a
      redirect, or a link in a response, may lead to a file server that needs no token. A redirect to another origin,
      scheme or port does not carry the header, even if that origin is one of ``origins``.
    - **After a 401** the token is refreshed, once for all requests and processes whose token was of the same
      generation (version of the row), and the request is sent once more. If a redirect led to the 401, the redirected
      request is sent again, and not the first one. If no newer token came of it, because the store's
      ``force_min_age`` seconds have not passed, the 401 is returned.
    - **Bodies.** Bytes, JSON, forms and files that can be rewound are sent again as they were. A generator or another
      iterator is not: the 401 is returned. The token was refreshed nevertheless, so the next request succeeds.
    - **No refresh** follows a 403, or a 401 whose challenge names an error other than ``invalid_token``, such as
      ``insufficient_scope`` (RFC 6750 section 3.1): the response is returned.
    - **With DPoP** each request has a proof of its own. If the API asks for its nonce, the request is sent again with
      it, without a refresh. A redirected request is refused without a proof, and then sent again with one.
    - **If the refresh fails**, the request raises the store's error instead of returning the 401: it says whether the
      user has to log in again, or the provider is unavailable.

    Args:
        store: The async store for an ``AsyncClient``; that of :mod:`tokenstore.sync` for a ``Client``.
        provider: The provider's name.
        user_id: The user's id.
        origins: The origins that get the token (RFC 6454): each one a scheme, a host and perhaps a port, such as
            ``https://api.github.com``. The scheme is https, or http on a loopback host.
        options: ``account``, ``refresh``, ``min_ttl`` and ``scopes``, as for
            :meth:`tokenstore.AuthTokenStore.load_fresh_tokens`; and ``dpop``, a
            :class:`tokenstore.integrations.dpop.DPoP`, for tokens that are bound to a key (RFC 9449).

    Raises:
        ConfigurationError: An origin is not acceptable, or an argument is unknown.
        InvalidInputError: The provider, the user id or the account is not acceptable.

    A request raises:
        TokensMissingError: There is no row: the user has not logged in.
        UnsupportedOperationError: The store is the one for the other kind of client, or the token contains a space.
        ConfigurationError: The token is bound to a DPoP key, and there is no ``dpop``; or the other way round.
        TokenStoreError: Each other error of ``load_fresh_tokens``, and of ``DPoP.key``.
    """

    bytes_type = httpx.ByteStream
    stream_type = httpx.SyncByteStream
