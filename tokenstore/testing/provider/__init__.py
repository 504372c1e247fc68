"""A strict OAuth 2.0 provider on the loopback interface, for tests and demos.

:class:`StrictRotatingProvider` serves HTTP from a background thread and treats refresh tokens as the strictest
providers do (RFC 6749 section 6, RFC 9700 section 4.14): each refresh token works once, and a request with a used one
revokes its whole grant. So a token store that has a race loses grants. The provider can also be slow, be unavailable,
delay its responses, or close the connection instead of responding::

    with StrictRotatingProvider(access_token_lifetime=60) as provider:
        tokens = provider.new_grant("alice")
        tokens = await refresh_over_http(
            provider.token_url,
            tokens["refresh_token"],
            client_id=provider.client_id,
            client_secret=provider.client_secret,
        )
        assert provider.stats().refreshes == 1

Endpoints:

* ``GET /authorize``: logs the user in without a question, and redirects with a code (RFC 6749 section 4.1). PKCE with
  S256 is required (RFC 7636). The parameter ``login_hint`` or the attribute ``user`` names the user.
* ``POST /token``: redeems a code, which works once and for a minute; refreshes; issues tokens for the client itself
  (RFC 6749 section 4.4) and in exchange for a valid access token (RFC 8693), both without a refresh token. The client
  authenticates by HTTP Basic or in the body.
* ``POST /revoke``: revokes a grant or an access token (RFC 7009); the client authenticates.
* ``GET /resource``: an API that needs an access token, as a Bearer token (RFC 6750) or with a DPoP proof.
* ``GET /stats``: the counters as JSON, for other processes.

A token request with a DPoP proof (RFC 9449) gets tokens that are bound to the key: the access token, and the refresh
token, as for a public client. Each claim of a proof is checked, and a proof works once.
"""

from __future__ import annotations

from tokenstore.testing.provider.client import ProviderError, refresh_over_http
from tokenstore.testing.provider.stats import ProviderStats
from tokenstore.testing.provider.strict import StrictRotatingProvider

__all__ = ["ProviderError", "ProviderStats", "StrictRotatingProvider", "refresh_over_http"]
