"""Candidate and Bundle: a reader's network with everything needed to use it, and proof of where it is from.

Rules:
1. A Candidate is unsigned and can only be judged and sealed. A Bundle exists only by `Bundle.open`, which verifies.
2. The manifest names every file with its SHA-256; a missing, altered or additional file is Untrusted.
3. A bundle made with another `pixels.VERSION` is refused: its network would see other images than it learnt from.
4. A bundle's digest is the digest of its manifest; every Result names it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from busgen_cds import pixels, signing
from busgen_cds.birads import Pooling, sigmoid
from busgen_cds.errors import Misconfigured, Untrusted
from busgen_cds.result import BundleName

KIND = "application/vnd.busgen-cds.bundle+json"
ENVELOPE = "bundle.dsse.json"
NETWORK = "reader.onnx"
DOMAIN = "domain.safetensors"  # mean (D,), whiten (D, K): the gate's distance is the norm of (e - mean) @ whiten
CARD = "card.md"


@dataclass(frozen=True)
class Calibration:
    """Platt's line from the network's malignancy logit to log-odds at the stated prevalence."""

    scale: float
    offset: float
    prevalence: float
    uncertainty: float  # standard deviation of the calibrated logit on `val`, besides the network's own spread

    def log_odds(self, malignancy: float) -> float:
        return self.scale * malignancy + self.offset

    def probability(self, malignancy: float) -> float:
        return sigmoid(self.log_odds(malignancy))


@dataclass(frozen=True)
class Thresholds:
    rule_out: float  # calibrated probability: at or above it, a category is never "3" (≥ 98 % sensitivity on `val`)
    presence: float  # sigmoid of the presence logit at which a frame shows a lesion
    mask: float  # probability at which a cell belongs to the lesion
    domain: float  # distance of the embedding beyond which a frame is unlike anything seen in training
    uncertainty: float  # half-width of the probability's interval beyond which we decline


@dataclass(frozen=True)
class Manifest:
    name: str
    version: str
    created: str  # ISO date
    pixels_version: str
    size: int
    calibration: Calibration
    thresholds: Thresholds
    pooling: Pooling
    files: Mapping[str, str]  # name → SHA-256
    trained_on: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        document = dataclasses.asdict(self)
        document["pooling"] = self.pooling._asdict()
        return signing.canonical(document)

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        document = json.loads(data)
        document["calibration"] = Calibration(**document["calibration"])
        document["thresholds"] = Thresholds(**document["thresholds"])
        document["pooling"] = Pooling(*(tuple(document["pooling"][name]) for name in Pooling._fields))
        document["trained_on"] = tuple(document["trained_on"])
        return cls(**document)


@dataclass(frozen=True)
class Candidate:
    """A reader that nobody has vouched for yet."""

    manifest: Manifest
    files: Mapping[str, bytes] = field(repr=False)

    @property
    def digest(self) -> str:
        return signing.digest(self.manifest.to_bytes())

    def seal(self, folder: Path, signer: signing.Signer) -> None:
        """Write the files and, last, the signed manifest: a folder without it is no bundle."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        (folder / ENVELOPE).write_bytes(signing.seal(self.manifest.to_bytes(), KIND, signer))


@dataclass(frozen=True)
class Bundle:
    manifest: Manifest
    files: Mapping[str, bytes] = field(repr=False)
    digest: str

    @property
    def name(self) -> BundleName:
        return BundleName(self.manifest.name, self.manifest.version, self.digest)

    @classmethod
    def open(cls, folder: Path, verifier: signing.Verifier) -> Bundle:
        """Verify, step by step; the bytes that were checked are the bytes that are used."""
        # 1. The envelope is there, and a trusted key vouches for the manifest.
        try:
            envelope = (folder / ENVELOPE).read_bytes()
        except OSError as missing:
            raise Misconfigured(f"No bundle in {folder}: {ENVELOPE} cannot be read ({missing.strerror}).") from missing
        payload = verifier.open(envelope, KIND)
        # 2. The manifest is one we understand.
        try:
            manifest = Manifest.from_bytes(payload)
        except (ValueError, KeyError, TypeError) as broken:
            raise Untrusted(f"The manifest in {folder} is not one this version understands: {broken}") from broken
        # 3. Every file named is there, unaltered; nothing else is.
        files = {name: _read(folder, name, expected) for name, expected in manifest.files.items()}
        strangers = {path.name for path in folder.iterdir()} - set(files) - {ENVELOPE}
        if strangers:
            raise Untrusted(f"Files in {folder} that no one signed: {sorted(strangers)}.")
        # 4. It sees images the way this version prepares them.
        if manifest.pixels_version != pixels.VERSION:
            raise Misconfigured(
                f"Bundle {manifest.name} {manifest.version} was made for pixels version {manifest.pixels_version}, "
                f"this program prepares version {pixels.VERSION}: install a matching bundle."
            )
        return cls(manifest, files, signing.digest(payload))


def _read(folder: Path, name: str, expected: str) -> bytes:
    if Path(name).name != name:
        raise Untrusted(f"The manifest names a file outside its folder: {name!r}.")
    try:
        data = (folder / name).read_bytes()
    except OSError as missing:
        raise Untrusted(f"{folder / name} is named by the manifest and cannot be read.") from missing
    if signing.digest(data) != expected:
        raise Untrusted(f"{folder / name} is not the file that was signed.")
    return data
