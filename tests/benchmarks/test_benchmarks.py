"""The benchmarks run, write a file of the documented format, and compare two files. No figure is checked here."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from support.matrix import Row, params
from support.paths import ROOT

SHORT = ("--quick", "--rounds", "2", "--seconds", "0.01", "--rows", "50", "--most-rows", "1000", "--no-peers")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An import path with the benchmarks but without the checkout, so that the installed package is measured."""
    folder = tmp_path_factory.mktemp("path")
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))


def benchmarks(path: str, *arguments: str | Path, code: int = 0, module: str = "benchmarks") -> str:
    """Run the program and return its output."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "160"},
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def measured(path: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a short run."""
    folder = tmp_path_factory.mktemp("run")
    chosen = [word for name in ("load", "store", "rows", "list", "seal") for word in ("--workload", name)]
    output = ("--json", folder / "run.json", "--plots", folder / "plots")
    url = f"sqlite:///{folder}/t.db"
    return folder, benchmarks(path, url, *chosen, "--callers", "1,8", *SHORT, *output)


def cells(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "run.json").read_text("utf-8"))["cells"]
    return found


@pytest.mark.sqlite
def test_a_run_measures_tokenstore_and_the_floors(measured: tuple[Path, str]) -> None:
    """Each workload and number of callers has a cell for each contender."""
    folder, _ = measured
    found = {(cell["workload"], cell["callers"], cell["rows"], cell["contender"]) for cell in cells(folder)}
    for workload in ("load/hot", "load/cold", "load/missing", "store/update", "store/insert"):
        for callers in (1, 8):
            here = {name for what, many, _, name in found if (what, many) == (workload, callers)}
            both = {"tokenstore", "one-hop", "aiosqlite", "core"}
            assert here == both | ({"calling-thread"} if callers == 1 else set())
    assert {("rows", 1, 1000, name) for name in ("tokenstore", "one-hop")} <= found
    assert {("list", 1, 1000, name) for name in ("tokenstore", "keyset-scan")} <= found
    assert {(f"seal/{what}", 1, 0, name) for what in ("seal", "open") for name in ("tokenstore", "aead")} <= found


@pytest.mark.sqlite
def test_the_file_has_all_rounds_and_the_environment(measured: tuple[Path, str]) -> None:
    folder, _ = measured
    document = json.loads((folder / "run.json").read_text("utf-8"))
    assert document.keys() == {"schema", "environment", "settings", "cells"}
    assert document["schema"] == 1
    assert {"python", "platform", "cpus", "versions", "servers"} <= document["environment"].keys()
    assert document["environment"]["servers"]["sqlite"]["version"].startswith("3.")
    assert document["settings"]["rounds"] == 2
    for cell in document["cells"]:
        assert cell["kind"] in {"ours", "floor", "reference"}
        assert len(cell["rounds"]) == 2
        assert all(numbers["us"] > 0 for numbers in cell["rounds"])
        if cell["workload"].startswith(("load", "store")):
            assert {"us", "p50", "p99", "operations"} == cell["rounds"][0].keys()
            assert cell["floor"] == ("" if cell["contender"] == "one-hop" else "one-hop")


@pytest.mark.sqlite
def test_the_tables_name_the_floor_and_the_targets(measured: tuple[Path, str]) -> None:
    _, printed = measured
    assert "\N{MULTIPLICATION SIGN} sqlite3, one hop to its thread" in printed
    assert "Targets" in printed
    assert "list_tokens: growth" in printed


@pytest.mark.sqlite
def test_a_run_drops_its_tables(measured: tuple[Path, str]) -> None:
    import sqlite3

    folder, _ = measured
    connection = sqlite3.connect(folder / "t.db")
    try:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == []
    finally:
        connection.close()


@pytest.mark.sqlite
def test_plots_are_drawn(measured: tuple[Path, str]) -> None:
    folder, printed = measured
    for name in ("callers-sqlite-asyncio", "rows"):
        assert str(folder / "plots" / f"{name}.svg") in printed
        text = "".join(ET.parse(folder / "plots" / f"{name}.svg").getroot().itertext())
        assert "tokenstore" in text
        assert (folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.memory
def test_a_backend_without_floors_is_measured_alone(path: str, tmp_path: Path) -> None:
    """The benchmarks have no floor and no peer for the scheme; workloads that need none still run."""
    chosen = [word for name in ("load", "lock", "refresh", "list") for word in ("--workload", name)]
    benchmarks(path, "memory://", *chosen, "--callers", "1,8", *SHORT, "--json", tmp_path / "run.json")
    found = cells(tmp_path)
    assert {cell["contender"] for cell in found} == {"tokenstore"}
    assert {"load/cold", "lock", "refresh", "list"} <= {cell["workload"] for cell in found}
    [refresh] = [cell for cell in found if cell["workload"] == "refresh"]
    assert [numbers["calls"] for numbers in refresh["rounds"]] == [1, 1]


def invented_run(file: Path, ours: float, floor: float = 100.0, noise: float = 0.02) -> Path:
    """Write a file with one workload: µs for each operation of tokenstore and of a floor, with random noise."""
    random_source = random.Random(ours * floor)
    place = {"database": "d", "loop": "asyncio", "workload": "load/cold", "callers": 1, "rows": 10}
    contenders = (("tokenstore", "ours", "held", ours), ("held", "floor", "", floor))
    cells = [
        {
            **place,
            "contender": name,
            "kind": kind,
            "title": name,
            "floor": against,
            "rounds": [{"us": us * random_source.gauss(1, noise), "p50": us, "p99": us} for _ in range(9)],
        }
        for name, kind, against, us in contenders
    ]
    file.write_text(json.dumps({"schema": 1, "environment": {}, "settings": {}, "cells": cells}))
    return file


@pytest.mark.parametrize(
    ("ours", "floor", "noise", "code", "word"),
    [
        (150, 100, 0.02, 0, "1 same"),
        (195, 100, 0.02, 1, "1 slower"),
        (120, 100, 0.02, 0, "1 faster"),
        pytest.param(300, 200, 0.02, 0, "1 same", id="a slower machine"),
        pytest.param(165, 100, 0.5, 0, "1 same", id="within the noise"),
    ],
)
def test_compare_fails_only_for_a_slowdown_beyond_the_noise(
    ours: float, floor: float, noise: float, code: int, word: str, path: str, tmp_path: Path
) -> None:
    """A change that the floor has too, because the machine became slower, does not count."""
    before = invented_run(tmp_path / "before.json", 150)
    after = invented_run(tmp_path / "after.json", ours, floor, noise)
    assert word in benchmarks(path, "compare", before, after, code=code)


def test_a_file_that_is_missing_or_has_another_format_is_refused(path: str, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"schema": 999}')
    for wrong in (other, tmp_path / "none.json"):
        benchmarks(path, "compare", wrong, wrong, code=1)


@pytest.mark.postgres
@pytest.mark.mysql
def test_without_a_url_the_private_servers_are_measured(path: str) -> None:
    printed = benchmarks(path, "--workload", "load", "--callers", "1", *SHORT)
    assert {"sqlite", "postgresql+asyncpg", "mysql+asyncmy"} <= set(re.findall(r"[\w+]+", printed))


@pytest.mark.parametrize("row", params(names=["postgresql+psycopg", "mariadb+aiomysql"]))
def test_a_load_is_compared_with_that_of_four_columns(row: Row, tmp_path: Path, path: str) -> None:
    url = row.url_for(tmp_path).partition("?")[0]
    printed = benchmarks(path, url, "--workload", "load", "--callers", "1", *SHORT, "--json", tmp_path / "run.json")
    driver = row.name.partition("+")[2]
    assert f"{driver}, held connection, 4 columns" in printed
    found = {cell["workload"] for cell in cells(tmp_path) if cell["contender"] == "held-four"}
    assert found == {"load/hot", "load/cold", "load/missing"}


@pytest.mark.parametrize("row", params(names=["sqlite", "postgresql+asyncpg", "mariadb+asyncmy"]))
def test_the_benchmark_of_sweeps_refreshes_the_due_rows_and_lists_all(row: Row, tmp_path: Path, path: str) -> None:
    url = row.url_for(tmp_path).partition("?")[0]
    printed = benchmarks(path, url, "--rows", "700", "--due", "30", module="benchmarks.sweeps")
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines() if "│" in line]
    figures = {line[0]: line[1:] for line in lines}
    assert figures["refresh_due, none due, ms"]
    assert figures["rows refreshed"] == ["30"]
    assert figures["rows listed"] == ["730"]
    assert float(figures["list --json, first line, s"][0]) > 0
    assert float(figures["list, first line, s"][0]) > 0


@pytest.mark.parametrize("row", params(names=["sqlite", "postgresql+asyncpg"]))
def test_the_refresh_benchmark_counts_connections_and_statements(row: Row, tmp_path: Path, path: str) -> None:
    """During the provider's call, no connection is in use with a lease, and one with a row lock."""
    url = row.url_for(tmp_path).partition("?")[0]
    printed = benchmarks(path, url, "--quick", module="benchmarks.refresh")
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines() if "│" in line]
    in_use = {(line[2], line[3]): int(line[4]) for line in cells if line[2] in ("lease", "row lock")}
    assert in_use["lease", "call"] == 0 < in_use["lease", "all"]
    assert in_use["row lock", "call"] == 1
    [[_, _, _, _, reads, _]] = [line for line in cells if line[2] == "call" and len(line) == 6]
    assert int(reads) > 0


def test_no_grant_is_lost_with_the_store(path: str) -> None:
    """What becomes of the others is a race, which they lose on an idle machine."""
    printed = benchmarks(path, "--grants", "1", "--clients", "4", module="benchmarks.grants")
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines() if "│" in line]
    assert [line[0] for line in lines if line[1] != "tokenstore"] == [
        "Authlib",
        "requests-oauthlib",
        "slack_sdk, Bolt",
        "MCP SDK",
        "FastMCP",
        "FastMCP",
        "httpx2",
    ]
    ours = [line[2:] for line in lines if line[1] == "tokenstore"]
    assert ours == [["4 of 4", "1", "0 of 1"]] * 6
