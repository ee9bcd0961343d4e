"""Canonical bytes, and who vouches for them.

Rules:
1. What is signed is bytes, and the type of the bytes with them (DSSE's pre-authentication encoding),
   so that a signature over one kind of document never holds for another.
2. Opening gives back the payload only when at least one signature by a trusted key for this kind holds.
3. No keys, no signatures, or an unknown kind: Untrusted. Nothing usable comes back on failure.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from busgen_cds.errors import Untrusted


def canonical(document: Any) -> bytes:
    """One spelling for one document: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def key_id(key: Ed25519PublicKey) -> str:
    return digest(key.public_bytes(Encoding.Raw, PublicFormat.Raw))[:16]


class Signer(Protocol):
    @property
    def key_id(self) -> str: ...
    def sign(self, message: bytes) -> bytes: ...


@dataclass(frozen=True)
class KeySigner:
    """Signs with an Ed25519 key held in memory."""

    key: Ed25519PrivateKey

    @property
    def key_id(self) -> str:
        return key_id(self.key.public_key())

    def sign(self, message: bytes) -> bytes:
        return self.key.sign(message)


def _pre_authentication(kind: str, payload: bytes) -> bytes:
    # DSSE v1: "DSSEv1" SP len(type) SP type SP len(body) SP body
    encoded = kind.encode()
    return b"DSSEv1 %d %s %d %s" % (len(encoded), encoded, len(payload), payload)


def seal(payload: bytes, kind: str, signer: Signer) -> bytes:
    """Payload → a DSSE envelope, as JSON."""
    signature = signer.sign(_pre_authentication(kind, payload))
    envelope = {
        "payloadType": kind,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": signer.key_id, "sig": base64.b64encode(signature).decode()}],
    }
    return canonical(envelope)


def unverified(envelope: bytes, kind: str) -> bytes:
    """The payload, whoever signed it: for what is only ever a reason to be more careful."""
    return _parsed(envelope, kind)[0]


def _parsed(envelope: bytes, kind: str) -> tuple[bytes, list[tuple[str, bytes]]]:
    """The payload and its signatures, by the key that each names."""
    try:
        document = json.loads(envelope)
        payload = base64.b64decode(document["payload"], validate=True)
        said, signatures = document["payloadType"], document["signatures"]
        pairs = [(s["keyid"], base64.b64decode(s["sig"], validate=True)) for s in signatures]
    except (ValueError, KeyError, TypeError, binascii.Error) as broken:
        raise Untrusted(f"Not a signed document ({kind}): {broken}") from broken
    if said != kind:
        raise Untrusted(f"A document of kind {said!r} was given where {kind!r} is needed.")
    return payload, pairs


@dataclass(frozen=True)
class Verifier:
    """The keys that are trusted, each for the kinds of document it may sign."""

    keys: Mapping[str, tuple[Ed25519PublicKey, frozenset[str]]]

    @classmethod
    def of(cls, *trusted: tuple[Ed25519PublicKey, frozenset[str]]) -> Verifier:
        return cls({key_id(key): (key, kinds) for key, kinds in trusted})

    def open(self, envelope: bytes, kind: str) -> bytes:
        """The payload, if one trusted key vouches for it as this kind."""
        if not self.keys:
            raise Untrusted("No key is trusted: install the product's release keys or the site's own.")
        payload, pairs = _parsed(envelope, kind)
        for name, signature in pairs:
            if self._holds(name, signature, kind, payload):
                return payload
        raise Untrusted(f"No trusted key has signed this {kind}; signed by: {[name for name, _ in pairs] or 'nobody'}.")

    def _holds(self, name: str, signature: bytes, kind: str, payload: bytes) -> bool:
        if name not in self.keys:
            return False
        key, kinds = self.keys[name]
        if kind not in kinds:
            return False
        try:
            key.verify(signature, _pre_authentication(kind, payload))
        except InvalidSignature:
            return False
        return True
