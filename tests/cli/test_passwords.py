"""No command prints the password of a URL."""

from __future__ import annotations

import re
from typing import Any

import pytest
from sqlalchemy import make_url

from support.command_line import COMMANDS, PASSWORD, cli, process
from support.matrix import ROWS, Row

SECRET_URL = f"postgresql://someone:{PASSWORD}@127.0.0.1:1/db"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        [SECRET_URL],
        ["list", SECRET_URL],
        ["list", "--uri", SECRET_URL],
        ["list", f"--uri={SECRET_URL}"],
        ["keygen", SECRET_URL],
        ["demo", "--tasks", SECRET_URL],
        ["show", "github", "u1", "--url"],
        ["init", "--url", f"postgres//someone:{PASSWORD}@h/db"],
        ["init", "--url", f"postgresql://someone:{PASSWORD}@h:port/db"],
        ["init", "--url", f"postgresql://someone:{PASSWORD}/x@h:1/db"],
        ["init", "--url", f"postgresql://h/db?password={PASSWORD}"],
        ["init", "--url", f"oracle://someone:{PASSWORD}@h/db"],
        ["init", "--url", SECRET_URL],
        ["list", "--url", SECRET_URL],
        ["demo", "--url", SECRET_URL],
        ["--url", SECRET_URL, "--json", "list"],
    ],
    ids=" ".join,
)
def test_no_usage_error_and_no_help_page_prints_the_password(arguments: list[str]) -> None:
    done = process(*arguments, url=SECRET_URL)
    assert done.code in ({0} if "--help" in arguments else {2, 3})
    assert PASSWORD not in done.out + done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_s_help_prints_the_password(command: str) -> None:
    done = cli(command, "--help", url=SECRET_URL)
    assert done.code == 0
    assert PASSWORD not in done.out + done.err


_servers = [row for row in ROWS if row.shared and row.mark != "sqlite"]
_on_servers = [pytest.param(row, id=row.name, marks=getattr(pytest.mark, row.mark)) for row in _servers]


@pytest.mark.parametrize("wrong", ["password", "host", "port", "database"])
@pytest.mark.parametrize("row", _on_servers)
def test_the_error_for_an_unreachable_server_has_exit_code_3_and_no_password(row: Row, url: str, wrong: str) -> None:
    parts = make_url(url)
    changes: dict[str, dict[str, Any]] = {
        "password": {"password": PASSWORD},
        "host": {"host": "nowhere.invalid", "password": PASSWORD},
        "port": {"port": 1, "password": PASSWORD},
        "database": {"database": "no_such_database"},
    }
    broken = parts.set(**changes[wrong])
    done = cli("list", url=broken.render_as_string(hide_password=False))
    assert (done.code, done.out) == (3, "")
    assert re.fullmatch(r"error: .+\n", done.err)
    words = {"password": "check the user name and the password", "database": "check the database's name"}
    assert words.get(wrong, "cannot be reached") in done.err
    assert broken.password is not None
    assert broken.password not in done.err
