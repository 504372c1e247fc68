"""The example for Litestar, under uvicorn and with a real provider."""

from __future__ import annotations

import os
from pathlib import Path

import httpx
import pytest

from support.django_project import KEYS
from support.paths import ROOT
from support.web_rows import BROWSER, DUE, EXPIRED, Rows, get_all
from support.web_servers import serving
from tokenstore import Keyring
from tokenstore.testing.provider import StrictRotatingProvider


@pytest.mark.sqlite
def test_the_example_refreshes_once_answers_errors_and_ends_without_a_lost_token(
    tmp_path: Path, keyring: Keyring
) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    with StrictRotatingProvider(latency=0.2) as provider:
        rows = Rows(url, keyring, provider)
        for user, expires_in in {"many": EXPIRED, "revoked": EXPIRED, "waiting": EXPIRED, "due": DUE}.items():
            rows.log_in(user, expires_in)
        environment = {
            **os.environ,
            "TOKENSTORE_URL": url,
            "TOKENSTORE_KEYS": KEYS,
            "TOKEN_URL": provider.token_url,
            "CLIENT_ID": provider.client_id,
            "CLIENT_SECRET": provider.client_secret,
        }
        command = ["uvicorn", "--fd={fd}", "litestar_app:app"]
        with serving(command, ROOT / "examples", environment, tmp_path / "log") as server:
            assert len({answer["generation"] for answer in get_all([server.url("repositories/many")] * 8)}) == 1
            assert provider.stats().refreshes == 1

            provider.revoke_user("revoked")
            browser = httpx.get(server.url("repositories/revoked"), headers=BROWSER, trust_env=False)
            assert (browser.status_code, browser.headers["Location"]) == (303, "/login")
            client = httpx.get(server.url("repositories/nobody"), trust_env=False)
            assert (client.status_code, client.json()["error"]) == (401, "tokens_missing")

            provider.outage = True
            response = httpx.get(server.url("repositories/waiting"), trust_env=False)
            assert (response.status_code, int(response.headers["Retry-After"]) >= 1) == (503, True)
            provider.outage = False

            provider.latency = 1.0
            get_all([server.url("repositories/due")])
            server.process.terminate()
            assert "Traceback" not in server.log_at_the_end()
        assert rows.has_new_tokens("due")
        assert provider.stats().reuses == 0
