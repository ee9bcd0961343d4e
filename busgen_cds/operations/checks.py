"""Is everything in place at this site? Each check says what it looked at and what it found; none changes anything.

Rules:
- A node that does not answer costs a few seconds, whatever their number: all are asked at once.
- What is waited for is said while it is waited for.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from busgen_cds import app, settings
from busgen_cds.dicom import outbox
from busgen_cds.errors import Misconfigured, Transient, Untrusted
from busgen_cds.settings import Settings
from busgen_cds.store import audit, checkpoints

ECHO_SECONDS = 5.0


class Checked(NamedTuple):
    what: str
    good: bool
    found: str


def everything(file: Path, tell: Callable[[str], None] = lambda _line: None) -> list[Checked]:
    try:
        chosen = settings.read(file)
    except Misconfigured as wrong:
        return [Checked("settings", False, str(wrong))]
    return [Checked("settings", True, str(file)), *_site(chosen, tell)]


def _site(chosen: Settings, tell: Callable[[str], None]) -> Iterator[Checked]:
    yield _try("database and keys", lambda: _database(chosen))
    yield _try("record of acts", lambda: _acts(chosen))
    yield _try("disk", lambda: _disk(chosen))
    yield _try("bundle", lambda: _bundle(chosen))
    yield _try("engine", lambda: _engine(chosen))
    yield from _echoes(chosen, tell)
    if not chosen.destinations:
        yield Checked("destinations", False, "none: results stay here; add a [[destinations]] entry")


def _echoes(chosen: Settings, tell: Callable[[str], None]) -> list[Checked]:
    names = [each.name for each in chosen.nodes if not each.url]
    if not names:
        return []
    tell(f"Waiting for an echo from {', '.join(names)}: {ECHO_SECONDS:g} s at most for each step, all at once.")
    with ThreadPoolExecutor(len(names)) as asking:
        return list(asking.map(lambda name: _try(f"echo to {name}", lambda: _echo(chosen, name)), names))


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
        verdict = audit.verify(site.database, checkpoints.kept(chosen.checkpoints))
    if not verdict.sound:
        raise Untrusted(str(verdict))
    return str(verdict)


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
    node = replace(app.node(chosen, name), timeout_seconds=ECHO_SECONDS)
    return f"{node}: {1000 * outbox.echo(node):.0f} ms"
