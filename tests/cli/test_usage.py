"""Usage errors, help, `keygen`, and missing extras."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.command_line import COMMANDS, RESPONSE, cli, process
from tokenstore import Keyring


def test_keygen_prints_an_entry_and_needs_no_url_and_no_keys() -> None:
    done = cli("keygen", keys=None)
    assert Keyring.from_string(done.out).names == ("k1",)
    assert cli("keygen", keys=None).out != done.out
    assert Keyring.from_string(cli("keygen", "2026-01", keys=None).out).names == ("2026-01",)
    [entry] = cli("keygen", "k2", "--json", keys=None).rows
    assert entry["name"] == "k2"
    assert Keyring.from_string(entry["entry"]).names == ("k2",)
    assert cli("keygen", "no spaces", keys=None).code == 2


def test_options_before_the_command_are_used(sqlite: str) -> None:
    assert cli("--url", sqlite, "--json", "init").rows == [{"ready": True}]
    assert cli("--url", "sqlite:///nowhere/at/all.db", "init", "--url", sqlite, url="no URL").code == 0


@pytest.mark.parametrize(
    ("arguments", "url", "words"),
    [
        (["list"], None, "TOKENSTORE_URL"),
        (["list"], "nonsense", "not a URL"),
        (["list"], "oracle://h/d", "no backend for oracle"),
        (["list"], "memory://", "memory:// does not outlive this command"),
        (["demo", "--url", "memory://"], None, "could not share it"),
        (["list"], "sqlite:///x.db?tabel=t", "tabel"),
        (["list", "--provider", ""], "sqlite:///x.db", "provider must not be empty"),
        (["show", "github"], None, "USER"),
        (["shwo"], None, "No such command"),
        (["demo", "--processes", "1"], None, "--processes"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], url: str | None, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli(*arguments, url=url)
    assert (done.code, done.out) == (2, "")
    first, *more = done.err.splitlines()
    assert first.startswith("error: ")
    assert words in first
    assert all(re.fullmatch(r"try: .+ --help", line) for line in more)


def test_without_a_command_the_help_is_printed() -> None:
    done = cli()
    assert done.code == 2
    assert "Usage:" in done.out
    assert all(command in done.out for command in COMMANDS)


def test_version_prints_the_version() -> None:
    done = cli("--version")
    assert done.code == 0
    assert re.fullmatch(r"tokenstore \S.*\n", done.out)


def test_plain_output_has_no_colour_codes(sqlite: str) -> None:
    cli("put", "github", "u1", url=sqlite, stdin=json.dumps(RESPONSE))
    for done in (process("list", url=sqlite), process("show", "github", "u1", url=sqlite), process("--help")):
        assert done.code == 0
        assert "\x1b" not in done.out + done.err


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_the_error_is_one_line_that_names_it(missing: str) -> None:
    script = f"import sys; sys.modules[{missing!r}] = None; from tokenstore.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f'error: the command line needs {missing}: pip install "tokenstore[cli]"\n'


def test_without_httpx_the_demo_s_error_names_the_extra_and_no_process_is_started() -> None:
    script = (
        "import sys; sys.argv = ['tokenstore', 'demo']; sys.modules['httpx'] = None; "
        "from tokenstore.cli import main; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'error: the demo needs httpx: pip install "tokenstore[cli]"\n'


def test_help_loads_no_module_that_it_does_not_need() -> None:
    script = (
        "import sys; sys.argv = ['tokenstore', '--help']\n"
        "from tokenstore.cli import main; code = main()\n"
        "extras = {'authlib', 'httpx', 'multiprocessing', 'opentelemetry', 'rich.progress', 'sqlalchemy', 'sqlite3'}\n"
        "heavy = extras & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
