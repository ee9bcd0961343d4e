"""How figures are written on pages."""

from __future__ import annotations

import pytest

from busgen_cds.web import render


@pytest.mark.parametrize(
    ("share", "half", "said"),
    [(0.848, 0.184, "66–100 %"), (0.5, 0.2, "30–70 %"), (0.02, 0.03, "0–5 %"), (0.006, 0.002, "0.40–0.80 %")],
)
def test_an_interval_ends_at_0_and_100(share: float, half: float, said: str) -> None:
    """The interval of a probability is shown between 0 and 100 %."""
    assert render.interval(share, half) == said
