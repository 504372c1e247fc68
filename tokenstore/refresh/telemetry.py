"""Logs of a refresh, and OpenTelemetry's metrics and spans if its API is installed.

``docs/observability.md`` lists them. An exception's text may contain a token, so only its type, its code and the place
where it was raised are used.
An exception of a log handler, meter or tracer is ignored: otherwise it could lose tokens that the provider has issued.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from time import perf_counter

from tokenstore.errors import RefreshError
from tokenstore.escaping import escaped
from tokenstore.records import TokenKey

__all__ = ["OUTCOMES", "RefreshReport", "Telemetry"]

OUTCOMES = {
    "refreshed": (logging.INFO, "tokens refreshed"),
    "served": (logging.DEBUG, "tokens already refreshed by another process"),
    "missing": (logging.DEBUG, "no tokens to refresh"),
    "left": (logging.DEBUG, "refresh left to another process"),
    "reauthorization_required": (logging.WARNING, "the user has to log in again"),
    "provider_unavailable": (logging.WARNING, "the provider is unavailable"),
    "provider_refused": (logging.WARNING, "the provider refuses this client"),
    "timeout": (logging.WARNING, "the refresh did not end in time"),
    "not_stored": (logging.ERROR, "new tokens could not be stored"),
    "error": (logging.ERROR, "the refresh failed"),
}
"""For each outcome the level and the text of the log record. From WARNING on, the span is an error, too."""

# Words and short numbers. Any other text might be a token, and is logged as "other".
_CODE = re.compile(r"(?=.{1,64}\Z)[a-z]{1,24}(?:[_.-](?:[a-z]{1,24}|[0-9]{1,4}))*")
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

_Attributes = dict[str, str | bool | int | None]

_logger = logging.getLogger("tokenstore.refresh")
_logger.addHandler(logging.NullHandler())


@dataclass(slots=True)
class RefreshReport:
    """What one refresh did. The attempt fills it in."""

    key: TokenKey
    background: bool  # no caller waited: the token was still valid
    outcome: str = "error"  # a key of OUTCOMES
    code: str | None = None  # the OAuth error code, or another short name
    generation: int | None = None  # the row's at the end, where known
    waited: float = 0.0  # seconds that it waited for another process's lease
    provider_time: float | None = None  # seconds of all calls of the provider; None: it was not called
    joined: int = 0  # callers of this process that joined it
    raised: str | None = None  # the type and place of what the refresher raised last


class Telemetry:
    """Logs and measures refreshes."""

    def __init__(self) -> None:
        self._otel: _OpenTelemetry | None = None
        with suppress(ImportError):
            self._otel = _OpenTelemetry()

    def refresh(self, report: RefreshReport) -> AbstractContextManager[None]:
        """Around a whole refresh: a span; when it ends, a log record and the metrics."""
        return self._around("tokenstore.refresh", "INTERNAL", report, self._end_refresh)

    def provider_call(self, report: RefreshReport) -> AbstractContextManager[None]:
        """Around a call of the provider: a child span. Adds to ``report.provider_time``, also when the call raises."""
        return self._around("tokenstore.provider_call", "CLIENT", report, self._end_call)

    def problem(self, key: TokenKey, event: str, message: str, error: BaseException | None = None) -> None:
        """Log a warning with the message and the error's type; the error's text is not logged."""
        with suppress(Exception):
            _log(logging.WARNING, event, message, key, {"code": type(error).__name__ if error else None})

    def paused(self, key: TokenKey, event: str, code: str, length: float) -> None:
        """Log and count that no call of the provider is made for so many seconds; ``key``: whose call came last."""
        with suppress(Exception):
            fields: dict[str, object] = {"code": _shown(code), "pause": length}
            _log(logging.WARNING, event, "the provider is not called for a while", key, fields)
            if self._otel:
                self._otel.pauses.add(1, {"tokenstore.provider": key.provider})

    @contextmanager
    def _around(
        self,
        name: str,
        kind: str,
        report: RefreshReport,
        end: Callable[[RefreshReport, str | None, float], _Attributes],
    ) -> Iterator[None]:
        """A current span. ``end`` gets a raised exception's name and the seconds, and returns the last attributes."""
        end_span, raised, last, started = None, None, _Attributes(), perf_counter()
        with suppress(Exception):
            end_span = self._otel and self._otel.span(name, kind, report)
        try:
            yield
        except BaseException as exc:
            raised = _name(exc)
            raise
        finally:
            with suppress(Exception):
                last = end(report, raised, perf_counter() - started)
            with suppress(Exception):
                if end_span:
                    end_span(last)

    def _end_refresh(self, report: RefreshReport, raised: str | None, _seconds: float) -> _Attributes:
        if report.outcome == "error" and raised in OUTCOMES:
            report.outcome = raised  # the code of RefreshTimeoutError and of TokensNotStoredError is their outcome
        level, text = OUTCOMES.get(report.outcome, OUTCOMES["error"])
        code = _shown(report.code) or raised
        if self._otel:
            self._otel.count(report)
        fields = ("outcome", "background", "generation", "waited", "provider_time", "joined", "raised")
        _log(level, "refresh", text, report.key, {"code": code, **{name: getattr(report, name) for name in fields}})
        error = (code or report.outcome) if level >= logging.WARNING else None
        return {"tokenstore.outcome": report.outcome, "tokenstore.generation": report.generation, "error.type": error}

    def _end_call(self, report: RefreshReport, raised: str | None, seconds: float) -> _Attributes:
        report.provider_time = (report.provider_time or 0.0) + seconds
        if self._otel:
            self._otel.provider_time.record(seconds, {"tokenstore.provider": report.key.provider})
        return {"error.type": raised}


class _OpenTelemetry:
    """Instruments and spans. Only the API is needed; without an SDK it does nothing."""

    def __init__(self) -> None:
        from opentelemetry import context, metrics, trace

        self._context, self._trace, self._tracer = context, trace, trace.get_tracer("tokenstore")
        meter = metrics.get_meter("tokenstore")

        def histogram(name: str, what: str) -> metrics.Histogram:
            try:
                return meter.create_histogram(name, "s", what, explicit_bucket_boundaries_advisory=_BUCKETS)
            except TypeError:  # the API is older than 1.30
                return meter.create_histogram(name, "s", what)

        self.refreshes = meter.create_counter("tokenstore.refreshes", "{refresh}", "Refreshes that ended")
        self.joined = meter.create_counter("tokenstore.joined_callers", "{caller}", "Callers that joined a refresh")
        self.pauses = meter.create_counter("tokenstore.provider_pauses", "{pause}", "Pauses of all calls of a provider")
        self.lease_wait = histogram("tokenstore.lease_wait", "How long a refresh waited for another process's lease")
        self.provider_time = histogram("tokenstore.provider_time", "How long a call of the provider took")

    def count(self, report: RefreshReport) -> None:
        provider: _Attributes = {"tokenstore.provider": report.key.provider}
        ending: _Attributes = {"tokenstore.outcome": report.outcome, "tokenstore.background": report.background}
        self.refreshes.add(1, provider | ending)
        if report.joined:
            self.joined.add(report.joined, provider)
        if report.waited:
            self.lease_wait.record(report.waited, provider)

    def span(self, name: str, kind: str, report: RefreshReport) -> Callable[[_Attributes], None]:
        """Begin a span and make it the current one. Returns the function that ends it."""
        first: _Attributes = {"tokenstore.provider": report.key.provider, "tokenstore.background": report.background}
        span = self._tracer.start_span(name, kind=self._trace.SpanKind[kind], attributes=first)
        token = self._context.attach(self._trace.set_span_in_context(span))

        def end(last: _Attributes) -> None:
            self._context.detach(token)
            span.set_attributes({name: value for name, value in last.items() if value is not None})
            if error := last.get("error.type"):
                span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, str(error)))
            span.end()

        return end


def _log(level: int, event: str, text: str, key: TokenKey, fields: dict[str, object]) -> None:
    if _logger.isEnabledFor(level):
        told = {name: value for name, value in fields.items() if value and name not in {"outcome", "background"}}
        facts = ", ".join(f"{k} {v:.3f} s" if isinstance(v, float) else f"{k} {v}" for k, v in told.items())
        parts = {name: escaped(part) for name, part in key._asdict().items()}
        extra = {f"tokenstore_{name}": value for name, value in {"event": event, **parts, **fields}.items()}
        _logger.log(level, "%s: %s%s", text, key, f" ({facts})" if facts else "", extra=extra)


def _shown(code: str | None) -> str | None:
    return "other" if code and not _CODE.fullmatch(code) else code


def _name(error: BaseException) -> str:
    return (isinstance(error, RefreshError) and _shown(error.code)) or type(error).__name__
