"""The real stages of a night at a size of seconds: what they leave, that they repeat, and that poison is refused."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image

from busgen_cds import bundle, signing
from busgen_cds.bundle import Bundle
from busgen_cds.learning.reader import Reader, Shape
from busgen_cds.learning.recipes import adapt_reader, adapt_site, audit, fewshot, synthesise, train_reader
from tests.learning import generators, toys

SMALL = Shape(width=16)
KEY = signing.KeySigner(Ed25519PrivateKey.from_private_bytes(bytes(32)))
TRUST = signing.Verifier.of((KEY.key.public_key(), frozenset({bundle.KIND})))


def cases(folder: Path, patients: int = 24, flipped: float = 0.0, noise: bool = False, copies: int = 0) -> Path:
    """A run's cases: two images of each patient, a third of the patients held for the judge."""
    (folder / "cases").mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for i in range(2 * patients):
        kind = ("benign", "malignant")[i // 2 % 2]
        image, mask = toys.picture(kind, 3 if i < copies else 100 + i)
        image = rng.integers(0, 255, image.shape, np.uint8) if noise else image
        test = i // 2 % 3 == 2
        told = kind if test or rng.random() >= flipped else ("malignant" if kind == "benign" else "benign")
        Image.fromarray(image).save(folder / f"cases/{i}.png")
        Image.fromarray(mask).save(folder / f"cases/{i}-mask.png")
        row = dict.fromkeys(toys.COLUMNS, "")
        row |= {"image": f"{i}.png", "mask": f"{i}-mask.png", "source": "site", "patient": f"h{i // 2:04x}"}
        rows.append(row | {"pathology": told, "device": "A", "split": "site-test" if test else "train"})
    with (folder / "cases/manifest.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, toys.COLUMNS)
        table.writeheader()
        table.writerows(rows)
    return folder


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> tuple[adapt_site.Settings, Bundle]:
    """A member that has learnt the toys, the release's images, and the live bundle made of both."""
    folder = tmp_path_factory.mktemp("bench")
    rows = [r | {"source": "synthetic", "split": "train"} for r in toys.records(24) if r["pathology"] != "normal"]
    release = toys.write(folder / "release", rows)
    torch.manual_seed(0)
    start = folder / "start.safetensors"
    notes = {"settings": train_reader.describe(train_reader.Settings(shape=SMALL, sources=("synthetic",))), "step": 0}
    adapt_reader.write_member(start, Reader(SMALL).state_dict(), notes)
    settings = adapt_site.Settings(
        start=(start,),
        release=release,
        reader=adapt_reader.Settings(steps=3, batch=4, size=64, rate=1e-4),
        sweeps=10,
        sweep_frames=2,
    )
    run = cases(folder / "live")
    adapt_site.train(run, settings)
    made = adapt_site.candidate_of(settings, run, "live", "1", "2026-01-01")
    made.seal(folder / "bundle", KEY)
    return settings, Bundle.open(folder / "bundle", TRUST)


@pytest.mark.slow
def test_a_night_ends_with_a_verdict_and_repeats_to_the_same_digest(
    bench: tuple[adapt_site.Settings, Bundle], tmp_path: Path
) -> None:
    """The same cases give the same candidate, also when members and candidate are made again from a cut-off start."""
    settings, live = bench
    digests = []
    for name in ("one", "two"):
        run = cases(tmp_path / name)
        assert "no generator" in adapt_site.adapt_generator(run, settings)
        assert adapt_site.generate(run, settings) == adapt_site.audit_privacy(run, settings) == ""
        adapt_site.train(run, settings)
        if name == "two":  # killed within the candidate's making, and taken up again
            (run / "candidate.partial").mkdir()
        digests.append(adapt_site.candidate_of(settings, run, "site-reader", "1", "2026-01-02").digest)
        assert adapt_site.candidate_of(settings, run, "site-reader", "1", "2026-01-02").digest == digests[-1]
    assert digests[0] == digests[1]
    found = adapt_site.verdict(run, settings, live)
    assert [t["title"] for t in found.tables][-1] == "The generator"
    assert any("images (malignant)" in row[0] for table in found.tables for row in table["rows"])
    assert adapt_site.verdict(run, settings, live).reasons == found.reasons  # judged once


@pytest.mark.slow
@pytest.mark.parametrize(
    ("poison", "reason"),
    [({"copies": 20}, "same pixels as another"), ({"patients": 3}, "patients; 8 are needed"), ({"noise": True}, "")],
)
def test_a_poisoned_night_is_refused_by_what_its_files_show(
    bench: tuple[adapt_site.Settings, Bundle], tmp_path: Path, poison: dict[str, int], reason: str
) -> None:
    """Duplicates, too few patients and a broken scanner are seen in the cases themselves; none reaches the shelf."""
    settings, live = bench
    run = cases(tmp_path / "run", **poison)  # type: ignore[arg-type]
    adapt_site.train(run, settings)
    adapt_site.candidate_of(settings, run, "site-reader", "1", "2026-01-02")
    found = adapt_site.verdict(run, settings, live)
    assert not found.accepted and reason in " | ".join(found.reasons)


def test_what_judges_never_teaches(bench: tuple[adapt_site.Settings, Bundle], tmp_path: Path) -> None:
    """The site's test patients and the judging part of the release are in no lesson."""
    settings, _ = bench
    run = cases(tmp_path / "run")
    root = adapt_site.assemble(run, settings)
    lessons = (root / "manifest.csv").read_text() + (root / "replay/manifest.csv").read_text()
    with (run / "cases/manifest.csv").open() as file:
        held = [row["image"] for row in csv.DictReader(file) if row["split"] == "site-test"]
    assert held and not any(f"cases/{name}," in lessons for name in held)
    assert settings.release is not None
    judging = [images for _, images in adapt_site._release_sets(settings)]
    assert judging and not any(f"release/{row.image}," in lessons for images in judging for row in images.rows)


@pytest.mark.slow
def test_a_site_with_a_generator_adapts_it_and_audits_it(
    bench: tuple[adapt_site.Settings, Bundle], tmp_path: Path
) -> None:
    """LoRA, images and privacy report: too few images conclude nothing, and that is no clean report."""
    settings, _ = bench
    generators.tiny().save(tmp_path / "generator")
    small = dataclasses.replace(
        settings,
        generator=tmp_path / "generator",
        generated=6,
        adapter=fewshot.Settings(steps=2, views=2, batch=4, report_every=1),
        audit=audit.Settings(control_steps=2, control_members=4, control_images=4, batch=4),
    )
    run = cases(tmp_path / "run")
    assert adapt_site.adapt_generator(run, small) == "" and (run / "adapter" / fewshot.CARD).exists()
    adapt_site.generate(run, small)
    assert len(synthesise.read_images(run / "images", 64)[1]) == 6
    assert "concludes nothing" in adapt_site.audit_privacy(run, small)
    lessons = adapt_site.assemble(run, small)
    assert "shard-00000" in (lessons / "replay/manifest.csv").read_text()
