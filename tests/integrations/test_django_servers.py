"""The Django app in a real project, under gunicorn and uvicorn, with a real provider."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from support.django_project import Project
from support.web_rows import BROWSER, DUE, EXPIRED, Rows, get_all
from support.web_servers import Server, serving
from tokenstore import Keyring
from tokenstore.testing.provider import StrictRotatingProvider

pytestmark = pytest.mark.sqlite
_SERVERS = {
    # The store was used before the workers are forked: see the project's wsgi.py.
    "gunicorn": ["gunicorn", "--preload", "--workers=2", "--no-control-socket", "--bind=fd://{fd}", "project.wsgi"],
    "uvicorn": ["uvicorn", "--fd={fd}", "project.asgi:application"],
}


def test_a_project_under_two_servers(tmp_path: Path, keyring: Keyring) -> None:
    """Three processes with both kinds of views refresh once, answer errors, and end without a lost token."""
    url = f"sqlite:///{tmp_path}/store.db"
    with StrictRotatingProvider() as provider, ExitStack() as stack:
        rows = Rows(url, keyring, provider)
        project = Project(tmp_path / "project", tmp_path / "store.db", provider)
        servers = {
            name: stack.enter_context(serving(command, project.folder, project.environment, tmp_path / name))
            for name, command in _SERVERS.items()
        }
        _refresh_once(provider, rows, servers)
        _answer_errors(provider, rows, servers)
        _lose_nothing_at_the_end(provider, rows, servers)


def _refresh_once(provider: StrictRotatingProvider, rows: Rows, servers: dict[str, Server]) -> None:
    rows.log_in("racing", EXPIRED)
    provider.latency = 0.4
    shown = get_all([server.url(f"{view}/racing") for server in servers.values() for view in ("plain", "awaiting")] * 3)
    provider.latency = 0.0
    assert len({answer["generation"] for answer in shown}) == 1
    assert len({answer["process"] for answer in shown}) >= 2
    assert (provider.stats().refreshes, provider.stats().reuses) == (1, 0)


def _answer_errors(provider: StrictRotatingProvider, rows: Rows, servers: dict[str, Server]) -> None:
    rows.log_in("revoked", EXPIRED)
    provider.revoke_user("revoked")
    for user in ("nobody", "revoked"):
        for server in servers.values():
            for view in ("plain", "awaiting"):
                browser = httpx.get(server.url(f"{view}/{user}"), headers=BROWSER, trust_env=False)
                assert (browser.status_code, browser.headers["Location"]) == (303, "/connect/github/")
                client = httpx.get(server.url(f"{view}/{user}"), trust_env=False)
                assert (client.status_code, client.headers["WWW-Authenticate"]) == (401, "ProviderLogin")
                assert client.json()["login_url"] == "/connect/github/"
    rows.log_in("waiting", EXPIRED)
    provider.outage = True
    for server in servers.values():
        for view in ("plain", "awaiting"):
            response = httpx.get(server.url(f"{view}/waiting"), headers=BROWSER, trust_env=False)
            assert (response.status_code, response.json()["provider"]) == (503, "github")
            assert int(response.headers["Retry-After"]) >= 1
    provider.outage = False


def _lose_nothing_at_the_end(provider: StrictRotatingProvider, rows: Rows, servers: dict[str, Server]) -> None:
    """Each view has a valid token, which the provider refreshes while the servers are told to stop."""
    requests = {
        f"{name} {view}": server.url(f"{view}/{name} {view}")
        for name, server in servers.items()
        for view in ("plain", "awaiting")
    }
    for user in requests:
        rows.log_in(user, DUE)
    provider.latency = 1.0
    get_all(list(requests.values()))
    for server in servers.values():
        server.process.terminate()
    logs = "".join(server.log_at_the_end() for server in servers.values())
    stored = {user for user in requests if rows.has_new_tokens(user)}
    assert stored == provider.stats().refreshes_by_user.keys() & requests.keys()
    # Under WSGI the event loop of an `async def` view ends with the view, mostly before the provider is called.
    assert stored >= requests.keys() - {"gunicorn awaiting"}
    assert provider.stats().reuses == 0
    assert "Traceback" not in logs
