"""What a scan of the TLS port finds, and what we put up with as a client: versions, ciphers, certificates."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from busgen_cds.dicom import outbox
from busgen_cds.dicom.association import Peer, Rules
from busgen_cds.dicom.listener import Listener, ListenerConfig, Tls, tls_context
from busgen_cds.dicom.outbox import Node
from busgen_cds.errors import Misconfigured, Transient
from tests.certificates import Authority
from tests.dicom import raw
from tests.reception import listening

WEAK = "ALL:COMPLEMENTOFALL:@SECLEVEL=0"


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


@contextmanager
def open_port(folder: Path, ours: Authority) -> Iterator[tuple[Listener, tuple[Path, Path, str]]]:
    certificate, key, _ = ours.issues("listener")
    scanner = ours.issues("scanner")
    tls = Tls(str(certificate), str(key), str(ours.path), port=0)
    rules = Rules(peers=(Peer("SCANNER", certificate_sha256=scanner[2]),))
    with listening(folder, ListenerConfig(rules, "127.0.0.1", None, tls, processes=0)) as listener:
        yield listener, scanner


def client(ours: Authority, identity: tuple[Path, Path, str] | None, ciphers: str = "") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(ours.path)
    if ciphers:
        context.set_ciphers(ciphers)
    if identity:
        context.load_cert_chain(identity[0], identity[1])
    return context


def shakes(port: int, context: ssl.SSLContext) -> ssl.SSLSocket | None:
    """The connection, when the server also takes the client's certificate (in TLS 1.3 it says so only afterwards)."""
    plain = socket.create_connection(("127.0.0.1", port), timeout=30)
    try:
        connection = context.wrap_socket(plain)
        connection.sendall(raw.pdu(7, bytes(4)))
        connection.settimeout(30)
        with suppress(TimeoutError):
            connection.recv(1)
        return connection
    except OSError:
        plain.close()
        return None


def _ends(connection: ssl.SSLSocket | None) -> bool:
    if connection is not None:
        connection.close()
    return connection is not None


def test_versions(tmp_path: Path, ours: Authority) -> None:
    """The port speaks TLS 1.2 and 1.3, and nothing older, whatever a client offers."""
    with open_port(tmp_path, ours) as (listener, scanner):
        for version in ssl.TLSVersion:
            if version in (ssl.TLSVersion.MINIMUM_SUPPORTED, ssl.TLSVersion.MAXIMUM_SUPPORTED):
                continue
            context = client(ours, scanner, WEAK)
            with suppress(ValueError):  # SSLv3 is not built in
                context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
                context.maximum_version = version
                spoken = version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
                assert _ends(shakes(listener.tls_port, context)) is spoken, version


def test_ciphers(tmp_path: Path, ours: Authority) -> None:
    """Of all ciphers there are, one by one, only those with forward secrecy and authenticated encryption pass."""
    everything = client(ours, None, WEAK)
    offered = [each["name"] for each in everything.get_ciphers() if each["protocol"] != "TLSv1.3"]
    with open_port(tmp_path, ours) as (listener, _):
        answers = {name: _takes(listener.tls_port, ours, name) for name in offered}
    assert sum(answer is not None for answer in answers.values()) > 30
    taken = [name for name, answer in answers.items() if answer]
    assert taken and all(name.startswith(("ECDHE-", "DHE-")) for name in taken), taken
    assert all("GCM" in name or "CHACHA20" in name for name in taken), taken


def _takes(port: int, ours: Authority, cipher: str) -> bool | None:
    """By the server's hello alone, without a certificate of ours; None when this client cannot offer the cipher."""
    context = client(ours, None, f"{cipher}:@SECLEVEL=0")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        context.wrap_bio(incoming, outgoing).do_handshake()
    except ssl.SSLWantReadError:
        pass
    except ssl.SSLError:
        return None
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(outgoing.read())
        with suppress(OSError):
            return connection.recv(1) == b"\x16"  # a hello; 0x15 is an alert
    return False


def test_no_compression(tmp_path: Path, ours: Authority) -> None:
    """A client that offers compression gets none: a secret beside chosen text would show through its length."""
    suites = struct.pack(">HHH", 4, 0xC02B, 0xC02F)
    groups = struct.pack(">HHHHH", 0x000A, 6, 4, 0x0017, 0x001D)
    algorithms = struct.pack(">HHHHH", 0x000D, 6, 4, 0x0403, 0x0804)
    points = struct.pack(">HHBB", 0x000B, 2, 1, 0)
    extensions = groups + algorithms + points
    body = b"\x03\x03" + os.urandom(32) + b"\0" + suites + b"\x02\x01\x00"
    body += struct.pack(">H", len(extensions)) + extensions
    hello = b"\x01" + len(body).to_bytes(3, "big") + body
    with open_port(tmp_path, ours) as (listener, scanner):
        with socket.create_connection(("127.0.0.1", listener.tls_port), timeout=30) as connection:
            connection.sendall(b"\x16\x03\x01" + struct.pack(">H", len(hello)) + hello)
            answer = connection.recv(4096)
        assert answer[0] == 0x16 and answer[5] == 2, "no hello came back"
        session = answer[5 + 4 + 2 + 32]
        assert answer[5 + 4 + 2 + 32 + 1 + session + 2] == 0
        good = shakes(listener.tls_port, client(ours, scanner))
        assert good is not None and good.compression() is None
        good.close()


def test_no_renegotiation(tmp_path: Path, ours: Authority) -> None:
    """A client cannot make the server shake hands again and again on one connection."""
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("openssl is not installed")
    with open_port(tmp_path, ours) as (listener, scanner):
        command = [program, "s_client", "-connect", f"127.0.0.1:{listener.tls_port}", "-tls1_2"]
        process = subprocess.Popen(
            [*command, "-cert", str(scanner[0]), "-key", str(scanner[1])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert process.stdin is not None
        time.sleep(2)
        with suppress(BrokenPipeError):
            process.stdin.write("R\n")
            process.stdin.flush()
        said, _ = process.communicate(timeout=120)
    assert "RENEGOTIATING" in said and ("no renegotiation" in said.lower() or "handshake failure" in said.lower()), said
    context = tls_context(Tls(*map(str, ours.issues("again")[:2]), str(ours.path)))
    assert context is not None and context.options & ssl.OP_NO_RENEGOTIATION and context.options & ssl.OP_NO_COMPRESSION


def test_a_certificate_is_needed(tmp_path: Path, ours: Authority) -> None:
    """Without a certificate, or with one of another authority, nobody gets in; nor does plain DICOM get a word."""
    with open_port(tmp_path, ours) as (listener, scanner):
        assert _ends(shakes(listener.tls_port, client(ours, scanner)))
        stranger = Authority(tmp_path / "theirs", "theirs").issues("scanner")
        for identity in (None, stranger):
            context = client(ours, identity)
            connection = shakes(listener.tls_port, context)
            if connection is not None:  # TLS 1.3: the client is done first, and hears of it afterwards
                with closing(connection), pytest.raises((raw.Hung, OSError)):
                    connection.sendall(b"\0")
                    assert connection.recv(1) == b""
                    raise raw.Hung("closed")
        with pytest.raises((raw.Hung, OSError, struct.error)), raw.Scanner(listener.tls_port) as scanner_:
            scanner_.associate()


# -- as a client


class _Server:
    """A PACS's TLS port, as bad as the test wants it; what it is told after the handshake is kept."""

    def __init__(
        self, authority: Authority, name: str = "pacs", *, most: ssl.TLSVersion | None = None, ciphers: str = ""
    ):
        certificate, key, _ = authority.issues(name)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        context.load_verify_locations(authority.path)
        context.verify_mode = ssl.CERT_OPTIONAL
        if ciphers:
            context.set_ciphers(ciphers)
        if most is not None:
            context.minimum_version, context.maximum_version = ssl.TLSVersion.MINIMUM_SUPPORTED, most
        self.told, self.shown = b"", False
        self._context, self._listening = context, socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            plain, _ = self._listening.accept()
            with suppress(OSError), self._context.wrap_socket(plain, server_side=True) as connection:
                self.shown = self.shown or connection.getpeercert(binary_form=True) is not None
                self.told += connection.recv(4096)


def _node(ours: Authority, server: _Server, **more: object) -> Node:
    certificate, key, _ = ours.issues("us")
    tls = outbox.Tls(str(ours.path), str(certificate), str(key), **more)  # type: ignore[arg-type]
    return Node("pacs", "PACS", "127.0.0.1", server.port, timeout_seconds=5, tls=tls)


@pytest.mark.parametrize(
    "bad",
    [
        {"most": ssl.TLSVersion.TLSv1_1, "ciphers": WEAK},
        {"most": ssl.TLSVersion.TLSv1_2, "ciphers": "ECDHE-ECDSA-AES256-SHA384:ECDHE-ECDSA-AES128-SHA:@SECLEVEL=0"},
        {"most": ssl.TLSVersion.TLSv1_2, "ciphers": "aNULL:@SECLEVEL=0"},
    ],
)
def test_we_tell_nothing_to_a_weak_server(ours: Authority, bad: dict[str, object]) -> None:
    """To a PACS that speaks old TLS or weak ciphers we say nothing of a study, and name the trouble."""
    server = _Server(ours, **bad)  # type: ignore[arg-type]
    with pytest.raises((Misconfigured, Transient)):
        outbox.echo(_node(ours, server))
    assert server.told == b""


def test_we_tell_nothing_to_a_stranger(tmp_path: Path, ours: Authority) -> None:
    """A PACS whose certificate another authority vouches for, or that names another host, is told nothing."""
    stranger = _Server(Authority(tmp_path / "theirs", "theirs"))
    with pytest.raises(Misconfigured, match="certificate"):
        outbox.echo(_node(ours, stranger))
    elsewhere = Node("pacs", "PACS", "localhost", _Server(ours).port, timeout_seconds=5, tls=_node(ours, stranger).tls)
    with pytest.raises(Misconfigured, match="certificate"):
        outbox.echo(elsewhere)
    assert stranger.told == b""


def test_we_show_our_certificate(ours: Authority) -> None:
    """A good PACS sees our certificate, and gets our words."""
    server = _Server(ours)
    with pytest.raises((Misconfigured, Transient)):  # it speaks no DICOM
        outbox.echo(_node(ours, server))
    assert server.shown and server.told[:1] == b"\1"
