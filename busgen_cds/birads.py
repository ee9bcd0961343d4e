"""Probability of malignancy → BI-RADS-style category, by the ACR's bands of likelihood.

Rules (clinical safety 1 to 3):
- Only 3, 4A, 4B, 4C and 5 can be said. Nothing here can produce 0, 1, 2 or 6.
- A probability holds for one prevalence: a site states its own, and the log-odds move by the difference.
- "3" needs more than a low probability: the score must also lie below the bundle's rule-out score,
  which does not move with prevalence.
- More frames must not mean more suspicion: a study's score is lowered by what chance alone would add.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

Category = Literal["3", "4A", "4B", "4C", "5"]
CATEGORIES: tuple[Category, ...] = ("3", "4A", "4B", "4C", "5")


class Code(NamedTuple):
    value: str
    scheme: str
    meaning: str
    version: str | None = None


# Upper bounds of likelihood (ACR BI-RADS atlas, ultrasound): 3 ≤ 2 %, 4A ≤ 10 %, 4B ≤ 50 %, 4C < 95 %.
_BANDS: tuple[tuple[float, Category], ...] = ((0.02, "3"), (0.10, "4A"), (0.50, "4B"))
_HIGHLY_SUGGESTIVE = 0.95

CODES: dict[Category, Code] = {
    "3": Code("397143007", "SCT", "3 - Probably benign"),
    "4A": Code("MA.II.A.5.4A", "BI", "4A - Low suspicion", "4.0"),
    "4B": Code("MA.II.A.5.4B", "BI", "4B - Intermediate suspicion", "4.0"),
    "4C": Code("MA.II.A.5.4C", "BI", "4C - Moderate suspicion", "4.0"),
    "5": Code("397145000", "SCT", "5 - Highly suggestive of malignancy"),
}


class Pooling(NamedTuple):
    """How far chance lifts the highest of n scores: knots of frame count and shift of the logit."""

    frames: Sequence[float] = (1,)
    shift: Sequence[float] = (0.0,)

    def correction(self, frames: int) -> float:
        """Linear in log(n) between the knots, constant beyond them."""
        knots = [math.log(n) for n in self.frames]
        at = math.log(max(1, frames))
        if at <= knots[0]:
            return self.shift[0]
        for (a, low), (b, high) in zip(
            zip(knots, self.shift, strict=True), zip(knots[1:], self.shift[1:], strict=True), strict=False
        ):
            if at <= b:
                return low + (high - low) * (at - a) / (b - a)
        return self.shift[-1]


def logit(probability: float) -> float:
    p = min(max(probability, 1e-6), 1 - 1e-6)
    return math.log(p / (1 - p))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def at_prevalence(probability: float, calibrated_at: float, site: float) -> float:
    """Move a probability from the prevalence it was calibrated at to the site's (Bayes in log-odds)."""
    return sigmoid(logit(probability) - logit(calibrated_at) + logit(site))


def category(probability: float, *, score: float, rule_out: float) -> Category:
    """The ACR band of a probability; a score at or above `rule_out` is never below 4A."""
    for bound, name in _BANDS:
        if probability <= bound:
            return "4A" if name == "3" and score >= rule_out else name
    return "5" if probability >= _HIGHLY_SUGGESTIVE else "4C"


def severity(birads: Category | None) -> int:
    """For ordering only: nothing stated is lowest."""
    return 0 if birads is None else 1 + CATEGORIES.index(birads)
