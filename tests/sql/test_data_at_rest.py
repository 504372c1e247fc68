"""The database contains only sealed values: no token is in any dump or file."""

from __future__ import annotations

import asyncio
import base64
from datetime import UTC, datetime, timedelta
from pathlib import Path
from secrets import token_bytes, token_hex

from sqlalchemy import make_url

from support import servers
from support.matrix import Row, shared_rows
from tokenstore import Keyring, open_store

ACCESS, REFRESH, SCOPE, VERIFIER = (f"{name}-{token_hex(16)}" for name in ("access", "refresh", "scope", "verifier"))


def _spellings(token: str) -> list[bytes]:
    plain = token.encode()
    inner = base64.b64encode(plain)[4:-4]  # without the first and last group, which depend on neighbouring bytes
    return [plain, plain.hex().encode(), plain.hex().upper().encode(), inner, plain[:20], token.encode("utf-16-le")]


def _dump(row: Row, url: str) -> bytes:
    """Return the database's files on disk, or the output of its dump tool."""
    if row.mark == "sqlite":
        path = Path(make_url(url).database or "")
        return b"".join(file.read_bytes() for file in path.parent.glob(f"{path.name}*"))
    server = {"postgres": servers.postgres, "mysql": servers.mysql if "mysql9" in row.name else servers.mariadb}[
        row.mark
    ]()
    assert server is not None
    return server.dump()


@shared_rows
def test_no_dump_contains_a_token(row: Row, url: str) -> None:
    """The dump contains the user's id, but no token, extra field or value, in any common encoding."""
    user, key = f"user-{token_hex(8)}", token_bytes(32)

    async def main() -> bytes:
        async with open_store(url, keyring=Keyring({"k1": key})) as store:
            await store.setup()
            for _ in range(2):  # the second write leaves the old row in unused pages
                await store.store_tokens(
                    "github", user, ACCESS, REFRESH, datetime.now(UTC) + timedelta(hours=1), extra={"scope": SCOPE}
                )
                await store.put_value("login", user, {"verifier": VERIFIER}, ttl=3600)
            assert await store.get_value("login", user) == {"verifier": VERIFIER}
            record = await store.load_tokens("github", user)
            assert record is not None
            assert (record["access_token"], record["extra"]) == (ACCESS, {"scope": SCOPE})
            return await asyncio.to_thread(_dump, row, url)

    dump = asyncio.run(main())
    assert user.encode() in dump  # shows that the search works
    assert b"k1" in dump  # the key's name, not the key
    for secret in (ACCESS, REFRESH, SCOPE, VERIFIER):
        for spelling in _spellings(secret):
            assert spelling not in dump
    assert key not in dump
