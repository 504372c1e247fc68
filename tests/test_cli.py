"""The command line: what it prints, where, with which exit code; and what it must never print."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import select
import subprocess
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
from sqlalchemy import make_url
from typer.testing import CliRunner

from matrix import ROWS, Row, shared_rows
from tokenstore import Keyring, TokenRecord, generate_key, open_store
from tokenstore.cli.app import app
from tokenstore.keyring import KEYS_VARIABLE
from tokenstore.store import AuthTokenStore

T = TypeVar("T")

KEYS = generate_key("k1")
ACCESS, REFRESH, NESTED = "AT-5f0c-secret", "RT-91be-secret", "ID-77aa-secret"
SECRETS = (ACCESS, REFRESH, NESTED)
RESPONSE = {
    "access_token": ACCESS,
    "refresh_token": REFRESH,
    "expires_in": 3600,
    "refresh_token_expires_in": 7200,
    "token_type": "Bearer",
    "id_token": NESTED,
}
PASSWORD = "hunter2-hidden"  # nothing that a message would hold by chance
COMMANDS = ("keygen", "init", "put", "show", "list", "delete", "refresh-due", "demo")


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Standard output as JSON, one object a line."""
        return [json.loads(line) for line in self.out.splitlines()]


def cli(*arguments: str, url: str | None = None, keys: str | None = KEYS, stdin: str = "", **env: str) -> Done:
    """Run a command in this process."""
    variables = {"TOKENSTORE_URL": url, KEYS_VARIABLE: keys, **env}
    result = CliRunner().invoke(app, arguments, input=stdin, env=variables)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Done(result.exit_code, result.stdout, result.stderr)


def environment(url: str | None, keys: str | None) -> dict[str, str]:
    variables = {"TOKENSTORE_URL": url, KEYS_VARIABLE: keys}
    # Unbuffered, Python takes a write that a closed pipe cut short for a whole one.
    kept = {name: value for name, value in os.environ.items() if name not in {*variables, "PYTHONUNBUFFERED"}}
    return kept | {name: value for name, value in variables.items() if value is not None}


def process(*arguments: str, url: str | None = None, keys: str | None = KEYS, stdin: str = "") -> Done:
    """Run a command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tokenstore", *arguments],
        env=environment(url, keys),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def on_store(url: str, use: Callable[[AuthTokenStore], Awaitable[T]], keys: str = KEYS) -> T:
    async def run() -> T:
        async with open_store(url, keyring=Keyring.from_string(keys)) as store:
            return await use(store)

    return asyncio.run(run())


def load(url: str, provider: str = "github", user: str = "u1") -> TokenRecord | None:
    return on_store(url, lambda store: store.load_tokens(provider, user))


@pytest.fixture
def sqlite(tmp_path: Path) -> str:
    """The URL of a store that is set up and empty."""
    url = f"sqlite:///{tmp_path}/tokens.db"
    on_store(url, lambda store: store.setup())
    return url


@pytest.fixture
def filled(sqlite: str) -> str:
    """The URL of a store with more rows than fit into a pipe."""

    async def fill(store: AuthTokenStore) -> None:
        async with store.transaction() as tx:
            for number in range(1500):
                await tx.store_tokens("github", f"user-{number:04}", ACCESS, REFRESH, None)

    on_store(sqlite, fill)
    return sqlite


def shows_no_secret(*done: Done) -> None:
    for text in (part for one in done for part in (one.out, one.err)):
        assert not [secret for secret in SECRETS if secret in text], text


# -- a row's life, on every database ---------------------------------------------------------------


@shared_rows
def test_a_row_from_init_to_delete(row: Row, url: str) -> None:
    """Each command does its work in text and in JSON, and shows no token unless told to."""
    assert cli("init", url=url, keys=None) == (0, "the token table is ready\n", "")
    assert cli("init", "--json", url=url).rows == [{"ready": True}]
    stored = cli("put", "github", "u1", "--json", url=url, stdin=json.dumps(RESPONSE))
    [summary] = stored.rows
    assert summary["has_refresh_token"]
    assert summary["extra_fields"] == ["id_token", "token_type"]

    shown = cli("show", "github", "u1", "--json", url=url)
    [record] = shown.rows
    stamps = {name: datetime.fromisoformat(record.pop(name)) for name in list(record) if name.endswith("_at")}
    assert all(stamp.utcoffset() == timedelta(0) for stamp in stamps.values())
    assert set(stamps) == {"access_token_expires_at", "refresh_token_expires_at", "created_at", "updated_at"}
    assert stamps["refresh_token_expires_at"] - stamps["access_token_expires_at"] >= timedelta(seconds=3599)
    assert isinstance(record.pop("generation"), int)
    assert record == {
        "provider": "github",
        "user_id": "u1",
        "access_token_valid": True,
        "refresh_token_valid": True,
        "has_refresh_token": True,
        "extra_fields": ["id_token", "token_type"],
        "key_id": "k1",
        "needs_reseal": False,
    }
    text, table = cli("show", "github", "u1", url=url), cli("list", url=url)
    [entry] = cli("list", "--json", url=url).rows
    assert set(entry) == {
        "provider",
        "user_id",
        "access_token_expires_at",
        "refresh_token_expires_at",
        "has_refresh_token",
        "generation",
        "key_id",
        "created_at",
        "updated_at",
        "needs_reseal",
    }
    shows_no_secret(stored, shown, text, table, cli("list", "--json", url=url))
    assert "valid" in text.out

    revealed = cli("show", "github", "u1", "--reveal", "--json", url=url).rows[0]
    assert (revealed["access_token"], revealed["refresh_token"]) == (ACCESS, REFRESH)
    assert revealed["extra"] == {"id_token": NESTED, "token_type": "Bearer"}
    assert all(secret in cli("show", "github", "u1", "--reveal", url=url).out for secret in SECRETS)

    deleted = {"provider": "github", "user_id": "u1", "deleted": True}
    assert cli("delete", "github", "u1", "--yes", "--json", url=url).rows == [deleted]
    assert cli("delete", "github", "u1", "--yes", url=url).code == 1
    assert cli("show", "github", "u1", url=url).code == 1
    assert cli("list", url=url) == (0, "", "no rows\n")


@shared_rows
def test_a_table_that_is_missing_is_a_database_error_that_names_init(row: Row, url: str) -> None:
    done = cli("list", url=url)
    assert (done.code, done.out) == (3, "")
    assert re.fullmatch(r"error: .*tokenstore init.*\n", done.err)


@shared_rows
def test_init_list_and_delete_need_no_keys_put_and_show_do(row: Row, url: str) -> None:
    assert cli("init", url=url, keys=None).code == 0
    assert cli("put", "github", "u1", url=url, stdin=json.dumps(RESPONSE)).code == 0
    [entry] = cli("list", "--json", url=url, keys=None).rows
    assert entry["needs_reseal"] is None  # nobody can tell
    for command in (["show", "github", "u1"], ["put", "github", "u1"]):
        done = cli(*command, url=url, keys=None, stdin=json.dumps(RESPONSE))
        assert done.code == 2
        assert "tokenstore keygen" in done.err
    assert cli("delete", "github", "u1", "--yes", url=url, keys=None).code == 0


@shared_rows
def test_a_row_that_does_not_open_has_an_exit_code_of_its_own(row: Row, url: str) -> None:
    cli("init", url=url)
    cli("put", "github", "u1", url=url, stdin=json.dumps(RESPONSE))
    unknown = cli("show", "github", "u1", url=url, keys=generate_key("other"))
    namesake = cli("show", "github", "u1", "--reveal", url=url, keys=generate_key("k1"))
    assert unknown.code == namesake.code == 4
    shows_no_secret(unknown, namesake)
    rotated = f"{generate_key('k2')},{KEYS}"
    assert [entry["needs_reseal"] for entry in cli("list", "--json", url=url, keys=rotated).rows] == [True]
    assert "k1 (not the primary key)" in cli("list", url=url, keys=rotated).out
    assert cli("show", "github", "u1", "--json", url=url, keys=rotated).rows[0]["needs_reseal"] is True


# -- put -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "options", "expected"),
    [
        pytest.param({"expires_in": 600}, [], 600, id="number"),
        pytest.param({"expires_in": "600"}, [], 600, id="string"),
        pytest.param({"expires_in": 600.5}, [], 600.5, id="fraction"),
        pytest.param({}, [], None, id="none"),
        pytest.param({"expires_in": None}, [], None, id="null"),
        pytest.param({"expires_in": 5}, ["--expires-in", "600"], 600, id="option-wins"),
        pytest.param({"expires_at": 4102444800}, [], datetime(2100, 1, 1, tzinfo=UTC), id="unix-time"),
        pytest.param({"expires_at": "4102444800.0"}, [], datetime(2100, 1, 1, tzinfo=UTC), id="unix-string"),
        pytest.param({"expires_at": "2100-01-01T02:00:00+02:00"}, [], datetime(2100, 1, 1, tzinfo=UTC), id="iso"),
        pytest.param({"expires_at": "2100-01-01"}, [], datetime(2100, 1, 1, tzinfo=UTC), id="naive-is-utc"),
        pytest.param(
            {"access_token_expires_at": "2100-01-01"}, [], datetime(2100, 1, 1, tzinfo=UTC), id="as-show-prints-it"
        ),
        pytest.param(
            {"expires_in": 5, "expires_at": 4102444800}, [], datetime(2100, 1, 1, tzinfo=UTC), id="absolute-wins"
        ),
        pytest.param(
            {"expires_in": 5}, ["--expires-at", "2100-01-01T00:00Z"], datetime(2100, 1, 1, tzinfo=UTC), id="option"
        ),
    ],
)
def test_put_understands_an_expiry(
    sqlite: str, fields: dict[str, Any], options: list[str], expected: float | datetime | None
) -> None:
    before = datetime.now(UTC)
    done = cli("put", "github", "u1", *options, url=sqlite, stdin=json.dumps({"access_token": ACCESS, **fields}))
    assert done.code == 0, done.err
    record = load(sqlite)
    assert record is not None
    found = record["access_token_expires_at"]
    if isinstance(expected, int | float):
        assert before <= found - timedelta(seconds=expected) <= datetime.now(UTC)
    else:
        assert found == expected
    assert (record["refresh_token"], record["extra"]) == (None, {})


@pytest.mark.parametrize(
    ("document", "options"),
    [
        pytest.param(f"{{'access_token': '{ACCESS}'}}", [], id="not-json"),
        pytest.param(json.dumps([ACCESS]), [], id="array"),
        pytest.param("[" * 200_000 + ACCESS, [], id="deep"),
        pytest.param("", [], id="empty"),
        pytest.param(json.dumps({"refresh_token": REFRESH}), [], id="no-access-token"),
        pytest.param(json.dumps({"access_token": ""}), [], id="empty-access-token"),
        pytest.param(json.dumps({"access_token": [ACCESS]}), [], id="not-text"),
        pytest.param(json.dumps({**RESPONSE, "expires_in": ACCESS}), [], id="expires_in-text"),
        pytest.param(json.dumps({**RESPONSE, "expires_in": -1}), [], id="expires_in-negative"),
        pytest.param(json.dumps({**RESPONSE, "expires_in": True}), [], id="expires_in-bool"),
        pytest.param(json.dumps({**RESPONSE, "expires_in": 1e300}), [], id="expires_in-huge"),
        pytest.param(json.dumps({**RESPONSE, "expires_in": float("nan")}), [], id="expires_in-nan"),
        pytest.param(json.dumps({**RESPONSE, "expires_at": ACCESS}), [], id="expires_at-text"),
        pytest.param(json.dumps({**RESPONSE, "expires_at": [1]}), [], id="expires_at-array"),
        pytest.param(json.dumps({**RESPONSE, "refresh_token_expires_in": {}}), [], id="refresh-object"),
        pytest.param(json.dumps({**RESPONSE, "id_token": float("inf")}), [], id="extra-inf"),
        pytest.param(json.dumps({**RESPONSE, "pad": "x" * 5_000_000}), [], id="too-long"),
        pytest.param(json.dumps(RESPONSE), ["--expires-in", "5", "--expires-at", "2100-01-01"], id="both-options"),
        pytest.param(json.dumps(RESPONSE), ["--expires-at", "tomorrow"], id="bad-option"),
        pytest.param(json.dumps(RESPONSE), ["--refresh-expires-in", "soon"], id="no-number"),
    ],
)
def test_put_refuses_what_is_no_token_response_without_repeating_it(
    sqlite: str, document: str, options: list[str]
) -> None:
    done = cli("put", "github", "u1", *options, url=sqlite, stdin=document)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    shows_no_secret(done)
    assert load(sqlite) is None


def test_put_replaces_the_whole_row(sqlite: str) -> None:
    cli("put", "github", "u1", url=sqlite, stdin=json.dumps(RESPONSE))
    cli("put", "github", "u1", url=sqlite, stdin=json.dumps({"access_token": "new"}))
    record = load(sqlite)
    assert record is not None
    assert (record["access_token"], record["refresh_token"], record["refresh_token_expires_at"]) == ("new", None, None)


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
            start_new_session=True,  # no /dev/tty, so that the questions come to stderr
        )
        os.close(slave)
        self.asked = ""

    def answer(self, question: str, text: str) -> None:
        """Type something, once asked: what is typed before that is discarded."""
        assert self.process.stderr is not None
        heard = ""
        while question not in heard:
            spoken, _, _ = select.select([self.process.stderr], [], [], 30)
            data = os.read(self.process.stderr.fileno(), 4096).decode() if spoken else ""
            if not data:
                self.process.kill()
                pytest.fail(f"did not ask {question!r} but said {self.finish()}")
            heard += data
        self.asked += heard
        os.write(self.master, f"{text}\n".encode())

    def finish(self) -> Done:
        out, err = self.process.communicate(timeout=60)
        echoed = b""
        try:
            while data := os.read(self.master, 4096):
                echoed += data
        except OSError:  # Linux's way of saying that nobody has the other end open
            pass
        os.close(self.master)
        return Done(self.process.returncode, out.decode(), self.asked + err.decode() + echoed.decode())


def test_put_at_a_terminal_asks_without_echo(sqlite: str) -> None:
    terminal = Terminal("put", "github", "u1", "--expires-in", "60", url=sqlite)
    terminal.answer("Access token: ", ACCESS)
    terminal.answer("Refresh token (empty: none): ", REFRESH)
    done = terminal.finish()
    assert done.code == 0
    shows_no_secret(done)
    record = load(sqlite)
    assert record is not None
    assert (record["access_token"], record["refresh_token"]) == (ACCESS, REFRESH)


# -- delete ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "code"), [("n", 1), ("y", 0)])
def test_delete_at_a_terminal_asks_first(sqlite: str, answer: str, code: int) -> None:
    cli("put", "github", "u1", url=sqlite, stdin=json.dumps(RESPONSE))
    terminal = Terminal("delete", "github", "u1", url=sqlite)
    terminal.answer("[y/N]", answer)
    assert terminal.finish().code == code
    assert (load(sqlite) is None) is (code == 0)


def test_delete_without_a_terminal_wants_yes(sqlite: str) -> None:
    cli("put", "github", "u1", url=sqlite, stdin=json.dumps(RESPONSE))
    done = cli("delete", "github", "u1", url=sqlite, stdin="y\n")
    assert done.code == 2
    assert "--yes" in done.err
    assert load(sqlite) is not None


# -- list ------------------------------------------------------------------------------------------


def test_list_filters(sqlite: str) -> None:
    for provider, user in (("github", "u1"), ("github", "u2"), ("gitlab", "u1")):
        cli("put", provider, user, url=sqlite, stdin=json.dumps(RESPONSE))

    def keys(*options: str) -> list[tuple[str, str]]:
        return [(row["provider"], row["user_id"]) for row in cli("list", "--json", *options, url=sqlite).rows]

    assert keys() == [("github", "u1"), ("github", "u2"), ("gitlab", "u1")]
    assert keys("--provider", "github") == [("github", "u1"), ("github", "u2")]
    assert keys("--user", "u1") == [("github", "u1"), ("gitlab", "u1")]
    assert keys("--user", "u2", "--provider", "gitlab") == []


def test_no_width_cuts_an_id(sqlite: str) -> None:
    user = "u" * 500
    cli("put", "github", user, url=sqlite, stdin=json.dumps(RESPONSE))
    assert cli("list", "--json", url=sqlite, COLUMNS="20").rows[0]["user_id"] == user
    assert user in cli("list", url=sqlite, COLUMNS="20").out
    assert user in cli("show", "github", user, url=sqlite, COLUMNS="20").out


def test_an_id_cannot_steer_the_terminal(sqlite: str) -> None:
    """An id is whatever a provider or user made it: colours, markup and reversed text come out as text."""
    user = "\x1b[2J\u202e[red]\n"
    cli("put", "github", user, url=sqlite, stdin=json.dumps(RESPONSE))
    for arguments in (["list"], ["list", "--json"], ["show", "github", user], ["show", "github", user + "?"]):
        done = cli(*arguments, url=sqlite)
        assert not {"\x1b", "\u202e"} & {*done.out, *done.err}
        assert "[red]" in done.out + done.err


def test_list_of_nothing_is_no_json_at_all(sqlite: str) -> None:
    assert cli("list", "--json", url=sqlite) == (0, "", "")


@pytest.mark.parametrize("options", [["--json"], []], ids=["json", "table"])
def test_a_reader_that_goes_away_ends_the_list_quietly(filled: str, options: list[str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tokenstore", "list", *options],
        env=environment(filled, KEYS),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert running.stdout.readline()
        running.stdout.close()
        assert running.stderr.read() == b""
        assert running.wait(60) == 141


# -- the rest --------------------------------------------------------------------------------------


def test_keygen_prints_an_entry_and_needs_nothing() -> None:
    done = cli("keygen", keys=None)
    assert Keyring.from_string(done.out).names == ("k1",)
    assert cli("keygen", keys=None).out != done.out
    assert Keyring.from_string(cli("keygen", "2026-01", keys=None).out).names == ("2026-01",)
    [entry] = cli("keygen", "k2", "--json", keys=None).rows
    assert entry["name"] == "k2"
    assert Keyring.from_string(entry["entry"]).names == ("k2",)
    assert cli("keygen", "no spaces", keys=None).code == 2


def test_options_before_the_command_count_too(sqlite: str) -> None:
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


def test_without_a_command_it_explains_itself() -> None:
    done = cli()
    assert done.code == 2
    assert "Usage:" in done.out
    assert all(command in done.out for command in COMMANDS)


def test_version() -> None:
    done = cli("--version")
    assert done.code == 0
    assert re.fullmatch(r"tokenstore \S.*\n", done.out)


def test_plain_output_has_no_colour_codes(sqlite: str) -> None:
    cli("put", "github", "u1", url=sqlite, stdin=json.dumps(RESPONSE))
    for done in (process("list", url=sqlite), process("show", "github", "u1", url=sqlite), process("--help")):
        assert done.code == 0
        assert "\x1b" not in done.out + done.err


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_there_is_one_line_that_names_it(missing: str) -> None:
    script = f"import sys; sys.modules[{missing!r}] = None; from tokenstore.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f'error: the command line needs {missing}: pip install "tokenstore[cli]"\n'


def test_the_demo_without_httpx_names_the_extra_and_starts_nothing() -> None:
    script = (
        "import sys; sys.argv = ['tokenstore', 'demo']; sys.modules['httpx'] = None; "
        "from tokenstore.cli import main; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'error: the demo needs httpx: pip install "tokenstore[cli]"\n'


def test_help_loads_nothing_that_it_does_not_need() -> None:
    script = (
        "import sys; sys.argv = ['tokenstore', '--help']\n"
        "from tokenstore.cli import main; code = main()\n"
        "extras = {'authlib', 'httpx', 'multiprocessing', 'opentelemetry', 'rich.progress', 'sqlalchemy', 'sqlite3'}\n"
        "heavy = extras & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# -- refresh-due -----------------------------------------------------------------------------------

REFRESHERS = f"""
from tokenstore import ProviderUnavailableError

async def refresh(record):
    if record["user_id"] == "u-unlucky":
        raise ProviderUnavailableError("down", retry_after=60)
    return {{"access_token": "{ACCESS}", "refresh_token": "{REFRESH}", "expires_in": 3600}}

refreshers = {{"github": refresh}}
secret = "{NESTED}"
broken = None
"""


@pytest.fixture
def due(sqlite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a store with three rows that are due and three that are not; the folder has the refreshers."""

    async def fill(store: AuthTokenStore) -> None:
        soon, later = (datetime.now(UTC) + timedelta(minutes=minutes) for minutes in (5, 60))
        for number in range(3):
            await store.store_tokens("github", f"u{number}", "old", "ghr", soon)
        await store.store_tokens("github", "u-later", "old", "ghr", later)
        await store.store_tokens("github", "u-none", "old", None, soon)
        await store.store_tokens("gitlab", "u-other", "old", "ghr", soon)

    on_store(sqlite, fill)
    module = tmp_path / "my_refreshers.py"
    module.write_text(REFRESHERS, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the command adds the folder
    return sqlite


def test_refresh_due_refreshes_what_expires_soon(due: str) -> None:
    """What has a refresher and a refresh token and expires in time, once; nothing else."""
    done = cli("refresh-due", "--within", "10m", "--refreshers", "my_refreshers:refreshers", url=due)
    assert (done.code, done.out, done.err) == (0, "3 refreshed\n", "")
    again = cli("refresh-due", "--within", "600", "--refreshers", "my_refreshers:refreshers", url=due)
    assert (again.code, again.out) == (0, "nothing due\n")
    for user, expected in (("u0", ACCESS), ("u-later", "old"), ("u-none", "old")):
        record = load(due, user=user)
        assert record is not None
        assert record["access_token"] == expected
    shows_no_secret(done, again)


def test_refresh_due_tells_of_each_row_in_json_and_of_failures_by_exit_code(due: str) -> None:
    async def fill(store: AuthTokenStore) -> None:
        await store.store_tokens("github", "u-unlucky", "old", "ghr", datetime.now(UTC))

    on_store(due, fill)
    done = cli("refresh-due", "--json", url=due, TOKENSTORE_REFRESHERS="my_refreshers:refreshers")
    assert done.code == 5
    outcomes = {row["user_id"]: row["outcome"] for row in done.rows}
    assert outcomes == {"u0": "refreshed", "u1": "refreshed", "u2": "refreshed", "u-unlucky": "failed"}
    [error] = [row["error"] for row in done.rows if row["error"] is not None]
    assert error.startswith("provider 'github', user 'u-unlucky': the provider was unreachable")
    plain = cli("refresh-due", url=due, TOKENSTORE_REFRESHERS="my_refreshers:refreshers")
    assert (plain.code, plain.out) == (5, "1 failed\n")
    assert plain.err.startswith("error: provider 'github', user 'u-unlucky'")
    shows_no_secret(done, plain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--within", "soon"], "--within must be a time such as 90s, 10m, 2h or 1d"),
        ([], "no refreshers: pass --refreshers MODULE:NAME or set TOKENSTORE_REFRESHERS"),
        (["--refreshers", "my_refreshers"], "no refreshers: pass"),
        (["--refreshers", "nowhere:refreshers"], "nowhere:refreshers cannot be imported (ModuleNotFoundError)"),
        (["--refreshers", "my_refreshers:absent"], "my_refreshers:absent cannot be imported (AttributeError)"),
        (["--refreshers", "my_refreshers:secret"], "my_refreshers:secret must be a mapping"),
        (["--refreshers", "my_refreshers:refreshers", "--provider", "gitlab"], "no refresher for provider 'gitlab'"),
    ],
)
def test_refresh_due_says_what_is_missing(due: str, arguments: list[str], message: str) -> None:
    done = cli("refresh-due", *arguments, url=due)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert len(done.err.splitlines()) == 1
    shows_no_secret(done)


# -- the password in a URL -------------------------------------------------------------------------

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
def test_no_mistake_and_no_help_page_repeats_the_password(arguments: list[str]) -> None:
    done = process(*arguments, url=SECRET_URL)
    assert done.code in ({0} if "--help" in arguments else {2, 3})
    assert PASSWORD not in done.out + done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_s_help_repeats_the_password(command: str) -> None:
    done = cli(command, "--help", url=SECRET_URL)
    assert done.code == 0
    assert PASSWORD not in done.out + done.err


_servers = [row for row in ROWS if row.shared and row.mark != "sqlite"]
_on_servers = [pytest.param(row, id=row.name, marks=getattr(pytest.mark, row.mark)) for row in _servers]


@pytest.mark.parametrize("wrong", ["password", "host", "port", "database"])
@pytest.mark.parametrize("row", _on_servers)
def test_a_server_that_refuses_or_cannot_be_found_is_exit_3_without_its_password(
    row: Row, url: str, wrong: str
) -> None:
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
    assert broken.password is not None
    assert broken.password not in done.err
