"""Jobs, views and processes that end before their refresh does lose no tokens.

The provider runs in another thread and revokes a grant whose refresh token is used twice. If new tokens were lost, the
next refresh would use the old refresh token again, which shows in the provider's counters.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import uvloop
from asgiref.sync import async_to_sync
from flask import Flask

from support.matrix import Row, each_database
from support.short_jobs import ENDINGS, Client, Jobs, Work, process_running
from tokenstore.testing.provider import StrictRotatingProvider

_LATENCY = 0.1
one_store_or_one_a_job = pytest.mark.parametrize("shared", [True, False], ids=["one store", "a store per job"])
# A store that is not closed leaves its connections open, which warns. If that warning is an error, uvloop cannot close.
stores_may_be_left_open = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture
def provider() -> Iterator[StrictRotatingProvider]:
    with StrictRotatingProvider(latency=_LATENCY) as provider:
        yield provider


def check(provider: StrictRotatingProvider, received: int, at_least: int) -> None:
    """Check that all responses were received, and that no refresh token was sent twice."""
    stats = provider.stats()
    assert (stats.reuses, stats.revoked_grants) == (0, 0)
    assert stats.refreshes == received
    assert received > at_least


@each_database
@one_store_or_one_a_job
@stores_may_be_left_open
def test_jobs_that_end_before_their_refresh(row: Row, url: str, shared: bool, provider: StrictRotatingProvider) -> None:
    """As with Celery or cron, each job calls `asyncio.run`, which ends while the provider handles the request."""
    received = Jobs(url, Client.of(provider), shared=shared).run(10, provider.new_grant("user"))
    check(provider, received, 10)


@pytest.mark.soak
@each_database
@one_store_or_one_a_job
@stores_may_be_left_open
def test_two_hundred_jobs_that_end_before_their_refresh(
    row: Row, url: str, shared: bool, provider: StrictRotatingProvider
) -> None:
    """Each job takes a third of the time that the provider takes."""
    provider.latency = 0.3
    jobs = Jobs(url, Client.of(provider), shared=shared, work=lambda: asyncio.sleep(0.1))
    check(provider, jobs.run(200, provider.new_grant("user")), 100)


@each_database
@pytest.mark.parametrize("ending", ENDINGS)
@stores_may_be_left_open
def test_a_refresh_survives_each_kind_of_end_of_its_job(
    row: Row, url: str, ending: str, provider: StrictRotatingProvider
) -> None:
    jobs = Jobs(url, Client.of(provider), shared=ending != "closing", ending=ending)
    check(provider, jobs.run(2, provider.new_grant("user")), 2)


@each_database
@stores_may_be_left_open
def test_jobs_on_uvloop(row: Row, url: str, provider: StrictRotatingProvider) -> None:

    def run(job: Work) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(job())

    check(provider, Jobs(url, Client.of(provider)).run(3, provider.new_grant("user"), run), 3)


@each_database
@one_store_or_one_a_job
@stores_may_be_left_open
def test_flask_views_that_end_before_their_refresh(
    row: Row, url: str, shared: bool, provider: StrictRotatingProvider
) -> None:
    app = Flask(__name__)
    views: list[Work] = []

    @app.get("/")
    async def view() -> str:
        await views[-1]()
        return "done"

    def run(job: Work) -> None:
        views.append(job)
        response = app.test_client().get("/")
        assert (response.status_code, response.text) == (200, "done")

    check(provider, Jobs(url, Client.of(provider), shared=shared).run(5, provider.new_grant("user"), run), 5)


@each_database
@one_store_or_one_a_job
@stores_may_be_left_open
def test_calls_by_async_to_sync_that_end_before_their_refresh(
    row: Row, url: str, shared: bool, provider: StrictRotatingProvider
) -> None:
    def run(job: Work) -> None:
        async_to_sync(job)()

    check(provider, Jobs(url, Client.of(provider), shared=shared).run(5, provider.new_grant("user"), run), 5)


@each_database
@one_store_or_one_a_job
def test_worker_processes_that_end_after_a_few_jobs(
    row: Row, url: str, shared: bool, provider: StrictRotatingProvider
) -> None:
    """A prefork server replaces its worker processes like that."""
    users = ["user 1", "user 2"]
    client = Client.of(provider)
    processes = [process_running(url, client, user, provider.new_grant(user), 3, shared) for user in users]
    for process in processes:
        process.join(60)
        code = process.exitcode
        process.kill()
        process.join()
        process.close()
        assert code == 0
    check(provider, provider.stats().refreshes, 6)
