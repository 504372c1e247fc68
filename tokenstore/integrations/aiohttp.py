"""Sends a user's fresh access token with the requests of aiohttp; needs the extra ``aiohttp``.

::

    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:  # one session for all users
        auth = StoreAuth(store, "github", "user-123", origins=["https://api.github.com"])
        async with session.get("https://api.github.com/user", middlewares=(auth,)) as response:
            user = await response.json()
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenstore.errors import MissingDependencyError
from tokenstore.integrations._bearer import BearerAuth
from tokenstore.integrations._exchange import NONCE, PROOF, Exchange, Refusal
from tokenstore.store import AuthTokenStore
from tokenstore.tracebacks import clears_locals

try:
    from aiohttp import MultipartWriter
    from aiohttp.hdrs import AUTHORIZATION, WWW_AUTHENTICATE
except ImportError:
    raise MissingDependencyError(
        'tokenstore.integrations.aiohttp needs aiohttp: pip install "tokenstore[aiohttp]"'
    ) from None

if TYPE_CHECKING:
    from aiohttp import ClientHandlerType, ClientRequest, ClientResponse

__all__ = ["StoreAuth"]


class StoreAuth(BearerAuth[AuthTokenStore]):
    """A client middleware of ``aiohttp`` that authenticates requests as one user, with a fresh access token.

    Make one for a user or a request, and pass it with each request: ``session.get(url, middlewares=(StoreAuth(…),))``.
    Making one costs nothing. **Never pass it to a session that serves several users**: every request of that session
    would be sent as this user. An instance may be used in any number of requests at once. Middlewares of a request
    replace those of the session: ``middlewares=(*yours, StoreAuth(…))``.

    - **Where the token goes.** To ``origins`` alone. aiohttp calls a middleware for each step of a redirect, so each
      step is checked. A request to another origin is sent without the token, and not refused: a redirect, or a link in
      a response, may lead to a file server that needs no token. A redirect from one of ``origins`` to another one of
      them gets the token, unlike with httpx and requests.
    - **After a 401** the token is refreshed, once for all requests and processes whose token was of the same
      generation (version of the row), and the request is sent once more. If no newer token came of it, because the
      store's ``force_min_age`` seconds have not passed, the 401 is returned.
    - **Bodies.** Bytes, JSON, forms and files that can be rewound are sent again as they were. A generator or another
      iterator is not: the 401 is returned. The token was refreshed nevertheless, so the next request succeeds.
    - **No refresh** follows a 403, or a 401 whose challenge names an error other than ``invalid_token``, such as
      ``insufficient_scope`` (RFC 6750 section 3.1): the response is returned.
    - **With DPoP** each request, and each step of a redirect, has a proof of its own. If the API asks for its nonce,
      the request is sent again with it, without a refresh.
    - **If the refresh fails**, the request raises the store's error instead of returning the 401: it says whether the
      user has to log in again, or the provider is unavailable.
    - **Errors of aiohttp** have the headers of the request in their ``repr``. The token is removed from these headers
      once the response is there.

    Args:
        store: The async store.
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
        UnsupportedOperationError: The store is that of ``tokenstore.sync``, or the token contains a space.
        ConfigurationError: The token is bound to a DPoP key, and there is no ``dpop``; or the other way round.
        TokenStoreError: Each other error of ``load_fresh_tokens``, and of ``DPoP.key``.
    """

    @clears_locals
    async def __call__(self, request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
        """Send a request, or one step of a redirect. aiohttp calls this method."""
        url = request.url
        if not self._tokens.go_to(url.scheme, url.raw_host, url.port):
            return await handler(request)
        exchange = self._tokens.exchange(await self._tokens.load())
        while True:
            response = await _send(request, handler, exchange)
            challenges, nonces = (response.headers.getall(name, []) for name in (WWW_AUTHENTICATE, NONCE))
            refusal = exchange.refusal(str(url), response.status, challenges, nonces, proven=True)
            if refusal is None:
                return response
            if refusal is Refusal.TOKEN:
                try:
                    fresh = await self._tokens.load(exchange.token)
                except BaseException:
                    response.close()
                    raise
                if not exchange.renew(fresh):
                    return response
            if _is_consumed(request.body):
                return response
            # If the server answered before it had read the body, the body is still being written.
            response.close()
            await request.close()


def _is_consumed(body: object) -> bool:
    """Whether a body cannot be sent again. In old versions of aiohttp a multipart body does not ask its parts."""
    if isinstance(body, MultipartWriter) and any(_is_consumed(part) for part, *_ in body):
        return True
    return getattr(body, "consumed", False)


async def _send(request: ClientRequest, handler: ClientHandlerType, exchange: Exchange) -> ClientResponse:
    request.headers.update(exchange.headers(request.method, str(request.url)))
    try:
        return await handler(request)
    finally:
        # The errors of aiohttp show these headers, and so does the response.
        for name in (AUTHORIZATION, PROOF):
            request.headers.popall(name, None)
