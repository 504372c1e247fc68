"""Access tokens that work only together with a private key in the store: DPoP (RFC 9449).

::

    dpop = DPoP()
    refresher = OAuth2Refresher(token_url, client_id, dpop=dpop)
    store = open_store(url, refreshers={"acme": refresher})
    auth = StoreAuth(store, "acme", "user-123", origins=["https://api.example.com"], dpop=dpop)

A login uses the same key: see :meth:`DPoP.key`.
"""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Final
from weakref import WeakKeyDictionary

from tokenstore.errors import ConflictError
from tokenstore.integrations._dpop_key import DPoPKey
from tokenstore.integrations._nonces import Nonces
from tokenstore.records import TokenKey
from tokenstore.tracebacks import clears_locals
from tokenstore.validation import token_key
from tokenstore.values import ValueOperations

__all__ = ["DPoP", "DPoPKey"]

_MOST_KEYS: Final = 1024


class DPoP:
    """The keys and nonces of DPoP. Make one for a process, and pass it to the refresher and to the adapters.

    **The keys** are sealed values of the store. A key is made at its first use, once for all tasks, processes and
    machines, and never replaced: tokens are bound to it. By default each connection (provider, user and account) has a
    key of its own, so that no two users of a provider can be linked by their key.

    **The nonces** of the servers are kept in this process: those of authorization servers and those of APIs apart, the
    last one of each origin.

    Args:
        shared: Whether all users of a provider have one key: for logins that tell only at their end who the user is.
            Default: a key for each connection.
        allow_bearer: Whether the adapters send an access token that the provider has not bound to the key (its
            ``token_type`` is not ``DPoP``) as a Bearer token. Default: no. RFC 9449 section 5 forbids its use if
            the application relies on DPoP.
        namespace: The namespace of the keys among the values.

    Attributes:
        allow_bearer: The argument.
        token_nonces: The nonces of authorization servers.
        resource_nonces: The nonces of APIs.
    """

    def __init__(self, *, shared: bool = False, allow_bearer: bool = False, namespace: str = "dpop") -> None:
        self.allow_bearer = allow_bearer
        self.token_nonces = Nonces()
        self.resource_nonces = Nonces()
        self._shared = shared
        self._namespace = namespace
        self._cached: WeakKeyDictionary[ValueOperations, dict[str, DPoPKey]] = WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"<DPoP namespace={self._namespace!r} shared={self._shared} allow_bearer={self.allow_bearer}>"

    @clears_locals
    async def key(self, store: ValueOperations, provider: str, user_id: str, *, account: str = "") -> DPoPKey:
        """The key of a connection. It is made if there is none: of many callers at once, all get the same one.

        For a login: its :attr:`DPoPKey.thumbprint` is the parameter ``dpop_jkt`` of the authorization request, and
        :meth:`DPoPKey.proof` signs the header ``DPoP`` of the request that redeems the code. With the store without
        ``await``, write ``store.run(lambda aio: dpop.key(aio, provider, user_id))``.

        Args:
            store: The async store.
            provider: The provider's name.
            user_id: The user's id.
            account: Which of the user's accounts; default: the empty name.

        Raises:
            InvalidInputError: An argument is not acceptable.
            UnsupportedOperationError: The backend keeps no values.
            SealingError: The value does not open with the keyring, or another program stored it.
            BackendError: The database refused or failed.
        """
        return await self._load(store, self._name(token_key(provider, user_id, account)))

    @clears_locals
    async def delete_key(self, store: ValueOperations, provider: str, user_id: str, *, account: str = "") -> bool:
        """Delete the key of a connection, after its tokens were revoked or deleted. Returns whether there was one.

        Tokens that are bound to the key cannot be used afterwards. The arguments and errors are those of :meth:`key`.
        """
        name = self._name(token_key(provider, user_id, account))
        self._cached.get(store, {}).pop(name, None)
        return await store.pop_value(self._namespace, name) is not None

    async def key_of(self, store: ValueOperations, row: TokenKey, *, anew: bool = False) -> DPoPKey:
        """The key of a row, from this process's memory if it is there.

        Args:
            store: The async store.
            row: The row.
            anew: Whether to read it from the store, because a token was refused: another process may have deleted the
                key, and made another one at the next login.
        """
        name, cached = self._name(row), self._cached.setdefault(store, {})
        if anew or name not in cached:
            key = await self._load(store, name)
            if len(cached) >= _MOST_KEYS:
                cached.clear()
            cached[name] = key
            return key
        return cached[name]

    def _name(self, row: TokenKey) -> str:
        """The value's name. A digest, because a row's key is longer than a name may be, and has a user's id."""
        parts = [row.provider] if self._shared else list(row)
        return sha256(json.dumps(parts).encode()).hexdigest()

    async def _load(self, store: ValueOperations, name: str) -> DPoPKey:
        kept = await store.get_value(self._namespace, name)
        if kept is None:
            # Of many processes that make a key now, one stores its own, and all of them read that one.
            _ = await store.put_value(self._namespace, name, DPoPKey.generate().to_jwk(), if_absent=True)
            kept = await store.get_value(self._namespace, name)
        if kept is None:
            raise ConflictError(
                "the DPoP key was deleted, or stored by another transaction, meanwhile: repeat the call"
            )
        return DPoPKey.from_jwk(kept)
