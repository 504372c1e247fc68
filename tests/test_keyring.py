"""Keys and sealing: the format byte by byte, and everything that must not open."""

from __future__ import annotations

import base64
import copy
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenstore import ConfigurationError, Keyring, SealingError, TamperedError, UnknownKeyError, generate_key
from tokenstore.keyring import KEYS_VARIABLE
from tokenstore.records import TokenKey

KEY = TokenKey("github", "user-123")
NORTH, SOUTH = bytes(range(32)), bytes(range(32, 64))

# AES-256-GCM-SIV of "gho_abc" with the key 00 01 … 1f, the nonce a0 … ab, and the associated data of the format.
PINNED = bytes.fromhex("01056e6f727468a0a1a2a3a4a5a6a7a8a9aaab")


def _keyring(*names: str) -> Keyring:
    return Keyring({name: {"north": NORTH, "south": SOUTH}[name] for name in names})


def _entry(name: str, key: bytes) -> str:
    return f"{name}:{base64.urlsafe_b64encode(key).decode()}"


def test_the_format_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Version, key id, nonce, ciphertext and tag lie where the documentation says; the whole is known in advance."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV

    nonce = bytes(range(0xA0, 0xAC))
    monkeypatch.setattr("tokenstore.keyring.os.urandom", lambda size: nonce[:size])
    sealed = _keyring("north").seal(KEY, "access_token", "gho_abc")
    assert sealed[:19] == PINNED
    associated = b"\x01\x05north\x00\x06github\x00\x08user-123\x00\x0caccess_token"
    assert sealed[19:] == AESGCMSIV(NORTH).encrypt(nonce, b"gho_abc", associated)
    assert sealed.hex() == PINNED.hex() + "db1c61b040f9cae36e10a9f610bd24dffd672ab258b756"
    assert len(sealed) == 2 + 5 + 12 + len("gho_abc") + 16


def test_the_cipher_is_the_standard_one() -> None:
    """A test vector of RFC 8452, appendix C.2: the library's AES-256-GCM-SIV is the published one."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV

    cipher = AESGCMSIV(bytes.fromhex("01" + "00" * 31))
    nonce = bytes.fromhex("03" + "00" * 11)
    sealed = cipher.encrypt(nonce, bytes.fromhex("0100000000000000"), None)
    assert sealed.hex() == "c2ef328e5c71c83b843122130f7364b761e0b97427e3df28"


@given(text=st.text(min_size=1).filter(lambda text: not any("\ud800" <= char <= "\udfff" for char in text)))
def test_what_is_sealed_opens(text: str) -> None:
    """Any text comes back as it was, and two seals of it differ."""
    keyring = _keyring("north")
    first, second = (keyring.seal(KEY, "access_token", text) for _ in range(2))
    assert first != second
    assert keyring.open(KEY, "access_token", first) == keyring.open(KEY, "access_token", second) == text


def test_every_flipped_bit_is_noticed() -> None:
    """No bit of a sealed value can change without an error."""
    keyring = _keyring("north", "south")
    sealed = keyring.seal(KEY, "access_token", "gho_abc")
    for position in range(len(sealed)):
        for bit in range(8):
            changed = bytearray(sealed)
            changed[position] ^= 1 << bit
            with pytest.raises(SealingError):
                keyring.open(KEY, "access_token", bytes(changed))


def test_every_truncation_and_extension_is_noticed() -> None:
    """A value cut short at either end, or with a byte too many, does not open."""
    keyring = _keyring("north")
    sealed = keyring.seal(KEY, "access_token", "gho_abc")
    pieces = [sealed[:end] for end in range(len(sealed))] + [sealed[start:] for start in range(1, len(sealed))]
    for piece in [*pieces, sealed + b"\0", b"\0" + sealed, sealed + sealed]:
        with pytest.raises(SealingError):
            keyring.open(KEY, "access_token", piece)


@given(st.binary(max_size=80))
def test_noise_does_not_open(noise: bytes) -> None:
    """Bytes that nobody sealed are an error of ours, whatever they are."""
    with pytest.raises(SealingError):
        _keyring("north").open(KEY, "access_token", noise)


def test_a_value_opens_in_its_own_place_alone() -> None:
    """Another user, provider or field, and the same letters split otherwise, do not open."""
    keyring = _keyring("north")
    sealed = keyring.seal(TokenKey("ab", "cd"), "access_token", "gho_abc")
    places = [
        (TokenKey("ab", "ce"), "access_token"),
        (TokenKey("ac", "cd"), "access_token"),
        (TokenKey("cd", "ab"), "access_token"),
        (TokenKey("a", "bcd"), "access_token"),
        (TokenKey("abc", "d"), "access_token"),
        (TokenKey("ab", "cdaccess"), "_token"),
        (TokenKey("ab", "cd"), "refresh_token"),
        (TokenKey("ab", "cd"), "extra"),
    ]
    for key, field in places:
        with pytest.raises(TamperedError, match="altered or moved"):
            keyring.open(key, field, sealed)


def test_the_first_key_seals_and_all_open() -> None:
    """A new key in front seals; values of the old one go on opening; without it, the error names it and the remedy."""
    old = _keyring("north").seal(KEY, "access_token", "gho_abc")
    both = _keyring("south", "north")
    assert (both.primary, both.names) == ("south", ("south", "north"))
    assert both.open(KEY, "access_token", old) == "gho_abc"
    assert both.seal(KEY, "access_token", "x")[2:7] == b"south"
    with pytest.raises(
        UnknownKeyError, match=r"sealed with key 'north', which is not in the keyring \(south\); add"
    ) as e:
        _keyring("south").open(KEY, "access_token", old)
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
def test_a_keyring_is_checked_when_it_is_built(keys: list[tuple[str, bytes]], message: str) -> None:
    """Every mistake is found before anything is sealed, and no key is shown."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        Keyring(keys)
    assert "\\x" not in str(caught.value)


def test_reading_entries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commas, line ends and comments separate entries; padding is optional; environment and file read alike."""
    text = f"# the new one\n{_entry('south', SOUTH)},{_entry('north', NORTH).rstrip('=')}\n"
    (tmp_path / "keys").write_text(text)
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
def test_malformed_entries_are_not_shown(text: str, message: str) -> None:
    """An error names an entry by its position or its key's name, never by its content."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        Keyring.from_string(text)
    error = caught.value
    assert "supersecret" not in f"{error}{error.__cause__}"


def test_a_missing_source_says_what_to_do(tmp_path: Path) -> None:
    """An unset variable and an unreadable file are errors with a remedy; no key is made up."""
    with pytest.raises(ConfigurationError, match="TOKENSTORE_KEYS is not set; `tokenstore keygen`"):
        Keyring.from_env()
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        Keyring.from_file(tmp_path / "keys")
    (tmp_path / "latin").write_bytes(b"k:\xff")
    with pytest.raises(ConfigurationError, match="not UTF-8"):
        Keyring.from_file(tmp_path / "latin")
    with pytest.raises(ConfigurationError, match="1 to 32 of"):
        generate_key("no good")


def test_a_keyring_does_not_leave_the_process() -> None:
    """Its repr shows names alone; it can be neither pickled nor copied."""
    keyring = _keyring("north", "south")
    assert repr(keyring) == "<Keyring north, south>"
    for leave in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled"):
            leave(keyring)
