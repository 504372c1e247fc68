"""No error about keys or URLs keeps a key or a password in the local variables of tokenstore's own frames."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.frame_walk import Walk
from tokenstore import AuthTokenStore, Keyring, open_store
from tokenstore.keyring import KEYS_VARIABLE
from tokenstore_memory import MemoryBackend

PASSWORD = "PW-8e2b-planted"
KEY, OTHER_KEY = bytes(range(101, 133)), bytes(range(133, 165))


def _entry(name: str, key: bytes) -> str:
    return f"{name}:{base64.urlsafe_b64encode(key).decode()}"


def _keyring() -> Keyring:
    return Keyring({"first": KEY, "second": OTHER_KEY})


@pytest.fixture
def walk() -> Iterator[Walk]:
    """Fails if no error path was walked."""
    walk = Walk((PASSWORD, KEY, OTHER_KEY))
    yield walk
    assert walk.paths


def test_keys(walk: Walk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bad entry shows no good one."""
    good = _entry("first", KEY)
    texts = {
        "no name": f"{good},{base64.urlsafe_b64encode(OTHER_KEY).decode()}",
        "not base64url": f"{good},second:{base64.b64encode(OTHER_KEY).decode()}!",
        "cut": f"{good},{_entry('second', OTHER_KEY)[:-9]}",
        "twice": f"{good},{_entry('first', OTHER_KEY)}",
        "under two names": f"{good},{_entry('second', KEY)}",
        "a bad name": f"{good},{_entry('a name', OTHER_KEY)}",
    }
    path = tmp_path / "keys"
    path.touch(0o600)
    for name, text in texts.items():
        monkeypatch.setenv(KEYS_VARIABLE, text)
        path.write_text(text)
        walk.call(f"from_string, {name}", Keyring.from_string, text)
        walk.call(f"from_env, {name}", Keyring.from_env)
        walk.call(f"from_file, {name}", Keyring.from_file, path)
        walk.call(f"open_store, {name}", open_store, "memory://")
        walk.call(f"AuthTokenStore, {name}", AuthTokenStore, backend=MemoryBackend())
    path.write_bytes(good.encode() + b"\xff")
    walk.call("not UTF-8", Keyring.from_file, path)
    path.write_text(good)
    path.chmod(0o644)
    walk.call("others have access", Keyring.from_file, path)
    for keys in ({"first": KEY, "second": OTHER_KEY[:31]}, {"first": KEY, "second": KEY}, [("first", KEY), (7, KEY)]):
        walk.call("Keyring", Keyring, keys)


def test_urls(walk: Walk) -> None:
    user = f"someone:{PASSWORD}"
    for url in (
        f"nothing://{user}@h/db",
        f"{user}@h/db",
        f"memory://{user}@h",
        f"sqlite://{user}@h/db",
        f"postgresql+nothing://{user}@h/db",
        f"postgresql://{user}@h:port/db",
        f"postgresql://{user}@h/db?unknown=1",
        f"postgresql://{user}@h/db?lock_timeout={PASSWORD}",
        f"postgresql://{user}@h/db?host=[",
        f"postgresql://{user}@{PASSWORD}@h/db",
        f"mysql://{user}@h/db?ssl_ca=/nowhere",
        f"mysql://{user}@h/db?table=a;b",
    ):
        walk.call(url.replace(PASSWORD, "…"), open_store, url, keyring=_keyring())
    walk.call("options of a backend", open_store, MemoryBackend(), keyring=_keyring(), table="t")
