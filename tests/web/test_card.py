"""A model card on a page."""

from __future__ import annotations

from busgen_cds.web import card

TEXT = """# Reader 1

Reads **breast** frames,
and no others. <script>alert(1)</script>

## Not for
- Doppler of `colour`;
  children
- men

| device | images |
|---|---|
| A & B | 5 |
"""


def test_a_card_is_shown_as_a_page_and_never_as_markup_of_its_own() -> None:
    """Headings, lists and tables of a card are rendered; whatever else it brings is text."""
    page = card.html(TEXT)
    for part in (
        "<h3>Reader 1</h3>",
        "<p>Reads <b>breast</b> frames, and no others. &lt;script&gt;alert(1)&lt;/script&gt;</p>",
        "<h4>Not for</h4>",
        "<ul><li>Doppler of <code>colour</code>; children</li><li>men</li></ul>",
        '<th scope="col">device</th><th scope="col">images</th>',
        "<tr><td>A &amp; B</td><td>5</td></tr>",
    ):
        assert part in page, page
    assert "<script" not in page and "|---" not in page
