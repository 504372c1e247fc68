"""Runs the code blocks of a page of the documentation in order, as a reader of the page does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from support.pages import Block, of_kind

# Absolute paths, because the programs run in other folders.
PYTHONPATH = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]  # noqa: PTH100


@dataclass
class Reader:
    """The state of a reader who follows a page: a folder, environment variables kept between blocks, and programs."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        programs = self.folder / "bin"
        programs.mkdir()
        commands = {name: f"-m {name}" for name in ("tokenstore", "alembic", "pytest")}
        for name, arguments in {**commands, "python": "-W error"}.items():
            program = programs / name
            program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
            program.chmod(0o755)
        activate = self.folder / "work" / ".venv" / "bin" / "activate"
        activate.parent.mkdir(parents=True)
        activate.touch()  # the programs above are on PATH already
        # A reader runs `python manage.py`, which finds modules beside it: the suite's PYTHONSAFEPATH would hide them.
        foreign = ("TOKENSTORE_", "PYTEST_", "PYTHONSAFEPATH")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self.environment = {
            **kept,
            "PATH": f"{programs}{os.pathsep}{kept['PATH']}",
            "PYTHONPATH": os.pathsep.join(PYTHONPATH),
            **self.environment,
        }

    def run(self, block: Block) -> str:
        script = self.folder / "block"
        if block.kind == "python file=":
            path = self.folder / "work" / block.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, "utf-8")
            return ""
        if block.kind.startswith("python"):
            script.write_text(block.text, "utf-8")
            return self._run(block, sys.executable, "-W", "error", str(script))
        state = self.folder / "environment"
        script.write_text(f'set -euo pipefail\n{block.text}env -0 > "{state}"\n', "utf-8")
        printed = self._run(block, "bash", str(script))
        self.environment = dict(line.split("=", 1) for line in state.read_text().split("\0") if line)
        return printed

    def _run(self, block: Block, *command: str) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder / "work",
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{block.place}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


def follow(page: Path, reader: Reader, *kinds: str) -> list[str]:
    """Run the blocks of these kinds, check the output that the page shows, and return the output of each."""
    printed: list[str] = []
    for block in of_kind(page, *kinds, "text output"):
        if block.kind == "text output":
            shown = re.escape(block.text).replace("…", "[^\\n]*")
            assert re.fullmatch(shown, printed[-1]), f"{block.place}\n{printed[-1]}"
        else:
            printed.append(reader.run(block))
    return printed
