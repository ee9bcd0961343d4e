"""The verbs of whoever answers for the data: the record of acts, the keys, and what is let go.

Rules:
- Exit codes and `--json` as everywhere (see `cli`): 1 when the record or a proof does not hold.
- Whoever reads the record out, lets go or changes keys stands in the record: the account that runs the program.
- No name of a patient is printed; a study is named by its reference, or found by an identifier that is given.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from busgen_cds.cli.console import (
    HERE,
    Config,
    Json,
    account,
    opened,
    out,
    print_json,
    read_settings,
    settings_file,
    table,
)
from busgen_cds.errors import Misconfigured

if TYPE_CHECKING:
    from busgen_cds.app import Site
    from busgen_cds.store.audit import Wanted
    from busgen_cds.store.vault import KeyFile

app = typer.Typer()
audit_app = typer.Typer(no_args_is_help=True, help="The record of acts.")
keys_app = typer.Typer(no_args_is_help=True, help="The site key.")


# ---- The record of acts


@dataclass(frozen=True)
class Asked:
    """Which acts are asked for: each field is an option of every verb that reads the record out."""

    who: Annotated[str, typer.Option(help="Only what this account, AE title or part of the program did.")] = ""
    kind: Annotated[str, typer.Option(help="Only acts whose kind begins like this.")] = ""
    study: Annotated[
        str, typer.Option(help="Only this study: our reference, Study Instance UID or accession number.")
    ] = ""
    patient: Annotated[str, typer.Option(help="Only the studies of this patient id.")] = ""
    since: Annotated[str, typer.Option(help="From this day on, as 2026-01-31.")] = ""
    until: Annotated[str, typer.Option(help="Up to and with this day.")] = ""

    def at(self, site: Site) -> Wanted:
        from busgen_cds.store.audit import Wanted
        from busgen_cds.store.worklist import Worklist

        if self.study and self.patient:
            raise Misconfigured("Name a study or a patient: both at once are not looked for.")
        named = self.study or self.patient
        refs = Worklist(site.database, site.vault).studies_of(named) if named else None
        since = _day(self.since) if self.since else None
        until = _day(self.until, whole=True) if self.until else None
        return Wanted(self.who, self.kind, refs, since, until)


def asked_for(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with the fields of `Asked` as its options; it gets them as one value."""
    filters = inspect.signature(Asked, eval_str=True).parameters
    own = inspect.signature(verb, eval_str=True).parameters

    @functools.wraps(verb)
    def called(**given: Any) -> None:
        verb(asked=Asked(**{name: given.pop(name) for name in filters}), **given)

    options = [each for name, each in {**own, **filters}.items() if name != "asked"]
    said = inspect.Signature([each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in options])
    called.__signature__ = said  # type: ignore[attr-defined]  # what Typer reads
    return called


@audit_app.command("show")
@asked_for
def show(asked: Asked, config: Config = HERE, limit: int = 50, as_json: Json = False) -> None:
    """The latest acts, newest first."""
    from busgen_cds.store import audit

    with opened(config) as site:
        found = list(audit.entries(site.database, asked.at(site), limit=limit, newest_first=True))
        if as_json:
            return print_json([json.loads(each.line()) for each in found])
        rows = []
        for each in found:
            at, act = f"{each.at.astimezone():%Y-%m-%d %H:%M:%S}", each.act
            rows.append((each.number, at, act.kind, act.who, act.what, (act.study_ref or "")[:8]))
        return table(("number", "at", "kind", "who", "what", "study"), rows)


@audit_app.command("export")
@asked_for
def export(
    asked: Asked,
    to: Annotated[Path, typer.Argument(help="The file to write; - for standard output.")],
    config: Config = HERE,
) -> None:
    """Acts as they are hashed, oldest first, one JSON object a line. That they were read out is an act."""
    from busgen_cds.store import audit

    with opened(config) as site:
        wanted = asked.at(site)
        with site.database.transaction() as session:
            audit.record(session, audit.Act("record exported", account(), ""))
        if str(to) == "-":
            sys.stdout.writelines(each.line().decode() for each in audit.entries(site.database, wanted))
            return
        count = 0
        with to.open("xb") as file:
            for each in audit.entries(site.database, wanted):
                file.write(each.line())
                count += 1
        out.print(f"{count} acts in {to}", soft_wrap=True)


@audit_app.command("verify")
def verify(
    config: Config = HERE,
    checkpoints: Annotated[
        list[Path] | None, typer.Option(help="Checkpoints, or a folder of them; unset: the settings' folder.")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="The record's public key; unset: beside the checkpoints.")] = None,
    as_json: Json = False,
) -> None:
    """Does the chain of acts hold, and does it reach as far as its checkpoints say? Names the first bad entry."""
    from busgen_cds.store import audit
    from busgen_cds.store import checkpoints as points

    with opened(config) as site:
        held = points.read(checkpoints, key) if checkpoints else points.kept(site.settings.checkpoints, key)
        verdict = audit.verify(site.database, held)
        if as_json:
            print_json({**vars(verdict), "sound": verdict.sound})
        else:
            out.print(str(verdict), soft_wrap=True)
        if not verdict.sound:
            raise typer.Exit(1)


@audit_app.command("checkpoint")
def checkpoint(
    config: Config = HERE,
    to: Annotated[Path | None, typer.Option(help="Folder; unset: the settings' record.checkpoints.")] = None,
) -> None:
    """Write a signed statement of how far the record goes now: keep it where this machine cannot rewrite it."""
    from busgen_cds.store import checkpoints as points

    with opened(config) as site:
        folder = to or site.settings.checkpoints
        if folder is None:
            raise Misconfigured("Say where: --to FOLDER, or set record.checkpoints.")
        key = points.signer(site.settings.path(site.settings.record.key))
        out.print(f"Written: {points.export(site.database, folder, key)}", soft_wrap=True)


def _day(text: str, *, whole: bool = False) -> datetime:
    from busgen_cds.store import audit

    try:
        return audit.day(text, whole=whole)
    except (ValueError, OverflowError) as broken:
        raise Misconfigured(f"{text!r} is not a day: write 2026-01-31.") from broken


# ---- How safe is it?

MARKS = {"ok": "✓", "warn": "!", "fail": "✗"}


def rate(config: Path, as_json: bool) -> None:
    """`check --security`: each control of a running site, with what to do; ends with 1 when one fails."""
    from busgen_cds.operations import safety

    found = safety.everything(settings_file(config))
    if as_json:
        print_json([each._asdict() for each in found])
    else:
        table(("", "control", "found", "what to do"), [(MARKS[e.rating], e.control, e.found, e.do) for e in found])
    if any(each.rating == "fail" for each in found):
        raise typer.Exit(1)


# ---- Keys


@keys_app.command("rotate")
def rotate(
    config: Config = HERE,
    new: Annotated[bool, typer.Option(help="Make a new key first; --no-new goes on with a change begun.")] = True,
) -> None:
    """Change the site key while the site runs. The older key stays in use until `keys retire`."""
    from busgen_cds import app as house
    from busgen_cds.store import rotation, vault

    chosen = read_settings(config)
    source = vault.key_source(house.anchored(chosen, chosen.storage.key))
    if isinstance(source, vault.KeyFile):
        if new:
            _bring_in(source, vault.new_key())
    elif len(source.keys()) < 2:
        raise Misconfigured(
            f"{chosen.storage.key} gives one key. Let it give the new one after the older one and start every process "
            "again, one after the other; then the new one first, and start each again; then come back."
        )
    with house.opened_site(chosen) as site:
        done = rotation.rotate(site.database, site.vault, account())
    out.print(f"{done.rows} rows were brought over to the new key.", soft_wrap=True)
    if done.left:
        out.print(f"These still need the older key, so keep it: {', '.join(done.left)}.", soft_wrap=True)
    else:
        out.print("Nothing needs the older key any more, except older backups: `busgen-cds keys retire`.")


def _bring_in(source: KeyFile, key: bytes) -> None:
    """Everybody can open what is sealed under the key before anybody seals under it."""
    from busgen_cds.store.vault import LOOK_SECONDS

    for step in (source.announce, source.put_first):
        step(key)
        time.sleep(3 * LOOK_SECONDS)  # until every running process has looked


@keys_app.command("retire")
def retire(config: Config = HERE) -> None:
    """Take the older keys out of the key file, when nothing needs them any more."""
    from busgen_cds import app as house
    from busgen_cds.store import audit, rotation, vault

    chosen = read_settings(config)
    source = vault.key_source(house.anchored(chosen, chosen.storage.key))
    if not isinstance(source, vault.KeyFile):
        raise Misconfigured(f"The keys come from {chosen.storage.key}: take the older one away there.")
    with house.opened_site(chosen) as site:
        if left := rotation.left(site.database, site.vault):
            raise Misconfigured(f"The older key is still needed for {', '.join(left)}: run `busgen-cds keys rotate`.")
        gone = source.retire()
        with site.database.transaction() as session:
            audit.record(session, audit.Act("older site keys retired", account(), "", detail={"keys": gone}))
    out.print(f"{gone} older keys were taken away." if gone else "There was no older key.")


# ---- Letting go


@app.command()
def shred(
    study: Annotated[str, typer.Argument(help="Our reference of the study, or its Study Instance UID.")],
    config: Config = HERE,
    insist: Annotated[bool, typer.Option("--insist", help="Also when something of it is not delivered yet.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Let a study go for good: destroy its key, and prove that it cannot be read any more."""
    with opened(config) as site:
        ref = _study_ref(site, study)
        if not yes:
            typer.confirm(f"Shred study {ref}? No copy of it here can be read afterwards.", abort=True)
        against = _letting(site).shred(ref, account(), insist=insist)
        if against:
            out.print(f"The proof fails: {'; '.join(against)}.", soft_wrap=True)
            raise typer.Exit(1)
        out.print(f"Study {ref} is shredded: its key, images, results, objects and names are gone.", soft_wrap=True)


@app.command()
def retention(
    config: Config = HERE,
    now: Annotated[bool, typer.Option("--now", help="Apply the rules now; a running site does so every hour.")] = False,
    as_json: Json = False,
) -> None:
    """How long each kind of study is kept here, and what the rules would let go."""
    from busgen_cds.operations import housekeeping
    from busgen_cds.store.retention import overview

    with opened(config) as site:
        if now:
            done = housekeeping.let_go(site)
            return out.print(f"Let go: {len(done.studies)} studies, {len(done.quarantined)} set-aside objects.")
        rows = list(overview(site.database, housekeeping.kept_for(site.settings), datetime.now(UTC)))
        if as_json:
            return print_json([{"kind": kind, "kept": kept, "due": count} for kind, kept, count in rows])
        return table(("kind", "kept for", "to let go now"), rows)


def _study_ref(site: Site, named: str) -> str:
    from busgen_cds.store.worklist import Worklist

    with site.database.reading() as session:
        refs = list(session.execute(Worklist(site.database, site.vault).studies_of(named)).scalars())
    if len(refs) != 1:
        raise Misconfigured(f"{len(refs)} studies are named {named!r}: give the reference, from the worklist.")
    return str(refs[0])


def _letting(site: Site) -> Any:
    from busgen_cds.store.retention import Letting

    return Letting(site.inbox, site.database, site.vault)
