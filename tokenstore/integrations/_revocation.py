"""What a revocation sends, and what its response means: RFC 7009, and the ways of vendors."""

from __future__ import annotations

from collections.abc import Mapping

from tokenstore.errors import UnsupportedOperationError
from tokenstore.integrations._answers import Answer
from tokenstore.integrations._credentials import Client, Request
from tokenstore.integrations.providers import Provider, RevocationRequest
from tokenstore.records import TokenRecord
from tokenstore.validation import plain_text, token_text

__all__ = ["can_revoke", "is_revoked", "revocation_request"]


def can_revoke(revocation: RevocationRequest, client: Client) -> bool:
    """Whether this client can send such a request: HTTP Basic needs a secret."""
    return revocation.auth != "basic" or client.has_secret


def revocation_request(provider: Provider, client: Client, url: str, record: TokenRecord) -> tuple[str, Request]:
    """The kind of the token that is revoked, and the request.

    Raises:
        UnsupportedOperationError: The record has no token of a kind that the provider takes.
    """
    revocation, tokens = provider.revocation, _tokens(record)
    kind = next((kind for kind in revocation.fields if tokens[kind] is not None), None)
    if kind is None:
        raise UnsupportedOperationError(
            f"{provider.name} revokes {' and '.join(revocation.fields)} alone, and there is none: delete_tokens makes"
            " the store forget the tokens"
        )
    if revocation.auth == "bearer":
        # As in a request to the vendor's API: in a header, which no log of URLs shows.
        headers = {"Authorization": f"Bearer {token_text(kind, tokens[kind])}"}
        return kind, Request(revocation.method, url, lambda: (headers, ""))
    form = {revocation.fields[kind]: plain_text(kind, tokens[kind])}
    if revocation.hint:
        form["token_type_hint"] = kind
    return kind, client.request(
        url,
        form,
        as_json=revocation.json or provider.json_request,
        method=revocation.method,
        auth_method="client_secret_basic" if revocation.auth == "basic" else None,
    )


def is_revoked(revocation: RevocationRequest, answer: Answer, kind: str, record: TokenRecord) -> bool:
    """Whether the token is revoked, or was already."""
    # RFC 7009 section 2.2: the body of a success means nothing. But Slack sends `"ok": false` with HTTP 200.
    if 200 <= answer.status < 300 and answer.fields.get("ok") is not False:
        return True
    error = answer.fields.get("error")
    if isinstance(error, str) and error in revocation.revoked:
        return True
    # Against the RFC, some providers refuse an unknown token, which needs no revocation. An unknown access token may
    # just have expired: that says nothing about the refresh token.
    return error == "invalid_token" and (kind == "refresh_token" or record["refresh_token"] is None)


def _tokens(record: TokenRecord) -> Mapping[str, object]:
    return {"refresh_token": record["refresh_token"], "access_token": record["access_token"]}
