"""The bands, the prevalence and the pooling: what a probability may be called."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from busgen_cds import birads

PROBABILITIES = st.floats(0, 1)


@pytest.mark.parametrize(
    ("probability", "category"),
    [
        (0.0, "3"),
        (0.02, "3"),
        (0.021, "4A"),
        (0.10, "4A"),
        (0.11, "4B"),
        (0.5, "4B"),
        (0.51, "4C"),
        (0.949, "4C"),
        (0.95, "5"),
    ],
)
def test_the_acr_bands(probability: float, category: str) -> None:
    """A probability gets the category whose ACR band of likelihood holds it."""
    assert birads.category(probability, score=0.0, rule_out=0.5) == category


@given(PROBABILITIES, PROBABILITIES, st.floats(0.001, 0.999))
def test_only_what_we_can_say(probability: float, score: float, rule_out: float) -> None:
    """Categories 0, 1, 2 and 6 are never emitted, whatever the numbers."""
    assert birads.category(probability, score=score, rule_out=rule_out) in {"3", "4A", "4B", "4C", "5"}


@given(st.floats(0.001, 0.999), st.floats(0.001, 0.2))
def test_probably_benign_needs_a_low_score_at_any_prevalence(score: float, prevalence: float) -> None:
    """At any prevalence, "3" also requires a score below the rule-out score."""
    probability = birads.at_prevalence(score, 0.32, prevalence)
    if birads.category(probability, score=score, rule_out=0.05) == "3":
        assert score < 0.05


@given(st.floats(0.001, 0.999), st.floats(0.01, 0.99))
def test_the_same_prevalence_changes_nothing(probability: float, prevalence: float) -> None:
    """At the prevalence of calibration a probability stays what it is."""
    assert birads.at_prevalence(probability, prevalence, prevalence) == pytest.approx(probability)


@given(st.floats(0.01, 0.99))
def test_rarer_cancer_means_a_lower_probability(probability: float) -> None:
    """The same score means less where cancer is rarer."""
    assert birads.at_prevalence(probability, 0.32, 0.01) < probability


def test_pooling_runs_through_its_knots_and_stays_beyond_them() -> None:
    """The correction for the number of frames passes through its knots and is constant beyond them."""
    pooling = birads.Pooling(frames=(1, 10, 100), shift=(0.0, -1.0, -1.5))
    assert [pooling.correction(n) for n in (1, 10, 100, 1000)] == [0.0, -1.0, -1.5, -1.5]
    assert -1.0 < pooling.correction(5) < 0.0


def test_every_category_has_its_code() -> None:
    """Each category that can be said has a code and a meaning."""
    assert set(birads.CODES) == set(birads.CATEGORIES)
