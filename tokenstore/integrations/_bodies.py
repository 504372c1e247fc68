"""Reads the body of a token endpoint's response: JSON or a form, whatever its headers say about it.

A response that arrives may hold the only copy of a rotated refresh token. So a wrong media type, charset or
compression, or a field that cannot be read, must not lose the other fields.
"""

from __future__ import annotations

import codecs
import json
import re
from contextlib import suppress
from email.message import Message
from typing import Any, Final
from urllib.parse import unquote, unquote_plus

from tokenstore.errors import InvalidInputError
from tokenstore.refresh.responses import issued_access_token

__all__ = ["FORM", "is_access_token", "json_object", "parsed"]

FORM: Final = "application/x-www-form-urlencoded"

_TOKENS: Final = frozenset({"access_token", "refresh_token"})
_MAX_FORM_FIELDS: Final = 1000
_AROUND: Final = " \t\r\n\0\ufeff"
_FORM_BODY: Final = re.compile(r"[A-Za-z_][\w.\[\]-]*=[^<>\r\n]*", re.ASCII)
# The charsets in use. Others of Python's decoders take a time that grows with the square of the length.
_CHARSET: Final = re.compile(r"(ascii|big5|cp|euc|gb|hz|iso|koi8|latin|mac|shift_jis|utf-?(8|16|32))[\w-]*", re.ASCII)


def parsed(body: bytes, content_type: str = "", *, whole: bool = True) -> Any:
    """The value of a body that is JSON or a form; None for any other body.

    Args:
        body: The body, decompressed.
        content_type: The header Content-Type.
        whole: Whether the body's end is there. If not, only JSON is read, which shows its own end: the last field of a
            form could be half a token.
    """
    message = Message()
    message["Content-Type"] = content_type
    text = _decoded(body, str(message.get_param("charset", "")))
    with suppress(ValueError, RecursionError):
        value = _loads(text)
        return _loads(value) if isinstance(value, str) else value  # some servers encode twice
    if whole:
        form = _form(text)
        if form and (message.get_content_type() == FORM or form.keys() & {"access_token", "error"}):
            return form
    # A warning of the server's before the object, a prefix against script inclusion, or a comment after it.
    with suppress(ValueError, RecursionError):
        value = _decoder.raw_decode(text, text.index("{"))[0]
        if is_access_token(value.get("access_token")):
            return value
    return None


def json_object(body: bytes) -> bool:
    """Whether a body is a JSON object that is complete, although more of it was announced."""
    with suppress(ValueError, RecursionError):
        return isinstance(_loads(_decoded(body, "")), dict)
    return False


def is_access_token(value: object) -> bool:
    """Whether a field holds an access token that can be stored."""
    with suppress(InvalidInputError):
        return bool(issued_access_token({"access_token": value}))
    return False


def _loads(text: str) -> Any:
    return _decoder.decode(text.strip(_AROUND))


def _integer(digits: str) -> int | float:
    """Python refuses to read an integer of more than 4300 digits."""
    return int(digits) if len(digits) < 4000 else float(digits)


# Control characters within strings are accepted, against RFC 8259.
_decoder: Final = json.JSONDecoder(strict=False, parse_int=_integer)


def _decoded(body: bytes, charset: str) -> str:
    """The text: UTF-8, -16 or -32 if it can be, or else in the declared charset, or else with broken bytes replaced."""
    unicode = json.detect_encoding(body)  # by a byte order mark, or by the places of NUL bytes
    if not body.decode(unicode, _AS_LATIN_1).strip(_AROUND)[:1].isascii():
        unicode = "utf-8"  # a NUL byte in front of the body has misled the detection
    for name in (unicode, charset):
        if _CHARSET.fullmatch(name.lower()):
            with suppress(UnicodeError, LookupError):
                return body.decode(name).strip(_AROUND)
    return body.decode(unicode, _AS_LATIN_1).strip(_AROUND)


def _as_latin_1(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return error.object[error.start : error.end].decode("latin-1"), error.end


_AS_LATIN_1: Final = "tokenstore.latin-1"
codecs.register_error(_AS_LATIN_1, _as_latin_1)


def _form(text: str) -> dict[str, str]:
    """The fields of a form; none for any other text."""
    if not _FORM_BODY.fullmatch(text):
        return {}
    fields = {}
    for part in text.split("&", _MAX_FORM_FIELDS)[:_MAX_FORM_FIELDS]:
        name, _, value = part.partition("=")
        name = unquote_plus(name)
        # A plus sign in a token is one that was not encoded: no token has a blank (RFC 6750 section 2.1).
        value = (unquote if name in _TOKENS else unquote_plus)(value, errors=_AS_LATIN_1)
        if value:
            fields[name] = value
    return fields
