"""TLS to MySQL and MariaDB: if it is configured, no password is sent without it, whatever a server or proxy says."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from secrets import token_hex
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from support import servers
from support.database import connection_of
from support.matrix import Row, params
from support.server_processes import sandbox
from tokenstore import AuthTokenStore, BackendUnavailableError, Keyring, open_store

driver_rows = pytest.mark.parametrize("row", params(names=["mariadb+aiomysql", "mariadb+asyncmy"]))

PASSWORD = "pa55w0rd-in-clear"
LOGGER = "tokenstore.sql.mysql"
_CLIENT_SSL = 0x0800


def _own_address() -> str:
    """Return an address of this machine that is not a loopback address; empty if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # sends nothing
        address = str(probe.getsockname()[0])
        return "" if ipaddress.ip_address(address).is_loopback else address
    return ""


@dataclass(frozen=True)
class Certificates:
    """The files of a certificate authority, and of a server certificate that it signed."""

    ca: str
    certificate: str
    key: str


def _certificates(folder: Path) -> Certificates:
    """Make certificates; the server's is valid for 127.0.0.1 and this machine's address, but not for localhost."""
    folder.mkdir()
    folder.chmod(0o711)  # the server runs as another user

    def write(name: str, content: bytes) -> str:
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o644)
        return str(folder / name)

    def sign(name: str, key: Any, issuer: str, by: Any, *extensions: x509.ExtensionType) -> bytes:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            # Python 3.13 and later require these two extensions.
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key()), critical=False)
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=not isinstance(extension, x509.SubjectAlternativeName))
        return builder.sign(by, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    authority, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    addresses = [x509.IPAddress(ipaddress.ip_address(text)) for text in filter(None, ["127.0.0.1", _own_address()])]
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    signs = dict.fromkeys(
        ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False
    )
    usage = x509.KeyUsage(key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False, **signs)
    ca = sign("authority", authority, "authority", authority, x509.BasicConstraints(ca=True, path_length=0), usage)
    leaf = sign("server", key, "authority", authority, x509.SubjectAlternativeName(addresses))
    return Certificates(write("ca.pem", ca), write("server.pem", leaf), write("server.key", pem))


@pytest.fixture(scope="module")
def certificates() -> Certificates:
    # In the servers' folder, because the server's account cannot read pytest's folder.
    return _certificates(sandbox().folder / f"tls-{token_hex(4)}")


@pytest.fixture(scope="module")
def encrypting(certificates: Certificates) -> servers.Server:
    """A MariaDB with TLS, only for the tests of this file."""
    tls = {"ssl-ca": certificates.ca, "ssl-cert": certificates.certificate, "ssl-key": certificates.key}
    return servers.start_mariadb(*(f"--{name}={value}" for name, value in tls.items()))


@pytest.fixture(scope="module")
def clear() -> servers.Server:
    """A MariaDB without TLS, only for the tests of this file."""
    return servers.start_mariadb()


def _driver(row: Row) -> str:
    return row.name.partition("+")[2]


class Wire:
    """A proxy for a server, which records what clients send.

    Args:
        server: The server.
        strip: Whether the proxy clears the bit in the server's greeting that offers TLS.

    Attributes:
        sent: The data that clients sent.
    """

    def __init__(self, server: servers.Server, *, strip: bool = False) -> None:
        self._server = server
        self._strip = strip
        self.sent = bytearray()

    @asynccontextmanager
    async def at(self, host: str = "127.0.0.1") -> AsyncIterator[servers.Server]:
        """Yield the server with the proxy's address."""
        async with _listening(self._serve, host) as port:
            yield replace(self._server, host=host, port=port)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection(self._server.host, self._server.port)
        try:
            header = await from_server.readexactly(4)
            greeting = bytearray(await from_server.readexactly(int.from_bytes(header[:3], "little")))
            if self._strip:
                at = greeting.index(0) + 1 + 4 + 8 + 1  # version, thread id, half of the salt, a zero
                flags = int.from_bytes(greeting[at : at + 2], "little")
                assert flags & _CLIENT_SSL
                greeting[at : at + 2] = (flags & ~_CLIENT_SSL).to_bytes(2, "little")
            writer.write(header + greeting)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass_on(reader, to_server, self.sent))
                group.create_task(self._pass_on(from_server, writer, bytearray()))
        finally:
            to_server.close()
            with suppress(OSError):
                await to_server.wait_closed()

    @staticmethod
    async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seen: bytearray) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                seen += data
                writer.write(data)
        writer.close()


@asynccontextmanager
async def _listening(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], host: str = "127.0.0.1"
) -> AsyncIterator[int]:
    tasks: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            with suppress(OSError, EOFError):
                await serve(reader, writer)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    listener = await asyncio.start_server(accept, host, 0)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()
        if tasks:
            await asyncio.wait(tasks, timeout=5)


async def _use(store: AuthTokenStore) -> None:
    await store.setup()
    await store.store_tokens("github", "u1", "access", "refresh", None)
    assert (await store.load_tokens("github", "u1")) is not None


async def _cipher(store: AuthTokenStore) -> str:
    """Return the cipher of one of the store's connections, as the server reports it; empty: no encryption."""
    async with connection_of(store) as connection:
        cursor = (await connection.driver_connection()).cursor()
        async with cursor as opened:
            await opened.execute("SHOW SESSION STATUS LIKE 'Ssl_cipher'")
            ((_, cipher),) = await opened.fetchall()
    return str(cipher)


# ---- With TLS configured


@driver_rows
def test_the_connection_is_encrypted(
    row: Row, encrypting: servers.Server, certificates: Certificates, keyring: Keyring
) -> None:
    async def main() -> None:
        wire = Wire(encrypting)
        async with (
            wire.at() as server,
            open_store(server.url(_driver(row)), keyring=keyring, ssl_ca=certificates.ca) as store,
        ):
            await _use(store)
            assert await _cipher(store)
        assert encrypting.user.encode() not in wire.sent
        assert b"oauth_tokens" not in wire.sent

    asyncio.run(main())


@driver_rows
def test_a_server_without_tls_is_refused(
    row: Row, clear: servers.Server, certificates: Certificates, keyring: Keyring
) -> None:
    """The error is raised before the driver sends the user's name or password."""

    async def main() -> None:
        wire = Wire(clear)
        async with (
            wire.at() as server,
            open_store(server.url(_driver(row)), keyring=keyring, ssl_ca=certificates.ca) as store,
        ):
            with pytest.raises(BackendUnavailableError) as caught:
                await store.load_tokens("github", "u1")
            assert caught.value.code in ("2026", "2003")
            with pytest.raises(BackendUnavailableError):
                await store.setup()
        assert clear.user.encode() not in wire.sent
        if "aiomysql" in row.name:
            assert "offers no TLS" in str(caught.value)
            assert not wire.sent

    asyncio.run(main())


@driver_rows
def test_a_proxy_that_hides_the_server_s_tls_gets_no_password(
    row: Row, encrypting: servers.Server, certificates: Certificates, keyring: Keyring
) -> None:
    """The connection is refused (aiomysql), or is encrypted nevertheless (asyncmy)."""

    async def main() -> None:
        wire = Wire(encrypting, strip=True)
        async with (
            wire.at() as server,
            open_store(server.url(_driver(row)), keyring=keyring, ssl_ca=certificates.ca) as store,
        ):
            if "asyncmy" in row.name:
                await _use(store)
                assert await _cipher(store)
            else:
                with pytest.raises(BackendUnavailableError, match="no password was sent") as caught:
                    await store.load_tokens("github", "u1")
                assert caught.value.code == "2026"
        assert encrypting.user.encode() not in wire.sent

    asyncio.run(main())


@driver_rows
@pytest.mark.parametrize("flaw", ["authority", "name"])
def test_a_certificate_of_another_authority_or_host_is_refused(
    row: Row, flaw: str, encrypting: servers.Server, certificates: Certificates, keyring: Keyring
) -> None:
    other = _certificates(sandbox().folder / f"tls-{token_hex(4)}")
    ca = other.ca if flaw == "authority" else certificates.ca

    async def main() -> None:
        wire = Wire(encrypting)
        async with wire.at() as server:
            host = "localhost" if flaw == "name" else server.host
            url = replace(server, host=host).url(_driver(row))
            async with open_store(url, keyring=keyring, ssl_ca=ca) as store:
                with pytest.raises(BackendUnavailableError, match="certificate") as caught:
                    await store.load_tokens("github", "u1")
                assert caught.value.code == "2026"
        assert encrypting.user.encode() not in wire.sent

    asyncio.run(main())


# ---- Without TLS configured


@driver_rows
def test_without_a_tls_option_the_driver_s_default_applies(row: Row, clear: servers.Server, keyring: Keyring) -> None:
    async def main() -> None:
        async with open_store(clear.url(_driver(row)), keyring=keyring) as store:
            await _use(store)
            assert await _cipher(store) == ""

    asyncio.run(main())


@driver_rows
@pytest.mark.parametrize("connection_kind", ["remote", "loopback", "encrypted"])
def test_an_unencrypted_remote_connection_is_logged_once(
    row: Row,
    connection_kind: str,
    encrypting: servers.Server,
    certificates: Certificates,
    keyring: Keyring,
    caplog: pytest.LogCaptureFixture,
) -> None:
    host = "127.0.0.1" if connection_kind == "loopback" else _own_address()
    if not host:
        pytest.skip("this machine has only loopback addresses")
    options: Any = {"ssl_ca": certificates.ca} if connection_kind == "encrypted" else {}

    async def main() -> None:
        async with (
            Wire(encrypting).at(host) as server,
            open_store(server.url(_driver(row)), keyring=keyring, pool_recycle=0.001, **options) as store,
        ):
            await _use(store)
            for _ in range(3):
                await store.load_tokens("github", "u1")

    with caplog.at_level(logging.WARNING, LOGGER):
        asyncio.run(main())
    warnings = [record.getMessage() for record in caplog.records if record.name == LOGGER]
    if connection_kind == "remote":
        (warning,) = warnings
        assert host in warning
        assert "ssl=true" in warning
        assert encrypting.password not in warning
    else:
        assert warnings == []


# ---- A hostile server


def _packet(number: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "little") + bytes([number]) + payload


def _greeting(plugin: bytes, *, tls: bool = False) -> bytes:
    low = (0xFFFF if tls else 0xFFFF & ~_CLIENT_SSL) & ~0x0020  # no compression
    head = b"\x0a10.11.0-MariaDB\0" + bytes(4) + b"12345678\0" + low.to_bytes(2, "little")
    # utf8mb3, autocommit, the rest of the flags, the salt's length, and the rest of the salt
    return _packet(0, head + b"\x21\2\0" + b"\xff\x80\x15" + bytes(10) + b"123456789012\0" + plugin + b"\0")


def _switch(plugin: bytes) -> bytes:
    prompt = b"\4Password: " if plugin == b"dialog" else b"12345678901234567890\0"
    return b"\xfe" + plugin + b"\0" + prompt


async def _payload(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    header = await reader.readexactly(4)
    return header[3], await reader.readexactly(int.from_bytes(header[:3], "little"))


@driver_rows
@pytest.mark.parametrize("asked_for", [False, True], ids=["no option", "ssl_ca"])
@pytest.mark.parametrize("greeted_with", [b"mysql_native_password", b"mysql_clear_password"])
@pytest.mark.parametrize("plugin", [b"mysql_clear_password", b"dialog"])
def test_a_server_that_asks_for_the_plaintext_password_does_not_get_it(
    row: Row, asked_for: bool, greeted_with: bytes, plugin: bytes, certificates: Certificates, keyring: Keyring
) -> None:
    received = bytearray()
    asked = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        writer.write(_greeting(greeted_with))
        number, answer = await _payload(reader)
        received.extend(answer)
        if len(answer) > 32:  # a shorter packet is a request for TLS
            asked += 1
            writer.write(_packet(number + 1, _switch(plugin)))
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                received.extend(data)

    async def main() -> None:
        # asyncmy waits for the server's part of the TLS handshake, which this server never sends.
        options: Any = {"ssl_ca": certificates.ca, "connect_timeout": 1} if asked_for else {}
        async with _listening(serve) as port:
            url = f"mysql+{_driver(row)}://app:{PASSWORD}@127.0.0.1:{port}/db"
            async with open_store(url, keyring=keyring, **options) as store:
                with pytest.raises(BackendUnavailableError) as caught:
                    await store.load_tokens("github", "u1")
        assert PASSWORD not in str(caught.value)
        if not asked_for:
            assert caught.value.code == "2059"
            assert "ssl=true" in str(caught.value)

    asyncio.run(main())
    assert PASSWORD.encode() not in received
    assert not (asked_for and asked)


@driver_rows
def test_over_tls_the_server_may_ask_for_the_plaintext_password(
    row: Row, certificates: Certificates, keyring: Keyring
) -> None:
    """Some cloud providers and directory services require that."""

    def serve(listener: socket.socket) -> bytes:
        # Blocking sockets, because an asyncio stream would read the first bytes of TLS before TLS can be started on it.
        raw, _ = listener.accept()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates.certificate, certificates.key)
        raw.settimeout(10)
        raw.sendall(_greeting(b"mysql_native_password", tls=True))
        assert len(raw.recv(4 + 32, socket.MSG_WAITALL)) == 4 + 32
        with context.wrap_socket(raw, server_side=True) as encrypted:
            number = encrypted.recv(1 << 16)[3]
            encrypted.sendall(_packet(number + 1, _switch(b"mysql_clear_password")))
            return encrypted.recv(1 << 16)[4:]

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            serving = asyncio.create_task(asyncio.to_thread(serve, listener))
            url = f"mysql+{_driver(row)}://app:{PASSWORD}@127.0.0.1:{listener.getsockname()[1]}/db"
            async with open_store(url, keyring=keyring, ssl_ca=certificates.ca) as store:
                with pytest.raises(BackendUnavailableError):  # this server closes the connection after that
                    await store.load_tokens("github", "u1")
            assert await serving == PASSWORD.encode() + b"\0"

    asyncio.run(main())
