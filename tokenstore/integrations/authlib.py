"""Authlib's clients with the store's tokens, and a refresher that is such a client; needs the extra ``authlib``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any

from tokenstore.errors import MissingDependencyError
from tokenstore.integrations._bound_tokens import refuse_bound
from tokenstore.records import RefreshableRecord, TokenRecord
from tokenstore.store import AuthTokenStore
from tokenstore.sync import AuthTokenStore as SyncAuthTokenStore

if TYPE_CHECKING:
    # Authlib's published stubs do not say that its clients are those of httpx2, with `get` and `async with`.
    from typing import Any as AsyncOAuth2Client
    from typing import Any as OAuth2Client

    from httpx2 import USE_CLIENT_DEFAULT
else:
    try:
        from authlib.integrations.httpx_client import AsyncOAuth2Client, OAuth2Client
        from httpx2 import USE_CLIENT_DEFAULT
    except ImportError:
        raise MissingDependencyError(
            'tokenstore.integrations.authlib needs Authlib and httpx2: pip install "tokenstore[authlib]"'
        ) from None

__all__ = ["AsyncStoreOAuth2Client", "StoreOAuth2Client", "authlib_refresher"]


class AsyncStoreOAuth2Client(AsyncOAuth2Client):  # type: ignore[misc]  # Any is the base
    """Authlib's ``AsyncOAuth2Client`` for one user: each request takes a fresh token from the store.

    Authlib refreshes with a lock of one client, so that two clients spend one refresh token twice. Here the store
    refreshes, once for all clients, processes and machines, with the refresher that it has for the provider. The
    client never has a refresh token.

    What Authlib's client can do without a user's token stays, such as ``create_authorization_url`` and ``fetch_token``.
    Store what ``fetch_token`` returns: ``await store.store_token_response(provider, user_id, token)``.

    Requests raise what :meth:`tokenstore.AuthTokenStore.load_fresh_tokens` raises, and
    :class:`tokenstore.TokensMissingError` if the user has no tokens.

    Args:
        store: The store, with a refresher for the provider.
        provider: The provider's name in the store.
        user_id: The user's id.
        account: Tells several accounts of the user at the provider apart.
        **options: Those of ``AsyncOAuth2Client``, such as ``client_id``, and of ``httpx2.AsyncClient``. ``token`` and
            ``update_token`` have no effect.
    """

    def __init__(
        self, store: AuthTokenStore, provider: str, user_id: str, *, account: str = "", **options: Any
    ) -> None:
        super().__init__(**options)
        self._store = store
        self._row = provider, user_id
        self._account = account

    async def request(
        self, method: str, url: Any, withhold_token: bool = False, auth: Any = USE_CLIENT_DEFAULT, **options: Any
    ) -> Any:
        """Send a request with a fresh token, unless ``withhold_token`` or ``auth`` says otherwise."""
        if not withhold_token and auth is USE_CLIENT_DEFAULT:
            await self._load()
        return await super().request(method, url, withhold_token, auth, **options)

    @asynccontextmanager
    async def stream(
        self, method: str, url: Any, withhold_token: bool = False, auth: Any = USE_CLIENT_DEFAULT, **options: Any
    ) -> AsyncIterator[Any]:
        """Send a request with a fresh token, and stream its response."""
        if not withhold_token and auth is USE_CLIENT_DEFAULT:
            await self._load()
        async with super().stream(method, url, withhold_token, auth, **options) as response:
            yield response

    async def _load(self) -> None:
        self.token = _token(await self._store.load_fresh_tokens(*self._row, account=self._account, missing="raise"))


class StoreOAuth2Client(OAuth2Client):  # type: ignore[misc]  # Any is the base
    """Authlib's ``OAuth2Client`` for one user, without ``await``: see :class:`AsyncStoreOAuth2Client`.

    Args:
        store: The store without ``await``, with a refresher for the provider.
        provider: The provider's name in the store.
        user_id: The user's id.
        account: Tells several accounts of the user at the provider apart.
        **options: Those of ``OAuth2Client``, and of ``httpx2.Client``. ``token`` and ``update_token`` have no effect.
    """

    def __init__(
        self, store: SyncAuthTokenStore, provider: str, user_id: str, *, account: str = "", **options: Any
    ) -> None:
        super().__init__(**options)
        self._store = store
        self._row = provider, user_id
        self._account = account

    def request(
        self, method: str, url: Any, withhold_token: bool = False, auth: Any = USE_CLIENT_DEFAULT, **options: Any
    ) -> Any:
        """Send a request with a fresh token, unless ``withhold_token`` or ``auth`` says otherwise."""
        if not withhold_token and auth is USE_CLIENT_DEFAULT:
            self._load()
        return super().request(method, url, withhold_token, auth, **options)

    def stream(
        self, method: str, url: Any, withhold_token: bool = False, auth: Any = USE_CLIENT_DEFAULT, **options: Any
    ) -> AbstractContextManager[Any]:
        """Send a request with a fresh token, and stream its response."""
        if not withhold_token and auth is USE_CLIENT_DEFAULT:
            self._load()
        stream: AbstractContextManager[Any] = super().stream(method, url, withhold_token, auth, **options)
        return stream

    def _load(self) -> None:
        self.token = _token(self._store.load_fresh_tokens(*self._row, account=self._account, missing="raise"))


def authlib_refresher(
    token_endpoint: str, make_client: Callable[[], AsyncOAuth2Client]
) -> Callable[[RefreshableRecord], Awaitable[dict[str, Any]]]:
    """Make a refresher that sends its requests with Authlib's ``AsyncOAuth2Client``.

    For applications whose client has an authentication of its own or compliance hooks. Others use
    :class:`tokenstore.integrations.oauth2.OAuth2Refresher`, which reads more kinds of answers.

    Args:
        token_endpoint: The provider's token endpoint.
        make_client: Makes a client without a token. Each refresh uses one of its own, and closes it.

    Returns:
        A refresher for ``open_store(refreshers=…)`` or ``load_fresh_tokens(refresh=…)``. It raises the errors of
        Authlib and httpx2, which the store understands.
    """

    async def refresh(record: RefreshableRecord) -> dict[str, Any]:
        async with make_client() as client:
            return dict(await client.refresh_token(token_endpoint, refresh_token=record["refresh_token"]))

    return refresh


def _token(record: TokenRecord) -> dict[str, Any]:
    """What Authlib needs to send the token. Without an expiry or a refresh token it never refreshes."""
    refuse_bound(record, "use StoreAuth of tokenstore.integrations.httpx2 with dpop=DPoP()")
    return {"access_token": record["access_token"], "token_type": "Bearer"}
