"""The strict provider's faults: failures, outages, lost responses, latency."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from support.provider_requests import outcome, refresh, refresh_at, resource
from tokenstore.testing.provider import StrictRotatingProvider


def test_injected_failures_do_not_consume_the_refresh_token(
    provider: StrictRotatingProvider, http: httpx.Client
) -> None:
    token = provider.new_grant("alice")["refresh_token"]
    provider.fail_next(times=2, retry_after=7)
    provider.fail_next(429, error="slow_down")
    answers = [refresh(http, token) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [503, 503, 429, 200]
    assert [answer.headers.get("Retry-After") for answer in answers] == ["7", "7", None, None]
    assert outcome(answers[2]) == (429, "slow_down")


def test_during_an_outage_only_stats_is_answered(provider: StrictRotatingProvider, http: httpx.Client) -> None:
    tokens = provider.new_grant("alice")
    provider.outage = True
    assert outcome(refresh(http, tokens["refresh_token"])) == (503, "temporarily_unavailable")
    assert outcome(http.post("/revoke", data={"token": tokens["refresh_token"]}))[0] == 503
    assert outcome(resource(http, tokens["access_token"]))[0] == 503
    assert http.get("/stats").json()["requests"] == 1
    provider.outage = False
    assert refresh(http, tokens["refresh_token"]).status_code == 200


def test_during_an_outage_connections_can_be_closed_without_a_response(
    provider: StrictRotatingProvider, http: httpx.Client
) -> None:
    tokens = provider.new_grant("alice")
    provider.outage = "drop"
    with pytest.raises(httpx.RemoteProtocolError):
        refresh(http, tokens["refresh_token"])
    with pytest.raises(httpx.RemoteProtocolError):
        resource(http, tokens["access_token"])
    stats = http.get("/stats").json()
    assert (stats["requests"], stats["refreshes"], stats["in_flight"]) == (1, 0, 0)
    provider.outage = False
    assert refresh(http, tokens["refresh_token"]).status_code == 200


def test_the_resource_refuses_the_next_requests_with_any_token(
    provider: StrictRotatingProvider, http: httpx.Client
) -> None:
    tokens = provider.new_grant("alice")
    provider.reject_next(times=2)
    answers = [resource(http, tokens["access_token"]) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [401, 401, 200]
    assert 'error="invalid_token"' in answers[0].headers["WWW-Authenticate"]
    assert refresh(http, tokens["refresh_token"]).status_code == 200


def test_a_dropped_response_consumes_the_refresh_token(provider: StrictRotatingProvider, http: httpx.Client) -> None:
    token = provider.new_grant("alice")["refresh_token"]
    provider.drop_next_response()
    assert refresh(http, "rt_unknown").status_code == 400  # only successful refreshes are dropped
    with pytest.raises(httpx.RemoteProtocolError):
        refresh(http, token)
    assert provider.stats().refreshes == 1
    assert outcome(refresh(http, token)) == (400, "invalid_grant")
    assert provider.stats().revoked_grants == 1


def test_within_the_grace_period_a_dropped_response_can_be_repeated(
    provider: StrictRotatingProvider, http: httpx.Client
) -> None:
    provider.grace = 30
    token = provider.new_grant("alice")["refresh_token"]
    provider.drop_next_response()
    with pytest.raises(httpx.RemoteProtocolError):
        refresh(http, token)
    assert resource(http, refresh(http, token).json()["access_token"]).status_code == 200


def test_a_request_with_a_held_response_has_taken_effect(provider: StrictRotatingProvider, http: httpx.Client) -> None:
    async def main() -> dict[str, Any]:
        token = provider.new_grant("alice")["refresh_token"]
        with provider.hold(), provider.hold():
            task = asyncio.create_task(refresh_at(provider, token))
            await asyncio.to_thread(provider.wait_for_requests, 1)
            stats = provider.stats()
            assert (stats.in_flight, stats.refreshes, task.done()) == (1, 1, False)
            assert (await asyncio.to_thread(http.get, "/stats")).json()[
                "in_flight"
            ] == 1  # only token requests are held
        return await task

    assert resource(http, asyncio.run(main())["access_token"]).status_code == 200
    assert provider.stats().in_flight == 0


def test_wait_for_requests_raises_timeout_error(provider: StrictRotatingProvider) -> None:
    with pytest.raises(TimeoutError, match="0 of 1 token requests"):
        provider.wait_for_requests(1, timeout=0)


def test_latency_can_be_changed_while_the_provider_runs(provider: StrictRotatingProvider) -> None:
    async def main() -> None:
        provider.latency = 3600
        slow = asyncio.create_task(refresh_at(provider, provider.new_grant("alice")["refresh_token"]))
        await asyncio.to_thread(provider.wait_for_requests, 1)
        provider.latency = 0
        assert await refresh_at(provider, provider.new_grant("bob")["refresh_token"])
        assert (slow.done(), provider.stats().in_flight) == (False, 1)
        await asyncio.to_thread(provider.stop)
        with pytest.raises(httpx.TransportError):
            await slow

    asyncio.run(main())
    assert provider.stats().in_flight == 0
