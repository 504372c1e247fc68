"""Callers in a closed loop, the latency of each call, and the statistics of many rounds."""

from __future__ import annotations

import asyncio
import math
import os
import random
from array import array
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from typing import Final, NamedTuple

__all__ = [
    "Operation",
    "Sample",
    "Spread",
    "bootstrap",
    "closed_loop",
    "percentile",
    "resident",
    "spread",
    "summary",
]

_STATM: Final = Path("/proc/self/statm")

Operation = Callable[[str, str], Awaitable[object]]
"""An operation on one row, given its provider and user id."""


class Sample(NamedTuple):
    """One measurement of one contender in one process: its duration, and the latency of each call, in nanoseconds."""

    elapsed: int
    latencies: array[int]


async def closed_loop(operations: Sequence[Operation], keys: Iterator[tuple[str, str]], time: float) -> Sample:
    """Let each caller call again as soon as its last call has returned.

    Args:
        operations: The operation of each caller.
        keys: An endless iterator of keys; each call takes the next one.
        time: Duration in seconds. Calls that have begun are finished, and each caller makes at least one.
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
    # Read the clock once a call: the end of one call is the beginning of the next.
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
    """Summarise one round of all processes, in µs.

    Returns:
        ``us``: the time for each operation, from the sum of the processes' rates; ``p50`` and ``p99``: percentiles of
        the latency; ``operations``: the number of calls.
    """
    rate = sum(len(sample.latencies) / sample.elapsed for sample in samples)
    latencies = sorted(latency for sample in samples for latency in sample.latencies)
    return {
        "us": 1 / rate / 1000,
        "p50": percentile(50, latencies) / 1000,
        "p99": percentile(99, latencies) / 1000,
        "operations": len(latencies),
    }


def percentile(percent: float, ordered: Sequence[float]) -> float:
    """Return the percentile of sorted values by the nearest-rank method."""
    return ordered[max(math.ceil(len(ordered) * percent / 100), 1) - 1]


class Spread(NamedTuple):
    """A median with the lower and upper bound of an interval around it."""

    low: float
    median: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return the median and the quartiles, with linear interpolation."""
    ordered = sorted(values)

    def at(part: float) -> float:
        place = part * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return Spread(at(0.25), at(0.5), at(0.75))


def bootstrap(before: Sequence[float], after: Sequence[float], draws: int = 2000) -> Spread:
    """Return the ratio of the medians, after to before, with its 99 % interval, found by resampling the rounds."""
    random_source = random.Random(0)

    def resampled_median(values: Sequence[float]) -> float:
        return median(random_source.choices(values, k=len(values)))

    ratios = sorted(resampled_median(after) / resampled_median(before) for _ in range(draws))
    return Spread(percentile(0.5, ratios), median(after) / median(before), percentile(99.5, ratios))


def resident() -> float:
    """Resident memory of this process in MB; 0 on systems other than Linux."""
    if not _STATM.exists():
        return 0.0
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
