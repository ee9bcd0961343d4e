"""The rule of triage, whatever a site chooses."""

from __future__ import annotations

from itertools import product
from typing import get_args

import pytest

from busgen_cds.birads import CATEGORIES, Category
from busgen_cds.triage import LAST, Order, Rule

RULES = [Rule(order, category) for order, category in product(get_args(Order), CATEGORIES)]
SCORES = (0.0, 0.02, 0.5, 1.0)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.key)
def test_declined_stands_above_category_3_whatever_the_rule(rule: Rule) -> None:
    """Whatever the rule, a declined study stands above every study of category 3 and every one without a finding."""
    declined = rule.place(None, None, unseen=True)
    lower: tuple[Category | None, ...] = ("3", None)
    assert all(declined < rule.place(birads, p, unseen=False) < LAST for birads in lower for p in SCORES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.key)
def test_declined_stands_where_the_rule_says(rule: Rule) -> None:
    """A declined study stands above the category that the rule names and all below, and below those above it."""
    declined = rule.place(None, None, unseen=True)
    at = CATEGORIES.index(rule.declined_above)
    for n, p in product(range(len(CATEGORIES)), SCORES):
        assert (declined < rule.place(CATEGORIES[n], p, unseen=False)) == (n <= at)


def test_suspicion_is_by_category_then_probability() -> None:
    """By suspicion a higher category stands first whatever its probability, and within one the more probable."""
    places = [Rule().place(birads, p, unseen=False) for birads in reversed(CATEGORIES) for p in reversed(SCORES)]
    assert places == sorted(places)
    assert len(set(places)) == len(places)


def test_arrival_makes_equals() -> None:
    """By arrival all categories above 3 stand in one place, so that who waits longest is first."""
    rule = Rule("arrival")
    assert len({rule.place(birads, p, unseen=False) for birads in CATEGORIES[1:] for p in SCORES}) == 1
