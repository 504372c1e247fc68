"""How a strict provider checks DPoP proofs (RFC 9449): every claim, each proof once, and nonces on demand."""

from __future__ import annotations

import hmac
import json
import re
import secrets
from base64 import urlsafe_b64decode, urlsafe_b64encode
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["NonceNeeded", "ProofRefused", "Proofs", "is_thumbprint"]

_AGE, _AHEAD = 60.0, 5.0  # seconds that a proof's time may be before and after the server's
_SEGMENT = re.compile(r"[A-Za-z0-9_-]+")
_THUMBPRINT = re.compile(r"[A-Za-z0-9_-]{43}")


class ProofRefused(Exception):
    """A proof is not acceptable; the text says why, and contains nothing of the proof."""


class NonceNeeded(Exception):
    """A proof has not the server's current nonce."""


class Proofs:
    """The proofs that one server has seen, and its nonce. Not thread-safe.

    Args:
        clock: Seconds since the epoch.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen: dict[str, float] = {}  # until when each `jti` has to be remembered
        self.nonce = ""
        self.renew_nonce()

    def renew_nonce(self) -> None:
        """Take another nonce: proofs with the one before are refused from now on."""
        self.nonce = f"nonce_{secrets.token_urlsafe(16)}"

    def check(
        self, proof: str, method: str, url: str, *, access_token: str | None = None, demands_nonce: bool = False
    ) -> str:
        """Check the proof of a request (RFC 9449 section 4.3).

        Args:
            proof: The value of the header ``DPoP``.
            method: The request's method.
            url: The request's URL, without a query.
            access_token: The access token beside the proof; None: at the token endpoint.
            demands_nonce: Whether the proof needs the nonce.

        Returns:
            The thumbprint of the proof's key (RFC 7638).

        Raises:
            NonceNeeded: The proof is acceptable but for its nonce.
            ProofRefused: It is not acceptable.
        """
        header, claims, thumbprint = _verified(proof)
        if header.keys() != {"typ", "alg", "jwk"}:
            raise ProofRefused("the header has other members than typ, alg and jwk")
        jti, issued_at = claims.get("jti"), claims.get("iat")
        if not isinstance(jti, str) or not 16 <= len(jti) <= 128:
            raise ProofRefused("no usable jti")
        if claims.get("htm") != method:
            raise ProofRefused("htm is not the method of the request")
        if claims.get("htu") != url:
            raise ProofRefused("htu is not the URL of the request")
        ath = None if access_token is None else _encoded(sha256(access_token.encode()).digest())
        if claims.get("ath") != ath:
            raise ProofRefused("ath is not that of the access token")
        now = self._clock()
        if not isinstance(issued_at, int) or not now - _AGE <= issued_at <= now + _AHEAD:
            raise ProofRefused("iat is not the time of now: check the clocks")
        self._seen = {known: until for known, until in self._seen.items() if until > now}
        if jti in self._seen:
            raise ProofRefused("the proof was used before")
        self._seen[jti] = now + _AGE + _AHEAD
        if demands_nonce and not hmac.compare_digest(str(claims.get("nonce", "")).encode(), self.nonce.encode()):
            raise NonceNeeded
        return thumbprint


def is_thumbprint(text: str) -> bool:
    """Whether a text may be a thumbprint: the parameter ``dpop_jkt``."""
    return _THUMBPRINT.fullmatch(text) is not None


def _verified(proof: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The header and the claims of a proof whose signature is right, and its key's thumbprint."""
    segments = proof.split(".")
    if len(segments) != 3 or not all(map(_SEGMENT.fullmatch, segments)):
        raise ProofRefused("not a JWT in the compact form")
    header, claims = (_object(segment) for segment in segments[:2])
    if (header.get("typ"), header.get("alg")) != ("dpop+jwt", "ES256"):
        raise ProofRefused("typ is not dpop+jwt, or alg is not ES256")
    jwk = header.get("jwk")
    if not isinstance(jwk, dict) or jwk.keys() != {"kty", "crv", "x", "y"}:
        raise ProofRefused("jwk is no public key of the curve P-256, or has other members")
    if (jwk["kty"], jwk["crv"]) != ("EC", "P-256"):
        raise ProofRefused("jwk is of another kind than EC on the curve P-256")
    signature = _bytes(segments[2])
    if len(signature) != 64:
        raise ProofRefused("a signature of ES256 has 64 bytes")
    try:
        x, y, r, s = map(int.from_bytes, (_bytes(str(jwk["x"])), _bytes(str(jwk["y"])), signature[:32], signature[32:]))
        key = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
        key.verify(encode_dss_signature(r, s), ".".join(segments[:2]).encode(), ec.ECDSA(SHA256()))
    except (InvalidSignature, ValueError):
        raise ProofRefused("the signature does not fit the key") from None
    members = {name: jwk[name] for name in ("crv", "kty", "x", "y")}
    return header, claims, _encoded(sha256(json.dumps(members, separators=(",", ":")).encode()).digest())


def _object(segment: str) -> dict[str, Any]:
    try:
        value = json.loads(_bytes(segment))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ProofRefused("a part of the JWT is no JSON object")
    return value


def _bytes(segment: str) -> bytes:
    try:
        return urlsafe_b64decode(segment + "=" * (-len(segment) % 4))
    except ValueError:
        raise ProofRefused("malformed base64url") from None


def _encoded(data: bytes) -> str:
    return urlsafe_b64encode(data).decode().rstrip("=")
