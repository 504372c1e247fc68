"""Keyrings: which key seals, the sources of keys, and the mistakes that are found when a keyring is made."""

from __future__ import annotations

import base64
import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from support.keys import NORTH, SOUTH, keyring_of
from tokenstore import ConfigurationError, Keyring, TamperedError, UnknownKeyError, generate_key
from tokenstore.keyring import KEYS_VARIABLE
from tokenstore.records import TokenKey

KEY = TokenKey("github", "user-123")


def _entry(name: str, key: bytes) -> str:
    return f"{name}:{base64.urlsafe_b64encode(key).decode()}"


def test_the_first_key_seals_and_all_keys_open() -> None:
    """Values of an old key can still be opened; without that key, the error names it and says what to do."""
    old = keyring_of("north").seal(KEY, "access_token", "gho_abc")
    both = keyring_of("south", "north")
    assert (both.primary, both.names) == ("south", ("south", "north"))
    assert both.open(KEY, "access_token", old) == "gho_abc"
    assert both.seal(KEY, "access_token", "x")[2:7] == b"south"
    with pytest.raises(
        UnknownKeyError, match=r"sealed with key 'north', which is not in the keyring \(south\); add"
    ) as e:
        keyring_of("south").open(KEY, "access_token", old)
    assert e.value.key_id == "north"
    with pytest.raises(TamperedError, match="another key had that name"):
        Keyring({"north": SOUTH}).open(KEY, "access_token", old)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], "the keyring is empty"),
        ([("k", b"short")], "must be 32 bytes long"),
        ([("k", "x" * 32)], "must be 32 bytes long"),
        ([("", NORTH)], "1 to 32 of"),
        ([("a" * 33, NORTH)], "1 to 32 of"),
        ([("k:1", NORTH)], "1 to 32 of"),
        ([("é", NORTH)], "1 to 32 of"),
        ([("k\n", NORTH)], "1 to 32 of"),
        ([(7, NORTH)], "1 to 32 of"),
        ([("k", NORTH), ("k", SOUTH)], "'k' is in the keyring twice"),
        ([("a", NORTH), ("b", NORTH)], "'a' and 'b' are the same key"),
    ],
)
def test_a_keyring_is_checked_when_it_is_made(keys: list[tuple[str, bytes]], message: str) -> None:
    """Each mistake is found before a value is sealed, and no error contains a key."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        Keyring(keys)
    assert "\\x" not in str(caught.value)


def test_keys_are_read_from_the_environment_and_from_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commas, line ends and comments separate entries; base64 padding is optional; both sources have one syntax."""
    text = f"# the new one\n{_entry('south', SOUTH)},{_entry('north', NORTH).rstrip('=')}\n"
    _write_private(tmp_path / "keys", text)
    monkeypatch.setenv(KEYS_VARIABLE, text)
    monkeypatch.setenv("OTHER", _entry("north", NORTH))
    for keyring in (Keyring.from_string(text), Keyring.from_env(), Keyring.from_file(tmp_path / "keys")):
        assert keyring.names == ("south", "north")
    assert Keyring.from_env("OTHER").names == ("north",)
    made = generate_key("k2")
    assert Keyring.from_string(made).names == ("k2",)
    assert made != generate_key("k2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no key"),
        ("# nothing\n", "holds no key"),
        ("supersecretvalue", "entry 1 of .* is not of the form"),
        (f"{_entry('a', NORTH)},bad name:supersecretvalue", "entry 2 of"),
        ("k:supersecretvalue!", "key 'k' of .* is not base64url"),
        ("k:supersecretvalue", "has .* bytes; 32 are needed"),
        ("k:" + base64.b64encode(b"\xff" * 32).decode(), "not base64url"),
        ("k:ünïcode", "not base64url"),
    ],
)
def test_the_error_for_a_malformed_entry_does_not_contain_it(text: str, message: str) -> None:
    """The error names an entry by its position or its key's name."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        Keyring.from_string(text)
    error = caught.value
    assert "supersecret" not in f"{error}{error.__cause__}"


def _write_private(path: Path, text: str) -> None:
    path.touch(0o600)
    path.write_text(text)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_a_key_file_of_its_owner_alone_is_read(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "keys"
    _write_private(path, _entry("north", NORTH))
    path.chmod(mode)
    assert Keyring.from_file(path).names == ("north",)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o602, 0o610])
def test_a_key_file_to_which_others_have_access_is_refused(tmp_path: Path, mode: int) -> None:
    """The error names the mode and the remedy."""
    path, link = tmp_path / "keys", tmp_path / "link"
    _write_private(path, _entry("north", NORTH))
    path.chmod(mode)
    link.symlink_to(path)
    for name in (path, link):
        with pytest.raises(ConfigurationError, match=f"has mode {mode:04o}.*`chmod 600` it") as caught:
            Keyring.from_file(name)
        assert _entry("north", NORTH).partition(":")[2] not in str(caught.value)


def test_the_error_for_a_missing_source_of_keys_says_what_to_do(tmp_path: Path) -> None:
    """An unset variable and an unreadable file are errors; no key is ever generated silently."""
    with pytest.raises(ConfigurationError, match="TOKENSTORE_KEYS is not set; `tokenstore keygen`"):
        Keyring.from_env()
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        Keyring.from_file(tmp_path / "keys")
    (tmp_path / "latin").touch(0o600)
    (tmp_path / "latin").write_bytes(b"k:\xff")
    with pytest.raises(ConfigurationError, match="not UTF-8"):
        Keyring.from_file(tmp_path / "latin")
    with pytest.raises(ConfigurationError, match="1 to 32 of"):
        generate_key("no good")


def test_a_keyring_cannot_be_pickled_or_copied_and_its_repr_has_no_key() -> None:
    """The repr contains only the names of the keys."""
    keyring = keyring_of("north", "south")
    assert repr(keyring) == "<Keyring north, south>"
    for leave in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled"):
            leave(keyring)


def test_in_fips_mode_the_error_says_that_the_cipher_is_not_approved(tmp_path: Path) -> None:
    """OpenSSL's configuration turns the mode on for the whole process, so that this one is a process of its own."""
    config = tmp_path / "openssl.cnf"
    config.write_text("openssl_conf = a\n[a]\nalg_section = b\n[b]\ndefault_properties = fips=yes\n")
    program = "from tokenstore import Keyring; Keyring({'k1': bytes(32)})"
    environment = os.environ | {"OPENSSL_CONF": str(config)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    [*_, last] = done.stderr.splitlines()
    assert last.startswith("tokenstore.errors.ConfigurationError: cryptography has no AES-GCM-SIV here")
    assert "FIPS 140 does not approve AES-GCM-SIV" in last
