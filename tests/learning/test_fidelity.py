"""How real images are, and what generated ones are worth: the measures themselves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from busgen_cds.errors import Misconfigured
from busgen_cds.learning import checkpoint, data, embed, fidelity, release
from busgen_cds.learning.fidelity import Judging
from busgen_cds.learning.recipes import cost, fidelity_report, segmentation, synthesise, value
from busgen_cds.learning.recipes.value import Arm, Run, Settings
from tests.learning.generators import SIZE, data_folder, tiny


def cloud(count: int, shift: float = 0.0, spread: float = 1.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(shift, spread, (count, 4))).astype(np.float32)


def speckle(count: int, seed: int, smooth: bool = False) -> np.ndarray:
    images = np.random.default_rng(seed).integers(0, 255, (count, SIZE, SIZE)).astype(np.uint8)
    return fidelity.blurred(fidelity.blurred(images)) if smooth else images


# Distances


def test_the_frechet_distance_of_two_gaussians_is_known() -> None:
    """Means one apart and spreads one and two, in four dimensions: 4·1² + 4·(2 − 1)² = 8."""
    assert fidelity.frechet(cloud(40_000), cloud(40_000, 1.0, 2.0, seed=1)) == pytest.approx(8, abs=0.2)
    assert fidelity.frechet(cloud(500), cloud(500)) == pytest.approx(0, abs=1e-6)


def test_the_kernel_distance_is_unbiased() -> None:
    """Between samples of one distribution it scatters around zero; between two it does not."""
    same = [fidelity.kernel(cloud(80, seed=i), cloud(80, seed=100 + i)) for i in range(60)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(60)
    assert fidelity.kernel(cloud(80), cloud(80, 1.0, seed=1)) > 10 * np.std(same)


def test_the_floor_is_between_patients() -> None:
    """Two halves of the real images have equal size and share no patient."""
    patients = np.array([f"p{i // 3}" for i in range(31)])
    one, other = fidelity.halves(patients, 0)
    assert len(one) == len(other) and not set(patients[one]) & set(patients[other])


def test_real_against_real_has_a_ratio_near_one() -> None:
    """Fresh images of the real distribution come out at their floor; other ones far above it."""
    patients = np.array([f"p{i}" for i in range(400)])
    raw = {"mean and spread": lambda images: images.reshape(len(images), -1)[:, :4].astype(np.float32)}
    real = np.random.default_rng(0).integers(0, 100, (400, 8, 8)).astype(np.uint8)
    fresh = np.random.default_rng(1).integers(0, 100, (400, 8, 8)).astype(np.uint8)
    near = fidelity.compare(real, patients, fresh, raw)["frechet (mean and spread)"]
    far = fidelity.compare(real, patients, fresh + 60, raw)["frechet (mean and spread)"]
    assert 0.2 < near["ratio"] < 3 and far["ratio"] > 20


class Averages(torch.nn.Module):
    """A stand-in with the calling form of the usual Inception file: bytes in colour in, features out."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return images.float().mean((2, 3)) if return_features else images.float()


def test_an_inception_network_of_the_user_s_is_one_more_encoder(tmp_path: Path) -> None:
    """A TorchScript file takes part as it is: it is given colour bytes and its features are used; no other."""
    torch.jit.script(Averages()).save(str(tmp_path / "inception.pt"))  # type: ignore[no-untyped-call]
    images = speckle(5, seed=3)
    found = embed.inception(tmp_path / "inception.pt")(images)
    assert found.shape == (5, 3) and np.allclose(found[:, 0], images.reshape(5, -1).mean(1))
    (tmp_path / "text.pt").write_text("not a network")
    with pytest.raises(Misconfigured, match="TorchScript"):
        embed.inception(tmp_path / "text.pt")


def test_who_has_seen_generated_images_does_not_judge_them(tmp_path: Path) -> None:
    """A reader that learnt from generated images, itself or where it began, is no encoder of fidelity."""
    own, before = {"sources": ["busi", "synthetic"]}, {"sources": ["busi"]}
    for notes in ({"settings": own}, {"settings": before, "before": ["synthetic"]}):
        checkpoint.write(tmp_path / "run.safetensors", {"average.x": torch.zeros(1)}, notes)
        with pytest.raises(Misconfigured, match="cannot judge"):
            embed.for_fidelity(None, tmp_path / "run.safetensors", None)


# The judge


@pytest.mark.slow
def test_the_judge_notices_what_is_not_real() -> None:
    """A judge tells smooth from sharp on images it never saw, and cannot tell like from like."""
    how = Judging(steps=25, batch=16)
    patients = np.array([f"p{i}" for i in range(40)])
    assert fidelity.told_apart(speckle(40, 0), patients, speckle(40, 1, smooth=True), None, how).value > 0.9
    assert 0.2 < fidelity.told_apart(speckle(40, 0), patients, speckle(40, 1), None, how).value < 0.8


def test_real_images_meet_the_generated_ones_class_balance(tmp_path: Path) -> None:
    """Real images are drawn in the generated ones' class balance, so that no judge can go by the class."""
    (tmp_path / "manifest.csv").write_text("pathology\n" + "benign\n" * 3 + "malignant\n")
    rows = data.read_manifest(data_folder(tmp_path / "data", patients=30))
    chosen = [row.pathology for row in fidelity_report._fair(rows, tmp_path, 100)]
    assert chosen.count("benign") == pytest.approx(3 * chosen.count("malignant"), abs=2)
    assert "normal" not in chosen


def test_a_page_says_what_was_not_measured(tmp_path: Path) -> None:
    """Without a reader's checkpoint the page says that the masks were not judged; a blind judge concludes nothing."""
    bounds = {"value": 0.6, "low": 0.5, "high": 0.7}
    found = {
        "images": {"real": 10, "generated": 10},
        "size": 64,
        "distances": {},
        "judge": {"generated": bounds, "reconstructions": bounds, "blurred": bounds, "valid": False},
        "speed": {"images_per_second": 5.0, "steps": 20, "threads": 2},
    }
    text = fidelity_report.write(found, tmp_path).read_text()
    assert "not measured" in text and "concludes nothing" in text


def test_a_lesion_without_an_outline_agrees_with_nothing(tmp_path: Path) -> None:
    """Of two lesions asked for, one came with its outline: the agreement is a half, not the whole of the one."""
    Image.fromarray(np.full((SIZE, SIZE), 255, np.uint8)).save(tmp_path / "mask.png")
    labels = [{"pathology": "benign", "mask": mask} for mask in ("mask.png", "")] + [
        {"pathology": "normal", "mask": ""}
    ]
    found = fidelity_report.agreement(tmp_path, labels, np.ones((3, SIZE, SIZE), np.bool_))
    assert found["images"] == 2 and found["dice"]["value"] == 0.5


def test_labels_that_say_what_is_seen_agree_with_it() -> None:
    """A reader that sees in each lesion what its label says agrees wholly; normal images have no such label."""
    seen = fidelity_report.Seen(np.array([3.0, -2.0, -1.0, 9.0]), np.zeros((4, SIZE, SIZE), np.bool_))
    found = fidelity_report.told(seen, ["malignant", "benign", "benign", "normal"], list("abcd"))
    assert found["auc"]["value"] == 1.0 and found["images"] == 3
    swapped = fidelity_report.told(seen, ["benign", "malignant", "malignant", "normal"], list("abcd"))
    assert swapped["auc"]["value"] == 0.0


def test_the_picture_shows_nobody(tmp_path: Path) -> None:
    """The picture is made of generated images alone, the healthy ones too; a copy is not among them."""
    makes = tiny()
    known = makes.sample(8, pathology="benign", seed=41)
    vectors = embed.latent(makes.coder)(embed.squares([one.image for one in known], SIZE))
    gate = release.Filter(vectors.mean(0), np.eye(vectors.shape[1], dtype=np.float32), vectors[:0], 1e-4)
    gate = gate.including(vectors[:1])
    path = fidelity_report.picture(makes, tmp_path, gate, pairs=1)
    assert Image.open(path).size == (8 * SIZE, 5 * (SIZE + 14))
    shown = fidelity_report._released(makes, gate, 7, pathology="benign", seed=41)
    assert (shown[0].image == known[1].image).all()
    with pytest.raises(Misconfigured, match="copies"):
        fidelity_report._released(makes, dataclasses.replace(gate, threshold=1e9), 1, pathology="benign")


# What generated images are worth


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return data_folder(tmp_path / "data", patients=24)


PAINTED = Settings(sources=("painted",), steps=2, batch=4, size=SIZE, seeds=1)


def test_arms_differ_only_in_what_they_see() -> None:
    """Every arm takes the same steps with the same batch; only sources and augmentation differ."""
    every = [value.reader_settings(Run(arm, 0), PAINTED) for arm in value.arms(100)]
    assert len({(s.steps, s.batch, s.size, s.rate) for s in every}) == 1
    assert [run.seed for run in value.queue(value.arms(100), 2)[:8]] == [0] * 8


def test_a_queue_answers_one_question(root: Path, tmp_path: Path) -> None:
    """Other steps take another folder; more seeds do not, and a folder without a note goes on and gets one."""
    (tmp_path / "runs" / "real-0").mkdir(parents=True)  # begun before settings were noted

    def work(**other: Any) -> int:
        return value.work([], root, None, None, tmp_path / "runs", dataclasses.replace(PAINTED, **other))

    assert work() == work(seeds=3) == 0
    with pytest.raises(Misconfigured, match=r"with other settings \(see settings\.json: steps\)"):
        work(steps=3)


def test_the_arms_of_growing_size_have_a_page_of_their_own(tmp_path: Path) -> None:
    """Two queues may share a folder of runs: each compares its own arms, and neither page replaces the other."""
    for arm in (Arm("real"), *value.scaling((300, 1000))):
        (tmp_path / f"{arm.name}-0").mkdir()
        told = {"arm": dataclasses.asdict(arm), "seed": 0, "auc": {}, "scores": {}}
        (tmp_path / f"{arm.name}-0" / value.RESULT).write_text(json.dumps(told))
    found = value.results(value.queue(value.scaling((300, 1000)), 2), tmp_path)
    assert [run["arm"]["name"] for run in found] == [arm.name for arm in value.scaling((300, 1000))]
    pages = [value.write({}, 0, "", PAINTED, tmp_path, page) for page in (value.NAME, value.SCALING)]
    assert [page.name for page in pages] == ["generator-value.md", "generator-scaling.md"]
    assert "ever more" in pages[1].read_text() and "ever more" not in pages[0].read_text()


def test_duplicates_are_as_many_as_the_real_images(root: Path, tmp_path: Path) -> None:
    """The duplicate arm holds each real image twice and no other; validation is real in every arm."""
    folder = value.assemble(Run(Arm("twice", duplicates=1.0), 0), root, None, tmp_path / "arm", PAINTED)
    rows = data.read_manifest(folder)
    train = [row for row in rows if row.split == "train"]
    assert len(train) == 32 and len({row.image for row in train}) == 16
    assert {row.source for row in rows if row.split == "val"} == {"painted"}


def test_an_arm_is_found_wherever_it_is_asked_for(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders named from where the caller stands are found from the arm's own folder too."""
    monkeypatch.chdir(tmp_path)
    folder = value.assemble(Run(Arm("real"), 0), root.relative_to(tmp_path), None, Path("runs/arm"), PAINTED)
    assert len(data.read_manifest(folder)) == 24


def test_a_stopped_queue_compares_like_with_like() -> None:
    """A seed that one arm has not reached yet counts for none: two seeds' mean is better by itself than one's."""
    runs = [{"arm": {"name": name}, "seed": seed} for name, seed in (("a", 0), ("b", 0), ("a", 1))]
    assert value._even(runs) == runs[:2] and value._even([]) == []


def test_images_of_another_generator_are_not_measured_as_this_one_s(tmp_path: Path) -> None:
    """Whoever names a generator and a folder is told when the one did not make the other, or the folder holds none."""
    how = synthesise.Settings(count=2, filtered=False, sampling=synthesise.Sampling(steps=1))
    synthesise.generate(tiny(), tmp_path / "made", how, None)
    synthesise.check_maker(tmp_path / "made", tiny())
    with pytest.raises(Misconfigured, match="that made them"):
        synthesise.check_maker(tmp_path / "made", tiny(seed=1))
    with pytest.raises(Misconfigured, match="holds no generated images"):
        synthesise.check_maker(tmp_path / "nowhere", tiny())


def test_few_generated_images_meet_as_few_real_ones() -> None:
    """A distance grows as images become fewer: both sides, and the floor, have the same number of them."""
    patients = np.array([f"p{i}" for i in range(40)])
    found = fidelity.compare(speckle(40, 0), patients, speckle(6, 1), {"raw": embed.raw}, seeds=2)
    assert found["frechet (raw)"]["images"] == 6


def test_generated_only_sees_no_real_image(root: Path, tmp_path: Path) -> None:
    """The synthetic-only arm trains on generated images alone."""
    how = synthesise.Settings(count=6, filtered=False, sampling=synthesise.Sampling(steps=2))
    synthesise.generate(tiny(), tmp_path / "made", how, None)
    run = Run(Arm("only", real=0.0, generated=4), 0)
    rows = data.read_manifest(value.assemble(run, root, tmp_path / "made", tmp_path / "arm", PAINTED))
    assert {row.source for row in rows if row.split == "train"} == {"synthetic"}
    assert sum(row.split == "train" for row in rows) == 4


def test_a_generator_that_saw_a_test_is_refused(root: Path) -> None:
    """An arm that calls a set external may not use images of a generator that saw it."""
    rows, arm = data.read_manifest(root), Arm("with", generated=4)
    honest, other = tiny().card, tiny().card
    value.assert_unseen(arm, rows, type(honest)(**{**vars(honest), "trained_on": ("painted",)}), PAINTED)
    with pytest.raises(Misconfigured, match="busi"):
        value.assert_unseen(arm, rows, type(other)(**{**vars(other), "trained_on": ("painted", "busi")}), PAINTED)
    with pytest.raises(Misconfigured, match="card"):
        value.assert_unseen(arm, rows, None, PAINTED)


def test_a_gain_is_paired_with_the_best_control() -> None:
    """An arm's gain over a control is the difference of their AUC on the same patients, with its interval."""
    truth = np.array([0, 1] * 20)
    means = {"real": np.zeros(40), "made": truth.astype(float)}
    patients = np.array([f"p{i}" for i in range(40)])
    line = value._line("made", "real", means, {"made": [1.0], "real": [0.5]}, truth, patients)
    assert line["against"] == "real" and line["gain"]["value"] == pytest.approx(0.5) and line["gain"]["low"] > 0
    assert "gain" not in value._line("real", "real", means, {"real": [0.5]}, truth, patients)


def test_a_segmenter_is_compared_with_and_without(root: Path, tmp_path: Path) -> None:
    """Two arms of the same steps, one with healthy → lesion images; done runs are not repeated."""
    text = (root / "manifest.csv").read_text().replace(",val", ",test")
    (root / "manifest.csv").write_text(text)
    how = synthesise.Settings(count=3, filtered=False, in_healthy=True, sampling=synthesise.Sampling(steps=1))
    synthesise.generate(tiny(), tmp_path / "grown", how, None)
    small = segmentation.Settings("painted", steps=2, batch=4, size=SIZE, seeds=1, features=(8, 8, 8, 8, 8, 8))
    found = segmentation.measure(root, tmp_path / "grown", tmp_path / "runs", small)
    assert set(found["f1"]) == {"real", "real+generated"} and found["images"] == 6
    told: list[str] = []
    again = segmentation.measure(root, tmp_path / "grown", tmp_path / "runs", small, tell=told.append)
    assert again == found and not told
    assert "Gain" in segmentation.write(found, tmp_path).read_text()
    with pytest.raises(Misconfigured, match="with other settings"):
        longer = dataclasses.replace(small, steps=3)
        segmentation.measure(root, tmp_path / "grown", tmp_path / "runs", longer)


# Cost


def test_cost_is_speed_multiplied_out(tmp_path: Path) -> None:
    """Hours are images over speed, every view encoded and kept, and every assumption is on the page."""
    speeds = cost.Speeds("cpu", "a machine", coder=100, encoding=1000, flow=200, sample_bytes=6144)
    assumed = cost.Assumed(images=720_000, epochs=10, coder_images=360_000)
    assert cost.hours(speeds, assumed) == {"autoencoder": 1.0, "encoding": 0.8, "flow": 10.0}
    page = cost.write([speeds], assumed, tmp_path).read_text()
    assert "720,000 images" in page and "a machine" in page and "18 GB" in page and "in 4 views" in page


def test_a_preset_that_is_not_there_is_named() -> None:
    """A cost is measured of presets that there are: they are listed."""
    with pytest.raises(Misconfigured, match="no preset 'tpu': choose cpu or gpu"):
        cost.measure("tpu")
