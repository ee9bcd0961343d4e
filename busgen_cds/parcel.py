"""A parcel: what one site sends to another (a bundle, an adapter, a synthetic set) as one signed file.

The format, version 1: a ZIP file of stored (uncompressed) entries. The first is `parcel.dsse.json`, a DSSE envelope of
kind `application/vnd.busgen-cds.parcel+json` over the canonical JSON

    {"what": "bundle", "name": …, "version": …, "sender": …, "created": ISO date,
     "files": {"path/in/it": {"bytes": …, "sha256": …}, …}}

and then come exactly the files that it names.

Rules:
- Whoever sends signs; whoever receives opens only what a key it trusts has signed.
- Nothing is unpacked under its name before everything was verified: signature, names, number, length, digest.
- A name that leads out of the folder, an entry that nobody signed, a second one of a name, or one that is missing,
  longer or other than signed: Untrusted.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, get_args

from busgen_cds import signing
from busgen_cds.errors import Misconfigured, Untrusted

KIND = "application/vnd.busgen-cds.parcel+json"
ENVELOPE = "parcel.dsse.json"
SUFFIX = ".parcel"
MOST_CONTENTS = 64 << 20  # bytes of the envelope: a synthetic set names each of its images
_CHUNK = 1 << 20
_DAMAGED = (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError, ValueError)  # as zipfile says it

What = Literal["bundle", "adapter", "synthetic set"]
WHATS: tuple[What, ...] = get_args(What)
Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Contents:
    what: What
    name: str
    version: str
    sender: str
    created: str
    files: Mapping[str, Mapping[str, Any]] = field(repr=False)

    def to_bytes(self) -> bytes:
        return signing.canonical(vars(self))


def pack(
    folder: Path,
    to: Path,
    *,
    what: What,
    name: str,
    version: str,
    sender: str,
    created: str,
    signer: signing.Signer,
    tell: Tell = lambda done, total: None,
) -> Contents:
    """Every file of a folder, as one signed file; it stands under its name when it is whole."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    if not files:
        raise Misconfigured(f"{folder} holds no files: there is nothing to send.")
    if links := [name for name, path in files.items() if path.is_symlink()]:
        raise Misconfigured(f"{folder / links[0]} is a link: a parcel holds files.")
    if to.exists():
        raise Misconfigured(f"{to} is there already: choose another name.")
    said = {path: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for path, file in files.items()}
    contents = Contents(what, name, version, sender, created, said)
    making = to.with_name(f".{uuid.uuid4().hex}")
    try:
        with zipfile.ZipFile(making, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(zipfile.ZipInfo(ENVELOPE), signing.seal(contents.to_bytes(), KIND, signer))
            for number, (path, file) in enumerate(files.items(), 1):
                with file.open("rb") as source, archive.open(zipfile.ZipInfo(path), "w", force_zip64=True) as target:
                    shutil.copyfileobj(source, target, _CHUNK)
                tell(number, len(files))
        making.rename(to)
    finally:
        making.unlink(missing_ok=True)
    return contents


def contents(parcel: Path, verifier: signing.Verifier) -> Contents:
    """What a trusted sender says is in it; the files themselves are not looked at."""
    with _opened(parcel) as archive:
        return _contents(archive, parcel, verifier)


def unpack(parcel: Path, into: Path, verifier: signing.Verifier, tell: Tell = lambda done, total: None) -> Contents:
    """Verify everything, step by step; then the folder appears."""
    if into.exists():
        raise Misconfigured(f"{into} is there already: nothing is unpacked over it.")
    making = into.with_name(f".{uuid.uuid4().hex}")
    with _opened(parcel) as archive:
        # 1. A trusted key vouches for the list of contents.
        said = _contents(archive, parcel, verifier)
        # 2. Every name stays inside the folder.
        for name in said.files:
            _check_name(parcel, name)
        # 3. The entries are those that were signed, each once.
        _check_entries(archive, parcel, said)
        # 4. Each is as long as it was and the same bytes.
        making.mkdir(parents=True)
        try:
            for number, name in enumerate(said.files, 1):
                _take(archive, parcel, name, said.files[name], making / name)
                tell(number, len(said.files))
            making.rename(into)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return said


def unpacked(parcel: Path, into: Path, verifier: signing.Verifier) -> Contents:
    """As `unpack`; a folder that was unpacked before stays if it holds just what was signed, else it is made anew."""
    said = contents(parcel, verifier)
    if into.exists():
        files = {path.relative_to(into).as_posix(): path for path in into.rglob("*") if path.is_file()}
        if {name: _sha256(path) for name, path in files.items()} == {n: f["sha256"] for n, f in said.files.items()}:
            return said
        shutil.rmtree(into)
    return unpack(parcel, into, verifier)


def _contents(archive: zipfile.ZipFile, parcel: Path, verifier: signing.Verifier) -> Contents:
    try:
        entry = archive.getinfo(ENVELOPE)
    except KeyError:
        raise Untrusted(f"{parcel} is not signed: it has no {ENVELOPE}.") from None
    if entry.file_size > MOST_CONTENTS or entry.compress_type != zipfile.ZIP_STORED:
        raise Untrusted(f"{parcel} has contents that no program of ours wrote.")
    payload = verifier.open(b"".join(_chunks(archive, parcel, ENVELOPE)), KIND)
    try:
        said = Contents(**json.loads(payload))
        files = {str(name): {"bytes": int(f["bytes"]), "sha256": str(f["sha256"])} for name, f in said.files.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as broken:
        raise Untrusted(f"The contents of {parcel} are not what this version understands: {broken}") from broken
    if said.what not in WHATS:
        raise Untrusted(f"{parcel} holds a {said.what!r}, which this version does not know.")
    return Contents(said.what, said.name, said.version, said.sender, said.created, files)


def _check_name(parcel: Path, name: str) -> None:
    path = PurePosixPath(name)
    plain = path.as_posix() == name and not path.is_absolute() and ".." not in path.parts
    if not plain or "\\" in name or ":" in name or not name.isprintable() or name in ("", ".", ENVELOPE):
        raise Untrusted(f"{parcel} names a file outside its folder: {name!r}.")


def _check_entries(archive: zipfile.ZipFile, parcel: Path, said: Contents) -> None:
    there = [entry.filename for entry in archive.infolist()]
    if len(set(there)) < len(there):
        raise Untrusted(f"{parcel} holds a file twice.")
    if strangers := sorted(set(there) - set(said.files) - {ENVELOPE}):
        raise Untrusted(f"{parcel} holds files that no one signed: {strangers[:3]}.")
    if missing := sorted(set(said.files) - set(there)):
        raise Untrusted(f"{parcel} lacks files that were signed: {missing[:3]}.")
    for entry in archive.infolist():
        signed = said.files.get(entry.filename)
        if signed and (entry.file_size != signed["bytes"] or entry.compress_type != zipfile.ZIP_STORED):
            raise Untrusted(f"{entry.filename} in {parcel} is not as long as the file that was signed.")


def _take(archive: zipfile.ZipFile, parcel: Path, name: str, signed: Mapping[str, Any], to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    read, digest = 0, hashlib.sha256()
    with to.open("xb") as target:
        for chunk in _chunks(archive, parcel, name):
            read += len(chunk)
            digest.update(chunk)
            target.write(chunk)
    if (read, digest.hexdigest()) != (signed["bytes"], signed["sha256"]):
        raise Untrusted(f"{name} in {parcel} is not the file that was signed.")


def _chunks(archive: zipfile.ZipFile, parcel: Path, name: str) -> Iterator[bytes]:
    try:
        with archive.open(name) as source:
            while chunk := source.read(_CHUNK):
                yield chunk
    except _DAMAGED as broken:
        raise Untrusted(f"{name} in {parcel} cannot be read: {broken}") from broken


def _sha256(file: Path) -> str:
    with file.open("rb") as source:
        return _digest_of(source)


def _digest_of(source: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _opened(parcel: Path) -> Iterator[zipfile.ZipFile]:
    try:
        archive = zipfile.ZipFile(parcel)
    except OSError as missing:
        raise Misconfigured(f"{parcel} cannot be read ({missing.strerror}).") from missing
    except _DAMAGED as broken:
        raise Untrusted(f"{parcel} is not a parcel: {broken}") from broken
    with archive:
        yield archive
