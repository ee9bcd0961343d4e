"""What the outbox says when a PACS cannot, will not or must not be spoken to."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pynetdicom.dimse import DIMSEServiceProvider

from busgen_cds.dicom import files, outbox, reactor
from busgen_cds.dicom.outbox import Node, Tls
from busgen_cds.errors import Misconfigured, Transient
from tests import images
from tests.hospital import a_lesion
from tests.pacs import Pacs


@pytest.fixture
def pacs() -> Iterator[Pacs]:
    it = Pacs()
    yield it
    it.goes_down()


def test_nobody_is_there(pacs: Pacs) -> None:
    """A PACS that cannot be reached is Transient, by DICOM and over the web."""
    file = files.open_file(a_lesion(1)[0])
    for node in (pacs.node, Node("web", url=f"http://127.0.0.1:{pacs.port}")):
        with pytest.raises(Transient, match="cannot be reached"):
            list(outbox.send([file], to=node))


def test_our_title_or_theirs_is_wrong(pacs: Pacs) -> None:
    """A PACS that does not know our AE title, or has another than we think, is Misconfigured and says which."""
    pacs.knows = ["SOMEBODY"]
    pacs.comes_up()
    with pytest.raises(Misconfigured, match="does not know our AE title 'BUSGEN_CDS'"):
        outbox.echo(pacs.node)


def test_no_answer_is_lost_on_a_busy_machine(pacs: Pacs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each object's answer is heard, however late the machine lets pynetdicom's own thread go on."""
    _let_it_dawdle(monkeypatch)
    pacs.comes_up()
    file = files.open_file(a_lesion(1)[0])
    sent = list(outbox.send([file] * 10, to=replace(pacs.node, timeout_seconds=3)))
    assert [each.stored for each in sent] == [True] * 10


def test_a_failure_of_the_pacs_is_no_refusal(pacs: Pacs) -> None:
    """A PACS that fails at one object takes the others, and gets that one again; one that has it already is content."""
    pacs.comes_up()
    failing, good = files.open_file(a_lesion(1)[0]), files.open_file(images.breast_image(number=2, cine=2))
    pacs.says[failing.sop_class_uid] = 0x0110
    sending = outbox.send([failing, good], to=pacs.node)
    assert next(sending) == (good.sop_instance_uid, True, "")
    with pytest.raises(Transient, match="0x0110"):
        next(sending)
    pacs.says[failing.sop_class_uid] = 0x0111
    assert [each.stored for each in outbox.send([failing, good], to=pacs.node)] == [True, True]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{}",
        b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 500\r\n\r\nx",
        b"garbage\r\n\r\n",
        b"",
    ],
)
def test_a_pacs_on_the_web_that_breaks_off(answer: bytes) -> None:
    """A PACS that breaks off its answer over the web is Transient: the object is sent again."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=_answers, args=(listening, answer), daemon=True).start()
        node = Node("web", url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout_seconds=5)
        with pytest.raises(Transient):
            list(outbox.send([files.open_file(a_lesion(1)[0])], to=node))


def test_a_pacs_on_the_web_that_sends_us_elsewhere() -> None:
    """Behind a redirect an object is not stored, whatever is answered there, and our credentials do not go there."""
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.setblocking(False)
        to = f"Location: http://127.0.0.1:{elsewhere.getsockname()[1]}/login"
        answer = f"HTTP/1.1 302 Found\r\n{to}\r\nContent-Length: 0\r\n\r\n".encode()
        threading.Thread(target=_answers, args=(listening, answer), daemon=True).start()
        node = Node("web", url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout_seconds=5)
        node = replace(node, headers=(("Authorization", "Basic secret"),))
        with pytest.raises(Misconfigured, match="sends us elsewhere"):
            list(outbox.send([files.open_file(a_lesion(1)[0])], to=node))
        with pytest.raises(BlockingIOError):
            elsewhere.accept()


def test_no_image_can_end_its_own_part() -> None:
    """What stands between two objects sent over the web is new each time: no picture can hold it and add an object."""
    file, heads = files.open_file(a_lesion(1)[0]), []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as listening:
            said = threading.Thread(
                target=lambda: heads.append(_answers(listening, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"))
            )
            said.start()
            node = Node("web", url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout_seconds=5)
            assert [each.stored for each in outbox.send([file], to=node)] == [True]
            said.join()
    first, second = (head.split(b"boundary=")[1].split(b"\r\n")[0] for head in heads)
    assert first != second and len(first) == 32


def _answers(listening: socket.socket, answer: bytes) -> bytes:
    """The beginning of what was asked."""
    connection, _ = listening.accept()
    connection.settimeout(0.5)
    asked = b""
    with contextlib.suppress(TimeoutError):
        while piece := connection.recv(1 << 16):
            asked = (asked + piece)[: 1 << 16]
    connection.sendall(answer)
    connection.close()
    return asked


def _let_it_dawdle(monkeypatch: pytest.MonkeyPatch) -> None:
    """pynetdicom's thread comes late from its pause, and looks for messages for longer than a moment."""
    wait, get_msg = reactor.Checkpoint.wait, DIMSEServiceProvider.get_msg

    def comes_late(self: reactor.Checkpoint, timeout: float | None = None) -> bool:
        answer = wait(self, timeout)
        time.sleep(0.1)
        return answer

    def looks_long(self: DIMSEServiceProvider, block: bool = False) -> Any:
        end, found = time.monotonic() + 0.2, get_msg(self, block)
        while self.assoc.is_requestor and not block and found[1] is None and time.monotonic() < end:
            found = get_msg(self, block)
        return found

    monkeypatch.setattr(reactor.Checkpoint, "wait", comes_late)
    monkeypatch.setattr(DIMSEServiceProvider, "get_msg", looks_long)


def test_no_commitment_is_offered(pacs: Pacs) -> None:
    """Commitment asked of a PACS that does not offer it names the setting to change."""
    pacs.offers_commitment = False
    pacs.comes_up()
    with pytest.raises(Misconfigured, match="commitment = false"):
        outbox.request_commitment([], pacs.node, transaction_uid="1.2.3", wait_seconds=1)


def test_sent_as_it_is(pacs: Pacs) -> None:
    """A compressed image arrives in the transfer syntax it has."""
    pacs.comes_up()
    file = files.open_file(a_lesion(1, syntax="1.2.840.10008.1.2.5")[0])
    assert [sent.stored for sent in outbox.send([file], to=pacs.node)] == [True]
    assert pacs.datasets()[0].file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.5"


def test_over_tls(tmp_path: Path, pacs: Pacs) -> None:
    """TLS with a client certificate; a certificate of another authority is Misconfigured and says so."""
    authority, certificate, key = _certificates(tmp_path / "good")
    stranger, _, _ = _certificates(tmp_path / "other")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(authority)
    context.verify_mode = ssl.CERT_REQUIRED
    pacs.tls = context
    pacs.comes_up()
    tls = Tls(str(authority), str(certificate), str(key))
    assert outbox.echo(replace(pacs.node, tls=tls)) < 10
    with pytest.raises(Misconfigured, match=r"certificate of pacs .* does not hold"):
        outbox.echo(replace(pacs.node, tls=replace(tls, authority=str(stranger))))
    with pytest.raises(Misconfigured, match="TLS files"):
        outbox.echo(replace(pacs.node, tls=replace(tls, key=str(tmp_path / "none"))))


def _certificates(folder: Path) -> tuple[Path, Path, Path]:
    """An authority, and a certificate of it for 127.0.0.1 with its key."""
    folder.mkdir()
    root, leaf = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    names = {k: x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{folder.name} {k}")]) for k in ("root", "leaf")}
    written, here = [], x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    for name, of in (("root", root), ("leaf", leaf)):
        now = datetime.datetime.now(datetime.UTC)
        built = (
            x509.CertificateBuilder()
            .subject_name(names[name])
            .issuer_name(names["root"])
            .public_key(of.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=name == "root", path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([here]), critical=False)
            .sign(root, hashes.SHA256())
        )
        path = folder / f"{name}.pem"
        path.write_bytes(built.public_bytes(serialization.Encoding.PEM))
        written.append(path)
    key = folder / "leaf.key"
    plain = serialization.NoEncryption()
    key.write_bytes(leaf.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    return written[0], written[1], key
