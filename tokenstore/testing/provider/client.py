"""A client of the strict provider's token endpoint."""

from __future__ import annotations

import re
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote_plus

from tokenstore.errors import MissingDependencyError

if TYPE_CHECKING:
    import ssl

__all__ = ["ProviderError", "refresh_over_http"]


class ProviderError(Exception):
    """The token endpoint refused a request.

    Attributes:
        status: The HTTP status.
        error: The OAuth error code; it never contains a token.
    """

    def __init__(self, status: int, error: str) -> None:
        super().__init__(status, error)  # both in `args`, so that the error can be pickled for another process
        self.status = status
        self.error = error

    def __str__(self) -> str:
        return f"token endpoint answered {self.status} ({self.error})"


@cache
def _tls_context() -> ssl.SSLContext:
    """Make httpx's default TLS context once: loading the certificates is slow and blocks the event loop."""
    import httpx

    return httpx.create_ssl_context(trust_env=False)


async def refresh_over_http(
    token_url: str,
    refresh_token: str,
    *,
    client_id: str,
    client_secret: str,
    timeout: float = 10.0,
) -> dict[str, Any]:
    """Refresh at ``token_url`` and return the token response (RFC 6749 section 6).

    Ignores proxy settings, which would redirect loopback traffic, and follows no HTTP redirect.

    Args:
        token_url: The URL of the token endpoint.
        refresh_token: The refresh token; a rotating provider consumes it, even if its response is lost.
        client_id: The client's id, sent with the secret as HTTP Basic.
        client_secret: The client's secret.
        timeout: Seconds for each network operation. Default: 10.

    Raises:
        ProviderError: The endpoint refused, or its response is not a token response.
        MissingDependencyError: httpx is not installed.
        httpx.TransportError: There was no response.
    """
    try:
        import httpx  # imported here because the server does not need it
    except ImportError:
        raise MissingDependencyError("refresh_over_http needs httpx: pip install 'tokenstore[cli]'") from None
    async with httpx.AsyncClient(verify=_tls_context(), trust_env=False, timeout=timeout) as client:
        answer = await client.post(
            token_url,
            data={"grant_type": "refresh_token", "refresh_token": refresh_token},
            auth=(quote_plus(client_id), quote_plus(client_secret)),  # both encoded, see RFC 6749 section 2.3.1
        )
    tokens: Any = None
    with suppress(ValueError):
        tokens = answer.json()
    if answer.status_code == 200 and isinstance(tokens, dict) and "access_token" in tokens:
        return tokens
    error = tokens.get("error") if isinstance(tokens, dict) else None
    # Only text that looks like an error code: any other text from a server may contain a token.
    known = isinstance(error, str) and re.fullmatch(r"[a-z_]{1,40}", error)
    raise ProviderError(answer.status_code, str(error) if known else "invalid_response")
