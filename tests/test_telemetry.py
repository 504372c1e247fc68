"""What a refresh tells operators, and that none of it is a token."""

from __future__ import annotations

import ast
import asyncio
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import metrics, trace
from opentelemetry.metrics import Histogram, Meter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, Metric
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

import tokenstore
from tokenstore.errors import (
    BackendError,
    ProviderRefusedError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    RefreshTimeoutError,
    TokensNotStoredError,
)
from tokenstore.records import TokenKey, TokenRecord
from tokenstore.refresh.telemetry import _BUCKETS, OUTCOMES, RefreshReport, Telemetry

LOGGER = "tokenstore.refresh"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "observability.md"
KEY = TokenKey("github", "user-123")
FIELDS = {
    *("tokenstore_event", "tokenstore_provider", "tokenstore_user_id", "tokenstore_code"),
    *("tokenstore_outcome", "tokenstore_background", "tokenstore_generation"),
    *("tokenstore_waited", "tokenstore_provider_time", "tokenstore_joined"),
}


class Provided(Exception):
    pass


@dataclass
class Observer(logging.Handler):
    """An operator with everything turned on."""

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
        """The fields of the one record that there is."""
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


@pytest.fixture
def seen() -> Iterator[Observer]:
    with observing() as observer:
        yield observer


def ended(outcome: str, **more: Any) -> RefreshReport:
    report = RefreshReport(KEY, background=False)
    with Telemetry().refresh(report):
        report.outcome = outcome
        for name, value in more.items():
            setattr(report, name, value)
    return report


# -- a refresh -------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_an_outcome(outcome: str, seen: Observer) -> None:
    """One record at its level, one refresh counted, one span, which is an error from a warning on."""
    ended(outcome, code="some_code", generation=7)
    [record] = seen.records
    level, text = OUTCOMES[outcome]
    assert (record.name, record.levelno) == (LOGGER, level)
    assert record.getMessage() == f"{text}: provider 'github', user 'user-123' (code some_code, generation 7)"
    assert seen.record == {
        "tokenstore_event": "refresh",
        "tokenstore_provider": "github",
        "tokenstore_user_id": "user-123",
        "tokenstore_code": "some_code",
        "tokenstore_outcome": outcome,
        "tokenstore_background": False,
        "tokenstore_generation": 7,
        "tokenstore_waited": 0.0,
        "tokenstore_provider_time": None,
        "tokenstore_joined": 0,
    }

    [count] = seen.points("tokenstore.refreshes")
    assert count.value == 1
    assert count.attributes == {
        "tokenstore.outcome": outcome,
        "tokenstore.provider": "github",
        "tokenstore.background": False,
    }
    assert seen.metrics.keys() == {"tokenstore.refreshes"}

    span = seen.spans["tokenstore.refresh"]
    failed = level >= logging.WARNING
    assert span.kind is SpanKind.INTERNAL
    assert span.status.status_code is (StatusCode.ERROR if failed else StatusCode.UNSET)
    assert span.status.description == ("some_code" if failed else None)
    assert span.attributes == {
        "tokenstore.provider": "github",
        "tokenstore.background": False,
        "tokenstore.outcome": outcome,
        "tokenstore.generation": 7,
        **({"error.type": "some_code"} if failed else {}),
    }
    assert span.context is not None
    assert seen.span_ids == [span.context.span_id], "the record can carry the span's id"


def test_a_failure_without_a_code_is_named_by_its_outcome(seen: Observer) -> None:
    ended("timeout")
    assert seen.spans["tokenstore.refresh"].status.description == "timeout"
    assert seen.record["tokenstore_code"] is None


@pytest.mark.parametrize(
    ("error", "outcome", "code"),
    [
        (RefreshTimeoutError("slow"), "timeout", "timeout"),
        (TokensNotStoredError("lost", records=[]), "not_stored", "not_stored"),
        (ReauthorizationRequiredError("no"), "error", "invalid_grant"),
        (BackendError("gone", code="08006"), "error", "BackendError"),
        (asyncio.CancelledError("now"), "error", "CancelledError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else value,
)
def test_what_is_raised_goes_on_and_names_the_outcome(
    error: BaseException, outcome: str, code: str, seen: Observer
) -> None:
    """Where the engine has not said another one."""
    report = RefreshReport(KEY, background=True)
    with pytest.raises(type(error)) as caught, Telemetry().refresh(report):
        raise error
    assert caught.value is error
    assert report.outcome == outcome
    assert (seen.record["tokenstore_outcome"], seen.record["tokenstore_code"]) == (outcome, code)
    assert seen.records[0].levelno == OUTCOMES[outcome][0]
    assert seen.spans["tokenstore.refresh"].status.description == code


def test_waits_and_joined_callers_are_counted(seen: Observer) -> None:
    ended("served", waited=1.25, joined=3)
    ended("refreshed", waited=0.25, joined=2)
    [wait] = seen.points("tokenstore.lease_wait")
    [joined] = seen.points("tokenstore.joined_callers")
    assert (wait.count, wait.sum, wait.attributes) == (2, 1.5, {"tokenstore.provider": "github"})
    assert (joined.value, joined.attributes) == (5, {"tokenstore.provider": "github"})
    assert seen.records[0].getMessage().endswith("(waited 1.250 s, joined 3)")


@pytest.mark.parametrize("code", ["invalid_grant", "temporarily_unavailable", "http_503", "slow-down", "x.y"])
def test_a_code_is_shown(code: str, seen: Observer) -> None:
    ended("provider_unavailable", code=code)
    assert seen.record["tokenstore_code"] == code


@pytest.mark.parametrize(
    "code", ["d41d8cd98f00b204", "gho_abcDEF", "a" * 25, "a\n", "two words", "_", "a_" * 32 + "a", "ü"]
)
def test_a_code_that_may_be_anything_is_not(code: str, seen: Observer) -> None:
    ended("provider_unavailable", code=code)
    with suppress(ProviderRefusedError), Telemetry().provider_call(RefreshReport(KEY, background=False)):
        raise ProviderRefusedError("no", code=code)
    assert seen.record["tokenstore_code"] == "other"
    assert [span.status.description for span in seen.spans.values()] == ["other", "other"]


@pytest.mark.parametrize("text", ["a\nERROR forged", "a\r", "\x1b[2J", "a\u2028b", "\u202egnp"])
def test_no_key_writes_a_line_of_its_own(text: str, seen: Observer) -> None:
    """Neither in the message nor in a format that shows the fields."""
    telemetry = Telemetry()
    with telemetry.refresh(RefreshReport(TokenKey(text, text), background=False)):
        pass
    telemetry.problem(TokenKey(text, text), "event", "a problem")
    shape = logging.Formatter("%(message)s %(tokenstore_provider)s %(tokenstore_user_id)s")
    for record in seen.records:
        assert shape.format(record).isprintable()


# -- the provider ----------------------------------------------------------------------------------


def test_a_call_of_the_provider_is_a_child_and_timed(seen: Observer) -> None:
    telemetry, report = Telemetry(), RefreshReport(KEY, background=False)
    with telemetry.refresh(report):
        with telemetry.provider_call(report):
            assert report.provider_time is None
        report.outcome = "refreshed"
    call, refresh = seen.spans["tokenstore.provider_call"], seen.spans["tokenstore.refresh"]
    assert call.parent == refresh.context
    assert call.kind is SpanKind.CLIENT
    assert call.status.status_code is StatusCode.UNSET
    assert call.attributes == {"tokenstore.provider": "github", "tokenstore.background": False}
    [time] = seen.points("tokenstore.provider_time")
    assert (time.count, time.sum, time.attributes) == (1, report.provider_time, {"tokenstore.provider": "github"})
    assert seen.record["tokenstore_provider_time"] == report.provider_time


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ReauthorizationRequiredError("no"), "invalid_grant"),
        (ProviderUnavailableError("no", code="http_502"), "http_502"),
        (Provided("no"), "Provided"),
        (asyncio.CancelledError(), "CancelledError"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_call_that_raises_is_timed_too(error: BaseException, code: str, seen: Observer) -> None:
    telemetry, report = Telemetry(), RefreshReport(KEY, background=False)
    for _ in range(2):
        with pytest.raises(type(error)), telemetry.provider_call(report):
            raise error
    [time] = seen.points("tokenstore.provider_time")
    assert (time.count, time.sum) == (2, report.provider_time), "several calls add up"
    call = seen.spans["tokenstore.provider_call"]
    assert (call.status.status_code, call.status.description) == (StatusCode.ERROR, code)
    assert call.attributes is not None
    assert call.attributes["error.type"] == code
    assert not call.events


def test_the_span_belongs_to_whoever_started_the_task(seen: Observer) -> None:
    telemetry = Telemetry()

    async def refresh() -> None:
        with telemetry.refresh(RefreshReport(KEY, background=False)):
            await asyncio.sleep(0)

    async def main() -> None:
        with trace.get_tracer("test").start_as_current_span("request"):
            task = asyncio.create_task(refresh())
        await task
        assert not trace.get_current_span().get_span_context().is_valid

    asyncio.run(main())
    assert seen.spans["tokenstore.refresh"].parent == seen.spans["request"].context


# -- problems --------------------------------------------------------------------------------------


def test_a_problem(seen: Observer) -> None:
    Telemetry().problem(KEY, "on_refreshed", "the callback on_refreshed raised", Provided("gho_abc"))
    [record] = seen.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "the callback on_refreshed raised: provider 'github', user 'user-123' (code Provided)"
    )
    assert seen.record == {
        "tokenstore_event": "on_refreshed",
        "tokenstore_provider": "github",
        "tokenstore_user_id": "user-123",
        "tokenstore_code": "Provided",
    }


def test_a_problem_without_an_error(seen: Observer) -> None:
    Telemetry().problem(KEY, "event", "words")
    assert seen.records[0].getMessage() == "words: provider 'github', user 'user-123'"


class Broken:
    """A handler, meter, tracer or span that raises whatever is asked of it."""

    level = 0

    def __getattr__(self, name: str) -> Callable[..., object]:
        def method(*args: object, **options: object) -> object:
            raise Provided(name)

        return method


class BreaksLater(Broken):
    """Its instruments and spans are the broken ones."""

    def __getattr__(self, name: str) -> Callable[..., object]:
        return lambda *args, **options: Broken()


@pytest.mark.parametrize("tracer", [Broken(), BreaksLater()], ids=["tracer", "span"])
def test_nothing_that_watches_costs_the_tokens(tracer: object, seen: Observer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "get_meter", lambda name: BreaksLater())
    monkeypatch.setattr(trace, "get_tracer", lambda name: tracer)
    monkeypatch.setattr(seen, "emit", Broken().emit)
    telemetry, report = Telemetry(), RefreshReport(KEY, background=False)
    tokens = None
    with telemetry.refresh(report):
        with telemetry.provider_call(report):
            tokens = "issued"
        report.outcome = "refreshed"
    telemetry.problem(KEY, "event", "words")
    assert tokens == "issued"
    assert report.provider_time is not None
    assert not trace.get_current_span().get_span_context().is_valid


# -- without what is not there ---------------------------------------------------------------------

REFRESH = """
from tokenstore.records import TokenKey
from tokenstore.refresh.telemetry import RefreshReport, Telemetry
telemetry, report = Telemetry(), RefreshReport(TokenKey("github", "user-123"), background=False)
with telemetry.refresh(report):
    with telemetry.provider_call(report):
        pass
    report.outcome, report.waited, report.joined = "refreshed", 1.5, 1
telemetry.problem(report.key, "event", "words")
assert report.provider_time is not None
"""


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("absent", ["opentelemetry", "opentelemetry.metrics", "opentelemetry.sdk"])
def test_a_package_is_absent(absent: str) -> None:
    """No OpenTelemetry; only its namespace; only its API. Nothing is printed by a library, either."""
    assert run(f"import sys; sys.modules[{absent!r}] = None\n{REFRESH}") == ""


def test_importing_the_store_loads_no_opentelemetry() -> None:
    loaded = run("import sys, tokenstore, tokenstore.refresh.telemetry; print(*sys.modules)").split()
    assert "tokenstore.refresh.telemetry" in loaded
    assert not [name for name in loaded if name.startswith("opentelemetry")]


def test_providers_that_are_set_up_later_are_used() -> None:
    """A store may be opened before the application has configured OpenTelemetry."""
    setup = """
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
reader = InMemoryMetricReader()
metrics.set_meter_provider(MeterProvider([reader]))
"""
    program = REFRESH.replace("with telemetry.refresh", f"{setup}with telemetry.refresh")
    assert "tokenstore.lease_wait" in run(f"{program}print(reader.get_metrics_data().to_json())")


def advice_is_known() -> bool:
    return "explicit_bucket_boundaries_advisory" in Meter.create_histogram.__code__.co_varnames


@pytest.mark.skipif(not advice_is_known(), reason="the API is older than 1.30")
def test_histograms_suggest_buckets_for_seconds(seen: Observer) -> None:
    ended("refreshed", waited=1.0)
    assert seen.points("tokenstore.lease_wait")[0].explicit_bounds == _BUCKETS


def test_an_api_without_suggestions_will_do(seen: Observer, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = seen.meters.get_meter("old")
    create = meter.create_histogram

    def older(name: str, unit: str = "", description: str = "") -> Histogram:
        return create(name, unit, description)

    monkeypatch.setattr(meter, "create_histogram", older)
    monkeypatch.setattr(metrics, "get_meter", lambda name: meter)
    ended("refreshed", waited=1.0)
    assert seen.points("tokenstore.lease_wait")[0].count == 1


def test_a_log_that_is_off_costs_nothing(seen: Observer) -> None:
    """Not even the key is looked at."""

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


# -- secrets ---------------------------------------------------------------------------------------

TOKENS = st.one_of(
    st.from_regex(r"gh[or]_[A-Za-z0-9]{36}", fullmatch=True),
    st.from_regex(r"[0-9a-f]{40}", fullmatch=True),
    st.from_regex(r"eyJ[A-Za-z0-9]{30}\.eyJ[A-Za-z0-9_-]{30}\.[A-Za-z0-9_-]{43}", fullmatch=True),
    st.from_regex(r"1//0[A-Za-z0-9_-]{60}", fullmatch=True),
)


def errors_with(token: str) -> list[BaseException]:
    cause = Provided(token)
    cause.add_note(token)
    record = TokenRecord(provider="github", user_id="user-123", access_token=token, refresh_token=token)
    errors: list[BaseException] = [
        cause,
        KeyError({"refresh_token": token}),
        ProviderUnavailableError(token, code=token),
        ProviderRefusedError(f"refused {token}"),
        TokensNotStoredError(token, records=[record]),
        asyncio.CancelledError(token),
    ]
    for error in errors[1:]:
        error.__cause__ = cause
    return errors


@given(TOKENS, st.integers(0, 5), st.sampled_from([*OUTCOMES, "unheard of"]), st.booleans())
def test_nothing_that_is_told_holds_a_token(token: str, which: int, outcome: str, in_code: bool) -> None:
    """Whatever an error's text, arguments, notes, causes, records and code hold."""
    error = errors_with(token)[which]
    with observing() as seen:
        telemetry, report = Telemetry(), RefreshReport(KEY, background=False)
        with suppress(type(error)), telemetry.refresh(report):
            report.outcome, report.code, report.waited, report.joined = outcome, token if in_code else None, 0.1, 1
            with telemetry.provider_call(report):
                raise error
        telemetry.problem(KEY, "event", "words", error)
        assert len(seen.records) == 2
        assert seen.spans.keys() == {"tokenstore.refresh", "tokenstore.provider_call"}
        data = seen.reader.get_metrics_data()
        assert data is not None
        told = [data.to_json(), *(span.to_json() for span in seen.spans.values())]
        for record in seen.records:
            assert record.exc_info is None
            told += [logging.Formatter().format(record), repr(vars(record))]
    assert not [text for text in told if token in text]
    for text in told[:3]:
        assert KEY.user_id not in text


# -- the page --------------------------------------------------------------------------------------


def tables() -> list[list[list[str]]]:
    """The cells of each table of the page, without its two header lines."""
    found = re.findall(r"(?:^\|.*\|\n)+", PAGE.read_text("utf-8"), re.MULTILINE)
    return [[[cell.strip() for cell in row.split("|")[1:-1]] for row in rows.splitlines()[2:]] for rows in found]


def codes(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


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
    refreshed, problem = (json.loads(line) for line in run(block + REFRESH).splitlines())
    assert (refreshed["level"], refreshed["tokenstore_outcome"], refreshed["tokenstore_waited"]) == (
        "INFO",
        "refreshed",
        1.5,
    )
    assert (problem["level"], problem["tokenstore_event"]) == ("WARNING", "event")


def test_the_page_is_short_and_tells_the_buckets() -> None:
    text = PAGE.read_text("utf-8")
    assert len(text.splitlines()) <= 70
    assert f"from {_BUCKETS[0] * 1000:g} ms to {_BUCKETS[-1]:g} s" in text
