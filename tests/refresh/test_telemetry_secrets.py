"""No log record, metric or span of a refresh contains a token."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from hypothesis import given
from hypothesis import strategies as st

from support.observer import KEY, Provided, observing
from tokenstore.errors import ProviderRefusedError, ProviderUnavailableError, TokensNotStoredError
from tokenstore.records import TokenRecord
from tokenstore.refresh.telemetry import OUTCOMES, RefreshReport, Telemetry

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
def test_no_telemetry_contains_a_token(token: str, which: int, outcome: str, in_code: bool) -> None:
    """Also if the error's text, arguments, notes, causes, records or code contain one."""
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
