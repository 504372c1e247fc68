"""A closed loop of callers, the time that each call takes, and what many rounds say."""

from __future__ import annotations

import asyncio
import math
import random
from array import array
from collections.abc import Awaitable, Callable, Iterator, Sequence
from statistics import median
from time import perf_counter_ns
from typing import NamedTuple

__all__ = ["Operation", "Sample", "Spread", "bootstrap", "closed_loop", "percentile", "spread", "summary"]

Operation = Callable[[str, str], Awaitable[object]]
"""Something done for one row, given its provider and user id."""


class Sample(NamedTuple):
    """One turn of one contender in one process: its length, and that of each call, in nanoseconds."""

    elapsed: int
    latencies: array[int]


async def closed_loop(operations: Sequence[Operation], keys: Iterator[tuple[str, str]], time: float) -> Sample:
    """Let each caller call again as soon as it has its answer.

    Args:
        operations: What each caller does.
        keys: Which rows they ask for, each taking the next; without end.
        time: For how long, in seconds. Calls that have begun are waited for, and every caller makes one at least.
    """
    logs = [array("q") for _ in operations]
    start = perf_counter_ns()
    deadline = start + int(time * 1e9)
    if len(operations) == 1:
        await _call(operations[0], keys, logs[0], deadline)
    else:
        async with asyncio.TaskGroup() as group:
            for operation, log in zip(operations, logs, strict=True):
                group.create_task(_call(operation, keys, log, deadline))
    elapsed = perf_counter_ns() - start
    latencies = array("q")
    for log in logs:
        latencies.extend(log)
    return Sample(elapsed, latencies)


async def _call(operation: Operation, keys: Iterator[tuple[str, str]], log: array[int], deadline: int) -> None:
    # One reading of the clock a call: the end of a call is the beginning of the next.
    clock, note = perf_counter_ns, log.append
    now = clock()
    for provider, user_id in keys:
        await operation(provider, user_id)
        then = clock()
        note(then - now)
        if then >= deadline:
            return
        now = then


def summary(samples: Sequence[Sample]) -> dict[str, float]:
    """One round of all processes: ``us`` an operation (rates added), and of latency ``p50`` and ``p99``, all in µs."""
    rate = sum(len(sample.latencies) / sample.elapsed for sample in samples)
    latencies = sorted(latency for sample in samples for latency in sample.latencies)
    return {
        "us": 1 / rate / 1000,
        "p50": percentile(50, latencies) / 1000,
        "p99": percentile(99, latencies) / 1000,
        "operations": len(latencies),
    }


def percentile(percent: float, ordered: Sequence[float]) -> float:
    """Of sorted values, by the nearest rank."""
    return ordered[max(math.ceil(len(ordered) * percent / 100), 1) - 1]


class Spread(NamedTuple):
    """The middle of many rounds, and the range of the middle half of them."""

    low: float
    median: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles, interpolated; one value is its own spread."""
    ordered = sorted(values)

    def at(part: float) -> float:
        place = part * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return Spread(at(0.25), at(0.5), at(0.75))


def bootstrap(before: Sequence[float], after: Sequence[float], draws: int = 2000) -> Spread:
    """The ratio of medians, after to before, in its 99 % interval: what other rounds could have shown as well."""
    dice = random.Random(0)
    ratios = sorted(
        median(dice.choices(after, k=len(after))) / median(dice.choices(before, k=len(before))) for _ in range(draws)
    )
    return Spread(percentile(0.5, ratios), median(after) / median(before), percentile(99.5, ratios))
