"""From checkpoints to a signed bundle, on made-up images."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from busgen_cds import bundle, signing
from busgen_cds.errors import Misconfigured
from busgen_cds.learning import evaluate, export
from busgen_cds.learning.recipes import crossvalidate, make_bundle, train_reader
from tests.learning import toys

CHOICE = make_bundle.Choice("toy", "1", datetime.date(2026, 1, 1), mirrored=False, sweeps=3, sweep_frames=4)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.write(tmp_path_factory.mktemp("data"), toys.records(18))


@pytest.fixture(scope="module")
def trained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_reader.train(root, tmp_path_factory.mktemp("run"), toys.settings(steps=2))


@pytest.mark.slow
def test_a_folder_of_images_becomes_a_bundle_that_opens(root: Path, trained: Path, tmp_path: Path) -> None:
    """From a manifest to a signed bundle: calibrated, described, verified when it is opened."""
    candidate = make_bundle.make(root, [trained], CHOICE)
    key = Ed25519PrivateKey.generate()
    candidate.seal(tmp_path / "bundle", signing.KeySigner(key))
    trusted = signing.Verifier.of((key.public_key(), frozenset({bundle.KIND})))
    opened = bundle.Bundle.open(tmp_path / "bundle", trusted)
    assert opened.digest == candidate.digest
    assert opened.manifest.trained_on == ("toy",)
    card = opened.files[bundle.CARD].decode()
    assert "18 patients" not in card and "12 images of 12 patients" in card
    shift = opened.manifest.pooling.shift
    assert list(shift) == sorted(shift) and shift[0] == 0
    published = make_bundle.with_figures(root, opened, {"test": {"AUC of toys": 0.75}})
    assert "AUC of toys | 0.75" in published.files[bundle.CARD].decode()
    assert published.manifest.files[bundle.NETWORK] == opened.manifest.files[bundle.NETWORK]
    assert published.digest != opened.digest
    run = export.open_graph(opened.files[bundle.NETWORK])
    broken = export.open_graph(evaluate.randomise(opened.files[bundle.NETWORK]))
    frame = np.random.default_rng(0).random((1, 1, 224, 224), np.float32)
    assert not np.allclose(run(frame)["heat"], broken(frame)["heat"], atol=1e-4)


def test_members_of_two_arms_are_not_averaged(root: Path, trained: Path, tmp_path: Path) -> None:
    """Checkpoints of different arms are not made into one reader."""
    rows = [{**row, "source": "other"} if int(row["patient"][1:]) >= 6 else row for row in toys.records(18)]
    other = toys.write(tmp_path / "data", rows)
    second = train_reader.train(other, tmp_path / "run", toys.settings(steps=2, sources=("toy", "other")))
    with pytest.raises(Misconfigured, match="different arms"):
        make_bundle.make(root, [trained, second], CHOICE)


def test_cross_validation_needs_every_fold(root: Path, trained: Path) -> None:
    """A checkpoint that was not trained for a fold is refused by name."""
    with pytest.raises(Misconfigured, match="--fold"):
        crossvalidate.compare(root, [trained])
