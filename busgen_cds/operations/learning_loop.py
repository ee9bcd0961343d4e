"""Builds the site's own loop from settings: where cases are made, and what a night's run is made of.

Rules:
- A clinic without the training packages makes and lists cases; only adapting asks for them, and says so.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from busgen_cds import app, parcel, signing
from busgen_cds.app import Site
from busgen_cds.bundle import Candidate
from busgen_cds.errors import Misconfigured
from busgen_cds.flows import adapt_site, confirm_case
from busgen_cds.store.casebook import Casebook, Listed
from busgen_cds.store.cases import Cases, Word

if TYPE_CHECKING:
    from busgen_cds.learning.recipes import adapt_site as recipe

log = logging.getLogger("busgen_cds.operations.learning_loop")

SOURCE = "site"
STRANGERS = 20  # patients whom a site's generator never meets, for its privacy audit
RELEASE_SET = "busgen-release-set.parcel"
COLUMNS = (
    *("image", "mask", "source", "patient", "pathology", "birads", "histology"),
    *("device", "view", "doppler", "marks", "split", "note"),
)


def casebook(site: Site) -> Casebook:
    return Casebook(site.database, site.vault)


def case_stations(site: Site) -> confirm_case.Stations:
    return confirm_case.Stations(site.inbox, site.results, Cases(site.database, site.vault), casebook(site))


def confirm(site: Site, word: Word, findings: int) -> bool:
    """Keep a reader's word, and make the case that follows; what cannot be made now is made by the next look."""
    stations = case_stations(site)
    new = stations.words.say(word, findings=findings)
    if new:
        try:
            confirm_case.of_study(stations, word.study_ref)
        except Exception as error:  # noqa: BLE001 - the word is kept: `gather` makes the case later
            log.warning("Study %s: no case was made yet (%s).", word.study_ref, type(error).__name__)
    return new


def write_cases(book: Casebook, cases: Sequence[Listed], folder: Path) -> Path:
    """De-identified cases as a manifest that training reads; the test patients' are marked as held out."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    rows = [_written(book, each, folder) for each in cases]
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, restval="")
        table.writeheader()
        table.writerows(rows)
    return folder


def _written(book: Casebook, listed: Listed, folder: Path) -> dict[str, str]:
    case, name = book.open(listed.ref), listed.ref
    mask = case.mask if case.mask is not None and case.mask.any() else None  # one beside the region is none
    Image.fromarray(case.tissue).save(folder / f"{name}.png")
    if mask is not None:
        Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).save(folder / f"{name}-mask.png")
    return {
        "image": f"{name}.png",
        "mask": f"{name}-mask.png" if mask is not None else "",
        "source": SOURCE,
        "patient": case.patient_hash,
        "pathology": case.pathology,
        "birads": (case.birads or "")[:1],
        "device": case.device,
        "split": "train" if listed.part == "teach" else "site-test",
    }


# ---- A night


@contextmanager
def night(site: Site) -> Iterator[None]:
    """The engine of nights in this process, modest towards whoever reads studies."""
    chosen = site.settings.adaptation
    stations = night_stations(site)
    adapt_site.be_modest(chosen.niceness)
    adapt_site.launch(stations, app.workflows_url(site.settings))
    try:
        yield
    finally:
        adapt_site.end()


def night_stations(site: Site) -> adapt_site.Stations:
    chosen = site.settings
    how = _laboratory_settings(site)
    _check_starts(site, how)
    return adapt_site.Stations(
        cases=case_stations(site),
        shelf=site.shelf,
        signer=app.night_signer(chosen),
        folder=chosen.path(chosen.storage.folder) / "nights",
        write_cases=write_cases,
        recipes=recipes(site, how),
        least_new=chosen.adaptation.least_new,
        name="site-reader",
        least_new_asked=chosen.adaptation.least_new_asked,
        asked=lambda: asked(site, site.shelf.live().digest),
    )


def _check_starts(site: Site, how: recipe.Settings) -> None:
    """What would end a night after hours ends it before it begins."""
    from busgen_cds.learning.recipes import adapt_site as recipe

    recipe.check_starts(how, site.shelf.live())


def recipes(site: Site, how: recipe.Settings) -> adapt_site.Recipes:
    """The laboratory's stages, as the workflow calls them."""
    from busgen_cds.learning.recipes import adapt_site as recipe

    def trained(run: Path) -> None:
        recipe.train(run, how, site.shelf.live())

    def made(run: Path, name: str, version: str, on: str) -> Candidate:
        return recipe.candidate_of(how, site.shelf.live(), run, name, version, on)

    def judged(run: Path) -> adapt_site.Judged:
        return recipe.verdict(run, how, site.shelf.live())

    return adapt_site.Recipes(
        adapter=partial(recipe.adapt_generator, settings=how),
        images=partial(recipe.generate, settings=how),
        privacy=partial(recipe.audit_privacy, settings=how),
        members=trained,
        candidate=made,
        verdict=judged,
    )


def lacking(site: Site) -> list[str]:
    """What the next candidate would be refused for, or made without, as far as the cases' counts tell it before."""
    said, kept = site.settings.adaptation, casebook(site).listing()
    parts = {part: {each.patient for each in kept if each.part == part} for part in ("teach", "test")}
    cancers = {each.patient for each in kept if each.pathology == "malignant"}
    with_, without = len(parts["test"] & cancers), len(parts["test"] - cancers)
    lesions = {each.patient for each in kept if each.part == "teach" and each.pathology != "normal"}
    found = []
    if len(parts["teach"]) < said.rules.teachers:
        found.append(f"{len(parts['teach'])} patients teach; {said.rules.teachers} are needed")
    if min(with_, without) < said.rules.test_patients:
        found.append(
            f"{with_} test patients have a cancer and {without} have none; the judge takes {said.rules.test_patients}"
            " of each (3 patients in 10 test)"
        )
    if said.generator and not said.replay:
        found.append("a generator is named, but adaptation.replay gives its images no share: it is not adapted")
    elif said.generator and len(lesions) // 2 < STRANGERS:
        found.append(
            f"{len(lesions)} teaching patients have a lesion; the generator is adapted from {2 * STRANGERS} on, so that"
            " half of them can be held back for its privacy audit"
        )
    return found


def asked(site: Site, live: str) -> str:
    """The drift alarm of the live bundle that asks for adaptation, in words; empty: none does."""
    learnt = casebook(site).learnt()
    alarm = site.drift.asked(live, learnt.began_at if learnt else None)
    if alarm is None:
        return ""
    return f"drift of the {alarm.figure} of {alarm.device or 'all devices'} in the week of {alarm.week}"


def wish(site: Site, live: str) -> str:
    """The same, with what a night still needs."""
    why = asked(site, live)
    if not why:
        return ""
    said, new = site.settings.adaptation, len(casebook(site).new())
    enough = min(said.least_new, said.least_new_asked)
    return f"Adaptation is asked for by {why}: {new} new cases teach, {enough} are enough."


def release_set(site: Site) -> tuple[Path, str]:
    """The release's generated images: those of the settings, else those that came with the package, verified; and
    what the judge's report calls them."""
    if chosen := site.settings.adaptation.release:
        return site.settings.path(chosen), "adaptation.release of the settings"
    shipped = Path(str(resources.files("busgen_cds") / "release_set" / RELEASE_SET))
    folder = site.settings.path(site.settings.storage.folder) / "release-set"
    said = parcel.unpacked(shipped, folder, app.release_verifier())
    return folder, f"{said.name} {said.version} of the package, {signing.digest(shipped.read_bytes())[:16]}"


def _laboratory_settings(site: Site) -> recipe.Settings:
    try:
        from busgen_cds.learning import judge
        from busgen_cds.learning.recipes import adapt_reader
        from busgen_cds.learning.recipes import adapt_site as recipe
    except ModuleNotFoundError as missing:
        raise Misconfigured(
            f"Adapting needs the training packages ({missing.name} is missing): install busgen-cds[train], "
            "or run `busgen-cds adapt` on a machine that has them."
        ) from missing
    chosen, path = site.settings.adaptation, site.settings.path
    if not chosen.start:
        raise Misconfigured("Set adaptation.start to the checkpoints of the release's reader: nights begin from them.")
    for name in ("release", "data", "generator", "encoder"):
        if (said := getattr(chosen, name)) and not path(said).exists():
            raise Misconfigured(f"adaptation.{name}: {path(said)} is not there.")
    release, named = release_set(site)
    reader = adapt_reader.Settings(
        method=chosen.method, steps=chosen.steps, kept=chosen.kept, threads=chosen.threads, generated=chosen.replay
    )
    return recipe.Settings(
        start=tuple(path(each) for each in chosen.start),
        release=release,
        release_name=named,
        data=path(chosen.data) if chosen.data else None,
        generator=path(chosen.generator) if chosen.generator else None,
        init=path(chosen.encoder) if chosen.encoder else None,
        reader=reader,
        generated=chosen.generated,
        strangers=STRANGERS,
        rules=judge.Rules(**chosen.rules.model_dump()),
        threads=chosen.threads,
    )
