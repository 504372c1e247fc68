"""Runs a command whose standard input is a terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys

import pytest

from support.command_line import KEYS, Done, environment


class Terminal:
    """A command whose standard input is a terminal."""

    def __init__(self, *arguments: str, url: str) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tokenstore", *arguments],
            env=environment(url, KEYS),
            stdin=slave,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that there is no /dev/tty, and questions go to standard error
        )
        os.close(slave)
        self.asked = ""

    def answer(self, question: str, text: str) -> None:
        """Wait for the question, then type an answer. Text typed before the question would be discarded."""
        assert self.process.stderr is not None
        output = ""
        while question not in output:
            readable, _, _ = select.select([self.process.stderr], [], [], 30)
            data = os.read(self.process.stderr.fileno(), 4096).decode() if readable else ""
            if not data:
                self.process.kill()
                pytest.fail(f"the command did not ask {question!r}; its output: {self.finish()}")
            output += data
        self.asked += output
        os.write(self.master, f"{text}\n".encode())

    def finish(self) -> Done:
        out, err = self.process.communicate(timeout=60)
        echoed = b""
        try:
            while data := os.read(self.master, 4096):
                echoed += data
        except OSError:  # raised by Linux when no process has the other end open
            pass
        os.close(self.master)
        return Done(self.process.returncode, out.decode(), self.asked + err.decode() + echoed.decode())
