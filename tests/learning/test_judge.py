"""The judge's rules, one by one: what fails any of them is refused with its reason."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from busgen_cds.learning import judge
from busgen_cds.learning.judge import Evidence, Material, Read, Rules


def read(
    name: str = "the site's test patients", count: int = 200, gain: float = 0.0, seed: int = 0, **more: Any
) -> Read:
    """Two images of each patient; log-odds that are calibrated, and a candidate that is as good or worse."""
    rng = np.random.default_rng(seed)
    patients = np.repeat([f"p{i}" for i in range(count // 2)], 2)
    truth = np.repeat(rng.integers(0, 2, count // 2), 2)
    before = np.where(truth > 0, 1.5, -1.5) + rng.normal(0, 1.2, count)
    after = before + gain * np.where(truth > 0, 1, -1)
    groups = np.where(np.arange(count) % 4 < 2, "A", "B")
    return dataclasses.replace(
        Read(name, before, after, truth, patients, groups, before_at=-3.0, after_at=-3.0), **more
    )


def material(count: int = 64, flipped: float = 0.0, seed: int = 1, **more: Any) -> Material:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, count)
    score = np.where(truth > 0, 1.5, -1.5) + rng.normal(0, 1.2, count)
    told = truth.copy()
    told[rng.permutation(count)[: round(flipped * count)]] ^= 1
    patients = np.array([f"t{i // 2}" for i in range(count)])
    return dataclasses.replace(Material(score, told, patients, 0, 0), **more)


def evidence(**more: Any) -> Evidence:
    return dataclasses.replace(Evidence(read(), (read("the release", seed=5),), material()), **more)


def refused(given: Evidence, rules: Rules | None = None) -> str:
    return " | ".join(judge.judge(given, rules or Rules()).reasons)


def test_as_good_as_the_live_reader_is_accepted_and_reported() -> None:
    """A candidate that holds every rule is accepted, with tables of both readers."""
    verdict = judge.judge(evidence(site=read(gain=0.3)), Rules())
    assert verdict.accepted and verdict.reasons == ()
    titles = [table["title"] for table in verdict.tables]
    assert titles == ["The judge", "the site's test patients", "the release", "The cases that taught"]


def test_worse_on_the_site_is_refused() -> None:
    """Worse by the margin must be excluded by the interval."""
    assert "worse by 0.05 is not excluded" in refused(evidence(site=read(gain=-0.8)))


def test_a_drop_on_the_release_is_refused() -> None:
    """No drop beyond 0.01 AUC on the release set."""
    assert "the release: AUC drops by" in refused(evidence(release=(read("the release", gain=-0.3, seed=5),)))
    assert "no release set" in refused(evidence(release=()))


def test_a_site_too_small_to_judge_is_refused() -> None:
    """A locked set too small to tell anything accepts nothing."""
    assert "it takes 8 of each" in refused(evidence(site=read(count=12)))


def test_a_site_without_test_patients_is_refused() -> None:
    """Where chance left nobody to judge on, the night is refused and does not fail."""
    nobody = Read("the site's test patients", *np.zeros((2, 0)), np.zeros(0, np.int64), *np.zeros((2, 0), np.str_))
    assert "0 patients with a cancer and 0 without" in refused(evidence(site=nobody))


def test_lost_outlines_are_refused() -> None:
    """A candidate that draws beside the lesion is refused, on either set, however well it ranks."""
    drawn = {"before_overlap": np.full(60, 0.8), "after_overlap": np.full(60, 0.72)}
    assert refused(evidence(site=read(**drawn))) == ""
    drawn["after_overlap"] = np.full(60, 0.6)
    assert "outlines overlap" in refused(evidence(site=read(**drawn)))
    assert "outlines overlap" in refused(evidence(release=(read("the release", seed=5, **drawn),)))
    drawn["after_overlap"] = np.full(60, np.nan)
    assert "outlines overlap" in refused(evidence(site=read(**drawn)))


def test_a_candidate_that_declines_its_patients_is_refused() -> None:
    """A gate that the site's own patients do not pass is refused: what is declined helps nobody."""
    assert refused(evidence(site=read(before_strange=10, after_strange=30))) == ""
    assert "it would decline them" in refused(evidence(site=read(before_strange=10, after_strange=31)))


def test_lost_calibration_and_sensitivity_are_refused() -> None:
    """Calibration within limits, and a floor of sensitivity at the rule-out score."""
    one = read()
    assert "calibration error" in refused(evidence(site=dataclasses.replace(one, after=one.after + 4)))
    assert "sensitivity" in refused(evidence(site=dataclasses.replace(one, after_at=2.0)))


def test_a_group_that_loses_is_refused() -> None:
    """No device may lose more than the limit, whatever the mean says."""
    one = read(gain=0.5)
    mine = one.groups == "B"
    worse = np.where(mine, one.before - 1.2 * np.where(one.truth > 0, 1, -1), one.after)
    assert "site's test patients, B: AUC drops" in refused(
        evidence(site=dataclasses.replace(one, after=worse)), Rules(not_worse=1.0)
    )


@pytest.mark.parametrize("where", ["site", "release"])
def test_a_candidate_that_gives_no_number_is_refused(where: str) -> None:
    """What could not be measured does not hold: one image of a locked set without a score is enough."""
    for one in (read(), read("the release", seed=5)):
        after = one.after.copy()
        after[3] = np.nan
        silent = dataclasses.replace(one, after=after)
        assert refused(evidence(**{where: silent if where == "site" else (silent,)}))


def test_an_unclean_privacy_report_is_refused() -> None:
    """What the privacy audit did not find clean is not put on the shelf."""
    assert "copies" in refused(evidence(privacy="the privacy audit fails: copies"))


@pytest.mark.parametrize("seed", range(8))
def test_a_night_of_flipped_labels_is_refused(seed: int) -> None:
    """30 % of the labels flipped: the cases contradict the reader, and the judge says so."""
    assert "contradict the live reader" in refused(evidence(material=material(flipped=0.3, seed=seed)))
    assert refused(evidence(material=material(seed=seed))) == ""


def test_a_night_of_a_bad_scanner_is_refused() -> None:
    """Frames unlike anything the live reader has seen point at the scanner."""
    assert "look at the scanner" in refused(evidence(material=material(strange=20)))


def test_a_night_of_duplicates_is_refused() -> None:
    """Cases that show the same pixels teach nothing but themselves."""
    assert "same pixels" in refused(evidence(material=material(copies=10)))


def test_a_night_of_one_patient_is_refused() -> None:
    """One patient is not a site."""
    one = np.array(["t0"] * 64)
    assert "1 patients; 8 are needed" in refused(evidence(material=material(patients=one)))
    many = np.array(["t0"] * 30 + [f"t{i}" for i in range(34)])
    assert "one patient gives 3" in refused(evidence(material=material(patients=many)))
