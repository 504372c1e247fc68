"""AES-256-GCM-SIV and the sealed format once more, written from RFC 8452 and docs/sealed-format.md.

It imports nothing of the package, and of `cryptography` only AES on single blocks, so that it can show an error in
either. It is slow, and not safe against an attacker who can measure time.
"""

from __future__ import annotations

from collections.abc import Sequence
from hmac import compare_digest

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

__all__ = ["associated_data", "decrypt", "encrypt", "polyval", "seal", "unseal"]

_TAG_BYTES = 16
_NONCE_BYTES = 12
# x^128 + x^127 + x^126 + x^121 + 1 (section 3). Bit i of a number is the coefficient of x^i.
_MODULUS = (1 << 128) | (1 << 127) | (1 << 126) | (1 << 121) | 1
# x^-128: x^127 + x^124 + x^121 + x^114 + 1 (section 3).
_INVERSE = (1 << 127) | (1 << 124) | (1 << 121) | (1 << 114) | 1


def _times(one: int, other: int) -> int:
    """Multiply in the field."""
    product = 0
    for bit in range(128):
        if other >> bit & 1:
            product ^= one << bit
    for bit in range(255, 127, -1):
        if product >> bit & 1:
            product ^= _MODULUS << (bit - 128)
    return product


def polyval(key: bytes, data: bytes) -> bytes:
    """POLYVAL (section 3) of whole blocks."""
    factor, state = _times(int.from_bytes(key, "little"), _INVERSE), 0
    for start in range(0, len(data), 16):
        state = _times(state ^ int.from_bytes(data[start : start + 16], "little"), factor)
    return state.to_bytes(16, "little")


def _aes(key: bytes, block: bytes) -> bytes:
    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    return encryptor.update(block) + encryptor.finalize()


def _derived_keys(key: bytes, nonce: bytes) -> tuple[bytes, bytes]:
    """The keys of authentication and of encryption (section 4): halves of blocks of a counter and the nonce."""
    halves = [_aes(key, number.to_bytes(4, "little") + nonce)[:8] for number in range(6)]
    return b"".join(halves[:2]), b"".join(halves[2:])


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 16)


def _tag(keys: tuple[bytes, bytes], nonce: bytes, plaintext: bytes, associated: bytes) -> bytes:
    lengths = b"".join((8 * len(data)).to_bytes(8, "little") for data in (associated, plaintext))
    total = polyval(keys[0], _padded(associated) + _padded(plaintext) + lengths)
    mixed = bytearray(a ^ b for a, b in zip(total, nonce + bytes(4), strict=True))
    mixed[15] &= 0x7F
    return _aes(keys[1], bytes(mixed))


def _counted(key: bytes, tag: bytes, data: bytes) -> bytes:
    """Encrypt or decrypt in counter mode (section 4): the first four bytes of the block count."""
    first, rest = int.from_bytes(tag[:4], "little"), tag[4:15] + bytes([tag[15] | 0x80])
    stream = b"".join(
        _aes(key, ((first + block) % 2**32).to_bytes(4, "little") + rest) for block in range(-(-len(data) // 16))
    )
    return bytes(a ^ b for a, b in zip(data, stream, strict=False))


def encrypt(key: bytes, nonce: bytes, plaintext: bytes, associated: bytes) -> bytes:
    """The ciphertext, and the tag behind it."""
    keys = _derived_keys(key, nonce)
    tag = _tag(keys, nonce, plaintext, associated)
    return _counted(keys[1], tag, plaintext) + tag


def decrypt(key: bytes, nonce: bytes, body: bytes, associated: bytes) -> bytes:
    """The plaintext. A wrong tag is a ValueError."""
    keys, tag = _derived_keys(key, nonce), body[-_TAG_BYTES:]
    plaintext = _counted(keys[1], tag, body[:-_TAG_BYTES])
    if not compare_digest(tag, _tag(keys, nonce, plaintext, associated)):
        raise ValueError("the tag is wrong")
    return plaintext


def associated_data(key_name: str, texts: Sequence[str]) -> bytes:
    """The header of a sealed value, then each text of its place with its length."""
    parts = [text.encode() for text in texts]
    header = bytes([1, len(key_name)]) + key_name.encode()
    return header + b"".join(len(part).to_bytes(2, "big") + part for part in parts)


def seal(key_name: str, key: bytes, texts: Sequence[str], nonce: bytes, plaintext: str) -> bytes:
    """A sealed value. Its place is `texts`, from the store's namespace to the column."""
    body = encrypt(key, nonce, plaintext.encode(), associated_data(key_name, texts))
    return bytes([1, len(key_name)]) + key_name.encode() + nonce + body


def unseal(keys: dict[str, bytes], texts: Sequence[str], sealed: bytes) -> str:
    """The plaintext of a sealed value. What does not open is a ValueError or a LookupError."""
    if sealed[0] != 1 or not 1 <= sealed[1] <= 32:
        raise ValueError("another format")
    end = 2 + sealed[1]
    name, nonce, body = sealed[2:end].decode("ascii"), sealed[end : end + _NONCE_BYTES], sealed[end + _NONCE_BYTES :]
    if len(body) <= _TAG_BYTES:
        raise ValueError("too short")
    return decrypt(keys[name], nonce, body, associated_data(name, texts)).decode()
