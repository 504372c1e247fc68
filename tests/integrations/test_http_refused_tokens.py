"""After a 401, each HTTP client has the token refreshed once, and sends a request again only if its body is whole."""

from __future__ import annotations

import threading
from urllib.parse import quote

import pytest

from support.api_servers import ApiAnswer
from support.http_callers import BODY, CALLERS, Caller
from support.http_world import World
from tokenstore import ProviderUnavailableError, ReauthorizationRequiredError

every_client = pytest.mark.parametrize("world", CALLERS, indirect=True)
NEW_TOKENS_DO_NOT_HELP: list[ApiAnswer] = [
    (403, {"WWW-Authenticate": 'Bearer error="insufficient_scope", scope="admin"'}, b""),
    (401, {"WWW-Authenticate": 'Bearer realm="x", error="insufficient_scope"'}, b""),
    (401, {"WWW-Authenticate": 'Basic realm="error=invalid_token", Bearer error=invalid_request'}, b""),
    (407, {}, b""),
]


def each_body(kind: str) -> pytest.MarkDecorator:
    """Parametrize with each client and each kind of body that it takes."""
    pairs = [(client, body) for client, caller in CALLERS.items() for body in getattr(caller, kind)]
    return pytest.mark.parametrize(("world", "body"), pairs, indirect=["world"])


@every_client
def test_a_refused_token_is_refreshed_and_the_request_sent_again(world: World) -> None:
    world.refuse_access_token()
    assert world.send().user == "alice"
    assert world.api.tokens() == [f"Bearer {world.secrets[0]}", f"Bearer {world.record()['access_token']}"]
    assert world.provider.stats().refreshes == 1


@every_client
def test_sixteen_callers_with_the_same_refused_token_cause_one_refresh(world: World) -> None:
    """All sixteen requests arrive before the first one is answered."""
    world.refuse_access_token()
    arrived = threading.Barrier(16)
    passed = threading.Event()

    def gate() -> None:
        if not passed.is_set():
            arrived.wait(20)
            passed.set()

    world.api.gate = gate
    replies = world.caller.at_once(*[world.call()] * 16)
    assert [getattr(reply, "user", reply) for reply in replies] == ["alice"] * 16
    assert len(world.api.received) == 32
    assert world.provider.stats().refreshes == 1
    assert world.provider.stats().requests == 1


@each_body("bodies")
def test_a_body_that_can_be_rewound_is_sent_again_whole(world: World, body: str) -> None:
    world.refuse_access_token()
    assert world.send(body=body).user == "alice"
    first, second = (request.body for request in world.api.received)
    assert first == second
    assert len(first) >= 1000
    if body in ("bytes", "file"):
        assert first == BODY


@each_body("streams")
def test_a_body_that_cannot_be_rewound_is_not_sent_again(world: World, body: str) -> None:
    """The 401 is returned. The token is refreshed nevertheless, and the next request succeeds."""
    world.refuse_access_token()
    reply = world.send(body=body)
    assert reply.status == 401
    assert b"invalid_token" in reply.body
    [request] = world.api.received
    assert BODY in request.body
    assert world.provider.stats().refreshes == 1
    assert world.send(body=body).user == "alice"


@every_client
@pytest.mark.parametrize("answer", NEW_TOKENS_DO_NOT_HELP)
def test_an_answer_that_new_tokens_would_not_change_causes_no_refresh(world: World, answer: ApiAnswer) -> None:
    world.api.answers["/other"] = answer
    assert world.send("/other").status == answer[0]
    assert len(world.api.received) == 1
    assert world.provider.stats().requests == 0


@every_client
@pytest.mark.parametrize("challenge", [{}, {"WWW-Authenticate": 'Bearer error_description="x", error="invalid_token"'}])
def test_a_second_401_is_returned(world: World, challenge: dict[str, str]) -> None:
    """The request is sent twice, and no more often. So is one without a challenge, as some APIs send none."""
    world.api.answers["/never"] = 401, challenge, b"no"
    reply = world.send("/never")
    assert (reply.status, reply.body) == (401, b"no")
    assert len(world.api.received) == 2
    assert world.provider.stats().refreshes == 1


@every_client
def test_a_refused_token_of_this_moment_is_not_refreshed_again(world: World) -> None:
    """The store's ``force_min_age``: an API that answers 401 to every token does not cause a refresh each time."""
    store = world.caller.store
    getattr(store, "aio", store)._force_min_age = 10.0
    world.api.answers["/never"] = 401, {}, b"no"
    for _ in range(3):
        assert world.send("/never").status == 401
    assert len(world.api.received) == 3
    assert world.provider.stats().requests == 0


@every_client
def test_a_post_that_was_redirected_to_a_refused_get_is_not_sent_twice(world: World) -> None:
    """The redirected request is sent again; the first one has done its work."""
    world.refuse_access_token()
    assert world.send(f"/redirect/303?to={quote('/who')}", body="json").user == "alice"
    assert [request.method for request in world.api.received] == ["POST", "GET", "GET"]


@every_client
def test_a_revoked_grant_raises_the_store_s_error(world: World) -> None:
    """It says that the user has to log in again, also to the next caller, without a call of the provider."""
    world.revoke_grant()
    for _ in range(2):
        with pytest.raises(ReauthorizationRequiredError, match="log in again"):
            world.send()
    assert world.provider.stats().requests == 1
    assert world.send(user="bob").user == "bob"


@every_client
def test_a_provider_outage_raises_the_store_s_error(world: World) -> None:
    world.refuse_access_token()
    world.provider.fail_next(503, times=5)
    with pytest.raises(ProviderUnavailableError):
        world.send()


@every_client
def test_after_an_error_of_the_store_the_client_works(world: World) -> None:
    """The connection of the 401 is given back or closed: no response is left open."""
    caller: Caller = world.caller
    world.revoke_grant()
    errors = caller.at_once(*[world.call()] * 20)
    assert {type(error) for error in errors} == {ReauthorizationRequiredError}
    assert [world.send(user="bob").user for _ in range(20)] == ["bob"] * 20
