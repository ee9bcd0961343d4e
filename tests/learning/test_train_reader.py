"""The recipe: it goes on after a kill, and says what is wrong with its input."""

from __future__ import annotations

import errno
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from busgen_cds.errors import Misconfigured
from busgen_cds.learning import checkpoint, data, tasks
from busgen_cds.learning.encoders import Encoder
from busgen_cds.learning.recipes import train_reader
from tests.learning import toys


class Killed(Exception):
    pass


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return toys.write(tmp_path / "data", toys.records())


def test_a_killed_run_ends_as_if_it_had_not_been(root: Path, tmp_path: Path) -> None:
    """A run that was killed and started again ends with the same weights, bit for bit."""
    settings = toys.settings()
    whole = train_reader.train(root, tmp_path / "whole", settings)

    def kill(report: train_reader.Report) -> None:
        if report.step == 4:
            raise Killed

    with pytest.raises(Killed):
        train_reader.train(root, tmp_path / "killed", settings, tell=kill)
    assert checkpoint.read(tmp_path / "killed" / train_reader.CHECKPOINT)[1]["step"] == 2
    again = train_reader.train(root, tmp_path / "killed", settings)
    expected, found = checkpoint.read(whole)[0], checkpoint.read(again)[0]
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_what_is_held_changes_less(root: Path, tmp_path: Path) -> None:
    """An anchor that holds everything lets nothing move; one that holds a part lets all move less."""
    start = train_reader.train(root, tmp_path / "start", toys.settings(steps=2))
    before = checkpoint.part(checkpoint.read(start)[0], "average.")

    def after(name: str, **changes: object) -> dict[str, torch.Tensor]:
        path = train_reader.train(root, tmp_path / name, toys.settings(steps=2, **changes), start=start)
        return checkpoint.part(checkpoint.read(path)[0], "reader.")

    def way(weights: dict[str, torch.Tensor]) -> float:
        return sum(float((weights[name] - before[name]).norm()) for name in before)

    assert 0 < way(after("part", anchor=0.5)) < way(after("free"))
    held = after("held", anchor=1.0)
    assert all(torch.equal(before[name], held[name]) for name in before)


def test_a_run_from_before_a_setting_goes_on(root: Path, tmp_path: Path) -> None:
    """A setting that did not exist when a run began was at its default: the run goes on."""
    path = train_reader.train(root, tmp_path / "run", toys.settings(steps=2))
    tensors, notes = checkpoint.read(path)
    del notes["settings"]["anchor"]
    checkpoint.write(path, tensors, notes)
    train_reader.train(root, tmp_path / "run", toys.settings(steps=2))
    with pytest.raises(Misconfigured, match="anchor"):
        train_reader.train(root, tmp_path / "run", toys.settings(steps=2, anchor=0.1))


def test_other_settings_are_not_mixed_into_a_run(root: Path, tmp_path: Path) -> None:
    """A folder that holds a run with other settings is refused, naming the setting."""
    train_reader.train(root, tmp_path / "run", toys.settings(steps=2))
    with pytest.raises(Misconfigured, match="rate"):
        train_reader.train(root, tmp_path / "run", toys.settings(steps=2, rate=1e-5))


def test_two_steps_on_a_fixed_seed_learn(root: Path, tmp_path: Path) -> None:
    """Training lowers the loss on the images it sees."""
    told: list[float] = []
    settings = toys.settings(
        steps=24, report_every=4, save_every=24, strength=toys.GENTLE, rate=2e-3, encoder_rate=2e-4
    )
    train_reader.train(root, tmp_path / "run", settings, tell=lambda report: told.append(report.loss))
    assert told[-1] < told[0]


def test_a_loss_that_is_not_a_number(root: Path, tmp_path: Path) -> None:
    """A NaN loss stops the run with a message; the last good checkpoint stays."""
    path = train_reader.train(root, tmp_path / "run", toys.settings(steps=2))
    kept = path.read_bytes()
    with pytest.raises(Misconfigured, match=r"not a number.*another folder.*--start"):
        train_reader.train(root, tmp_path / "bad", toys.settings(weight_mask=math.nan), start=path)
    assert path.read_bytes() == kept


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk while saving leaves the last good checkpoint intact and nothing half-written."""
    path = tmp_path / "reader.safetensors"
    checkpoint.write(path, {"weight": torch.ones(3)}, {"step": 1})

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Misconfigured, match="No space left"):
        checkpoint.write(path, {"weight": torch.zeros(3)}, {"step": 2})
    assert checkpoint.read(path)[1]["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    """A truncated checkpoint is refused by name."""
    path = tmp_path / "reader.safetensors"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(Misconfigured, match=r"reader\.safetensors"):
        checkpoint.read(path)


def test_a_missing_image_is_named(root: Path) -> None:
    """A manifest whose image is missing is refused with line and file."""
    (root / "3.png").unlink()
    with pytest.raises(Misconfigured, match=r"line 5.*3\.png"):
        data.read_manifest(root)


def test_an_unknown_label_is_named(tmp_path: Path) -> None:
    """An unknown pathology is refused with its line."""
    rows = toys.records()
    rows[2]["pathology"] = "cyst"
    with pytest.raises(Misconfigured, match=r"line 4.*'cyst'"):
        data.read_manifest(toys.write(tmp_path, rows))


def test_an_unknown_split_is_named(tmp_path: Path) -> None:
    """A split that nobody knows is refused: its row would neither train nor be held out, and nobody would know."""
    rows = toys.records()
    rows[2]["split"] = "tset"
    with pytest.raises(Misconfigured, match=r"line 4 \(2\.png\): unknown split 'tset'"):
        data.read_manifest(toys.write(tmp_path, rows))


def test_a_row_without_an_image_is_named(root: Path) -> None:
    """A row that names no image is refused with its line."""
    table = root / "manifest.csv"
    table.write_text(table.read_text().replace("3.png,", ",", 1))
    with pytest.raises(Misconfigured, match="line 5: no image is named"):
        data.read_manifest(root)


def test_a_manifest_in_another_encoding_is_named(root: Path) -> None:
    """A manifest that a spreadsheet saved in its own encoding is refused by name, with the way out."""
    table = root / "manifest.csv"
    table.write_bytes(table.read_bytes().replace(b"scanner 1", b"scanner \xe9"))
    with pytest.raises(Misconfigured, match=r"manifest\.csv is not a table in UTF-8.*save it as CSV UTF-8"):
        data.read_manifest(root)


def test_an_outline_of_another_size_is_named(root: Path) -> None:
    """An outline that was not drawn at the size of its image would be stretched: it is refused with line and sizes."""
    Image.fromarray(np.ones((20, 90), bool)).save(root / "4-mask.png")
    with pytest.raises(Misconfigured, match=r"Line 6: 4-mask\.png is 90 × 20 pixels and its image 4\.png 64 × 64"):
        data.load(root, data.read_manifest(root), None, toys.SIZE)


def test_an_outline_that_is_all_black_is_named(root: Path) -> None:
    """It would teach that there is no lesion: it is refused, with what to do."""
    row = next(r for r in data.read_manifest(root) if r.lesion and r.mask)
    Image.fromarray(np.zeros((toys.SIZE, toys.SIZE), np.uint8)).save(root / row.mask)
    with pytest.raises(
        Misconfigured, match=rf"Line {row.line}: {row.mask} is all black.*leave the mask's column empty"
    ):
        data.load(root, data.read_manifest(root), None, toys.SIZE)


def test_prepared_images_are_those_of_the_files(root: Path, tmp_path: Path) -> None:
    """An image that was replaced, or another folder with the same names, never comes out of the cache."""
    first = data.load(root, data.read_manifest(root), tmp_path / "cache", toys.SIZE)
    Image.fromarray(np.full((toys.SIZE, toys.SIZE), 9, np.uint8)).save(root / "3.png")
    again = data.load(root, data.read_manifest(root), tmp_path / "cache", toys.SIZE)
    assert (again.image[3] == 9).all() and (again.image[2] == first.image[2]).all()


def test_a_patient_in_two_splits_is_named(tmp_path: Path) -> None:
    """A patient in two splits is refused with both lines."""
    rows = toys.records()
    rows[11]["patient"] = rows[0]["patient"]
    with pytest.raises(Misconfigured, match=r"p0 is in two splits.*line 2.*line 13"):
        data.read_manifest(toys.write(tmp_path, rows))


def test_generated_images_have_the_share_that_was_asked_for(root: Path, tmp_path: Path) -> None:
    """A quarter of what is drawn is generated, the real ones keep their balance, and validation stays real."""
    made = [row | {"source": data.GENERATED, "patient": f"made {row['patient']}"} for row in toys.records(6)]
    folder = toys.write(tmp_path / "made", made)
    told: list[train_reader.Report] = []
    train_reader.train(root, tmp_path / "run", toys.settings(generated=0.25), tell=told.append, generated=folder)
    assert set(told[-1].figures) == {"toy auc", "toy dice", "toy presence"}
    rows = [row for row in data.read_manifest(root) if row.split == "train"] + data.read_generated(folder)
    images = data.load(root, rows, None, toys.SIZE)
    weights = data.with_share(data.balanced(images), images, data.GENERATED, 0.25)
    drawn = [rows[i].source for step in range(400) for i in data.draw(weights, 4, 0, step)]
    assert drawn.count(data.GENERATED) / len(drawn) == pytest.approx(0.25, abs=0.03)
    with pytest.raises(Misconfigured, match="needs the folder"):
        train_reader.train(root, tmp_path / "other", toys.settings(generated=0.25))
    with pytest.raises(Misconfigured, match="holds no generated images"):
        data.read_generated(root)


def test_one_class_only_is_refused(tmp_path: Path) -> None:
    """An arm that has one class only cannot be trained."""
    rows = [row for row in toys.records() if row["pathology"] != "malignant"]
    with pytest.raises(Misconfigured, match="all not malignant"):
        train_reader.train(toys.write(tmp_path / "data", rows), tmp_path / "run", toys.settings())


def test_a_held_out_patient_may_not_train(root: Path) -> None:
    """No patient of a test split may be seen by an arm, whatever rows are handed in."""
    rows = data.read_manifest(root)
    sealed = [replace(row, split="test") if row.patient == "p0" else row for row in rows]
    with pytest.raises(Misconfigured, match="p0 is held out"):
        data.check_arm(rows, sealed)


def test_folds_never_share_a_patient(root: Path) -> None:
    """Cross-validation splits by patient, and every patient is left out once."""
    rows = data.read_manifest(root)
    left_out = []
    for k in range(3):
        training, val = train_reader.choose(rows, toys.settings(fold=(k, 3)))
        assert not {row.patient for row in training} & {row.patient for row in val}
        left_out += [row.patient for row in val]
    assert sorted(left_out) == sorted(row.patient for row in rows)


def test_a_run_says_what_its_start_has_seen(root: Path, tmp_path: Path) -> None:
    """What the weights that a run began with had seen counts as seen, also when the run goes on without them; and a
    run that leaves patients out never starts from weights that saw them, nor lends its own."""
    start = train_reader.train(root, tmp_path / "start", toys.settings(steps=1))
    tensors, notes = checkpoint.read(start)
    checkpoint.write(start, tensors, notes | {"before": ["long ago"]})

    def kill(report: train_reader.Report) -> None:
        raise Killed

    settings = toys.settings(steps=2, save_every=1)
    with pytest.raises(Killed):
        train_reader.train(root, tmp_path / "run", settings, start=start, tell=kill)
    path = train_reader.train(root, tmp_path / "run", settings)
    assert checkpoint.sources(checkpoint.read(path)[1]) == ["toy", "long ago"]
    with pytest.raises(Misconfigured, match="start from a run of its fold"):
        train_reader.train(root, tmp_path / "fold", toys.settings(steps=1, fold=(0, 3)), start=path)
    notes["settings"]["fold"] = [0, 3]
    checkpoint.write(start, tensors, notes)
    with pytest.raises(Misconfigured, match="patients that this run leaves out"):
        train_reader.train(root, tmp_path / "next", toys.settings(steps=1), start=start)


def test_the_encoder_is_held_where_that_changes(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder holds still for the first half, then all but two blocks learn; a run that was killed goes on so."""
    asked: list[int | None] = []
    hold = Encoder.hold
    monkeypatch.setattr(Encoder, "hold", lambda self, blocks: (asked.append(blocks), hold(self, blocks))[1])
    settings = toys.settings(probe=0.5, still=2)

    def kill(report: train_reader.Report) -> None:
        if report.step == 4:
            raise Killed

    with pytest.raises(Killed):
        train_reader.train(root, tmp_path / "killed", settings, tell=kill)
    assert asked == [None, 2]
    path = train_reader.train(root, tmp_path / "killed", settings)
    assert asked == [None, 2, 2]
    torch.manual_seed(settings.seed)
    begun, ended = Encoder().state_dict(), checkpoint.part(checkpoint.read(path)[0], "reader.encoder.")
    moved = {name for name in begun if not torch.equal(begun[name], ended[name])}
    assert moved and not any(name.startswith(("stem.", "blocks.0.", "blocks.1.")) for name in moved)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"warm_up": 0}, "warm_up is 0"), ({"batch": 0}, "batch is 0"), ({"size": 98}, "multiple of 4")],
)
def test_a_setting_that_cannot_be(change: dict[str, int], said: str) -> None:
    """A setting that no run can have is refused before anything is read."""
    with pytest.raises(Misconfigured, match=said):
        toys.settings(**change)


def test_missing_starting_weights_are_named(root: Path, tmp_path: Path) -> None:
    """Starting weights that are not there are named before anything is trained."""
    with pytest.raises(Misconfigured, match=r"none\.npz"):
        train_reader.train(root, tmp_path / "run", toys.settings(), init=tmp_path / "none.npz")


def test_a_task_file_becomes_a_head(root: Path, tmp_path: Path) -> None:
    """A further task is a small file: column, classes, thresholds."""
    path = tmp_path / "task.toml"
    path.write_text(
        'name = "grade"\ncolumn = "birads"\n[[classes]]\nname = "low"\nvalues = ["2", "3"]\n'
        '[[classes]]\nname = "high"\nvalues = ["4", "5"]\nthreshold = 0.4\n'
    )
    task = tasks.read(path)
    rows = data.read_manifest(root)
    assert task.targets(rows[:3]) == [-1, 0, 1]
    made = train_reader.train(root, tmp_path / "run", toys.settings(steps=2, tasks=(task,)))
    assert any(name.startswith("average.heads.grade.") for name in checkpoint.read(made)[0])


@pytest.mark.parametrize("name", ["malignancy", "birads", "keys", "a.b", ""])
def test_a_task_named_as_a_part_of_the_reader_is_refused(name: str) -> None:
    """A head of that name would replace the reader's own, or torch's."""
    task = tasks.Task(name, "histology", (tasks.TaskClass("one", ("1",)), tasks.TaskClass("two", ("2",))))
    with pytest.raises(Misconfigured, match="Choose another"):
        train_reader.shape_of(toys.settings(tasks=(task,)))


def test_two_tasks_of_one_name_are_refused() -> None:
    """The second would be the only one."""
    task = tasks.Task("grade", "birads", (tasks.TaskClass("low", ("2",)), tasks.TaskClass("high", ("5",))))
    with pytest.raises(Misconfigured, match="grade"):
        train_reader.shape_of(toys.settings(tasks=(task, task)))


def test_a_task_with_one_class_is_refused(tmp_path: Path) -> None:
    """A task needs two classes."""
    path = tmp_path / "task.toml"
    path.write_text('name = "grade"\ncolumn = "birads"\n[[classes]]\nname = "low"\nvalues = ["2"]\n')
    with pytest.raises(Misconfigured, match="two classes"):
        tasks.read(path)


def test_a_blend_is_the_mean_of_its_runs(tmp_path: Path) -> None:
    """A blend holds the mean of the averaged weights, and says every source that any run saw."""
    paths = []
    for value, source in ((0.0, "busbra"), (1.0, "busi")):
        path = tmp_path / f"{source}.safetensors"
        checkpoint.write(path, {"average.w": torch.full((3,), value)}, {"step": 1, "settings": {"sources": [source]}})
        paths.append(path)
    tensors, notes = checkpoint.blend(paths, [0.3, 0.7])
    assert torch.allclose(tensors["average.w"], torch.full((3,), 0.7))
    assert notes["settings"]["sources"] == ["busbra", "busi"]
    with pytest.raises(Misconfigured, match="sum to one"):
        checkpoint.blend(paths, [0.3, 0.3])
