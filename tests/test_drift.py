"""Drift is told from chance."""

from __future__ import annotations

import numpy as np
import pytest

from busgen_cds import drift
from busgen_cds.drift import Limits, Sums

LIMITS = Limits()
SHARES = {"none": 0.3, "3": 0.25, "4A": 0.15, "4B": 0.15, "4C": 0.1, "5": 0.05}


def studies(
    count: int, seed: int, *, shift: float = 0.0, declines: float = 0.05, dimensions: int = 16, suspicious: float = 1.0
) -> Sums:
    """Some studies of three images each, whose embeddings lie around the training's, or beside them."""
    random = np.random.default_rng(seed)
    shares = np.asarray([share * (suspicious if name in ("4C", "5") else 1) for name, share in SHARES.items()])
    total = Sums()
    for _ in range(count):
        images = random.standard_normal(dimensions) + 0.3 * random.standard_normal((3, dimensions)) + shift
        declined = random.random() < declines
        category = "declined" if declined else str(random.choice(list(SHARES), p=shares / shares.sum()))
        score = None if declined else float(random.beta(0.6 * suspicious, 2.5))
        total += drift.one(category, score, drift.features(images.astype(np.float32)))
    return total


def alarms(reference: Sums, observed: Sums) -> set[str]:
    return {figure.name for figure in drift.figures(reference, observed, LIMITS) if figure.alarming}


@pytest.mark.parametrize("dimensions", [1, 16])
def test_ordinary_weeks(dimensions: int) -> None:
    """A hundred ordinary weeks of 50 studies raise hardly an alarm: one figure in a thousand may."""
    reference = studies(200, 0, dimensions=dimensions)
    raised = [alarms(reference, studies(50, week, dimensions=dimensions)) for week in range(1, 101)]
    assert sum(map(len, raised)) <= 2


@pytest.mark.parametrize(
    ("change", "figure"),
    [({"shift": 0.7}, "images"), ({"declines": 0.4}, "declined"), ({"suspicious": 9.0}, "categories"),
     ({"suspicious": 9.0}, "scores")],
)  # fmt: skip
def test_a_change(change: dict[str, float], figure: str) -> None:
    """Other images, more declined studies or more suspicious ones raise the alarm of their own figure, every week."""
    reference = studies(200, 0)
    weeks = [alarms(reference, studies(50, seed, **change)) for seed in range(1, 11)]  # type: ignore[arg-type]
    assert all(figure in week for week in weeks)
    if figure == "images":
        assert not any(week - {"images"} for week in weeks)


def test_too_few_studies() -> None:
    """A week with too few studies says nothing, however strange they are."""
    assert drift.figures(studies(200, 0), studies(LIMITS.studies - 1, 1, shift=3.0), LIMITS) == ()


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_what_is_no_number_is_not_added_up(broken: float) -> None:
    """One study whose embedding is not a number would silence every later week: it is not counted."""
    images = np.zeros((3, 16), np.float32)
    images[1, 5] = broken
    with pytest.raises(ValueError, match="not a number"):
        drift.features(images)


def test_psi() -> None:
    """Equal shares have no index; the index of a known change is the known one."""
    assert drift.psi([10, 20, 30], [100, 200, 300]) == pytest.approx(0, abs=1e-3)
    r, o = np.asarray([0.5, 0.5]), np.asarray([0.2, 0.8])
    assert drift.psi([500_000, 500_000], [200_000, 800_000]) == pytest.approx(((o - r) * np.log(o / r)).sum(), abs=1e-4)


def test_mmd() -> None:
    """The discrepancy is that of the Gaussian kernel: between two points it is 2 − 2 exp(−d² / 2σ²)."""
    a, b = np.zeros((1, 16), np.float32), np.full((1, 16), 0.8, np.float32)
    one, other = (drift.one("3", 0.1, drift.features(x)) for x in (a, b))
    many, others = sum([one] * 9, Sums()), sum([other] * 9, Sums())
    assert drift.mmd(many, others) == pytest.approx(2 - 2 * np.exp(-16 * 0.64 / (2 * 16)), abs=0.15)
    assert drift.mmd(many, many) == pytest.approx(0, abs=1e-9)


def test_sums_add_up() -> None:
    """A week is the sum of its studies, in any order, and holds as much for one study as for a thousand."""
    a, b = studies(5, 1), studies(7, 2)
    both, turned = a + b, b + a
    assert both.studies == 12 and both.categories == turned.categories and np.allclose(both.features, turned.features)
    assert sum(both.scores) == both.studies - both.declined and both.features.shape == (drift.FEATURES,)
