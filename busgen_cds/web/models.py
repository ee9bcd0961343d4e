"""The shelf on pages: what may become live and why, how it reads beside the live one, what drifts; promote, roll back.

Rules:
- Making live and rolling back ask for the promoter's passphrase on a page of their own that says what will change.
- A form carries the number of the statement it was shown with: pressed twice, or after somebody else spoke, it
  changes nothing.
- A wrong passphrase is an act, and may be tried a few times a minute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Form, HTTPException, Request
from fastapi import Path as InPath
from starlette.responses import RedirectResponse, Response

from busgen_cds.bundle import CARD
from busgen_cds.errors import Misconfigured, Untrusted
from busgen_cds.store import shadow as beside
from busgen_cds.store.audit import Act
from busgen_cds.store.people import Person, Refused
from busgen_cds.store.shelf import Shelved, Standing
from busgen_cds.store.site_keys import WrongPassphrase
from busgen_cds.web import auth, render
from busgen_cds.web.front import Front
from busgen_cds.web.site import Models

Digest = Annotated[str, InPath(pattern="^[0-9a-f]{64}$", description="The bundle's digest.")]
Text = Annotated[str, Form(max_length=512)]
WEEKS = 12

router = APIRouter()


@dataclass(frozen=True)
class Table:
    """One table of a report."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


# -- looking


@router.get("/models")
def overview(request: Request, person: Person = auth.page("models.read")) -> Response:
    front = auth.front_of(request)
    bundle = front.bundle()
    values: dict[str, Any] = {"figures": flat(bundle.figures) if bundle else [], "models": None}
    if front.site.models is not None:
        values |= _overview(front.site.models, bundle.name.digest if bundle else "")
    return render.page(request, "models.html", values)


@router.get("/models/roll-back")
def ask_roll_back(request: Request, person: Person = auth.page("models.act")) -> Response:
    models = of(auth.front_of(request))
    standing = models.shelf.standing()
    with _said_plainly():
        target = models.shelf.get(models.shelf.before())
    values = {"entry": target, "verb": "roll back", "standing": standing, "comparison": None}
    return render.page(request, "models_confirm.html", values)


@router.get("/models/{digest}")
def one(request: Request, digest: Digest, person: Person = auth.page("models.read")) -> Response:
    models = of(auth.front_of(request))
    entry = _entry(models, digest)
    card, figures, wrong = "", [], ""
    if entry.state != "refused":
        try:
            opened = models.shelf.open(digest)
            card, figures = opened.files.get(CARD, b"").decode(), flat(opened.manifest.figures)
        except (Untrusted, Misconfigured) as error:
            wrong = str(error)
    comparison = models.shadow.comparison(digest)
    values = {
        "entry": entry,
        "card": card,
        "figures": figures,
        "wrong": wrong,
        "tables": tables_of(entry.report),
        "plots": sorted(models.shelf.plots(digest)),
        "comparison": comparison if comparison.studies else None,
        "words": beside.WORDS,
    }
    return render.page(request, "model.html", values)


@router.get("/models/{digest}/plots/{name}")
def plot(request: Request, digest: Digest, name: str, person: Person = auth.page("models.read")) -> Response:
    found = of(auth.front_of(request)).shelf.plots(digest)
    if name not in found:
        raise HTTPException(404, "There is no such plot.")
    return Response(found[name], media_type="image/png")


@router.get("/models/{digest}/promote")
def ask_promote(request: Request, digest: Digest, person: Person = auth.page("models.act")) -> Response:
    models = of(auth.front_of(request))
    comparison = models.shadow.comparison(digest)
    values = {
        "entry": _entry(models, digest),
        "verb": "promote",
        "standing": models.shelf.standing(),
        "comparison": comparison if comparison.studies else None,
        "words": beside.WORDS,
    }
    return render.page(request, "models_confirm.html", values)


def _overview(models: Models, live: str) -> dict[str, Any]:
    in_shadow = models.shelf.in_shadow()
    comparison = models.shadow.comparison(in_shadow) if in_shadow else None
    try:
        before = models.shelf.get(models.shelf.before())
    except Misconfigured:
        before = None
    return {
        "models": models,
        "shelf": models.shelf.listing(),
        "standing": models.shelf.standing(),
        "before": before,
        "shadowed": models.shelf.get(in_shadow) if in_shadow else None,
        "comparison": comparison,
        "words": beside.WORDS,
        "weeks": models.drift.weeks(live, last=WEEKS) if live else [],
        "filled": models.drift.filled(live) if live else 0,
        "wanted": models.drift.reference_studies,
        "alarms": models.drift.alarms(live, limit=20) if live else [],
        "wish": models.wish(live) if live else "",
    }


# -- doing


@router.post("/models/roll-back")
def roll_back(
    request: Request, passphrase: Text, number: Annotated[int, Form(ge=0)], person: Person = auth.page("models.act")
) -> Response:
    say(auth.front_of(request), person, passphrase, number)
    return RedirectResponse("/models", 303)


@router.post("/models/{digest}/promote")
def promote(
    request: Request,
    digest: Digest,
    passphrase: Text,
    number: Annotated[int, Form(ge=0)],
    person: Person = auth.page("models.act"),
) -> Response:
    say(auth.front_of(request), person, passphrase, number, digest)
    return RedirectResponse("/models", 303)


@router.post("/models/{digest}/shadow")
def shadow(request: Request, digest: Digest, what: Text, person: Person = auth.page("models.act")) -> Response:
    if what not in ("begin", "end"):
        raise HTTPException(422, "A bundle's shadow begins or ends.")
    read_along(auth.front_of(request), person, digest, what == "begin")
    return RedirectResponse(f"/models/{digest}", 303)


@router.post("/models/{digest}/withdraw")
def withdraw(request: Request, digest: Digest, reason: Text, person: Person = auth.page("models.act")) -> Response:
    models = of(auth.front_of(request))
    with _said_plainly():
        models.withdraw(_entry(models, digest).digest, person.name, reason)
    return RedirectResponse(f"/models/{digest}", 303)


def say(front: Front, person: Person, passphrase: str, number: int, digest: str = "") -> Standing:
    """Promote a bundle, or roll back when none is named; what was said already is not said again."""
    models = of(front)
    standing = models.shelf.standing()
    if digest and standing.digest == digest:
        return standing
    if standing.number != number:
        last = models.shelf.statements()[-1:]
        if not digest and standing.number == number + 1 and last and last[0].verb == "roll back":
            return standing  # the same form again
        raise Refused(f"Statement {standing.number} was said meanwhile: look at the page again before you decide.")
    if not front.passphrases.take(person.account.ref):
        raise HTTPException(429, "Too many tries: wait a minute.", headers={"Retry-After": "60"})
    try:
        with _said_plainly():
            if not digest:
                return models.roll_back(person.name, passphrase, number)
            return models.promote(_entry(models, digest).digest, person.name, passphrase, number)
    except WrongPassphrase as wrong:
        what = "promote" if digest else "roll back"
        front.note(Act("passphrase refused", person.name, what, None, {"digest": digest}))
        raise Refused(str(wrong)) from wrong


def read_along(front: Front, person: Person, digest: str, begin: bool) -> Shelved:
    models = of(front)
    _entry(models, digest)
    with _said_plainly():
        return (models.begin_shadow if begin else models.end_shadow)(digest, person.name)


class _said_plainly:
    """What the shelf's rules do not allow is refused to who asked; a wrong passphrase stays what it is."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, Misconfigured) and not isinstance(error, WrongPassphrase):
            raise Refused(str(error)) from error


def of(front: Front) -> Models:
    if front.site.models is None:
        raise HTTPException(404, "This site has no shelf.")
    return front.site.models


def _entry(models: Models, digest: str) -> Shelved:
    found = models.shelf.find(digest)
    if found is None:
        raise HTTPException(404, "No such bundle is on the shelf.")
    return found


# -- in words


def tables_of(report: Mapping[str, Any]) -> list[Table]:
    """A report's tables, and whatever else it says as one more."""
    found = [
        Table(
            str(each.get("title", "")),
            tuple(map(str, each.get("columns", ()))),
            tuple(tuple(_figure(cell) for cell in (row if isinstance(row, list) else [row])) for row in each["rows"]),
        )
        for each in report.get("tables", ())
        if isinstance(each, Mapping) and isinstance(each.get("rows"), list)
    ]
    rest = {key: value for key, value in report.items() if key != "tables"}
    return [*found, Table("More", (), tuple(flat(rest)))] if rest else found


def flat(figures: Any, name: str = "") -> list[tuple[str, str]]:
    """Figures as lines: nested names are joined, an interval stays together."""
    if isinstance(figures, Mapping):
        return [line for key, value in figures.items() for line in flat(value, f"{name} · {key}" if name else str(key))]
    if isinstance(figures, list | tuple):
        if len(figures) > 8:
            return [(name, f"{len(figures)} values")]
        if len(figures) == 3 and all(isinstance(each, float) for each in figures):  # a figure and its interval
            value, low, high = map(_figure, figures)
            return [(name, f"{value} ({low} to {high})")]
        return [(name, ", ".join(_figure(each) for each in figures))]
    return [(name, _figure(figures))]


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
