"""Reads DPoP proofs with joserfc, which knows nothing of the code that makes them."""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode
from typing import Any

from joserfc import jwt
from joserfc.jwk import ECKey

__all__ = ["claims_of", "key_in"]


def key_in(proof: str) -> ECKey:
    """The public key in the header of a proof."""
    header = json.loads(urlsafe_b64decode(proof.partition(".")[0] + "=="))
    assert header.keys() == {"typ", "alg", "jwk"}
    assert (header["typ"], header["alg"]) == ("dpop+jwt", "ES256")
    assert header["jwk"].keys() == {"kty", "crv", "x", "y"}  # no private key
    return ECKey.import_key(header["jwk"])


def claims_of(proof: str | None) -> dict[str, Any]:
    """The claims of a proof, whose signature is verified."""
    assert proof is not None
    return dict(jwt.decode(proof, key_in(proof), algorithms=["ES256"]).claims)
