"""docs/observability.md is correct: its tables match the code, and its example works."""

from __future__ import annotations

import ast
import json
import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import pytest

import tokenstore
from support.observer import KEY, REFRESH_PROGRAM, Observer, Provided, ended, observing, run_program
from support.pages import codes
from support.paths import DOCS
from tokenstore.refresh.telemetry import _BUCKETS, OUTCOMES, RefreshReport, Telemetry

PAGE = DOCS / "observability.md"
FIELDS = {
    *("tokenstore_event", "tokenstore_provider", "tokenstore_user_id", "tokenstore_account", "tokenstore_code"),
    *("tokenstore_outcome", "tokenstore_background", "tokenstore_generation"),
    *("tokenstore_waited", "tokenstore_provider_time", "tokenstore_joined", "tokenstore_raised"),
}


@pytest.fixture
def seen() -> Iterator[Observer]:
    with observing() as observer:
        yield observer


def tables() -> list[list[list[str]]]:
    """Return the cells of each table of the page, without its two header lines."""
    found = re.findall(r"(?:^\|.*\|\n)+", PAGE.read_text("utf-8"), re.MULTILINE)
    return [[[cell.strip() for cell in row.split("|")[1:-1]] for row in rows.splitlines()[2:]] for rows in found]


LEVELS, LOG_FIELDS, EVENTS, SIGNALS = tables()


def test_the_table_of_log_levels_matches_the_code() -> None:
    documented = {outcome: level for level, outcomes in LEVELS for outcome in codes(outcomes)}
    assert documented == {outcome: logging.getLevelName(level) for outcome, (level, _) in OUTCOMES.items()}


def test_the_table_of_log_fields_matches_the_code(seen: Observer) -> None:
    """A refresh logs all fields of the table, and a problem only the first five."""
    ended("refreshed")
    documented = [name for cells in LOG_FIELDS for name in codes(cells[0])]
    assert sorted(documented) == sorted(seen.record)
    assert {*documented} == FIELDS
    seen.records.clear()
    Telemetry().problem(KEY, "event", "message")
    assert sorted(documented[:5]) == sorted(seen.record)
    assert {f"tokenstore_{item.name}" for item in fields(RefreshReport)} - {*documented} == {"tokenstore_key"}


def test_the_table_of_events_matches_the_calls_in_the_code() -> None:
    """The events are the constants that the code passes to ``problem`` and ``_tell``."""
    found = {
        str(call.args[1].value)
        for module in Path(str(tokenstore.__file__)).parent.rglob("*.py")
        for call in ast.walk(ast.parse(module.read_text("utf-8")))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in {"problem", "paused", "_tell"}
        and isinstance(call.args[1], ast.Constant)
    }
    assert {event for cells in EVENTS for event in codes(cells[0])} == found


def test_the_table_of_metrics_and_spans_matches_the_code(seen: Observer) -> None:
    telemetry, report = Telemetry(), RefreshReport(KEY, background=False, generation=1, waited=0.5, joined=1)
    with suppress(Provided), telemetry.refresh(report), telemetry.provider_call(report):
        raise Provided
    telemetry.paused(KEY, "provider_paused", "timeout", 5.0)
    found = {}
    for name, metric in seen.metrics.items():
        kind = "histogram" if "explicit_bounds" in json.loads(metric.to_json())["data"]["data_points"][0] else "counter"
        found[name] = (kind, metric.unit, {*seen.points(name)[0].attributes})
        assert metric.description
    for name, span in seen.spans.items():
        found[name] = (f"{span.kind.name.lower()} span", "", {*(span.attributes or {})})
    documented = {name.strip("`"): (kind, unit.strip("`"), {*codes(last)}) for name, kind, unit, last in SIGNALS}
    assert documented == found


def test_the_logging_example_works() -> None:
    [block] = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    refreshed, problem = (json.loads(line) for line in run_program(block + REFRESH_PROGRAM).splitlines())
    assert (refreshed["level"], refreshed["tokenstore_outcome"], refreshed["tokenstore_waited"]) == (
        "INFO",
        "refreshed",
        1.5,
    )
    assert (problem["level"], problem["tokenstore_event"]) == ("WARNING", "event")


def test_the_page_is_short_and_states_the_histogram_buckets() -> None:
    text = PAGE.read_text("utf-8")
    assert len(text.splitlines()) <= 100
    assert f"from {_BUCKETS[0] * 1000:g} ms to {_BUCKETS[-1]:g} s" in text
