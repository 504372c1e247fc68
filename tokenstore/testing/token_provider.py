"""A provider and a store together, as the tests of an application use them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from tokenstore.errors import TokensMissingError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokenstore import sync
    from tokenstore.records import TokenRecord
    from tokenstore.store import AuthTokenStore
    from tokenstore.testing.provider import StrictRotatingProvider

__all__ = ["SyncTokenProvider", "TokenProvider"]


class _Handle:
    """What does not touch the store."""

    def __init__(self, server: StrictRotatingProvider, name: str) -> None:
        self.server = server
        self.name = name

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.server!r}>"

    @property
    def refreshes(self) -> int:
        """How many refreshes of all users the provider has carried out; ``server.stats()`` has more numbers."""
        return self.server.stats().refreshes

    def expire_access(self, user_id: str) -> None:
        """Let the user's access tokens expire at the provider alone.

        The store still takes them for valid, so the application learns it from the 401 of the provider's API.
        """
        self.server.expire_access_tokens(user_id)

    def revoke(self, user_id: str) -> None:
        """Withdraw the user's consent, as at the provider's own page: all tokens of the user stop working.

        The store is not told. The application learns it from a 401 of the provider's API, or from the next refresh, for
        which the store raises :class:`tokenstore.ReauthorizationRequiredError`.
        """
        self.server.revoke_user(user_id)

    @contextmanager
    def outage(self, *, drop: bool = False) -> Iterator[None]:
        """Let the provider be down until the block ends: token endpoint, API and all.

        A refresh that fails meanwhile stores a retry time with the row, which outlasts the block: move the clock.

        Args:
            drop: Close each connection without a response. Default: answer 503.
        """
        before, self.server.outage = self.server.outage, "drop" if drop else True
        try:
            yield
        finally:
            self.server.outage = before


class TokenProvider(_Handle):
    """A :class:`StrictRotatingProvider` and the store that has its users' tokens. The fixture ``token_provider``.

    Args:
        server: The provider; it is running.
        store: The store, with a refresher for the provider.
        name: The provider's name in the store.

    Attributes:
        server: The argument.
        store: The argument.
        name: The argument.
    """

    def __init__(self, server: StrictRotatingProvider, store: AuthTokenStore, name: str) -> None:
        super().__init__(server, name)
        self.store = store

    async def login(self, user_id: str, *, account: str = "", scope: str = "read write") -> TokenRecord:
        """Log a user in at the provider, and put the tokens of the new grant into the store.

        Args:
            user_id: The user's id, in the store and at the provider.
            account: Which of the user's accounts; default: the empty name.
            scope: What the user grants.

        Returns:
            The record, as the store has it now.
        """
        response = self.server.new_grant(user_id, scope=scope)
        return await self.store.store_token_response(self.name, user_id, response, account=account)

    async def expire(self, user_id: str, *, account: str = "") -> None:
        """Let the user's access token expire, at the provider and in the store: the next load refreshes it.

        At the provider, the access tokens of the user's other accounts expire, too. The row in the store is written
        again, which ends a failure that was stored with it.

        Args:
            user_id: The user's id.
            account: Which of the user's accounts; default: the empty name.

        Raises:
            TokensMissingError: The store has no tokens of this user.
            UnsupportedOperationError: The store's backend has no row locks.
        """
        self.expire_access(user_id)
        async with self.store.transaction() as tx:
            record = await tx.load_tokens(self.name, user_id, for_update=True, account=account)
            if record is None:
                of = f", account {account!r}" if account else ""
                raise TokensMissingError(
                    f"user {user_id!r}{of} has no tokens of provider {self.name!r}: call login first"
                )
            await tx.store_tokens(
                self.name,
                user_id,
                record["access_token"],
                record["refresh_token"],
                record["updated_at"],  # by the clock of the rows, so that it is in the past for every store
                record["refresh_token_expires_at"],
                account=account,
                extra=record["extra"],
            )


class SyncTokenProvider(_Handle):
    """:class:`TokenProvider` for a store of :mod:`tokenstore.sync`. The fixture ``sync_token_provider``.

    Args:
        server: The provider; it is running.
        store: The store, with a refresher for the provider.
        name: The provider's name in the store.

    Attributes:
        server: The argument.
        store: The argument.
        name: The argument.
    """

    def __init__(self, server: StrictRotatingProvider, store: sync.AuthTokenStore, name: str) -> None:
        super().__init__(server, name)
        self.store = store

    def login(self, user_id: str, *, account: str = "", scope: str = "read write") -> TokenRecord:
        """See :meth:`TokenProvider.login`."""
        return self.store.run(lambda aio: self._with(aio).login(user_id, account=account, scope=scope))

    def expire(self, user_id: str, *, account: str = "") -> None:
        """See :meth:`TokenProvider.expire`."""
        self.store.run(lambda aio: self._with(aio).expire(user_id, account=account))

    def _with(self, aio: AuthTokenStore) -> TokenProvider:
        return TokenProvider(self.server, aio, self.name)
