"""Is everything in place at this site? Each check says what it looked at and what it found; none changes anything."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from busgen_cds import app, settings
from busgen_cds.dicom import outbox
from busgen_cds.errors import Misconfigured, Transient, Untrusted
from busgen_cds.settings import Settings
from busgen_cds.store import audit


class Checked(NamedTuple):
    what: str
    good: bool
    found: str


def everything(file: Path) -> list[Checked]:
    try:
        chosen = settings.read(file)
    except Misconfigured as wrong:
        return [Checked("settings", False, str(wrong))]
    return [Checked("settings", True, str(file)), *_site(chosen)]


def _site(chosen: Settings) -> Iterator[Checked]:
    yield _try("database and keys", lambda: _database(chosen))
    yield _try("record of acts", lambda: _acts(chosen))
    yield _try("disk", lambda: _disk(chosen))
    yield _try("bundle", lambda: _bundle(chosen))
    yield _try("engine", lambda: _engine(chosen))
    for each in chosen.nodes:
        if not each.url:
            yield _try(f"echo to {each.name}", lambda name=each.name: _echo(chosen, name))  # type: ignore[misc]
    if not chosen.destinations:
        yield Checked("destinations", False, "none: results stay here; add a [[destinations]] entry")


def _try(what: str, look: Callable[[], str]) -> Checked:
    try:
        return Checked(what, True, look())
    except (Misconfigured, Transient, Untrusted, OSError) as wrong:
        return Checked(what, False, str(wrong))


def _database(chosen: Settings) -> str:
    with app.opened_site(chosen) as site:
        return f"{site.database.url.get_backend_name()}, {len(site.inbox.studies())} studies"


def _acts(chosen: Settings) -> str:
    with app.opened_site(chosen) as site:
        verdict = audit.verify(site.database)
    if not verdict.sound:
        raise Untrusted(str(verdict))
    return "the chain holds"


def _disk(chosen: Settings) -> str:
    free = shutil.disk_usage(chosen.path(chosen.storage.folder)).free
    least = chosen.listener.free_bytes
    said = f"{free / 1e9:.1f} GB free; senders are told to wait below {least / 1e9:.1f} GB"
    if free < least:
        raise Misconfigured(said)
    return said


def _bundle(chosen: Settings) -> str:
    with app.opened_site(chosen) as site:
        opened, number = site.shelf.live(), site.shelf.standing().number
    stated, here = opened.manifest.calibration.prevalence, chosen.site.prevalence
    since = f"statement {number}" if number else "came with the product"
    name = f"{opened.name.name} {opened.name.version} ({since})"
    return f"{name}, calibrated at {stated:.0%} cancers, this site states {here:.1%}"


def _engine(chosen: Settings) -> str:
    with app.opened_site(chosen) as site, app.live_engine(site) as reader:
        return f"{reader.engine.provider}, {chosen.reader.device} asked for"


def _echo(chosen: Settings, name: str) -> str:
    node = app.node(chosen, name)
    return f"{node}: {1000 * outbox.echo(node):.0f} ms"
