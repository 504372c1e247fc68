"""Tests of leases: claimed, completed, released and expired."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from tokenstore.protocol import Backend
from tokenstore.records import Failure
from tokenstore.testing.conformance._helpers import (
    KEY,
    LONG,
    OTHER,
    SHORT,
    THIRD,
    TIMEOUT,
    assert_cannot_change,
    fail_refresh,
    read_row,
    sealed,
    store_row,
    until,
    wait_for_expiry,
    without_times,
)
from tokenstore.testing.conformance._testbed import Testbed, on_one_backend, on_two_backends


class LeaseTests(Testbed):
    """Tests of leases: claimed, completed, released and expired."""

    @on_one_backend
    async def test_a_claim_sets_the_lease_and_no_other_field(self, backend: Backend) -> None:
        await store_row(backend)
        before = await read_row(backend)
        assert await backend.claim_lease(KEY, generation=before.generation, holder="h" * 32, duration=60) is True
        record = await read_row(backend)
        assert record.lease_holder == "h" * 32
        assert record.lease_expires_in is not None
        assert 60 - TIMEOUT < record.lease_expires_in <= 60
        assert without_times(replace(record, lease_holder=None)) == without_times(before)

    @on_one_backend
    async def test_a_claim_is_refused_without_a_row_of_that_generation(self, backend: Backend) -> None:
        assert await backend.claim_lease(KEY, generation=1, holder="h", duration=LONG) is False
        generation = await store_row(backend)
        for other in (generation - 1, generation + 1):
            assert await backend.claim_lease(KEY, generation=other, holder="h", duration=LONG) is False
        assert (await read_row(backend)).lease_holder is None

    @on_one_backend
    async def test_a_live_lease_refuses_every_claim(self, backend: Backend) -> None:
        """Its own holder's claim is refused too, because a second claim would be a second refresh."""
        generation = await store_row(backend)
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        for holder in ("h", "H", "h ", "other"):
            assert await backend.claim_lease(KEY, generation=generation, holder=holder, duration=LONG) is False
        assert (await read_row(backend)).lease_holder == "h"

    @on_one_backend
    async def test_completing_a_lease_stores_the_tokens_and_ends_the_lease(self, backend: Backend) -> None:
        """The row gets the next generation, and has no lease and no failure."""
        generation = await store_row(backend)
        before = await read_row(backend)
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        tokens = sealed("new", refresh_token=None)
        assert await backend.complete_lease(KEY, tokens, generation=generation, holder="h") is True
        record = await read_row(backend)
        assert (record.tokens, record.generation) == (tokens, generation + 1)
        assert (record.lease_holder, record.lease_expires_in, record.failure) == (None, None, None)
        assert record.created_at == before.created_at
        assert record.updated_at >= before.updated_at
        await assert_cannot_change(backend, generation, "h")

    @on_one_backend
    async def test_only_the_lease_holder_can_end_a_lease(self, backend: Backend) -> None:
        generation = await store_row(backend)
        await assert_cannot_change(backend, generation, "h")  # the row has no lease yet
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        for holder in ("H", "h ", "other"):
            await assert_cannot_change(backend, generation, holder)
        await assert_cannot_change(backend, generation + 1, "h")
        await store_row(backend, OTHER)
        await assert_cannot_change(backend, generation, "h", OTHER)
        lease: dict[str, Any] = {"generation": generation, "holder": "h"}
        assert await backend.complete_lease(THIRD, sealed(), **lease) is False
        assert await backend.release_lease(THIRD, **lease) is False
        assert await backend.get(THIRD) is None

    @on_one_backend
    async def test_a_released_lease_can_be_claimed_at_once(self, backend: Backend) -> None:
        generation = await store_row(backend)
        before = await read_row(backend)
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        assert await backend.release_lease(KEY, generation=generation, holder="h") is True
        assert without_times(await read_row(backend)) == without_times(before)
        assert await backend.release_lease(KEY, generation=generation, holder="h") is False
        assert await backend.claim_lease(KEY, generation=generation, holder="other", duration=LONG)

    @on_one_backend
    async def test_a_failure_without_retry_time_refuses_claims_until_new_tokens(self, backend: Backend) -> None:
        generation = await store_row(backend)
        before = await read_row(backend)
        await fail_refresh(backend, generation, Failure("c" * 64))
        assert without_times(await read_row(backend)) == without_times(replace(before, failure=Failure("c" * 64)))
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG) is False
        await backend.put(KEY, sealed())
        assert await backend.claim_lease(KEY, generation=generation + 1, holder="h", duration=LONG) is True
        assert await backend.complete_lease(KEY, sealed(), generation=generation + 1, holder="h")

    @on_one_backend
    async def test_a_failure_with_retry_time_refuses_claims_until_then(self, backend: Backend) -> None:
        generation = await store_row(backend)
        await fail_refresh(backend, generation, Failure("unavailable", LONG))
        failure = (await read_row(backend)).failure
        assert failure is not None
        assert failure.code == "unavailable"
        assert failure.retry_in is not None
        assert LONG - TIMEOUT < failure.retry_in <= LONG
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG) is False
        generation = await store_row(backend)
        await fail_refresh(backend, generation, Failure("unavailable", SHORT))

        async def granted() -> bool:
            return await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)

        await until(granted, "a claim after the failure's retry time was granted")
        assert await backend.complete_lease(KEY, sealed("b"), generation=generation, holder="h")
        assert (await read_row(backend)).failure is None

    @on_one_backend
    async def test_a_release_replaces_an_earlier_failure(self, backend: Backend) -> None:
        generation = await store_row(backend)
        outcomes = [Failure("first", SHORT), Failure("second", SHORT), None, Failure("third")]
        for failure in outcomes:

            async def granted() -> bool:
                return await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)

            await until(granted, "a claim after the failure's retry time was granted")
            assert await backend.release_lease(KEY, generation=generation, holder="h", failure=failure)
            found = (await read_row(backend)).failure
            assert (found and found.code) == (failure and failure.code)
            assert (found and found.retry_in) is None or (failure and failure.retry_in) is not None

    @on_one_backend
    async def test_a_failure_is_cleared_if_it_is_old_enough(self, backend: Backend) -> None:
        """Nothing else changes, and a refresh can be tried at once."""
        assert await backend.clear_failure(KEY) is False
        generation = await store_row(backend)
        before = await read_row(backend)
        assert await backend.clear_failure(KEY) is False

        async def cleared() -> bool:
            return await backend.clear_failure(KEY, min_age=SHORT)

        for failure in (Failure("invalid_grant"), Failure("unavailable", LONG)):
            await fail_refresh(backend, generation, failure)
            assert await backend.clear_failure(KEY, min_age=LONG) is False
            assert (await read_row(backend)).failure is not None
            await until(cleared, "the failure was old enough to be cleared")
            assert without_times(await read_row(backend)) == without_times(before)
            assert await backend.clear_failure(KEY) is False
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG) is True

    @on_one_backend
    async def test_a_failure_is_cleared_if_it_came_before_a_time(self, backend: Backend) -> None:
        """However late the statement is."""
        generation = await store_row(backend)
        before = await backend.clock() - 1
        await fail_refresh(backend, generation, Failure("unavailable", LONG))
        assert await backend.clear_failure(KEY, as_of=before) is False
        assert await backend.clear_failure(KEY, as_of=before, min_age=LONG) is False
        assert (await read_row(backend)).failure is not None
        assert await backend.clear_failure(KEY, as_of=await backend.clock()) is True
        assert (await read_row(backend)).failure is None

    @on_one_backend
    async def test_an_expired_lease_can_be_completed(self, backend: Backend) -> None:
        """If no other holder claimed the lease, the late tokens are stored: they may be the only copy."""
        generation = await store_row(backend)
        assert await backend.claim_lease(KEY, generation=generation, holder="slow", duration=SHORT)
        await wait_for_expiry(backend)
        assert await backend.complete_lease(KEY, sealed("late"), generation=generation, holder="slow") is True
        record = await read_row(backend)
        assert (record.tokens, record.generation, record.lease_holder) == (sealed("late"), generation + 1, None)

    @on_one_backend
    async def test_an_expired_lease_can_be_released_with_a_failure(self, backend: Backend) -> None:
        generation = await store_row(backend)
        assert await backend.claim_lease(KEY, generation=generation, holder="slow", duration=SHORT)
        await wait_for_expiry(backend)
        refused = Failure("invalid_grant")
        assert await backend.release_lease(KEY, generation=generation, holder="slow", failure=refused) is True
        assert (await read_row(backend)).failure == refused

    @on_one_backend
    async def test_one_claim_of_an_expired_lease_is_granted(self, backend: Backend) -> None:
        """Of eight claims one is granted; after it, the former holder can neither complete nor release."""
        generation = await store_row(backend)
        assert await backend.claim_lease(KEY, generation=generation, holder="dead", duration=SHORT)
        await wait_for_expiry(backend)
        holders = [f"holder-{number}" for number in range(8)]
        granted = await asyncio.gather(
            *(backend.claim_lease(KEY, generation=generation, holder=holder, duration=LONG) for holder in holders)
        )
        assert granted.count(True) == 1
        winner = holders[granted.index(True)]
        for loser in {"dead", *holders} - {winner}:
            await assert_cannot_change(backend, generation, loser)
        assert (await read_row(backend)).lease_holder == winner
        assert await backend.complete_lease(KEY, sealed("new"), generation=generation, holder=winner) is True

    @on_one_backend
    async def test_a_former_holder_can_complete_after_the_new_holder_released(self, backend: Backend) -> None:
        """The late tokens also clear a failure of the new holder: they are newer than the tokens that failed."""
        for failure in (Failure("invalid_grant"), Failure("unavailable", LONG), None):
            generation = await store_row(backend, tag="old")
            assert await backend.claim_lease(KEY, generation=generation, holder="late", duration=SHORT)
            await wait_for_expiry(backend)
            assert await backend.claim_lease(KEY, generation=generation, holder="new", duration=LONG)
            of: dict[str, Any] = {"generation": generation, "holder": "late"}
            completed = await backend.complete_lease(KEY, sealed("late"), **of)
            assert completed is False, "completed although another holder has a live lease"
            assert (await read_row(backend)).tokens == sealed("old")
            assert await backend.release_lease(KEY, generation=generation, holder="new", failure=failure)
            assert await backend.release_lease(KEY, **of, failure=Failure("late")) is False
            assert await backend.complete_lease(KEY, sealed("late"), **of) is True
            record = await read_row(backend)
            assert (record.tokens, record.generation) == (sealed("late"), generation + 1)
            assert (record.lease_holder, record.lease_expires_in, record.failure) == (None, None, None)
            assert await backend.complete_lease(KEY, sealed("twice"), **of) is False
            assert await backend.claim_lease(KEY, generation=generation + 1, holder="next", duration=LONG)

    @on_one_backend
    async def test_a_former_holder_can_complete_after_the_new_lease_expired(self, backend: Backend) -> None:
        """The first of the two holders to complete stores its tokens; the other one's call returns False."""
        generation = await store_row(backend, tag="old")
        for holder in ("late", "new"):
            assert await backend.claim_lease(KEY, generation=generation, holder=holder, duration=SHORT)
            await wait_for_expiry(backend)
        assert await backend.complete_lease(KEY, sealed("late"), generation=generation, holder="late") is True
        assert await backend.complete_lease(KEY, sealed("new"), generation=generation, holder="new") is False
        record = await read_row(backend)
        assert (record.tokens, record.generation, record.lease_holder) == (sealed("late"), generation + 1, None)

    @on_one_backend
    async def test_a_late_completion_does_not_replace_newer_tokens(self, backend: Backend) -> None:
        """The newer tokens are those of a new lease holder, of a put, or of a row deleted and stored again."""

        async def by_new_holder(generation: int) -> None:
            assert await backend.complete_lease(KEY, sealed("newer"), generation=generation, holder="new")

        async def by_put(_generation: int) -> None:
            await backend.put(KEY, sealed("newer"))

        async def anew(generation: int) -> None:
            await backend.delete(KEY)
            assert await backend.complete_lease(KEY, sealed("late"), generation=generation, holder="late") is False
            assert await backend.get(KEY) is None
            await backend.put(KEY, sealed("newer"))

        for newer in (by_new_holder, by_put, anew):
            generation = await store_row(backend, tag="old")
            assert await backend.claim_lease(KEY, generation=generation, holder="late", duration=SHORT)
            await wait_for_expiry(backend)
            assert await backend.claim_lease(KEY, generation=generation, holder="new", duration=LONG)
            await newer(generation)
            assert await backend.complete_lease(KEY, sealed("late"), generation=generation, holder="late") is False
            assert (await read_row(backend)).tokens == sealed("newer")

    @on_one_backend
    async def test_a_put_ends_a_lease(self, backend: Backend) -> None:
        """After a put, or a delete and a put, the former holder can neither complete nor release."""
        generation = await store_row(backend)
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        await backend.put(KEY, sealed("newer"))
        await assert_cannot_change(backend, generation, "h")
        await assert_cannot_change(backend, generation + 1, "h")
        await backend.delete(KEY)
        assert await backend.complete_lease(KEY, sealed("stale"), generation=generation, holder="h") is False
        assert await backend.get(KEY) is None
        renewed = await store_row(backend, tag="renewed")
        for old in (generation, generation + 1, renewed):
            await assert_cannot_change(backend, old, "h")

    @on_two_backends()
    async def test_one_of_many_concurrent_claims_is_granted(self, backend: Backend, other: Backend) -> None:
        generation = await store_row(backend)
        for attempt in range(3):
            granted = await asyncio.gather(
                *(
                    (backend, other)[number % 2].claim_lease(
                        KEY, generation=generation, holder=f"{attempt}-{number}", duration=LONG
                    )
                    for number in range(16)
                )
            )
            assert granted.count(True) == 1
            holder = f"{attempt}-{granted.index(True)}"
            assert await other.complete_lease(KEY, sealed(str(attempt)), generation=generation, holder=holder)
            generation += 1

    @on_two_backends()
    async def test_of_a_late_completion_and_a_concurrent_claim_one_succeeds(
        self, backend: Backend, other: Backend
    ) -> None:
        """Either the late holder's tokens are stored, or the new holder gets the lease; never both."""
        for attempt in range(5):
            generation = await store_row(backend, tag="old")
            assert await backend.claim_lease(KEY, generation=generation, holder="late", duration=SHORT)
            await wait_for_expiry(backend)
            completed, claimed = await asyncio.gather(
                backend.complete_lease(KEY, sealed("late"), generation=generation, holder="late"),
                other.claim_lease(KEY, generation=generation, holder="new", duration=LONG),
            )
            assert completed is not claimed, f"attempt {attempt}"
            record = await read_row(backend)
            expected = (sealed("late"), None) if completed else (sealed("old"), "new")
            assert (record.tokens, record.lease_holder) == expected

    # rewrap
