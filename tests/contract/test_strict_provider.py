"""The strict provider: rotation, reuse, lifetimes, revocation."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from support.provider_requests import Clock, outcome, refresh, resource
from tokenstore.testing.provider import StrictRotatingProvider


def test_new_grant_returns_a_token_response(provider: StrictRotatingProvider) -> None:
    provider.refresh_token_lifetime = 7200
    tokens = provider.new_grant("alice", scope="read")
    assert tokens.pop("access_token").startswith("at_")
    assert tokens.pop("refresh_token").startswith("rt_")
    assert tokens == {"token_type": "Bearer", "expires_in": 3600, "scope": "read", "refresh_token_expires_in": 7200}


def test_a_refresh_replaces_both_tokens(provider: StrictRotatingProvider, http: httpx.Client) -> None:
    first = provider.new_grant("alice")
    response = refresh(http, first["refresh_token"])
    second = response.json()
    assert response.status_code == 200
    assert (response.headers["Cache-Control"], response.headers["Pragma"]) == ("no-store", "no-cache")
    assert response.headers["Content-Type"] == "application/json"
    assert second.keys() == first.keys()
    assert {first["access_token"], first["refresh_token"]}.isdisjoint(second.values())
    assert resource(http, first["access_token"]).status_code == 401
    assert resource(http, second["access_token"]).json() == {"user": "alice", "scope": "read write"}
    assert refresh(http, second["refresh_token"]).status_code == 200
    assert provider.stats().refreshes_by_user == {"alice": 2}


def test_reuse_of_a_refresh_token_revokes_only_its_grant(provider: StrictRotatingProvider, http: httpx.Client) -> None:
    other = provider.new_grant("alice")
    first = provider.new_grant("alice")
    second = refresh(http, first["refresh_token"]).json()
    assert outcome(refresh(http, first["refresh_token"])) == (400, "invalid_grant")
    assert outcome(refresh(http, second["refresh_token"])) == (400, "invalid_grant")
    assert outcome(resource(http, second["access_token"])) == (401, "invalid_token")
    assert resource(http, other["access_token"]).status_code == 200
    stats = provider.stats()
    assert (stats.requests, stats.refreshes, stats.reuses, stats.revoked_grants) == (3, 1, 1, 1)


def test_of_100_simultaneous_refreshes_one_succeeds(provider: StrictRotatingProvider) -> None:
    tokens = provider.new_grant("alice")

    async def refresh_at_once() -> list[int]:
        limits = httpx.Limits(max_connections=100)
        auth = (provider.client_id, provider.client_secret)
        async with httpx.AsyncClient(limits=limits, auth=auth, trust_env=False, timeout=30) as client:
            data = {"grant_type": "refresh_token", "refresh_token": tokens["refresh_token"]}
            with provider.hold():
                posts = [asyncio.create_task(client.post(provider.token_url, data=data)) for _ in range(100)]
                await asyncio.to_thread(provider.wait_for_requests, 100, 30)
                assert provider.stats().in_flight == 100
            answers = await asyncio.gather(*posts)
        return sorted(answer.status_code for answer in answers)

    assert asyncio.run(refresh_at_once()) == [200] + [400] * 99
    stats = provider.stats()
    assert (stats.refreshes, stats.reuses, stats.revoked_grants) == (1, 99, 1)
    assert (stats.in_flight, stats.max_in_flight) == (0, 100)


def test_200_users_refresh_at_once(provider: StrictRotatingProvider) -> None:
    auth = (provider.client_id, provider.client_secret)

    async def visit(user: str) -> httpx.Response:
        tokens = provider.new_grant(user)
        # One client for each user, because a pool of 200 connections is slow; without certificates, which load slowly.
        async with httpx.AsyncClient(verify=False, trust_env=False, timeout=30) as client:
            for _ in range(2):
                data = {"grant_type": "refresh_token", "refresh_token": tokens["refresh_token"]}
                tokens = (await client.post(provider.token_url, data=data, auth=auth)).json()
            headers = {"Authorization": f"Bearer {tokens['access_token']}"}
            return await client.get(f"{provider.base_url}/resource", headers=headers)

    async def refresh_at_once() -> list[httpx.Response]:
        async with asyncio.TaskGroup() as group:
            with provider.hold():
                visits = [group.create_task(visit(f"user-{n}")) for n in range(200)]
                await asyncio.to_thread(provider.wait_for_requests, 200, 30)
        return [task.result() for task in visits]

    assert [answer.json()["user"] for answer in asyncio.run(refresh_at_once())] == [f"user-{n}" for n in range(200)]
    stats = provider.stats()
    assert (stats.refreshes, stats.reuses, set(stats.refreshes_by_user.values())) == (400, 0, {2})
    assert stats.max_in_flight == 200


def test_without_rotation_the_refresh_token_stays_valid(provider: StrictRotatingProvider, http: httpx.Client) -> None:
    provider.rotate = False
    tokens = provider.new_grant("alice")
    for _ in range(2):
        answer = refresh(http, tokens["refresh_token"]).json()
        assert "refresh_token" not in answer
        assert resource(http, answer["access_token"]).status_code == 200
    assert provider.stats().reuses == 0


def test_within_the_grace_period_a_used_token_gets_the_same_new_tokens(
    provider: StrictRotatingProvider, http: httpx.Client, clock: Clock
) -> None:
    provider.grace = 30
    first = provider.new_grant("alice")
    second = refresh(http, first["refresh_token"]).json()
    clock.now += 29
    assert refresh(http, first["refresh_token"]).json() == {**second, "expires_in": second["expires_in"] - 29}
    stats = provider.stats()
    assert (stats.refreshes, stats.replays, stats.reuses) == (1, 1, 0)
    clock.now += 1
    assert outcome(refresh(http, first["refresh_token"])) == (400, "invalid_grant")
    assert provider.stats().revoked_grants == 1


def test_the_grace_period_ends_when_the_new_refresh_token_is_used(
    provider: StrictRotatingProvider, http: httpx.Client
) -> None:
    provider.grace = 30
    first = provider.new_grant("alice")
    second = refresh(http, first["refresh_token"]).json()
    third = refresh(http, second["refresh_token"]).json()
    assert outcome(refresh(http, first["refresh_token"])) == (400, "invalid_grant")
    assert outcome(refresh(http, second["refresh_token"])) == (400, "invalid_grant")
    assert outcome(refresh(http, third["refresh_token"])) == (400, "invalid_grant")


def test_tokens_expire_after_their_lifetimes(
    provider: StrictRotatingProvider, http: httpx.Client, clock: Clock
) -> None:
    provider.access_token_lifetime, provider.refresh_token_lifetime = 60, 600
    first = provider.new_grant("alice")
    clock.now += 59
    assert resource(http, first["access_token"]).status_code == 200
    clock.now += 1
    assert outcome(resource(http, first["access_token"])) == (401, "invalid_token")
    clock.now += 539
    second = refresh(http, first["refresh_token"]).json()
    assert (second["expires_in"], second["refresh_token_expires_in"]) == (60, 600)
    clock.now += 600
    assert outcome(refresh(http, second["refresh_token"])) == (400, "invalid_grant")
    assert (provider.stats().reuses, provider.stats().revoked_grants) == (0, 0)


def test_scope_may_be_narrowed_but_not_widened(provider: StrictRotatingProvider, http: httpx.Client) -> None:
    tokens = provider.new_grant("alice", scope="read write")
    assert outcome(refresh(http, tokens["refresh_token"], scope="read admin")) == (400, "invalid_scope")
    narrow = refresh(http, tokens["refresh_token"], scope="read").json()
    assert narrow["scope"] == resource(http, narrow["access_token"]).json()["scope"] == "read"
    assert refresh(http, narrow["refresh_token"]).json()["scope"] == "read write"


@pytest.mark.parametrize(("kind", "revoked"), [("refresh_token", 1), ("access_token", 0)])
def test_revoking_a_refresh_token_revokes_the_grant_and_an_access_token_only_itself(
    provider: StrictRotatingProvider, http: httpx.Client, kind: str, revoked: int
) -> None:
    tokens = provider.new_grant("alice")
    for token in (tokens[kind], tokens[kind], "unknown"):
        response = http.post("/revoke", data={"token": token})
        assert (response.status_code, response.content) == (200, b"")
    assert outcome(resource(http, tokens["access_token"])) == (401, "invalid_token")
    assert refresh(http, tokens["refresh_token"]).status_code == (400 if revoked else 200)
    assert provider.stats().revoked_grants == revoked
    assert outcome(http.post("/revoke", data={"token_type_hint": kind})) == (400, "invalid_request")
