"""A key pair for DPoP (RFC 9449), and the proofs that it signs. Needs no extra: ``cryptography`` signs."""

from __future__ import annotations

import json
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from secrets import token_urlsafe
from typing import Any, Final, Self
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from tokenstore.errors import ConfigurationError, TamperedError
from tokenstore.tracebacks import Hidden, clears_locals
from tokenstore.validation import plain_text

__all__ = ["DPoPKey", "target_of"]

_CURVE: Final = ec.SECP256R1()
_SIZE: Final = 32  # bytes of a coordinate, and of each half of a signature (RFC 7518 section 3.4)
_PORTS: Final = {"http": 80, "https": 443}


class DPoPKey:
    """A private key of the algorithm ES256. Its ``repr`` shows the thumbprint of the public key.

    :class:`tokenstore.integrations.dpop.DPoP` makes it, and keeps it.

    Args:
        private_key: A private key on the curve P-256.

    Attributes:
        thumbprint: The thumbprint of the public key (RFC 7638): the parameter ``dpop_jkt`` of an authorization request
            (RFC 9449 section 10).
    """

    def __init__(self, private_key: ec.EllipticCurvePrivateKey) -> None:
        point = private_key.public_key().public_numbers()
        self._public = {"kty": "EC", "crv": "P-256", "x": _number(point.x), "y": _number(point.y)}
        self._private = Hidden(private_key)
        # The members in the order of their names, without spaces (RFC 7638 section 3).
        self.thumbprint: str = _digest(_json({name: self._public[name] for name in sorted(self._public)}))

    def __repr__(self) -> str:
        return f"<DPoPKey {self.thumbprint}>"

    @classmethod
    def generate(cls) -> Self:
        """A new key."""
        return cls(ec.generate_private_key(_CURVE))

    @classmethod
    @clears_locals
    def from_jwk(cls, jwk: object) -> Self:
        """A key from a JWK that :meth:`to_jwk` made.

        Raises:
            TamperedError: It is another value.
        """
        with suppress(KeyError, TypeError, ValueError):
            fields = dict(jwk) if isinstance(jwk, Mapping) else {}
            number = int.from_bytes(urlsafe_b64decode(fields["d"] + "="))
            key = cls(ec.derive_private_key(number, _CURVE))
            if key.to_jwk() == fields:
                return key
        raise TamperedError("the value is no DPoP key that tokenstore has stored: another program stored it")

    def to_jwk(self) -> dict[str, str]:
        """The private key as a JWK (RFC 7518 section 6.2)."""
        return {**self._public, "d": _number(self._private.reveal().private_numbers().private_value)}

    @clears_locals
    def proof(self, method: str, url: str, *, access_token: str | None = None, nonce: str | None = None) -> str:
        """A proof for one request: the value of its header ``DPoP`` (RFC 9449 section 4.2). Use it once.

        Args:
            method: The HTTP method.
            url: The URL of the request; its query and fragment are left out.
            access_token: The access token that is sent with the request. Default: none, as to a token endpoint.
            nonce: The last ``DPoP-Nonce`` of the server. Default: none.

        Raises:
            ConfigurationError: The URL has no scheme or no host.
            InvalidInputError: The access token is no text that can be encoded.
        """
        claims: dict[str, Any] = {
            "jti": token_urlsafe(16),
            "htm": method,
            "htu": target_of(url),
            "iat": int(time.time()),
            "ath": None if access_token is None else _digest(plain_text("access_token", access_token).encode()),
            "nonce": nonce,
        }
        header = {"typ": "dpop+jwt", "alg": "ES256", "jwk": self._public}
        given = {name: value for name, value in claims.items() if value is not None}
        signed = f"{_encoded(_json(header))}.{_encoded(_json(given))}"
        halves = decode_dss_signature(self._private.reveal().sign(signed.encode(), ec.ECDSA(SHA256())))
        return f"{signed}.{_encoded(b''.join(half.to_bytes(_SIZE) for half in halves))}"


def target_of(url: str) -> str:
    """A URL without query and fragment, in one spelling: that of the claim ``htu``.

    The spelling is normalised (RFC 3986 sections 6.2.2 and 6.2.3), because a server may compare strings.

    Raises:
        ConfigurationError: The URL has no scheme or no host.
    """
    with suppress(ValueError):
        parts = urlsplit(url)
        if (host := parts.hostname) and parts.scheme in _PORTS:
            host = f"[{host}]" if ":" in host else host
            port = "" if parts.port in (None, _PORTS[parts.scheme]) else f":{parts.port}"
            return f"{parts.scheme}://{host}{port}{parts.path or '/'}"
    raise ConfigurationError("a DPoP proof is for an http or https URL with a host")  # which may contain a password


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _digest(data: bytes) -> str:
    return _encoded(sha256(data).digest())


def _number(number: int) -> str:
    return _encoded(number.to_bytes(_SIZE))


def _encoded(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()
