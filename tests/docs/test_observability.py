"""docs/observability.md is correct: its tables are those of the code, and its example works."""

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
    *("tokenstore_event", "tokenstore_provider", "tokenstore_user_id", "tokenstore_code"),
    *("tokenstore_outcome", "tokenstore_background", "tokenstore_generation"),
    *("tokenstore_waited", "tokenstore_provider_time", "tokenstore_joined"),
}


@pytest.fixture
def seen() -> Iterator[Observer]:
    with observing() as observer:
        yield observer


def tables() -> list[list[list[str]]]:
    """The cells of each table of the page, without its two header lines."""
    found = re.findall(r"(?:^\|.*\|\n)+", PAGE.read_text("utf-8"), re.MULTILINE)
    return [[[cell.strip() for cell in row.split("|")[1:-1]] for row in rows.splitlines()[2:]] for rows in found]


LEVELS, LOG_FIELDS, EVENTS, SIGNALS = tables()


def test_the_levels_are_those_of_the_code() -> None:
    told = {outcome: level for level, outcomes in LEVELS for outcome in codes(outcomes)}
    assert told == {outcome: logging.getLevelName(level) for outcome, (level, _) in OUTCOMES.items()}


def test_the_fields_are_those_of_the_code(seen: Observer) -> None:
    """A problem has the first four; none of them is a record's own."""
    ended("refreshed")
    told = [name for cells in LOG_FIELDS for name in codes(cells[0])]
    assert sorted(told) == sorted(seen.record)
    assert {*told} == FIELDS
    seen.records.clear()
    Telemetry().problem(KEY, "event", "words")
    assert sorted(told[:4]) == sorted(seen.record)
    assert {f"tokenstore_{item.name}" for item in fields(RefreshReport)} - {*told} == {"tokenstore_key"}


def test_the_events_are_those_of_the_engine() -> None:
    """A callback's name is its event, and what ``_tell`` gets."""
    found = {
        str(call.args[1].value)
        for module in Path(str(tokenstore.__file__)).parent.rglob("*.py")
        for call in ast.walk(ast.parse(module.read_text("utf-8")))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in {"problem", "_tell"}
        and isinstance(call.args[1], ast.Constant)
    }
    assert {event for cells in EVENTS for event in codes(cells[0])} == found


def test_the_metrics_and_spans_are_those_of_the_code(seen: Observer) -> None:
    telemetry, report = Telemetry(), RefreshReport(KEY, background=False, generation=1, waited=0.5, joined=1)
    with suppress(Provided), telemetry.refresh(report), telemetry.provider_call(report):
        raise Provided
    found = {}
    for name, metric in seen.metrics.items():
        kind = "histogram" if "explicit_bounds" in json.loads(metric.to_json())["data"]["data_points"][0] else "counter"
        found[name] = (kind, metric.unit, {*seen.points(name)[0].attributes})
        assert metric.description
    for name, span in seen.spans.items():
        found[name] = (f"{span.kind.name.lower()} span", "", {*(span.attributes or {})})
    told = {name.strip("`"): (kind, unit.strip("`"), {*codes(last)}) for name, kind, unit, last in SIGNALS}
    assert told == found


def test_the_logging_that_is_shown_works() -> None:
    [block] = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    refreshed, problem = (json.loads(line) for line in run_program(block + REFRESH_PROGRAM).splitlines())
    assert (refreshed["level"], refreshed["tokenstore_outcome"], refreshed["tokenstore_waited"]) == (
        "INFO",
        "refreshed",
        1.5,
    )
    assert (problem["level"], problem["tokenstore_event"]) == ("WARNING", "event")


def test_the_page_is_short_and_tells_the_buckets() -> None:
    text = PAGE.read_text("utf-8")
    assert len(text.splitlines()) <= 75
    assert f"from {_BUCKETS[0] * 1000:g} ms to {_BUCKETS[-1]:g} s" in text
