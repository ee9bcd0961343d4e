"""How many nights with flipped labels the judge sees, and how many clean ones it refuses for it; seconds of one core.

    python -m tests.bench.poison

Scores are normal with the stated AUC; half of the patients have a cancer; flips fall on those who teach, or everybody.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from busgen_cds.learning import judge
from busgen_cds.learning.judge import Material, Read, Rules

NIGHTS = 1000


def refused(rules: Rules, auc: float, teach: int, test: int, flipped: float, everywhere: bool) -> float:
    """Share of nights that are refused for their labels."""
    rng, apart = np.random.default_rng(0), NormalDist().inv_cdf(auc) * np.sqrt(2)
    seen = 0
    for _ in range(NIGHTS):
        score, told = _drawn(rng, teach, apart, flipped)
        material = Material(score, told, np.arange(teach).astype(str), 0, 0)
        score, told = _drawn(rng, test, apart, flipped if everywhere else 0.0)
        site = Read("the site", score, score, told, np.arange(test).astype(str), np.full(test, "A"))
        seen += any("label" in reason for reason in judge._of_material(material, site, rules))
    return seen / NIGHTS


def _drawn(
    rng: np.random.Generator, count: int, apart: float, flipped: float
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    truth = np.arange(count) % 2
    told = truth.copy()
    told[rng.permutation(count)[: round(flipped * count)]] ^= 1
    return rng.normal(apart * truth, 1), told


def main() -> None:
    for title, rules in (("The gap alone", Rules(doubtful=0.0)), ("The gap and the floor", Rules())):
        print(f"\n{title}\n")
        print(
            "| live reader's AUC | cases that teach / test patients | clean | 30 % of who teaches | 30 % of everybody |"
        )
        print("|---|---|---|---|---|")
        for auc in (0.92, 0.84):
            for teach, test in ((64, 30), (64, 60), (128, 60)):
                found = [refused(rules, auc, teach, test, *each) for each in ((0, False), (0.3, False), (0.3, True))]
                print(f"| {auc} | {teach} / {test} | {' | '.join(f'{100 * share:.1f} %' for share in found)} |")


if __name__ == "__main__":
    main()
