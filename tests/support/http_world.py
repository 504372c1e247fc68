"""A provider, two APIs of different origins, and a caller with a store in which users have logged in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from support.api_servers import Api, serving
from support.http_callers import CALLERS, Call, Caller, Reply
from support.oauth2_calls import ID, SECRET
from tokenstore import AuthTokenStore, Keyring
from tokenstore.integrations.dpop import DPoP, DPoPKey
from tokenstore.integrations.oauth2 import OAuth2Refresher
from tokenstore.testing.provider import StrictRotatingProvider

__all__ = ["World", "key_of", "world_of"]


@dataclass
class World:
    """What a test needs.

    Attributes:
        provider: Issues the tokens of the users alice and bob.
        api: The API whose origin gets the tokens.
        other: The API of another origin.
        caller: The client and its store.
        secrets: All tokens that were issued at login.
        dpop: With which the users have logged in, and requests are sent; None: with Bearer tokens.
    """

    provider: StrictRotatingProvider
    api: Api
    other: Api
    caller: Caller
    secrets: list[str]
    dpop: DPoP | None = None

    def call(self, path: str = "/who", **fields: Any) -> Call:
        """A request to the API, whose origin alone gets the token."""
        options = {} if self.dpop is None else {"dpop": self.dpop}
        return Call(self.api.origin + path, **{"origins": [self.api.origin], "options": options, **fields})

    def send(self, path: str = "/who", **fields: Any) -> Reply:
        return self.caller.send(self.call(path, **fields))

    def record(self, user: str = "alice") -> Any:
        return self.caller.on_store(lambda store: store.load_tokens("github", user))

    def refuse_access_token(self, user: str = "alice") -> None:
        """Revoke the user's access token, which the store takes for valid."""
        self._revoke(self.record(user)["access_token"])

    def revoke_grant(self, user: str = "alice") -> None:
        self._revoke(self.record(user)["refresh_token"])

    def _revoke(self, token: str) -> None:
        response = httpx.post(
            f"{self.provider.base_url}/revoke",
            data={"token": token, "client_id": ID, "client_secret": SECRET},
            trust_env=False,
        )
        assert response.status_code == 200


@contextmanager
def world_of(
    client: str, provider: StrictRotatingProvider, keyring: Keyring, folder: Path, dpop: DPoP | None = None
) -> Iterator[World]:
    """Make a world with one of the clients of :data:`support.http_callers.CALLERS`."""
    with ExitStack() as stack:
        api, other = stack.enter_context(serving(provider)), stack.enter_context(serving(provider))
        caller = CALLERS[client](folder)
        refresher = OAuth2Refresher(provider.token_url, ID, SECRET, dpop=dpop)
        caller.open(keyring=keyring, refreshers={"github": refresher}, force_min_age=0)
        stack.callback(caller.close)
        secrets: list[str] = []
        for user in ("alice", "bob"):
            jkt = None if dpop is None else key_of(caller, dpop, user).thumbprint
            tokens = provider.new_grant(user, dpop_jkt=jkt)
            secrets += [tokens["access_token"], tokens["refresh_token"]]
            caller.on_store(partial(_log_in, user, tokens))
        yield World(provider, api, other, caller, secrets, dpop)


def key_of(caller: Caller, dpop: DPoP, user: str = "alice") -> DPoPKey:
    """The key of a user, from the store."""

    def load(store: Any) -> Any:
        if isinstance(store, AuthTokenStore):
            return dpop.key(store, "github", user)
        return store.run(lambda aio: dpop.key(aio, "github", user))

    key: DPoPKey = caller.on_store(load)
    return key


def _log_in(user: str, tokens: dict[str, Any], store: Any) -> Any:
    return store.store_token_response("github", user, tokens)
