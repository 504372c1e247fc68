"""Connections are cut during a refresh: no pair of tokens is lost, and no refresh token is used twice.

The provider is called over HTTP, and a proxy cuts the database connections. A store that connects directly reads the
row.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

from support.connection_faults import Cut, Faults, How, When, faulty
from support.matrix import Row, each_server, params, row_named
from support.polling import until
from support.refresh_scene import DUE, EXPIRED, SOAK_TIMEOUT, Scene, noted, scene_of
from support.refresh_world import settled
from support.refreshers import pair
from support.store_calls import fresh, load
from tokenstore import BackendUnavailableError, Keyring

Point = tuple[int, When, How]
# Seconds for a statement in tests in which one is never answered; the other limits are derived from it.
SILENCE = 1.5
# Seconds for one refresh: half a lease, so that a refresh that waits for its own lease to expire fails the test.
_RUN_TIMEOUT = 15.0
_ONE_OF_EACH = ["sqlite", "postgresql+asyncpg", "mariadb+asyncmy"]
_DRIVERS = [*_ONE_OF_EACH, "postgresql+psycopg", "mariadb+aiomysql"]
every_driver = pytest.mark.parametrize("row", params(names=_DRIVERS))
each_cycle = pytest.mark.parametrize(
    ("row", "expires_in"),
    [
        pytest.param(row, expires_in, id=f"{row.name}-{name}", marks=getattr(pytest.mark, row.mark))
        for name, expires_in, rows in (("expired", EXPIRED, _DRIVERS), ("due", DUE, _ONE_OF_EACH))
        for row in map(row_named, rows)
    ],
)


@dataclass
class Run:
    """The result of a refresh with cuts.

    Attributes:
        sent: The statements of the refresh, including retries.
        before: How many of them were sent before the provider answered.
        cuts: The cuts that were armed.
        failed: Whether the first read failed, so that no refresh began.
    """

    sent: list[str]
    before: int
    cuts: list[Cut]
    failed: bool


async def run(scene: Scene, expires_in: float, *points: Point) -> Run:
    """Run one refresh of a new store, with cuts at these points, and check what must be true in every case."""
    old = await scene.log_in(expires_in)
    user = old["user_id"]
    answered: list[int] = []
    told = None
    async with asyncio.timeout(_RUN_TIMEOUT), scene.store(old) as store:
        with ExitStack() as stack:
            cuts = [stack.enter_context(scene.faults.cut(*point)) for point in points]
            sent = stack.enter_context(scene.faults.counted())
            scene.recorder.answered = lambda: answered.append(len(sent))
            try:
                told = await fresh(store, user)
            except BackendUnavailableError:
                assert await load(scene.direct, user) == old
                assert not answered, "the refresh token was used, but the caller did not get the new tokens"
            await settled(store)
        found = Run(sent, answered[0] if answered else 0, cuts, failed=told is None)
        if told is None:
            told = await fresh(store, user)
            await settled(store)
        await scene.check(old, told if expires_in == EXPIRED else None)
        if expires_in == DUE:
            assert pair(told) == pair(old), "the caller waited although its token is still valid"
        assert await load(store, user) == await load(scene.direct, user)
    return found


def cuts_at_random(random_source: random.Random, faults: Faults, statements: int, count: int) -> list[Point]:
    ways: list[How] = [how for how in faults.ways if how != "silence"]
    whens: list[When] = ["before", "after"]
    return [
        (random_source.randrange(statements), random_source.choice(whens), random_source.choice(ways))
        for _ in range(count)
    ]


@contextmanager
def heard_in_the_end(faults: Faults) -> Iterator[None]:
    """Cut all connections at the end, so that the stores can be closed also after a failed test."""
    try:
        yield
    except BaseException:
        faults.cut_all()
        raise


@each_cycle
def test_a_refresh_cut_at_any_statement_stores_the_new_pair(
    row: Row, url: str, expires_in: float, keyring: Keyring
) -> None:
    """The caller gets the new token, or within the margin the old one, without an error."""

    async def main() -> None:
        async with scene_of(url, keyring) as scene:
            clean = (await run(scene, expires_in)).sent
            for at, statement in enumerate(clean):
                for which, when in enumerate[When](["before", "after"]):
                    how = scene.faults.ways[(at + which) % 2] if row.mark != "sqlite" else "reset"
                    with noted(at, statement, when, how):
                        found = await run(scene, expires_in, (at, when, how))
                        assert found.cuts[0].happened
                        assert not found.failed

    asyncio.run(main())


@pytest.mark.soak
@every_driver
def test_each_of_a_hundred_refreshes_with_one_cut_succeeds(row: Row, url: str, keyring: Keyring) -> None:
    async def main() -> None:
        random_source = random.Random(row.name)
        async with scene_of(url, keyring, SOAK_TIMEOUT) as scene:
            clean = (await run(scene, EXPIRED)).sent
            for number in range(100):
                [point] = cuts_at_random(random_source, scene.faults, len(clean), 1)
                with noted(number, *point, clean[point[0]]):
                    found = await run(scene, random_source.choice((EXPIRED, DUE)), point)
                    assert found.cuts[0].happened
                    assert not found.failed

    asyncio.run(main())


@pytest.mark.soak
@every_driver
def test_each_of_a_hundred_refreshes_with_several_cuts_succeeds(row: Row, url: str, keyring: Keyring) -> None:
    """Retries after a cut can be cut too. Only the first read may fail after two cuts; no refresh has begun then."""

    async def main() -> None:
        random_source = random.Random(row.name)
        async with scene_of(url, keyring, SOAK_TIMEOUT) as scene:
            clean = (await run(scene, EXPIRED)).sent
            failed = 0
            for number in range(100):
                points = cuts_at_random(random_source, scene.faults, len(clean) + 5, random_source.choice((2, 3)))
                with noted(number, *points):
                    failed += (await run(scene, random_source.choice((EXPIRED, DUE)), *points)).failed
            assert failed < 20, "too many first reads failed"

    asyncio.run(main())


@each_server
def test_a_write_whose_connection_does_not_answer_is_retried_on_another(row: Row, url: str, keyring: Keyring) -> None:
    """The connection stops answering before or after any statement of the write; callers get the new token."""

    async def main() -> None:
        async with scene_of(url, keyring) as scene:
            clean = await run(scene, EXPIRED)

            async def silenced(at: int, when: When) -> None:
                old = await scene.log_in()
                with noted(at, clean.sent[at], when):
                    async with faulty(url) as faults, scene.store(old, faults.url, refresh_timeout=SILENCE) as store:
                        with heard_in_the_end(faults), faults.cut(at, when, "silence") as cut:
                            async with asyncio.timeout(_RUN_TIMEOUT):
                                told = await fresh(store, old["user_id"])
                        assert cut.happened
                        await scene.check(old, told)

            whens: list[When] = ["before", "after"]
            points = itertools.product(range(clean.before, len(clean.sent)), whens)
            async with asyncio.TaskGroup() as group:
                for point in points:
                    group.create_task(silenced(*point))

    asyncio.run(main())


@pytest.mark.parametrize("row", params(names=["mariadb+asyncmy"]))
def test_a_connection_that_does_not_answer_times_out_before_the_lease_expires(
    row: Row, url: str, keyring: Keyring
) -> None:
    """Otherwise another process would send the used refresh token, and a strict provider would revoke the grant."""

    async def main() -> None:
        async with scene_of(url, keyring) as scene:
            clean = await run(scene, EXPIRED)
            old = await scene.log_in()
            user = old["user_id"]
            scene.provider.latency = 1.0  # the lease lasts three seconds
            async with scene.store(old, refresh_timeout=2.0) as store, scene.store(old, url) as another:
                with heard_in_the_end(scene.faults), scene.faults.cut(clean.before, "before", "silence"):
                    caller = asyncio.create_task(fresh(store, user))
                    await until(lambda: bool(scene.recorder.issued[user]))
                    told = await fresh(another, user)
                    assert pair(told) == pair(await caller)
                await scene.check(old, told)

    asyncio.run(main())
