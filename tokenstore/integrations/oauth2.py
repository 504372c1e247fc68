"""A ready-made refresher for token endpoints that follow RFC 6749, and revocation endpoints that follow RFC 7009.

::

    refresher = OAuth2Refresher.for_provider("github", client_id=..., client_secret=...)
    store = open_store(url, refreshers={"github": refresher})

Needs the extra ``oauth``: Authlib authenticates the client, httpx sends the requests.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Self, TypedDict, Unpack, get_args
from urllib.parse import quote

from tokenstore.errors import ConfigurationError, ReauthorizationRequiredError, UnsupportedOperationError
from tokenstore.integrations._credentials import Client, checked_parameters, checked_text
from tokenstore.integrations._endpoint import CHECK_CLIENT, Endpoint, checked_lifetime, require_extra
from tokenstore.integrations._proving import Proving
from tokenstore.integrations._revocation import can_revoke, is_revoked, revocation_request
from tokenstore.integrations._urls import checked_hosts, checked_url
from tokenstore.integrations.presets import provider_named
from tokenstore.integrations.providers import PLACEHOLDERS, AuthMethod, Placeholders, Provider, Rotation
from tokenstore.records import TokenRecord
from tokenstore.tracebacks import clears_locals
from tokenstore.validation import plain_text, seconds

if TYPE_CHECKING:
    import httpx
    import httpx2

    from tokenstore.integrations.dpop import DPoP, DPoPKey

__all__ = ["OAuth2Refresher", "PresetOptions", "RefresherOptions"]

_REFRESH_FIRST: Final = (
    "it takes only an access token that is valid: call load_fresh_tokens, then revoke; or give up with delete_tokens"
)
_WITHOUT: Final = " for a client without a secret"
_RESERVED: Final = frozenset(
    {"client_assertion", "client_assertion_type", "client_id", "client_secret", "grant_type", "refresh_token", "scope"}
)


class RefresherOptions(TypedDict, total=False):
    """Arguments of :class:`OAuth2Refresher` that ``for_provider`` passes on."""

    private_key: str | bytes | Mapping[str, Any] | None
    auth_method: AuthMethod | None
    scope: str | None
    extra_parameters: Mapping[str, str]
    rotation: Rotation | None
    jwt_algorithm: str | None
    jwt_headers: Mapping[str, str]
    timeout: float
    http_client: httpx.AsyncClient | httpx2.AsyncClient | None
    trust_env: bool
    http_hosts: Collection[str]
    default_lifetime: float | None
    max_lifetime: float | None
    dpop: DPoP | None


class PresetOptions(RefresherOptions, Placeholders, total=False):
    """Further arguments of ``OAuth2Refresher.for_provider``."""


class OAuth2Refresher(Proving):
    """Refreshes at a token endpoint (RFC 6749 section 6), and revokes (RFC 7009).

    An instance is called with a record, and returns the token response. It stores nothing between calls, need not be
    closed, and may be used in any number of tasks and event loops. It follows no redirect and logs nothing. Its errors
    contain no token, secret or key.

    Args:
        token_url: The token endpoint: https, or http on a loopback host or one of ``http_hosts``.
        client_id: The client's id.
        client_secret: The client's secret, for confidential clients.
        private_key: The client's key instead of a secret, a PEM or a JWK: RSA of at least 2048 bits, P-256, P-384,
            P-521 or Ed25519.
        auth_method: Default: ``client_secret_basic`` (or the preset's) with a secret, ``private_key_jwt`` (RFC 7523)
            with a key, ``none`` without either.
        scope: Requests only a part of the granted scope. Default: all of it.
        extra_parameters: More fields of the refresh request.
        rotation: What happens to a used refresh token. With ``strict``, the default, a request that may have reached
            the endpoint is never repeated; otherwise a request with an unknown result is repeated once.
        revocation_url: The revocation endpoint. Default: none.
        provider: How the vendor differs from the RFCs. Default: not at all.
        jwt_algorithm: Signs the assertion of ``private_key_jwt``. Default: by the key, ``RS256`` for RSA. RSA keys can
            also have ``RS384``, ``RS512``, ``PS256``, ``PS384`` and ``PS512``, Ed25519 keys ``EdDSA``.
        jwt_headers: More headers of the assertion, such as ``kid`` or ``x5t#S256``.
        timeout: The longest call, with its second attempt, in seconds.
        http_client: The ``AsyncClient`` of httpx or httpx2 to use, with its own proxies and certificates. It is not
            closed. Default: a new one of httpx for each call.
        trust_env: Whether proxies and certificates of the environment are used. A loopback host and ``http_hosts`` are
            called without a proxy.
        http_hosts: Hosts of a private network that may be called over http: names, or private addresses. The secret and
            the tokens travel in clear there; only you can know that nobody else is on that network. Default: none.
        default_lifetime: The lifetime of an access token if neither its response nor the stored row tells one, in
            seconds. Default: its expiry is unknown.
        max_lifetime: How long an access token with an unknown expiry is used, in seconds. Default: until a caller
            forces a refresh.
        dpop: Signs each refresh with the connection's DPoP key (RFC 9449), which the store keeps. Use the object that
            the login and the adapters of HTTP clients use. Default: tokens are not bound to a key.

    Attributes:
        default_lifetime: The argument.
        max_lifetime: The argument.

    Raises:
        ConfigurationError: A URL, a key or a combination of arguments that cannot work, or another HTTP client.
        InvalidInputError: ``timeout`` or a lifetime is not a positive number of seconds.
        MissingDependencyError: The extra ``oauth`` is not installed.
    """

    @clears_locals
    def __init__(
        self,
        token_url: str,
        client_id: str,
        client_secret: str | None = None,
        *,
        private_key: str | bytes | Mapping[str, Any] | None = None,
        auth_method: AuthMethod | None = None,
        scope: str | None = None,
        extra_parameters: Mapping[str, str] = MappingProxyType({}),
        rotation: Rotation | None = None,
        revocation_url: str | None = None,
        provider: Provider | None = None,
        jwt_algorithm: str | None = None,
        jwt_headers: Mapping[str, str] = MappingProxyType({}),
        timeout: float = 10.0,
        http_client: httpx.AsyncClient | httpx2.AsyncClient | None = None,
        trust_env: bool = True,
        http_hosts: Collection[str] = frozenset(),
        default_lifetime: float | None = None,
        max_lifetime: float | None = None,
        dpop: DPoP | None = None,
    ) -> None:
        require_extra("OAuth2Refresher")
        self._dpop = dpop
        private = checked_hosts(http_hosts)
        host, local = checked_url("token_url", token_url, private)
        if revocation_url is not None:
            local &= checked_url("revocation_url", revocation_url, private)[1]
        provider = provider or Provider(name=host, token_url=token_url)
        self._token_url = token_url
        self._client = Client.of(
            token_url, client_id, client_secret, private_key, auth_method, jwt_algorithm, jwt_headers, provider
        )
        self._revocation_url = revocation_url and revocation_url.replace("{client_id}", quote(client_id, safe=""))
        self._rotation: Rotation = rotation or provider.rotation
        if self._rotation not in get_args(Rotation):
            raise ConfigurationError(f"rotation must be one of {', '.join(get_args(Rotation))}")
        self._parameters = checked_parameters(extra_parameters, _RESERVED)
        if scope is not None:
            self._parameters["scope"] = checked_text("scope", scope)
        self.default_lifetime = checked_lifetime("default_lifetime", default_lifetime)
        self.max_lifetime = checked_lifetime("max_lifetime", max_lifetime)
        self._endpoint = Endpoint(
            provider,
            self._client.secrets,
            timeout=seconds("timeout", timeout, positive=True),
            http_client=http_client,
            trust_env=trust_env and not local,
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._endpoint.provider.name} {self._client.method} rotation={self._rotation}>"

    @classmethod
    @clears_locals
    def for_provider(
        cls,
        provider: str | Provider,
        *,
        client_id: str,
        client_secret: str | None = None,
        **options: Unpack[PresetOptions],
    ) -> Self:
        """A refresher for a vendor of :data:`tokenstore.integrations.presets.PROVIDERS`, or for one of your own.

        Args:
            provider: The preset's name, or a description of the same kind.
            client_id: The client's id.
            client_secret: The client's secret, of confidential clients.
            options: The placeholders of the vendor's URLs (:class:`tokenstore.integrations.providers.Placeholders`),
                and further arguments of the class, which override the preset.

        Raises:
            ConfigurationError: There is no such preset, a placeholder is missing, not one of this vendor's, or has a
                value that is no part of a URL; and as the class.
        """
        if isinstance(provider, str):
            provider = provider_named(provider)
        given: dict[str, Any] = dict(options)
        token_url, revocation_url = provider.urls({name: given.pop(name, None) for name in PLACEHOLDERS})
        return cls(token_url, client_id, client_secret, revocation_url=revocation_url, provider=provider, **given)

    @property
    def can_revoke(self) -> bool:
        """Whether there is a revocation endpoint that takes this client."""
        return self._revocation_url is not None and can_revoke(self._endpoint.provider.revocation, self._client)

    @property
    def timeout(self) -> float:
        """Seconds that a call may take in all."""
        return self._endpoint.timeout

    @clears_locals
    async def __call__(self, record: TokenRecord, dpop_key: DPoPKey | None = None, /) -> dict[str, Any]:
        """Refresh: the token response (RFC 6749 section 5.1), with every field that the provider sent.

        Tokens that the provider has not bound to the DPoP key are returned as well, because they may be the only ones
        that still work: the adapters of HTTP clients refuse to send them.

        Raises:
            ConfigurationError: The argument ``dpop`` was given, and the store did not pass the key.
            ReauthorizationRequiredError: There is no refresh token, or the provider no longer accepts it.
            ProviderUnavailableError: No response in time, HTTP 429 or 5xx, or no readable response.
            ProviderRefusedError: The provider refuses the client or the request.
        """
        provider = self._endpoint.provider
        label = f"the token endpoint of {provider.name}"
        if record["refresh_token"] is None:
            raise ReauthorizationRequiredError(
                f"there is no refresh token for {label}: the user has to log in again", code="no_refresh_token"
            )
        token = plain_text("refresh_token", record["refresh_token"])
        form = {"grant_type": "refresh_token", "refresh_token": token, **self._parameters}
        request = self._client.request(self._token_url, form, as_json=provider.json_request)
        return await self._endpoint.tokens(
            label,
            self._proven(request, dpop_key),
            record,
            repeatable=self._rotation != "strict",
            advice=self._advice,
        )

    @clears_locals
    async def revoke(self, record: TokenRecord) -> None:
        """Revoke the refresh token, or the access token if there is none or the provider takes no other.

        A token that the provider does not know counts as revoked, but not an unknown access token beside a refresh
        token: that one could still be valid.

        Raises:
            UnsupportedOperationError: The provider has no revocation endpoint; the message says what to do.
            ProviderUnavailableError: As with a refresh.
            ProviderRefusedError: As with a refresh; ``unsupported_token_type`` too, and if the provider takes only a
                valid access token and this one is not.
            ReauthorizationRequiredError: The provider answered ``invalid_grant``.
        """
        provider = self._endpoint.provider
        if self._revocation_url is None or not self.can_revoke:
            raise UnsupportedOperationError(
                f"{provider.name} has no revocation endpoint{'' if self._revocation_url is None else _WITHOUT}:"
                " delete_tokens makes the store forget the tokens"
                + (f"; {provider.otherwise}" if provider.otherwise else "")
            )
        label = f"the revocation endpoint of {provider.name}"
        kind, request = revocation_request(provider, self._client, self._revocation_url, record)
        answer = await self._endpoint.ask(label, request, repeatable=True)
        if is_revoked(provider.revocation, answer, kind, record):
            return
        advice = _REFRESH_FIRST if kind == "access_token" and record["refresh_token"] is not None else CHECK_CLIENT
        if error := self._endpoint.error(label, answer, answer.fields, record, advice):
            raise error
