"""Teaching a finished generator's decoder to draw speckle."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from busgen_cds.errors import Misconfigured
from busgen_cds.learning import encoders, fidelity
from busgen_cds.learning.generator import Generator
from busgen_cds.learning.recipes import finish
from tests.learning.generators import data_folder, tiny


@pytest.fixture
def blank_eye(monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ImageNet encoder without its weights: here only the shapes count."""

    def start(self: encoders.Encoder, path: Path) -> None:
        torch.manual_seed(0)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.1)

    monkeypatch.setattr(encoders.Encoder, "start_from", start)
    return Path("none.npz")


def place(tmp_path: Path) -> tuple[Path, Path]:
    """A generator's folder and a data folder that it learnt from."""
    makes = tiny()
    makes.card = dataclasses.replace(makes.card, trained_on=("painted",))
    makes.save(tmp_path / "made")
    return tmp_path / "made", data_folder(tmp_path / "data", patients=12)


SHORT = finish.Settings(steps=4, batch=2, channels=8, report_every=2, save_every=2)


def test_only_the_drawing_changes(tmp_path: Path, blank_eye: Path) -> None:
    """Encoder, scale and flow stay as they were, to the bit; what draws has changed, and the result says how."""
    start, root = place(tmp_path)
    made = Generator.load(finish.train(start, root, tmp_path / "run", SHORT, blank_eye))
    before = Generator.load(start)
    image = torch.rand(2, 1, 64, 64) * 2 - 1
    assert torch.equal(made.coder.encode(image), before.coder.encode(image))
    for name, tensor in before.network.state_dict().items():
        assert torch.equal(tensor, made.network.state_dict()[name])
    latent, grain = torch.randn(2, 8, 8, 8), torch.randn(2, 1, 64, 64)
    assert not torch.equal(made.coder.decode(latent, grain), before.coder.decode(latent))
    assert made.card.settings["finish"]["steps"] == 4 and made.card.autoencoder.finish == 8


def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path: Path, blank_eye: Path) -> None:
    """Killed after two steps and called again, a run ends at the weights of one that was not killed, to the bit."""
    start, root = place(tmp_path)
    whole = Generator.load(finish.train(start, root, tmp_path / "whole", SHORT, blank_eye))

    def kill(report: finish.Report) -> None:
        raise KeyboardInterrupt

    eager = dataclasses.replace(SHORT, report_every=3)
    with pytest.raises(KeyboardInterrupt):
        finish.train(start, root, tmp_path / "killed", eager, blank_eye, tell=kill)
    resumed = Generator.load(finish.train(start, root, tmp_path / "killed", eager, blank_eye))
    for name, tensor in whole.coder.state_dict().items():
        assert torch.equal(tensor, resumed.coder.state_dict()[name]), name


def test_a_run_goes_on_with_its_own_generator_alone(tmp_path: Path, blank_eye: Path) -> None:
    """The drawing that one generator was taught is not joined to another one's flow: the other is refused."""
    start, root = place(tmp_path)
    finish.train(start, root, tmp_path / "run", SHORT, blank_eye)
    other = tiny(seed=1)
    other.card = dataclasses.replace(other.card, trained_on=("painted",))
    other.save(tmp_path / "other")
    with pytest.raises(Misconfigured, match=r"other settings \(generator\): choose another folder"):
        finish.train(tmp_path / "other", root, tmp_path / "run", SHORT, blank_eye)


def test_without_its_data_nothing_is_trained(tmp_path: Path, blank_eye: Path) -> None:
    """A data folder that lacks what the generator learnt from is refused with the reason."""
    start, _ = place(tmp_path)
    other = data_folder(tmp_path / "other", patients=1)
    with pytest.raises(Misconfigured, match="no validation images of painted"):
        finish.train(start, other, tmp_path / "run", SHORT, blank_eye)


def test_the_spectrum_notices_a_blur() -> None:
    """The distance of spectra is nothing between halves of the same noise, and large once one is smoothed."""
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=(64, 1, 64, 64)).astype(np.float32))
    smooth = torch.nn.functional.avg_pool2d(noise, 3, 1, 1)
    assert fidelity.spectral(noise[:32], noise[32:]) < 0.1
    assert fidelity.spectral(noise, smooth) > 1
