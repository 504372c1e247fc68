"""A connection pooler in transaction mode."""

from __future__ import annotations

import json
import subprocess
import sys
from secrets import token_hex

from support import servers
from support.matrix import Row, postgres_rows

_THROUGH_THE_POOLER = """
import asyncio, json, sys
from tokenstore import ConflictError, Keyring, open_store
async def main(url, name):
    failures, done = [], 0
    async with open_store(url, keyring=Keyring({"k1": bytes(range(32))}), pool_size=4) as store:
        await store.setup()
        async def work(task):
            nonlocal done
            for number in range(6):
                user = f"u{(task + number) % 5}"
                try:
                    await store.store_tokens("github", user, name, None, None)
                    await store.load_tokens("github", user)
                    async with store.transaction() as tx:
                        await tx.load_tokens("github", user, for_update=True)
                        await tx.store_tokens("github", user, name, None, None)
                    done += 3
                except Exception as error:
                    failures.append(repr(error))
        await asyncio.gather(*(work(task) for task in range(4)))
    print(json.dumps([done, failures]))
asyncio.run(main(*sys.argv[1:]))
"""


@postgres_rows
def test_all_calls_succeed_through_a_pooler_in_transaction_mode(row: Row) -> None:
    """Three processes use pgbouncer, with `prepared_statements=false`."""
    driver = row.name.partition("+")[2]
    url = f"{servers.pgbouncer().url(driver)}?prepared_statements=false&table=t_{token_hex(8)}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _THROUGH_THE_POOLER, url, f"p{number}"], stdout=subprocess.PIPE, text=True
        )
        for number in range(3)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in running]
    assert [json.loads(output) for output in outputs] == [[4 * 6 * 3, []]] * 3
