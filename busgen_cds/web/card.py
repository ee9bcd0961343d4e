"""A model card (Markdown) as a page shows it: headings, lists, tables, bold words and code; the rest as it stands.

Rules:
- All text is escaped first: a card of another site can bring words, and no markup of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby

from markupsafe import Markup, escape

_RULE = re.compile(r"^\|[\s:|-]+\|$")
_STRONG, _CODE = re.compile(r"\*\*(.+?)\*\*"), re.compile(r"`([^`]+)`")


def html(text: str) -> Markup:
    return Markup("\n").join(_blocks(text))


def _blocks(text: str) -> Iterator[Markup]:
    for kind, lines in groupby(_joined(text), key=_kind):
        found = list(lines)
        if kind == "heading":
            for line in found:
                level = 3 if line.startswith("# ") else 4
                yield _wrapped(f"h{level}", _words(line.lstrip("# ")))
        elif kind == "list":
            yield _wrapped("ul", Markup().join(_wrapped("li", _words(line[2:])) for line in found))
        elif kind == "table":
            yield _table([line for line in found if not _RULE.match(line)])
        elif kind == "words":
            yield from (_wrapped("p", _words(line)) for line in found)


def _joined(text: str) -> Iterator[str]:
    """Lines that belong together as one."""
    held = ""
    for line in (*text.splitlines(), ""):
        goes_on = held and _kind(held) in ("words", "list") and _kind(line.strip()) == "words"
        if goes_on:
            held = f"{held} {line.strip()}"
            continue
        yield held
        held = line.strip()
    yield held


def _kind(line: str) -> str:
    if not line:
        return ""
    if line.startswith("#"):
        return "heading"
    if line.startswith("- "):
        return "list"
    return "table" if line.startswith("|") else "words"


def _table(lines: list[str]) -> Markup:
    rows = [[_words(cell.strip()) for cell in line.strip("|").split("|")] for line in lines]
    head, *body = rows or [[]]
    heads = Markup().join(Markup('<th scope="col">{}</th>').format(cell) for cell in head)
    cells = Markup().join(_wrapped("tr", Markup().join(_wrapped("td", cell) for cell in row)) for row in body)
    return Markup('<table class="list tight"><thead><tr>{}</tr></thead><tbody>{}</tbody></table>').format(heads, cells)


def _words(text: str) -> Markup:
    plain = str(escape(text))
    return Markup(_CODE.sub(r"<code>\1</code>", _STRONG.sub(r"<b>\1</b>", plain)))


def _wrapped(name: str, inside: Markup) -> Markup:
    return Markup(f"<{name}>{{}}</{name}>").format(inside)
