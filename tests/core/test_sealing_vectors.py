"""The test vectors of the sealed format: the library and a second implementation agree with each of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from support.gcm_siv import associated_data, decrypt, encrypt, polyval, seal, unseal
from support.paths import DOCS
from tokenstore import Keyring, SealingError, TamperedError
from tokenstore.keyring import place_of
from tokenstore.records import TokenKey
from tokenstore.value_records import ValueKey

Vector = dict[str, Any]

VECTORS = json.loads((DOCS / "sealing-vectors.json").read_text("utf-8"))
OPENS: list[Vector] = VECTORS["opens"]
DOES_NOT_OPEN: list[Vector] = VECTORS["does_not_open"]


def _described(vector: Vector) -> str:
    return str(vector["description"])


def _key_of(vector: Vector) -> TokenKey | ValueKey:
    if vector["kind"] == "value":
        return ValueKey(vector["value_namespace"], vector["value_name"])
    return TokenKey(vector["provider"], vector["user_id"], vector["account"])


def _place_of(vector: Vector) -> list[str]:
    """The texts of the associated data, in order."""
    return [vector["namespace"], *_key_of(vector), vector["field"]]


def _opened(vector: Vector) -> str:
    key = _key_of(vector)
    keyring = Keyring({vector["key_name"]: bytes.fromhex(vector["key"])})
    sealed = bytes.fromhex(vector["sealed"])
    return keyring.open(key, vector["field"], sealed, place_of(key, vector["namespace"]))


@pytest.mark.parametrize("vector", OPENS, ids=_described)
def test_the_library_seals_and_opens_each_vector(vector: Vector, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the nonce of the vector, in place of a random one."""
    key, nonce = _key_of(vector), bytes.fromhex(vector["nonce"])
    monkeypatch.setattr("tokenstore.keyring.os.urandom", lambda size: nonce[:size])
    keyring = Keyring({vector["key_name"]: bytes.fromhex(vector["key"])})
    sealed = keyring.seal(key, vector["field"], vector["plaintext"], place_of(key, vector["namespace"]))
    assert sealed.hex() == vector["sealed"]
    assert _opened(vector) == vector["plaintext"]


@pytest.mark.parametrize("vector", OPENS, ids=_described)
def test_a_second_implementation_seals_and_opens_each_vector(vector: Vector) -> None:
    """It has been written from the specification and RFC 8452, and shares no code with the library."""
    name, key, texts = vector["key_name"], bytes.fromhex(vector["key"]), _place_of(vector)
    assert associated_data(name, texts).hex() == vector["associated_data"]
    assert seal(name, key, texts, bytes.fromhex(vector["nonce"]), vector["plaintext"]).hex() == vector["sealed"]
    assert unseal({name: key}, texts, bytes.fromhex(vector["sealed"])) == vector["plaintext"]


@pytest.mark.parametrize("vector", DOES_NOT_OPEN, ids=_described)
def test_neither_implementation_opens_what_must_not_open(vector: Vector) -> None:
    with pytest.raises(SealingError):
        _opened(vector)
    with pytest.raises((ValueError, LookupError)):
        unseal({vector["key_name"]: bytes.fromhex(vector["key"])}, _place_of(vector), bytes.fromhex(vector["sealed"]))


def test_a_plaintext_that_is_not_utf_8_is_an_error_of_tokenstore_that_does_not_show_it() -> None:
    """Only another program that has the key can have sealed it."""
    [vector] = [vector for vector in DOES_NOT_OPEN if "not UTF-8" in vector["description"]]
    with pytest.raises(
        TamperedError, match=r"access_token of .* is not UTF-8 text: another program sealed it"
    ) as caught:
        _opened(vector)
    assert caught.value.__cause__ is caught.value.__context__ is None


def test_the_vectors_have_every_field_and_both_kinds() -> None:
    kinds = {(vector["kind"], vector["field"]) for vector in OPENS}
    fields = ("access_token", "refresh_token", "extra", "metadata")
    assert kinds == {("value", "value"), *(("token row", field) for field in fields)}


@pytest.mark.parametrize(
    ("plaintext", "associated", "result"),
    [
        ("", "", "07f5f4169bbf55a8400cd47ea6fd400f"),
        ("0100000000000000", "", "c2ef328e5c71c83b843122130f7364b761e0b97427e3df28"),
        ("0200000000000000", "01", "1de22967237a813291213f267e3b452f02d01ae33e4ec854"),
    ],
)
def test_the_second_implementation_matches_test_vectors_of_rfc_8452(
    plaintext: str, associated: str, result: str
) -> None:
    """The vectors are from appendix C.2, for AES-256-GCM-SIV."""
    key, nonce = bytes.fromhex("01" + "00" * 31), bytes.fromhex("03" + "00" * 11)
    data = bytes.fromhex(associated)
    assert encrypt(key, nonce, bytes.fromhex(plaintext), data).hex() == result
    assert decrypt(key, nonce, bytes.fromhex(result), data).hex() == plaintext


def test_polyval_matches_the_example_of_rfc_8452() -> None:
    """The example is from section 7, with two blocks."""
    blocks = bytes.fromhex("4f4f95668c83dfb6401762bb2d01a262d1a24ddd2721d006bbe45f20d3c9f362")
    assert (
        polyval(bytes.fromhex("25629347589242761d31f826ba4b757b"), blocks).hex() == "f7a3b47b846119fae5b7866cf5e5b77e"
    )
