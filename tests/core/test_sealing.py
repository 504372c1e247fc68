"""Sealing: the format byte by byte, and values that must not open."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from support.keys import NORTH, keyring_of
from tokenstore import Keyring, SealingError, TamperedError
from tokenstore.keyring import place_of
from tokenstore.records import TokenKey

KEY = TokenKey("github", "user-123", "work")
# AES-256-GCM-SIV of "gho_abc" with the key 00 01 … 1f, the nonce a0 … ab, and the associated data of the format.
PINNED = bytes.fromhex("01056e6f727468a0a1a2a3a4a5a6a7a8a9aaab")


def test_the_format_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Version, key id, nonce, ciphertext and tag are at the documented positions, and equal known bytes."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV

    nonce = bytes(range(0xA0, 0xAC))
    monkeypatch.setattr("tokenstore.keyring.os.urandom", lambda size: nonce[:size])
    sealed = keyring_of("north").seal(KEY, "access_token", "gho_abc", place_of(KEY, "prod"))
    assert sealed[:19] == PINNED
    associated = b"\x01\x05north\x00\x04prod\x00\x06github\x00\x08user-123\x00\x04work\x00\x0caccess_token"
    assert sealed[19:] == AESGCMSIV(NORTH).encrypt(nonce, b"gho_abc", associated)
    assert sealed.hex() == PINNED.hex() + "555865796b84a1ba795b8ab0df4844be73cd7b8afa0a84"
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


class _Recorder:
    """In place of a cipher: returns the associated data as the ciphertext."""

    def encrypt(self, _nonce: bytes, _plaintext: bytes, associated: bytes) -> bytes:
        return associated


def _associated(key_id: str, namespace: str, provider: str, user_id: str, account: str, field: str) -> bytes:
    """The associated data of a value."""
    keyring = Keyring({key_id: NORTH})
    ciphers: dict[bytes, Any] = keyring._ciphers
    ciphers.update(dict.fromkeys(ciphers, _Recorder()))
    key = TokenKey(provider, user_id, account)
    return keyring.seal(key, field, "gho_abc", place_of(key, namespace))[2 + len(key_id) + 12 :]


# Letters that a key's name may have, and characters that look like a length.
_NAMES = st.text("ab", min_size=1, max_size=3)
_TEXTS = st.text("ab\0\1\2", max_size=3)
_PLACES = st.tuples(_NAMES, _TEXTS, _TEXTS, _TEXTS, _TEXTS, _TEXTS)


def _split(text: str) -> st.SearchStrategy[tuple[str, ...]]:
    """Cut a text into the parts of a place. The first part, a key's name, is not empty."""
    cuts = st.lists(st.integers(1, len(text)), min_size=5, max_size=5).map(sorted)
    return cuts.map(lambda ends: tuple(text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)))


_SAME_LETTERS = st.text("ab", min_size=1, max_size=8).flatmap(lambda text: st.tuples(_split(text), _split(text)))


@given(st.tuples(_PLACES, _PLACES) | _SAME_LETTERS)
@example((("k", "", "a", "b", "", "c"), ("k", "a", "", "b", "", "c")))
@example((("k", "", "a", "b", "c", ""), ("k", "", "a", "b", "", "c")))
def test_no_two_places_have_the_same_associated_data(places: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
    """A place is key id, namespace, provider, user, account and field; all but the key id may be empty here."""
    one, other = places
    assert (_associated(*one) == _associated(*other)) is (one == other)


def test_a_value_opens_only_for_its_own_place() -> None:
    """It does not open for another user, provider, account or field, nor for the same letters split differently."""
    keyring = keyring_of("north")
    sealed = keyring.seal(TokenKey("ab", "cd"), "access_token", "gho_abc")
    places = [
        (TokenKey("ab", "cd", "a"), "access_token"),
        (TokenKey("ab", "c", "d"), "access_token"),
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
        with pytest.raises(TamperedError, match="altered, moved, or sealed in another namespace"):
            keyring.open(key, field, sealed)
