"""Fixtures of all tests, leak checks, Hypothesis profiles, and the summary of backends."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from support.matrix import ROWS, Row
from tokenstore import Keyring
from tokenstore.keyring import KEYS_VARIABLE

_common: dict[str, Any] = {
    "deadline": None,  # on a shared machine, a slow example is not an error
    "print_blob": True,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow],
}
# `ci` always runs the same examples, so that only a change of the code can make it fail; the others try new ones.
hypothesis.settings.register_profile("ci", max_examples=40, derandomize=True, database=None, **_common)
hypothesis.settings.register_profile("dev", max_examples=40, **_common)
hypothesis.settings.register_profile("soak", max_examples=2000, **_common)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))

_ABSENT = pytest.StashKey[dict[str, str]]()
_LEAK_GRACE = 5.0
_DESCRIPTORS = Path("/proc/self/fd")  # on Linux


@pytest.fixture
def url(row: Row, tmp_path: Path) -> str:
    """A URL of the test's row of the matrix; its table or file does not exist yet."""
    return row.url_for(tmp_path)


@pytest.fixture(scope="session")
def keyring() -> Keyring:
    return Keyring({"k1": bytes(range(32))})


@pytest.fixture(autouse=True)
def _no_keys_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    """Check that the test left no thread or socket behind. Unfinished tasks cause warnings, which are errors."""
    threads, sockets = set(threading.enumerate()), _sockets()
    yield
    deadline = time.monotonic() + _LEAK_GRACE
    while True:
        # Read the clock before the check: on a busy machine a garbage collection may take longer than the deadline,
        # and its result must still be checked once.
        late = time.monotonic() > deadline
        new_threads, new_sockets = set(threading.enumerate()) - threads, _sockets() - sockets
        if not new_threads | new_sockets:
            return
        if late:
            pytest.fail(f"left behind: threads {new_threads or 'none'}, sockets {new_sockets or 'none'}", pytrace=False)
        gc.collect()  # frees objects in reference cycles; an unclosed one warns, which is an error here
        time.sleep(0.01)


def _sockets() -> set[str]:
    found = set()
    for link in _DESCRIPTORS.iterdir() if _DESCRIPTORS.exists() else ():
        with suppress(OSError):  # the descriptor of this listing itself is closed already
            found.add(str(link.readlink()))
    return {target for target in found if target.startswith("socket:")}


def _row_of(item: pytest.Item) -> Row | None:
    callspec = getattr(item, "callspec", None)
    return next((value for value in callspec.params.values() if isinstance(value, Row)), None) if callspec else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests of rows that cannot run here; runs after -m and -k, so that only needed servers start."""
    absent = config.stash.setdefault(_ABSENT, {})
    rows = {row.name: row for item in items if (row := _row_of(item))}
    if not config.option.collectonly:
        absent.update({name: why for name, row in rows.items() if (why := row.why_absent())})
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        row = _row_of(item)
        if row is not None:
            item.user_properties.append(("row", row.name))
        (left_out if row is not None and row.name in absent else kept).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(
        session.config, "workeroutput", None
    )  # with pytest-xdist: sent to the controller, which prints the summary
    if output is not None:
        output["absent_rows"] = session.config.stash.get(_ABSENT, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash.setdefault(_ABSENT, {}).update(getattr(node, "workeroutput", {}).get("absent_rows", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print how many tests ran on each backend, and why a backend is absent."""
    counts: dict[str, Counter[str]] = {row.name: Counter() for row in ROWS}
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", ()):
                if name == "row":
                    counts[value][outcome] += 1
    absent = config.stash.get(_ABSENT, {})
    if not absent and not any(counts.values()):
        return
    terminalreporter.section("backends")
    for name, count in counts.items():
        if count:
            parts = [f"{number} {outcome}" for outcome, number in count.items()]
            terminalreporter.write_line(f"{name:20} {', '.join(parts)}")
        elif name in absent:
            terminalreporter.write_line(f"{name:20} absent: {absent[name]}")
