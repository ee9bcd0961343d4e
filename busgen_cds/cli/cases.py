"""The verbs of the site's own loop: what a site's cases are, what is learnt from them, and what that is worth.

Rules: torch is imported inside the verbs, so that a clinic's program starts without it.
"""

from __future__ import annotations

import json
from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from busgen_cds import truth
from busgen_cds.cli.console import HERE, Config, Json, Who, console, every_file, opened, out, table
from busgen_cds.errors import Misconfigured
from busgen_cds.truth import Conflict, Known

if TYPE_CHECKING:
    from busgen_cds.app import Site
    from busgen_cds.flows.confirm_case import Outcome
    from busgen_cds.store.casebook import Listed

app = typer.Typer(no_args_is_help=True, help="The site's own loop.")


@app.command()
def adapt(
    config: Config = HERE,
    anyway: Annotated[bool, typer.Option(help="Also with fewer new cases than the settings ask for.")] = False,
    wait: Annotated[bool, typer.Option(help="Stay, and adapt at the cron times of the settings.")] = False,
) -> None:
    """Learn from the site's cases; what passes the judge goes onto the shelf. Nothing becomes live by this."""
    from busgen_cds.flows import adapt_site
    from busgen_cds.operations import learning_loop, serving

    with opened(config) as site:
        cron = site.settings.adaptation.cron
        if wait and not cron:
            raise Misconfigured("Set adaptation.cron: it says when to adapt.")
        with learning_loop.night(site):
            if wait:
                adapt_site.every(cron)
                serving.until_told()
                return
            for each in learning_loop.lacking(site):
                console.print(f"Before it begins: {each}.", soft_wrap=True, highlight=False)
            word = adapt_site.run(anyway=anyway)
        _say_what_became(site, word)


def _say_what_became(site: Site, word: str) -> None:
    from busgen_cds.operations import learning_loop

    outcome, _, digest = word.partition(" ")
    if outcome == "failed":
        run = next(each for each in learning_loop.casebook(site).adaptations() if each.ref == digest)
        console.print(f"Failed at the stage {run.reason}", soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(1)
    if outcome not in ("shelved", "refused"):
        return out.print(word, soft_wrap=True)
    shelved = site.shelf.get(digest)
    out.print(f"{outcome}: {shelved.name} {shelved.version} ({digest[:12]})", soft_wrap=True)
    for reason in shelved.reasons:
        out.print(f"  {reason}", soft_wrap=True, highlight=False)
    return None


# ---- Cases

cases_app = typer.Typer(no_args_is_help=True, help="What readers and pathology said: the site's own cases.")


@cases_app.command("import")
def cases_import(
    files: Annotated[list[Path], typer.Argument(exists=True, help="CSV, FHIR (.json) or HL7 v2 files, or folders.")],
    config: Config = HERE,
    who: Who = "",
) -> None:
    """Take in pathology, matched by accession number and patient id; then make the cases that it settles."""
    from busgen_cds import pathology
    from busgen_cds.flows import confirm_case
    from busgen_cds.operations import learning_loop

    kept = known = refused = 0
    tomorrow = date.today() + timedelta(days=1)  # a laboratory to the east may be there already
    with opened(config) as site:
        stations = learning_loop.case_stations(site)
        for path in every_file(files):
            for one in pathology.read(path.name, pathology.text_of(path.read_bytes()), tomorrow):
                if isinstance(one, pathology.Unusable):
                    refused += 1
                    console.print(str(one), soft_wrap=True, highlight=False, markup=False)
                elif stations.book.receive(one, who=who):
                    kept += 1
                else:
                    known += 1
        outcomes, waiting = confirm_case.gather(stations), stations.book.waiting()
    _tell(outcomes)
    out.print(f"{kept} reports taken in, {known} known already, {refused} not usable.")
    _say_what_waits(waiting)
    if refused:
        raise typer.Exit(1)


@cases_app.command("list")
def cases_list(config: Config = HERE, as_json: Json = False) -> None:
    """The cases, and what is open or in conflict, with the reason."""
    from busgen_cds.flows import confirm_case
    from busgen_cds.operations import learning_loop

    with opened(config) as site:
        stations = learning_loop.case_stations(site)
        outcomes = confirm_case.gather(stations)
        kept = stations.book.listing()
        reports = {o.study_ref: stations.book.pathology_of(o.study_ref) for o in outcomes if _conflict(o)}
        lacking, new = learning_loop.lacking(site), len(stations.book.new())
        waiting = stations.book.waiting()
    if as_json:
        doubts = [
            {"study": o.study_ref, "finding": o.finding, "conflict": _conflict(o), "reason": o.found.reason}
            for o in outcomes
            if not isinstance(o.found, Known)
        ]
        cases = [_as_document(each) for each in kept]
        return out.print_json(json.dumps({"cases": cases, "doubts": doubts}))
    rows = [
        (
            *(each.ref[:8], each.study_ref[:8], each.patient[:8], each.part),
            *(truth.in_words(each.pathology, each.origin), each.birads or "–", truth.source(each.origin)),
            *(each.confirmed_on, each.device or "–"),
        )
        for each in kept
    ]
    table(("case", "study", "patient", "part", "says", "category", "from", "on", "device"), rows)
    _tell(outcomes)
    for study_ref, found in reports.items():
        for report in found:
            out.print(f"  study {study_ref[:8]}: report {report.ref[:8]} says {report.pathology}, {report.reported_on}")
    _say_what_waits(waiting)
    out.print(f"{new} new cases teach; a night begins from {site.settings.adaptation.least_new} on.")
    for what in lacking:
        out.print(f"  {what}", soft_wrap=True, highlight=False)
    return None


def _say_what_waits(reports: int) -> None:
    if reports:
        out.print(
            f"{reports} pathology reports name an accession number of no study answered here, and wait for it.",
            soft_wrap=True,
        )


def _as_document(case: Listed) -> dict[str, Any]:
    """An opinion is not called pathology."""
    document = vars(case) | {"made_at": case.made_at.isoformat()}
    document["says"] = truth.in_words(case.pathology, case.origin)
    return document if case.origin == "pathology" else {k: v for k, v in document.items() if k != "pathology"}


def _conflict(outcome: Outcome) -> bool:
    return isinstance(outcome.found, Conflict)


def _tell(outcomes: list[Outcome]) -> None:
    for each in outcomes:
        if not isinstance(each.found, Known):
            kind = "CONFLICT" if _conflict(each) else "open"
            text = f"{kind}  study {each.study_ref[:8]}, finding {each.finding or '–'}: {each.found.reason}"
            out.print(text, soft_wrap=True, highlight=False)


@cases_app.command("export")
def cases_export(
    to: Annotated[Path, typer.Argument(help="Folder; it must be empty.")],
    config: Config = HERE,
    part: Annotated[
        Literal["teach", "test", "all"], typer.Option(help="Of the patients who teach, or of those who judge.")
    ] = "teach",
) -> None:
    """Write de-identified cases as images, masks and a manifest that training reads."""
    from busgen_cds.operations import learning_loop

    if to.exists() and any(to.iterdir()):
        raise Misconfigured(f"{to} is not empty: name another folder.")
    with opened(config) as site:
        book = learning_loop.casebook(site)
        chosen = [each for each in book.listing() if part in ("all", each.part)]
        learning_loop.write_cases(book, chosen, to)
    out.print(f"{len(chosen)} cases in {to}. Look at each image before any leaves the site.", soft_wrap=True)


@cases_app.command("withdraw-report")
def cases_withdraw(
    report: Annotated[str, typer.Argument(help="Reference of a pathology report, as `cases list` shows it.")],
    config: Config = HERE,
    who: Who = "",
) -> None:
    """Say that a pathology report does not hold; conflicts that it made are looked at again."""
    from busgen_cds.flows import confirm_case
    from busgen_cds.operations import learning_loop

    with opened(config) as site:
        stations = learning_loop.case_stations(site)
        if not stations.book.withdraw(report, who=who):
            raise Misconfigured(f"No report that stands begins with {report!r}, or several do: see `cases list`.")
        confirm_case.gather(stations)
    out.print("Withdrawn.")
