"""Generating at length, releasing, and sharing."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from PIL import Image
from typer.testing import CliRunner

from busgen_cds import cli, signing
from busgen_cds.errors import Misconfigured, Untrusted
from busgen_cds.learning import conditions, data, embed, privacy, release
from busgen_cds.learning.figures import Interval
from busgen_cds.learning.generator import Generator, Sample, Sampling, Wish
from busgen_cds.learning.recipes import audit, encode, share, synthesise
from busgen_cds.learning.recipes.synthesise import Settings
from tests.learning.generators import SIZE, data_folder, tiny

SIX = Settings(count=6, shard=4, batch=4, filtered=False, sampling=Sampling(steps=2))
NOTHING = release.Filter(*(np.zeros(shape, np.float32) for shape in ((512,), (512, 1), (1, 1))), 0.0)  # is too near
MANNER = {"in_healthy": False, "sampling": dataclasses.asdict(SIX.sampling)}
TERMS = share.Terms("test-package", "1", "a test", "2026-01-01")


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("six")
    assert synthesise.generate(tiny(), out, SIX, None) == (6, 6, 0)
    return out


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("released")
    synthesise.generate(tiny(), out, dataclasses.replace(SIX, filtered=True), NOTHING)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Generating


def test_generated_images_are_a_manifest_that_trains(six: Path) -> None:
    """What comes out is read by the reader's own loader: images, masks, labels, nobody's patient."""
    rows = data.read_manifest(six)
    assert len(rows) == 6 and {row.source for row in rows} == {"synthetic"} and len({r.patient for r in rows}) == 6
    assert {row.pathology for row in rows} <= {"benign", "malignant"}
    assert len(data.load(six, rows, None, SIZE)) == 6


def test_a_stopped_run_goes_on_to_the_same_images(six: Path, tmp_path: Path) -> None:
    """Stopped after its first shard and called again, a run makes what is missing, and the same bytes."""

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesise.generate(tiny(), tmp_path, SIX, None, stop)
    assert not (tmp_path / data.MANIFEST).exists()
    (tmp_path / "shard-00001.partial").mkdir()  # what a kill in the middle of a shard leaves
    synthesise.generate(tiny(), tmp_path, SIX, None)
    assert contents(tmp_path) == contents(six)


def test_a_folder_answers_one_question(six: Path) -> None:
    """Images that were asked for otherwise are not mixed into a folder."""
    with pytest.raises(Misconfigured, match="asked for otherwise"):
        synthesise.generate(tiny(), six, Settings(**{**vars(SIX), "seed": 5}), None)


def test_a_run_that_is_asked_for_more_has_them_all(six: Path, tmp_path: Path) -> None:
    """Three images, then six in the same folder: the shard that ended early is filled, not taken for full."""
    synthesise.generate(tiny(), tmp_path, dataclasses.replace(SIX, count=3), None)
    assert synthesise.generate(tiny(), tmp_path, SIX, None).released == 6
    assert [row.image for row in data.read_manifest(tmp_path)] == [row.image for row in data.read_manifest(six)]


def test_a_folder_holds_one_generator_s_images(six: Path, tmp_path: Path) -> None:
    """A run is not gone on with by another generator; a folder from before its name was kept is."""
    folder = shutil.copytree(six, tmp_path / "six")
    with pytest.raises(Misconfigured, match="another generator"):
        synthesise.generate(tiny(seed=1), folder, SIX, None)
    question = json.loads((folder / synthesise.QUESTION).read_text())
    del question["generator"]
    (folder / synthesise.QUESTION).write_text(json.dumps(question))
    assert synthesise.generate(tiny(), folder, SIX, None).released == 6


def test_a_lesion_that_did_not_come_is_no_lesion(tmp_path: Path) -> None:
    """An image asked for as benign in which nothing is outlined is not released under that label; it is counted."""
    makes = tiny()

    class Forgetful(Generator):
        def grant(self, wishes: Sequence[Wish], *rest: Any, **more: Any) -> list[Sample]:
            made = super().grant(wishes, *rest, **more)
            return [dataclasses.replace(m, mask=m.mask & (m.index != 2)) for m in made]

    forgets = Forgetful(makes.card, makes.coder, makes.network)
    counts = synthesise.generate(forgets, tmp_path, dataclasses.replace(SIX, count=4), None)
    assert (counts.released, counts.empty, counts.dropped) == (4, 1, 0) and counts.made == 5
    assert all(row.mask for row in data.read_manifest(tmp_path))


def test_the_filter_knows_close_ups_and_shots(tmp_path: Path) -> None:
    """A copy of a close-up that was learnt is dropped, and so is a copy of a shot that only the adapter saw."""
    makes, root = tiny(), data_folder(tmp_path / "data", patients=24)
    makes.card = dataclasses.replace(makes.card, trained_on=("painted",))
    makes.coder.begin_linear(torch.rand(4, 1, SIZE, SIZE))
    judge, gate = embed.latent(makes.coder), audit.build_filter(makes, root)
    rows = [row for row in data.read_manifest(root) if row.split == "train" and row.lesion]
    seen = encode.views(root, rows, encode.Settings(size=SIZE))
    close = np.stack([made[2].image for _, made in seen])
    assert not gate.passes(judge(close)).any()
    shot = np.random.default_rng(0).integers(0, 255, (1, SIZE, SIZE)).astype(np.uint8)
    own = gate.including(release.both_ways(judge, shot))
    assert gate.passes(judge(shot)).all() and not own.passes(judge(embed.mirrored(shot))).any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"count": 0},
        {"shard": 0},
        {"seed": -1},
        {"mix": {"benign": 0}},
        {"mix": {"benign": -1, "malignant": 2}},
        {"mix": {"benign": 1, "cancer": 0}},
        {"mix": {"normal": 1}, "in_healthy": True},
        {"devices": ("Nokia",)},
    ],
)
def test_a_question_that_cannot_be_answered_leaves_no_trace(wrong: dict[str, Any], tmp_path: Path) -> None:
    """It is refused before anything is written: the same folder then takes the right question."""
    with pytest.raises(Misconfigured):
        synthesise.generate(tiny(), tmp_path / "out", dataclasses.replace(SIX, **wrong), None)
    assert not (tmp_path / "out").exists()


def test_a_folder_where_nothing_can_be_written_is_said(tmp_path: Path) -> None:
    """A file in the folder's place, as a full disk, is said in a sentence with what to do."""
    (tmp_path / "out").write_text("")
    with pytest.raises(Misconfigured, match="cannot be written"):
        synthesise.generate(tiny(), tmp_path / "out", SIX, None)


def test_of_a_smaller_count_as_many_are_listed(six: Path, tmp_path: Path) -> None:
    """A folder of six that is asked for five lists five, and keeps the sixth for later."""
    folder = shutil.copytree(six, tmp_path / "six")
    for count in (5, 6):
        made = synthesise.generate(tiny(), folder, dataclasses.replace(SIX, count=count), None)
        assert made.released == made.made == len(data.read_manifest(folder)) == count
    assert contents(folder) == contents(six)


def test_a_task_s_own_label_is_listed_and_shared(tmp_path: Path) -> None:
    """A site's own outcome column stands in the manifest of its images, and in the package's labels and metadata."""
    makes = tiny()
    words = conditions.Vocabulary({**makes.card.vocabulary.names, "recurrence_5y": ("yes",)})
    makes.card = dataclasses.replace(makes.card, vocabulary=words)
    makes.network.conditions.grow(words)
    how = dataclasses.replace(SIX, count=2, labels={"recurrence_5y": "yes"})
    synthesise.generate(makes, tmp_path / "made", how, None)
    rows = share._rows(tmp_path / "made")
    assert {row["recurrence_5y"] for row in rows} == {"yes"}
    data.write_table(tmp_path / share.LABELS, rows)
    assert "recurrence_5y" in (tmp_path / share.LABELS).read_text().splitlines()[0]
    metadata = share.croissant(TERMS, {share.LABELS: ""}, list(rows[0]))
    assert "recurrence_5y" in {field["name"] for field in metadata["recordSet"][0]["field"]}


def test_device_tells_nothing_of_the_class() -> None:
    """Devices are drawn evenly whatever the pathology, and the mix is kept."""
    makes, settings = tiny(), Settings(mix={"benign": 3, "malignant": 1})
    wishes = [synthesise.wish(makes, settings, i) for i in range(400)]
    malignant = [w for w in wishes if w.pathology == "malignant"]
    assert 60 < len(malignant) < 140
    for group in (wishes, malignant):
        assert 0.4 < np.mean([w.device == "A" for w in group]) < 0.6


def test_the_release_filter_drops_and_counts_copies(tmp_path: Path) -> None:
    """Too near to a training image: dropped and counted; what is far passes; without a filter nothing is released."""
    makes = tiny()
    rng = np.random.default_rng(0)
    train = rng.integers(0, 255, (30, SIZE, SIZE)).astype(np.uint8)
    gate = release.build(embed.latent(makes.coder), train, rng.integers(0, 255, (20, SIZE, SIZE)).astype(np.uint8))
    judge = embed.latent(makes.coder)
    assert not gate.passes(judge(train)).any() and not gate.passes(judge(embed.mirrored(train))).any()
    gate.save(tmp_path / release.FILE)
    again = release.load(tmp_path / release.FILE)
    assert again.threshold == gate.threshold and not again.passes(judge(train)).any()
    strict = release.Filter(gate.mean, gate.axes, gate.points, 1e9)
    with pytest.raises(Misconfigured, match="copies"):
        synthesise.generate(makes, tmp_path / "none", Settings(**{**vars(SIX), "count": 1, "filtered": True}), strict)
    with pytest.raises(Misconfigured, match="release filter"):
        synthesise.generate(makes, tmp_path / "open", Settings(**{**vars(SIX), "filtered": True}), None)


def test_what_the_filter_drops_is_replaced(tmp_path: Path) -> None:
    """Dropped images are replaced until the count is reached, and the summary says how many there were."""
    makes = tiny()
    synthesise.generate(makes, tmp_path / "free", SIX, None)
    images, _ = synthesise.read_images(tmp_path / "free", SIZE)
    vectors = embed.latent(makes.coder)(images)
    away = np.linalg.norm(vectors - vectors.mean(0), axis=1)
    axes, point = np.eye(vectors.shape[1], dtype=np.float32), np.zeros((1, vectors.shape[1]), np.float32)
    origin = release.Filter(vectors.mean(0), axes, point, float(np.median(away)))
    counts = synthesise.generate(makes, tmp_path / "gated", Settings(**{**vars(SIX), "filtered": True}), origin)
    assert counts.released == 6 and counts.dropped >= 1
    assert json.loads((tmp_path / "gated" / synthesise.SUMMARY).read_text())["dropped"] == counts.dropped


# Sharing


def report(folder: Path, generator: str = "", **manner: Any) -> Path:
    finding = privacy.Finding("copies", "share", Interval(0.0, 0, 0.01), Interval(1, 0.9, 1), 0.01, "passes")
    path = folder / "report.json"
    digest = generator or tiny().digest
    path.write_text(privacy.PrivacyReport("tiny", 8, 4, 6, 6, 0, (finding,), "none", digest, MANNER | manner).to_json())
    return path


def signer() -> signing.KeySigner:
    return signing.KeySigner(Ed25519PrivateKey.from_private_bytes(b"7" * 32))


def trusted() -> signing.Verifier:
    return signing.Verifier.of((signer().key.public_key(), frozenset({share.KIND})))


@pytest.fixture
def package(released: Path, tmp_path: Path) -> Path:
    return share.package(
        released, report(tmp_path), tmp_path / "package", TERMS, signer(), lambda made: b"DICM" + made.image.tobytes()
    )


def test_a_package_is_complete_and_checks(package: Path) -> None:
    """Images, masks, labels, metadata, card, report, DICOM and a signature that holds for all of them."""
    files = share.verify(package, trusted())["files"]
    assert {share.METADATA, share.CARD, share.REPORT, share.LABELS} <= set(files)
    assert sum(name.startswith("images/") for name in files) == sum(name.startswith("dicom/") for name in files) == 6
    with (package / share.LABELS).open() as file:
        rows = list(csv.DictReader(file))
    assert all((package / row["image"]).exists() for row in rows)


@pytest.mark.parametrize("harm", ["change", "add", "add another envelope", "remove", "unsign"])
def test_a_package_that_was_touched_is_refused(package: Path, harm: str) -> None:
    """A changed, added or missing file, or a missing signature, is Untrusted."""
    image = package / "images" / "0000000.png"
    {
        "change": lambda: Image.new("L", (8, 8)).save(image),
        "add": lambda: (package / "more.png").write_bytes(b""),
        "add another envelope": lambda: (image.parent / share.ENVELOPE).write_bytes(b""),
        "remove": image.unlink,
        "unsign": (package / share.ENVELOPE).unlink,
    }[harm]()
    with pytest.raises(Untrusted):
        share.verify(package, trusted())


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A folder with key.pem and public.pem, and public.pem of somebody else."""
    for name, secret in (("", signer().key), ("other-", Ed25519PrivateKey.generate())):
        private = secret.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        public = secret.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (tmp_path / f"{name}key.pem").write_bytes(private)
        (tmp_path / f"{name}public.pem").write_bytes(public)
    return tmp_path


def asked(images: Path, keys: Path) -> tuple[object, ...]:
    return ("--images", images, "--report", report(keys), "--creator", "us", "--key", keys / "key.pem")


def run(*words: object) -> str:
    """A verb's output; what it raises, to be shown to its user, is raised here."""
    return CliRunner().invoke(cli.app, [str(word) for word in words], catch_exceptions=False).output


def test_what_one_site_shares_another_verifies(released: Path, keys: Path) -> None:
    """`share` and `verify-package` by their options: an altered package, another's key, a foreign file are refused."""
    package, public = keys / "package", keys / "public.pem"
    run("share", *asked(released, keys), "--out", package, "--name", "n" * 44)
    assert "signature and 22 files hold" in " ".join(run("verify-package", package, "--key", public).split())
    for key, said in (("other-public.pem", "No trusted key has signed"), ("key.pem", "no public key")):
        with pytest.raises((Untrusted, Misconfigured), match=said):
            run("verify-package", package, "--key", keys / key)
    for foreign in (public, released):
        with pytest.raises(Untrusted, match="is not signed"):
            run("verify-package", foreign, "--key", public)
    (package / share.CARD).write_text("It proves everything.")
    with pytest.raises(Untrusted, match=r"card\.md changed, added or taken away"):
        run("verify-package", package, "--key", public)


@pytest.mark.parametrize("name", ["n" * 45, "a\\b", "a^b", "a=b", "a\nb"])
def test_a_name_that_dicom_does_not_allow_is_refused(released: Path, keys: Path, name: str) -> None:
    """Too long, or with a sign that parts names: said before anything is written; without DICOM it may be."""
    how = (*asked(released, keys), "--out", keys / "out", "--name", name, "--version", "1")
    with pytest.raises(Misconfigured, match="DICOM patient's name"):
        run("share", *how)
    assert not (keys / "out").exists()
    run("share", *how, "--no-dicom")
    assert (keys / "out" / share.ENVELOPE).exists()


def test_the_metadata_follows_croissant(package: Path) -> None:
    """Croissant: context, conformance, files with checksums or patterns, and one field per column."""
    document = json.loads((package / share.METADATA).read_text())
    assert document["conformsTo"] == "http://mlcommons.org/croissant/1.0" and document["@type"] == "sc:Dataset"
    ids = {part["@id"] for part in document["distribution"]}
    fields = document["recordSet"][0]["field"]
    assert {"pathology", "device", "image"} <= {field["name"] for field in fields}
    for field in fields:
        holder = field["source"].get("fileObject") or field["source"].get("fileSet")
        assert holder["@id"] in ids
    table = next(part for part in document["distribution"] if part["@id"] == "labels")
    assert table["sha256"] == signing.digest((package / share.LABELS).read_bytes())


def test_the_card_says_what_the_report_says(package: Path, six: Path, tmp_path: Path) -> None:
    """The data card tells the verdicts, also when a bar does not hold or nothing was measured."""
    assert "holds all its bars" in (package / share.CARD).read_text()
    silent = json.loads(report(tmp_path).read_text())
    silent["findings"][0] |= {"control": {"value": None, "low": None, "high": None}, "verdict": "concludes nothing"}
    silent["holds"] = False
    text = share.card([], silent, {"made": 6, "dropped": 0}, TERMS)
    assert "does NOT hold" in text and "not measured" in text and "concludes nothing" in text


def test_what_was_not_filtered_is_not_shared(six: Path, tmp_path: Path) -> None:
    """Images made for a measurement, without the release filter, stay where they are."""
    with pytest.raises(Misconfigured, match="without the release filter"):
        share.package(six, report(tmp_path), tmp_path / "out", TERMS, signer())


def test_a_report_on_another_generator_is_refused(released: Path, tmp_path: Path) -> None:
    """A package tells the risk of the generator that made it: a report on other weights stops it before it begins."""
    with pytest.raises(Misconfigured, match="with the generator, and the adapter, that made them"):
        share.package(released, report(tmp_path, tiny(seed=1).digest), tmp_path / "out", TERMS, signer())
    assert not (tmp_path / "out").exists()


def test_a_report_on_images_asked_for_otherwise_is_refused(released: Path, tmp_path: Path) -> None:
    """Firmer guidance copies more: what was found of other images of the same generator need not hold for these."""
    other = report(tmp_path, sampling=MANNER["sampling"] | {"guidance": 1.0})
    with pytest.raises(Misconfigured, match="asked for in another way"):
        share.package(released, other, tmp_path / "out", TERMS, signer())
    with pytest.raises(Misconfigured, match="asked for in another way"):
        share.package(released, report(tmp_path, in_healthy=True), tmp_path / "out", TERMS, signer())


def test_a_report_that_names_no_weights_is_refused(released: Path, tmp_path: Path) -> None:
    """A report from before reports named their weights: run the audit again, or make images that name theirs."""
    old = json.loads(report(tmp_path).read_text())
    del old["generator"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    with pytest.raises(Misconfigured, match="run `busgen-cds privacy` on these images again"):
        share.package(released, tmp_path / "old.json", tmp_path / "out", TERMS, signer())
    nameless = shutil.copytree(released, tmp_path / "nameless")
    question = json.loads((nameless / synthesise.QUESTION).read_text())
    del question["generator"]
    (nameless / synthesise.QUESTION).write_text(json.dumps(question))
    with pytest.raises(Misconfigured, match="make the images anew"):
        share.package(nameless, report(tmp_path), tmp_path / "out", TERMS, signer())


@pytest.mark.parametrize("text", ["", "[]", "{}", "image,mask"])
def test_what_is_no_report_is_refused(released: Path, tmp_path: Path, text: str) -> None:
    """Any other file in the report's place is named as that."""
    (tmp_path / "note.json").write_text(text)
    with pytest.raises(Misconfigured, match="is no privacy report"):
        share.package(released, tmp_path / "note.json", tmp_path / "out", TERMS, signer())


def test_only_generated_images_are_shared(six: Path, tmp_path: Path) -> None:
    """An image of any other source stops the package before it begins."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    rows = list(csv.DictReader((six / data.MANIFEST).open()))
    rows[0]["source"] = "busi"
    data.write_table(folder / data.MANIFEST, rows)
    with pytest.raises(Misconfigured, match="Only generated"):
        share.package(folder, report(tmp_path), tmp_path / "out", TERMS, signer())
