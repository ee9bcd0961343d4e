"""The judge: may a candidate go onto the shelf? Fixed rules over figures that were measured before anybody looked.

Rules:
- Two locked sets are read by the reader that is live and by the candidate: the site's own test patients, split off once
  and for ever, and the release's set. The candidate, its calibration and its thresholds saw neither.
- The cases that taught are judged too: a candidate of few patients, of copies, of frames unlike anything the reader has
  seen, or of labels that contradict the reader far more than the locked set does, is refused, however well it reads.
  Wrong labels reach the site's test patients too: where the live reader does poorly on either, labels are in doubt.
- Every rule that fails gives a reason; one is enough. What could not be measured does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from busgen_cds.learning import figures
from busgen_cds.learning.figures import Interval

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Words = NDArray[np.str_]


@dataclass(frozen=True)
class Rules:
    """What a candidate must hold; a site may tighten them."""

    not_worse: float = 0.05  # AUC that the lower bound of the paired change on the site's test patients may lie below 0
    release_drop: float = 0.01  # AUC that may be lost on the release set
    calibration_error: float = 0.15  # ECE on the site's test patients, unless the live reader's is larger
    sensitivity: float = 0.90  # at the rule-out score, on either set, unless the live reader's is lower
    group_drop: float = 0.05  # AUC that may be lost in any group of the release set or the site
    outline_drop: float = 0.10  # of the mean overlap (Dice) with the outlines of either set that are known
    declined: float = 0.10  # share of the site's test images beyond the candidate's gate, above the live reader's
    group_size: int = 20  # images; smaller groups say nothing
    test_patients: int = 8  # of the site's test set, with a cancer and without, each
    teachers: int = 8  # patients at least
    one_patient: float = 0.34  # of the cases, at most
    copies: float = 0.05  # of the cases that show the same pixels as another, at most
    strange: float = 0.25  # of the cases beyond the live reader's gate, at most
    doubtful: float = (
        0.75  # AUC of the live reader, on the cases or the site's test patients: below, labels are in doubt
    )
    contradiction: float = 0.15  # AUC of the live reader that the cases may lie below the site's test patients


@dataclass(frozen=True)
class Read:
    """One locked set, read by the live reader and by the candidate: calibrated log-odds of each image."""

    name: str
    before: Floats = field(repr=False)
    after: Floats = field(repr=False)
    truth: Ints = field(repr=False)
    patients: Words = field(repr=False)
    groups: Words = field(repr=False)  # the device of each image
    before_at: float = 0.0  # rule-out scores, in log-odds
    after_at: float = 0.0
    before_overlap: Floats = field(default_factory=lambda: np.zeros(0), repr=False)  # of each outline that is known
    after_overlap: Floats = field(default_factory=lambda: np.zeros(0), repr=False)
    before_strange: int = 0  # images beyond the reader's gate
    after_strange: int = 0


@dataclass(frozen=True)
class Material:
    """The cases that taught, as the live reader sees them."""

    score: Floats = field(repr=False)
    truth: Ints = field(repr=False)
    patients: Words = field(repr=False)
    copies: int
    strange: int


@dataclass(frozen=True)
class Evidence:
    site: Read
    release: tuple[Read, ...]
    material: Material
    privacy: str = ""  # why the privacy report is not clean; empty: clean, or nothing was generated


@dataclass(frozen=True)
class Verdict:
    reasons: tuple[str, ...]
    tables: tuple[Mapping[str, Any], ...]

    @property
    def accepted(self) -> bool:
        return not self.reasons


def judge(evidence: Evidence, rules: Rules) -> Verdict:
    reasons = (
        *_of_material(evidence.material, evidence.site, rules),
        *_of_site(evidence.site, rules),
        *(reason for read in evidence.release for reason in _of_release(read, rules)),
        *([] if evidence.release else ["there is no release set to judge on"]),
        *([evidence.privacy] if evidence.privacy else []),
    )
    return Verdict(reasons, tuple(_tables(evidence, reasons)))


def change(read: Read, keep: NDArray[np.bool_] | None = None) -> Interval:
    """The candidate's AUC less the live reader's, on the same resampled patients."""
    index = np.arange(len(read.truth)) if keep is None else np.flatnonzero(keep)
    before, after, truth = read.before[index], read.after[index], read.truth[index]

    def paired(i: Ints) -> float:
        return figures.auc(after[i], truth[i]) - figures.auc(before[i], truth[i])

    return figures.bootstrap(paired, read.patients[index], 500)


def _of_material(material: Material, site: Read, rules: Rules) -> Iterator[str]:
    names, counts = np.unique(material.patients, return_counts=True)
    total = max(1, len(material.truth))
    if len(names) < rules.teachers:
        yield f"the cases show {len(names)} patients; {rules.teachers} are needed"
    if counts.size and counts.max() / total > rules.one_patient:
        yield f"one patient gives {counts.max()} of {total} cases"
    if material.copies / total > rules.copies:
        yield f"{material.copies} of {total} cases show the same pixels as another"
    if material.strange / total > rules.strange:
        yield f"{material.strange} of {total} cases are unlike anything the live reader has seen: look at the scanner"
    on_cases, on_test = figures.auc(material.score, material.truth), figures.auc(site.before, site.truth)
    if math.isnan(on_cases):
        yield "the cases hold only one answer, or the live reader gives them no number"
    elif on_cases < on_test - rules.contradiction:
        yield (
            f"the cases contradict the live reader: AUC {on_cases:.3f} on them and {on_test:.3f} on the site's test"
            " patients; look at their labels"
        )
    for name, found in (("the cases", on_cases), (site.name, on_test)):
        if found < rules.doubtful:
            yield f"the live reader's AUC on {name} is {found:.3f}; below {rules.doubtful:g} their labels are in doubt"


def _of_site(read: Read, rules: Rules) -> Iterator[str]:
    malignant = {str(p) for p in read.patients[read.truth > 0]}
    others = {str(p) for p in read.patients} - malignant
    if min(len(malignant), len(others)) < rules.test_patients:
        yield (
            f"{read.name}: {len(malignant)} patients with a cancer and {len(others)} without; it takes"
            f" {rules.test_patients} of each to judge"
        )
        return
    found = change(read)
    if not found.low >= -rules.not_worse:
        yield f"{read.name}: AUC changes by {_signed(found)}; worse by {rules.not_worse:g} is not excluded"
    error, was = (_error(score, read.truth) for score in (read.after, read.before))
    allowed = max(rules.calibration_error, was)  # a live reader's that is not a number allows nothing more
    if not error <= allowed:
        yield f"{read.name}: calibration error {error:.3f}; at most {allowed:.3f} is allowed"
    if read.after_strange - read.before_strange > rules.declined * len(read.truth):
        yield (
            f"{read.name}: {read.after_strange} of {len(read.truth)} images are beyond the candidate's gate, and"
            f" {read.before_strange} beyond the live reader's: it would decline them"
        )
    yield from _outlines(read, rules)
    yield from _sensitivity(read, rules)
    yield from _groups(read, rules)


def _of_release(read: Read, rules: Rules) -> Iterator[str]:
    found = change(read)
    if not found.value >= -rules.release_drop:
        yield f"{read.name}: AUC drops by {-found.value:.3f}; {rules.release_drop:g} is allowed"
    yield from _outlines(read, rules)
    yield from _sensitivity(read, rules)
    yield from _groups(read, rules)


def _outlines(read: Read, rules: Rules) -> Iterator[str]:
    if not read.before_overlap.size:
        return
    before, after = read.before_overlap.mean(), read.after_overlap.mean()
    if not after >= before - rules.outline_drop:
        yield f"{read.name}: the outlines overlap with those drawn by {after:.3f} in the mean, and did by {before:.3f}"


def _sensitivity(read: Read, rules: Rules) -> Iterator[str]:
    after = figures.sensitivity(read.after, read.truth, read.after_at)
    before = figures.sensitivity(read.before, read.truth, read.before_at)
    needed = min(rules.sensitivity, before)
    if not after >= needed:
        yield f"{read.name}: sensitivity {after:.3f} at the rule-out score; {needed:.3f} is needed"


def _groups(read: Read, rules: Rules) -> Iterator[str]:
    for name, found in groups(read, rules):
        if not found.value >= -rules.group_drop:
            yield f"{read.name}, {name or 'no device stated'}: AUC drops by {-found.value:.3f}"


def groups(read: Read, rules: Rules) -> Iterator[tuple[str, Interval]]:
    """Each device with enough images of both answers."""
    for name in np.unique(read.groups):
        mine = read.groups == name
        if mine.sum() >= rules.group_size and len(np.unique(read.truth[mine])) == 2 and not mine.all():
            yield str(name), change(read, mine)


def _error(log_odds: Floats, truth: Ints) -> float:
    if not truth.size:
        return math.nan
    return figures.expected_calibration_error(1 / (1 + np.exp(-log_odds)), truth)


def _tables(evidence: Evidence, reasons: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    verdict = [[reason] for reason in reasons] or [["accepted: every rule holds"]]
    yield {"title": "The judge", "rows": verdict}
    for read in (evidence.site, *evidence.release):
        before, after = (figures.auc_interval(s, read.truth, read.patients, 300) for s in (read.before, read.after))
        yield {
            "title": read.name,
            "columns": ["figure", "live", "candidate"],
            "rows": [
                ["images (malignant)", f"{len(read.truth)} ({int(read.truth.sum())})", ""],
                ["patients", str(len(np.unique(read.patients))), ""],
                ["AUC", str(before), str(after)],
                ["change of AUC, paired", "", _signed(change(read))],
                [
                    "calibration error",
                    f"{_error(read.before, read.truth):.3f}",
                    f"{_error(read.after, read.truth):.3f}",
                ],
                ["sensitivity at the rule-out score", *(f"{s:.3f}" for s in _sensitivities(read))],
                ["overlap of outlines (Dice)", *(_mean(s) for s in (read.before_overlap, read.after_overlap))],
                ["images beyond the gate", str(read.before_strange), str(read.after_strange)],
            ],
        }
    material = evidence.material
    yield {
        "title": "The cases that taught",
        "rows": [
            ["cases", str(len(material.truth))],
            ["malignant", str(int(material.truth.sum()))],
            ["patients", str(len(np.unique(material.patients)))],
            ["same pixels as another", str(material.copies)],
            ["unlike anything the live reader has seen", str(material.strange)],
            ["AUC of the live reader on them", f"{figures.auc(material.score, material.truth):.3f}"],
        ],
    }


def _sensitivities(read: Read) -> tuple[float, float]:
    return (
        figures.sensitivity(read.before, read.truth, read.before_at),
        figures.sensitivity(read.after, read.truth, read.after_at),
    )


def _mean(values: Floats) -> str:
    return f"{values.mean():.3f}" if values.size else "no outline is known"


def _signed(found: Interval) -> str:
    return f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})"
