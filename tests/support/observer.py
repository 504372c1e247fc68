"""Collects all logs, metrics and spans of refreshes, as an operator with everything turned on does."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, Metric
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tokenstore.records import TokenKey
from tokenstore.refresh.telemetry import RefreshReport, Telemetry

LOGGER = "tokenstore.refresh"
KEY = TokenKey("github", "user-123")


@dataclass
class Observer(logging.Handler):
    """A log handler that also collects metrics and spans."""

    reader: InMemoryMetricReader = field(default_factory=InMemoryMetricReader)
    exporter: InMemorySpanExporter = field(default_factory=InMemorySpanExporter)
    records: list[logging.LogRecord] = field(default_factory=list)
    span_ids: list[int] = field(default_factory=list)

    __hash__ = logging.Handler.__hash__

    def __post_init__(self) -> None:
        super().__init__()
        self.meters = MeterProvider([self.reader], shutdown_on_exit=False)
        self.tracers = TracerProvider(shutdown_on_exit=False)
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self.span_ids.append(trace.get_current_span().get_span_context().span_id)

    @property
    def record(self) -> dict[str, Any]:
        """The fields of the only log record."""
        [record] = self.records
        return {name: value for name, value in vars(record).items() if name.startswith("tokenstore")}

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self.exporter.get_finished_spans()}

    @property
    def metrics(self) -> dict[str, Metric]:
        data = self.reader.get_metrics_data()
        return {
            metric.name: metric
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def points(self, name: str) -> list[Any]:
        return list(self.metrics[name].data.data_points)


@contextmanager
def observing() -> Iterator[Observer]:
    observer, logger = Observer(), logging.getLogger(LOGGER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "get_meter", observer.meters.get_meter)
        patch.setattr(trace, "get_tracer", observer.tracers.get_tracer)
        patch.setattr(logger, "propagate", False)
        level = logger.level
        logger.setLevel(logging.DEBUG)
        logger.addHandler(observer)
        try:
            yield observer
        finally:
            logger.removeHandler(observer)
            logger.setLevel(level)


REFRESH_PROGRAM = """
from tokenstore.records import TokenKey
from tokenstore.refresh.telemetry import RefreshReport, Telemetry
telemetry, report = Telemetry(), RefreshReport(TokenKey("github", "user-123"), background=False)
with telemetry.refresh(report):
    with telemetry.provider_call(report):
        pass
    report.outcome, report.waited, report.joined = "refreshed", 1.5, 1
telemetry.problem(report.key, "event", "message")
assert report.provider_time is not None
"""
"""A program that reports a refresh."""


def run_program(program: str) -> str:
    """Run a program in a new process with warnings as errors, and return its output."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def ended(outcome: str, **more: Any) -> RefreshReport:
    """Report a refresh with this outcome, as the engine does."""
    report = RefreshReport(KEY, background=False)
    with Telemetry().refresh(report):
        report.outcome = outcome
        for name, value in more.items():
            setattr(report, name, value)
    return report


class Provided(Exception):
    pass
