"""Undoes the compression of a response's body (Content-Encoding, RFC 9110 section 8.4).

Requests ask for no compression, so a body that is compressed nevertheless comes from a proxy or a careless server. It
may hold the only copy of a rotated refresh token. gzip and deflate are always read, ``br`` and ``zstd`` if the module
for them is there: that for ``zstd`` is part of Python from 3.14 on.
"""

from __future__ import annotations

import importlib
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Final

__all__ = ["decompressed", "unread"]

_GZIP: Final = b"\x1f\x8b"
_ZSTD: Final = b"\x28\xb5\x2f\xfd"
_ZSTD_WINDOW_LOG: Final = 23  # 8 MiB: what a receiver has to support, and the most a sender may use (RFC 9659)
# The codings of IANA's registry. A name that the server made up is not shown: it could be anything.
_KNOWN: Final = ("br", "zstd", "gzip", "deflate", "compress", "dcb", "dcz", "exi", "pack200-gzip")
# The module that reads a coding, and what to do if it is missing.
_MODULES: Final = {
    "br": ("brotli", 'pip install "brotli>=1.2" to read it'),
    "zstd": ("backports.zstd", 'pip install "backports.zstd>=1.0" to read it')
    if sys.version_info < (3, 14)
    else ("compression.zstd", "this Python was built without zstd"),
}


def decompressed(body: bytes, coding: str, limit: int) -> tuple[bytes, bool]:
    """Undo the compression, as often as the body has it; ``coding`` need not be right.

    Args:
        body: The body as it arrived.
        coding: The header Content-Encoding. Proxies forget to change it when they change the body.
        limit: Stop after this number of bytes.

    Returns:
        The body, of at most ``limit + 1`` bytes, and whether its end is there.
    """
    for _ in range(2):
        inflated, whole = None, True
        for decoder in _decoders(body, coding.lower()):
            # Each package has exceptions of its own, and an import of a broken one may raise anything.
            with suppress(Exception):
                inflated, whole = decoder(body, limit + 1)
                break
        if inflated is None:
            break
        body = inflated
        if not whole:
            return body, False
    return body, True


def unread(coding: str) -> str:
    """What to say of a body with this Content-Encoding that could not be read; empty if it has none."""
    names = [name.strip() for name in coding.lower().split(",") if name.strip() not in ("", "identity")]
    if not names:
        return ""
    shown = ", ".join(name for name in names if name in _KNOWN) or "an unknown coding"
    missing = [remedy for name in names for remedy in _missing(name)]
    remedy = f": {missing[0]}" if missing else ""
    return f"a body that cannot be read (Content-Encoding: {shown}){remedy}"


def _missing(name: str) -> Iterator[str]:
    """What to do to read a coding; nothing if its module is there, or if there is none."""
    if name in _MODULES:
        module, remedy = _MODULES[name]
        if _imported(module) is None:
            yield remedy


def _imported(module: str) -> Any:
    with suppress(ImportError):
        found: Any = importlib.import_module(module)
        # Before 1.2 brotli could not limit its output: a few bytes would fill the memory.
        if module != "brotli" or hasattr(found.Decompressor, "can_accept_more_data"):
            return found
    return None


_Decoder = Callable[[bytes, int], tuple[bytes, bool]]


def _decoders(body: bytes, coding: str) -> Iterator[_Decoder]:
    """The decoders to try, the surest first."""
    if body.startswith(_GZIP):
        yield _gzip
    if body.startswith(_ZSTD):
        yield _zstd
    if "deflate" in coding:  # servers disagree on whether deflate has zlib's header
        yield _deflate
        yield _deflate_without_header
    if "br" in (name.strip() for name in coding.split(",")):
        yield _br


def _gzip(body: bytes, limit: int) -> tuple[bytes, bool]:
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 16)
    return inflater.decompress(body, limit), inflater.eof


def _deflate(body: bytes, limit: int) -> tuple[bytes, bool]:
    inflater = zlib.decompressobj()
    return inflater.decompress(body, limit), inflater.eof


def _deflate_without_header(body: bytes, limit: int) -> tuple[bytes, bool]:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = inflater.decompress(body, limit)
    # Without a header, the first bytes of any body may look like a compressed one.
    if not inflater.eof or inflater.unused_data:
        raise ValueError("not deflate")
    return inflated, True


def _br(body: bytes, limit: int) -> tuple[bytes, bool]:
    inflater = _imported(_MODULES["br"][0]).Decompressor()
    inflated: bytes = inflater.process(body, output_buffer_limit=limit)
    # It has no header, either. A body that is longer than the limit is not believed to be one by chance.
    if not inflater.is_finished() and len(inflated) < limit:
        raise ValueError("not Brotli")
    return inflated[:limit], inflater.is_finished()


def _zstd(body: bytes, limit: int) -> tuple[bytes, bool]:
    zstd = _imported(_MODULES["zstd"][0])
    inflater = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG})
    return inflater.decompress(body, max_length=limit), inflater.eof
