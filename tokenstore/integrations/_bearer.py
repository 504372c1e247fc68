"""What the adapters of all HTTP clients share: whose token a request gets, and where it may go."""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import suppress
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypedDict, TypeVar, Unpack

from tokenstore.errors import ConfigurationError, UnsupportedOperationError
from tokenstore.integrations._bound_tokens import is_bound, refuse_bound
from tokenstore.integrations._exchange import BearerToken, Exchange
from tokenstore.integrations.dpop import DPoP, DPoPKey
from tokenstore.records import TokenRecord
from tokenstore.store import AuthTokenStore
from tokenstore.sync import AuthTokenStore as SyncAuthTokenStore
from tokenstore.tracebacks import Hidden, clears_locals
from tokenstore.validation import token_key

if TYPE_CHECKING:
    from tokenstore.refresh.attempt import Refresh

__all__ = ["BearerAuth", "BearerOptions", "BearerTokens"]

S = TypeVar("S", bound=AuthTokenStore | SyncAuthTokenStore)

_ORIGIN: Final = re.compile(r"(https?)://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?")
_PORTS: Final = {"http": 80, "https": 443}
# A store takes tokens with spaces, too (RFC 6749 appendix A). RFC 6750 section 2.1 allows even fewer characters than
# this, but some providers' tokens have others, such as "|".
_TOKEN: Final = re.compile(r"[\x21-\x7e]+")


class BearerOptions(TypedDict, total=False):
    """Further arguments of ``StoreAuth``, which :meth:`tokenstore.AuthTokenStore.load_fresh_tokens` explains."""

    account: str
    refresh: Refresh | None
    min_ttl: float
    scopes: Collection[str]
    dpop: DPoP | None


class BearerTokens:
    """The access tokens of one user, for requests to the named origins.

    Args:
        store: The async store, or that of ``tokenstore.sync``.
        provider: The provider's name.
        user_id: The user's id.
        origins: Where the token may go.
        options: Passed to ``load_fresh_tokens``.

    Raises:
        ConfigurationError: An origin is not acceptable, or ``store`` is not a store.
        InvalidInputError: The provider, the user id or the account is not acceptable.
    """

    def __init__(
        self,
        store: AuthTokenStore | SyncAuthTokenStore,
        provider: str,
        user_id: str,
        origins: Collection[str],
        options: BearerOptions,
    ) -> None:
        if not isinstance(store, AuthTokenStore | SyncAuthTokenStore):
            raise ConfigurationError("store must be a store of tokenstore.open_store or tokenstore.sync.open_store")
        if unknown := options.keys() - BearerOptions.__annotations__.keys():
            raise ConfigurationError(f"unknown arguments: {', '.join(sorted(unknown))}")
        self._key = token_key(provider, user_id, options.get("account", ""))
        self._origins = _checked_origins(origins)
        self._store = store
        self._options: dict[str, Any] = dict(options)
        self._dpop: DPoP | None = self._options.pop("dpop", None)
        if not isinstance(self._dpop, DPoP | None):
            raise ConfigurationError("dpop must be a tokenstore.integrations.dpop.DPoP")

    def __repr__(self) -> str:
        account = f" {self._key.account!r}" if self._key.account else ""
        return f"{self._key.provider!r} {self._key.user_id!r}{account} at {', '.join(map(str, self._origins))}"

    def go_to(self, scheme: str, host: str | None, port: int | None) -> bool:
        """Whether a request there gets the token. A port of None is the scheme's own one."""
        return host is not None and _Origin.of(scheme, host, port) in self._origins

    @clears_locals
    async def load(self, refused: BearerToken | None = None) -> BearerToken:
        """Load the token from the async store; after a 401, refresh the refused one, or get the one that replaced it.

        Raises:
            TokenStoreError: As ``load_fresh_tokens`` and ``DPoP.key``; UnsupportedOperationError if the store is the
                other kind, or the token contains a space; and ConfigurationError if the token cannot be sent with or
                without a DPoP proof.
        """
        if not isinstance(self._store, AuthTokenStore):
            raise UnsupportedOperationError(
                "an async HTTP client needs the async store: use tokenstore.open_store instead of tokenstore.sync"
            )
        arguments = self._arguments(refused)
        record = await self._store.load_fresh_tokens(
            self._key.provider, self._key.user_id, missing="raise", **arguments
        )
        key = None
        if dpop := self._dpop_for(record):
            key = await dpop.key_of(self._store, self._key, anew=refused is not None)
        return self._token(record, key)

    @clears_locals
    def load_blocking(self, refused: BearerToken | None = None) -> BearerToken:
        """The same, from the store of ``tokenstore.sync``."""
        if not isinstance(self._store, SyncAuthTokenStore):
            raise UnsupportedOperationError(
                "an HTTP client without await needs the store without await: use tokenstore.sync.open_store"
            )
        arguments = self._arguments(refused)
        record = self._store.load_fresh_tokens(self._key.provider, self._key.user_id, missing="raise", **arguments)
        key = None
        if dpop := self._dpop_for(record):
            key = self._store.run(lambda aio: dpop.key_of(aio, self._key, anew=refused is not None))
        return self._token(record, key)

    def exchange(self, token: BearerToken) -> Exchange:
        """Begin a request with a token that was loaded for it."""
        return Exchange(token, None if self._dpop is None else self._dpop.resource_nonces)

    def _arguments(self, refused: BearerToken | None) -> dict[str, Any]:
        # With the generation, many requests whose token was refused cause one refresh.
        forced = {} if refused is None else {"force": True, "generation": refused.generation}
        return {**self._options, **forced}

    def _dpop_for(self, record: TokenRecord) -> DPoP | None:
        """With what the token is sent: a DPoP proof, or as a Bearer token."""
        if self._dpop is None:
            refuse_bound(record, "pass dpop=DPoP()")
            return None
        if is_bound(record):
            return self._dpop
        if not self._dpop.allow_bearer:
            raise ConfigurationError(
                f"{self._key.provider!r}, user {self._key.user_id!r}: the provider has not bound the access token to"
                " the DPoP key (its token_type is not DPoP): log in with a proof, or pass"
                " DPoP(allow_bearer=True) to send such tokens as Bearer tokens"
            )
        return None

    def _token(self, record: TokenRecord, key: DPoPKey | None) -> BearerToken:
        token, generation = record["access_token"], record["generation"]
        # The errors of HTTP libraries about a header's value contain it.
        if not _TOKEN.fullmatch(token):
            raise UnsupportedOperationError(
                f"{self._key.provider!r}, user {self._key.user_id!r}: the access token contains a space, so it"
                " cannot be sent as a Bearer token"
            )
        if key is None or self._dpop is None:
            return BearerToken(generation, Hidden(f"Bearer {token}"))
        nonces = self._dpop.resource_nonces

        def prove(method: str, url: str) -> str:
            return key.proof(method, url, access_token=token, nonce=nonces.last(url))

        return BearerToken(generation, Hidden(f"DPoP {token}"), prove)


class BearerAuth(Generic[S]):
    """What ``StoreAuth`` of each HTTP client is made with. Its class documents the arguments and errors."""

    @clears_locals
    def __init__(
        self, store: S, provider: str, user_id: str, *, origins: Collection[str], **options: Unpack[BearerOptions]
    ) -> None:
        self._tokens = BearerTokens(store, provider, user_id, origins, options)

    def __repr__(self) -> str:
        return f"<{type(self).__module__}.{type(self).__name__} {self._tokens!r}>"


class _Origin(NamedTuple):
    """A scheme, a host and a port, in one spelling (RFC 6454 section 4)."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, scheme: str, host: str, port: int | None) -> _Origin:
        scheme, host = scheme.lower(), host.lower().strip("[]")
        with suppress(ValueError):
            host = str(ip_address(host))
        return cls(scheme, host, _PORTS.get(scheme, -1) if port is None else port)

    def __str__(self) -> str:
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        with suppress(ValueError):
            return ip_address(self.host).is_loopback
        return self.host == "localhost"


def _checked_origins(origins: Collection[str]) -> tuple[_Origin, ...]:
    """The argument ``origins``. No message quotes an origin, which may contain a password."""
    if isinstance(origins, str) or not isinstance(origins, Collection) or not origins:
        raise ConfigurationError("origins must be a collection of at least one origin, such as https://api.example.com")
    found = [_checked_origin(origin) for origin in origins]
    for scheme, host, port in found:
        if (scheme, port) == ("http", 80) and _Origin("https", host, 443) not in found:
            # httpx and requests keep the header on a redirect from http to https, if both have their default port.
            raise ConfigurationError(
                f"origins: http://{host} needs https://{host} beside it, because HTTP clients take a redirect from the"
                " one to the other for the same origin; or use another port"
            )
    return tuple(dict.fromkeys(found))


def _checked_origin(origin: str) -> _Origin:
    parts = _ORIGIN.fullmatch(origin) if isinstance(origin, str) else None
    if parts is None or (parts[3] is not None and not 0 < int(parts[3]) < 65536):
        raise ConfigurationError(
            "each of origins must be a scheme, a host and perhaps a port, such as https://api.example.com:8443, without"
            " a user name, a path or a slash at the end; write the host in ASCII (xn--…)"
        )
    checked = _Origin.of(parts[1], parts[2], None if parts[3] is None else int(parts[3]))
    if checked.scheme == "http" and not checked.is_loopback:
        raise ConfigurationError("origins must be https (http on a loopback host alone): the token is sent there")
    return checked
