from __future__ import annotations

import asyncio
import gc
import pickle
import socket
import sys
import threading
from base64 import b64encode
from typing import TYPE_CHECKING, Any
from urllib.parse import quote_plus, urlencode, urlsplit

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenstore import MissingDependencyError
from tokenstore.testing.provider import ProviderError, StrictRotatingProvider, refresh_over_http

if TYPE_CHECKING:
    from collections.abc import Iterator

FORM = "application/x-www-form-urlencoded"


class Clock:
    now = 1_700_000_000.25

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def provider(clock: Clock) -> Iterator[StrictRotatingProvider]:
    with StrictRotatingProvider(clock=clock) as provider:
        yield provider


@pytest.fixture
def http(provider: StrictRotatingProvider) -> Iterator[httpx.Client]:
    auth = (provider.client_id, provider.client_secret)
    with httpx.Client(base_url=provider.base_url, auth=auth, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def target() -> Iterator[StrictRotatingProvider]:
    """A provider for all examples of a property."""
    with StrictRotatingProvider() as provider:
        yield provider


def refresh(http: httpx.Client, refresh_token: str, **extra: str) -> httpx.Response:
    return http.post("/token", data={"grant_type": "refresh_token", "refresh_token": refresh_token, **extra})


def resource(http: httpx.Client, access_token: str) -> httpx.Response:
    headers = {"Authorization": f"Bearer {access_token}"}
    return http.get("/resource", headers=headers, auth=None)


def outcome(response: httpx.Response) -> tuple[int, str]:
    """Status and error code of a refusal, whose form is checked on the way."""
    body = response.json()
    assert set(body) == {"error", "error_description"}
    assert response.headers["Cache-Control"] == "no-store"
    return response.status_code, body["error"]


def raw(provider: StrictRotatingProvider, data: bytes) -> bytes:
    """Everything the provider answers to ``data`` and the end of the stream."""
    with socket.create_connection(("127.0.0.1", urlsplit(provider.base_url).port or 0), timeout=10) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


async def refresh_at(provider: StrictRotatingProvider, refresh_token: str) -> dict[str, Any]:
    return await refresh_over_http(
        provider.token_url, refresh_token, client_id=provider.client_id, client_secret=provider.client_secret
    )


# -- rotation and reuse --------------------------------------------------------------------------


def test_a_grant_has_the_shape_of_a_token_response(provider: StrictRotatingProvider) -> None:
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


def test_a_reuse_revokes_the_grant_and_only_it(provider: StrictRotatingProvider, http: httpx.Client) -> None:
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

    async def stampede() -> list[int]:
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

    assert asyncio.run(stampede()) == [200] + [400] * 99
    stats = provider.stats()
    assert (stats.refreshes, stats.reuses, stats.revoked_grants) == (1, 99, 1)
    assert (stats.in_flight, stats.max_in_flight) == (0, 100)


def test_200_users_refresh_at_once(provider: StrictRotatingProvider) -> None:
    auth = (provider.client_id, provider.client_secret)

    async def visit(user: str) -> httpx.Response:
        tokens = provider.new_grant(user)
        # A client each, as one pool of 200 connections is slow; unused certificates would take long to load, too.
        async with httpx.AsyncClient(verify=False, trust_env=False, timeout=30) as client:
            for _ in range(2):
                data = {"grant_type": "refresh_token", "refresh_token": tokens["refresh_token"]}
                tokens = (await client.post(provider.token_url, data=data, auth=auth)).json()
            headers = {"Authorization": f"Bearer {tokens['access_token']}"}
            return await client.get(f"{provider.base_url}/resource", headers=headers)

    async def stampede() -> list[httpx.Response]:
        async with asyncio.TaskGroup() as group:
            with provider.hold():
                visits = [group.create_task(visit(f"user-{n}")) for n in range(200)]
                await asyncio.to_thread(provider.wait_for_requests, 200, 30)
        return [task.result() for task in visits]

    assert [answer.json()["user"] for answer in asyncio.run(stampede())] == [f"user-{n}" for n in range(200)]
    stats = provider.stats()
    assert (stats.refreshes, stats.reuses, set(stats.refreshes_by_user.values())) == (400, 0, {2})
    assert stats.max_in_flight == 200


def test_without_rotation_the_refresh_token_stays(provider: StrictRotatingProvider, http: httpx.Client) -> None:
    provider.rotate = False
    tokens = provider.new_grant("alice")
    for _ in range(2):
        answer = refresh(http, tokens["refresh_token"]).json()
        assert "refresh_token" not in answer
        assert resource(http, answer["access_token"]).status_code == 200
    assert provider.stats().reuses == 0


def test_grace_repeats_an_unused_successor(provider: StrictRotatingProvider, http: httpx.Client, clock: Clock) -> None:
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


def test_grace_ends_with_the_successors_use(provider: StrictRotatingProvider, http: httpx.Client) -> None:
    provider.grace = 30
    first = provider.new_grant("alice")
    second = refresh(http, first["refresh_token"]).json()
    third = refresh(http, second["refresh_token"]).json()
    assert outcome(refresh(http, first["refresh_token"])) == (400, "invalid_grant")
    assert outcome(refresh(http, second["refresh_token"])) == (400, "invalid_grant")
    assert outcome(refresh(http, third["refresh_token"])) == (400, "invalid_grant")


def test_lifetimes(provider: StrictRotatingProvider, http: httpx.Client, clock: Clock) -> None:
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
def test_revocation(provider: StrictRotatingProvider, http: httpx.Client, kind: str, revoked: int) -> None:
    tokens = provider.new_grant("alice")
    for token in (tokens[kind], tokens[kind], "unknown"):
        response = http.post("/revoke", data={"token": token})
        assert (response.status_code, response.content) == (200, b"")
    assert outcome(resource(http, tokens["access_token"])) == (401, "invalid_token")
    assert refresh(http, tokens["refresh_token"]).status_code == (400 if revoked else 200)
    assert provider.stats().revoked_grants == revoked
    assert outcome(http.post("/revoke", data={"token_type_hint": kind})) == (400, "invalid_request")


# -- client authentication and malformed requests ------------------------------------------------


@pytest.mark.parametrize("in_body", [False, True])
def test_both_client_authentications(in_body: bool) -> None:
    client_id, client_secret = "café & co", "s:3+c r%t"
    with StrictRotatingProvider(client_id=client_id, client_secret=client_secret) as provider:
        data = {"grant_type": "refresh_token", "refresh_token": provider.new_grant("alice")["refresh_token"]}
        if in_body:
            data |= {"client_id": client_id, "client_secret": client_secret}
        auth = None if in_body else (quote_plus(client_id), quote_plus(client_secret))
        assert httpx.post(provider.token_url, data=data, auth=auth, trust_env=False).status_code == 200
        data["refresh_token"] = provider.new_grant("alice")["refresh_token"]
        assert "access_token" in asyncio.run(refresh_at(provider, data["refresh_token"]))


@pytest.mark.parametrize(
    ("header", "form"),
    [
        (None, {}),
        (None, {"client_id": "demo-client"}),
        (None, {"client_id": "demo-client", "client_secret": "wrong"}),
        ("Basic " + b64encode(b"demo-client:wrong").decode(), {}),
        ("Basic " + b64encode(b"demo-client:demo-secret").decode(), {"client_id": "another"}),
        ("Bearer " + b64encode(b"demo-client:demo-secret").decode(), {}),
        ("Basic " + b64encode(b"demo-client").decode(), {}),
        ("Basic " + b64encode(b"\xff:%ff").decode(), {}),
        ("Basic ***", {}),
        ("Basic", {}),
    ],
)
def test_other_clients_are_rejected(provider: StrictRotatingProvider, header: str | None, form: dict[str, str]) -> None:
    tokens = provider.new_grant("alice")
    response = httpx.post(
        provider.token_url,
        data={"grant_type": "refresh_token", "refresh_token": tokens["refresh_token"], **form},
        headers={"Authorization": header} if header else {},
        trust_env=False,
    )
    assert outcome(response) == (401, "invalid_client")
    assert response.headers["WWW-Authenticate"].startswith("Basic realm=")
    assert provider.stats().rejected_clients == 1
    asyncio.run(refresh_at(provider, tokens["refresh_token"]))  # nothing was consumed


GRANT = "grant_type=refresh_token"


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("refresh_token=x", "invalid_request"),
        ("grant_type=&refresh_token=x", "invalid_request"),
        (GRANT, "invalid_request"),
        (f"{GRANT}&refresh_token=x&refresh_token=x", "invalid_request"),
        (f"{GRANT}&refresh_token=x&state=1&state=2", "invalid_request"),
        (f"{GRANT}&refresh_token=x&client_secret=demo-secret", "invalid_request"),
        (f"{GRANT}&refresh_token=%ff", "invalid_request"),
        (b"\xff", "invalid_request"),
        ("&".join(f"{n}={n}" for n in range(101)), "invalid_request"),
        ("grant_type=password&username=a&password=b", "unsupported_grant_type"),
        (f"{GRANT}&refresh_token=x", "invalid_grant"),
    ],
)
def test_bad_parameters(http: httpx.Client, content: str | bytes, error: str) -> None:
    response = http.post("/token", content=content, headers={"Content-Type": FORM})
    assert outcome(response) == (400, error)


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "header"),
    [
        ("GET", "/token", {}, 405, ("Allow", "POST")),
        ("PUT", "/revoke", {}, 405, ("Allow", "POST")),
        ("POST", "/stats", {}, 405, ("Allow", "GET")),
        ("POST", "/", {}, 404, ("Cache-Control", "no-store")),
        ("POST", "/token", {"json": {}}, 415, ("Cache-Control", "no-store")),
        ("POST", "/token", {}, 415, ("Cache-Control", "no-store")),
        ("POST", "/token", {"data": {"refresh_token": "x" * 20_000}}, 413, ("Connection", "close")),
        ("POST", "/token", {"content": b"x" * 2_000_000}, 413, ("Connection", "close")),
        ("POST", "/token", {"content": iter([b"x"])}, 411, ("Connection", "close")),
        ("GET", "/" + "x" * 20_000, {}, 431, ("Connection", "close")),
        ("GET", "/resource", {}, 401, ("WWW-Authenticate", 'Bearer realm="tokenstore.testing"')),
    ],
)
def test_http_errors(
    http: httpx.Client, method: str, path: str, options: dict[str, Any], status: int, header: tuple[str, str]
) -> None:
    response = http.request(method, path, **options)
    assert outcome(response)[0] == status
    assert response.headers[header[0]] == header[1]
    assert http.get("/stats").status_code == 200


def test_a_bad_bearer_token_is_named_as_the_reason(http: httpx.Client) -> None:
    response = resource(http, "at_unknown")
    assert outcome(response) == (401, "invalid_token")
    assert 'error="invalid_token"' in response.headers["WWW-Authenticate"]


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n",
        b"GET / HTTP/2\r\n\r\n",
        b"GET /stats HTTP/1.1\r\n\r\n",
        b"GET /stats HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /stats HTTP/1.1\r\nHost : a\r\n\r\n",
        b"GET /stats HTTP/1.1\r\nHost: a\nX: b\r\n\r\n",
        b"POST /token HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST /token HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
    ],
)
def test_malformed_http(provider: StrictRotatingProvider, data: bytes) -> None:
    assert raw(provider, data).startswith(b"HTTP/1.1 400 Bad Request\r\n")


def test_requests_cut_short_get_no_answer(provider: StrictRotatingProvider) -> None:
    assert raw(provider, b"") == raw(provider, b"GET /stats HTTP/1.1\r\nHost: a\r\n") == b""
    assert raw(provider, b"POST /token HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nshort") == b""
    assert provider.stats().requests == 0


def test_connections_are_kept_unless_told_otherwise(provider: StrictRotatingProvider) -> None:
    get = b"\r\nGET /stats?x=y HTTP/1.1\r\nHost: a\r\n"
    assert raw(provider, (get + b"\r\n") * 3).count(b"HTTP/1.1 200 OK") == 3
    assert raw(provider, (get + b"Connection: close\r\n\r\n") * 3).count(b"HTTP/1.1 200 OK") == 1
    assert raw(provider, b"GET /stats HTTP/1.0\r\n\r\n" * 3).count(b"HTTP/1.1 200 OK") == 1
    assert raw(provider, b"HEAD /stats HTTP/1.1\r\nHost: a\r\n\r\n").endswith(b"\r\n\r\n")
    expecting = b"POST /x HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\nx"
    assert raw(provider, expecting).startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 Not Found\r\n")


def test_a_connection_serves_many_requests(provider: StrictRotatingProvider, http: httpx.Client) -> None:
    tokens = provider.new_grant("alice")
    ports = set()
    for _ in range(5):
        response = refresh(http, tokens["refresh_token"])
        ports.add(response.extensions["network_stream"].get_extra_info("client_addr"))
        tokens = response.json()
    assert len(ports) == 1


@settings(max_examples=50, deadline=None)
@given(data=st.binary(max_size=200))
def test_garbage_is_refused(target: StrictRotatingProvider, data: bytes) -> None:
    assert raw(target, data + b"\r\n\r\n").startswith(b"HTTP/1.1 400 ")


NAMES = st.sampled_from(["grant_type", "refresh_token", "scope", "token", "client_id", "client_secret"])
VALUES = st.sampled_from(["refresh_token", "demo-client", "demo-secret", ""]) | st.text(max_size=10)
FORMS = st.lists(st.tuples(NAMES | st.text(max_size=5), VALUES), max_size=6).map(urlencode).map(str.encode)
HEADERS = st.tuples(
    st.sampled_from(["Authorization", "Content-Type", "Connection", "Expect", "X-Any"]),
    st.sampled_from(
        [FORM, "Basic ZGVtby1jbGllbnQ6ZGVtby1zZWNyZXQ=", "Basic Og==", "Bearer at_", "close", "100-continue"]
    )
    | st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=20),
)


@settings(max_examples=100, deadline=None)
@given(
    method=st.sampled_from(["POST", "GET", "HEAD", "DELETE"]),
    path=st.sampled_from(["/token", "/revoke", "/resource", "/stats", "/token?x", "//", "/%00"]),
    headers=st.lists(HEADERS, max_size=4, unique_by=lambda header: header[0]),
    body=FORMS | st.binary(max_size=50),
)
def test_every_whole_request_is_answered(
    target: StrictRotatingProvider, method: str, path: str, headers: list[tuple[str, str]], body: bytes
) -> None:
    lines = [f"{method} {path} HTTP/1.1", "Host: a", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers]
    answer = raw(target, "\r\n".join([*lines, "", ""]).encode("latin-1") + body)
    status = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").split()[1]
    assert status in {b"200", b"400", b"401", b"404", b"405", b"415"}
    assert target.stats().in_flight == 0


# -- faults --------------------------------------------------------------------------------------


def test_injected_failures_consume_nothing(provider: StrictRotatingProvider, http: httpx.Client) -> None:
    token = provider.new_grant("alice")["refresh_token"]
    provider.fail_next(times=2, retry_after=7)
    provider.fail_next(429, error="slow_down")
    answers = [refresh(http, token) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [503, 503, 429, 200]
    assert [answer.headers.get("Retry-After") for answer in answers] == ["7", "7", None, None]
    assert outcome(answers[2]) == (429, "slow_down")


def test_an_outage_spares_only_the_stats(provider: StrictRotatingProvider, http: httpx.Client) -> None:
    tokens = provider.new_grant("alice")
    provider.outage = True
    assert outcome(refresh(http, tokens["refresh_token"])) == (503, "temporarily_unavailable")
    assert outcome(http.post("/revoke", data={"token": tokens["refresh_token"]}))[0] == 503
    assert outcome(resource(http, tokens["access_token"]))[0] == 503
    assert http.get("/stats").json()["requests"] == 1
    provider.outage = False
    assert refresh(http, tokens["refresh_token"]).status_code == 200


def test_a_dropped_response_has_consumed_the_token(provider: StrictRotatingProvider, http: httpx.Client) -> None:
    token = provider.new_grant("alice")["refresh_token"]
    provider.drop_next_response()
    assert refresh(http, "rt_unknown").status_code == 400  # refusals are not what it waits for
    with pytest.raises(httpx.RemoteProtocolError):
        refresh(http, token)
    assert provider.stats().refreshes == 1
    assert outcome(refresh(http, token)) == (400, "invalid_grant")
    assert provider.stats().revoked_grants == 1


def test_grace_saves_a_dropped_response(provider: StrictRotatingProvider, http: httpx.Client) -> None:
    provider.grace = 30
    token = provider.new_grant("alice")["refresh_token"]
    provider.drop_next_response()
    with pytest.raises(httpx.RemoteProtocolError):
        refresh(http, token)
    assert resource(http, refresh(http, token).json()["access_token"]).status_code == 200


def test_a_held_request_has_taken_effect(provider: StrictRotatingProvider, http: httpx.Client) -> None:
    async def race() -> dict[str, Any]:
        token = provider.new_grant("alice")["refresh_token"]
        with provider.hold(), provider.hold():
            task = asyncio.create_task(refresh_at(provider, token))
            await asyncio.to_thread(provider.wait_for_requests, 1)
            stats = provider.stats()
            assert (stats.in_flight, stats.refreshes, task.done()) == (1, 1, False)
            assert (await asyncio.to_thread(http.get, "/stats")).json()["in_flight"] == 1  # only tokens are held
        return await task

    assert resource(http, asyncio.run(race())["access_token"]).status_code == 200
    assert provider.stats().in_flight == 0


def test_waiting_for_requests_that_do_not_come(provider: StrictRotatingProvider) -> None:
    with pytest.raises(TimeoutError, match="0 of 1 token requests"):
        provider.wait_for_requests(1, timeout=0)


def test_latency_changes_while_running(provider: StrictRotatingProvider) -> None:
    async def race() -> None:
        provider.latency = 3600
        slow = asyncio.create_task(refresh_at(provider, provider.new_grant("alice")["refresh_token"]))
        await asyncio.to_thread(provider.wait_for_requests, 1)
        provider.latency = 0
        assert await refresh_at(provider, provider.new_grant("bob")["refresh_token"])
        assert (slow.done(), provider.stats().in_flight) == (False, 1)
        await asyncio.to_thread(provider.stop)
        with pytest.raises(httpx.TransportError):
            await slow

    asyncio.run(race())
    assert provider.stats().in_flight == 0


# -- lifecycle, counters, secrecy ----------------------------------------------------------------


def test_stopping_leaves_nothing_behind() -> None:
    before = set(threading.enumerate())
    provider = StrictRotatingProvider()
    address = ("", 0)
    for _ in range(5):  # at various moments between a connection's arrival and its acceptance
        with provider:
            address = ("127.0.0.1", urlsplit(provider.token_url).port or 0)
            clients = [socket.create_connection(address, timeout=10) for _ in range(50)]
            clients[0].sendall(b"POST /token HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n")
            clients[1].sendall(b"GET /stats HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            assert len(set(threading.enumerate()) - before) == 1
        assert set(threading.enumerate()) == before
        for client in clients:
            client.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=10)
    gc.collect()  # an unclosed socket, transport or loop would warn, and warnings are errors


def test_starting_and_stopping_twice() -> None:
    provider = StrictRotatingProvider()
    with pytest.raises(RuntimeError, match="start"):
        _ = provider.token_url
    provider.stop()
    provider.start()
    url = provider.token_url
    provider.start()
    assert provider.token_url == url
    provider.stop()
    provider.stop()
    with socket.create_server(("127.0.0.1", urlsplit(url).port or 0)), pytest.raises(OSError, match="in use"):
        provider.start()
    assert repr(provider) == "<StrictRotatingProvider stopped>"


def test_a_restart_keeps_port_and_grants_and_ends_holds(provider: StrictRotatingProvider) -> None:
    async def race() -> None:
        url, tokens = provider.token_url, [provider.new_grant(user)["refresh_token"] for user in ("alice", "bob")]
        with provider.hold():
            task = asyncio.create_task(refresh_at(provider, tokens[0]))
            await asyncio.to_thread(provider.wait_for_requests, 1)
            await asyncio.to_thread(provider.stop)
            with pytest.raises(httpx.TransportError):
                await task
            with pytest.raises(httpx.ConnectError):
                await refresh_at(provider, tokens[1])
            provider.start()
            assert provider.token_url == url
            assert await refresh_at(provider, tokens[1])

    asyncio.run(race())


def test_stats_over_http(provider: StrictRotatingProvider, http: httpx.Client) -> None:
    refresh(http, provider.new_grant("alice")["refresh_token"])
    assert http.get("/stats").json() == {
        "requests": 1,
        "refreshes": 1,
        "replays": 0,
        "reuses": 0,
        "revoked_grants": 0,
        "rejected_clients": 0,
        "in_flight": 0,
        "max_in_flight": 1,
        "refreshes_by_user": {"alice": 1},
    }


def test_no_token_is_shown(
    provider: StrictRotatingProvider, http: httpx.Client, capfd: pytest.CaptureFixture[str]
) -> None:
    tokens = provider.new_grant("alice")
    answers = [refresh(http, tokens["refresh_token"]) for _ in range(2)]
    grants = list(provider._refresh_tokens.values())
    shown = f"{provider!r}{grants!r}{provider.stats()!r}{answers[1].text}"
    assert "rt_" not in shown
    assert "at_" not in shown
    assert repr(provider) == f"<StrictRotatingProvider at 127.0.0.1:{urlsplit(provider.base_url).port}>"
    assert capfd.readouterr() == ("", "")


# -- the client ----------------------------------------------------------------------------------


def test_the_client_reports_the_error_code_alone(provider: StrictRotatingProvider) -> None:
    with pytest.raises(ProviderError) as caught:
        asyncio.run(refresh_at(provider, "rt_secret"))
    assert (caught.value.status, caught.value.error) == (400, "invalid_grant")
    assert str(caught.value) == str(pickle.loads(pickle.dumps(caught.value)))
    assert "rt_secret" not in str(caught.value)


@pytest.mark.parametrize(("status", "error"), [(400, "rt_Echo3d"), (200, "invalid_grant_" * 9), (502, "<html>")])
def test_the_client_repeats_nothing_but_codes(provider: StrictRotatingProvider, status: int, error: str) -> None:
    provider.fail_next(status, error=error)
    with pytest.raises(ProviderError) as caught:
        asyncio.run(refresh_at(provider, "rt_secret"))
    assert (caught.value.status, caught.value.error) == (status, "invalid_response")


def test_the_client_names_what_to_install(provider: StrictRotatingProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'tokenstore\[cli\]'"):
        asyncio.run(refresh_at(provider, "rt_secret"))
