"""Sends a user's fresh access token with the requests of Requests; needs the extra ``requests``.

::

    with requests.Session() as session:  # one pooled session for all users
        auth = StoreAuth(store, "github", "user-123", origins=["https://api.github.com"])
        response = session.get("https://api.github.com/user", auth=auth, timeout=10)
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tokenstore.errors import MissingDependencyError
from tokenstore.integrations._bearer import BearerAuth
from tokenstore.integrations._exchange import NONCE, PROOF, Exchange, Refusal
from tokenstore.sync import AuthTokenStore
from tokenstore.tracebacks import clears_locals

try:
    from requests.auth import AuthBase
    from requests.cookies import extract_cookies_to_jar
    from requests.exceptions import UnrewindableBodyError
    from requests.utils import rewind_body
except ImportError:
    raise MissingDependencyError(
        'tokenstore.integrations.requests needs Requests: pip install "tokenstore[requests]"'
    ) from None

if TYPE_CHECKING:
    from requests import PreparedRequest, Response

__all__ = ["StoreAuth"]


class StoreAuth(BearerAuth[AuthTokenStore], AuthBase):
    """Authenticates requests of ``requests`` as one user, with an access token that is fresh, or is refreshed first.

    Make one for a user or a request, and pass it with each request: ``session.get(url, auth=StoreAuth(…))``. Making one
    costs nothing. **Never set it as** ``session.auth`` **of a session that serves several users**: every request of
    that session would be sent as this user. An instance may be used in any number of threads at once.

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
        store: The store of :mod:`tokenstore.sync`.
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
        UnsupportedOperationError: The store is an async one, or the token contains a space.
        ConfigurationError: The token is bound to a DPoP key, and there is no ``dpop``; or the other way round.
        TokenStoreError: Each other error of ``load_fresh_tokens``, and of ``DPoP.key``.
    """

    @clears_locals
    def __call__(self, r: PreparedRequest) -> PreparedRequest:
        """Put the token into a request. Requests calls this method, once for a request and its redirects."""
        url = urlsplit(r.url or "")  # the parser of the connection
        if self._tokens.go_to(url.scheme, url.hostname, url.port):
            exchange = self._tokens.exchange(self._tokens.load_blocking())
            r.headers.update(exchange.headers(r.method or "", r.url or ""))
            r.register_hook("response", partial(self._answered, exchange))
        return r

    @clears_locals
    def _answered(self, exchange: Exchange, response: Response, **settings: Any) -> Response:
        """Send a refused request again. Requests calls this hook with each response, also that of a redirect."""
        while True:
            sent = response.request
            # Requests copies the headers into a redirected request, which the proof does not fit.
            proven = sent.headers.pop(PROOF, None) is not None
            # A redirect to another origin has removed the header.
            if not exchange.has_sent(sent.headers.get("Authorization")):
                return response
            challenges, nonces = (
                [value] if (value := response.headers.get(name)) else [] for name in ("WWW-Authenticate", NONCE)
            )
            refusal = exchange.refusal(sent.url or "", response.status_code, challenges, nonces, proven=proven)
            if refusal is None:
                return response
            if refusal is Refusal.TOKEN:
                try:
                    fresh = self._tokens.load_blocking(exchange.token)
                except BaseException:
                    response.close()
                    raise
                if not exchange.renew(fresh):
                    return response
            if not _rewound(sent):
                return response
            response = _sent_again(exchange, response, settings)


def _sent_again(exchange: Exchange, refused: Response, settings: dict[str, Any]) -> Response:
    _ = refused.content  # so that the connection can be used again
    refused.close()
    again = refused.request.copy()
    cookies: Any = again._cookies
    extract_cookies_to_jar(cookies, refused.request, refused.raw)
    again.prepare_cookies(cookies)
    again.headers.update(exchange.headers(again.method or "", again.url or ""))
    connection: Any = refused.connection
    answer: Response = connection.send(again, **settings)
    answer.history = [*refused.history, refused]
    answer.request = again
    return answer


def _rewound(request: PreparedRequest) -> bool:
    """Make a body whole again after it was sent. Returns whether that is possible."""
    if request.body is None or isinstance(request.body, bytes | str):
        return True
    try:
        rewind_body(request)
    except UnrewindableBodyError:
        return False
    return True
