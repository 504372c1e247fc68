"""Arguments with which no refresher can be made, and no secret in any repr or log."""

from __future__ import annotations

import logging
import subprocess
import sys
import traceback
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from joserfc.jwk import ECKey, OctKey, OKPKey, RSAKey

from support.oauth2_calls import GOOD, ID, REFRESH, SECRET, refresh, show_no_secret
from support.scripted_endpoint import Endpoint, answer
from tokenstore import ConfigurationError, InvalidInputError, MissingDependencyError
from tokenstore.integrations import _endpoint
from tokenstore.integrations.oauth2 import OAuth2Refresher

RSA = RSAKey.generate_key(2048)


def _short_rsa(bits: int) -> bytes:
    key = rsa.generate_private_key(65537, bits)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://example.com/token", "https"),
        ("http://localhost.example.com/token", "https"),
        ("http://127.0.0.1.example.com/token", "https"),
        ("http://10.0.0.1/token", "https"),
        ("ftp://localhost/token", "https"),
        ("https://user:s3cr3t@example.com/token", "password"),
        ("https://user@example.com/token", "password"),
        ("http://localhost@example.com/token", "password"),
        ("https://example.com/token#part", "fragment"),
        ("https://example.com/token#", "fragment"),
        ("https:///token", "no URL"),
        ("https://exa mple.com", "no URL"),
        ("https://example.com\n/token", "no URL"),
        ("https://[::1", "no URL"),
        ("https://example.com:port/", "no URL"),
        ("/token", "no URL"),
        ("", "empty"),
    ],
)
def test_an_unsafe_url_is_refused(url: str, why: str) -> None:
    """Secrets would be sent there. The error does not contain the URL, which may contain a secret too."""
    for token_url, revocation_url in ((url, None), ("https://example.com", url)):
        with pytest.raises(ConfigurationError, match=why) as caught:
            OAuth2Refresher(token_url, ID, revocation_url=revocation_url)
        assert "s3cr3t" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://keycloak:8080/token", "keycloak"),
        ("http://Auth.corp.example/token", "auth.corp.example"),
        ("http://10.0.0.1/token", "10.0.0.1"),
        ("http://[fd00::1]:80/token", "fd00::1"),
    ],
)
def test_http_on_a_private_host_has_to_be_asked_for(url: str, host: str) -> None:
    """By the host's name; that opens no other host."""
    for hosts in ((), ("other",), (host + ".example",)):
        with pytest.raises(ConfigurationError, match="https"):
            OAuth2Refresher(url, ID, SECRET, http_hosts=hosts)
    OAuth2Refresher(url, ID, SECRET, revocation_url=url, http_hosts=[host])
    with pytest.raises(ConfigurationError, match="https"):
        OAuth2Refresher(url, ID, SECRET, revocation_url="http://elsewhere/", http_hosts=[host])


@pytest.mark.parametrize(("hosts", "why"), [("keycloak", "collection"), (["8.8.8.8"], "public"), ([""], "empty")])
def test_http_hosts_are_checked(hosts: Any, why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        OAuth2Refresher("https://example.com", ID, SECRET, http_hosts=hosts)


@pytest.mark.parametrize(
    "url", ["https://example.com/token?x=1", "http://localhost:8080/", "http://127.9.9.9/", "http://[::1]:80/token"]
)
def test_a_safe_url_is_accepted(url: str) -> None:
    """A URL with https is safe for any host, and one with http for this machine."""
    assert not OAuth2Refresher(url, ID).can_revoke


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"client_secret": ""}, "client_secret must not be empty"),
        ({"client_secret": "\ud800"}, "surrogate"),
        ({"client_secret": 7}, "client_secret must be a str"),
        ({"client_id": ""}, "client_id must not be empty"),
        ({"auth_method": "client_secret_basic"}, "do not go together"),
        ({"auth_method": "client_secret_jwt"}, "auth_method must be one of"),
        ({"client_secret": "x", "auth_method": "none"}, "do not go together"),
        ({"client_secret": "x", "auth_method": "private_key_jwt"}, "do not go together"),
        ({"auth_method": "private_key_jwt"}, "do not go together"),
        ({"client_secret": "x", "private_key": RSA.as_pem(private=True)}, "do not go together"),
        ({"private_key": "no key"}, "private_key must be"),
        ({"private_key": RSA.as_pem(private=False)}, "private_key must be"),
        ({"private_key": RSA.as_pem(private=True, password="x")}, "private_key must be"),
        ({"private_key": OctKey.generate_key(256).as_dict()}, "private_key must be"),
        ({"private_key": {"kty": "RSA"}}, "private_key must be"),
        ({"private_key": OKPKey.generate_key("X25519").as_pem(private=True)}, "on one of the curves P-256"),
        ({"private_key": ECKey.generate_key("secp256k1").as_pem(private=True)}, "on one of the curves P-256"),
        *(
            ({"private_key": key.as_pem(private=True), "jwt_algorithm": algorithm}, "jwt_algorithm must be one of")
            for key, others in (
                (RSA, ["ES256", "EdDSA"]),
                (ECKey.generate_key("P-256"), ["ES384", "RS256"]),
                (OKPKey.generate_key("Ed25519"), ["ES256"]),
            )
            for algorithm in [*others, "none", "None", "HS256", "RS1", "", "unheard_of", 7]
        ),
        ({"client_secret": "x", "jwt_algorithm": "none"}, "do not go together"),
        ({"private_key": _short_rsa(1024)}, "has 1024 bits; an RSA key needs at least 2048"),
        ({"private_key": _short_rsa(2040)}, "has 2040 bits; an RSA key needs at least 2048"),
        ({"private_key": RSA.as_pem(private=True), "jwt_headers": {"unheard_of": "x"}}, "do not go together"),
        ({"rotation": "sometimes"}, "rotation must be one of"),
        ({"extra_parameters": {"client_secret": "x"}}, "extra_parameters cannot hold client_secret"),
        ({"extra_parameters": {"scope": "x", "grant_type": "y"}}, "cannot hold grant_type, scope"),
        ({"extra_parameters": {"x": ""}}, "x must not be empty"),
        ({"extra_parameters": {1: "x"}}, "extra_parameters must be a str"),
        ({"scope": ""}, "scope must not be empty"),
    ],
)
def test_invalid_or_conflicting_arguments_are_refused(arguments: Mapping[str, Any], why: str) -> None:
    """They are refused when the refresher is made, not at the first refresh; the error contains no key."""
    with pytest.raises(ConfigurationError, match=why) as caught:
        OAuth2Refresher("https://example.com/token", **{"client_id": ID, **arguments})
    show_no_secret(caught.value)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "10", True])
def test_the_timeout_is_a_positive_number_of_seconds(timeout: Any) -> None:
    with pytest.raises(InvalidInputError, match="timeout"):
        OAuth2Refresher("https://example.com/token", ID, timeout=timeout)
    for name in ("default_lifetime", "max_lifetime"):
        with pytest.raises(InvalidInputError, match=name):
            OAuth2Refresher("https://example.com/token", ID, **{name: timeout})


def test_the_lifetimes_are_seconds_or_unknown() -> None:
    refresher = OAuth2Refresher("https://example.com/token", ID, default_lifetime=7200)
    assert (refresher.default_lifetime, refresher.max_lifetime) == (7200.0, None)


def test_the_error_for_certificates_that_cannot_be_loaded_names_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The error is raised when the refresher is made."""
    (tmp_path / "bad.pem").write_text("no certificate")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "bad.pem"))
    _endpoint._tls_context.cache_clear()
    with pytest.raises(ConfigurationError, match="SSL_CERT_FILE"):
        OAuth2Refresher("https://example.com/token", ID)
    OAuth2Refresher("https://example.com/token", ID, trust_env=False)


def test_no_repr_or_log_line_contains_a_secret(endpoint: Endpoint, caplog: pytest.LogCaptureFixture) -> None:
    """The log lines include those of httpx."""
    endpoint.script(answer({}, 500), answer(GOOD))
    basic = b64encode(f"{quote_plus(ID)}:{quote_plus(SECRET)}".encode()).decode()
    with caplog.at_level(logging.DEBUG):
        for method in ("client_secret_basic", "client_secret_post"):
            refresher = OAuth2Refresher(endpoint.url, ID, SECRET, auth_method=method, rotation="none")
            refresh(refresher)
            caplog.records.append(logging.makeLogRecord({"msg": repr(refresher)}))
    assert "<OAuth2Refresher 127.0.0.1 client_secret_post rotation=none>" in caplog.records[-1].getMessage()
    text = "".join(found.getMessage() for found in caplog.records)
    for secret in (SECRET, quote_plus(SECRET), basic, REFRESH, "gho_new", "ghr_next"):
        assert secret not in text


@pytest.mark.parametrize("missing", ["authlib", "httpx", "joserfc"])
def test_without_the_extra_the_error_says_what_to_install(missing: str) -> None:
    """The modules can be imported; making a refresher raises the error."""
    code = f"""
import sys
sys.modules[{missing!r}] = None
from tokenstore import MissingDependencyError
from tokenstore.integrations import providers
from tokenstore.integrations.oauth2 import OAuth2Refresher
try:
    OAuth2Refresher("https://example.com/token", "id")
except MissingDependencyError as error:
    print(error)
"""
    printed = subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True)
    assert 'pip install "tokenstore[oauth]"' in printed.stdout
    assert issubclass(MissingDependencyError, ImportError)
