"""`OAuth2Refresher` with a strict provider, over HTTP."""

from __future__ import annotations

import asyncio
import threading

import pytest

from support.oauth2_calls import ID, SECRET, record, refresh
from tokenstore import ProviderRefusedError, ProviderUnavailableError, ReauthorizationRequiredError
from tokenstore.integrations.oauth2 import OAuth2Refresher
from tokenstore.integrations.providers import AuthMethod
from tokenstore.testing.provider import StrictRotatingProvider


@pytest.mark.parametrize("method", ["client_secret_basic", "client_secret_post"])
def test_refreshes_at_the_strict_provider(provider: StrictRotatingProvider, method: AuthMethod) -> None:
    """It refreshes several times, with each way of sending the secret, and returns the response unchanged."""
    refresher = OAuth2Refresher(provider.token_url, ID, SECRET, auth_method=method)
    tokens = provider.new_grant("alice")
    for _ in range(3):
        tokens = refresh(refresher, tokens["refresh_token"])
        assert tokens["expires_in"] == 3600
        assert tokens["scope"] == "read write"
    assert provider.stats().refreshes == 3
    assert provider.stats().rejected_clients == 0


def test_a_used_refresh_token_needs_a_new_login(provider: StrictRotatingProvider) -> None:
    """The provider answers with invalid_grant."""
    refresher = OAuth2Refresher(provider.token_url, ID, SECRET)
    used = provider.new_grant("alice")["refresh_token"]
    refresh(refresher, used)
    with pytest.raises(ReauthorizationRequiredError, match="log in again") as caught:
        refresh(refresher, used)
    assert caught.value.code == "invalid_grant"


def test_a_wrong_client_secret_raises_provider_refused_error(provider: StrictRotatingProvider) -> None:
    """Only an operator can correct invalid_client, not a user."""
    with pytest.raises(ProviderRefusedError, match="invalid_client") as caught:
        refresh(OAuth2Refresher(provider.token_url, ID, "wrong"), provider.new_grant("alice")["refresh_token"])
    assert caught.value.code == "invalid_client"


def test_the_scope_is_sent(provider: StrictRotatingProvider) -> None:
    """A part of the granted scope is accepted; a larger scope is refused."""
    granted = provider.new_grant("alice")["refresh_token"]
    narrow = refresh(OAuth2Refresher(provider.token_url, ID, SECRET, scope="read"), granted)
    assert narrow["scope"] == "read"
    with pytest.raises(ProviderRefusedError, match="invalid_scope"):
        refresh(OAuth2Refresher(provider.token_url, ID, SECRET, scope="admin"), narrow["refresh_token"])


def test_a_request_whose_response_was_lost_is_repeated_only_with_a_grace_period(
    provider: StrictRotatingProvider,
) -> None:
    """A strict provider would revoke the grant; one with a grace period sends the same tokens again."""
    token = provider.new_grant("alice")["refresh_token"]
    provider.drop_next_response()
    with pytest.raises(ProviderUnavailableError):
        refresh(OAuth2Refresher(provider.token_url, ID, SECRET), token)
    assert provider.stats().requests == 1
    assert provider.stats().revoked_grants == 0

    provider.grace = 60
    token = provider.new_grant("bob")["refresh_token"]
    provider.drop_next_response()
    tokens = refresh(OAuth2Refresher(provider.token_url, ID, SECRET, rotation="grace"), token)
    assert provider.stats().replays == 1
    refresh(OAuth2Refresher(provider.token_url, ID, SECRET), tokens["refresh_token"])


def test_revokes_at_the_strict_provider(provider: StrictRotatingProvider) -> None:
    """The grant is revoked. Revoking it again, or an unknown token, is no error (RFC 7009 section 2.2)."""
    revocation_url = f"{provider.base_url}/revoke"
    refresher = OAuth2Refresher(provider.token_url, ID, SECRET, revocation_url=revocation_url)
    assert refresher.can_revoke
    token = provider.new_grant("alice")["refresh_token"]
    for _ in range(2):
        asyncio.run(refresher.revoke(record(token)))
    asyncio.run(refresher.revoke(record("unknown")))
    assert provider.stats().revoked_grants == 1
    with pytest.raises(ReauthorizationRequiredError):
        refresh(refresher, token)


def test_works_from_any_event_loop(provider: StrictRotatingProvider) -> None:
    """One refresher can be used in several threads with an event loop each, and in several tasks of each."""
    refresher = OAuth2Refresher(provider.token_url, ID, SECRET)

    async def some(user: str) -> None:
        records = [record(provider.new_grant(f"{user}{n}")["refresh_token"]) for n in range(5)]
        await asyncio.gather(*map(refresher, records))

    threads = [threading.Thread(target=lambda n=n: asyncio.run(some(str(n)))) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert provider.stats().refreshes == 15
