"""The README and the tutorial work for a new user: a new copy, an empty home, no virtual environment.

The commands install the project from the package index, so these tests run once, with the other tests of this folder.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.pages import README, TUTORIAL
from support.paths import ROOT

pytestmark = pytest.mark.packaging

# Files that a clone of the repository does not have.
NOT_CLONED = (".git", ".venv", ".tox", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "*.db*")


@dataclass(frozen=True)
class Step:
    """One fenced block of a page: its place, its info string and its text."""

    place: str
    info: str
    text: str


def steps(page: Path) -> list[Step]:
    """Return the blocks in order, without the command that runs the tests, because it would run this test."""
    found = []
    read = page.read_text("utf-8")
    for match in re.finditer(r"^```([^\n]+)\n(.*?)^```$", read, re.MULTILINE | re.DOTALL):
        info, text = match.groups()
        typed = info.startswith(("console", "python")) and info != "python contract"
        if typed and ".venv/bin/tox" not in text:
            line = read.count("\n", 0, match.start()) + 1
            found.append(Step(f"{page.name}:{line}", info, text))
    return found


class Newcomer:
    """A user with a new copy of the project, an empty home, and none of this process's Python settings.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.clone = folder / "clone"
        shutil.copytree(ROOT, self.clone, ignore=shutil.ignore_patterns(*NOT_CLONED))
        self._state = folder / "environment"
        home, programs = folder / "home", folder / "bin"
        home.mkdir()
        programs.mkdir()
        # A script that runs the tested Python, because pyenv's `python3` needs files in the real home.
        python3 = programs / "python3"
        python3.write_text(f'#!/bin/sh\nexec "{Path(sys.executable).resolve()}" "$@"\n')
        python3.chmod(0o755)
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "PYTEST", "TOKENSTORE", "TOX", "VIRTUAL_ENV", "XDG"))
        }
        self._new = {**kept, "HOME": str(home), "PATH": f"{programs}{os.pathsep}{kept['PATH']}"}
        self.open_terminal()

    def open_terminal(self) -> None:
        """Forget what was exported, and which environment was entered."""
        self.environment = {**self._new}

    def type(self, step: Step) -> str:
        """Run the commands of a block and return their output; the exit code of each must be 0."""
        if step.info.startswith("python file="):
            (self.clone / step.info.removeprefix("python file=")).write_text(step.text, "utf-8")
            return ""
        if step.info.startswith("python"):
            return self._run(step, "python", "-c", step.text)
        script = f'set -eo pipefail\n{step.text}env -0 > "{self._state}"\n'
        printed = self._run(step, "bash", "-c", script)
        self.environment = dict(line.split("=", 1) for line in self._state.read_text().split("\0") if line)
        return printed

    def _run(self, step: Step, *command: str) -> str:
        program = shutil.which(command[0], path=self.environment["PATH"])
        assert program is not None, f"{step.place}: {command[0]} is not on PATH"
        done = subprocess.run(
            [program, *command[1:]],
            cwd=self.clone,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, f"{step.place}\n{step.text}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Newcomer:
    return Newcomer(tmp_path_factory.mktemp("newcomer"))


def test_all_commands_of_the_readme_work_in_order(newcomer: Newcomer) -> None:
    """Each command and program ends with exit code 0, and the Quick start prints a record without tokens."""
    newcomer.open_terminal()
    printed = [newcomer.type(step) for step in steps(README)]
    assert "Calls of the provider" in printed[0]
    assert "'access_token': <redacted>" in printed[-1]
    assert not re.search(r"gh[our]_(abc|xyz)", "".join(printed))


def test_all_commands_of_the_tutorial_work_in_order(newcomer: Newcomer) -> None:
    """Its own first command installs what it needs; test_code_blocks.py compares what the others print."""
    newcomer.open_terminal()
    printed = "".join(newcomer.type(step) for step in steps(TUTORIAL))
    assert printed.count("refreshes: 1\n") == 2
    assert "reauthorization_required" in printed
    assert not [*newcomer.clone.glob("tutorial*")]
