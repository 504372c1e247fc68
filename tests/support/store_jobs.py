"""Jobs of worker processes with a store: set up, run programs, store, load, hold locks and leases."""

from __future__ import annotations

import asyncio
import itertools
import time
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from support.broken_backends import Fault
from support.generated_programs import Program, ProgramRun
from support.workers import Link
from support.written_values import sealed, tokens, version
from tokenstore.errors import LockTimeoutError
from tokenstore.records import TokenKey
from tokenstore.testing.history import Operation, Version
from tokenstore.testing.provider import refresh_over_http

KEY = TokenKey("provider", "user")


# Jobs
async def set_up(link: Link, url: str) -> None:
    """Create the table."""
    (store, *_) = await link.open(url)
    link.meet()
    await store.tokens.setup()


async def run_program(
    link: Link, url: str, name: str, user_id: str, program: Program, fault: Fault | None = None
) -> list[Operation]:
    """Run tasks of a program and return their history. All processes of a machine share the monotonic clock."""
    stores = await link.open(url, fault)
    run = ProgramRun(stores, user_id, time.monotonic_ns, name)
    link.meet()
    await run.execute(program)
    return run.history


async def store(link: Link, url: str, value: str) -> None:
    """Store the tokens of one write."""
    (one, *_) = await link.open(url)
    link.meet()
    await one.tokens.store_tokens(**KEY._asdict(), **tokens(value))


async def load(link: Link, url: str) -> Version | None:
    """Return the write that the row comes from."""
    (one, *_) = await link.open(url)
    link.meet()
    return version(await one.tokens.load_tokens(**KEY._asdict()))


async def store_grant(link: Link, url: str, refresh_token: str) -> None:
    """Store a refresh token with an expired access token."""
    (one, *_) = await link.open(url)
    link.meet()
    expired_at = datetime.now(UTC) - timedelta(hours=1)
    await one.tokens.store_tokens(
        **KEY._asdict(), access_token="expired", refresh_token=refresh_token, access_token_expires_at=expired_at
    )


async def refresh(link: Link, url: str, token_url: str, client: dict[str, str], tasks: int) -> list[str]:
    """Let many tasks get a valid token under the row lock: load for update, refresh if expired, store."""
    (one, *_) = await link.open(url)
    link.meet()

    async def valid_token() -> str:
        async with one.tokens.transaction() as transaction:
            record = await transaction.load_tokens(**KEY._asdict(), for_update=True)
            assert record is not None
            if one.tokens.is_access_token_valid(record):
                return record["access_token"]
            assert one.tokens.is_refresh_token_valid(record)
            new = await refresh_over_http(token_url, record["refresh_token"], **client, timeout=60)
            expires_at = datetime.now(UTC) + timedelta(seconds=new["expires_in"])
            pair = {name: new[name] for name in ("access_token", "refresh_token")}
            await transaction.store_tokens(**KEY._asdict(), **pair, access_token_expires_at=expires_at)
            return str(new["access_token"])

    return await asyncio.gather(*(valid_token() for _ in range(tasks)))


async def hold_lock(link: Link, url: str) -> None:
    """Lock the row, overwrite it, and pause before the commit."""
    (one, *_) = await link.open(url)
    async with one.tokens.transaction() as transaction:
        await transaction.load_tokens(**KEY._asdict(), for_update=True)
        await transaction.store_tokens(**KEY._asdict(), **tokens("uncommitted"))
        link.meet()


async def wait_for_lock(link: Link, url: str, seconds: float) -> Version | None:
    """Check that the row is locked, then wait up to so many seconds for the lock; return the write in the row."""

    async def lock() -> Version | None:
        async with one.tokens.transaction() as transaction:
            return version(await transaction.load_tokens(**KEY._asdict(), for_update=True))

    (one, *_) = await link.open(url, lock_timeout=0.1)
    try:
        found = await lock()
    except LockTimeoutError:
        pass
    else:
        raise AssertionError(f"the row was not locked; it contained {found}")
    (one, *_) = await link.open(url, lock_timeout=seconds)
    link.meet()
    return await lock()


class Grant(NamedTuple):
    """A lease that was granted for a generation, between ``asked_at`` and ``granted_at`` (monotonic, nanoseconds)."""

    holder: str
    generation: int
    asked_at: int
    granted_at: int


async def hold_lease(link: Link, url: str, holder: str, duration: float) -> list[bool]:
    """Claim the lease, pause, then try to complete and to release it; return whether each succeeded."""
    (one, *_) = await link.open(url)
    row = await one.backend.get(KEY)
    assert row is not None
    asked_at = time.monotonic_ns()
    of: dict[str, Any] = {"generation": row.generation, "holder": holder}
    assert await one.backend.claim_lease(KEY, **of, duration=duration)
    link.meet(Grant(holder, row.generation, asked_at, time.monotonic_ns()))
    return [
        await one.backend.complete_lease(KEY, sealed(one.keyring, KEY, f"by {holder}"), **of),
        await one.backend.release_lease(KEY, **of),
    ]


async def take_over(link: Link, url: str, holder: str, lost: Grant) -> Grant | None:
    """Claim the lease until the claim is granted or another holder has the lease."""
    (one, *_) = await link.open(url)
    link.meet()
    for _ in itertools.count():
        asked_at = time.monotonic_ns()
        if await one.backend.claim_lease(KEY, generation=lost.generation, holder=holder, duration=3600):
            return Grant(holder, lost.generation, asked_at, time.monotonic_ns())
        row = await one.backend.get(KEY)
        assert row is not None
        if row.lease_holder != lost.holder:
            break
    return None


async def complete(link: Link, url: str, grant: Grant) -> bool:
    """Write new tokens under a lease."""
    (one, *_) = await link.open(url)
    link.meet()
    new = sealed(one.keyring, KEY, f"by {grant.holder}")
    return await one.backend.complete_lease(KEY, new, generation=grant.generation, holder=grant.holder)


async def update_metadata(link: Link, url: str, names: list[str], fault: Fault | None = None) -> None:
    """Add a field of each name, all at once."""
    (one, *_) = await link.open(url, fault)
    link.meet()
    await asyncio.gather(*(one.tokens.update_metadata(**KEY._asdict(), changes={name: name}) for name in names))


async def load_metadata(link: Link, url: str) -> list[str]:
    """Return the names of the row's fields."""
    (one, *_) = await link.open(url)
    link.meet()
    record = await one.tokens.load_tokens(**KEY._asdict())
    assert record is not None
    return sorted(record["metadata"])
