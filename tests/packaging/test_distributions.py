"""The distributions that users install: the wheel, the sdist and an editable install.

These tests build the project and install it into new environments from the package index, so they run only once, in
tox's environment ``packaging``, and not with each Python.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from configparser import ConfigParser
from email.parser import HeaderParser
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.paths import ROOT

if TYPE_CHECKING:
    from email.message import Message

pytestmark = pytest.mark.packaging

PACKAGES = {"tokenstore", "tokenstore_memory", "tokenstore_sql"}
# All database packages; the core must not import them.
DATABASE_PACKAGES = {"sqlalchemy", "aiosqlite", "sqlite3", "asyncpg", "psycopg", "aiomysql", "asyncmy", "pymysql"}


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without this environment's Python settings, and return its output."""
    # tox sets these variables to the checkout and to its own environment.
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONSAFEPATH", "VIRTUAL_ENV"}}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def contents(wheel: Path) -> dict[str, bytes]:
    """Return the files of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def python_in(environment: Path) -> Path:
    """Make a virtual environment and return its interpreter."""
    venv.create(environment, with_pip=True)
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and with the wheel that was built from it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return out


@pytest.fixture(scope="module")
def sdist(dist: Path) -> Path:
    (path,) = dist.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    (text,) = (data for name, data in contents(wheel).items() if name.endswith(".dist-info/METADATA"))
    return HeaderParser().parsestr(text.decode())


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has the wheel without extras."""
    python = python_in(tmp_path_factory.mktemp("bare") / "env")
    run(python, "-I", "-m", "pip", "install", "--quiet", wheel, cwd=python.parent)
    return python


def test_the_wheel_has_exactly_three_top_level_packages(wheel: Path) -> None:
    """``backends/`` is a source root, not a package, and no other folder of the repository is installed."""
    top = {name.partition("/")[0] for name in contents(wheel)}
    assert {name for name in top if not name.endswith(".dist-info")} == PACKAGES


def test_the_wheel_contains_exactly_the_modules_of_the_checkout(wheel: Path) -> None:
    roots = [ROOT / "tokenstore", ROOT / "backends" / "tokenstore_memory", ROOT / "backends" / "tokenstore_sql"]
    expected = {
        path.relative_to(root.parent).as_posix()
        for root in roots
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in contents(wheel) if ".dist-info/" not in name} == expected


def test_the_wheel_contains_py_typed_in_each_package(wheel: Path) -> None:
    assert {f"{package}/py.typed" for package in PACKAGES} <= contents(wheel).keys()


def test_the_wheel_contains_the_license(wheel: Path, metadata: Message) -> None:
    (packed,) = (data for name, data in contents(wheel).items() if name.endswith(".dist-info/licenses/LICENSE"))
    assert packed == (ROOT / "LICENSE").read_bytes()
    assert metadata["License-Expression"] == "MIT"
    assert metadata.get_all("License-File") == ["LICENSE"]


def test_the_extra_all_contains_all_other_extras(metadata: Message) -> None:
    wanted: dict[str, set[str]] = {extra: set() for extra in metadata.get_all("Provides-Extra", [])}
    for line in metadata.get_all("Requires-Dist", []):
        requirement, _, extra = line.partition("; extra == ")
        if extra:
            wanted[extra.strip("'")].add(requirement)
    everything, _ = (
        wanted.pop("all"),
        wanted.pop("bench"),
    )  # `bench` has the libraries of the benchmarks, which the project does not use
    drivers, clients = {"postgres", "psycopg", "mysql", "asyncmy"}, {"httpx", "httpx2", "requests", "aiohttp"}
    frameworks = {"django", "fastapi", "flask", "starlette"}
    others = {"cli", "oauth", "otel", "testing", "celery", "slack", "authlib", "mcp"}
    assert wanted.keys() == {*drivers, *clients, *frameworks, *others}
    assert everything == set().union(*wanted.values())


def test_pytest_finds_the_plugin_by_its_entry_point(wheel: Path) -> None:
    (text,) = (data for name, data in contents(wheel).items() if name.endswith(".dist-info/entry_points.txt"))
    points = ConfigParser()
    points.read_string(text.decode())
    assert dict(points["pytest11"]) == {"tokenstore": "tokenstore.testing.plugin"}


def test_the_metadata_names_the_tested_pythons(metadata: Message) -> None:
    """The classifiers, ``requires-python`` and tox's environments name the same versions."""
    environments = (ROOT / "tox.ini").read_text(encoding="utf-8")
    tested = re.findall(r"^ +py3(\d+)(?:-short)?$", environments, flags=re.MULTILINE)
    named = [c.rpartition(".")[2] for c in metadata.get_all("Classifier", []) if "Python :: 3." in c]
    assert named == tested
    assert metadata["Requires-Python"] == f">=3.{tested[0]}"


def test_the_distributions_pass_the_checks_of_the_package_index(wheel: Path, sdist: Path) -> None:
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist, cwd=wheel.parent)


def test_a_wheel_built_from_the_checkout_equals_one_built_from_the_sdist(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (direct,) = tmp_path.glob("*.whl")
    assert direct.name == wheel.name
    assert contents(direct) == contents(wheel)


def test_the_sdist_contains_tests_and_docs_but_no_generated_files(sdist: Path) -> None:
    """The tests, docs and the tox file are included; caches, environments and databases are not."""
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "pyproject.toml", "tox.ini"} <= names
    assert Path(__file__).relative_to(ROOT).as_posix() in names
    tops = {name.partition("/")[0] for name in names if "/" in name}
    assert tops == {"backends", "benchmarks", "docs", "examples", "tests", "tokenstore"}
    parts = {part for name in names for part in name.split("/")}
    hidden = {part for part in parts if part.startswith(".")} - {
        ".gitignore"
    }  # hatchling reads its exclusions from .gitignore
    assert not hidden
    assert not parts & {"__pycache__", "build", "dist"}
    assert not {name for name in names if name.endswith((".pyc", ".db", ".db-wal", ".db-shm", ".sqlite3", ".keys"))}


def test_all_modules_without_an_extra_import_with_only_the_core_dependencies(bare: Path, tmp_path: Path) -> None:
    """Drivers, the packages of the command line and pytest are extras."""
    for package in sorted(PACKAGES):
        run(bare, "-I", "-W", "error", "-c", f"import {package}", cwd=tmp_path)


def test_the_core_imports_no_database_package(bare: Path, tmp_path: Path) -> None:
    """Also if one is installed: an import of a backend in the core would load it here."""
    printed = run(
        bare, "-I", "-c", "import sys, tokenstore; print(*{m.partition('.')[0] for m in sys.modules})", cwd=tmp_path
    )
    loaded = set(printed.split())
    assert "tokenstore" in loaded
    assert not loaded & (DATABASE_PACKAGES | PACKAGES - {"tokenstore"})


def test_there_is_no_module_called_backends(bare: Path, tmp_path: Path) -> None:
    find = "import importlib.util as u; print(u.find_spec('backends'), u.find_spec('tests'))"
    assert run(bare, "-I", "-c", find, cwd=tmp_path).split() == ["None", "None"]


def test_without_its_extra_the_command_says_what_to_install(bare: Path, tmp_path: Path) -> None:
    """The script is always installed; without the extra ``cli`` it prints one sentence and no traceback."""
    done = subprocess.run(
        [bare.with_name("tokenstore"), "--help"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    assert done.returncode != 0
    assert "tokenstore[cli]" in done.stderr


def test_an_editable_install_imports_all_three_packages_from_the_checkout(tmp_path: Path) -> None:
    python = python_in(tmp_path / "env")
    run(python, "-I", "-m", "pip", "install", "--quiet", "--editable", ROOT, cwd=tmp_path)
    show = f"import {', '.join(sorted(PACKAGES))}, sys; [print(sys.modules[p].__file__) for p in {sorted(PACKAGES)}]"
    files = [Path(line) for line in run(python, "-I", "-c", show, cwd=tmp_path).splitlines()]
    assert files == [
        ROOT / "tokenstore" / "__init__.py",
        ROOT / "backends" / "tokenstore_memory" / "__init__.py",
        ROOT / "backends" / "tokenstore_sql" / "__init__.py",
    ]


@pytest.mark.skipif("TOX_ENV_NAME" not in os.environ, reason="outside tox, an editable install may be tested")
def test_tox_tests_the_wheel_and_not_the_checkout() -> None:
    for package in sorted(PACKAGES):
        assert Path(str(import_module(package).__file__)).is_relative_to(sys.prefix), package


@pytest.mark.skipif(not (ROOT / ".ci").is_dir(), reason="a source distribution has no CI")
def test_ci_runs_the_command_of_the_readme() -> None:
    """A user who follows the README runs the same command as CI."""
    *_, command = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert command.endswith("tox")
    assert command in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()


def test_all_dependencies_have_a_lower_bound() -> None:
    """The oldest versions are tested, so each dependency must name one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"], *(d for ds in project["optional-dependencies"].values() for d in ds)]
    assert not [d for d in listed if ">=" not in d and not d.startswith("tokenstore[")]
