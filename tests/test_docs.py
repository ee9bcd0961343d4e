"""The documents show what there is."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_picture_is_shown_and_every_shown_one_is_there() -> None:
    """Each picture of a page stands in the documents, each that stands there exists, and the viewer's comes first."""
    pages = (ROOT / "docs" / "pages.md").read_text()
    shown = re.findall(r"!\[[^\]]*\]\(screens/([\w-]+\.png)\)", pages)
    assert sorted(shown) == sorted(each.name for each in (ROOT / "docs" / "screens").glob("*.png"))
    first = re.search(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert first and first[1] == "docs/screens/ohif-report.png"


def test_the_command_takes_every_picture() -> None:
    """The one command that takes the pictures takes each of those that are shown."""
    taken = ["ohif-report", *re.findall(r'takes\(\s*"([\w-]+)"', (ROOT / "tests" / "screens.py").read_text())]
    assert sorted(f"{name}.png" for name in taken) == sorted(
        each.name for each in (ROOT / "docs" / "screens").glob("*.png")
    )
