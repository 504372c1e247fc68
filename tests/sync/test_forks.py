"""A store without ``await`` in a forked process: it gets a loop thread and an async store of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.matrix import Row, each_database
from support.sync_stores import run_program

# The parent's and the child's calls meet at pipes. The child ends normally, with its `atexit` functions.
_STORE = """
import gc, os, sys, threading, warnings
from tokenstore import Keyring, UnsupportedOperationError
from tokenstore.sync import open_store
store = open_store(sys.argv[1], keyring=Keyring({"k1": bytes(range(32))}))
def put(tag):
    def one(number):
        store.store_tokens("github", f"{tag}{number}", tag, None, None)
    threads = [threading.Thread(target=one, args=(number,)) for number in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    with store.transaction() as tx:
        record = tx.load_tokens("github", f"{tag}0", for_update=True)
    assert record["access_token"] == tag
def loops():
    return [thread.name for thread in threading.enumerate()].count("tokenstore-sync")
def wait(*children):
    for pid in children:
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0, status
"""
_UNUSED = f"""{_STORE}
if (pid := os.fork()) == 0:
    store.setup()
    put("child")
    assert loops() == 1
    sys.exit()
wait(pid)
assert loops() == 0
put("parent")
assert sum(1 for _ in store.list_tokens()) == 8
"""
_USED = f"""{_STORE}
# Connections of the parent warn when they are garbage-collected in the child.
warnings.simplefilter("ignore")
store.setup()
put("before")
rows = store.list_tokens(page_size=1)
next(rows)
aio = store.aio
with store.transaction() as tx:
    children = []
    for number in range(2):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                assert loops() == 0
                for inherited in (lambda: next(rows), lambda: tx.load_tokens("github", "before0")):
                    try: inherited()
                    except UnsupportedOperationError as error: assert "before a fork" in str(error)
                    else: raise AssertionError
                assert store.aio is not aio
                assert store.load_tokens("github", "before0")["access_token"] == "before"
                gc.collect()
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    wait(*children)
children = []
for number in range(2):
    if (pid := os.fork()) == 0:
        code = 1
        try:
            put(f"child{{number}}")
            if (pid := os.fork()) == 0:
                put(f"grandchild{{number}}")
                store.close()
                os._exit(0)
            wait(pid)
            store.close()
            code = 0
        finally:
            os._exit(code)
    children.append(pid)
put("parent")
wait(*children)
put("after")
assert store.aio is aio
assert [entry["user_id"] for entry in rows][-1] == "parent3"
assert sum(1 for _ in store.list_tokens()) == 28
"""


@each_database
@pytest.mark.parametrize("program", [_UNUSED, _USED], ids=["unused before the fork", "used before the fork"])
def test_a_store_works_in_a_forked_child(row: Row, program: str, tmp_path: Path) -> None:
    """Parent and child keep apart, also if the parent has used the store, and is in a transaction or an iteration."""
    run_program(program, row.url_for(tmp_path))
