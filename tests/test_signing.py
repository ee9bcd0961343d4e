"""Who vouches for what: attacks on envelopes and bundles."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from busgen_cds import bundle, pixels, signing
from busgen_cds.birads import Pooling
from busgen_cds.bundle import Bundle, Calibration, Candidate, Manifest, Thresholds
from busgen_cds.errors import Misconfigured, Untrusted

KEY = Ed25519PrivateKey.generate()
OTHER = Ed25519PrivateKey.generate()
SIGNER = signing.KeySigner(KEY)
VERIFIER = signing.Verifier.of((KEY.public_key(), frozenset({bundle.KIND})))


def candidate(pixels_version: str = pixels.VERSION) -> Candidate:
    files = {"reader.onnx": b"network", "card.md": b"card"}
    manifest = Manifest(
        name="test",
        version="1",
        created="2026-01-01",
        pixels_version=pixels_version,
        size=pixels.SIZE,
        calibration=Calibration(1.0, 0.0, 0.32, 0.1),
        thresholds=Thresholds(0.02, 0.5, 0.5, 10.0, 0.4),
        pooling=Pooling((1, 5), (0.0, -0.5)),
        files={name: signing.digest(data) for name, data in files.items()},
        trained_on=("a", "b"),
    )
    return Candidate(manifest, files)


def sealed(folder: Path) -> Path:
    candidate().seal(folder, SIGNER)
    return folder


def test_a_sealed_bundle_opens_as_it_was(tmp_path: Path) -> None:
    """A signed bundle opens with the manifest and the bytes that were signed, and its digest is the manifest's."""
    opened = Bundle.open(sealed(tmp_path / "b"), VERIFIER)
    assert opened.manifest == candidate().manifest
    assert opened.files["reader.onnx"] == b"network"
    assert opened.digest == candidate().digest


def _swap_network(folder: Path) -> None:
    (folder / "reader.onnx").write_bytes(b"another")


def _remove_network(folder: Path) -> None:
    (folder / "reader.onnx").unlink()


def _add_file(folder: Path) -> None:
    (folder / "extra.bin").write_bytes(b"x")


def _raise_threshold(folder: Path) -> None:
    envelope = json.loads((folder / bundle.ENVELOPE).read_bytes())
    manifest = json.loads(base64.b64decode(envelope["payload"]))
    manifest["thresholds"]["rule_out"] = 0.9
    envelope["payload"] = base64.b64encode(signing.canonical(manifest)).decode()
    (folder / bundle.ENVELOPE).write_bytes(json.dumps(envelope).encode())


def _strip_signatures(folder: Path) -> None:
    envelope = json.loads((folder / bundle.ENVELOPE).read_bytes())
    envelope["signatures"] = []
    (folder / bundle.ENVELOPE).write_bytes(json.dumps(envelope).encode())


def _sign_by_a_stranger(folder: Path) -> None:
    candidate().seal(folder, signing.KeySigner(OTHER))


def _not_json(folder: Path) -> None:
    (folder / bundle.ENVELOPE).write_bytes(b"not json")


@pytest.mark.parametrize(
    "attack",
    [_swap_network, _remove_network, _add_file, _raise_threshold, _strip_signatures, _sign_by_a_stranger, _not_json],
)
def test_an_altered_bundle_is_refused(tmp_path: Path, attack: Callable[[Path], None]) -> None:
    """A bundle altered in any file, threshold or signature is Untrusted."""
    folder = sealed(tmp_path / "b")
    attack(folder)
    with pytest.raises(Untrusted):
        Bundle.open(folder, VERIFIER)


def test_no_trusted_key_opens_nothing(tmp_path: Path) -> None:
    """An empty list of trusted keys refuses everything."""
    with pytest.raises(Untrusted, match="No key is trusted"):
        Bundle.open(sealed(tmp_path / "b"), signing.Verifier({}))


def test_a_key_vouches_only_for_its_kinds() -> None:
    """A signature of a trusted key for another kind of document does not hold."""
    envelope = signing.seal(b"payload", "other/kind", SIGNER)
    with pytest.raises(Untrusted):
        VERIFIER.open(envelope, bundle.KIND)
    with pytest.raises(Untrusted):
        VERIFIER.open(envelope, "other/kind")


def test_a_file_outside_the_folder_is_refused(tmp_path: Path) -> None:
    """A manifest that names a file outside its folder is Untrusted."""
    made = candidate()
    files = {"../reader.onnx": signing.digest(b"network")}
    manifest = Manifest(**{**vars(made.manifest), "files": files})
    Candidate(manifest, {}).seal(tmp_path / "b", SIGNER)
    with pytest.raises(Untrusted, match="outside"):
        Bundle.open(tmp_path / "b", VERIFIER)


def test_another_pixels_version_is_refused(tmp_path: Path) -> None:
    """A bundle made for another preparation of pixels is refused with what to do."""
    candidate(pixels_version="0").seal(tmp_path / "b", SIGNER)
    with pytest.raises(Misconfigured, match="matching bundle"):
        Bundle.open(tmp_path / "b", VERIFIER)


def test_a_folder_without_a_bundle_says_so(tmp_path: Path) -> None:
    """A folder without an envelope is named in the message."""
    with pytest.raises(Misconfigured, match="No bundle"):
        Bundle.open(tmp_path, VERIFIER)
