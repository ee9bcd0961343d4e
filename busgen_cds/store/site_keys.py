"""The site's two signing keys: the night job's, and the promoter's behind a passphrase.

Rules:
- The night job's key signs bundles onto the shelf and nothing else; it lies open to this service alone (mode 0600).
- The promoter's key says which bundle is live, and vouches for what leaves the site. It is sealed under a passphrase
  that is kept nowhere here: without a person nothing becomes live.
- Whom else a site believes is a folder of public keys, put there by a person: other sites, for what they send.

The promoter's file is JSON: Argon2id (RFC 9106) of the passphrase with `salt`, `time`, `memory` (KiB) and `lanes` gives
32 bytes, under which AES-256-GCM with `nonce` seals the 32 bytes of the Ed25519 key; `public` is its public half, in
the clear, and the additional data.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from argon2.low_level import Type, hash_secret_raw
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from busgen_cds.errors import Misconfigured
from busgen_cds.signing import KeySigner

NIGHT, PROMOTER, TRUSTED = "night.key", "promoter.key", "trusted"
LEAST_PASSPHRASE = 16
_KDF = {"time": 3, "memory": 65536, "lanes": 4}  # RFC 9106, second recommended option
_LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"  # none that looks like another


class WrongPassphrase(Misconfigured):
    """The promoter's key does not open with it."""


def new_passphrase() -> str:
    """Five groups of five: 123 bits."""
    return "-".join("".join(secrets.choice(_LETTERS) for _ in range(5)) for _ in range(5))


def make(folder: Path, passphrase: str) -> None:
    """Both keys of a site, or the one that it lacks; what is there is never overwritten."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / TRUSTED).mkdir(mode=0o700, exist_ok=True)
    night, promoter = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    made = {
        NIGHT: night.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        PROMOTER: _sealed(promoter, passphrase),
    }
    lacking = {name: data for name, data in made.items() if not (folder / name).exists()}
    if not lacking:
        raise Misconfigured(f"{' and '.join(made)} are in {folder} already: a site keeps its keys.")
    for name, data in lacking.items():
        _write(folder / name, data)


def change_passphrase(file: Path, old: str, new: str) -> None:
    key = promoter(file, old).key
    making = file.with_name(f".{file.name}-{secrets.token_hex(4)}")
    _write(making, _sealed(key, new))
    making.rename(file)


def night(file: Path) -> KeySigner:
    try:
        key = load_pem_private_key(_read(file), None)
    except ValueError as broken:
        raise Misconfigured(f"{file} is not a key that can be used: {broken}") from broken
    if not isinstance(key, Ed25519PrivateKey):
        raise Misconfigured(f"{file} holds another kind of key than Ed25519.")
    return KeySigner(key)


def promoter(file: Path, passphrase: str) -> KeySigner:
    document = _document(file)
    sealed, nonce, public = (bytes.fromhex(document[name]) for name in ("sealed", "nonce", "public"))
    try:
        raw = AESGCM(_derived(passphrase, document)).decrypt(nonce, sealed, public)
    except InvalidTag:
        raise WrongPassphrase("The passphrase does not open the promoter's key.") from None
    return KeySigner(Ed25519PrivateKey.from_private_bytes(raw))


def night_public(file: Path) -> Ed25519PublicKey:
    return night(file).key.public_key()


def promoter_public(file: Path) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(_document(file)["public"]))


def trusted(folder: Path) -> dict[str, Ed25519PublicKey]:
    """Other sites' promoter keys, by the name of their file."""
    files: Iterable[Path] = sorted(folder.glob("*.pem")) if folder.is_dir() else ()
    found = {}
    for file in files:
        try:
            key = load_pem_public_key(file.read_bytes())
        except ValueError as broken:
            raise Misconfigured(
                f"{file} holds no public key as `busgen-cds bundle keys` prints one: take it away."
            ) from broken
        if not isinstance(key, Ed25519PublicKey):
            raise Misconfigured(f"{file} holds another kind of key than Ed25519: take it away.")
        found[file.stem] = key
    return found


def pem(key: Ed25519PublicKey) -> str:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def _sealed(key: Ed25519PrivateKey, passphrase: str) -> bytes:
    if len(passphrase) < LEAST_PASSPHRASE:
        raise Misconfigured(f"The promoter's passphrase needs {LEAST_PASSPHRASE} characters at least.")
    public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    raw = key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    nonce = secrets.token_bytes(12)
    document: dict[str, Any] = {"kdf": "argon2id", "salt": secrets.token_hex(16), **_KDF}
    document |= {"nonce": nonce.hex(), "public": public.hex()}
    sealed = AESGCM(_derived(passphrase, document)).encrypt(nonce, raw, public)
    return (json.dumps({**document, "sealed": sealed.hex()}, indent=1) + "\n").encode()


def _derived(passphrase: str, document: Mapping[str, Any]) -> bytes:
    time, memory, lanes = (int(document[name]) for name in ("time", "memory", "lanes"))
    if time > 16 or memory > 1 << 20 or lanes > 16:
        raise Misconfigured("The promoter's key asks for more work than this program gives: make it again.")
    return hash_secret_raw(passphrase.encode(), bytes.fromhex(document["salt"]), time, memory, lanes, 32, Type.ID)


def _document(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(_read(file))
        assert {"salt", "nonce", "public", "sealed"} <= set(document)
    except (ValueError, AssertionError, TypeError) as broken:
        raise Misconfigured(f"{file} is not a promoter's key as `busgen-cds init` makes it.") from broken
    return dict(document)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as missing:
        raise Misconfigured(
            f"{file} cannot be read ({missing.strerror}): make the site's keys with `busgen-cds bundle keys --make`."
        ) from missing


def _write(file: Path, data: bytes) -> None:
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(handle)
