"""What each of the demo's worker processes does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from typing import Any

from tokenstore.cli.demo.plan import PROVIDER, USER, Mode, Plan, Role, TaskResult, WorkerFailure
from tokenstore.errors import TokenStoreError
from tokenstore.records import TokenRecord
from tokenstore.store import AuthTokenStore
from tokenstore.testing.provider import ProviderError, refresh_over_http

__all__ = ["run_worker"]


def run_worker(pipe: Connection, plan: Plan) -> None:
    """Take part in the rounds that the parent process announces through the pipe."""
    with suppress(EOFError, BrokenPipeError):  # the parent process has ended, or the rounds are over
        try:
            asyncio.run(_serve_rounds(pipe, plan))
        except TokenStoreError as error:
            pipe.send(WorkerFailure(str(error)))
        except Exception as error:
            # The class alone: the text could contain a token.
            pipe.send(WorkerFailure(f"a worker ended with {type(error).__name__}"))
            raise


async def _serve_rounds(pipe: Connection, plan: Plan) -> None:
    # Reading from the pipe blocks the event loop of this process. Nothing else runs in it between the rounds.
    import httpx

    async with plan.open_store() as store, httpx.AsyncClient(base_url=plan.base_url, trust_env=False) as client:
        while (mode := pipe.recv()) is not None:
            await store.load_tokens(PROVIDER, USER)  # so that imports and a connection cost no time later
            pipe.send("ready")
            start = pipe.recv()
            await asyncio.sleep(start - time.time())
            tasks = (_task(pipe, plan, store, mode) for _ in range(plan.tasks))
            _, *tokens = await asyncio.gather(_count(pipe, store), *tasks)
            # The tokens are tried after all tasks have ended: a later refresh may have revoked them.
            pipe.recv()
            answers = [
                await client.get("/resource", headers={"Authorization": f"Bearer {token}"}) for token in tokens if token
            ]
            pipe.send(sum(answer.status_code == 200 for answer in answers))


async def _count(pipe: Connection, store: Any) -> None:
    """When asked, send how many connections are held all the time, and not only for one query."""
    await asyncio.to_thread(pipe.recv)
    held = []
    for _ in range(20):
        held.append(store._backend._source.in_use)
        await asyncio.sleep(0.01)  # shorter than the pause between two polls of a leased row
    pipe.send(min(held))


async def _task(pipe: Connection, plan: Plan, store: AuthTokenStore, mode: Mode) -> str | None:
    """Run one task. Returns the access token that it got, or None."""
    import httpx

    began = time.perf_counter()
    try:
        if mode == "fresh":
            role, access_token = await _fresh(plan, store)
        else:
            async with store.transaction() as tx:
                role, access_token = await _contract(plan, store, tx, locked=mode == "row_lock")
    except (ProviderError, TokenStoreError) as error:
        outcome = TaskResult("failed", time.perf_counter() - began, str(error))
        access_token = None
    except httpx.TransportError as error:
        outcome = TaskResult("failed", time.perf_counter() - began, type(error).__name__)
        access_token = None
    else:
        outcome = TaskResult(role, time.perf_counter() - began)
    pipe.send(outcome)
    return access_token


async def _fresh(plan: Plan, store: AuthTokenStore) -> tuple[Role, str]:
    """The call that the README shows."""
    role: Role = "waited"

    async def refresh(record: TokenRecord) -> dict[str, Any]:
        nonlocal role
        role = "refreshed"
        return await _ask(plan, record)

    record: Any = await store.load_fresh_tokens(PROVIDER, USER, refresh=refresh)
    return role, record["access_token"]


async def _contract(plan: Plan, store: AuthTokenStore, tx: Any, *, locked: bool) -> tuple[Role, str]:
    """The three steps of a refresh in the application: load, with the row lock or without it, refresh, store."""
    record = await tx.load_tokens(PROVIDER, USER, for_update=locked)
    if store.is_access_token_valid(record):
        return "waited", record["access_token"]
    new = await _ask(plan, record)
    expires_at = datetime.now(UTC) + timedelta(seconds=new["expires_in"])
    await tx.store_tokens(PROVIDER, USER, new["access_token"], new["refresh_token"], expires_at)
    return "refreshed", new["access_token"]


async def _ask(plan: Plan, record: Mapping[str, Any]) -> dict[str, Any]:
    return await refresh_over_http(
        plan.token_url, record["refresh_token"], client_id=plan.client_id, client_secret=plan.client_secret
    )
