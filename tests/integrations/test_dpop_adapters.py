"""DPoP (RFC 9449) in each HTTP client, over HTTP against an API that checks every proof."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import httpx2
import pytest

from support.frame_walk import Walk
from support.http_callers import CALLERS
from support.http_world import World, key_of, world_of
from support.oauth2_calls import ID, SECRET
from support.proofs import claims_of
from tokenstore import ConfigurationError, Keyring, ReauthorizationRequiredError
from tokenstore.integrations.dpop import DPoP
from tokenstore.testing.provider import StrictRotatingProvider


@pytest.fixture
def world(request: pytest.FixtureRequest, keyring: Keyring, tmp_path: Path) -> Iterator[World]:
    """A world whose users have logged in with a key."""
    with (
        StrictRotatingProvider(client_id=ID, client_secret=SECRET) as provider,
        world_of(request.param, provider, keyring, tmp_path, DPoP()) as world,
    ):
        yield world


every_client = pytest.mark.parametrize("world", CALLERS, indirect=True)
each_stream = pytest.mark.parametrize(
    ("world", "body"),
    [(client, body) for client, caller in CALLERS.items() for body in caller.streams],
    indirect=["world"],
)


def _proofs(world: World) -> list[dict[str, Any]]:
    """The claims of all proofs that the API received."""
    return [claims_of(request.proof) for request in world.api.received if request.proof]


@every_client
def test_each_request_has_the_token_and_a_proof_of_its_own(world: World) -> None:
    """The URL of a proof has no query."""
    assert [world.send(path, user=user).user for path, user in (("/who?a=1", "alice"), ("/who", "bob"))]
    assert world.send(body="json").user == "alice"
    assert [token.partition(" ")[0] for token in world.api.tokens() if token] == ["DPoP"] * 3
    proofs = _proofs(world)
    assert [(proof["htm"], proof["htu"]) for proof in proofs] == [
        (method, f"{world.api.origin}/who") for method in ("GET", "GET", "POST")
    ]
    assert len({proof["jti"] for proof in proofs}) == 3


@every_client
@pytest.mark.parametrize("body", [None, "bytes", "json"])
def test_the_api_s_nonce_is_used_without_a_refresh(world: World, body: str | None) -> None:
    """The first request is sent again with the nonce; the next one has it from the beginning."""
    world.provider.demands_nonces = True
    assert world.send(body=body).user == "alice"
    assert ["nonce" in proof for proof in _proofs(world)] == [False, True]
    assert world.send(user="bob", body=body).user == "bob"
    assert len(world.api.received) == 3
    first, second, _ = world.api.received
    assert first.body == second.body
    assert world.provider.stats().requests == 0


@every_client
def test_a_nonce_that_changes_while_a_request_is_under_way_is_replaced(world: World) -> None:
    world.provider.demands_nonces = True
    assert world.send().user == "alice"
    renewed = threading.Event()

    def renew_once() -> None:
        if not renewed.is_set():
            renewed.set()
            world.provider.renew_nonces()

    world.api.gate = renew_once
    assert world.send().user == "alice"
    assert len(world.api.received) == 4


@every_client
def test_an_api_that_never_accepts_a_nonce_gets_two_requests(world: World) -> None:
    challenge = {"WWW-Authenticate": 'DPoP error="use_dpop_nonce"', "DPoP-Nonce": "n1"}
    world.api.answers["/never"] = 401, challenge, b"no"
    assert (world.send("/never").status, len(world.api.received)) == (401, 2)
    world.api.answers["/none"] = 401, {**challenge, "DPoP-Nonce": 'no "nonce"'}, b"no"
    assert (world.send("/none").status, len(world.api.received)) == (401, 3)
    world.api.answers["/refused"] = 401, {"WWW-Authenticate": 'DPoP error="invalid_dpop_proof"'}, b"no"
    assert (world.send("/refused").status, len(world.api.received)) == (401, 4)
    assert world.provider.stats().requests == 0


@each_stream
def test_a_body_that_cannot_be_rewound_is_not_sent_again_for_a_nonce(world: World, body: str) -> None:
    """The 401 is returned, and the next request has the nonce."""
    world.provider.demands_nonces = True
    assert world.send(body=body).status == 401
    assert len(world.api.received) == 1
    assert world.send(body=body).user == "alice"
    assert len(world.api.received) == 2


@every_client
def test_callers_with_a_refused_token_cause_one_refresh(world: World) -> None:
    """All requests arrive before the first one is answered; the API and the token endpoint demand nonces."""
    world.provider.demands_nonces = True
    assert world.send().user == "alice"
    world.refuse_access_token()
    arrived, passed = threading.Barrier(8), threading.Event()

    def gate() -> None:
        if not passed.is_set():
            arrived.wait(20)
            passed.set()

    world.api.gate = gate
    replies = world.caller.at_once(*[world.call()] * 8)
    assert [getattr(reply, "user", reply) for reply in replies] == ["alice"] * 8
    assert world.provider.stats().refreshes == 1
    assert world.provider.stats().requests == 2  # the first one was refused for its nonce
    jtis = [proof["jti"] for proof in _proofs(world)]
    assert len(jtis) == len(set(jtis)) == 2 + 16


@every_client
@pytest.mark.parametrize("status", [303, 307])
def test_a_redirected_request_gets_a_proof_of_its_own(world: World, status: int) -> None:
    """No proof is sent twice. The first request is not sent again."""
    world.provider.demands_nonces = True
    assert world.send(f"/redirect/{status}?to={quote('/who')}", body="json").user == "alice"
    paths = [request.path.partition("?")[0] for request in world.api.received]
    assert paths[0] == f"/redirect/{status}"
    assert set(paths[1:]) == {"/who"}
    proofs = _proofs(world)
    assert [proof["htu"].removeprefix(world.api.origin) for proof in proofs] == [paths[0], "/who", "/who"]
    assert [proof["htm"] for proof in proofs][1:] == ["GET" if status == 303 else "POST"] * 2
    assert len({proof["jti"] for proof in proofs}) == 3
    assert world.provider.stats().requests == 0


@every_client
def test_a_redirect_to_another_origin_carries_neither_token_nor_proof(world: World) -> None:
    world.other.answers["/file"] = 200, {}, b"the file"
    assert world.send(f"/redirect/307?to={quote(f'{world.other.origin}/file')}").body == b"the file"
    [request] = world.other.received
    assert (request.token, request.proof) == (None, None)


@pytest.mark.parametrize("world", ["httpx", "httpx2", "httpx sync", "httpx2 sync"], indirect=True)
def test_the_caller_s_own_trace_is_called(world: World) -> None:
    """The extension ``trace``, with which the proof is removed from a request that was sent."""
    asked = world.call()
    events: list[str] = []

    async def async_trace(event: str, info: object) -> None:
        events.append(event)

    is_async = isinstance(world.caller.client, httpx.AsyncClient | httpx2.AsyncClient)
    trace = async_trace if is_async else lambda event, _: events.append(event)
    sent = world.caller.client.get(asked.url, auth=world.caller.auth(asked), extensions={"trace": trace})
    response = world.caller.on_store(lambda _: sent) if is_async else sent
    assert response.status_code == 200
    assert "http11.send_request_headers.complete" in events
    assert "DPoP" not in response.request.headers


@every_client
def test_a_bound_token_is_never_sent_as_a_bearer_token(world: World) -> None:
    with pytest.raises(ConfigurationError, match=r"bound to a DPoP key.*pass dpop=DPoP\(\)") as caught:
        world.send(options={})
    assert not world.api.received
    Walk(world.secrets).through(caught.value, "no key")


@every_client
def test_a_token_that_is_not_bound_is_refused_unless_bearer_tokens_are_allowed(world: World) -> None:
    """The provider answers a refresh with a token of the type Bearer. The new tokens are stored all the same."""
    world.provider.binds_access_tokens = False
    world.refuse_access_token()
    with pytest.raises(ConfigurationError, match=r"has not bound.*allow_bearer=True") as caught:
        world.send()
    record = world.record()
    assert record["extra"]["token_type"] == "Bearer"
    Walk([record["access_token"], record["refresh_token"]]).through(caught.value, "not bound")
    assert world.send(options={"dpop": DPoP(allow_bearer=True)}).user == "alice"
    assert world.api.tokens()[-1] == f"Bearer {record['access_token']}"
    assert world.api.received[-1].proof is None


@every_client
def test_a_key_that_another_process_has_replaced_is_read_again(world: World) -> None:
    """After a logout there, the user has logged in with a new key."""
    assert world.dpop is not None
    assert world.send().user == "alice"  # this process has the key in memory
    elsewhere = DPoP()
    world.caller.on_store(
        lambda store: (
            store.run(lambda aio: elsewhere.delete_key(aio, "github", "alice"))
            if hasattr(store, "run")
            else elsewhere.delete_key(store, "github", "alice")
        )
    )
    tokens = world.provider.new_grant("alice", dpop_jkt=key_of(world.caller, elsewhere).thumbprint)
    world.caller.on_store(lambda store: store.store_token_response("github", "alice", tokens))
    assert world.send().user == "alice"


@every_client
def test_no_error_and_no_repr_shows_a_key_a_proof_or_a_token(world: World) -> None:
    """Neither do the local variables of tokenstore's frames in the traceback."""
    assert world.dpop is not None
    key = key_of(world.caller, world.dpop)
    walk = Walk([*world.secrets, key.to_jwk()["d"], SECRET])
    auth = world.caller.auth(world.call())
    assert world.send().user == "alice"
    walk.look_for(*[request.proof for request in world.api.received if request.proof])
    world.revoke_grant()
    with pytest.raises(ReauthorizationRequiredError) as dead:
        world.send()
    walk.look_for(*[request.proof for request in world.api.received if request.proof])
    walk.through(dead.value, "a revoked grant after a 401")
    for shown in (auth, vars(auth), world.dpop, vars(world.dpop), key, vars(key)):
        assert not any(secret in repr(shown) for secret in (*world.secrets, key.to_jwk()["d"]))
