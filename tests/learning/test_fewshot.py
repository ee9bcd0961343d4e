"""Adapting the generator from a few images."""

from __future__ import annotations

import csv
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from busgen_cds.errors import Misconfigured
from busgen_cds.learning import checkpoint, data, embed, release
from busgen_cds.learning.conditions import Vocabulary
from busgen_cds.learning.generator import Generator, Sampling
from busgen_cds.learning.reader import Reader, Shape
from busgen_cds.learning.recipes import adapt_reader, fewshot, shots, train_reader
from busgen_cds.learning.recipes.fewshot import Settings
from tests.learning.generators import SIZE, VOCABULARY, data_folder, tiny

TASKS = Path(__file__).parents[2] / "busgen_cds" / "tasks"
TASK = """
name = "rare"
column = "histology"
surrogate = "painted discs"
[[classes]]
name = "cyst"
values = ["cyst"]
[[classes]]
name = "mucinous"
values = ["mucinous carcinoma"]
[shots]
splits = ["{split}"]
most = 12
"""
QUICK = Settings(shots=8, steps=4, report_every=2, batch=4, views=2, rank=2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_folder(tmp_path_factory.mktemp("few") / "data", patients=36)


def task(folder: Path, split: str = "train") -> fewshot.Source:
    path = folder / "task.toml"
    path.write_text(TASK.format(split=split))
    return fewshot.read_task(path)


def base(folder: Path, seed: int = 0, labels: Vocabulary = VOCABULARY) -> Generator:
    """A generator as a folder keeps it."""
    makes = tiny(seed=seed)
    makes.network.conditions.grow(labels)
    makes.card = dataclasses.replace(makes.card, vocabulary=labels)
    makes.save(folder / "base")
    return Generator.load(folder / "base", device="cpu")


def test_an_adapter_belongs_to_one_generator(root: Path, tmp_path: Path) -> None:
    """Another generator of the same shape takes no adapter that it did not teach, and one of more labels neither."""
    path = fewshot.adapt(base(tmp_path), root, task(tmp_path), tmp_path / "out", QUICK)
    base(tmp_path, seed=1)
    with pytest.raises(Misconfigured, match="was made for another generator: adapt this one anew"):
        Generator.load(tmp_path / "base", adapter=path, device="cpu")
    tensors, notes = checkpoint.read(path)
    checkpoint.write(path, tensors, {name: value for name, value in notes.items() if name != "generator"})
    assert Generator.load(tmp_path / "base", adapter=path, device="cpu")  # made before that was noted
    base(tmp_path, labels=VOCABULARY.with_label("device", "C").with_label("device", "D"))
    with pytest.raises(Misconfigured, match="other labels"):
        Generator.load(tmp_path / "base", adapter=path, device="cpu")


def test_a_new_label_s_table_lies_where_the_network_lies() -> None:
    """On a GPU too: a table of its own condition is not left behind."""
    network = tiny().network.to("meta")
    network.conditions.grow(VOCABULARY.with_label("histology", "cyst"))
    assert {parameter.device.type for parameter in network.conditions.parameters()} == {"meta"}


def test_an_adapter_is_trained_kept_and_used(root: Path, tmp_path: Path) -> None:
    """A few images make an adapter with a card; loaded, the generator knows the new label and the old ones."""
    told: list[fewshot.Report] = []
    path = fewshot.adapt(base(tmp_path), root, task(tmp_path), tmp_path / "out", QUICK, tell=told.append)
    assert told[0].step == 0 and len(told) >= 2 and told[-1].images_per_second > 0
    adapted = Generator.load(tmp_path / "base", adapter=path, device="cpu")
    assert adapted.card.vocabulary.names["histology"] and adapted.card.vocabulary.names["device"][:2] == ("A", "B")
    one = adapted.sample(pathology="malignant", labels={"histology": "mucinous carcinoma"}, sampling=Sampling(steps=2))
    assert one[0].image.any()
    words = (tmp_path / "out" / fewshot.CARD).read_text()
    assert "surrogate: painted discs" in words and "audit this adapter apart" in words


def test_an_adapter_says_who_taught_it(root: Path, tmp_path: Path) -> None:
    """An audit's members are the shots that taught, as the adapter itself remembers them; those that judged are not."""
    rows, few = data.read_manifest(root), task(tmp_path)
    path = fewshot.adapt(tiny(), root, few, tmp_path / "out", dataclasses.replace(QUICK, seed=3))
    chosen = fewshot.choose(rows, few, 8, 3)
    taught = fewshot.learnt_from(path, rows, few)
    assert len(taught) == 6 and {r.image for r in taught} < {r.image for r in chosen}
    elsewhere = dataclasses.replace(few, task=dataclasses.replace(few.task, name="elsewhere"))
    for others, source in (([r for r in rows if r.image != taught[0].image], few), (rows, elsewhere)):
        with pytest.raises(Misconfigured, match="was taught by other images"):
            fewshot.learnt_from(path, others, source)


def test_a_clip_does_not_fill_the_shots(tmp_path: Path) -> None:
    """Of patients with twenty frames each, eight shots show eight patients, both classes, and more only when asked."""
    source = fewshot.Source(task(tmp_path).task, ("painted",), ("device-adapt",), ("cyst", "mucinous"), 64, "")
    values = [wanted.values[0] for wanted in source.task.classes if wanted.name in source.classes]
    rows = [
        data.Row(f"{p}-{i}", "m", "painted", f"p{p}", "benign", "device-adapt", {source.task.column: values[p % 2]}, 2)
        for p in range(10)
        for i in range(20)
    ]
    chosen = fewshot.choose(rows, source, 8, 0)
    assert len({row.patient for row in chosen}) == 8
    assert {row.labels[source.task.column] for row in chosen} == set(values)
    assert len({row.image for row in fewshot.choose(rows, source, 24, 0)}) == 24


def test_an_adapter_has_a_filter_that_knows_its_shots(root: Path, tmp_path: Path) -> None:
    """A copy of a shot, which the generator's own filter lets through, is dropped by the filter beside the adapter."""
    none = release.Filter(*(np.zeros(shape, np.float32) for shape in ((512,), (512, 64), (1, 64))), 0.01)
    gate = dataclasses.replace(none, axes=np.eye(512, 64, dtype=np.float32))
    few = task(tmp_path)
    path = fewshot.adapt(tiny(), root, few, tmp_path / "out", QUICK, gate=gate)
    own = release.of(tmp_path, path)
    shots = data.load(root, fewshot.choose(data.read_manifest(root), few, 8, QUICK.seed), None, SIZE)
    vectors = embed.latent(tiny().coder)(shots.image)
    assert gate.passes(vectors).all() and own is not None and not own.passes(vectors).any()
    assert release.of(tmp_path) is None


def test_an_adapter_that_gained_nothing_changes_nothing(root: Path, tmp_path: Path) -> None:
    """With a rate of zero training stops at once after its patience, and the adapter changes nothing."""
    told: list[fewshot.Report] = []
    still = Settings(**{**vars(QUICK), "rate": 0.0, "steps": 100, "report_every": 1, "patience": 2})
    path = fewshot.adapt(base(tmp_path), root, task(tmp_path), tmp_path / "out", still, tell=told.append)
    assert told[-1].step == 2
    plain, adapted = (Generator.load(tmp_path / "base", adapter=a, device="cpu") for a in (None, path))
    wish = plain.wish(0, 0, "benign", device="A")
    x, t = torch.randn(1, 12, 8, 8), torch.tensor([0.4])
    with torch.inference_mode():
        one = plain.network(x, t, plain.given([wish]))
        other = adapted.network(x, t, adapted.given([wish]))
    assert torch.allclose(one, other, atol=1e-3)  # the labels' embeddings travel in half precision


def test_the_backbone_is_untouched(root: Path, tmp_path: Path) -> None:
    """Only adapters and labels are in the file, and it is small beside the network."""
    path = fewshot.adapt(tiny(), root, task(tmp_path), tmp_path, QUICK)
    names = set(checkpoint.read(path)[0])
    assert names and all("lora_" in name or "class_embedding" in name for name in names)


def test_shots_are_whole_patients_in_turn(root: Path, tmp_path: Path) -> None:
    """The shots are as many as asked for, both classes alike, and no patient both teaches and judges."""
    shots = fewshot.choose(data.read_manifest(root), task(tmp_path), 8, 0)
    assert len(shots) == 8 and {row.split for row in shots} == {"train"}
    assert abs(sum(row.pathology == "benign" for row in shots) - 4) <= 1
    teach, judge = fewshot.parted(shots, "histology", 0.25, 0)
    assert len(judge) == 2 and not {r.patient for r in teach} & {r.patient for r in judge}
    assert fewshot.choose(data.read_manifest(root), task(tmp_path), 8, 1) != shots


def test_a_class_of_one_patient_is_taught() -> None:
    """Whoever is held out, no label is held out whole: it would be in the vocabulary and mean nothing."""
    kinds = ["cyst"] * 7 + ["rare"]
    rows = [data.Row(f"{i}", "m", "s", f"p{i}", "benign", "train", {"histology": k}, i) for i, k in enumerate(kinds)]
    for seed in range(20):
        teach, judge = fewshot.parted(rows, "histology", 0.25, seed)
        assert len(judge) == 2 and len(teach) == 6 and rows[7] in teach
    alone = [dataclasses.replace(row, labels={"histology": row.image}) for row in rows]
    with pytest.raises(Misconfigured, match="show more patients of each"):
        fewshot.parted(alone, "histology", 0.25, 0)


def test_a_lesion_without_an_outline_is_no_shot(root: Path, tmp_path: Path) -> None:
    """An adapter would learn it as an image without a lesion; where too few are left, it is said why."""
    rows = data.read_manifest(root)
    some = [dataclasses.replace(row, mask="") if row.line % 2 else row for row in rows]
    assert all(row.mask for row in fewshot.choose(some, task(tmp_path), 8, 0))
    bare = [dataclasses.replace(row, mask="") for row in rows]
    with pytest.raises(Misconfigured, match=r"finds 0 images \(16 lesions without an outline are left out\)"):
        fewshot.choose(bare, task(tmp_path), 8, 0)


@pytest.mark.parametrize("shots", [4, 65, 13])
def test_too_few_or_too_many_shots_are_refused(root: Path, tmp_path: Path, shots: int) -> None:
    """Shots are 8 to 64, or to what the task allows."""
    with pytest.raises(Misconfigured, match="8 to 12"):
        fewshot.choose(data.read_manifest(root), task(tmp_path), shots, 0)


def test_a_class_that_nobody_shows_is_named(root: Path, tmp_path: Path) -> None:
    """A task of two classes of which the data show one is refused: class and column are named."""
    seen = [row for row in data.read_manifest(root) if row.labels["histology"] != "mucinous carcinoma"]
    with pytest.raises(Misconfigured, match=r"shows the class mucinous \(histology = mucinous carcinoma\)"):
        fewshot.choose(seen, task(tmp_path), 8, 0)
    one = dataclasses.replace(task(tmp_path), classes=("cyst",))  # asked for alone
    assert len(fewshot.choose(seen, one, 8, 0)) == 8


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('splits = "train"', "splits is a list of words"),
        ('sources = "painted"', "sources is a list of words"),
        ('classes = "cyst"', "classes is a list of words"),
        ('classes = ["cist"]', "not of cist"),
        ('most = "many"', "a whole number"),
    ],
)
def test_a_word_in_a_list_s_place_is_refused(tmp_path: Path, line: str, said: str) -> None:
    """`splits = "train"` was read letter by letter, and found no image."""
    path = tmp_path / "task.toml"
    path.write_text(f"{TASK.split('[shots]')[0]}[shots]\n{line}\n")
    with pytest.raises(Misconfigured, match=said):
        fewshot.read_task(path)
    path.write_text(TASK.replace('values = ["cyst"]', 'values = "cyst"'))
    with pytest.raises(Misconfigured, match="values is a list of words"):
        fewshot.read_task(path)


@pytest.mark.parametrize("column", ["type", "her2.status"])
def test_a_column_that_no_label_can_be_called_is_refused(tmp_path: Path, column: str) -> None:
    """A name that torch keeps for itself, or one with a dot, is refused with its task file before anything is read."""
    path = tmp_path / "task.toml"
    path.write_text(TASK.format(split="train").replace("histology", column))
    with pytest.raises(Misconfigured, match=f"no label that is called '{column}'"):
        fewshot.read_task(path)


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"steps": 0}, {"batch": 0}, {"views": 0}, {"seed": -1}, {"held_out": 1}]
)
def test_settings_that_teach_nothing_are_refused(wrong: dict[str, Any]) -> None:
    """A rank of nought, no step, no image: said in a sentence."""
    with pytest.raises(Misconfigured, match="The adapter's"):
        dataclasses.replace(QUICK, **wrong)


def test_fewer_steps_than_a_report_takes_teach_too(root: Path, tmp_path: Path) -> None:
    """An adapter of few steps is judged at its end: it was kept as it began."""
    told: list[fewshot.Report] = []
    how = dataclasses.replace(QUICK, steps=1, report_every=25)
    fewshot.adapt(tiny(), root, task(tmp_path), tmp_path / "out", how, tell=told.append)
    assert [report.step for report in told] == [0, 1]


def test_shots_never_come_from_a_test_split(tmp_path: Path) -> None:
    """A task file that asks for shots of a test split is refused."""
    for split in ("test", "device-test", "site-test"):
        with pytest.raises(Misconfigured, match=split):
            task(tmp_path, split)


def test_a_task_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    """An image in the task file's place is refused with its name, and without its bytes."""
    path = tmp_path / "task.toml"
    path.write_bytes(b"\x89PNG" + bytes(range(256)))
    with pytest.raises(Misconfigured, match=r"task\.toml is no text") as refused:
        fewshot.read_task(path)
    assert len(str(refused.value)) < 40 + len(str(path))


@pytest.mark.parametrize("name", ["screening", "diagnosis", "prognosis"])
def test_the_shipped_tasks_are_read(name: str) -> None:
    """Screening, diagnosis and prognosis are read by reader and generator alike; the surrogate says what it is."""
    source = fewshot.read_task(TASKS / f"{name}.toml")
    assert source.task.name == name and len(source.task.classes) == 2
    assert bool(source.surrogate) == (name == "prognosis") and (name != "prognosis" or source.most == 32)
    rows = [data.Row("", "", "", "", "malignant", "", {"pathology": "malignant", "histology": "x"}, 2)]
    assert np.array(source.task.targets(rows)).shape == (1,)


def test_the_queue_of_shots_judges_other_patients(root: Path, tmp_path: Path) -> None:
    """Every arm goes on from the same member, is judged on patients that gave no shot, and is not run twice."""
    folder = tmp_path / "data"
    shutil.copytree(root, folder)
    with (folder / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    for i, row in enumerate(rows):
        row["split"] = ("val", "device-adapt", "device-adapt", "device-test")[i // 3 % 4]
    with (folder / "manifest.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    source = fewshot.Source(task(tmp_path).task, ("painted",), ("device-adapt",), ("cyst", "mucinous"), 12, "")
    quick = adapt_reader.Settings(steps=1, batch=4, size=64)
    settings = shots.Settings((8,), 1, 4, QUICK, quick)
    tiny().save(tmp_path / "base")
    start, out = member(tmp_path), tmp_path / "runs"

    def load(adapter: Path | None) -> Generator:
        return Generator.load(tmp_path / "base", adapter=adapter, device="cpu")

    assert shots.work(load, folder, source, start, out, settings, most=2) == 1
    assert shots.work(load, folder, source, start, out, settings) == 0
    told: list[str] = []
    assert shots.work(load, folder, source, start, out, settings, tell=told.append) == 0 and not told
    with pytest.raises(Misconfigured, match="with other settings"):  # another task's runs are not gone on with
        shots.work(load, folder, source, start, out, dataclasses.replace(settings, generated=5))
    for arm, sources in {"shots": {"shots"}, "generated": {"synthetic"}, "shots+generated": {"shots"}}.items():
        with (out / f"{arm}-8-0" / "data" / "manifest.csv").open() as file:
            taught = list(csv.DictReader(file))
        assert {row["source"] for row in taught} == sources
        assert not {row["patient"] for row in taught} & {r["patient"] for r in rows if r["split"] == "device-test"}
    found = shots.compare(folder, source, out, settings)
    assert [each.arm for each in found] == list(shots.ARMS)
    page = shots.write(found, shots.tests(folder, source, None), out, 0, tmp_path, "device")
    assert "| shots+generated | 8 |" in page.read_text()


def member(folder: Path) -> Path:
    torch.manual_seed(0)
    shape = Shape(width=16)
    notes = {"settings": train_reader.describe(train_reader.Settings(shape=shape)), "step": 0}
    return adapt_reader.write_member(folder / "start.safetensors", Reader(shape).state_dict(), notes)


def test_shots_of_no_unseen_place_are_refused(root: Path, tmp_path: Path) -> None:
    """A task whose shots come from the training split has nobody to judge it on."""
    with pytest.raises(Misconfigured, match="no unseen device or site"):
        shots.tests(root, task(tmp_path), None)
