"""Builds the site's own loop from settings: where cases are made, and what a night's run is made of.

Rules:
- A clinic without the training packages makes and lists cases; only adapting asks for them, and says so.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from busgen_cds.app import Site
from busgen_cds.flows import confirm_case
from busgen_cds.store.casebook import Casebook, Listed
from busgen_cds.store.cases import Cases, Word

log = logging.getLogger("busgen_cds.learning_loop")

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
