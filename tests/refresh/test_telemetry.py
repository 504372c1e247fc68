"""The log records, counters and spans of a refresh."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

import pytest
from opentelemetry import metrics, trace
from opentelemetry.trace import SpanKind, StatusCode

from support.observer import KEY, LOGGER, Observer, Provided, ended
from tokenstore.errors import (
    BackendError,
    ProviderRefusedError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    RefreshTimeoutError,
    TokensNotStoredError,
)
from tokenstore.records import TokenKey
from tokenstore.refresh.telemetry import OUTCOMES, RefreshReport, Telemetry

# -- a refresh -------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_each_outcome_has_one_log_record_one_count_and_one_span(outcome: str, seen: Observer) -> None:
    """The record has the outcome's level; from WARNING on, the span has the status of an error."""
    ended(outcome, code="some_code", generation=7)
    [record] = seen.records
    level, text = OUTCOMES[outcome]
    assert (record.name, record.levelno) == (LOGGER, level)
    assert record.getMessage() == f"{text}: provider 'github', user 'user-123' (code some_code, generation 7)"
    assert seen.record == {
        "tokenstore_event": "refresh",
        "tokenstore_provider": "github",
        "tokenstore_user_id": "user-123",
        "tokenstore_account": "",
        "tokenstore_code": "some_code",
        "tokenstore_outcome": outcome,
        "tokenstore_background": False,
        "tokenstore_generation": 7,
        "tokenstore_waited": 0.0,
        "tokenstore_provider_time": None,
        "tokenstore_joined": 0,
        "tokenstore_raised": None,
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
    assert seen.span_ids == [span.context.span_id], "the log record was not made inside the span"


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
def test_an_exception_is_passed_on_and_decides_the_outcome(
    error: BaseException, outcome: str, code: str, seen: Observer
) -> None:
    """Unless the engine has set another outcome."""
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
def test_a_known_kind_of_code_is_logged(code: str, seen: Observer) -> None:
    ended("provider_unavailable", code=code)
    assert seen.record["tokenstore_code"] == code


@pytest.mark.parametrize(
    "code", ["d41d8cd98f00b204", "gho_abcDEF", "a" * 25, "a\n", "two words", "_", "a_" * 32 + "a", "ü"]
)
def test_a_code_that_may_contain_anything_is_not_logged(code: str, seen: Observer) -> None:
    ended("provider_unavailable", code=code)
    with suppress(ProviderRefusedError), Telemetry().provider_call(RefreshReport(KEY, background=False)):
        raise ProviderRefusedError("no", code=code)
    assert seen.record["tokenstore_code"] == "other"
    assert [span.status.description for span in seen.spans.values()] == ["other", "other"]


@pytest.mark.parametrize("text", ["a\nERROR forged", "a\r", "\x1b[2J", "a\u2028b", "\u202egnp"])
def test_a_key_cannot_start_a_new_log_line(text: str, seen: Observer) -> None:
    """Neither in the message nor in a log format that contains the fields."""
    telemetry = Telemetry()
    with telemetry.refresh(RefreshReport(TokenKey(text, text, text), background=False)):
        pass
    telemetry.problem(TokenKey(text, text, text), "event", "a problem")
    shape = logging.Formatter("%(message)s %(tokenstore_provider)s %(tokenstore_user_id)s %(tokenstore_account)s")
    for record in seen.records:
        assert shape.format(record).isprintable()


# -- the provider ----------------------------------------------------------------------------------


def test_a_call_of_the_provider_is_a_child_span_and_is_timed(seen: Observer) -> None:
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
    assert (time.count, time.sum) == (2, report.provider_time), "the times of several calls are not added up"
    call = seen.spans["tokenstore.provider_call"]
    assert (call.status.status_code, call.status.description) == (StatusCode.ERROR, code)
    assert call.attributes is not None
    assert call.attributes["error.type"] == code
    assert not call.events


def test_the_span_s_parent_is_the_span_in_which_the_task_was_started(seen: Observer) -> None:
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


def test_a_problem_is_logged_with_the_row_and_the_error_s_type(seen: Observer) -> None:
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
        "tokenstore_account": "",
        "tokenstore_code": "Provided",
    }


def test_a_problem_without_an_error_is_logged_with_the_row(seen: Observer) -> None:
    Telemetry().problem(KEY, "event", "words")
    assert seen.records[0].getMessage() == "words: provider 'github', user 'user-123'"


class Broken:
    """A handler, meter, tracer or span whose methods all raise an error."""

    level = 0

    def __getattr__(self, name: str) -> Callable[..., object]:
        def method(*args: object, **options: object) -> object:
            raise Provided(name)

        return method


class BreaksLater(Broken):
    """A meter or tracer whose instruments and spans are broken."""

    def __getattr__(self, name: str) -> Callable[..., object]:
        return lambda *args, **options: Broken()


@pytest.mark.parametrize("tracer", [Broken(), BreaksLater()], ids=["tracer", "span"])
def test_errors_of_logging_metrics_and_tracing_do_not_fail_a_refresh(
    tracer: object, seen: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
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
