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

from busgen_cds import app
from busgen_cds.app import Site
from busgen_cds.errors import Misconfigured
from busgen_cds.flows import adapt_site, confirm_case
from busgen_cds.store.casebook import Casebook, Listed
from busgen_cds.store.cases import Cases, Word

if TYPE_CHECKING:
    from busgen_cds.learning.recipes import adapt_site as recipe

log = logging.getLogger("busgen_cds.operations.learning_loop")

SOURCE = "site"
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
    Image.fromarray(case.tissue).save(folder / f"{name}.png")
    if case.mask is not None:
        Image.fromarray(np.where(case.mask, 255, 0).astype(np.uint8)).save(folder / f"{name}-mask.png")
    return {
        "image": f"{name}.png",
        "mask": f"{name}-mask.png" if case.mask is not None else "",
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
    return adapt_site.Stations(
        cases=case_stations(site),
        shelf=site.shelf,
        signer=app.night_signer(chosen),
        folder=chosen.path(chosen.storage.folder) / "nights",
        write_cases=write_cases,
        recipes=recipes(site, how),
        least_new=chosen.adaptation.least_new,
        name="site-reader",
    )


def recipes(site: Site, how: recipe.Settings) -> adapt_site.Recipes:
    """The laboratory's stages, as the workflow calls them."""
    from busgen_cds.learning.recipes import adapt_site as recipe

    def judged(run: Path) -> adapt_site.Judged:
        return recipe.verdict(run, how, site.shelf.live())

    return adapt_site.Recipes(
        adapter=partial(recipe.adapt_generator, settings=how),
        images=partial(recipe.generate, settings=how),
        privacy=partial(recipe.audit_privacy, settings=how),
        members=partial(recipe.train, settings=how),
        candidate=partial(recipe.candidate_of, how),
        verdict=judged,
    )


def release_images() -> Path | None:
    """The generated images that came with the package, if any did."""
    folder = Path(str(resources.files("busgen_cds") / "release_set"))
    return folder if (folder / "manifest.csv").exists() else None


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
    release, data = path(chosen.release) if chosen.release else release_images(), chosen.data
    if release is None and data is None:
        raise Misconfigured("Set adaptation.release or adaptation.data: without a release set nothing can be judged.")
    reader = adapt_reader.Settings(method=chosen.method, steps=chosen.steps, kept=chosen.kept, threads=chosen.threads)
    return recipe.Settings(
        start=tuple(path(each) for each in chosen.start),
        release=release,
        data=path(data) if data else None,
        generator=path(chosen.generator) if chosen.generator else None,
        init=path(chosen.encoder) if chosen.encoder else None,
        reader=reader,
        generated=chosen.generated,
        rules=judge.Rules(**chosen.rules.model_dump()),
        threads=chosen.threads,
    )
