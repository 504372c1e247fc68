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
from secrets import SystemRandom
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Self, TypedDict, Unpack, get_args
from urllib.parse import quote

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
from tokenstore.integrations._credentials import ClientCredentials, Request, checked_text
from tokenstore.integrations._revocation import can_revoke, is_revoked, revocation_request
from tokenstore.integrations._urls import checked_hosts, checked_url
from tokenstore.integrations.presets import provider_named
from tokenstore.integrations.providers import PLACEHOLDERS, AuthMethod, Placeholders, Provider, Rotation
from tokenstore.records import TokenRecord
from tokenstore.refresh.error_codes import INVALID_GRANT, REFUSALS, TRANSIENT, error_codes
from tokenstore.tracebacks import clears_locals
from tokenstore.validation import plain_text, seconds

if TYPE_CHECKING:
    import httpx

__all__ = ["OAuth2Refresher", "PresetOptions", "RefresherOptions"]

_PAUSE: Final = (
    0.1,
    0.4,
)  # seconds before the second attempt; random, because all processes notice an outage at the same time
_CODE: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
# Without compression the received bytes are the response's size.
_HEADERS: Final = {"Accept": "application/json", "Accept-Encoding": "identity"}
_CHECK_CLIENT: Final = "check the client's registration, id and secret"
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
    http_client: httpx.AsyncClient | None
    trust_env: bool
    http_hosts: Collection[str]
    default_lifetime: float | None
    max_lifetime: float | None


class PresetOptions(RefresherOptions, Placeholders, total=False):
    """Further arguments of ``OAuth2Refresher.for_provider``."""


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
        default_lifetime: The lifetime of an access token if neither its response nor the stored row tells one, in
            seconds. Default: its expiry is unknown.
        max_lifetime: How long an access token with an unknown expiry is used, in seconds. Default: until a caller
            forces a refresh.

    Attributes:
        default_lifetime: The argument.
        max_lifetime: The argument.

    Raises:
        ConfigurationError: A URL, a key or a combination of arguments that cannot work.
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
        http_client: httpx.AsyncClient | None = None,
        trust_env: bool = True,
        http_hosts: Collection[str] = frozenset(),
        default_lifetime: float | None = None,
        max_lifetime: float | None = None,
    ) -> None:
        _require_extra()
        private = checked_hosts(http_hosts)
        host, local = checked_url("token_url", token_url, private)
        if revocation_url is not None:
            local &= checked_url("revocation_url", revocation_url, private)[1]
        self._provider = provider or Provider(name=host, token_url=token_url)
        self._token_url = token_url
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
        )
        self._revocation_url = revocation_url and revocation_url.replace("{client_id}", quote(client_id, safe=""))
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
        self.default_lifetime = _lifetime("default_lifetime", default_lifetime)
        self.max_lifetime = _lifetime("max_lifetime", max_lifetime)
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
        return self._revocation_url is not None and can_revoke(self._provider.revocation, self._client)

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
        request = self._client.request(self._token_url, form, as_json=self._provider.json_request)
        answer = await self._ask(label, request, repeatable=self._rotation != "strict")
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
        if self._revocation_url is None or not self.can_revoke:
            raise UnsupportedOperationError(
                f"{self._provider.name} has no revocation endpoint{'' if self._revocation_url is None else _WITHOUT}:"
                " delete_tokens makes the store forget the tokens"
                + (f"; {self._provider.otherwise}" if self._provider.otherwise else "")
            )
        label = f"the revocation endpoint of {self._provider.name}"
        kind, request = revocation_request(self._provider, self._client, self._revocation_url, record)
        answer = await self._ask(label, request, repeatable=True)
        if is_revoked(self._provider.revocation, answer, kind, record):
            return
        advice = _REFRESH_FIRST if kind == "access_token" and record["refresh_token"] is not None else _CHECK_CLIENT
        if error := self._error(label, answer, answer.fields, record, advice):
            raise error

    # -- one call: at most two attempts ----------------------------------------------------------

    async def _ask(self, label: str, request: Request, *, repeatable: bool) -> Answer:
        """Send a request. Returns any response; raises ProviderUnavailableError if there is none."""
        too_late = NoAnswer("timeout", f"gave no answer within {self._timeout:g} s")
        outcome: Answer | NoAnswer = too_late
        arrival = Arrival()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._timeout):
                outcome = await self._attempt(request, arrival, repeatable=repeatable)
                if self._worth_repeating(outcome, repeatable=repeatable):
                    await asyncio.sleep(SystemRandom().uniform(*_PAUSE))
                    # From here on the result of the first attempt does not count.
                    outcome, arrival = too_late, Arrival()
                    outcome = await self._attempt(request, arrival, repeatable=repeatable)
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

    async def _attempt(self, request: Request, arrival: Arrival, *, repeatable: bool) -> Answer | NoAnswer:
        """Send the request once. If the response was cut off behind a complete body, that counts."""
        outcome = await self._send(request, arrival, repeatable=repeatable)
        return (isinstance(outcome, NoAnswer) and arrival.salvaged()) or outcome

    async def _send(self, request: Request, arrival: Arrival, *, repeatable: bool) -> Answer | NoAnswer:
        import httpx

        # If a second attempt may follow, it has to fit into the time, too.
        short = self._timeout * 0.4
        timeout = httpx.Timeout(short if repeatable else self._timeout, connect=short, pool=short)
        headers, body = request.prepare()
        opened: list[Any] = []

        async def trace(event: str, info: Mapping[str, Any]) -> None:
            if event == "connection.connect_tcp.complete":
                opened.append(info["return_value"])

        try:
            async with (
                self._http() as http,
                http.stream(
                    request.method,
                    request.url,
                    content=body,
                    headers={**_HEADERS, **self._provider.headers, **headers},
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

    def _error(
        self, label: str, answer: Answer, fields: Mapping[str, Any], record: TokenRecord, advice: str = _CHECK_CLIENT
    ) -> RefreshError | None:
        """The error for a response; None for a success. A refusal gives the advice."""
        status, provider = answer.status, self._provider
        given = answer.fields.get("error")
        error = given if isinstance(given, str) else ""
        # With tokens, `status` and the like are no errors, and an unknown `error` may be a warning: such an answer is
        # the only copy of the pair.
        success = 200 <= status < 300 and is_access_token(fields.get("access_token"))
        codes = {error} if success else {error, *error_codes(answer.value)}
        dead, transient = INVALID_GRANT | provider.invalid_grant, TRANSIENT | provider.transient
        described = f"{error}: {answer.fields.get('error_description')}"
        if described in provider.transient:
            codes = {"temporarily_unavailable"}
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
                f"{label} refuses the request with HTTP {status} ({code}): {advice}",
                code=code,
                retry_after=wait,
            )
        return None


def _lifetime(name: str, value: float | None) -> float | None:
    return None if value is None else seconds(name, value, positive=True)


def _require_extra() -> None:
    try:
        import authlib.oauth2.rfc7523  # noqa: F401 - imported to see whether it is installed
        import httpx  # noqa: F401
    except ImportError:
        raise MissingDependencyError(
            'OAuth2Refresher needs Authlib and httpx: pip install "tokenstore[oauth]"'
        ) from None


@cache
def _tls_context(trust_env: bool) -> ssl.SSLContext:
    import httpx

    with suppress(OSError):
        return httpx.create_ssl_context(trust_env=trust_env)
    raise ConfigurationError("the certificates cannot be loaded: check SSL_CERT_FILE and SSL_CERT_DIR")
