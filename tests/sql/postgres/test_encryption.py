"""TLS: the connections that `sslmode` refuses, and the warning about unencrypted connections to other machines."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from support import servers
from support.matrix import Row, params
from tokenstore import BackendUnavailableError, Keyring, open_store

both_drivers = pytest.mark.parametrize("row", params(names=["postgresql+asyncpg", "postgresql+psycopg"]))

_LOGGER = "tokenstore.sql.postgres"


class _Authority:
    """A certificate authority."""

    def __init__(self, name: str) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        own = self._builder(self._name, self._key).add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        self.certificate = _pem(own.sign(self._key, hashes.SHA256()))

    def files_for(self, host: str) -> dict[str, str]:
        """Make a server's certificate and key."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
        builder = self._builder(name, key).add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), False)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return {
            "server.crt": _pem(builder.sign(self._key, hashes.SHA256())),
            "server.key": private.decode(),
        }

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=1))
        )


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


@pytest.fixture(scope="module")
def authority() -> _Authority:
    return _Authority("the authority of the test")


@pytest.fixture(scope="module")
def encrypted(start_postgres: Callable[..., servers.Server], authority: _Authority) -> servers.Server:
    """A server with TLS, whose certificate is valid for `localhost` but not for its address."""
    return start_postgres(
        files=authority.files_for("localhost"), ssl="on", ssl_cert_file="../server.crt", ssl_key_file="../server.key"
    )


@pytest.fixture
def root(authority: _Authority, tmp_path: Path) -> str:
    path = tmp_path / "root.crt"
    path.write_text(authority.certificate)
    return str(path)


@pytest.fixture
def other_root(tmp_path: Path) -> str:
    path = tmp_path / "other.crt"
    path.write_text(_Authority("another authority").certificate)
    return str(path)


def _url(server: servers.Server, row: Row, host: str | None = None, port: int | None = None) -> str:
    url = server.url(row.name.partition("+")[2])
    return url.replace(f"@{server.host}:{server.port}", f"@{host or server.host}:{port or server.port}")


async def _connects(url: str, keyring: Keyring, **options: str) -> None:
    async with open_store(f"{url}?{urlencode(options)}", keyring=keyring) as store:
        await store.setup()
        assert await store.load_tokens("github", "u1") is None


@pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
@both_drivers
def test_a_server_without_tls_is_refused(row: Row, mode: str, root: str, keyring: Keyring) -> None:
    options = {"sslmode": mode} if mode == "require" else {"sslmode": mode, "sslrootcert": root}
    with pytest.raises(BackendUnavailableError, match=r"(?i)ssl"):
        asyncio.run(_connects(_url(servers.postgres(), row), keyring, **options))


@both_drivers
def test_the_certificate_is_verified_as_sslmode_says(
    row: Row, encrypted: servers.Server, root: str, other_root: str, keyring: Keyring
) -> None:
    """verify-ca checks the certificate authority, and verify-full also the host's name."""
    by_name, by_address = _url(encrypted, row, "localhost"), _url(encrypted, row)
    for url, mode, known in (
        (by_address, "require", None),
        (by_address, "verify-ca", root),
        (by_name, "verify-full", root),
    ):
        options = {"sslmode": mode} if known is None else {"sslmode": mode, "sslrootcert": known}
        asyncio.run(_connects(url, keyring, **options))
    for url, mode, known in (
        (by_name, "verify-ca", other_root),
        (by_name, "verify-full", other_root),
        (by_address, "verify-full", root),
    ):
        with pytest.raises(BackendUnavailableError, match=r"(?i)certificate"):
            asyncio.run(_connects(url, keyring, sslmode=mode, sslrootcert=known))


def _own_address() -> str:
    """Return an address of this machine that other machines can use."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has only loopback addresses")
        address = str(probe.getsockname()[0])
    assert not ip_address(address).is_loopback
    return address


@asynccontextmanager
async def _reachable_from_outside(server: servers.Server) -> AsyncIterator[tuple[str, int]]:
    """Make the server reachable under an address that is not a loopback address."""
    tasks: set[asyncio.Task[None]] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection(server.host, server.port)
        tasks.add(asyncio.create_task(copy(reader, to_server)))
        tasks.add(asyncio.create_task(copy(from_server, writer)))

    listener = await asyncio.start_server(accept, _own_address(), 0)
    try:
        host, port = listener.sockets[0].getsockname()
        yield host, port
    finally:
        listener.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        await listener.wait_closed()


@both_drivers
def test_an_unencrypted_connection_over_a_network_is_logged_once(
    row: Row, encrypted: servers.Server, keyring: Keyring, caplog: pytest.LogCaptureFixture
) -> None:
    async def warnings(server: servers.Server, *, outside: bool = True, **options: Any) -> list[str]:
        caplog.clear()
        async with _reachable_from_outside(server) as (host, port):
            url = _url(server, row, host, port) if outside else _url(server, row)
            async with open_store(url, keyring=keyring, pool_size=3, **options) as store:
                await store.setup()
                await asyncio.gather(*(store.load_tokens("github", f"u{number}") for number in range(9)))
        return [record.getMessage() for record in caplog.records if record.name == _LOGGER]

    async def main() -> None:
        plain = servers.postgres()
        [warning] = await warnings(plain)
        assert "sslmode=verify-full" in warning
        assert plain.password not in warning
        assert len(await warnings(plain, sslmode="prefer")) == 1
        assert await warnings(plain, sslmode="disable") == []
        assert await warnings(plain, outside=False) == []
        assert await warnings(encrypted) == []

    with caplog.at_level(logging.WARNING, _LOGGER):
        asyncio.run(main())
