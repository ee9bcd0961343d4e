"""Templates, and how figures, times and words are written on pages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from fastapi import Request
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from starlette.responses import HTMLResponse

from busgen_cds.store.people import Person
from busgen_cds.web import auth, card
from busgen_cds.web.front import Front
from busgen_cds.web.site import NOT_A_DIAGNOSIS

_NAVIGATION = (
    ("/worklist", "Worklist", "studies.read"),
    ("/operations", "Operations", "operations.read"),
    ("/models", "Models", "models.read"),
    ("/laboratory", "Laboratory", "models.read"),
    ("/audit", "Audit", "audit.read"),
    ("/people", "People", "people.manage"),
)
_CHIP = {"3": "c3", "4A": "c4a", "4B": "c4b", "4C": "c4c", "5": "c5"}


def percent(share: float | None) -> str:
    """Two decimals near the ends, one between: as on the reports."""
    if share is None:
        return "–"
    value = 100 * share
    return f"{round(value, 1 if 1 <= value <= 99 else 2):g} %"


def interval(share: float, half: float) -> str:
    """Where a share lies, 0 to 100 %, with as many decimals as its width asks for."""
    low, high = 100 * max(0.0, share - half), 100 * min(1.0, share + half)
    decimals = 0 if high - low >= 5 else 1 if high - low >= 0.5 else 2
    return f"{low:.{decimals}f}–{high:.{decimals}f} %"


def span(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def local(at: datetime | None, form: str = "%H:%M") -> str:
    return at.astimezone().strftime(form) if at else "–"


def moment(at: datetime | None, now: datetime) -> Markup:
    """Today's times as a clock, older ones with their date."""
    if at is None:
        return Markup("–")
    recent = now - at < timedelta(hours=18)
    shown = local(at, "%H:%M" if recent else "%d %b %H:%M")
    exact, stated = local(at, "%Y-%m-%d %H:%M:%S"), at.isoformat(timespec="seconds")
    return Markup('<time datetime="{}" title="{}">{}</time>').format(stated, exact, shown)


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit in ("B", "KiB") else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def chip(birads: str | None, outcome: str = "assessed", stuck: str = "") -> Markup:
    """The category, in words as well as in colour."""
    if outcome == "assessed" and birads is None:
        return Markup('<span class="chip none" title="No lesion found">no lesion</span>')
    if outcome == "declined":
        return Markup('<span class="chip declined" title="Not analysed">not analysed</span>')
    if outcome == "not-for-us":
        return Markup('<span class="chip none" title="Not breast B-mode ultrasound">not for us</span>')
    if not outcome:
        return Markup('<span class="chip waiting">{}</span>').format("no answer" if stuck else "waiting")
    kind = _CHIP.get(birads or "", "none")
    return Markup('<span class="chip {}" title="BI-RADS-style category {}">{}</span>').format(kind, birads, birads)


def as_json(value: Any) -> Markup:
    """For a data block in a page: no character of it can end the block."""
    text = json.dumps(value, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


_environment = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=select_autoescape(),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_environment.filters.update(
    percent=percent, interval=interval, span=span, local=local, moment=moment, size=size, as_json=as_json
)
_environment.filters.update(card=card.html)
_environment.globals.update(chip=chip, not_a_diagnosis=NOT_A_DIAGNOSIS)


def _navigation(front: Front, person: Person | None) -> list[tuple[str, str]]:
    """The pages that this person may open."""
    there = [each for each in _NAVIGATION if each[0] != "/laboratory" or front.bench]
    return [(path, name) for path, name, right in there if person and right in person.rights]


def page(request: Request, template: str, values: Mapping[str, Any] | None = None, status: int = 200) -> HTMLResponse:
    front = auth.front_of(request)
    person: Person | None = getattr(request.state, "person", None)
    frame = {
        "site": front.site,
        "bundle": front.bundle(),
        "person": person,
        "navigation": _navigation(front, person),
        "here": request.url.path,
        "now": front.site.clock(),
    }
    return HTMLResponse(_environment.get_template(template).render({**frame, **(values or {})}), status)


def error(request: Request, status: int, message: str, headers: Any = None) -> HTMLResponse:
    titles = {403: "Not allowed", 404: "Not found", 409: "Not done", 422: "Not understood", 429: "Too fast"}
    response = page(
        request, "error.html", {"title": titles.get(status, "Not possible now"), "message": message}, status
    )
    response.headers.update(headers or {})
    return response
