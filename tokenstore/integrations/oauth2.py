"""A ready-made refresher for token endpoints that follow RFC 6749, and revocation endpoints that follow RFC 7009.

::

    refresher = OAuth2Refresher.for_provider("github", client_id=..., client_secret=...)
    store = open_store(url, refreshers={"github": refresher})

Needs the extra ``oauth``: Authlib authenticates the client, httpx sends the requests.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Collection, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from functools import cache
from ipaddress import ip_address
from secrets import SystemRandom
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Self, TypedDict, Unpack, get_args

from tokenstore.errors import (
    ConfigurationError,
    MissingDependencyError,
    ProviderRefusedError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    RefreshError,
    UnsupportedOperationError,
)
from tokenstore.integrations._answers import Answer, Arrival, NoAnswer, retry_after
from tokenstore.integrations._bodies import is_access_token
from tokenstore.integrations._credentials import ClientCredentials, checked_text
from tokenstore.integrations.presets import provider_named
from tokenstore.integrations.providers import AuthMethod, Provider, Rotation
from tokenstore.records import TokenRecord
from tokenstore.refresh.error_codes import INVALID_GRANT, REFUSALS, TRANSIENT, error_codes
from tokenstore.tracebacks import clears_locals
from tokenstore.validation import plain_text, seconds

if TYPE_CHECKING:
    import httpx

__all__ = ["OAuth2Refresher", "RefresherOptions"]

_PAUSE: Final = (
    0.1,
    0.4,
)  # seconds before the second attempt; random, because all processes notice an outage at the same time
_CODE: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
# Without compression the received bytes are the response's size.
_HEADERS: Final = {"Accept": "application/json", "Accept-Encoding": "identity"}
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
    http_client: httpx.AsyncClient | None
    trust_env: bool
    http_hosts: Collection[str]


class OAuth2Refresher:
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
        http_client: The client to use, with its own proxies and certificates. It is not closed. Default: a new one for
            each call.
        trust_env: Whether proxies and certificates of the environment are used. A loopback host and ``http_hosts`` are
            called without a proxy.
        http_hosts: Hosts of a private network that may be called over http: names, or private addresses. The secret and
            the tokens travel in clear there; only you can know that nobody else is on that network. Default: none.

    Raises:
        ConfigurationError: A URL, a key or a combination of arguments that cannot work.
        InvalidInputError: ``timeout`` is not a positive number of seconds.
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
        http_client: httpx.AsyncClient | None = None,
        trust_env: bool = True,
        http_hosts: Collection[str] = frozenset(),
    ) -> None:
        _require_extra()
        private = _checked_hosts(http_hosts)
        host, local = _checked_url("token_url", token_url, private)
        if revocation_url is not None:
            local &= _checked_url("revocation_url", revocation_url, private)[1]
        self._provider = provider or Provider(name=host, token_url=token_url)
        self._token_url, self._revocation_url = token_url, revocation_url
        default = self._provider.auth_method if client_secret is not None else "none"
        self._client = ClientCredentials(
            client_id,
            client_secret,
            private_key,
            auth_method or ("private_key_jwt" if private_key is not None else default),
            token_url,
            jwt_algorithm,
            jwt_headers,
            raw_basic=self._provider.raw_basic,
            json_request=self._provider.json_request,
        )
        self._rotation: Rotation = rotation or self._provider.rotation
        if self._rotation not in get_args(Rotation):
            raise ConfigurationError(f"rotation must be one of {', '.join(get_args(Rotation))}")
        self._parameters = {
            checked_text("extra_parameters", k): checked_text(k, v) for k, v in extra_parameters.items()
        }
        if taken := sorted(_RESERVED & self._parameters.keys()):
            raise ConfigurationError(f"extra_parameters cannot hold {', '.join(taken)}: there are arguments for them")
        if scope is not None:
            self._parameters["scope"] = checked_text("scope", scope)
        self._timeout = seconds("timeout", timeout, positive=True)
        self._http_client = http_client
        self._trust_env = trust_env and not local
        if http_client is None:
            _tls_context(self._trust_env)  # loads the certificates now, which would block the event loop later

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._provider.name} {self._client.method} rotation={self._rotation}>"

    @classmethod
    @clears_locals
    def for_provider(
        cls,
        provider: str | Provider,
        *,
        client_id: str,
        client_secret: str | None = None,
        base_url: str | None = None,
        tenant: str | None = None,
        **options: Unpack[RefresherOptions],
    ) -> Self:
        """A refresher for a vendor of :data:`tokenstore.integrations.presets.PROVIDERS`, or for one of your own.

        Args:
            provider: The preset's name, or a description of the same kind.
            client_id: The client's id.
            client_secret: The client's secret, of confidential clients.
            base_url: The URL of a self-hosted instance (GitHub Enterprise Server, GitLab).
            tenant: Microsoft's tenant. Default: ``common``.
            options: Further arguments of the class; they override the preset.

        Raises:
            ConfigurationError: There is no such preset, or it takes no ``base_url`` or ``tenant``; and as the class.
        """
        if isinstance(provider, str):
            provider = provider_named(provider)
        token_url, revocation_url = provider.urls({"base_url": base_url, "tenant": tenant})
        return cls(token_url, client_id, client_secret, revocation_url=revocation_url, provider=provider, **options)

    @property
    def can_revoke(self) -> bool:
        """Whether there is a revocation endpoint."""
        return self._revocation_url is not None

    @property
    def timeout(self) -> float:
        """Seconds that a call may take in all."""
        return self._timeout

    @clears_locals
    async def __call__(self, record: TokenRecord) -> dict[str, Any]:
        """Refresh: the token response (RFC 6749 section 5.1), with every field that the provider sent.

        Raises:
            ReauthorizationRequiredError: There is no refresh token, or the provider no longer accepts it.
            ProviderUnavailableError: No response in time, HTTP 429 or 5xx, or no readable response.
            ProviderRefusedError: The provider refuses the client or the request.
        """
        label = f"the token endpoint of {self._provider.name}"
        if record["refresh_token"] is None:
            raise ReauthorizationRequiredError(
                f"there is no refresh token for {label}: the user has to log in again", code="no_refresh_token"
            )
        token = plain_text("refresh_token", record["refresh_token"])
        form = {"grant_type": "refresh_token", "refresh_token": token, **self._parameters}
        answer = await self._ask(label, self._token_url, form, repeatable=self._rotation != "strict")
        fields = self._provider.token_fields(answer.value)
        if error := self._error(label, answer, fields, record):
            raise error
        if is_access_token(fields.get("access_token")):
            return fields
        raise ProviderUnavailableError(
            f"{label} answered HTTP {answer.status} without a readable access token", code="invalid_response"
        )

    @clears_locals
    async def revoke(self, record: TokenRecord) -> None:
        """Revoke the refresh token, or the access token if there is none. An unknown token counts as revoked.

        Raises:
            UnsupportedOperationError: The provider has no revocation endpoint; the message says what to do.
            ProviderUnavailableError: As with a refresh.
            ProviderRefusedError: As with a refresh; ``unsupported_token_type`` too.
            ReauthorizationRequiredError: The provider answered ``invalid_grant``.
        """
        if self._revocation_url is None:
            raise UnsupportedOperationError(
                f"{self._provider.name} has no revocation endpoint: delete_tokens makes the store forget the tokens"
                + (f"; {self._provider.otherwise}" if self._provider.otherwise else "")
            )
        label = f"the revocation endpoint of {self._provider.name}"
        kind, token = "refresh_token", record["refresh_token"]
        if token is None:
            kind, token = "access_token", record["access_token"]
        name = self._provider.revocation_fields[kind == "access_token"]
        form = {name: plain_text(kind, token)} | ({"token_type_hint": kind} if name == "token" else {})
        answer = await self._ask(label, self._revocation_url, form, repeatable=True)
        fields = answer.fields
        # RFC 7009 section 2.2: the body of a success means nothing. Against the RFC, some providers refuse an unknown
        # token, which needs no revocation.
        if 200 <= answer.status < 300 or fields.get("error") == "invalid_token":
            return
        if error := self._error(label, answer, fields, record):
            raise error

    # -- one call: at most two attempts ----------------------------------------------------------

    async def _ask(self, label: str, url: str, form: Mapping[str, str], *, repeatable: bool) -> Answer:
        """Send a request. Returns any response; raises ProviderUnavailableError if there is none."""
        too_late = NoAnswer("timeout", f"gave no answer within {self._timeout:g} s")
        outcome: Answer | NoAnswer = too_late
        arrival = Arrival()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._timeout):
                outcome = await self._attempt(url, form, arrival, repeatable=repeatable)
                if self._worth_repeating(outcome, repeatable=repeatable):
                    await asyncio.sleep(SystemRandom().uniform(*_PAUSE))
                    # From here on the result of the first attempt does not count.
                    outcome, arrival = too_late, Arrival()
                    outcome = await self._attempt(url, form, arrival, repeatable=repeatable)
        if isinstance(outcome, NoAnswer):
            if salvaged := arrival.salvaged():
                return salvaged
            # Raised outside the handlers: otherwise the context would be httpx's exception, which has the request.
            raise ProviderUnavailableError(f"{label} {outcome.why}: try again later", code=outcome.code)
        return outcome

    def _worth_repeating(self, outcome: Answer | NoAnswer, *, repeatable: bool) -> bool:
        if isinstance(outcome, NoAnswer):
            return not outcome.sent or (repeatable and outcome.repeatable)
        return repeatable and outcome.status >= 500 and "Retry-After" not in outcome.headers

    async def _attempt(
        self, url: str, form: Mapping[str, str], arrival: Arrival, *, repeatable: bool
    ) -> Answer | NoAnswer:
        """Send the request once. If the response was cut off behind a complete body, that counts."""
        outcome = await self._send(url, form, arrival, repeatable=repeatable)
        return (isinstance(outcome, NoAnswer) and arrival.salvaged()) or outcome

    async def _send(
        self, url: str, form: Mapping[str, str], arrival: Arrival, *, repeatable: bool
    ) -> Answer | NoAnswer:
        import httpx

        # If a second attempt may follow, it has to fit into the time, too.
        short = self._timeout * 0.4
        timeout = httpx.Timeout(short if repeatable else self._timeout, connect=short, pool=short)
        headers, body = self._client.sign(url, form)
        opened: list[Any] = []

        async def trace(event: str, info: Mapping[str, Any]) -> None:
            if event == "connection.connect_tcp.complete":
                opened.append(info["return_value"])

        try:
            async with (
                self._http() as http,
                http.stream(
                    "POST",
                    url,
                    content=body,
                    headers={**_HEADERS, **headers},
                    timeout=timeout,
                    auth=None,
                    follow_redirects=False,
                    extensions={} if self._http_client else {"trace": trace},
                ) as response,
            ):
                return await arrival.read(response)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError):
            return NoAnswer("network_error", "cannot be reached", sent=False)
        except httpx.TimeoutException:
            return NoAnswer("timeout", "gave no answer in time", repeatable=True)
        except (httpx.NetworkError, httpx.RemoteProtocolError):
            return NoAnswer("network_error", "closed the connection without an answer", repeatable=True)
        except (httpx.HTTPError, httpx.InvalidURL, ImportError, OSError, RuntimeError, ValueError):
            # Proxy settings, a closed client and the like.
            return NoAnswer("http_client", "could not be called: check the HTTP client and its proxy settings")
        finally:
            # httpcore 1.0 forgets a connection whose TLS handshake is cancelled or takes too long.
            for stream in opened:
                await stream.aclose()

    def _http(self) -> AbstractAsyncContextManager[httpx.AsyncClient]:
        import httpx

        if self._http_client is not None:
            return nullcontext(self._http_client)
        return httpx.AsyncClient(verify=_tls_context(self._trust_env), trust_env=self._trust_env)

    # -- what an answer means --------------------------------------------------------------------

    def _error(self, label: str, answer: Answer, fields: Mapping[str, Any], record: TokenRecord) -> RefreshError | None:
        """The error for a response; None for a success."""
        status, provider = answer.status, self._provider
        given = answer.fields.get("error")
        error = given if isinstance(given, str) else ""
        # With tokens, `status` and the like are no errors, and an unknown `error` may be a warning: such an answer is
        # the only copy of the pair.
        success = 200 <= status < 300 and is_access_token(fields.get("access_token"))
        codes = {error} if success else {error, *error_codes(answer.value)}
        dead, transient = INVALID_GRANT | provider.invalid_grant, TRANSIENT | provider.transient
        shown = min(codes & dead, default="") or min(codes & (transient | REFUSALS), default=error)
        # A provider might send a token back as the error code.
        tokens = (source.get(name) for source in (record, fields) for name in ("access_token", "refresh_token"))
        hidden = any(
            isinstance(secret, str) and secret and secret in shown
            for secret in (*self._client.secrets.reveal(), *tokens)
        )
        code = shown if _CODE.fullmatch(shown) and not hidden else f"http_{status}"
        if 300 <= status < 400:
            return ProviderRefusedError(
                f"{label} answered HTTP {status}, a redirect, which is not followed as it would take the secret"
                " elsewhere: correct the URL",
                code="redirect",
            )
        described = f"{error}: {answer.fields.get('error_description')}"
        if codes & dead or described in dead or (not success and provider.says_invalid_grant(answer.value)):
            return ReauthorizationRequiredError(
                f"{label} refuses the refresh token ({code}): the user has to log in again", code=code
            )
        wait = retry_after(answer.headers)
        if status in (408, 429) or status >= 500 or codes & transient:
            return ProviderUnavailableError(
                f"{label} answered HTTP {status} ({code}): try again later", code=code, retry_after=wait
            )
        if answer.unread:
            return ProviderUnavailableError(
                f"{label} answered HTTP {status} with {answer.unread}; it is unknown what the request did",
                code="invalid_response",
            )
        # Some providers send errors with HTTP 200, and Slack sends `"ok": false`.
        if codes & REFUSALS or (error and not success) or status >= 400 or fields.get("ok") is False:
            return ProviderRefusedError(
                f"{label} refuses the request with HTTP {status} ({code}): check the client's registration, id and"
                " secret",
                code=code,
                retry_after=wait,
            )
        return None


def _require_extra() -> None:
    try:
        import authlib.oauth2.rfc7523  # noqa: F401 - imported to see whether it is installed
        import httpx  # noqa: F401
    except ImportError:
        raise MissingDependencyError(
            'OAuth2Refresher needs Authlib and httpx: pip install "tokenstore[oauth]"'
        ) from None


def _checked_hosts(hosts: Collection[str]) -> frozenset[str]:
    if isinstance(hosts, str):
        raise ConfigurationError("http_hosts must be a collection of hosts, not one str")
    for host in hosts:
        with suppress(ValueError):
            if ip_address(checked_text("http_hosts", host)).is_global:
                raise ConfigurationError("http_hosts must not hold a public address: what goes there would be in clear")
    return frozenset(host.lower() for host in hosts)


def _checked_url(name: str, url: str, private: frozenset[str]) -> tuple[str, bool]:
    """The host, and whether it is a loopback one or one of ``private``, which are lower-case."""
    import httpx  # the parser of the connection itself, so that both see the same host

    parsed = None
    with suppress(httpx.InvalidURL, TypeError, ValueError):
        parsed = httpx.URL(checked_text(name, url))
    if parsed is None or not parsed.host or re.search(r"\s", url):
        raise ConfigurationError(f"{name} is no URL with a host")
    if parsed.userinfo:
        raise ConfigurationError(f"{name} must not hold a user name or a password: use client_id and client_secret")
    if "#" in url:
        raise ConfigurationError(f"{name} must not have a fragment (RFC 6749 section 3.2)")
    loopback = parsed.host == "localhost"
    with suppress(ValueError):
        loopback = loopback or ip_address(parsed.host).is_loopback
    local = loopback or parsed.host.lower() in private
    if parsed.scheme != "https" and not (parsed.scheme == "http" and local):
        raise ConfigurationError(f"{name} must be https (http on loopback or http_hosts alone): it carries secrets")
    return parsed.host, local


@cache
def _tls_context(trust_env: bool) -> ssl.SSLContext:
    import httpx

    with suppress(OSError):
        return httpx.create_ssl_context(trust_env=trust_env)
    raise ConfigurationError("the certificates cannot be loaded: check SSL_CERT_FILE and SSL_CERT_DIR")
