"""Sends the requests to a vendor's endpoints, and says what the responses mean."""

from __future__ import annotations

import asyncio
import re
import ssl
import sys
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from functools import cache
from secrets import SystemRandom
from typing import TYPE_CHECKING, Any, Final

from tokenstore.errors import (
    ConfigurationError,
    MissingDependencyError,
    ProviderRefusedError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    RefreshError,
)
from tokenstore.integrations._answers import Answer, Arrival, NoAnswer, retry_after
from tokenstore.integrations._bodies import is_access_token
from tokenstore.integrations._credentials import Request
from tokenstore.integrations.providers import Provider
from tokenstore.records import TokenRecord
from tokenstore.refresh.error_codes import INVALID_GRANT, REFUSALS, TRANSIENT, error_codes
from tokenstore.tracebacks import Hidden
from tokenstore.validation import seconds

if TYPE_CHECKING:
    import httpx
    import httpx2

__all__ = ["CHECK_CLIENT", "Endpoint", "checked_lifetime", "require_extra"]

_PAUSE: Final = (
    0.1,
    0.4,
)  # seconds before the second attempt; random, because all processes notice an outage at the same time
_CODE: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
# Without compression the received bytes are the response's size.
_HEADERS: Final = {"Accept": "application/json", "Accept-Encoding": "identity"}

CHECK_CLIENT: Final = "check the client's registration, id and secret"
"""What to do if a provider refuses the client."""


class Endpoint:
    """A vendor's endpoints. It stores nothing between calls, and follows no redirect.

    Args:
        provider: How the vendor differs from the RFCs.
        secrets: What no error may show, beside the tokens of the record.
        timeout: The longest call, with its second attempt, in seconds.
        http_client: The client to use, of httpx or httpx2. It is not closed. None: a new one of httpx for each call.
        trust_env: Whether proxies and certificates of the environment are used.

    Attributes:
        provider: The argument.
        timeout: The argument.
    """

    def __init__(
        self,
        provider: Provider,
        secrets: Hidden[tuple[str, ...]],
        *,
        timeout: float,
        http_client: httpx.AsyncClient | httpx2.AsyncClient | None,
        trust_env: bool,
    ) -> None:
        self.provider = provider
        self.timeout = timeout
        self._secrets = secrets
        self._http_client = http_client
        self._library = _library_of(http_client)
        self._trust_env = trust_env
        if http_client is None:
            _tls_context(trust_env)  # loads the certificates now, which would block the event loop later

    async def tokens(
        self, label: str, request: Request, record: TokenRecord, *, repeatable: bool, advice: str = CHECK_CLIENT
    ) -> dict[str, Any]:
        """Send a request for tokens. Returns the token response, with every field that the provider sent.

        Args:
            label: Names the endpoint in messages.
            request: The request.
            record: The row's record, whose tokens no error may show.
            repeatable: Whether the request may be sent again if its result is unknown.
            advice: What to do if the provider refuses the request.

        Raises:
            ReauthorizationRequiredError: The provider answered ``invalid_grant``.
            ProviderUnavailableError: No response in time, HTTP 429 or 5xx, or no readable response.
            ProviderRefusedError: The provider refuses the client or the request.
        """
        answer = await self.ask(label, request, repeatable=repeatable)
        fields = self.provider.token_fields(answer.value)
        if error := self.error(label, answer, fields, record, advice):
            raise error
        if is_access_token(fields.get("access_token")):
            return fields
        raise ProviderUnavailableError(
            f"{label} answered HTTP {answer.status} without a readable access token", code="invalid_response"
        )

    # -- one call: at most two attempts, and one more if the first proof needs a nonce -------------

    async def ask(self, label: str, request: Request, *, repeatable: bool) -> Answer:
        """Send a request. Returns any response; raises ProviderUnavailableError if there is none."""
        too_late = NoAnswer("timeout", f"gave no answer within {self.timeout:g} s")
        outcome: Answer | NoAnswer = too_late
        arrival = Arrival()
        renewals, repeats = 1, 1
        with suppress(TimeoutError):
            async with asyncio.timeout(self.timeout):
                while True:
                    outcome = await self._attempt(request, arrival, repeatable=repeatable)
                    premature = isinstance(outcome, Answer) and request.is_premature(outcome)
                    if premature and renewals:
                        renewals -= 1
                    elif repeats and self._worth_repeating(outcome, repeatable=repeatable):
                        repeats -= 1
                        await asyncio.sleep(SystemRandom().uniform(*_PAUSE))
                    else:
                        break
                    # From here on the result of the attempt before does not count.
                    outcome, arrival = too_late, Arrival()
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
        httpx = self._library
        # If a second attempt may follow, it has to fit into the time, too.
        short = self.timeout * 0.4
        timeout = httpx.Timeout(short if repeatable else self.timeout, connect=short, pool=short)
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
                    headers={**_HEADERS, **self.provider.headers, **headers},
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

    def _http(self) -> AbstractAsyncContextManager[Any]:
        import httpx

        if self._http_client is not None:
            return nullcontext(self._http_client)
        return httpx.AsyncClient(verify=_tls_context(self._trust_env), trust_env=self._trust_env)

    # -- what an answer means --------------------------------------------------------------------

    def error(
        self, label: str, answer: Answer, fields: Mapping[str, Any], record: TokenRecord, advice: str = CHECK_CLIENT
    ) -> RefreshError | None:
        """The error for a response; None for a success. A refusal gives the advice."""
        status, provider = answer.status, self.provider
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
            isinstance(secret, str) and secret and secret in shown for secret in (*self._secrets.reveal(), *tokens)
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


def checked_lifetime(name: str, value: float | None) -> float | None:
    """Check a refresher's argument ``default_lifetime`` or ``max_lifetime``: seconds, or None."""
    return None if value is None else seconds(name, value, positive=True)


def require_extra(user: str) -> None:
    """Check that the extra ``oauth`` is installed, for ``user``."""
    try:
        import authlib.oauth2.rfc7523  # noqa: F401 - imported to see whether it is installed
        import httpx  # noqa: F401
    except ImportError:
        raise MissingDependencyError(f'{user} needs Authlib and httpx: pip install "tokenstore[oauth]"') from None


def _library_of(client: object) -> Any:
    """The library of a client, httpx or httpx2: each has its own settings and exceptions. None: httpx."""
    import httpx

    for library in (httpx, sys.modules.get("httpx2")):
        if library is not None and (client is None or isinstance(client, library.AsyncClient)):
            return library
    raise ConfigurationError("http_client must be an AsyncClient of httpx or httpx2")


@cache
def _tls_context(trust_env: bool) -> ssl.SSLContext:
    import httpx

    with suppress(OSError):
        return httpx.create_ssl_context(trust_env=trust_env)
    raise ConfigurationError("the certificates cannot be loaded: check SSL_CERT_FILE and SSL_CERT_DIR")
