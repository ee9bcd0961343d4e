"""The real stages of a night at a size of seconds: what they leave, and that they repeat."""

from __future__ import annotations

import csv
import dataclasses
import shutil
from datetime import date
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image

from busgen_cds import bundle, signing
from busgen_cds.bundle import Bundle
from busgen_cds.errors import Misconfigured
from busgen_cds.learning import data
from busgen_cds.learning.reader import Reader, Shape
from busgen_cds.learning.recipes import adapt_reader, adapt_site, audit, fewshot, make_bundle, synthesise, train_reader
from tests.learning import generators, toys

SMALL = Shape(width=16)
KEY = signing.KeySigner(Ed25519PrivateKey.from_private_bytes(bytes(32)))
TRUST = signing.Verifier.of((KEY.key.public_key(), frozenset({bundle.KIND})))


def cases(folder: Path, patients: int = 24) -> Path:
    """A run's cases: two images of each patient, a third of the patients held for the judge."""
    (folder / "cases").mkdir(parents=True)
    rows = []
    for i in range(2 * patients):
        kind = ("benign", "malignant")[i // 2 % 2]
        image, mask = toys.picture(kind, 100 + i)
        test = i // 2 % 3 == 2
        Image.fromarray(image).save(folder / f"cases/{i}.png")
        Image.fromarray(mask).save(folder / f"cases/{i}-mask.png")
        row = dict.fromkeys(toys.COLUMNS, "")
        row |= {"image": f"{i}.png", "mask": f"{i}-mask.png", "source": "site", "patient": f"h{i // 2:04x}"}
        rows.append(row | {"pathology": kind, "device": "A", "split": "site-test" if test else "train"})
    with (folder / "cases/manifest.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, toys.COLUMNS)
        table.writeheader()
        table.writerows(rows)
    return folder


@pytest.fixture(scope="module")
def how(tmp_path_factory: pytest.TempPathFactory) -> adapt_site.Settings:
    """A member to go on from, and the release's images."""
    folder = tmp_path_factory.mktemp("release")
    rows = [r | {"source": "synthetic", "split": "train"} for r in toys.records(24) if r["pathology"] != "normal"]
    torch.manual_seed(0)
    starts = tuple(folder / f"start-{k}.safetensors" for k in range(2))
    notes = {"settings": train_reader.describe(train_reader.Settings(shape=SMALL, sources=("synthetic",))), "step": 0}
    for start in starts:
        adapt_reader.write_member(start, Reader(SMALL).state_dict(), notes)
    return adapt_site.Settings(
        start=starts,
        release=toys.write(folder / "release", rows),
        reader=adapt_reader.Settings(steps=3, batch=4, size=64, rate=1e-4),
        sweeps=10,
        sweep_frames=2,
    )


@pytest.fixture(scope="module")
def bench(how: adapt_site.Settings, tmp_path_factory: pytest.TempPathFactory) -> tuple[adapt_site.Settings, Bundle]:
    """The same, and a live bundle made of both: its second member judges, and does not draw."""
    folder = tmp_path_factory.mktemp("bench")
    root = adapt_site.assemble(cases(folder / "live"), how)
    members = [
        adapt_reader.adapt(start, root, ("site",), folder / str(k), how.reader, root / "replay")
        for k, start in enumerate(how.start)
    ]
    choice = make_bundle.Choice("live", "1", date(2026, 1, 1), False, drawing=1, sweeps=10, sweep_frames=2, threads=1)
    make_bundle.make(root, members, choice).seal(folder / "bundle", KEY)
    return how, Bundle.open(folder / "bundle", TRUST)


@pytest.mark.slow
@pytest.mark.timeout(900)  # three exports to ONNX, a minute of processor time: much more on a busy machine
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
        adapt_site.train(run, settings, live)
        if name == "two":  # killed within the candidate's making, and taken up again
            (run / "candidate.partial").mkdir()
        made = adapt_site.candidate_of(settings, live, run, "site-reader", "1", "2026-01-02")
        digests.append(made.digest)
        assert adapt_site.candidate_of(settings, live, run, "site-reader", "1", "2026-01-02").digest == digests[-1]
    assert digests[0] == digests[1]
    assert (made.manifest.settings["drawing"], made.manifest.settings["mirrored"]) == (1, False)  # as the live one
    found = adapt_site.verdict(run, settings, live)
    assert [t["title"] for t in found.tables][-2:] == ["The release set", "The generator"]
    assert any("images (malignant)" in row[0] for table in found.tables for row in table["rows"])
    assert adapt_site.verdict(run, settings, live).reasons == found.reasons  # judged once


@pytest.mark.slow
def test_a_night_never_changes_how_many_members_read(bench: tuple[adapt_site.Settings, Bundle], tmp_path: Path) -> None:
    """Where a checkpoint of the live reader was left out of the settings, the night says so before it learns."""
    settings, live = bench
    one = dataclasses.replace(settings, start=settings.start[:1])
    with pytest.raises(
        Misconfigured, match=r"adaptation\.start names 1 checkpoints, and the live reader has 2 members"
    ):
        adapt_site.train(cases(tmp_path / "run"), one, live)


def test_what_judges_never_teaches(how: adapt_site.Settings, tmp_path: Path) -> None:
    """The site's test patients and the judging part of the release are in no lesson."""
    run = cases(tmp_path / "run")
    plain = dataclasses.replace(how, reader=dataclasses.replace(how.reader, generated=0.0))
    assert "release" not in (adapt_site.assemble(run, plain) / "manifest.csv").read_text()  # without a share: none
    shutil.rmtree(run / "lessons")
    root = adapt_site.assemble(run, how)
    lessons = (root / "manifest.csv").read_text() + (root / "replay/manifest.csv").read_text()
    with (run / "cases/manifest.csv").open() as file:
        held = [row["image"] for row in csv.DictReader(file) if row["split"] == "site-test"]
    assert held and not any(f"cases/{name}," in lessons for name in held)
    assert how.release is not None
    judging = [images for _, images in adapt_site._release_sets(how)]
    assert judging and not any(f"release/{row.image}," in lessons for images in judging for row in images.rows)


def test_a_person_under_two_ids_does_not_teach_and_judge(how: adapt_site.Settings, tmp_path: Path) -> None:
    """A teaching patient who shows a test patient's very image is that patient: none of their images teaches."""
    run = cases(tmp_path / "run")
    rows = data.read_manifest(run / "cases")
    tests, teaches = (next(r for r in rows if r.split == split) for split in ("site-test", "train"))
    shutil.copy(run / "cases" / tests.image, run / "cases" / teaches.image)
    named = (adapt_site.assemble(run, how) / "manifest.csv").read_text()
    assert teaches.patient not in named and sum(r.patient == teaches.patient for r in rows) == 2
    teaching, left_out = adapt_site.teachers(run)
    assert {r.patient for r in left_out} == {teaches.patient} and len(left_out) == 2 and teaching
    assert "2 cases of 1" in str(adapt_site._left_out(run))


@pytest.fixture
def with_generator(how: adapt_site.Settings, tmp_path: Path) -> adapt_site.Settings:
    """The same site with a tiny generator; a few strangers are enough, so that it takes seconds."""
    generators.tiny().save(tmp_path / "generator")
    return dataclasses.replace(
        how,
        generator=tmp_path / "generator",
        generated=6,
        strangers=4,
        adapter=fewshot.Settings(steps=2, views=2, batch=4, report_every=1),
        audit=audit.Settings(control_steps=2, control_members=4, control_images=4, batch=4),
    )


@pytest.mark.slow
def test_generated_images_that_are_not_clean_teach_nobody(with_generator: adapt_site.Settings, tmp_path: Path) -> None:
    """LoRA, images and audit: without a clean report the images are gone before a reader is trained."""
    run = cases(tmp_path / "run")
    assert adapt_site.adapt_generator(run, with_generator) == "" and (run / "adapter" / fewshot.CARD).exists()
    adapt_site.generate(run, with_generator)
    assert len(synthesise.read_images(run / "images", 64)[1]) == 6
    assert adapt_site._unclean(run) == "the generated images were not audited"
    (run / "privacy.json").write_text('{"findings": []}')
    assert adapt_site._unclean(run) == "the privacy audit looked at nothing"
    (run / "privacy.json").write_text('{"findings": [{"attack": "copies", "verdict": "passes"}]}')
    assert adapt_site.audit_privacy(run, with_generator) == ""
    clean = adapt_site.assemble(run, with_generator) / "replay/manifest.csv"
    assert "shard-00000" in clean.read_text()
    shutil.rmtree(run / "lessons")
    (run / "privacy.json").unlink()
    said = adapt_site.audit_privacy(run, with_generator)
    assert "took no part: the privacy audit" in said
    assert not (run / "images").exists() and not (run / "adapter").exists()
    assert "shard-00000" not in (adapt_site.assemble(run, with_generator) / "replay/manifest.csv").read_text()
    assert adapt_site.audit_privacy(run, with_generator) == ""  # taken up again, it has nothing to audit


def test_the_audit_always_has_strangers(with_generator: adapt_site.Settings, tmp_path: Path) -> None:
    """Half of the teaching patients are kept from the generator, all who calibrate among them; too few: it waits."""
    run = cases(tmp_path / "run")
    shots, strangers = ({row.patient for row in side} for side in adapt_site._sides(run))
    assert len(strangers) >= 4 and not shots & strangers
    lessons = adapt_site.assemble(run, with_generator)
    calibrating = {r.patient for r in data.read_manifest(lessons) if r.split == "val" and r.patient.startswith("h")}
    assert calibrating and calibrating <= strangers
    few = cases(tmp_path / "few", patients=6)
    assert "can be held back from it" in adapt_site.adapt_generator(few, with_generator)
    assert not (few / "adapter").exists() and adapt_site.generate(few, with_generator) == ""


def test_a_site_that_shows_one_class_adapts_no_generator(with_generator: adapt_site.Settings, tmp_path: Path) -> None:
    """Benign lesions alone teach no malignant one: the generator is left out with a reason, and the night goes on."""
    run = cases(tmp_path / "run")
    rows = [r.labels | {"pathology": "benign"} for r in data.read_manifest(run / "cases")]
    adapt_site._manifest(run / "cases", rows)
    assert "shows the class malignant" in adapt_site.adapt_generator(run, with_generator)
    assert adapt_site.generate(run, with_generator) == adapt_site.audit_privacy(run, with_generator) == ""
    assert adapt_site.assemble(run, with_generator)


@pytest.mark.slow
def test_images_are_asked_for_of_devices_that_a_shot_showed(
    with_generator: adapt_site.Settings, tmp_path: Path
) -> None:
    """A scanner of which only patients held back were seen is unknown to the adapter: no image is asked of it."""
    run = cases(tmp_path / "run")
    shots = {row.image for row in adapt_site._sides(run)[0]}
    rows = [r.labels | {"device": "A" if r.image in shots else "new"} for r in data.read_manifest(run / "cases")]
    adapt_site._manifest(run / "cases", rows)
    assert adapt_site.adapt_generator(run, with_generator) == ""
    adapt_site.generate(run, with_generator)
    assert {row.labels["device"] for row in data.read_manifest(run / "images")} == {"A"}


def test_a_night_keeps_to_its_threads(with_generator: adapt_site.Settings, tmp_path: Path) -> None:
    """The generator's stages, too, leave the other cores to whoever reads studies."""
    torch.set_num_threads(2)
    run = cases(tmp_path / "run")
    adapt_site.adapt_generator(run, with_generator)
    assert torch.get_num_threads() == with_generator.threads == 1
