"""Sealing: the format byte by byte, and values that must not open."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.keys import NORTH, keyring_of
from tokenstore import SealingError, TamperedError
from tokenstore.records import TokenKey

KEY = TokenKey("github", "user-123", "work")
# AES-256-GCM-SIV of "gho_abc" with the key 00 01 … 1f, the nonce a0 … ab, and the associated data of the format.
PINNED = bytes.fromhex("01056e6f727468a0a1a2a3a4a5a6a7a8a9aaab")


def test_the_format_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Version, key id, nonce, ciphertext and tag are at the documented positions, and equal known bytes."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV

    nonce = bytes(range(0xA0, 0xAC))
    monkeypatch.setattr("tokenstore.keyring.os.urandom", lambda size: nonce[:size])
    sealed = keyring_of("north").seal(KEY, "access_token", "gho_abc")
    assert sealed[:19] == PINNED
    associated = b"\x01\x05north\x00\x06github\x00\x08user-123\x00\x04work\x00\x0caccess_token"
    assert sealed[19:] == AESGCMSIV(NORTH).encrypt(nonce, b"gho_abc", associated)
    assert sealed.hex() == PINNED.hex() + "671077bb13553fbd45c874dba782ea654f0350515096e8"
    assert len(sealed) == 2 + 5 + 12 + len("gho_abc") + 16


def test_the_cipher_matches_a_test_vector_of_rfc_8452() -> None:
    """The vector is from appendix C.2, for AES-256-GCM-SIV."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV

    cipher = AESGCMSIV(bytes.fromhex("01" + "00" * 31))
    nonce = bytes.fromhex("03" + "00" * 11)
    sealed = cipher.encrypt(nonce, bytes.fromhex("0100000000000000"), None)
    assert sealed.hex() == "c2ef328e5c71c83b843122130f7364b761e0b97427e3df28"


@given(text=st.text(min_size=1).filter(lambda text: not any("\ud800" <= char <= "\udfff" for char in text)))
def test_a_sealed_text_opens_unchanged(text: str) -> None:
    """Sealing the same text twice gives two different values."""
    keyring = keyring_of("north")
    first, second = (keyring.seal(KEY, "access_token", text) for _ in range(2))
    assert first != second
    assert keyring.open(KEY, "access_token", first) == keyring.open(KEY, "access_token", second) == text


def test_a_change_of_any_bit_is_an_error() -> None:
    """Each bit of a sealed value is changed in turn."""
    keyring = keyring_of("north", "south")
    sealed = keyring.seal(KEY, "access_token", "gho_abc")
    for position in range(len(sealed)):
        for bit in range(8):
            changed = bytearray(sealed)
            changed[position] ^= 1 << bit
            with pytest.raises(SealingError):
                keyring.open(KEY, "access_token", bytes(changed))


def test_every_truncation_and_extension_is_an_error() -> None:
    """A value that is truncated at either end, or has an additional byte, does not open."""
    keyring = keyring_of("north")
    sealed = keyring.seal(KEY, "access_token", "gho_abc")
    pieces = [sealed[:end] for end in range(len(sealed))] + [sealed[start:] for start in range(1, len(sealed))]
    for piece in [*pieces, sealed + b"\0", b"\0" + sealed, sealed + sealed]:
        with pytest.raises(SealingError):
            keyring.open(KEY, "access_token", piece)


@given(st.binary(max_size=80))
def test_random_bytes_do_not_open(noise: bytes) -> None:
    """Any bytes that were not sealed raise an error of tokenstore."""
    with pytest.raises(SealingError):
        keyring_of("north").open(KEY, "access_token", noise)


def test_a_value_opens_only_for_its_own_provider_user_and_field() -> None:
    """It does not open for another user, provider or field, nor for the same letters split differently."""
    keyring = keyring_of("north")
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
