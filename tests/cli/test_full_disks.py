"""Output that cannot be written: one line that says so, and an exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.command_line import KEYS, RESPONSE, SECRETS, environment

FULL = Path("/dev/full")  # Linux has it


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "--version",
        "keygen",
        "keygen --json",
        "init",
        "put github u1",
        "show github user-0001",
        "show github user-0001 --reveal",
        "list",
        "list --json",
        "delete github user-0001 --yes",
        "refresh-due --refreshers refreshers:refreshers",
        "demo --processes 2 --tasks 2",
    ],
)
def test_a_full_disk_is_one_line_and_exit_6(filled: str, tmp_path: Path, command: str) -> None:
    (tmp_path / "refreshers.py").write_text("refreshers = {'github': print}\n", "utf-8")
    with FULL.open("wb") as output:
        done = subprocess.run(
            [sys.executable, "-m", "tokenstore", *command.split()],
            env=environment(filled, KEYS),
            input=json.dumps(RESPONSE),
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            timeout=120,
            check=False,
        )
    assert done.returncode == 6
    assert done.stderr == "error: input or output failed: No space left on device\n"
    assert not [secret for secret in SECRETS if secret in done.stderr]
