"""Keys, and sealing values with them.

A sealed value is one self-describing byte string::

    offset  bytes     content
    0       1         format version, 0x01
    1       1         n, the length of the key id (1 to 32)
    2       n         key id, ASCII
    2+n     12        nonce, random
    14+n    m + 16    AES-256-GCM-SIV (RFC 8452) ciphertext and tag

The associated data binds the value to its place: the first 2+n bytes above, then namespace, provider, user id, account
and field name, each UTF-8 and preceded by its length as two big-endian bytes. A value moved to another row or column,
or to a table that is used with another namespace, does not open.

The values of :mod:`tokenstore.values` are sealed in the same way. Behind the namespace of the store their associated
data has the value's own namespace (its *group*), its name, and ``value`` as the field name. Token rows have no field of
that name, and one text more; so neither kind opens as the other.
"""

from __future__ import annotations

import base64
import os
import re
import stat
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Final, cast

from tokenstore.errors import ConfigurationError, SealingError, TamperedError, UnknownKeyError
from tokenstore.records import TokenKey
from tokenstore.tracebacks import clears_locals
from tokenstore.value_records import ValueKey

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV

__all__ = ["KEYS_VARIABLE", "Keyring", "generate_key", "place_of"]

KEYS_VARIABLE: Final = "TOKENSTORE_KEYS"
"""The environment variable that :meth:`Keyring.from_env` reads unless told otherwise."""

_FORMAT: Final = 1
_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16
_OF_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO
_BASE64URL: Final = re.compile(r"[A-Za-z0-9_-]+={0,2}", re.ASCII)  # padding is optional, as in RFC 7515
_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,32}", re.ASCII)


def _part(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(2, "big") + data


_FIELDS: Final = {field: _part(field) for field in ("access_token", "refresh_token", "extra", "metadata", "value")}


# A store has one namespace. The bound is for programs that open a store for each tenant.
_namespace_part: Final = lru_cache(maxsize=64)(_part)


def place_of(key: TokenKey | ValueKey, namespace: str = "") -> bytes:
    """The part of the associated data that is the same for all fields of a row.

    Args:
        key: The row.
        namespace: The store's namespace.
    """
    return _namespace_part(namespace) + b"".join(map(_part, key))


def generate_key(name: str = "k1") -> str:
    """Make one random key as an entry for ``TOKENSTORE_KEYS`` or a key file: ``name:base64url``.

    Args:
        name: 1 to 32 of ``A-Z a-z 0-9 . _ -``; it is stored in clear beside every value that the key seals.

    Raises:
        ConfigurationError: The name is not acceptable.
    """
    _check_name(name)
    return f"{name}:{base64.urlsafe_b64encode(os.urandom(_KEY_BYTES)).decode()}"


class Keyring:
    """Named 256-bit keys. The first one, the primary key, seals; all of them open.

    To change the key, put a new one first. Remove the old one when ``tokenstore list`` shows no row with its name.

    Args:
        keys: Key names with their 32 bytes each, in order.

    Raises:
        ConfigurationError: No key, a name or length that is not acceptable, a name twice, or one key under two names.
    """

    __slots__ = ("_ciphers", "_header", "_headers")

    @clears_locals
    def __init__(self, keys: Mapping[str, bytes] | Iterable[tuple[str, bytes]]) -> None:
        pairs = cast(list[tuple[str, bytes]], list(keys.items() if isinstance(keys, Mapping) else keys))
        if not pairs:
            raise ConfigurationError(
                f"the keyring is empty; make a key with `tokenstore keygen` and set {KEYS_VARIABLE}"
            )
        # Imported here: this takes as long as importing the core, and a program without a keyring does not need it.
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV

        self._ciphers: dict[bytes, AESGCMSIV] = {}  # by the header of the values that they sealed
        self._headers: dict[str, bytes] = {}  # by name
        seen: dict[bytes, str] = {}
        for name, key in pairs:
            _check_name(name)
            if not isinstance(key, bytes | bytearray) or len(key) != _KEY_BYTES:
                raise ConfigurationError(f"key {name!r} must be {_KEY_BYTES} bytes long")
            if name in self._headers:
                raise ConfigurationError(f"key {name!r} is in the keyring twice")
            if (twin := seen.setdefault(bytes(key), name)) != name:
                raise ConfigurationError(f"keys {twin!r} and {name!r} are the same key under two names")
            header = bytes((_FORMAT, len(name))) + name.encode("ascii")
            try:
                self._ciphers[header] = AESGCMSIV(key)
            except UnsupportedAlgorithm:
                raise ConfigurationError(
                    "cryptography has no AES-GCM-SIV here: it needs OpenSSL 3.2 or later, which its wheels from PyPI "
                    "contain, and FIPS mode must be off, because FIPS 140 does not approve AES-GCM-SIV"
                ) from None
            self._headers[name] = header
        self._header = self._headers[self.primary]

    @classmethod
    @clears_locals
    def from_string(cls, text: str, *, source: str = "the key text") -> Keyring:
        """Read entries ``name:base64url``, separated by commas or line ends; ``#`` starts a comment line.

        Args:
            text: The entries; the first one seals.
            source: What to call the text in an error.

        Raises:
            ConfigurationError: An entry is malformed. Its message names the entry by position, never by content.
        """
        pairs = []
        lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
        entries = [entry.strip() for line in lines for entry in line.split(",")]
        for position, entry in enumerate(filter(None, entries), start=1):
            name, colon, encoded = entry.partition(":")
            if not colon or not _NAME.fullmatch(name):
                raise ConfigurationError(f"entry {position} of {source} is not of the form name:base64url")
            pairs.append((name, _decode_key(name, encoded, source)))
        if not pairs:
            raise ConfigurationError(f"{source} holds no key; `tokenstore keygen` prints one")
        return cls(pairs)

    @classmethod
    @clears_locals
    def from_env(cls, variable: str = KEYS_VARIABLE) -> Keyring:
        """Read the keys from an environment variable.

        Raises:
            ConfigurationError: It is unset or malformed. No key is ever made silently.
        """
        text = os.environ.get(variable)
        if not text:
            raise ConfigurationError(
                f"{variable} is not set; `tokenstore keygen` prints a value for it (name:base64url), "
                "or pass keyring=Keyring(...)"
            )
        return cls.from_string(text, source=variable)

    @classmethod
    @clears_locals
    def from_file(cls, path: str | os.PathLike[str]) -> Keyring:
        """Read the keys from a file, one entry a line. On POSIX no other user may have access to it: mode 0600 or 0400.

        Raises:
            ConfigurationError: It cannot be read, is malformed, or other users have access to it.
        """
        from pathlib import Path

        text, mode, reason = "", 0, None
        try:
            with Path(path).open(encoding="utf-8") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                text = file.read()
        except OSError as error:
            reason = error.strerror
        except UnicodeDecodeError:
            # Raised below, outside this block: otherwise the error's context, the decoding error, would show the file.
            reason = "not UTF-8 text"
        if reason is not None:
            raise ConfigurationError(f"the key file {os.fspath(path)!r} cannot be read: {reason}")
        if os.name == "posix" and mode & _OF_OTHERS:
            raise ConfigurationError(
                f"the key file {os.fspath(path)!r} has mode {mode:04o}, so other users have access to the keys: "
                "`chmod 600` it, and change the keys if others may have read them"
            )
        return cls.from_string(text, source=f"the key file {os.fspath(path)!r}")

    @property
    def primary(self) -> str:
        """The name of the primary key, which seals."""
        return next(iter(self._headers))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all keys, the primary key first."""
        return tuple(self._headers)

    def __repr__(self) -> str:
        return f"<Keyring {', '.join(self._headers)}>"

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("a Keyring cannot be pickled or copied; build it anew from its source")

    def seal(self, key: TokenKey | ValueKey, field: str, plaintext: str, place: bytes | None = None) -> bytes:
        """Encrypt one field of one row with the primary key.

        Args:
            key: The row.
            field: The field's name.
            plaintext: Its value.
            place: The result of :func:`place_of` for the row, so that it is computed once for all fields. Default:
                that of the row in the empty namespace.
        """
        header, nonce = self._header, os.urandom(_NONCE_BYTES)
        associated = header + (place or place_of(key)) + (_FIELDS.get(field) or _part(field))
        return header + nonce + self._ciphers[header].encrypt(nonce, plaintext.encode(), associated)

    def open(self, key: TokenKey | ValueKey, field: str, sealed: bytes, place: bytes | None = None) -> str:
        """Decrypt one field of one row; the arguments are those of :meth:`seal`.

        Raises:
            UnknownKeyError: It was sealed with a key that is not in this keyring.
            TamperedError: It does not open here.
        """
        head = 2 + (sealed[1] if len(sealed) > 1 else 0)
        header, body = bytes(sealed[:head]), head + _NONCE_BYTES
        cipher = self._ciphers.get(header)
        if cipher is None or len(sealed) <= body + _TAG_BYTES:
            raise self._not_sealed(key, field, header, len(sealed))
        associated = header + (place or place_of(key)) + (_FIELDS.get(field) or _part(field))
        try:
            return cipher.decrypt(sealed[head:body], sealed[body:], associated).decode()
        except _invalid_tag():
            raise TamperedError(
                f"{field} of {key} does not open with key {header[2:].decode()!r}: it was altered, moved, or sealed in "
                f"another namespace, or another key had that name when it was sealed"
            ) from None
        except UnicodeDecodeError:
            pass  # the error is raised below: otherwise its context, the decoding error, would show the text
        raise TamperedError(f"{field} of {key} is not UTF-8 text: another program sealed it")

    def sealed_by(self, name: str, sealed: bytes) -> bool:
        """Whether a value was sealed with the key of this name, by the value's header, which is bound to it.

        Args:
            name: The name of a key, which need not be in this keyring.
            sealed: A value that :meth:`open` has opened.
        """
        header = self._headers.get(name)
        return header is not None and sealed.startswith(header)

    def _not_sealed(self, key: TokenKey | ValueKey, field: str, header: bytes, size: int) -> SealingError:
        """The error for a value whose header names no key of this keyring."""
        if len(header) <= 2 or header[0] != _FORMAT or size <= len(header) + _NONCE_BYTES + _TAG_BYTES:
            return TamperedError(f"{field} of {key} is not a sealed value: truncated, or of an unknown format")
        name = header[2:].decode("ascii", "replace")
        if not _NAME.fullmatch(name):
            return TamperedError(f"{field} of {key} is not a sealed value: its key id is malformed")
        return UnknownKeyError(
            f"{field} of {key} is sealed with key {name!r}, which is not in the keyring ({', '.join(self.names)}); "
            f"add that key back after the first one",
            key_id=name,
        )


def _invalid_tag() -> type[Exception]:
    from cryptography.exceptions import InvalidTag

    return InvalidTag


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigurationError("a key's name must be 1 to 32 of A-Z a-z 0-9 . _ -")


def _decode_key(name: str, encoded: str, source: str) -> bytes:
    try:
        if not _BASE64URL.fullmatch(encoded):
            raise ValueError
        digits = encoded.rstrip("=")
        key = base64.urlsafe_b64decode(digits + "=" * (-len(digits) % 4))
    except ValueError:
        raise ConfigurationError(f"key {name!r} of {source} is not base64url") from None
    if len(key) != _KEY_BYTES:
        raise ConfigurationError(f"key {name!r} of {source} has {len(key)} bytes; {_KEY_BYTES} are needed")
    return key
