"""Figures and their intervals: pure functions of scores and truths.

Rules:
- An interval is a bootstrap over patients, never over images: two views of one lesion are one piece of evidence.
- A share of 0 or 1 has a Wilson interval over patients, since no resampling shows its doubt.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, optimize
from scipy.stats import rankdata

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Interval(NamedTuple):
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f}–{self.high:.3f})"

    @property
    def signed(self) -> str:
        """A change, with its sign at each end."""
        return f"{self.value:+z.3f} ({self.low:+z.3f} to {self.high:+z.3f})"


def auc(score: NDArray[Any], truth: NDArray[Any]) -> float:
    """The chance that a positive scores above a negative; ties count half."""
    positive = int((truth > 0).sum())
    negative = len(truth) - positive
    if not positive or not negative:
        return math.nan
    ranks = rankdata(score)
    return float((ranks[truth > 0].sum() - positive * (positive + 1) / 2) / (positive * negative))


def dice(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> Floats:
    """Overlap of each pair of masks (N, h, w); two empty ones agree."""
    both = (one & other).sum((1, 2))
    total = one.sum((1, 2)) + other.sum((1, 2))
    return np.where(total > 0, 2 * both / np.maximum(total, 1), 1.0)


def bootstrap(
    statistic: Callable[[Ints], float], patients: NDArray[np.str_], count: int = 1000, seed: int = 0
) -> Interval:
    """A statistic of image indices, with its 95 % percentile interval over resampled patients."""
    if not len(patients):
        return Interval(math.nan, math.nan, math.nan)
    names, inverse = np.unique(patients, return_inverse=True)
    members = [np.flatnonzero(inverse == i) for i in range(len(names))]
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(count):
        index = np.concatenate([members[i] for i in rng.integers(0, len(names), len(names))])
        value = statistic(index)
        if not math.isnan(value):
            values.append(value)
    whole = statistic(np.arange(len(patients)))
    low, high = np.percentile(values, [2.5, 97.5]) if values else (math.nan, math.nan)
    return Interval(whole, float(low), float(high))


def auc_interval(score: Floats, truth: Ints, patients: NDArray[np.str_], count: int = 1000) -> Interval:
    return bootstrap(lambda i: auc(score[i], truth[i]), patients, count)


def mean_interval(values: Floats, patients: NDArray[np.str_], count: int = 1000) -> Interval:
    return bootstrap(lambda i: float(values[i].mean()) if len(i) else math.nan, patients, count)


def share_interval(hits: NDArray[np.bool_], patients: NDArray[np.str_], count: int = 1000) -> Interval:
    """A share of images. Where it is all or none, resampling knows no doubt: Wilson's, over patients."""
    if len(hits) and (hits.all() or not hits.any()):
        names = len(np.unique(patients))
        return wilson(names if hits.all() else 0, names)
    return mean_interval(hits.astype(np.float64), patients, count)


def by_patient(score: Floats, truth: Ints, patients: NDArray[np.str_]) -> tuple[Floats, Ints, NDArray[np.str_]]:
    """Mean score of each patient's images; a patient is positive when one image is."""
    names, inverse = np.unique(patients, return_inverse=True)
    totals = np.bincount(inverse, weights=score) / np.bincount(inverse)
    positive = np.zeros(len(names), np.int64)
    np.maximum.at(positive, inverse, truth)
    return totals, positive, names


def sensitivity(score: Floats, truth: Ints, threshold: float) -> float:
    return float((score[truth > 0] >= threshold).mean()) if (truth > 0).any() else math.nan


def specificity(score: Floats, truth: Ints, threshold: float) -> float:
    return float((score[truth == 0] < threshold).mean()) if (truth == 0).any() else math.nan


def threshold_at_sensitivity(score: Floats, truth: Ints, wanted: float) -> float:
    """The highest threshold that keeps this sensitivity."""
    positive = np.sort(score[truth > 0])[::-1]
    return float(positive[min(len(positive), math.ceil(wanted * len(positive))) - 1])


def sensitivity_at_specificity(score: Floats, truth: Ints, wanted: float) -> float:
    """Best sensitivity of the ROC at a specificity, interpolated as the ROC is drawn."""
    if not (truth > 0).any() or not (truth == 0).any():
        return math.nan
    false, true = roc(score, truth)
    allowed = 1 - wanted + 1e-9  # 1 - k/n may lie a rounding below (n - k)/n, at the foot of a step instead of its top
    return float(np.interp(allowed, false, true))


def roc(score: Floats, truth: Ints) -> tuple[Floats, Floats]:
    """False and true positive rates, from the strictest threshold to the laxest."""
    order = np.argsort(-score, kind="stable")
    hits = truth[order] > 0
    last = np.r_[np.diff(score[order]) != 0, True]
    true = np.r_[0.0, np.cumsum(hits)[last] / max(1, hits.sum())]
    false = np.r_[0.0, np.cumsum(~hits)[last] / max(1, (~hits).sum())]
    return false, true


def wilson(hits: int, total: int) -> Interval:
    """Wilson's 95 % interval of a share."""
    if total == 0:
        return Interval(math.nan, math.nan, math.nan)
    z, p = 1.959964, hits / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return Interval(p, max(0.0, middle - half), min(1.0, middle + half))


def difference(one: tuple[int, int], other: tuple[int, int]) -> Interval:
    """The difference of two shares (hits, total), with Newcombe's 95 % interval (1998, method 10)."""
    p, q = wilson(*one), wilson(*other)
    low = math.hypot(p.value - p.low, q.high - q.value)
    high = math.hypot(p.high - p.value, q.value - q.low)
    return Interval(p.value - q.value, p.value - q.value - low, p.value - q.value + high)


def platt(score: Floats, truth: Ints, ridge: float = 1e-3) -> tuple[float, float]:
    """Slope and offset of the log-odds on a score (Platt 1999), by maximum likelihood."""
    signs = np.where(truth > 0, 1.0, -1.0)

    def cost(line: Floats) -> float:
        return float(np.logaddexp(0, -signs * (line[0] * score + line[1])).mean() + ridge * (line[0] - 1) ** 2)

    found = optimize.minimize(cost, np.array([1.0, 0.0]), method="Nelder-Mead", options={"maxiter": 2000})
    return float(found.x[0]), float(found.x[1])


def calibration_line(log_odds: Floats, truth: Ints) -> tuple[float, float]:
    """Slope, and intercept with the slope held at one (calibration-in-the-large)."""
    slope, _ = platt(log_odds, truth, ridge=0.0)
    signs = np.where(truth > 0, 1.0, -1.0)
    found = optimize.minimize_scalar(
        lambda offset: float(np.logaddexp(0, -signs * (log_odds + offset)).mean()), bounds=(-5, 5), method="bounded"
    )
    return slope, float(found.x)


def expected_calibration_error(probability: Floats, truth: Ints, bins: int = 10) -> float:
    """Mean gap between stated and found rate over bins of equal count."""
    order = np.argsort(probability)
    gaps = [
        len(part) * abs(probability[part].mean() - truth[part].mean())
        for part in np.array_split(order, bins)
        if len(part)
    ]
    return float(sum(gaps) / len(order))


def boundary_distance(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> tuple[float, float]:
    """Mean and 95th percentile of the distance between two outlines, in pixels; NaN when one is empty."""
    if not one.any() or not other.any():
        return math.nan, math.nan
    edges = [mask & ~ndimage.binary_erosion(mask, border_value=0) for mask in (one, other)]
    gaps = [ndimage.distance_transform_edt(~edges[1 - k])[edges[k]] for k in (0, 1)]
    both = np.concatenate(gaps)
    return float((gaps[0].mean() + gaps[1].mean()) / 2), float(np.percentile(both, 95))


def dilate(mask: NDArray[np.bool_], share: float = 0.10) -> NDArray[np.bool_]:
    """A mask grown on every side by a share of its equivalent diameter."""
    reach = share * 2 * math.sqrt(mask.sum() / math.pi)
    return np.asarray(ndimage.distance_transform_edt(~mask) <= reach)


def net_benefit(probability: Floats, truth: Ints, at: float) -> float:
    """Vickers and Elkin 2006: true positives minus false ones at the odds of the threshold, per case."""
    acted = probability >= at
    true, false = (acted & (truth > 0)).mean(), (acted & (truth == 0)).mean()
    return float(true - false * at / (1 - at))
