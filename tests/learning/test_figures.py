"""Figures, calibration and augmentation, each against a case that can be worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from busgen_cds.birads import Pooling
from busgen_cds.learning import augment, calibrate, data, evaluate, export, figures, probes, report
from tests.learning import toys


def test_auc_counts_pairs() -> None:
    """AUC is the share of pairs in the right order, ties counting half."""
    assert figures.auc(np.array([0.1, 0.4, 0.4, 0.9]), np.array([0, 0, 1, 1])) == pytest.approx(3.5 / 4)
    assert math.isnan(figures.auc(np.array([0.1, 0.2]), np.array([1, 1])))


def test_intervals_resample_patients() -> None:
    """Doubling every patient's images does not narrow the interval."""
    rng = np.random.default_rng(0)
    score, truth = rng.standard_normal(80), rng.integers(0, 2, 80)
    names = np.array([f"p{i}" for i in range(80)])
    once = figures.auc_interval(score, truth, names, 300)
    twice = figures.auc_interval(np.tile(score, 2), np.tile(truth, 2), np.tile(names, 2), 300)
    assert twice.high - twice.low == pytest.approx(once.high - once.low, rel=0.05)


def test_a_step_of_the_roc_is_read_at_its_top() -> None:
    """At any specificity that a reader can have, the sensitivity is the best one there, whatever rounding does."""
    rng = np.random.default_rng(2)
    truth = np.repeat([0, 1], [265, 122])
    score = rng.standard_normal(387) + truth
    negatives = np.sort(score[truth == 0])
    for kept in range(1, 265):
        best = figures.sensitivity(score, truth, np.nextafter(negatives[kept - 1], 9))
        assert figures.sensitivity_at_specificity(score, truth, kept / 265) == pytest.approx(best, abs=1e-6)


def test_a_difference_of_shares_is_newcombe_s() -> None:
    """The worked example of Newcombe 1998: 56 of 70 against 48 of 80."""
    found = figures.difference((56, 70), (48, 80))
    assert found == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)


def test_all_found_is_not_certainty() -> None:
    """All of 37 cancers found says no more than Wilson: of 30 patients, 11 % may be missed; a part is resampled."""
    patients = np.array([f"p{i % 30}" for i in range(37)])
    found = figures.share_interval(np.ones(37, bool), patients)
    assert found == figures.wilson(30, 30) and found.low == pytest.approx(0.886, abs=0.001)
    some = np.arange(37) > 3
    assert figures.share_interval(some, patients) == figures.mean_interval(some.astype(float), patients)


def test_wilson_of_nothing_found() -> None:
    """None in a hundred still has an upper bound of about 3.7 %."""
    interval = figures.wilson(0, 100)
    assert interval.value == 0 and interval.low == 0 and interval.high == pytest.approx(0.037, abs=0.001)


def test_platt_finds_the_line() -> None:
    """Scores that are true log-odds after a known line give that line back."""
    rng = np.random.default_rng(0)
    score = rng.standard_normal(40_000) * 2
    truth = (rng.random(40_000) < 1 / (1 + np.exp(-(0.7 * score - 1)))).astype(np.int64)
    scale, offset = figures.platt(score, truth)
    assert scale == pytest.approx(0.7, abs=0.04) and offset == pytest.approx(-1, abs=0.05)
    slope, intercept = figures.calibration_line(0.7 * score - 1, truth)
    assert slope == pytest.approx(1, abs=0.05) and intercept == pytest.approx(0, abs=0.05)


def test_sensitivity_keeps_what_was_asked() -> None:
    """The threshold for 98 % sensitivity lets at most one in fifty go."""
    rng = np.random.default_rng(1)
    score, truth = rng.standard_normal(500), rng.integers(0, 2, 500)
    at = figures.threshold_at_sensitivity(score, truth, 0.98)
    assert figures.sensitivity(score, truth, at) >= 0.98
    assert figures.sensitivity(score, truth, np.nextafter(np.partition(score[score > at], 0)[0], 9)) <= 0.99


def test_dilation_is_a_share_of_the_diameter() -> None:
    """A disc of radius 20 grows by a tenth of its diameter: four pixels on each side."""
    y, x = np.mgrid[:100, :100] - 50
    disc = np.hypot(x, y) <= 20
    assert np.hypot(x, y)[figures.dilate(disc)].max() == pytest.approx(24, abs=1)


def test_boundary_distance_of_a_shift() -> None:
    """A square moved by three pixels lies at most three pixels away."""
    one = np.zeros((40, 40), bool)
    one[10:20, 10:20] = True
    mean, far = figures.boundary_distance(one, np.roll(one, 3, axis=1))
    assert 0 < mean <= 3 and far == pytest.approx(3)


def test_augmentation_repeats_itself_and_never_turns_upside_down() -> None:
    """The same seed gives the same batch, and skin stays at the top."""
    image = torch.zeros(16, 1, 64, 64)
    image[:, :, :20] = 0.8
    image[:, :, 20:] = 0.2
    mask = torch.zeros_like(image)
    marks = augment.painted_marks(4, 64, 0)
    made = [
        augment.augment(image, mask, marks, torch.Generator().manual_seed(3), augment.Strength(), 64)[0] for _ in "ab"
    ]
    assert torch.equal(made[0], made[1])
    moved, _ = augment.move(image, mask, torch.Generator().manual_seed(3), augment.Strength(), 64)
    assert bool((moved[:, :, 6:14, 24:40].mean((1, 2, 3)) > moved[:, :, 44:52, 24:40].mean((1, 2, 3))).all())


def test_outline_moves_with_its_image() -> None:
    """Image and outline are moved by the same map."""
    picture, outline = toys.picture("benign", 0)
    image = torch.from_numpy(outline.astype(np.float32))[None, None]
    moved, mask = augment.move(image, image.clone(), torch.Generator().manual_seed(0), augment.Strength(), 64)
    assert torch.equal(moved, mask) and picture.shape == outline.shape


def test_a_healed_lesion_is_gone() -> None:
    """Tissue of the same depth laid over the lesion leaves a lesion-free image."""
    image, mask = toys.picture("benign", 0, size=128)
    outline = mask.astype(np.uint8) * 255
    strength = augment.Strength(heal=1.0)
    healed, empty, gone = augment.heal(image, outline, np.random.default_rng(0), strength)
    assert gone and not empty.any()
    assert healed[mask].mean() > image[mask].mean() + 30


def test_steps_draw_by_seed_and_step() -> None:
    """A step's images follow from the seed and the step alone."""
    weights = np.full(50, 0.02)
    assert (data.draw(weights, 8, 1, 5) == data.draw(weights, 8, 1, 5)).all()
    assert (data.draw(weights, 8, 1, 5) != data.draw(weights, 8, 1, 6)).any()


def test_gate_knows_its_own() -> None:
    """Embeddings like those of training lie within reach, others beyond it."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((8, 40))
    own = (rng.standard_normal((600, 8)) @ mixing).astype(np.float32)
    gate = calibrate.Gate.fit(own[:400], kept=16)
    held_out = gate.distance(own[400:])
    reach = calibrate.reach(held_out, held_out)
    assert (gate.distance(own[400:]) > reach).mean() <= 0.02
    assert (gate.distance(own[400:] + 6 * mixing.std(0).astype(np.float32)) > reach).mean() > 0.9


def test_pooling_holds_specificity() -> None:
    """More frames do not mean more suspicion: specificity at the border stays within 0.05."""
    rng = np.random.default_rng(0)
    scores = [m + 0.5 * rng.standard_normal(300) for m in rng.normal(-4.2, 1, 60)]
    simulated = calibrate.Simulated(scores, [False] * 60)
    pooling = calibrate.pooling(simulated, threshold=-4.0)
    found = []
    for n in (1, 5, 20, 300):
        score, truth = calibrate.highest(simulated, n)
        found.append(figures.specificity(score - pooling.correction(n), truth, -4.0))
    assert max(found) - min(found) <= 0.05
    score, truth = calibrate.highest(simulated, 300)
    assert figures.specificity(score - Pooling().correction(300), truth, -4.0) < min(found) - 0.05


def test_readings_are_kept_for_their_own_images(tmp_path: Path) -> None:
    """Other images under the same network are read, not remembered."""
    shown = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4)

    def run(frames: np.ndarray) -> dict[str, np.ndarray]:
        each, grid = frames.mean((1, 2, 3)), frames[:, 0]
        return dict(zip(export.OUTPUTS, (frames, each, each, grid, grid[:, 0], each), strict=True))

    for images in (shown, shown[::-1], shown):
        kept = calibrate.cached(run, images, tmp_path, "n" * 64)
        np.testing.assert_allclose(kept.malignancy, images.mean((1, 2)) / 255, rtol=1e-5)
    assert len(list(tmp_path.iterdir())) == 2


def test_no_patient_that_an_arm_has_seen_is_tested(tmp_path: Path) -> None:
    """What may be tested is chosen by patient: an excluded image of a patient who trained is left out as well."""
    rows = [row | {"patient": f"p{int(row['patient'][1:]) // 2}", "split": "train"} for row in toys.records(12)]
    for i, split in ((1, "excluded"), (8, "test"), (9, "test"), (10, "excluded"), (11, "excluded")):
        rows[i]["split"] = split
    images = data.load(tmp_path, data.read_manifest(toys.write(tmp_path, rows)), None, toys.SIZE)
    assert [row.image for row in evaluate.unseen(images, ["toy"]).rows] == ["8.png", "9.png", "10.png", "11.png"]
    assert len(evaluate.unseen(images, ["other"])) == 12


def test_images_without_a_grade_say_nothing_of_the_readers(tmp_path: Path) -> None:
    """An image that nobody graded is not counted as a reader's "benign"; 4A is a 4."""
    rows = toys.records(12)
    for row in rows:
        row["birads"] = {"malignant": "4A", "benign": "3", "normal": ""}[row["pathology"]]
    images = data.load(tmp_path, data.read_manifest(toys.write(tmp_path, rows)), None, toys.SIZE)
    found = evaluate.radiologists(images, images.malignant.astype(float), np.ones(12, bool))
    assert found["images"] == 8
    assert found["readers_sensitivity"] == found["readers_specificity"] == found["our_sensitivity"].value == 1


def test_probes_hide_what_they_say() -> None:
    """The filled box shows no lesion, and the border nothing of the middle."""
    image, mask = toys.picture("malignant", 0, size=128)
    outline = mask.astype(np.uint8) * 255
    filled = probes.fill_box(image, outline)
    assert np.ptp(filled[mask]) == 0
    assert probes.border_only(image)[40:80, 40:80].max() == 0


def test_a_bar_that_was_not_measured_says_so() -> None:
    """A bar is met, missed, or not measured; never silently met."""
    document = {"arms": {"shipped": {"size_mb": 30.0, "milliseconds": 20.0}}}
    verdicts = {b["bar"]: b["verdict"] for b in report.bars(document)}
    assert verdicts["bundle size, MB"] == "missed"
    assert verdicts["one frame on two CPU cores, ms"] == "met"
    assert verdicts["AUC, BUSI as external test, all 780"] == "not measured"


def test_evidence_and_its_control_are_judged_alike() -> None:
    """A control that has lost all its evidence is not "0 % inside": it is counted apart, as the reader's maps are."""
    rng = np.random.default_rng(0)
    grown = np.zeros((5, 8, 8))
    grown[:, 2:5, 2:5] = 1
    broken = -rng.random((5, 8, 8)).astype(np.float32)
    broken[0] *= -1
    found = probes.located(grown.astype(np.float32), broken, grown, np.array(list("abcde")))
    assert found["inside"].value == 1 and found["random_weights_images"] == 1
    assert found["random_weights"].value == pytest.approx(9 / 64, abs=0.04)
    mute = probes.located(grown.astype(np.float32), -np.abs(broken), grown, np.array(list("abcde")))
    assert mute["random_weights_images"] == 0 and math.isnan(mute["random_weights"].value)
