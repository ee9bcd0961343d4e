"""The rule of triage, whatever a site chooses."""

from __future__ import annotations

from itertools import product
from typing import get_args

import pytest

from busgen_cds.birads import CATEGORIES, Category
from busgen_cds.triage import LAST, Order, Rule, fell

RULES = [Rule(order, category) for order, category in product(get_args(Order), CATEGORIES)]
SCORES = (0.0, 0.02, 0.5, 1.0)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.key)
def test_declined_stands_above_category_3_whatever_the_rule(rule: Rule) -> None:
    """Whatever the rule, a declined study stands above every study of category 3 and every one without a finding."""
    declined = rule.place("declined")
    assert rule.place("", stuck=True) == declined
    lower: tuple[Category | None, ...] = ("3", None)
    assert all(declined < rule.place("assessed", birads, p) < LAST for birads in lower for p in SCORES)
    assert rule.place("not-for-us") == LAST


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.key)
def test_declined_stands_where_the_rule_says(rule: Rule) -> None:
    """A declined study stands above the category that the rule names and all below, and below those above it."""
    declined = rule.place("declined")
    at = CATEGORIES.index(rule.declined_above)
    for n, p in product(range(len(CATEGORIES)), SCORES):
        assert (declined < rule.place("assessed", CATEGORIES[n], p)) == (n <= at)


def test_suspicion_is_by_category_then_probability() -> None:
    """By suspicion a higher category stands first whatever its probability, and within one the more probable."""
    places = [Rule().place("assessed", birads, p) for birads in reversed(CATEGORIES) for p in reversed(SCORES)]
    assert places == sorted(places)
    assert len(set(places)) == len(places)


def test_arrival_makes_equals() -> None:
    """By arrival all categories above 3 stand in one place, so that who waits longest is first."""
    rule = Rule("arrival")
    assert len({rule.place("assessed", birads, p) for birads in CATEGORIES[1:] for p in SCORES}) == 1


def test_what_is_a_fall() -> None:
    """A category falls to a lower one, from 4A on to not analysed, and from that to 3; a score alone never falls."""
    order: list[tuple[str, Category | None]] = [
        ("assessed", None), ("assessed", "3"), ("declined", None), *(("assessed", each) for each in CATEGORIES[1:])
    ]  # fmt: skip
    for (n, before), (m, after) in product(enumerate(order), enumerate(order)):
        assert fell(before, after) == (m < n)
    assert not fell(("assessed", None), ("not-for-us", None))
    assert fell(("assessed", "3"), ("not-for-us", None))
