"""What was said, what became of it, and what waits or is stuck."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from busgen_cds.cli.console import HERE, Config, Json, Who, opened, out, print_json, table
from busgen_cds.errors import Misconfigured

if TYPE_CHECKING:
    from busgen_cds.app import Site
    from busgen_cds.store.results import Entry

app = typer.Typer()
results_app = typer.Typer(no_args_is_help=True, help="What was said, and what became of it.")
WIDE = 100  # characters; from here on a table has room for a whole reference


@results_app.command("list")
def results_list(config: Config = HERE, limit: int = 50, triage: bool = False, as_json: Json = False) -> None:
    """The latest results; `--triage` lists them as the worklist does, unread first, by the site's rule."""
    with opened(config) as site:
        entries = _as_on_the_worklist(site, limit) if triage else site.results.listing(limit=limit)
    if as_json:
        return print_json([vars(each) for each in entries])
    rows = [
        (
            each.ref[:8],
            f"{each.made_at.astimezone():%Y-%m-%d %H:%M}",
            each.outcome,
            each.birads or each.reason or "no lesion found",
            "" if each.probability is None else f"{100 * each.probability:.1f} %",
            each.revision,
        )
        for each in entries
    ]
    return table(("result", "made", "outcome", "category or reason", "malignant", "rev"), rows)


@results_app.command("show")
def results_show(ref: str, config: Config = HERE) -> None:
    """One result with its objects and their deliveries, as JSON."""
    from busgen_cds.operations import documents

    with opened(config) as site:
        print_json(documents.result(site, _full(site, ref)))


@results_app.command("resend")
def results_resend(
    ref: str,
    config: Config = HERE,
    to: Annotated[str | None, typer.Option(help="Only to this destination.")] = None,
    who: Who = "",
) -> None:
    """Send a result's objects again, byte for byte."""
    with opened(config) as site:
        asked = site.desk.resend(_full(site, ref), who=who, destination=to)
        out.print(f"Sent again: {', '.join(asked) or 'nothing; it has no destination'}.")


def _as_on_the_worklist(site: Site, limit: int) -> list[Entry]:
    from busgen_cds.store.worklist import Worklist

    worklist = Worklist(site.database, site.vault, site.triage)
    worklist.catch_up()
    return site.results.named(worklist.answered(limit))


def _full(site: Site, ref: str) -> str:
    matches = [each.ref for each in site.results.listing(limit=10_000, superseded=True) if each.ref.startswith(ref)]
    if len(matches) != 1:
        raise Misconfigured(f"{len(matches)} results begin with {ref!r}: see `busgen-cds results list`.")
    return matches[0]


@app.command()
def queue(
    config: Config = HERE,
    retry: Annotated[
        str | None, typer.Option(help="Try a study's stuck work again, by its reference or how that begins.")
    ] = None,
    release: Annotated[
        str | None, typer.Option(help="Let a held study go on, by its reference or how that begins.")
    ] = None,
    patient: Annotated[str, typer.Option(help="With --release: the patient id whose study it is.")] = "",
    issuer: Annotated[str, typer.Option(help="With --patient: the issuer of that id.")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Let a stopped engine be used again.")] = False,
    who: Who = "",
    as_json: Json = False,
) -> None:
    """What waits, what is stuck and why, what was refused at the door."""
    from busgen_cds.operations import documents

    with opened(config) as site:
        if retry:
            taken = site.desk.retry(documents.waiting_study(site, retry), who=who)
            return out.print(f"Taken up again: {', '.join(taken) or 'nothing; it is not stuck'}.")
        if release:
            from busgen_cds.study import Patient

            stated = Patient(id=patient, issuer=issuer) if patient else None
            site.desk.release(site.inbox, documents.waiting_study(site, release), who=who, patient=stated)
            return out.print("The study goes on.")
        if resume:
            return out.print("The engine is used again." if site.desk.resume(who=who) else "It was not stopped.")
        waiting = documents.queue(site)
        if as_json:
            return print_json(waiting)
        if not waiting:
            return out.print("Nothing waits.")
        columns = ("what", "ref", "state", "destination", "reason", "verb")
        rows = [[*(each[name] for name in columns), _until(each["next_try_at"])] for each in waiting]
        return table((*columns, "next try"), rows, whole=("ref",) if out.width >= WIDE else ())


def _until(moment: datetime | None) -> str:
    if moment is None:
        return ""
    seconds = (moment - datetime.now(UTC)).total_seconds()
    left = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    return f"{moment.astimezone():%H:%M:%S}, in {left}" if seconds > 0 else "now"
