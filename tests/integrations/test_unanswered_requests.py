"""Requests without an answer: which of them are repeated, and the time limit."""

from __future__ import annotations

import asyncio
import socket
import traceback
from contextlib import suppress

import httpx
import pytest

from support.oauth2_calls import GOOD, ID, ROTATIONS, SECRET, record, refresh, refusal
from support.scripted_endpoint import Endpoint, Step, answer, hang_up, until_the_client_gives_up
from tokenstore import ProviderUnavailableError
from tokenstore.integrations.oauth2 import OAuth2Refresher
from tokenstore.integrations.providers import Rotation


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("failure", ["5xx", "hang up", "half an answer", "hang"])
def test_a_request_with_an_unknown_result_is_repeated_once_if_that_is_safe(
    endpoint: Endpoint, rotation: Rotation, failure: str
) -> None:
    """It is never repeated with strict rotation, because the refresh token may have been consumed."""
    steps: dict[str, Step] = {
        "5xx": answer(b"", 502),
        "hang up": hang_up,
        "half an answer": answer(b"{", 200, Content_Length="99"),
        "hang": until_the_client_gives_up,
    }
    timeout = 10.0 if failure != "hang" else 1.0
    refresher = OAuth2Refresher(endpoint.url, ID, SECRET, rotation=rotation, timeout=timeout)
    endpoint.script(steps[failure], answer(GOOD))
    if rotation == "strict":
        expected = {"5xx": "http_502", "hang": "timeout"}.get(failure, "network_error")
        assert refusal(refresher).code == expected
        assert len(endpoint.received) == 1
    else:
        assert refresh(refresher) == GOOD
        assert len(endpoint.received) == 2
    endpoint.script(steps[failure])
    assert isinstance(refusal(refresher), ProviderUnavailableError)
    assert len(endpoint.received) == (1 if rotation == "strict" else 2)


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize(
    ("error", "unsent"),
    [
        (httpx.ConnectError, True),
        (httpx.ConnectTimeout, True),
        (httpx.PoolTimeout, True),
        (httpx.ProxyError, True),
        (httpx.ReadTimeout, False),
        (httpx.WriteTimeout, False),
        (httpx.ReadError, False),
        (httpx.WriteError, False),
        (httpx.CloseError, False),
        (httpx.RemoteProtocolError, False),
    ],
)
def test_a_request_that_was_never_sent_is_repeated_once_with_any_rotation(
    error: type[httpx.TransportError], unsent: bool, rotation: Rotation
) -> None:
    """There are at most two attempts."""
    calls = 0

    def fail(request: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        raise error(f"about {SECRET}", request=request)

    client = httpx.AsyncClient(transport=httpx.MockTransport(fail))
    found = refusal(OAuth2Refresher("https://example.com", ID, SECRET, rotation=rotation, http_client=client))
    assert isinstance(found, ProviderUnavailableError)
    assert found.code == ("timeout" if error in (httpx.ReadTimeout, httpx.WriteTimeout) else "network_error")
    assert calls == (2 if unsent or rotation != "strict" else 1)


def test_the_error_describes_the_second_attempt() -> None:
    """If the second attempt sent the request, the error must not say that no request was sent."""
    calls = 0

    async def fail_then_hang(request: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise httpx.ConnectError("refused", request=request)
        await asyncio.Event().wait()
        raise AssertionError

    client = httpx.AsyncClient(transport=httpx.MockTransport(fail_then_hang))
    error = refusal(OAuth2Refresher("https://example.com", ID, SECRET, timeout=0.1, http_client=client))
    assert (calls, error.code) == (2, "timeout")


def test_the_error_for_a_closed_port_says_that_the_endpoint_cannot_be_reached() -> None:
    """No request was sent."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    error = refusal(OAuth2Refresher(f"http://127.0.0.1:{port}/token", ID, SECRET))
    assert error.code == "network_error"
    assert "cannot be reached" in str(error)


def test_a_connection_that_ends_before_the_request_is_read_has_an_unknown_result(endpoint: Endpoint) -> None:
    """The client cannot know whether the endpoint has read the request."""
    endpoint.script(hang_up)
    endpoint.reads = False
    assert refusal(OAuth2Refresher(endpoint.url, ID, SECRET)).code == "network_error"
    assert endpoint.connections == 1


def test_no_request_is_sent_before_the_tls_handshake(endpoint: Endpoint) -> None:
    """An endpoint without TLS gets no request."""
    endpoint.script(answer(GOOD))
    endpoint.reads = False
    error = refusal(OAuth2Refresher(endpoint.url.replace("http:", "https:"), ID, SECRET))
    assert error.code == "network_error"
    assert "cannot be reached" in str(error)
    assert endpoint.connections == 2


def test_a_tls_handshake_that_hangs_leaves_no_connection(endpoint: Endpoint) -> None:
    """The connection is closed after a timeout, and after the caller's cancellation."""
    endpoint.script(until_the_client_gives_up)
    endpoint.reads = False
    # Both attempts to connect take two fifths of it each, and the rest has to suffice on a busy machine.
    refresher = OAuth2Refresher(endpoint.url.replace("http:", "https:"), ID, SECRET, timeout=2.0)
    assert refusal(refresher).code == "network_error"

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await OAuth2Refresher(endpoint.url.replace("http:", "https:"), ID, SECRET)(record())

    asyncio.run(main())


def drip(connection: socket.socket) -> None:
    """Send an endless answer, one byte at a time, until the client closes the connection."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    connection.settimeout(0.05)
    with suppress(OSError):
        while True:
            connection.sendall(b" ")
            with suppress(TimeoutError):
                if not connection.recv(1):
                    return


def test_the_timeout_limits_the_whole_request(endpoint: Endpoint) -> None:
    """An endpoint that sends a byte from time to time cannot delay the caller beyond the timeout."""
    endpoint.script(drip)
    error = refusal(OAuth2Refresher(endpoint.url, ID, SECRET, timeout=0.3))
    assert isinstance(error, ProviderUnavailableError)
    assert error.code == "timeout"
    assert "0.3 s" in str(error)


def test_cancellation_passes_through(endpoint: Endpoint) -> None:
    """The caller gets CancelledError and not a timeout error, and the connection is closed."""
    endpoint.script(endpoint.hang)

    async def main() -> None:
        task = asyncio.create_task(OAuth2Refresher(endpoint.url, ID, SECRET, rotation="none")(record()))
        await asyncio.to_thread(endpoint.arrived.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert SECRET not in "".join(traceback.format_exception(caught.value))

    asyncio.run(main())
    assert len(endpoint.received) == 1
