"""The token goes to the named origins alone, in each HTTP client, and no redirect takes it elsewhere."""

from __future__ import annotations

from urllib.parse import quote

import pytest

from support.http_callers import CALLERS
from support.http_world import World

every_client = pytest.mark.parametrize("world", CALLERS, indirect=True)


@every_client
def test_a_request_has_the_token_of_its_user(world: World) -> None:
    assert world.send().user == "alice"
    assert world.send(user="bob").user == "bob"


@every_client
@pytest.mark.parametrize("status", [302, 307])
def test_a_redirect_to_another_port_does_not_carry_the_token(world: World, status: int) -> None:
    """The other API is on the same host."""
    world.other.answers["/file"] = 200, {}, b"the file"
    reply = world.send(f"/redirect/{status}?to={quote(f'{world.other.origin}/file')}")
    assert reply.body == b"the file"
    assert world.other.tokens("/file") == [None]
    assert world.api.tokens() == [f"Bearer {world.secrets[0]}"]


@every_client
def test_a_redirect_to_another_host_does_not_carry_the_token(world: World) -> None:
    """The same server, under another name."""
    elsewhere = world.api.origin.replace("127.0.0.1", "localhost")
    assert world.send(f"/redirect/302?to={quote(f'{elsewhere}/who')}").status == 401
    assert world.api.tokens("/who") == [None]


@every_client
def test_a_redirect_within_the_origin_keeps_the_token(world: World) -> None:
    assert world.send(f"/redirect/302?to={quote('/who')}").user == "alice"
    assert world.api.tokens("/who") == [f"Bearer {world.secrets[0]}"]


@every_client
def test_a_redirect_back_from_another_origin_gives_that_origin_no_token(world: World) -> None:
    back = f"{world.other.origin}/redirect/302?to={quote(f'{world.api.origin}/who', safe='')}"
    world.send(f"/redirect/302?to={quote(back, safe='')}")
    assert world.other.tokens() == [None]
    assert len(world.api.tokens("/who")) == 1


@every_client
def test_a_request_to_another_origin_is_sent_without_the_token(world: World) -> None:
    """No refresh follows its 401: it is not about the token."""
    call = world.call()
    replies = world.caller.at_once(*[type(call)(f"{world.other.origin}/who", origins=call.origins)] * 2)
    assert [getattr(reply, "status", reply) for reply in replies] == [401, 401]
    assert world.other.tokens() == [None, None]
    assert world.provider.stats().requests == 0


@every_client
def test_a_401_after_a_redirect_to_another_origin_causes_no_refresh(world: World) -> None:
    reply = world.send(f"/redirect/302?to={quote(f'{world.other.origin}/who')}")
    assert reply.status == 401
    assert world.other.tokens() == [None]
    assert world.provider.stats().requests == 0


@every_client
def test_after_a_refresh_a_redirect_to_another_origin_does_not_carry_the_new_token(world: World) -> None:
    """The first answer is a 401; the answer to the second request is a redirect."""
    world.other.answers["/file"] = 200, {}, b"the file"
    answers = iter([(401, {}, b""), (302, {"Location": f"{world.other.origin}/file"}, b"")])
    fixed = world.api.answer
    world.api.answer = lambda request: next(answers) if request.path == "/first" else fixed(request)  # type: ignore[method-assign]
    assert world.send("/first").body == b"the file"
    assert world.api.tokens("/first") == [f"Bearer {world.secrets[0]}", f"Bearer {world.record()['access_token']}"]
    assert world.other.tokens() == [None]


@every_client
def test_two_users_at_once_through_one_client_get_their_own_tokens(world: World) -> None:
    calls = [world.call(user=user) for user in ("alice", "bob") * 8]
    assert [getattr(reply, "user", reply) for reply in world.caller.at_once(*calls)] == ["alice", "bob"] * 8


@every_client
def test_two_users_at_once_whose_tokens_are_refused_are_refreshed_once_each(world: World) -> None:
    for user in ("alice", "bob"):
        world.refuse_access_token(user)
    calls = [world.call(user=user) for user in ("alice", "bob") * 8]
    assert [getattr(reply, "user", reply) for reply in world.caller.at_once(*calls)] == ["alice", "bob"] * 8
    assert world.provider.stats().refreshes_by_user == {"alice": 1, "bob": 1}
