"""Runs commands in this process or in a new one, with tokens that no output may contain."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeVar

from typer.testing import CliRunner

from tokenstore import Keyring, TokenRecord, generate_key, open_store
from tokenstore.cli.app import app
from tokenstore.keyring import KEYS_VARIABLE
from tokenstore.store import AuthTokenStore

T = TypeVar("T")
KEYS = generate_key("k1")
ACCESS, REFRESH, NESTED = "AT-5f0c-secret", "RT-91be-secret", "ID-77aa-secret"
SECRETS = (ACCESS, REFRESH, NESTED)
RESPONSE = {
    "access_token": ACCESS,
    "refresh_token": REFRESH,
    "expires_in": 3600,
    "refresh_token_expires_in": 7200,
    "token_type": "Bearer",
    "id_token": NESTED,
}
PASSWORD = "hunter2-hidden"  # text that no message contains by chance
COMMANDS = ("keygen", "init", "put", "show", "list", "delete", "refresh-due", "demo")


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Standard output as JSON, one object in each line."""
        return [json.loads(line) for line in self.out.splitlines()]


def cli(*arguments: str, url: str | None = None, keys: str | None = KEYS, stdin: str | bytes = "", **env: str) -> Done:
    """Run a command in this process."""
    variables = {"TOKENSTORE_URL": url, KEYS_VARIABLE: keys, **env}
    result = CliRunner().invoke(app, arguments, input=stdin, env=variables)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Done(result.exit_code, result.stdout, result.stderr)


def environment(url: str | None, keys: str | None) -> dict[str, str]:
    variables = {"TOKENSTORE_URL": url, KEYS_VARIABLE: keys}
    # With PYTHONUNBUFFERED, Python does not notice that a closed pipe cut a write short.
    kept = {name: value for name, value in os.environ.items() if name not in {*variables, "PYTHONUNBUFFERED"}}
    return kept | {name: value for name, value in variables.items() if value is not None}


def process(*arguments: str, url: str | None = None, keys: str | None = KEYS, stdin: str = "") -> Done:
    """Run a command in a new process."""
    done = subprocess.run(
        [sys.executable, "-m", "tokenstore", *arguments],
        env=environment(url, keys),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def on_store(url: str, use: Callable[[AuthTokenStore], Awaitable[T]], keys: str = KEYS) -> T:
    async def run() -> T:
        async with open_store(url, keyring=Keyring.from_string(keys)) as store:
            return await use(store)

    return asyncio.run(run())


def load(url: str, provider: str = "github", user: str = "u1") -> TokenRecord | None:
    return on_store(url, lambda store: store.load_tokens(provider, user))


def shows_no_secret(*done: Done) -> None:
    for text in (part for one in done for part in (one.out, one.err)):
        assert not [secret for secret in SECRETS if secret in text], text
