"""The pytest plugin, in runs of pytest that find it as an installed one."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from support.plugin_metadata import PACKAGES, python_path

pytest_plugins = ["pytester"]

NO_ASYNCIO = ("-p", "no:asyncio")
ASYNCIO = ("-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function")
SESSION_LOOP = (*ASYNCIO, "-o", "asyncio_default_test_loop_scope=session")
THREE_LINES = """
async def test_an_expired_token_is_refreshed(token_store, token_provider):
    await token_provider.login("u1")
    await token_provider.expire("u1")
    assert await token_store.load_fresh_tokens("example", "u1") and token_provider.refreshes == 1
"""
ANYIO = f"""
import pytest

pytestmark = pytest.mark.anyio

@pytest.fixture
def anyio_backend():
    return "asyncio"

{THREE_LINES}"""
NEITHER = """
import asyncio

def test_an_expired_token_is_refreshed(token_store, token_provider):
    async def main():
        await token_provider.login("u1")
        await token_provider.expire("u1")
        assert await token_store.load_fresh_tokens("example", "u1") and token_provider.refreshes == 1
    asyncio.run(main())
"""
SYNC = """
def test_an_expired_token_is_refreshed(sync_token_store, sync_token_provider):
    sync_token_provider.login("u1")
    sync_token_provider.expire("u1")
    assert sync_token_store.load_fresh_tokens("example", "u1") and sync_token_provider.refreshes == 1
"""
# The refresh goes on after the test: the token is still valid, so it is refreshed in the background.
IN_THE_BACKGROUND = """
async def test_a_refresh_in_the_background(token_store, token_provider, token_clock):
    await token_provider.login("u1")
    token_clock.advance(3600 - 100)
    token_provider.server.latency = 0.2
    assert await token_store.load_fresh_tokens("example", "u1")

async def test_another_one(token_store, token_provider):
    assert token_provider.refreshes == 0
"""


@pytest.fixture
def runs(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.Pytester:
    """Runs of pytest in processes of their own, which find the plugin by its entry point."""
    monkeypatch.setenv("PYTHONPATH", python_path(tmp_path / "installed"))
    return pytester


def run(runs: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return runs.runpytest_subprocess("-W", "error", *arguments, timeout=120)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (THREE_LINES, ASYNCIO),
        (THREE_LINES, SESSION_LOOP),
        (ANYIO, NO_ASYNCIO),
        (NEITHER, (*NO_ASYNCIO, "-p", "no:anyio")),
        (SYNC, NO_ASYNCIO),
        (SYNC, ASYNCIO),
    ],
    ids=["pytest-asyncio", "one-event-loop", "anyio", "neither", "sync", "sync-with-pytest-asyncio"],
)
def test_the_three_line_test_passes(runs: pytest.Pytester, text: str, arguments: tuple[str, ...]) -> None:
    runs.makepyfile(text)
    run(runs, *arguments).assert_outcomes(passed=1)


@pytest.mark.parametrize("arguments", [ASYNCIO, SESSION_LOOP], ids=["a-loop-each", "one-event-loop"])
def test_a_refresh_that_goes_on_after_a_test_disturbs_no_other(
    runs: pytest.Pytester, arguments: tuple[str, ...]
) -> None:
    runs.makepyfile(IN_THE_BACKGROUND)
    run(runs, *arguments).assert_outcomes(passed=2)


def test_a_test_that_finds_no_refresh_fails(runs: pytest.Pytester) -> None:
    """Without ``expire`` the token is valid, and nothing is refreshed."""
    runs.makepyfile(THREE_LINES.replace("    await token_provider.expire", "    # await token_provider.expire"))
    result = run(runs, *ASYNCIO)
    result.assert_outcomes(failed=1)
    assert not re.search(r"\b[ar]t_[\w-]{43}", result.stdout.str())


def test_a_project_replaces_the_name_the_refreshers_and_the_store(runs: pytest.Pytester) -> None:
    runs.makeconftest("""
        import pytest
        from tokenstore import Keyring, open_store

        @pytest.fixture
        def token_provider_name():
            return "github"

        @pytest.fixture
        async def token_store(token_refreshers, tmp_path):
            keyring, url = Keyring({"k1": bytes(32)}), f"sqlite:///{tmp_path}/tokens.db"
            async with open_store(url, keyring=keyring, refreshers=token_refreshers) as store:
                await store.setup()
                yield store
    """)
    runs.makepyfile(f"""
        {THREE_LINES.replace("example", "github").replace(chr(10), chr(10) + " " * 8)}
            assert "sqlite" in repr(token_store)
    """)
    run(runs, *ASYNCIO).assert_outcomes(passed=1)


def test_every_test_has_a_store_and_a_provider_of_its_own(runs: pytest.Pytester) -> None:
    runs.makepyfile("""
        import pytest

        @pytest.mark.parametrize("_", range(2))
        async def test_nothing_is_left(_, token_store, token_provider, token_clock):
            assert [entry async for entry in token_store.list_tokens()] == []
            assert token_provider.server.stats().requests == 0
            await token_provider.login("u1")
            await token_provider.expire("u1")
            await token_store.load_fresh_tokens("example", "u1")
            token_provider.server.outage = True
    """)
    run(runs, *ASYNCIO).assert_outcomes(passed=2)


LOADED = """
import sys

HEAVY = {"asyncio", "authlib", "cryptography", "httpx", "hypothesis", "joserfc", "sqlalchemy", "tokenstore_memory"}

def pytest_configure(config):
    loaded = {name.partition(".")[0] for name in sys.modules}
    ours = {name for name in sys.modules if name.startswith("tokenstore.testing")}
    print("heavy:", *sorted(loaded & HEAVY), "ours:", *sorted(ours))
"""


def test_a_project_that_does_not_use_the_fixtures_loads_little(runs: pytest.Pytester) -> None:
    """At pytest's start, the plugin imports the names of tokenstore: no event loop, no cipher, no HTTP client."""
    runs.makeconftest(LOADED)
    runs.makepyfile("def test_nothing():\n    pass")
    result = run(runs, "-s", *NO_ASYNCIO, "-p", "no:anyio", "-p", "no:hypothesispytest", "-p", "no:xdist")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["heavy: ours: tokenstore.testing tokenstore.testing.plugin"])


def test_pytest_may_begin_in_a_process_that_has_imported_tokenstore(runs: pytest.Pytester) -> None:
    """Pytest rewrites the assertions of plugins, and warns if a module of one was imported before."""
    runs.makepyfile("def test_nothing():\n    pass")
    imports = f"import pytest, {', '.join(PACKAGES)}"
    begin = f"pytest.main(['-W', 'error', {', '.join(map(repr, NO_ASYNCIO))}])"
    result = runs.run(sys.executable, "-c", f"{imports}; raise SystemExit({begin})", timeout=120)
    result.assert_outcomes(passed=1)


def test_the_plugin_can_be_switched_off(runs: pytest.Pytester) -> None:
    runs.makepyfile(SYNC)
    run(runs, *NO_ASYNCIO, "-p", "no:tokenstore").assert_outcomes(errors=1)


def test_the_fixtures_of_a_project_win(runs: pytest.Pytester) -> None:
    """A fixture of the same name that a project has had all along stays what it is."""
    runs.makeconftest("import pytest\n\n@pytest.fixture\ndef token_store():\n    return 'theirs'\n")
    runs.makepyfile("def test_theirs(token_store):\n    assert token_store == 'theirs'")
    run(runs, *NO_ASYNCIO).assert_outcomes(passed=1)


def test_the_fixtures_say_what_they_are(runs: pytest.Pytester) -> None:
    result = run(runs, *NO_ASYNCIO, "--fixtures")
    result.stdout.fnmatch_lines(["token_provider -- *", "*The provider, together with the store*"])
    result.stdout.fnmatch_lines(["token_store -- *", "*A store in memory.*"])
