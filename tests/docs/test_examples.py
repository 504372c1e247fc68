"""The examples run, and the example backend passes the conformance tests."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

from support.page_reader import PYTHONPATH, Reader, follow
from support.pages import BACKENDS, EXAMPLE, Block
from support.paths import ROOT
from tokenstore import ConfigurationError, Keyring, errors, open_store
from tokenstore.registry import schemes
from tokenstore.testing import conformance


def install_example(site: Path, **more: str) -> None:
    """Install the example backend into ``site`` as an installer does, with more entry points."""
    site.mkdir()
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text("utf-8"))["project"]
    shutil.copy(EXAMPLE / "tokenstore_jsonfile.py", site)
    metadata = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir()
    metadata.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in {**points, **more}.items())
        for group, points in project["entry-points"].items()
    ]
    metadata.joinpath("entry_points.txt").write_text("\n".join(lines))


def test_the_example_backend_passes_the_conformance_tests(tmp_path: Path) -> None:
    """The programs and commands of docs/backends.md run, including the example's test."""
    install_example(tmp_path / "site")
    reader = Reader(tmp_path, {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), *PYTHONPATH])})
    shutil.copytree(EXAMPLE, tmp_path / "work" / EXAMPLE.relative_to(ROOT))
    *_, tested, _, all_of_sqlite, _ = follow(BACKENDS, reader, "python", "python file=", "console")
    passed = re.search(r"^(\d+) passed in", tested, re.MULTILINE)
    assert passed, tested
    tests = {name for name in dir(conformance.BackendConformance) if name.startswith("test_")}
    assert int(passed[1]) == len({*tests, "test_agreement"})
    assert re.search(r"^\d+ passed", all_of_sqlite, re.MULTILINE), all_of_sqlite


@pytest.mark.sqlite
def test_the_installed_example_backend_is_found_and_cannot_replace_a_built_in_scheme(
    tmp_path: Path, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the installation its scheme is known; its second entry point, ``sqlite``, has no effect."""
    with pytest.raises(errors.UnknownBackendError):
        open_store("jsonfile:///x.json", keyring=keyring)
    install_example(tmp_path / "site", sqlite="tokenstore_jsonfile:JsonFileBackend")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    try:
        assert "jsonfile" in schemes()
        assert "JsonFileBackend" in repr(open_store(f"jsonfile:///{tmp_path}/x.json", keyring=keyring))
        with pytest.raises(ConfigurationError, match=r"unknown: colour; the options of jsonfile:// are sync"):
            open_store("jsonfile:///x.json?colour=red", keyring=keyring)
        assert "SQLiteBackend" in repr(open_store(f"sqlite:///{tmp_path}/x.db", keyring=keyring))
    finally:
        sys.modules.pop("tokenstore_jsonfile", None)


@pytest.mark.sqlite
@pytest.mark.parametrize("name", ["refresh.py", "row_lock.py"])
def test_the_refresh_examples_make_one_refresh_for_fifty_tasks(name: str, tmp_path: Path) -> None:
    program = (ROOT / "examples" / name).read_text("utf-8")
    printed = Reader(tmp_path).run(Block(f"examples/{name}", "python", "", program))
    assert printed == "50 tasks, 1 token, 1 refresh, 0 reuses\n"
