"""Telemetry without OpenTelemetry, with only its API, and with logging turned off."""

from __future__ import annotations

import logging

import pytest
from opentelemetry import metrics
from opentelemetry.metrics import Histogram, Meter

from support.observer import LOGGER, REFRESH_PROGRAM, Observer, ended, run_program
from tokenstore.records import TokenKey
from tokenstore.refresh.telemetry import _BUCKETS, RefreshReport, Telemetry


@pytest.mark.parametrize("absent", ["opentelemetry", "opentelemetry.metrics", "opentelemetry.sdk"])
def test_telemetry_works_without_opentelemetry_or_a_part_of_it(absent: str) -> None:
    """Missing are all of OpenTelemetry, or all but its namespace, or all but its API. No library prints anything."""
    assert run_program(f"import sys; sys.modules[{absent!r}] = None\n{REFRESH_PROGRAM}") == ""


def test_importing_the_store_loads_no_opentelemetry() -> None:
    loaded = run_program("import sys, tokenstore, tokenstore.refresh.telemetry; print(*sys.modules)").split()
    assert "tokenstore.refresh.telemetry" in loaded
    assert not [name for name in loaded if name.startswith("opentelemetry")]


def test_opentelemetry_providers_that_are_configured_later_are_used() -> None:
    """A store may be opened before the application configures OpenTelemetry."""
    setup = """
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
reader = InMemoryMetricReader()
metrics.set_meter_provider(MeterProvider([reader]))
"""
    program = REFRESH_PROGRAM.replace("with telemetry.refresh", f"{setup}with telemetry.refresh")
    assert "tokenstore.lease_wait" in run_program(f"{program}print(reader.get_metrics_data().to_json())")


def advice_is_known() -> bool:
    return "explicit_bucket_boundaries_advisory" in Meter.create_histogram.__code__.co_varnames


@pytest.mark.skipif(not advice_is_known(), reason="the API is older than 1.30")
def test_histograms_suggest_buckets_for_seconds(seen: Observer) -> None:
    ended("refreshed", waited=1.0)
    assert seen.points("tokenstore.lease_wait")[0].explicit_bounds == _BUCKETS


def test_an_api_without_bucket_suggestions_works(seen: Observer, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = seen.meters.get_meter("old")
    create = meter.create_histogram

    def older(name: str, unit: str = "", description: str = "") -> Histogram:
        return create(name, unit, description)

    monkeypatch.setattr(meter, "create_histogram", older)
    monkeypatch.setattr(metrics, "get_meter", lambda name: meter)
    ended("refreshed", waited=1.0)
    assert seen.points("tokenstore.lease_wait")[0].count == 1


def test_with_logging_turned_off_no_message_is_made(seen: Observer) -> None:
    """Not even the key is formatted."""

    class Watched(str):
        __slots__ = ()

        def isprintable(self) -> bool:
            looks.append(self)
            return True

    looks: list[str] = []
    logger = logging.getLogger(LOGGER)
    for level, expected in ((logging.WARNING, 0), (logging.DEBUG, 2)):
        logger.setLevel(level)
        with Telemetry().refresh(report := RefreshReport(TokenKey(Watched("a"), Watched("b")), background=False)):
            report.outcome = "refreshed"
        assert len(looks) == expected
