"""A store can be used in another event loop, and in a forked process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.matrix import Row, shared_rows

# Connections of an event loop that has ended, or of the parent process, warn when they are garbage-collected. Warnings
# are errors in the tests, so these programs run in new processes that ignore warnings.
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
# The event loop does not run during the fork: parent and child would share its sockets and read each other's data.
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
def test_a_store_opens_new_connections_in_another_event_loop_or_process(row: Row, program: str, tmp_path: Path) -> None:
    """A store connects again in a second ``asyncio.run`` and in a forked child; the parent keeps its connections."""
    done = subprocess.run(
        [sys.executable, "-c", program, row.url_for(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
