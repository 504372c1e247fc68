"""Starting and stopping the strict provider, its counters, and its client."""

from __future__ import annotations

import asyncio
import gc
import pickle
import socket
import sys
import threading
from urllib.parse import urlsplit

import httpx
import pytest

from support.provider_requests import refresh, refresh_at
from tokenstore import MissingDependencyError
from tokenstore.testing.provider import ProviderError, StrictRotatingProvider

# -- starting and stopping, counters, secrets ----------------------------------------------------


def test_stop_closes_all_sockets_and_ends_the_thread() -> None:
    before = set(threading.enumerate())
    provider = StrictRotatingProvider()
    address = ("", 0)
    for _ in range(5):  # repeated, because stop() may come before or after a connection is accepted
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
    gc.collect()  # an unclosed socket, transport or event loop would warn, and warnings are errors


def test_start_and_stop_can_be_called_twice() -> None:
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
    async def main() -> None:
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

    asyncio.run(main())


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
        "issues": 0,
    }


def test_no_repr_response_or_output_contains_a_token(
    provider: StrictRotatingProvider, http: httpx.Client, capfd: pytest.CaptureFixture[str]
) -> None:
    tokens = provider.new_grant("alice")
    answers = [refresh(http, tokens["refresh_token"]) for _ in range(2)]
    grants = list(provider._grants._refresh_tokens.values())
    shown = f"{provider!r}{grants!r}{provider.stats()!r}{answers[1].text}"
    assert "rt_" not in shown
    assert "at_" not in shown
    assert repr(provider) == f"<StrictRotatingProvider at 127.0.0.1:{urlsplit(provider.base_url).port}>"
    assert capfd.readouterr() == ("", "")


# -- the client ----------------------------------------------------------------------------------


def test_the_client_s_error_contains_the_error_code_but_no_token(provider: StrictRotatingProvider) -> None:
    with pytest.raises(ProviderError) as caught:
        asyncio.run(refresh_at(provider, "rt_secret"))
    assert (caught.value.status, caught.value.error) == (400, "invalid_grant")
    assert str(caught.value) == str(pickle.loads(pickle.dumps(caught.value)))
    assert "rt_secret" not in str(caught.value)


@pytest.mark.parametrize(("status", "error"), [(400, "rt_Echo3d"), (200, "invalid_grant_" * 9), (502, "<html>")])
def test_the_client_s_error_repeats_only_known_error_codes(
    provider: StrictRotatingProvider, status: int, error: str
) -> None:
    provider.fail_next(status, error=error)
    with pytest.raises(ProviderError) as caught:
        asyncio.run(refresh_at(provider, "rt_secret"))
    assert (caught.value.status, caught.value.error) == (status, "invalid_response")


def test_without_httpx_the_client_s_error_says_what_to_install(
    provider: StrictRotatingProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'tokenstore\[cli\]'"):
        asyncio.run(refresh_at(provider, "rt_secret"))
