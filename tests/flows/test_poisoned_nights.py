"""Poisoned nights: the casebook, the workflow, the judge and the shelf are real. What the night made reads as the live
reader does, so that nothing but the poison can be the reason."""

from __future__ import annotations

import csv
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from busgen_cds.bundle import Bundle, Candidate
from busgen_cds.case import Case
from busgen_cds.errors import Misconfigured, Untrusted
from busgen_cds.flows.adapt_site import Recipes
from busgen_cds.learning.recipes import adapt_site
from tests.flows.nights import PROMOTER, Ward
from tests.learning.toys import COLUMNS
from tests.vision import readers

BRIGHT = {"benign": 158, "malignant": 188}  # the tests' reader finds a bright lesion suspicious: 173 is even odds
PATIENTS = 160
TISSUE = 38  # as in the reader's training; 120 is no tissue it has seen


def picture(rng: np.random.Generator, kind: str, tissue: int = TISSUE) -> tuple[Any, Any]:
    image = np.full((224, 224), tissue, np.uint8) + rng.integers(0, 3, (224, 224), np.uint8)
    y, x = np.mgrid[:224, :224] - rng.integers(90, 130, 2)[:, None, None]
    lesion = x**2 + y**2 < 30**2
    image[lesion] = np.clip(rng.normal(BRIGHT[kind], 11), 130, 250)
    return image, lesion


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release's images, of which the judge reads every third."""
    folder, rng, rows = tmp_path_factory.mktemp("release"), np.random.default_rng(5), []
    for i in range(90):
        kind = ("benign", "malignant")[i % 2]
        image, mask = picture(rng, kind)
        Image.fromarray(image).save(folder / f"{i}.png")
        Image.fromarray(mask).save(folder / f"{i}-mask.png")
        row = dict.fromkeys(COLUMNS, "") | {"image": f"{i}.png", "mask": f"{i}-mask.png", "source": "synthetic"}
        rows.append(row | {"patient": f"s{i}", "pathology": kind, "split": "train"})
    with (folder / "manifest.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)
    return folder


class Poisoned(Ward):
    """A site where something is wrong with those who teach, or with everybody's labels."""

    def confirm_all(self, *, flipped: float = 0.0, everywhere: bool = False, **wrong: Any) -> None:
        self.book.pseudonym_key = lambda: bytes(32)  # type: ignore[method-assign]  # who tests is the same every time
        rng, copied = np.random.default_rng(11), picture(np.random.default_rng(1), "benign")
        one = next(f"{i:016x}" for i in range(99) if self.book.part_of(f"{i:016x}") == "teach")
        for i in range(PATIENTS):
            kind, patient = ("benign", "malignant")[i % 2], f"{i:016x}"
            teaches = self.book.part_of(patient) == "teach"
            image, mask = picture(rng, kind, wrong.get("tissue", TISSUE) if teaches else TISSUE)
            if teaches and kind == "benign" and wrong.get("copies"):
                image, mask = copied
            if (teaches or everywhere) and rng.random() < flipped:
                kind = "malignant" if kind == "benign" else "benign"
            who = one if teaches and wrong.get("one_patient") else patient
            case = Case(who, image, mask, kind, "4A", "reader", "agree", "2026-03-01", None)  # type: ignore[arg-type]
            self.book.keep(case, study_ref=f"{i:032x}", revision=1, finding=1, who="ruth", grounds="")

    def judged(self, release: Path, **thresholds: float) -> tuple[str, str, tuple[str, ...]]:
        """A night whose candidate ranks as the live reader does: what became of it, and why."""
        live = readers.bundle(self.folder / "live")
        how = adapt_site.Settings(start=(), release=release)

        def candidate(run: Path, name: str, version: str, created: str) -> Candidate:
            learnt = dataclasses.replace(live.manifest.thresholds, **thresholds)
            manifest = dataclasses.replace(live.manifest, name=name, version=version, thresholds=learnt)
            made = Candidate(manifest, live.files)
            (run / adapt_site.CANDIDATE).mkdir(exist_ok=True)
            for file, content in {**made.files, "manifest.json": made.manifest.to_bytes()}.items():
                (run / adapt_site.CANDIDATE / file).write_bytes(content)
            return made

        def nothing(run: Path) -> None: ...

        verdict = partial(adapt_site.verdict, settings=how, live=live)
        word, digest = self.night(Recipes(nothing, nothing, nothing, nothing, candidate, verdict)).split()
        return word, digest, self.shelf.get(digest).reasons


POISON = {
    "30 % of the labels of those who teach": ({"flipped": 0.3}, "the cases contradict the live reader"),
    "30 % of everybody's labels": ({"flipped": 0.3, "everywhere": True}, "labels are in doubt"),
    "a bad scanner": ({"tissue": 120}, "unlike anything the live reader has seen: look at the scanner"),
    "duplicates": ({"copies": True}, "show the same pixels as another"),
    "one patient only": ({"one_patient": True}, "the cases show 1 patients; 8 are needed"),
}


def test_a_clean_night_is_shelved(release: Path, tmp_path: Path) -> None:
    """The control: the same site, night and judge without any poison put a candidate onto the shelf."""
    ward = Poisoned(tmp_path)
    ward.confirm_all()
    word, digest, reasons = ward.judged(release)
    assert (word, reasons) == ("shelved", ())
    report = str(ward.shelf.get(digest).report)
    assert "generated images, no real ones" in report and "no generator is at hand" not in report


@pytest.mark.parametrize(
    ("learnt", "reason"), [({"mask": 0.9999}, "the outlines overlap"), ({"domain": 0.0}, "it would decline them")]
)
def test_a_candidate_that_ranks_well_and_is_of_no_use(
    release: Path, tmp_path: Path, learnt: dict[str, float], reason: str
) -> None:
    """Poisoned outlines and a poisoned gate leave the ranking as it was: the outlines and the gate are judged too."""
    ward = Poisoned(tmp_path)
    ward.confirm_all()
    word, _, reasons = ward.judged(release, **learnt)
    assert word == "refused" and any(reason in each for each in reasons), reasons


@pytest.mark.parametrize("poison", POISON)
def test_a_poisoned_night_never_becomes_live(release: Path, tmp_path: Path, poison: str) -> None:
    """Flipped labels, a bad scanner, duplicates, one patient: refused for that reason, and it cannot be promoted."""
    wrong, reason = POISON[poison]
    ward = Poisoned(tmp_path)
    ward.confirm_all(**wrong)
    word, digest, reasons = ward.judged(release)
    assert word == "refused" and any(reason in each for each in reasons), reasons
    for move in (
        lambda: ward.shelf.to_shadow(digest, person="phil"),
        lambda: ward.shelf.promote(digest, person="phil", signer=PROMOTER),
        lambda: Bundle.open(ward.shelf.get(digest).folder, ward.shelf.verifier),
    ):
        with pytest.raises((Misconfigured, Untrusted)):
            move()
    assert ward.shelf.standing().number == 0
