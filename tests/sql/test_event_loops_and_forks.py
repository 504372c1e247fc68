"""A store goes on in another event loop and in a forked process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.matrix import Row, shared_rows

# Connections that went with their loop, or stayed with the parent process, warn when they are collected: what a program
# does that opens its store once and calls asyncio.run() or os.fork() all the same. So these run as programs.
_STORE = """
import asyncio, os, sys, warnings
warnings.simplefilter("ignore")
from tokenstore import Keyring, open_store
store = open_store(sys.argv[1], keyring=Keyring({"k1": bytes(range(32))}))
async def put(tag):
    await asyncio.gather(*(store.store_tokens("github", f"{tag}{n}", tag, None, None) for n in range(4)))
    async with store.transaction() as tx:
        record = await tx.load_tokens("github", f"{tag}0", for_update=True)
    assert record["access_token"] == tag
"""
_LOOPS = f"""{_STORE}
asyncio.run(store.setup())
for tag in ("first", "second", "third"):
    asyncio.run(put(tag))
asyncio.run(store.aclose())
print("done")
"""
# The loop does not run while the process forks: two that poll for the same sockets would take each other's answers.
_FORK = f"""{_STORE}
with asyncio.Runner() as runner:
    runner.run(store.setup())
    runner.run(put("before"))
    children = []
    for number in range(2):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                asyncio.run(asyncio.wait_for(put(f"child{{number}}"), 20))
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    runner.run(put("parent"))
    for pid in children:
        _, status = os.waitpid(pid, 0)
        assert status == 0, status
    runner.run(put("after"))
    runner.run(store.aclose())
print("done")
"""


@shared_rows
@pytest.mark.parametrize("program", [_LOOPS, _FORK], ids=["loops", "fork"])
def test_a_store_goes_on_in_another_loop_or_process(row: Row, program: str, tmp_path: Path) -> None:
    """After a second ``asyncio.run``, or in the child of a fork, a store opens new connections by itself.

    The parent of a fork goes on with its own.
    """
    done = subprocess.run(
        [sys.executable, "-c", program, row.url_for(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
