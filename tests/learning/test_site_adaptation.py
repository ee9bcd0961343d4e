"""A site's few cases teach a reader: held to what it was, resumable, and never called better than it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from busgen_cds.learning import data
from busgen_cds.learning.figures import Interval
from busgen_cds.learning.reader import Reader, Shape
from busgen_cds.learning.recipes import adapt_reader, site_adaptation, site_recipe, train_reader

SMALL = Shape(width=16, tasks={"birads": 4})


@pytest.fixture
def member(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    reader = Reader(SMALL)
    notes = {"settings": train_reader.describe(train_reader.Settings(shape=SMALL)), "step": 0}
    return adapt_reader.write_member(tmp_path / "start.safetensors", reader.state_dict(), notes)


def test_the_score_is_linear_in_the_pooled_features(member: Path) -> None:
    """Fitting the last weights moves the network's own score, exactly as fitted."""
    opened = adapt_reader.open_member(member)
    images = np.random.default_rng(0).integers(0, 255, (6, 64, 64), np.uint8)
    features, logit = adapt_reader.pooled(adapt_reader.reader_of(opened), images)
    rows = tuple(
        data.Row(f"{i}", "", "site", f"p{i}", ("malignant", "benign")[i % 2], "train", {}, i + 2) for i in range(6)
    )
    cases = data.Images(rows, images, np.zeros_like(images), np.full((6, 2), 64))
    weights, _ = adapt_reader.fit_head(opened, cases)
    change, _ = adapt_reader.fitted(features, logit, cases.malignant, cases.patients)
    _, after = adapt_reader.pooled(adapt_reader.reader_of((weights, opened[1])), images)
    assert np.allclose(after, logit + features @ change[:-1] + change[-1], atol=1e-3)


def test_cases_without_a_signal_move_only_the_offset() -> None:
    """Where the cases teach nothing that holds for a patient left out, no weight changes."""
    rng = np.random.default_rng(1)
    features, truth = rng.normal(size=(40, 30)), np.arange(40) % 2
    logit = np.where(truth > 0, 3.0, -3.0)  # it knows already
    change, pull = adapt_reader.fitted(features, logit, truth, np.array([f"p{i // 2}" for i in range(40)]))
    assert pull in (None, max(adapt_reader.PULLS))
    assert np.abs(features @ change[:-1]).max() < 0.5


def test_cases_with_a_signal_are_learnt_from() -> None:
    """A site's own sign of malignancy, unknown before, raises the score of patients that were left out."""
    rng = np.random.default_rng(2)
    features, truth = rng.normal(size=(60, 20)), np.arange(60) % 2
    features[:, 3] += 3.0 * truth
    patients = np.array([f"p{i}" for i in range(60)])
    change, pull = adapt_reader.fitted(features[:40], np.zeros(40), truth[:40], patients[:40])
    assert pull is not None
    score = features[40:] @ change[:-1]
    assert score[truth[40:] > 0].mean() > score[truth[40:] == 0].mean() + 0.3


def test_weights_kept_whole_are_the_weights_before(member: Path) -> None:
    """Half-way is half-way; keeping everything changes nothing, bit for bit."""
    before, _ = adapt_reader.open_member(member)
    after = {name: value + 1 for name, value in before.items()}
    assert all(torch.equal(adapt_reader.mixed(before, after, 1.0)[n], before[n]) for n in before)
    half = adapt_reader.mixed(before, after, 0.5)
    assert all(torch.allclose(half[n], before[n] + 0.5) for n in before)


def _rows(count: int = 30) -> list[data.Row]:
    kinds = ("normal", "benign", "malignant")
    return [
        data.Row(f"{i}", "", "bus_uclm", f"p{i % 7}", kinds[i % 3], "site-adapt", {"doppler": "01"[i % 5 == 0]}, i + 2)
        for i in range(count)
    ]


def test_a_draw_is_repeatable_and_takes_the_classes_in_turn() -> None:
    """A draw depends on its number and its size alone, and never holds a Doppler-flagged frame."""
    rows = site_adaptation.b_mode(_rows(), "site-adapt")
    few = site_adaptation.drawn(rows, 9, 3)
    assert few == site_adaptation.drawn(rows, 9, 3) != site_adaptation.drawn(rows, 9, 4)
    assert all(row.labels["doppler"] == "0" for row in few)
    assert {k: sum(r.pathology == k for r in few) for k in data.PATHOLOGIES} == dict.fromkeys(data.PATHOLOGIES, 3)


def test_the_queue_does_the_cheap_arms_first_and_needs_generated_images_for_replay() -> None:
    """A queue that is stopped has compared every arm as often as any other."""
    settings = site_adaptation.Settings(draws=2)
    runs = site_adaptation.queue(settings, replay=False)
    assert [run.arm.name for run in runs[:6]] == ["head"] * 6
    assert not any(run.arm.replay for run in runs)
    assert any(run.arm.replay for run in site_adaptation.queue(settings, replay=True))


@pytest.mark.parametrize(
    ("cases", "gain", "says"),
    [
        (64, Interval(0.05, 0.035, 0.07), "better, beyond"),
        (64, Interval(0.02, -0.02, 0.05), "inconclusive"),
        (32, Interval(0.02, 0.01, 0.05), "better"),
        (32, Interval(-0.02, -0.04, -0.01), "worse"),
        (16, Interval(0.0, -0.005, 0.01), "not worse"),
        (16, Interval(0.0, -0.05, 0.01), "inconclusive"),
    ],
)
def test_an_interval_that_holds_nothing_and_something_is_inconclusive(cases: int, gain: Interval, says: str) -> None:
    """A page calls an arm better only where its interval says so."""
    found = site_adaptation.Compared("plain", cases, 10, 0.9, gain, gain, gain)
    assert site_adaptation.verdict(found, site_adaptation.Settings()).startswith(says)


def test_what_forgets_does_not_win() -> None:
    """The product does not use an arm that loses more than 0.01 AUC where it came from."""
    good, none = Interval(0.04, 0.0, 0.08), Interval(0.0, -0.01, 0.01)
    plain = site_adaptation.Compared("plain", 64, 10, 0.94, good, good, Interval(-0.02, -0.04, 0.0))
    head = dataclasses.replace(plain, arm="head", gain=Interval(0.01, -0.01, 0.02), home=none)
    assert site_adaptation.winner([plain, head], site_adaptation.Settings()) == "head"
    assert site_adaptation.winner([plain], site_adaptation.Settings()) == ""


def test_the_gain_is_paired() -> None:
    """The same scores before and after are no gain, without any width."""
    rng = np.random.default_rng(0)
    score, truth = rng.normal(size=50), np.arange(50) % 2
    patients = np.array([f"p{i // 2}" for i in range(50)])
    same = site_adaptation.gain(score, np.stack([score, score]), truth, patients, 50)
    assert same == (0.0, 0.0, 0.0)
    better = site_adaptation.gain(score, np.stack([score + truth, score + 2 * truth]), truth, patients, 50)
    assert better.low > 0


def test_recipes_are_chosen_on_patients_held_back() -> None:
    """Each round deals the patients of `site-adapt` anew; nobody is in two folds, and every fold meets a cancer."""
    rows = site_adaptation.b_mode(_rows(60), "site-adapt")
    for round_ in range(3):
        parts = site_recipe.folds(rows, round_)
        assert set.union(*parts) == {row.patient for row in rows}
        assert sum(map(len, parts)) == len({row.patient for row in rows})
        assert all(any(row.malignant for row in rows if row.patient in part) for part in parts)
    assert site_recipe.folds(rows, 0) != site_recipe.folds(rows, 1)
    queue = site_recipe.queue(2)
    assert [run.round for run in queue] == sorted(run.round for run in queue)


def test_a_recipe_is_chosen_only_when_it_stands_out() -> None:
    """The plain recipe stays unless another is a standard error above it and forgets no more than it may."""
    plain = site_recipe.Compared("base", 0.0, 6, 0.030, 0.010, -0.005)
    better = dataclasses.replace(plain, recipe="gentle", gain=0.050)
    assert site_recipe.chosen([better, plain]) == better
    for each in ({"error": 0.03}, {"error": None}, {"home": -0.02}):
        assert site_recipe.chosen([dataclasses.replace(better, **each), plain]) == plain
