"""From checkpoints to a signed bundle, on made-up images."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from busgen_cds import bundle, signing
from busgen_cds.cli import reader as cli
from busgen_cds.errors import Misconfigured
from busgen_cds.learning import checkpoint, export, probes
from busgen_cds.learning.recipes import crossvalidate, make_bundle, train_reader
from tests.learning import toys
from tests.test_signing import candidate as a_candidate

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
    assert "- 12 public patients or groups trained it" in card
    shift = opened.manifest.pooling.shift
    assert list(shift) == sorted(shift) and shift[0] == 0
    published = make_bundle.with_figures(root, opened, {"test": {"AUC of toys": 0.75}})
    assert "AUC of toys | 0.75" in published.files[bundle.CARD].decode()
    assert published.manifest.files[bundle.NETWORK] == opened.manifest.files[bundle.NETWORK]
    assert published.digest != opened.digest
    run = export.open_graph(opened.files[bundle.NETWORK])
    broken = export.open_graph(probes.randomise(opened.files[bundle.NETWORK]))
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


def _of_a_fold(trained: Path, folder: Path) -> Path:
    tensors, notes = checkpoint.read(trained)
    notes["settings"]["fold"] = [0, 3]
    checkpoint.write(folder / "fold.safetensors", tensors, notes)
    return folder / "fold.safetensors"


def test_a_run_of_cross_validation_is_never_a_bundle(root: Path, trained: Path, tmp_path: Path) -> None:
    """A fold's run has seen patients of test splits: it is not sealed, neither alone nor inside a blend."""
    fold = _of_a_fold(trained, tmp_path)
    mixed = tmp_path / "mixed.safetensors"
    checkpoint.write(mixed, *checkpoint.blend([fold, trained], [0.5, 0.5]))
    for path in (fold, mixed):
        with pytest.raises(Misconfigured, match="cross-validation"):
            make_bundle.make(root, [path], CHOICE)


def test_what_a_run_started_from_is_told(root: Path, trained: Path, tmp_path: Path) -> None:
    """A run on one source that started from another's weights does not pass for a run that never saw it."""
    tensors, notes = checkpoint.read(trained)
    checkpoint.write(tmp_path / "run.safetensors", tensors, notes | {"before": ["busi"]})
    with pytest.raises(Misconfigured, match=r"different arms.*busi"):
        make_bundle.make(root, [trained, tmp_path / "run.safetensors"], CHOICE)


def test_calibration_needs_both_answers(root: Path, trained: Path, tmp_path: Path) -> None:
    """A `val` without a cancer cannot calibrate: that is said instead of a traceback."""
    rows = [row for row in toys.records(18) if row["split"] == "train" or row["pathology"] != "malignant"]
    with pytest.raises(Misconfigured, match="malignant and other images in `val`"):
        make_bundle.make(toys.write(tmp_path, rows), [trained], CHOICE)


def test_a_file_that_is_no_run_of_a_reader(root: Path, tmp_path: Path) -> None:
    """Weights of something else are refused by name, by sealing and by cross-validation."""
    other = tmp_path / "other.safetensors"
    checkpoint.write(other, {"weight": torch.ones(2)}, {})
    with pytest.raises(Misconfigured, match=r"other\.safetensors is not the checkpoint of a reader's run"):
        make_bundle.make(root, [other], CHOICE)
    with pytest.raises(Misconfigured, match=r"other\.safetensors is not"):
        crossvalidate.compare(root, [other])


def test_a_bundle_that_cannot_be_written_leaves_no_key(tmp_path: Path) -> None:
    """What could not be sealed is said, and no key is left that vouches for nothing."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Misconfigured, match=r"could not be written .*no bundle"):
        cli._sign(a_candidate(), tmp_path / "file" / "bundle", tmp_path / "keys")
    assert not list((tmp_path / "keys").glob("*"))


def test_a_seal_harms_no_earlier_bundle(tmp_path: Path) -> None:
    """Neither a folder that holds something nor the key of an earlier bundle of that version is written over."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "reader.onnx").write_bytes(b"earlier")
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "release-toy-1.pem").write_text("earlier")
    for out, version, said in (("full", "2", "is not empty"), ("free", "1", "vouches for another bundle")):
        with pytest.raises(typer.BadParameter, match=said):
            cli.seal([tmp_path / "none"], tmp_path / out, version, tmp_path / "keys", name="toy")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (lambda: cli._settings(["steps=abc"]), "steps is a whole number, not 'abc'"),
        (lambda: cli._settings(["half=perhaps"]), "half is true or false"),
        (lambda: cli._preset("tpu"), "known presets are cpu and gpu"),
        (lambda: cli._sweeps("many"), "40x120"),
        (lambda: cli._shares("a,b"), "0.3,0.7"),
    ],
)
def test_an_option_that_makes_no_sense(asked: Callable[[], object], said: str) -> None:
    """A mistyped option is said with what would be right, instead of a traceback."""
    with pytest.raises(typer.BadParameter, match=said):
        asked()
