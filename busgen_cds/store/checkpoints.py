"""Signed checkpoints of the record of acts, written where this machine cannot rewrite them.

Rules:
- The folder is the site's to choose: a mount that only grows, a share of another machine, a tape's inlet. What lies
  on this machine's own disk proves nothing against whoever holds it; `check --security` says so.
- A checkpoint's file is made once and never overwritten. The public key lies beside the checkpoints.
- The signing key is this machine's; a checkpoint speaks for the moment at which it left.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from busgen_cds import signing
from busgen_cds.errors import Misconfigured
from busgen_cds.store import audit
from busgen_cds.store.audit import Checkpoint
from busgen_cds.store.database import Database

KEY, PUBLIC = "record.key", "record.pub.pem"
_NAME = "acts-{number:012d}-{at:%Y%m%dT%H%M%SZ}.checkpoint.json"


def signer(file: Path) -> signing.KeySigner:
    """The record's own key; made when it is first needed, readable by this service alone."""
    if not file.exists():
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(file, Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    if file.stat().st_mode & 0o077:
        raise Misconfigured(f"Others may read the record's key {file}: run `chmod 600 {file}`.")
    key = load_pem_private_key(file.read_bytes(), None)
    if not isinstance(key, Ed25519PrivateKey):
        raise Misconfigured(f"{file} holds another kind of key than Ed25519.")
    return signing.KeySigner(key)


def export(database: Database, folder: Path, key: signing.KeySigner, at: datetime | None = None) -> Path:
    """A checkpoint of the record as it is now, as a new file in the folder."""
    moment = (at or datetime.now(UTC)).astimezone(UTC)
    envelope = audit.checkpoint(database, key, moment)
    number = audit.read_checkpoint(envelope, _verifier(key.key.public_key())).number
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / PUBLIC).exists():
            _write(folder / PUBLIC, _pem(key.key.public_key()), mode=0o644)
        file = folder / _NAME.format(number=number, at=moment)
        _write(file, envelope, mode=0o644)
    except FileExistsError as there:
        raise Misconfigured(f"{there.filename} is there already: a checkpoint is never overwritten.") from there
    except OSError as failed:
        raise Misconfigured(f"No checkpoint can be written to {folder}: {failed.strerror}.") from failed
    return file


def read(paths: Iterable[Path], public: Path | None = None) -> list[Checkpoint]:
    """Checkpoints in files, or in folders with all that lie there; one that is not signed by the key is Untrusted."""
    found = []
    for path in paths:
        verifier = _verifier(_public(public or (path if path.is_dir() else path.parent) / PUBLIC))
        for file in sorted(path.glob("*.checkpoint.json")) if path.is_dir() else [path]:
            found.append(audit.read_checkpoint(_read(file), verifier))
    return found


def kept(folder: Path | None, public: Path | None = None) -> list[Checkpoint]:
    """All in a site's folder; none where it has no folder, or no checkpoint was written yet."""
    return read([folder], public) if folder and newest(folder) else []


def newest(folder: Path) -> datetime | None:
    """When the last checkpoint was written here."""
    times = [file.stat().st_mtime for file in folder.glob("*.checkpoint.json")] if folder.is_dir() else []
    return datetime.fromtimestamp(max(times), UTC) if times else None


def _public(file: Path) -> Ed25519PublicKey:
    key = load_pem_public_key(_read(file))
    if not isinstance(key, Ed25519PublicKey):
        raise Misconfigured(f"{file} holds another kind of key than Ed25519.")
    return key


def _verifier(key: Ed25519PublicKey) -> signing.Verifier:
    return signing.Verifier.of((key, frozenset({audit.CHECKPOINT_KIND})))


def _pem(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as missing:
        raise Misconfigured(f"{file} cannot be read ({missing.strerror}).") from missing


def _write(file: Path, data: bytes, mode: int = 0o600) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(descriptor)
