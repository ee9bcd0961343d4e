"""Keys, and everything that is encrypted with them.

Rules:
- One site key is the root. From it come, by HKDF, the key that wraps other keys, the key that seals texts and the key
  of the keyed hash; the site key itself encrypts nothing.
- Each instance has its own random data key. It is wrapped by its study's key (or, in quarantine, by the site's),
  and stands only in the database: destroying the study's key shreds the study's files, wherever copies of them lie.
- Whatever is sealed names the site key it was sealed under, so that a key can be changed while the site runs:
  new things are sealed under the first key given, older ones are still opened.
- A text, key or chunk that was altered or cut does not open, nor a chunk that was moved, nor what was sealed with
  `about` and is said to be about something else: Untrusted.

The sealed file, version 1: all numbers are big-endian.

    offset  bytes  what
    0       8      b"BUSGENv1"
    8       4      size of a plain chunk
    12      4      zero
    16      …      chunks: AES-256-GCM(data key, nonce, chunk) with its 16-byte tag; the first 16 bytes of the file
                   are the additional data; nonce = chunk number (11 bytes) ‖ 1 for the last chunk, else 0 (1 byte)

Every chunk but the last is full, and there is always a last one, so that a file cut at any place does not open.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import shlex
import stat
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from busgen_cds.errors import Misconfigured, Untrusted

KEY_BYTES = 32
LOOK_SECONDS = 1.0  # how soon a changed key file is taken up
CHUNK = 256 * 1024
_MAGIC = b"BUSGENv1"
_TAG = 16
_NONCE = 12
_ID = 4


class Vault:
    """The site's keys in use: the first seals, all open. Keys that change at their source are taken up at once."""

    def __init__(
        self,
        site_key: bytes,
        *,
        older: Sequence[bytes] = (),
        changed: Callable[[], Sequence[bytes] | None] | None = None,
    ) -> None:
        self._taken = _taken((site_key, *older))
        self._changed, self._look_at = changed, 0.0

    @property
    def _rings(self) -> Mapping[bytes, _Ring]:
        now = time.monotonic()
        if self._changed is not None and now >= self._look_at:
            self._look_at = now + LOOK_SECONDS
            self._taken = _taken(keys) if (keys := self._changed()) else self._taken
        return self._taken

    @property
    def _current(self) -> _Ring:
        return next(iter(self._rings.values()))

    def seal(self, data: bytes, about: bytes = b"") -> bytes:
        """Encrypt a small thing; `about` must be given again to open it."""
        return self._current.id + _encrypt(self._current.texts, data, about)

    def open(self, sealed: bytes, about: bytes = b"") -> bytes:
        return _decrypt(self._ring_of(sealed).texts, sealed[_ID:], about)

    def seal_text(self, text: str) -> bytes:
        return self.seal(text.encode())

    def open_text(self, sealed: bytes) -> str:
        return self.open(sealed).decode()

    def blind(self, text: str) -> str:
        """A keyed hash: equal texts are found by it, and without the key nothing is learnt from it."""
        return self._current.blind(text)

    def blinds(self, text: str) -> tuple[str, ...]:
        """Under every key in use: what a search must ask for while a key is being changed."""
        return tuple(ring.blind(text) for ring in self._rings.values())

    def wrap(self, key: bytes) -> bytes:
        """A key under the site's key."""
        return self._current.id + _encrypt(self._current.keys, key, b"key")

    def unwrap(self, wrapped: bytes) -> bytes:
        return _decrypt(self._ring_of(wrapped).keys, wrapped[_ID:], b"key")

    def rewrap(self, wrapped: bytes) -> bytes:
        """The same key under the newest site key."""
        return wrapped if self.is_current(wrapped) else self.wrap(self.unwrap(wrapped))

    def reseal(self, sealed: bytes) -> bytes:
        """The same text under the newest site key."""
        return sealed if self.is_current(sealed) else self.seal(self.open(sealed))

    def is_current(self, sealed: bytes) -> bool:
        return sealed[:_ID] == self._current.id

    def _ring_of(self, sealed: bytes) -> _Ring:
        try:
            return self._rings[sealed[:_ID]]
        except KeyError:
            raise Untrusted(
                "This was sealed under a site key that is not in use: put the older key back beside the new one."
            ) from None


class _Ring:
    """What is derived from one site key."""

    def __init__(self, site_key: bytes) -> None:
        if len(site_key) != KEY_BYTES:
            raise Misconfigured(f"The site key must have {KEY_BYTES} bytes, this one has {len(site_key)}.")
        self.id = _derive(site_key, b"id")[:_ID]
        self.keys = AESGCM(_derive(site_key, b"wrap keys"))
        self.texts = AESGCM(_derive(site_key, b"seal texts"))
        self._hash_key = _derive(site_key, b"blind texts")

    def blind(self, text: str) -> str:
        return hmac.new(self._hash_key, text.encode(), hashlib.sha256).hexdigest()


def _taken(keys: Sequence[bytes]) -> Mapping[bytes, _Ring]:
    return {ring.id: ring for ring in map(_Ring, keys)}


def new_key() -> bytes:
    return os.urandom(KEY_BYTES)


def wrap_under(key: bytes, data_key: bytes) -> bytes:
    """A data key under a study's key."""
    return _encrypt(AESGCM(key), data_key, b"data key")


def unwrap_under(key: bytes, wrapped: bytes) -> bytes:
    return _decrypt(AESGCM(key), wrapped, b"data key")


def _derive(key: bytes, purpose: bytes) -> bytes:
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=b"busgen-cds " + purpose).derive(key)


def _encrypt(cipher: AESGCM, data: bytes, about: bytes) -> bytes:
    nonce = os.urandom(_NONCE)
    return nonce + cipher.encrypt(nonce, data, about)


def _decrypt(cipher: AESGCM, sealed: bytes, about: bytes) -> bytes:
    try:
        return cipher.decrypt(sealed[:_NONCE], sealed[_NONCE:], about)
    except (InvalidTag, ValueError):
        raise Untrusted("A sealed entry does not open: it was altered, or it belongs elsewhere.") from None


Buffers = tuple[memoryview, memoryview]  # for a plain chunk, and for it sealed

_SPARE: list[Buffers] = []  # fresh ones cost more than sealing an image
_MOST_SPARE = 16


def _new_buffers() -> Buffers:
    return memoryview(bytearray(CHUNK)), memoryview(bytearray(CHUNK + _TAG))


class SealedWriter:
    """Writes a sealed file, a chunk at a time; nothing plain is ever on the disk."""

    def __init__(self, path: Path, key: bytes) -> None:
        self._header = _MAGIC + struct.pack(">II", CHUNK, 0)
        self._cipher = AESGCM(key)
        self._chunk, self._sealed = _SPARE.pop() if _SPARE else _new_buffers()
        self._filled = 0
        self._number = 0
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        _write_all(self.descriptor, self._header)

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            if self._filled == CHUNK:  # the last chunk, full or not, is written by `sync`
                self._put(last=False)
            size = min(len(view), CHUNK - self._filled)
            self._chunk[self._filled : self._filled + size] = view[:size]
            self._filled += size
            view = view[size:]

    def sync(self) -> None:
        """Write the last chunk; the file's content is on the disk when this returns."""
        self._put(last=True)
        os.fsync(self.descriptor)

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
            if len(_SPARE) < _MOST_SPARE:
                _SPARE.append((self._chunk, self._sealed))

    def _put(self, last: bool) -> None:
        sealed = self._sealed[: self._filled + _TAG]
        self._cipher.encrypt_into(_nonce(self._number, last), self._chunk[: self._filled], self._header, sealed)
        _write_all(self.descriptor, sealed)
        self._number += 1
        self._filled = 0


def read_sealed(file: BinaryIO, key: bytes) -> Iterator[bytes]:
    """The plain chunks of a sealed file, each checked before it is given out."""
    header = file.read(16)
    if len(header) != 16 or header[:8] != _MAGIC:
        raise Untrusted("This is not a file of the inbox.")
    size = struct.unpack(">I", header[8:12])[0]
    cipher, number, chunk = AESGCM(key), 0, file.read(size + _TAG)
    while True:
        following = file.read(size + _TAG)
        try:
            yield cipher.decrypt(_nonce(number, last=not following), chunk, header)
        except (InvalidTag, ValueError):
            raise Untrusted(f"Chunk {number} of a kept file does not open: it was altered, cut or moved.") from None
        if not following:
            return
        number, chunk = number + 1, following


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(_NONCE - 1, "big") + (b"\x01" if last else b"\x00")


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


class KeySource(Protocol):
    """Where the site keys come from, newest first, or another secret."""

    def text(self) -> str: ...
    def keys(self) -> Sequence[bytes]: ...
    def changed(self) -> Sequence[bytes] | None:
        """The keys, when they are others than when they were last given; None when not, or when that is not known."""
        ...


class KeyFile:
    """A file that nobody but its owner may read: a key in hexadecimal per line, newest first."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._seen: tuple[int, int] | None = None

    def changed(self) -> Sequence[bytes] | None:
        try:
            now = self._stamp()
            return None if now == self._seen else self.keys()
        except (OSError, Misconfigured):  # half a change, or none of ours: what we have stays in use
            return None

    def announce(self, key: bytes) -> None:
        """A new key behind those that are there: running processes can open with it, and seal nothing under it."""
        self._replace([*self.keys(), key])

    def put_first(self, key: bytes) -> None:
        """Seal under this key from now on; running processes take it up."""
        self._replace([key, *(each for each in self.keys() if each != key)])

    def retire(self) -> int:
        """Take all but the newest away; how many were taken."""
        newest, *older = self.keys()
        self._replace([newest])
        return len(older)

    def _replace(self, keys: Sequence[bytes]) -> None:
        fresh = self._path.with_name(f".{self._path.name}-{os.urandom(4).hex()}")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _write_all(descriptor, b"".join(key.hex().encode() + b"\n" for key in keys))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        fresh.rename(self._path)

    def _stamp(self) -> tuple[int, int]:
        found = self._path.stat()
        return found.st_mtime_ns, found.st_ino

    def text(self) -> str:
        try:
            mode = self._path.stat().st_mode
            text = self._path.read_text()
        except OSError as missing:
            raise Misconfigured(f"The key file {self._path} cannot be read: {missing.strerror}.") from missing
        if stat.S_IMODE(mode) & 0o077:
            raise Misconfigured(f"Others may read the key file {self._path}: run `chmod 600 {self._path}`.")
        return text

    def keys(self) -> Sequence[bytes]:
        seen = self._stamp() if self._path.exists() else None
        keys = _parse(self.text(), f"the site key file {self._path}")
        self._seen = seen
        return keys


class KeyVariable:
    """An environment variable, keys separated by white space."""

    def __init__(self, name: str) -> None:
        self._name = name

    def text(self) -> str:
        return os.environ.get(self._name, "")

    def changed(self) -> Sequence[bytes] | None:
        return None  # processes are started again, one after the other

    def keys(self) -> Sequence[bytes]:
        return _parse(self.text(), f"the environment variable {self._name}")


class KeyCommand:
    """A command that asks a key manager and prints the keys."""

    def __init__(self, command: str) -> None:
        self._command = command

    def text(self) -> str:
        try:
            done = subprocess.run(shlex.split(self._command), capture_output=True, text=True, timeout=60, check=True)
        except (OSError, ValueError, subprocess.SubprocessError) as failed:
            raise Misconfigured(f"The key command failed ({type(failed).__name__}): {self._command}") from None
        return done.stdout

    def changed(self) -> Sequence[bytes] | None:
        return None  # processes are started again, one after the other

    def keys(self) -> Sequence[bytes]:
        return _parse(self.text(), "the site key command's output")


KEY_SOURCES: Mapping[str, Callable[[str], KeySource]] = {"file": KeyFile, "env": KeyVariable, "command": KeyCommand}


def key_source(reference: str) -> KeySource:
    """`file:PATH`, `env:NAME` or `command:PROGRAM ARGUMENTS` → where the site keys come from."""
    kind, _, rest = reference.partition(":")
    if kind not in KEY_SOURCES or not rest:
        raise Misconfigured(f"Key {kind!r}: say one of {', '.join(f'{name}:…' for name in KEY_SOURCES)}.")
    return KEY_SOURCES[kind](rest)


def secret(reference: str) -> str:
    """Another secret by the same kinds of reference, as text."""
    found = key_source(reference).text().strip()
    if not found:
        raise Misconfigured(f"There is nothing at {reference}: put the secret there.")
    return found


def unlock(source: KeySource) -> Vault:
    newest, *older = source.keys()
    return Vault(newest, older=older, changed=source.changed)


def write_key_file(path: Path) -> None:
    """A new site key, in a file that only its owner can read; an existing one is never overwritten."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        _write_all(descriptor, new_key().hex().encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parse(text: str, where: str) -> Sequence[bytes]:
    try:
        keys = tuple(bytes.fromhex(word) for word in text.split())
    except ValueError:
        raise Misconfigured(f"There is something else than keys in hexadecimal in {where}.") from None
    if not keys or any(len(key) != KEY_BYTES for key in keys):
        raise Misconfigured(f"No key of {KEY_BYTES} bytes ({2 * KEY_BYTES} hexadecimal digits) in {where}.")
    return keys
