"""What one site sends to another arrives as it was sent, or not at all."""

from __future__ import annotations

import json
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from busgen_cds import parcel, signing
from busgen_cds.errors import Misconfigured, Untrusted

SENDER = signing.KeySigner(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
VERIFIER = signing.Verifier.of((SENDER.key.public_key(), frozenset({parcel.KIND})))
FILES = {"adapter.safetensors": b"\x00\x01" * 400, "images/0001.png": b"png", "card.md": "# Ä\n".encode()}


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    to = tmp_path / f"site-a{parcel.SUFFIX}"
    parcel.pack(folder, to, what="adapter", name="a", version="1", sender="North", created="2026-01-01", signer=SENDER)
    return to


def test_there_and_back(sent: Path, tmp_path: Path) -> None:
    """A parcel arrives byte for byte, and says what it is and from whom."""
    said = parcel.unpack(sent, tmp_path / "got", VERIFIER)
    got = {p.relative_to(tmp_path / "got").as_posix(): p.read_bytes() for p in (tmp_path / "got").rglob("*.*")}
    assert got == FILES and (said.what, said.sender) == ("adapter", "North")
    assert parcel.contents(sent, VERIFIER) == said
    with pytest.raises(Misconfigured, match="there already"):
        parcel.unpack(sent, tmp_path / "got", VERIFIER)


@pytest.mark.parametrize("bit", [0x01, 0x20, 0x80])
def test_a_bit_that_was_turned_anywhere_is_named_untrusted(sent: Path, tmp_path: Path, bit: int) -> None:
    """Whatever was altered on the way, in the files or in the archive's own tables: refused, or what was signed."""
    whole = sent.read_bytes()
    for place in range(len(whole) - 400, len(whole)):  # the tables: encrypted, another version, patched, elsewhere
        sent.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        try:
            parcel.unpack(sent, tmp_path / "got", VERIFIER)
        except Untrusted:
            continue
        assert (tmp_path / "got/images/0001.png").read_bytes() == FILES["images/0001.png"]
        shutil.rmtree(tmp_path / "got")


def rewritten(sent: Path, change: Callable[[dict[str, bytes]], None], **more: bytes) -> None:
    """The same parcel with other entries; the signature stays what it was."""
    with zipfile.ZipFile(sent) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(sent, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def signed_with(sent: Path, names: dict[str, bytes], signer: signing.Signer = SENDER) -> None:
    """A parcel that a sender really signed, with any names."""
    said = {name: {"bytes": len(data), "sha256": signing.digest(data)} for name, data in names.items()}
    contents = parcel.Contents("adapter", "a", "1", "North", "2026-01-01", said)
    with zipfile.ZipFile(sent, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr(parcel.ENVELOPE, signing.seal(contents.to_bytes(), parcel.KIND, signer))
        for name, data in names.items():
            archive.writestr(name, data)


def twice(sent: Path) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(sent, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("card.md", FILES["card.md"])


def compressed(sent: Path) -> None:
    with zipfile.ZipFile(sent) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(sent, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data, zipfile.ZIP_STORED if name == parcel.ENVELOPE else None)


def flipped(sent: Path) -> None:
    data = bytearray(sent.read_bytes())
    data[data.find(FILES["adapter.safetensors"]) + 5] ^= 1
    sent.write_bytes(data)


def relabelled(entries: dict[str, bytes]) -> None:
    envelope = json.loads(entries[parcel.ENVELOPE])
    other = parcel.Contents("bundle", "a", "1", "North", "2026-01-01", {})
    envelope["payload"] = json.loads(signing.seal(other.to_bytes(), parcel.KIND, SENDER))["payload"]
    entries[parcel.ENVELOPE] = json.dumps(envelope).encode()


STRANGER = signing.KeySigner(Ed25519PrivateKey.generate())
ATTACKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "altered bytes": (
        lambda p: rewritten(p, lambda e: e.update({"card.md": b"# " + b"\xc3\x96\n"})), "not the file that was signed"
    ),
    "a flipped bit": (flipped, "cannot be read|not the file"),
    "a longer file": (lambda p: rewritten(p, lambda e: e.update({"card.md": b"more" * 9})), "not as long"),
    "an extra file": (lambda p: rewritten(p, lambda e: e.update({"run.sh": b"rm"})), "no one signed"),
    "a missing file": (lambda p: rewritten(p, lambda e: e.pop("card.md") and None), "lacks files"),
    "no signature": (lambda p: rewritten(p, lambda e: e.pop(parcel.ENVELOPE) and None), "not signed"),
    "altered contents": (lambda p: rewritten(p, relabelled), "No trusted key"),
    "a file twice": (twice, "twice"),
    "a compressed file": (compressed, "not as long"),
    "a foreign key": (lambda p: signed_with(p, FILES, STRANGER), "No trusted key"),
    "not an archive": (lambda p: p.write_bytes(b"PK\x03\x04 not really") and None, "not a parcel"),
    **{
        f"the name {name!r}": (lambda p, name=name: signed_with(p, {name: b"x"}), "outside its folder")
        for name in ("../evil", "/etc/evil", "a/../../evil", "a\\..\\evil", "C:evil", "./evil", "a//evil")
    },  # type: ignore[misc]
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks(sent: Path, tmp_path: Path, attack: str) -> None:
    """Path traversal, extra, missing, doubled, altered or unsigned files: refused with the reason, nothing unpacked."""
    do, reason = ATTACKS[attack]
    do(sent)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(Untrusted, match=reason):
        parcel.unpack(sent, tmp_path / "got", VERIFIER)
    assert sorted(tmp_path.rglob("*")) == before


def test_no_key_no_parcel(sent: Path, tmp_path: Path) -> None:
    """A site that trusts nobody imports nothing."""
    with pytest.raises(Untrusted, match="No key is trusted"):
        parcel.unpack(sent, tmp_path / "got", signing.Verifier({}))


def test_nothing_to_send(tmp_path: Path) -> None:
    """An empty folder, a link and a name that is taken are refused before anything is written."""
    (tmp_path / "empty").mkdir()
    how = {"what": "adapter", "name": "a", "version": "1", "sender": "N", "created": "2026-01-01", "signer": SENDER}
    with pytest.raises(Misconfigured, match="no files"):
        parcel.pack(tmp_path / "empty", tmp_path / "x", **how)  # type: ignore[arg-type]
    (tmp_path / "empty" / "passwd").symlink_to("/etc/passwd")
    with pytest.raises(Misconfigured, match="is a link"):
        parcel.pack(tmp_path / "empty", tmp_path / "x", **how)  # type: ignore[arg-type]
