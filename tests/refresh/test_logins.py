"""`store_token_response`: the token response of a login, as the provider sent it, stored in one call."""

from __future__ import annotations

import asyncio
import base64
import json
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest

from support.refresh_world import World, on_every_row, on_memory
from support.refreshers import NEW, OLD, Script, pair
from support.store_calls import fresh
from tokenstore import (
    AuthTokenStore,
    InvalidInputError,
    Keyring,
    LockTimeoutError,
    ProviderRefusedError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    UnknownKeyError,
)
from tokenstore.records import TokenKey

ME = ("github", "u1")
AT = {"access_token": "at-2"}

# -- the responses of vendors ------------------------------------------------------------------------

# Each as its vendor documents it, with shorter tokens: the response, then the lifetimes of the access token and of the
# refresh token in seconds, None where the response tells none.
RESPONSES: dict[str, tuple[dict[str, Any], float | None, float | None]] = {
    "Google": (
        {
            "access_token": "1/fFAGRNJru1FTz70BzhT3Zg",
            "expires_in": 3920,
            "token_type": "Bearer",
            "scope": "https://www.googleapis.com/auth/drive.metadata.readonly",
            "refresh_token": "1//xEoDL4iW3cxlI7yDbSRFYNG01kVKM2C-259HOF2aQbI",
        },
        3920,
        None,
    ),
    "Google, access for a limited time": (
        {
            "access_token": "1/fFAGRNJru1FTz70BzhT3Zg",
            "expires_in": 3920,
            "refresh_token": "1//xEoDL4iW3cxlI7yDbSRFYNG01kVKM2C-259HOF2aQbI",
            "refresh_token_expires_in": 604799,
        },
        3920,
        604799,
    ),
    "GitHub": (
        {
            "access_token": "ghu_16C7e42F292c6912E7710c838347Ae178B4a",
            "expires_in": 28800,
            "refresh_token": "ghr_1B4a2e77838347a7E420ce178F2E7c6912E169246c34E1ccbF66C46812d16D5B1A9Dc86A1498",
            "refresh_token_expires_in": 15897600,
            "scope": "",
            "token_type": "bearer",
        },
        28800,
        15897600,
    ),
    "GitHub, an OAuth app": (
        {"access_token": "gho_16C7e42F2", "scope": "repo,gist", "token_type": "bearer"},
        None,
        None,
    ),
    "GitLab": (
        {
            "access_token": "de6780bc506a0446309bd9362820ba8aed28aa506c71eedbe1c5c4f9dd350e54",
            "token_type": "bearer",
            "expires_in": 7200,
            "refresh_token": "8257e65c97202ed1726cf9571600918f3bffb2544b26e00a61df9897668c33a1",
            "created_at": 1607635748,
        },
        7200,
        None,
    ),
    "Slack, a user's tokens": (
        {
            "ok": True,
            "app_id": "A0KRD7HC3",
            "authed_user": {
                "id": "U1234",
                "scope": "chat:write",
                "access_token": "xoxe.xoxp-1234",
                "refresh_token": "xoxe-1-1234",
                "expires_in": 43200,
                "token_type": "user",
            },
            "team": {"name": "Slack Softball Team", "id": "T9TK3CUKW"},
            "enterprise": None,
            "is_enterprise_install": False,
        },
        43200,
        None,
    ),
    "Slack, a bot's tokens": (
        {
            "ok": True,
            "access_token": "xoxe.xoxb-1234",
            "token_type": "bot",
            "scope": "commands,incoming-webhook",
            "bot_user_id": "U0KRQLJ9H",
            "expires_in": 43200,
            "refresh_token": "xoxe-1-abcd",
            "authed_user": {"id": "U1234"},
        },
        43200,
        None,
    ),
    "Salesforce": (
        {
            "access_token": "00DB0000000TfcR!AQQAQFhoK8vTMg_rKA",
            "refresh_token": "5Aep8615VRsj2pV1Ax",
            "signature": "d/SxeYBxH0GSVko0HMgcUxuZy0PA2cDDz1u7g7JtDHw=",
            "scope": "refresh_token api",
            "instance_url": "https://mycompany.my.salesforce.com",
            "id": "https://login.salesforce.com/id/00DB0000000TfcRMAS/005B0000005Bk90IAC",
            "token_type": "Bearer",
            "issued_at": "1558553873237",
        },
        None,
        None,
    ),
    "Zendesk": (
        {
            "access_token": "gErypPlm4dOVgGRvA1ZzMH5MQ3nLo8bo",
            "refresh_token": "31048ba4d7c601302f3173f243da835f",
            "token_type": "bearer",
            "scope": "read",
            "expires_in": 172800,
            "refresh_token_expires_in": 7776000,
        },
        172800,
        7776000,
    ),
    "Zendesk, an older client": (
        {"access_token": "gErypPlm", "token_type": "bearer", "scope": "read", "expires_in": None},
        None,
        None,
    ),
    "Keycloak, an offline token": (
        {
            "access_token": "eyJhbGci.at",
            "expires_in": 300,
            "refresh_expires_in": 0,
            "refresh_token": "eyJhbGci.rt",
            "token_type": "Bearer",
            "not-before-policy": 0,
            "session_state": "db0815aa-3ac9-429c-9f59-f789bbe1953b",
            "scope": "openid offline_access",
        },
        300,
        None,
    ),
    "Intuit": (
        {
            "token_type": "bearer",
            "expires_in": 3600,
            "refresh_token": "AB11730384727",
            "x_refresh_token_expires_in": 8726400,
            "access_token": "eyJlbmMiOiJBMTI4Q0JDLUhTMjU2IiwiYWxnIjoiZGlyIn0",
        },
        3600,
        8726400,
    ),
    "Atlassian": (
        {"access_token": "eyJ.at", "refresh_token": "eyJ.rt", "expires_in": 3600, "scope": "read:jira-work"},
        3600,
        None,
    ),
    "Microsoft": (
        {
            "token_type": "Bearer",
            "scope": "Mail.Read User.Read",
            "expires_in": 3736,
            "ext_expires_in": 3736,
            "access_token": "eyJ0eXAiOiJKV1QiLCJhbGci",
            "refresh_token": "AwABAAAAvPM1KaPlrEqdFSBz",
        },
        3736,
        None,
    ),
    "Microsoft, version 1": (
        {
            "access_token": "eyJ0eXAiOiJKV1QiLCJhbGci",
            "token_type": "Bearer",
            "expires_in": "3599",
            "expires_on": "1388444763",
            "resource": "https://service.contoso.com/",
            "refresh_token": "AwABAAAAvPM1KaPlrEqdFSBz",
        },
        3599,
        None,
    ),
    "HubSpot": (
        {
            "token_type": "bearer",
            "refresh_token": "1e8fbfb1-8e96-4826-8b8d-c8af73715",
            "access_token": "CIrToaiiMhIHAAEAQAAAARiO1ooBIOP0sgEok",
            "hub_id": 146425426,
            "scopes": ["oauth", "crm.objects.contacts.read"],
            "user_id": 123,
            "expires_in": 1800,
        },
        1800,
        None,
    ),
    "Zoom": (
        {
            "access_token": "eyJhbGciOiJIUzUxMiJ9",
            "token_type": "bearer",
            "refresh_token": "eyJhbGciOiJIUzUxMiJ8",
            "expires_in": 3599,
            "scope": "user:read:user",
            "api_url": "https://api.zoom.us",
        },
        3599,
        None,
    ),
}


@pytest.mark.parametrize("vendor", RESPONSES)
@on_memory
async def test_the_response_of_a_vendor(world: World, vendor: str) -> None:
    """Both expiries are right by the database's clock, which is an hour ahead of this machine's here."""
    response, lifetime, refresh_lifetime = RESPONSES[vendor]
    world.ahead += 3600
    store = await world.store()
    before = world.at(0)
    record = await store.store_token_response("vendor", "u1", response)
    after = world.at(0)
    assert record == await store.load_tokens("vendor", "u1")
    tokens = response.get("authed_user", response) if "access_token" not in response else response
    assert (record["access_token"], record["refresh_token"]) == (tokens["access_token"], tokens.get("refresh_token"))
    expiries = record["access_token_expires_at"], record["refresh_token_expires_at"]
    for moment, seconds in zip(expiries, (lifetime, refresh_lifetime), strict=True):
        if seconds is None:
            assert moment is None
        else:
            assert moment is not None
            assert before - timedelta(milliseconds=1) <= moment - timedelta(seconds=seconds) <= after
    assert record["access_token_expiry_known"] is (lifetime is not None)
    assert record["extra"].get("expires_in") == lifetime
    assert "refresh_token" not in record["extra"]
    for name in ("scope", "instance_url", "team", "created_at", "hub_id", "api_url", "session_state", "resource"):
        assert record["extra"].get(name) == tokens.get(name, response.get(name))
    assert json.dumps(record["extra"])


@on_every_row
async def test_a_response_is_stored_by_the_databases_clock(world: World) -> None:
    """Of a new row and of one that exists, the lifetime begins with the write."""
    store = await world.store()
    for expires_in in (600, 6000):
        record = await store.store_token_response(*ME, {**NEW, "expires_in": expires_in}, account="work")
        assert record["account"] == "work"
        expires_at = record["access_token_expires_at"]
        assert expires_at is not None
        assert abs((expires_at - record["updated_at"]).total_seconds() - expires_in) < 5
        assert (record["access_token"], record["refresh_token"]) == (NEW["access_token"], NEW["refresh_token"])
    assert await store.load_tokens(*ME) is None


# -- what a second login keeps -----------------------------------------------------------------------


@on_every_row
async def test_a_login_without_a_refresh_token_keeps_the_stored_one(world: World) -> None:
    """Google, for one, issues a refresh token at the first login alone. Everything else is the new response's."""
    store = await world.store()
    first = await store.store_token_response(
        *ME, {"access_token": "at-1", "refresh_token": "rt-1", "refresh_token_expires_in": 7200, "scope": "a", "x": 1}
    )
    second = await store.store_token_response(*ME, {"access_token": "at-2", "expires_in": 60, "scope": "a b"})
    assert (second["access_token"], second["refresh_token"]) == ("at-2", "rt-1")
    assert second["refresh_token_expires_at"] == first["refresh_token_expires_at"]
    assert second["extra"] == {"scope": "a b", "expires_in": 60}
    assert second["generation"] == first["generation"] + 1
    third = await store.store_token_response(*ME, {"access_token": "at-3"}, keep_refresh_token=False)
    assert (third["access_token"], third["refresh_token"]) == ("at-3", None)
    assert third["refresh_token_expires_at"] is None


def id_token(sub: object) -> str:
    """An ID token, unsigned."""
    parts: tuple[dict[str, object], ...] = ({"alg": "none"}, {"sub": sub, "aud": "me"}, {})
    return ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts)


ACCOUNTS: list[tuple[dict[str, Any], dict[str, Any], bool]] = [
    ({"sub": "1"}, {"sub": "1"}, True),
    ({"sub": "1"}, {"sub": "2"}, False),
    ({"id": 1}, {"id": 1}, True),
    ({"id": 1}, {"id": 2}, False),
    ({"id": 1}, {"id": "1"}, True),
    ({"sub": "1"}, {"id": "2"}, True),
    ({"sub": "1"}, {}, True),
    ({}, {"sub": "2"}, True),
    ({"sub": "1", "id": "a"}, {"sub": "1", "id": "b"}, False),
    ({"id_token": id_token("1")}, {"id_token": id_token("1")}, True),
    ({"id_token": id_token("1")}, {"id_token": id_token("2")}, False),
    ({"id_token": id_token("1")}, {"sub": "2"}, False),
    ({"id_token": "no.id.token"}, {"id_token": id_token("2")}, True),
    ({"id_token": id_token({"x": 1})}, {"id_token": "é.é.é"}, True),
]


@pytest.mark.parametrize(("before", "now", "same"), ACCOUNTS)
@on_memory
async def test_the_refresh_token_of_another_account_is_not_kept(
    world: World, before: dict[str, Any], now: dict[str, Any], same: bool
) -> None:
    """Otherwise the next refresh would bring back the access of the account that the user has left."""
    store = await world.store()
    await store.store_token_response(*ME, {"access_token": "at-1", "refresh_token": "rt-1", **before})
    record = await store.store_token_response(*ME, {**AT, **now})
    assert record["refresh_token"] == ("rt-1" if same else None)


@on_every_row
async def test_a_login_beside_a_refresh_keeps_the_new_refresh_token(world: World) -> None:
    """The refresh is about to replace the stored refresh token, which the login must not write back."""
    store, other = await world.store(), await world.store()
    await world.log_in(store)
    with world.provider.hold():
        refresh = asyncio.ensure_future(fresh(store))
        await world.requests(1)
        login = asyncio.ensure_future(other.store_token_response(*ME, {**AT, "expires_in": 60}))
        done, _ = await asyncio.wait([login], timeout=0.1)
        assert not done, "the login did not wait for the refresh"
    refreshed, record = await refresh, await login
    assert (record["access_token"], record["refresh_token"]) == ("at-2", refreshed["refresh_token"])
    assert record["generation"] == refreshed["generation"] + 1
    # The world asserts at its end that no refresh token was used twice.
    assert pair(await fresh(store, force=True)) == pair(await world.stored())


@on_every_row
async def test_a_login_with_a_refresh_token_does_not_wait_for_a_refresh(world: World) -> None:
    """It replaces the grant, and the refresh finds a newer row."""
    store, other = await world.store(), await world.store()
    await world.log_in(store)
    with world.provider.hold():
        refresh = asyncio.ensure_future(fresh(store))
        await world.requests(1)
        grant = world.provider.new_grant("u1")
        record = await other.store_token_response(*ME, {**grant, "expires_in": 3600})
        assert pair(record) == pair(grant)
    assert pair(await refresh) == pair(grant)
    assert pair(await world.stored()) == pair(grant)


@on_memory
async def test_the_wait_for_a_refresh_is_bounded(world: World) -> None:
    store = await world.store(refresh_timeout=0.02)
    record = await world.expired(store)
    claim = world.backend().claim_lease
    assert await claim(TokenKey(*ME), generation=record["generation"], holder="h", duration=60)
    with pytest.raises(LockTimeoutError, match="lease"):
        await store.store_token_response(*ME, AT)
    assert pair(await world.stored()) == OLD


@on_every_row
async def test_concurrent_first_logins_lose_no_refresh_token(world: World) -> None:
    """Of several logins at once, one has a refresh token. The row has that token in the end, whatever their order."""
    stores = [await world.store() for _ in range(3)]
    for turn in range(4):
        user = f"user-{turn}"
        answers = [{"access_token": f"at-{n}", "expires_in": 60} for n in range(8)]
        answers[turn]["refresh_token"] = "rt"
        calls = (
            stores[n % 3].store_token_response("github", user, response, account=f"{turn}")
            for n, response in enumerate(answers)
        )
        await asyncio.gather(*calls)
        record = await stores[0].load_tokens("github", user, account=f"{turn}")
        assert record is not None
        assert record["refresh_token"] == "rt"


@on_every_row
async def test_a_login_ends_a_failure(world: World) -> None:
    store = await world.store(refreshers={"github": Script(ReauthorizationRequiredError("no"), NEW)})
    await world.expired(store)
    for _ in range(2):
        with pytest.raises(ReauthorizationRequiredError):
            await fresh(store)
    await store.store_token_response(*ME, {**AT, "expires_in": -1, "expires_at": 1})
    assert pair(await fresh(store)) == pair(NEW)


@on_every_row
async def test_if_absent_keeps_the_row(world: World) -> None:
    """The call returns the record that is stored, its own or the earlier one."""
    store = await world.store()
    first = await store.store_token_response(*ME, {**NEW}, if_absent=True)
    assert pair(first) == pair(NEW)
    assert await store.store_token_response(*ME, AT, if_absent=True) == first
    assert await store.load_tokens(*ME) == first


# -- in a transaction ----------------------------------------------------------------------------------


@on_every_row
async def test_in_a_transaction(world: World) -> None:
    """A token response that a transaction has stored can be rolled back with the rest of the transaction."""
    store = await world.store()
    async with store.transaction() as tx:
        first = await tx.store_token_response(*ME, {"access_token": "at-1", "refresh_token": "rt-1"})
        second = await tx.store_token_response(*ME, AT)
        assert await store.load_tokens(*ME) is None
    assert (first["refresh_token"], second["refresh_token"]) == ("rt-1", "rt-1")
    assert await store.load_tokens(*ME) == second
    with suppress(ZeroDivisionError):
        async with store.transaction() as tx:
            await tx.store_token_response(*ME, {"access_token": "at-3"})
            raise ZeroDivisionError
    assert await store.load_tokens(*ME) == second


# -- responses that are refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "error"),
    [
        ({"error": "invalid_grant", "error_description": "Bad code"}, ReauthorizationRequiredError),
        ({"error": "invalid_client"}, ProviderRefusedError),
        ({"error": "invalid_scope"}, ProviderRefusedError),
        ({"error": "temporarily_unavailable"}, ProviderUnavailableError),
        ({"error": "bad_verification_code", "error_description": "s3cret"}, InvalidInputError),
        ({"ok": False, "error": "invalid_code"}, InvalidInputError),
        ({"refresh_token": "s3cret"}, InvalidInputError),
        ({"access_token": ""}, InvalidInputError),
        ({}, InvalidInputError),
        ([("access_token", "s3cret")], InvalidInputError),
        ("s3cret", InvalidInputError),
        (None, InvalidInputError),
    ],
)
@on_memory
async def test_what_is_no_token_response_is_refused(world: World, response: Any, error: type[Exception]) -> None:
    """Nothing is written, and a stored row stays as it is."""
    store = await world.store()
    with pytest.raises(error) as caught:
        await store.store_token_response(*ME, response)
    assert await store.load_tokens(*ME) is None
    assert "s3cret" not in str(caught.value)
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    if isinstance(caught.value, ReauthorizationRequiredError):
        assert (caught.value.provider, caught.value.user_id, caught.value.code) == (*ME, "invalid_grant")
    await world.expired(store)
    with pytest.raises(error):
        await store.store_token_response(*ME, response)
    assert pair(await world.stored()) == OLD


@on_memory
async def test_a_login_replaces_a_row_whose_key_is_lost(world: World) -> None:
    """Unless the response leaves the refresh token as it is, which nobody can read then."""
    store = await world.store()
    lost = AuthTokenStore(backend=world.backend(), keyring=Keyring({"lost": bytes(32)}))
    await lost.store_tokens(*ME, *OLD, None)
    with pytest.raises(UnknownKeyError):
        await store.store_token_response(*ME, AT)
    record = await store.store_token_response(*ME, {**AT, "refresh_token": "rt-2"})
    assert (record["access_token"], record["refresh_token"]) == ("at-2", "rt-2")
    await lost.store_tokens(*ME, *OLD, None)
    assert (await store.store_token_response(*ME, AT, keep_refresh_token=False))["refresh_token"] is None


# -- expiries that nothing tells -------------------------------------------------------------------------


class Settled(Script):
    """A refresher with lifetimes."""

    def __init__(self, *answers: Any, default_lifetime: object = None, max_lifetime: object = None) -> None:
        super().__init__(*answers)
        self.default_lifetime = default_lifetime
        self.max_lifetime = max_lifetime


SILENT = {"access_token": "at-silent", "refresh_token": "rt-silent"}


async def listed(store: AuthTokenStore) -> list[bool]:
    return [entry["access_token_expiry_known"] async for entry in store.list_tokens()]


@on_every_row
async def test_an_unknown_expiry_is_not_never(world: World) -> None:
    """The token is served, and not refreshed unless a caller forces it, as after a 401."""
    refresher = Script(SILENT)
    store = await world.store(refreshers={"github": refresher})
    record = await store.store_token_response(*ME, SILENT)
    assert (record["access_token_expires_at"], record["access_token_expiry_known"]) == (None, False)
    assert await listed(store) == [False]
    assert store.is_access_token_valid(record)
    assert await fresh(store) == record
    assert refresher.calls == 0
    forced = await fresh(store, force=True)
    assert (refresher.calls, forced["access_token_expiry_known"]) == (1, False)
    await store.store_tokens(*ME, "at", "rt", None)
    assert (await fresh(store))["access_token_expiry_known"] is True
    assert await listed(store) == [True]


@pytest.mark.parametrize("lifetime", [600, 600.0, timedelta(minutes=10)])
@on_memory
async def test_the_refreshers_default_lifetime(world: World, lifetime: object) -> None:
    """It counts for a login and for a refresh that tell none."""
    refresher = Settled(SILENT, default_lifetime=lifetime)
    store = await world.store(refreshers={"github": refresher})
    logged_in = await store.store_token_response(*ME, SILENT)
    async with store.transaction() as tx:
        await tx.store_token_response(*ME, SILENT, account="in a transaction")
    in_transaction = await store.load_tokens(*ME, account="in a transaction")
    refreshed = await fresh(store, force=True)
    for record in (logged_in, in_transaction, refreshed):
        assert record is not None
        expires_at = record["access_token_expires_at"]
        assert expires_at is not None
        assert abs((expires_at - record["updated_at"]).total_seconds() - 600) < 1
    world.ahead += 601
    await fresh(store)
    assert refresher.calls == 2


@on_every_row
async def test_a_token_of_unknown_expiry_is_refreshed_after_max_lifetime(world: World) -> None:
    """The time counts from the write of the row. A token that never expires is not refreshed."""
    brief, long = Settled(SILENT, max_lifetime=0.001), Settled(SILENT, max_lifetime=3600)
    store = await world.store(refreshers={"github": long})
    other = await world.store(refreshers={"github": brief})
    record = await store.store_token_response(*ME, SILENT)
    assert await fresh(store) == record
    assert long.calls == 0
    while (await fresh(other))["generation"] == record["generation"]:  # a clock may count milliseconds
        pass
    assert brief.calls == 1
    await store.store_tokens(*ME, "at", "rt", None)
    assert (await fresh(other))["access_token"] == "at"
    assert brief.calls == 1


@pytest.mark.parametrize("lifetime", [0, -1, float("nan"), True, "600", None, object()])
@on_memory
async def test_a_refreshers_attribute_that_is_no_lifetime_is_ignored(world: World, lifetime: object) -> None:
    """Any callable may be a refresher, such as a mock, which has every attribute."""
    refresher = Settled(SILENT, default_lifetime=lifetime, max_lifetime=lifetime)
    store = await world.store(refreshers={"github": refresher})
    assert (await store.store_token_response(*ME, SILENT))["access_token_expiry_known"] is False
    assert (await fresh(store))["access_token"] == "at-silent"
    assert refresher.calls == 0


@on_memory
async def test_twenty_loads_of_a_short_lived_token_are_one_refresh(world: World) -> None:
    """The skew is a part of a lifetime that is near it."""
    for lifetime in (60, 30, 120):
        refresher = Script({**NEW, "expires_in": lifetime})
        store = await world.store(refreshers={"github": refresher})
        await store.store_token_response(*ME, {**NEW, "expires_in": lifetime})
        for _ in range(20):
            await fresh(store)
        assert refresher.calls == 0
        world.ahead += lifetime
        for _ in range(20):
            await fresh(store)
        assert refresher.calls == 1
