"""The recipes that make a generator, at a size that takes seconds."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from busgen_cds.cli import generator as verbs
from busgen_cds.errors import Misconfigured
from busgen_cds.learning import checkpoint, conditions, data, networks, processes, questions
from busgen_cds.learning.conditions import Vocabulary
from busgen_cds.learning.generator import AUTOENCODER, CARD, Generator, Sampling
from busgen_cds.learning.recipes import audit, autoencode, encode, pretrain
from tests.learning.generators import CODER, NETWORKS, SIZE, data_folder, tiny

CODING = autoencode.Settings(
    sources=("painted",), size=SIZE, steps=6, batch=4, adversarial_from=0.5, report_every=3, save_every=2, shape=CODER
)
ENCODING = encode.Settings(sources=("painted",), size=SIZE, views=3, normal_views=4, shard=3)
LEARNING = pretrain.Settings(steps=6, batch=4, report_every=3, save_every=2, held_out=8, shape=NETWORKS["unet"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder, an autoencoder of six steps, and the shards it encoded."""
    folder = tmp_path_factory.mktemp("recipes")
    root = data_folder(folder / "data", patients=18)
    coder = autoencode.train(root, folder / "ae", CODING)
    encode.encode(root, coder, folder / "shards", ENCODING)
    return folder


def learn(made: Path, out: Path, settings: pretrain.Settings = LEARNING) -> list[pretrain.Report]:
    told: list[pretrain.Report] = []
    pretrain.train(made / "shards", made / "ae" / autoencode.WEIGHTS, out, settings, told.append)
    return told


def test_a_generator_comes_out_of_a_folder_of_images(made: Path, tmp_path: Path) -> None:
    """Images → autoencoder → shards → flow → a generator that answers, its card naming what it learnt from."""
    told = learn(made, tmp_path)
    makes = Generator.load(tmp_path / pretrain.RESULT, device="cpu")
    assert [report.step for report in told] == [3, 6]
    assert makes.card.trained_on == ("painted",) and makes.card.vocabulary.names["device"] == ("A", "B")
    one = makes.sample(pathology="malignant", device="B", sampling=Sampling(steps=2))[0]
    assert one.image.shape == one.mask.shape


def test_the_release_filter_knows_the_views_that_were_learnt_from(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The generator remembers how its shards were made; one from before remembers nothing, and is read as ever."""
    learn(made, tmp_path)
    makes, asked = Generator.load(tmp_path / pretrain.RESULT, device="cpu"), []
    views = encode.views
    monkeypatch.setattr(encode, "views", lambda *rest, **named: asked.append(rest[2]) or views(*rest, **named))
    audit.build_filter(makes, made / "data")
    makes.card = dataclasses.replace(makes.card, settings={})
    audit.build_filter(makes, made / "data")
    assert [(how.views, how.normal_views, how.size) for how in asked] == [(3, 4, SIZE), (4, 12, SIZE)]


def test_a_killed_autoencoder_run_goes_on_as_if_nothing_had_been(made: Path, tmp_path: Path) -> None:
    """Stopped half-way and resumed, the autoencoder's weights are those of an unbroken run, to the bit."""

    def stop(report: autoencode.Report) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        autoencode.train(made / "data", tmp_path, CODING, tell=stop)
    autoencode.train(made / "data", tmp_path, CODING)
    broken, whole = (autoencode.read_coder(f / autoencode.WEIGHTS) for f in (tmp_path, made / "ae"))
    assert all(
        torch.equal(a, b) for a, b in zip(broken.state_dict().values(), whole.state_dict().values(), strict=True)
    )


def test_a_finished_autoencoder_is_not_written_again(made: Path, tmp_path: Path) -> None:
    """Shards and flow know it by its bytes: another machine, whose arithmetic differs, leaves them theirs."""
    shutil.copytree(made / "ae", tmp_path / "ae")
    path = tmp_path / "ae" / autoencode.WEIGHTS
    tensors, notes = checkpoint.read(path)
    other = {name: tensor + 1e-7 for name, tensor in tensors.items()}
    checkpoint.write(path, other, notes)
    before = path.read_bytes()
    autoencode.train(made / "data", tmp_path / "ae", CODING)
    assert path.read_bytes() == before


def test_a_run_without_the_encoder_says_that_it_had_none(made: Path, tmp_path: Path) -> None:
    """What an autoencoder's loss was is in its settings, and a run does not go on with another."""
    assert checkpoint.read(made / "ae" / autoencode.WEIGHTS)[1]["settings"]["likeness"] == 0
    shutil.copytree(made / "ae", tmp_path / "ae")
    with pytest.raises(Misconfigured, match="likeness"):
        autoencode.train(made / "data", tmp_path / "ae", CODING, init=tmp_path / "encoder.npz")


def test_an_autoencoder_holds_no_more_images_than_it_may(made: Path) -> None:
    """Of millions it takes a fair sample, the same each time: memory does not grow with the data."""
    rows = data.read_manifest(made / "data")
    every = [row for row in rows if row.split == "train"]
    images, val = autoencode.hold(made / "data", ("painted",), SIZE, 5, None)
    again, _ = autoencode.hold(made / "data", ("painted",), SIZE, 5, None)
    assert len(images) == 5 and len(val) <= 5 and images.rows == again.rows
    assert list(images.rows) != every[:5]  # no list is in a fair order
    assert len(autoencode.hold(made / "data", ("painted",), SIZE, 10**6, None)[0]) == len(every)


def test_a_killed_flow_run_goes_on_to_the_same_loss(made: Path, tmp_path: Path) -> None:
    """Stopped after its first report and resumed, a run ends with the same held-out loss, to the bit."""
    whole = learn(made, tmp_path / "whole")

    def stop(report: pretrain.Report) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain.train(made / "shards", made / "ae" / autoencode.WEIGHTS, tmp_path / "broken", LEARNING, stop)
    again = learn(made, tmp_path / "broken")
    assert again[-1].held_out == whole[-1].held_out


@pytest.mark.slow
def test_two_processes_resume_to_the_same_loss(made: Path, tmp_path: Path) -> None:
    """Two processes train together; killed by a real signal and started again, they end with the same loss."""
    whole = together(made, tmp_path / "whole", kill_at=0)
    assert together(made, tmp_path / "broken", kill_at=3) is None
    assert together(made, tmp_path / "broken", kill_at=0) == whole
    both = [json.loads((tmp_path / "whole" / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    assert both[0] and both[1] and not set(both[0]) & set(both[1])  # in one epoch no shard is read twice


PROGRAM = """
import json, os, signal, sys
from pathlib import Path
from busgen_cds.learning.recipes import encode, pretrain
from tests.learning.test_pretrain import LEARNING
made, out, kill_at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
seen, read, step = [], encode.read, pretrain.step
def reading(path):
    if "train" in path.name: seen.append(path.name)
    return read(path)
def stepping(run, *rest):
    if kill_at and run.step == kill_at: os.kill(os.getpid(), signal.SIGKILL)
    return step(run, *rest)
encode.read, pretrain.step = reading, stepping
told = []
pretrain.train(made / "shards", made / "ae" / "autoencoder.safetensors", out, LEARNING, told.append)
rank = os.environ["RANK"]
(out / f"seen-{rank}.json").write_text(json.dumps(seen[:1]))
if rank == "0": (out / "loss.json").write_text(json.dumps(told[-1].held_out))
"""


def together(made: Path, out: Path, kill_at: int) -> float | None:
    program = out.parent / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    arguments = [str(program), str(made), str(out), str(kill_at)]
    ended = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=200)
    assert (ended.returncode == 0) == (kill_at == 0), ended.stderr[-2000:]
    return None if kill_at else float(json.loads((out / "loss.json").read_text()))


def test_a_step_on_a_fixed_seed_has_a_fixed_loss(made: Path, tmp_path: Path) -> None:
    """The same settings give the same losses; another seed gives others."""
    one, other = learn(made, tmp_path / "a"), learn(made, tmp_path / "b")
    assert [r.loss for r in one] == [r.loss for r in other]
    assert learn(made, tmp_path / "c", pretrain.Settings(**{**vars(LEARNING), "seed": 1}))[0].loss != one[0].loss


def test_a_run_keeps_its_settings(made: Path, tmp_path: Path) -> None:
    """A folder of a run is not gone on with under other settings; the change is named."""
    learn(made, tmp_path)
    with pytest.raises(Misconfigured, match="rate"):
        learn(made, tmp_path, pretrain.Settings(**{**vars(LEARNING), "rate": 1e-5}))


def test_training_stops_when_held_out_images_gain_nothing(made: Path, tmp_path: Path) -> None:
    """With a rate of zero nothing is gained, and the run ends after `patience` reports."""
    still = pretrain.Settings(**{**vars(LEARNING), "rate": 0.0, "steps": 30, "patience": 2})
    assert [report.step for report in learn(made, tmp_path, still)] == [3, 6, 9]


def test_a_wider_generator_starts_from_a_narrower_one(made: Path, tmp_path: Path) -> None:
    """Everything known is taken over, label by label; a label that is new keeps its own first embedding."""
    other = tiny()
    wider = Vocabulary({"pathology": ("benign", "malignant", "normal"), "birads": ("3",), "device": ("B", "C")})
    run = pretrain.begin(LEARNING, wider, processes.Team())
    fresh = run.network.conditions.tables["device"].weight[2].clone()  # type: ignore[union-attr, index]
    pretrain.begin_from(run, wider, other, LEARNING)
    ours, theirs = (n.conditions.tables for n in (run.average, other.network))
    assert torch.equal(ours["pathology"].weight[3], theirs["pathology"].weight[1])  # type: ignore[union-attr, index]
    assert torch.equal(run.network.conditions.tables["device"].weight[2], fresh)  # type: ignore[union-attr, index]
    assert torch.equal(run.network.net.out[2].conv.weight, other.network.net.out[2].conv.weight)  # type: ignore[union-attr]
    with pytest.raises(Misconfigured, match="another shape"):
        pretrain.begin_from(run, wider, tiny("transformer"), LEARNING)


def test_a_finished_generator_is_gone_on_from_with_its_own_autoencoder(made: Path, tmp_path: Path) -> None:
    """What ships can be trained on: its autoencoder encodes the images, and its flow is where the next one begins."""
    learn(made, tmp_path / "first")
    first = tmp_path / "first" / pretrain.RESULT
    coder = first / AUTOENCODER
    encode.encode(made / "data", coder, tmp_path / "shards", ENCODING)
    still = dataclasses.replace(LEARNING, rate=0.0, steps=3, decay=0.0)
    pretrain.train(tmp_path / "shards", coder, tmp_path / "next", still, start=first)
    one, other = (Generator.load(f, device="cpu") for f in (first, tmp_path / "next" / pretrain.RESULT))
    for name, weight in one.network.state_dict().items():
        assert torch.allclose(weight, other.network.state_dict()[name], atol=1e-3), name
    assert all(torch.equal(a, b) for a, b in zip(one.coder.parameters(), other.coder.parameters(), strict=True))


def test_a_generator_remembers_all_that_it_learnt_from(made: Path, tmp_path: Path) -> None:
    """Gone on with from another's weights or autoencoder, it says their sources too: none of them is external to it."""
    learn(made, tmp_path / "first")
    first = tmp_path / "first" / pretrain.RESULT
    started, coded = (tmp_path / name for name in ("started", "coded"))
    for folder, sources in ((started, ["busi"]), (coded, ["bus_uclm"])):
        shutil.copytree(first, folder)
        card = json.loads((folder / CARD).read_text())
        (folder / CARD).write_text(json.dumps(card | {"trained_on": sources}))
    encode.encode(made / "data", coded / AUTOENCODER, tmp_path / "shards", ENCODING)

    def go_on(start: Path | None) -> tuple[str, ...]:
        pretrain.train(tmp_path / "shards", coded / AUTOENCODER, tmp_path / "next", LEARNING, start=start)
        return Generator.load(tmp_path / "next" / pretrain.RESULT, device="cpu").card.trained_on

    assert go_on(started) == ("painted", "bus_uclm", "busi")
    assert set(go_on(None)) == {"painted", "bus_uclm", "busi"}  # called again, to go on


@pytest.mark.slow
def test_the_verb_spreads_over_processes(made: Path, tmp_path: Path) -> None:
    """Autoencoder, shards and flow are three pieces of work of one team, however unevenly its processes go."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\n"
        "from busgen_cds.learning import processes\n"
        "late = 0.5 * (os.environ['RANK'] == '0')\n"
        "with processes.team():\n"
        "    for _ in range(3):\n"
        "        with processes.team() as team:\n"
        "            time.sleep(late)\n"
        "            assert team.agree(team.rank == 0)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-2000:]


# Shards


def test_shards_hold_every_view_and_nobody_s_name(made: Path) -> None:
    """Every training image has its views; no patient, source file or date is in a shard or its index."""
    index = encode.read_index(made / "shards")
    images = [image for path, count in index.of("train") for image in encode.read(path)]
    assert len(images) == sum(count for _, count in index.of("train")) == 8 * 3 + 4 * 4
    assert images[0].latent.shape == (8, 8, 8) and images[0].outline.shape == (4, 8, 8)
    everything = b"".join(path.read_bytes() for path in (made / "shards").iterdir())
    assert b"images/" not in everything and b'"p1' not in everything


def test_a_lesion_without_an_outline_is_not_taught_as_none(made: Path, tmp_path: Path) -> None:
    """Its image is in no shard, and how many were left out is said; a normal image needs no outline."""
    root = shutil.copytree(made / "data", tmp_path / "data")
    manifest, said = root / "manifest.csv", []
    manifest.write_text(manifest.read_text().replace("images/4-mask.png", "").replace("images/14-mask.png", ""))
    encode.encode(root, made / "ae" / autoencode.WEIGHTS, tmp_path / "shards", ENCODING, say=said.append)
    index = encode.read_index(tmp_path / "shards")
    assert [sum(count for _, count in index.of(split)) for split in ("train", "val")] == [7 * 3 + 4 * 4, 5]
    assert said[0].startswith("2 images of lesions without an outline")


def test_encoding_goes_on_with_what_is_missing(made: Path, tmp_path: Path) -> None:
    """A second call writes only the shards that are not there, and they are the same bytes."""
    target = tmp_path / "shards"
    coder = made / "ae" / autoencode.WEIGHTS
    encode.encode(made / "data", coder, target, ENCODING)
    first = {path.name: path.read_bytes() for path in target.iterdir()}
    kept = (target / "train-000001.tar").stat().st_mtime_ns
    (target / "train-000000.tar").unlink()
    encode.encode(made / "data", coder, target, ENCODING)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == first
    assert (target / "train-000001.tar").stat().st_mtime_ns == kept


def test_latents_of_another_making_are_not_gone_on_with(made: Path, tmp_path: Path) -> None:
    """Shards that other settings or another autoencoder made are refused, not mixed with new ones."""
    target = shutil.copytree(made / "shards", tmp_path / "shards")
    coder = made / "ae" / autoencode.WEIGHTS
    with pytest.raises(Misconfigured, match=r"other settings \(see work.json: views\)"):
        encode.encode(made / "data", coder, target, dataclasses.replace(ENCODING, views=5))
    with pytest.raises(Misconfigured, match="autoencoder"):
        encode.encode(made / "data", another(coder, tmp_path), target, ENCODING)


def another(coder: Path, folder: Path) -> Path:
    """An autoencoder of the same shape with other weights."""
    tensors, notes = checkpoint.read(coder)
    checkpoint.write(folder / "other.safetensors", {name: t + 1 for name, t in tensors.items()}, notes)
    return folder / "other.safetensors"


def test_shards_of_an_edited_manifest_are_not_gone_on_with(made: Path, tmp_path: Path) -> None:
    """A label or an image that changed since the first shard was written is refused: the index would not fit."""
    root = shutil.copytree(made / "data", tmp_path / "data")
    manifest = root / "manifest.csv"
    manifest.write_text(manifest.read_text().replace("p4,benign,3,", "p4,benign,2,"))
    with pytest.raises(Misconfigured, match="rows"):
        encode.encode(root, made / "ae" / autoencode.WEIGHTS, made / "shards", ENCODING)


def test_a_flow_is_not_joined_to_another_autoencoder(made: Path, tmp_path: Path) -> None:
    """Shards of one autoencoder with the weights of another, or a run begun on its latents, are refused first."""
    other = another(made / "ae" / autoencode.WEIGHTS, tmp_path)
    with pytest.raises(Misconfigured, match=r"encoded by another autoencoder than .*name theirs with --coder"):
        pretrain.train(made / "shards", other, tmp_path / "run", LEARNING)
    assert not (tmp_path / "run").exists()
    learn(made, tmp_path / "run")
    encode.encode(made / "data", other, tmp_path / "shards", ENCODING)
    with pytest.raises(Misconfigured, match=r"other settings \(autoencoder\)"):
        pretrain.train(tmp_path / "shards", other, tmp_path / "run", LEARNING)


def test_the_priors_hold_so_many_boxes_and_no_more(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of millions of images, a bounded number of boxes and shapes is kept: the generator's card stays small."""
    monkeypatch.setattr(pretrain, "MOST_KEPT", 5)
    index, read, looked = encode.read_index(made / "shards"), encode.read, []
    monkeypatch.setattr(encode, "read", lambda path: looked.append(path) or read(path))
    boxes, aspects = pretrain.priors(index, "train")
    assert {len(each) for each in (*boxes.values(), *aspects.values())} == {5} and set(boxes) == {"benign", "malignant"}
    assert len(looked) < len(index.of("train"))  # what would add nothing is not read


def test_pretrain_says_which_presets_there_are(tmp_path: Path) -> None:
    """A preset that is not there is refused before anything is trained."""
    with pytest.raises(Misconfigured, match="no preset 'tpu': choose cpu or gpu"):
        verbs.pretrain(tmp_path, preset="tpu")


def test_pretrain_looks_at_the_shards_of_a_run_that_goes_on(made: Path) -> None:
    """Other sources than those of the shards that lie in the run's folder are refused, though its index is there."""
    with pytest.raises(Misconfigured, match=r"work\.json: .*sources"):
        verbs.pretrain(made, made / "data", "painted,busi", coder=made / "ae" / autoencode.WEIGHTS)


def test_every_image_is_seen_once_in_an_epoch(made: Path) -> None:
    """Two processes share an epoch without gap or repeat, and any step can be begun at."""
    shards = encode.read_index(made / "shards").of("train")
    total = sum(count for _, count in shards)
    seen = []
    for rank in (0, 1):
        order = pretrain.Stream(shards, 0, processes.Team(rank, 2), 4)._order(0)
        mine = sum(count for i, (_, count) in enumerate(shards))
        taken = 0
        for path, chosen in order:
            if taken + len(chosen) > mine or (rank, path) in seen:
                break
            seen.append((rank, path))
            taken += len(chosen)
            if len([1 for r, _ in seen if r == rank]) == len(np.arange(len(shards))[rank::2]):
                break
    assert len({path for _, path in seen}) == len(shards) and total > 0
    stream = pretrain.Stream(shards, 0, processes.Team(), 4)
    batches = stream.batches(0)
    third = [next(batches) for _ in range(3)][2]
    again = next(pretrain.Stream(shards, 0, processes.Team(), 4).batches(2))
    assert all(np.array_equal(a.latent, b.latent) for a, b in zip(third, again, strict=True))


def test_image_and_mask_are_mirrored_by_one_coin() -> None:
    """A mirrored view mirrors image and outline together, within the region, and never upside down."""
    rng = np.random.default_rng(0)
    place = conditions.placement(1.3, 64)
    image, mask = np.zeros((2, 64, 64), np.uint8)
    region = slice(place.left, place.left + place.columns)
    image[:, region] = rng.integers(0, 255, (64, place.columns))
    mask[20:40, place.left + 3 : place.left + 13] = 255
    turned = encode._mirrored(encode.View(image, mask, place))
    assert np.array_equal(turned.image[:, region], image[:, region][:, ::-1])
    assert np.array_equal(turned.mask[:, region], mask[:, region][:, ::-1])
    assert not turned.image[:, : place.left].any()


def test_a_close_up_keeps_the_lesion() -> None:
    """However close, a close-up never cuts a lesion."""
    mask = np.zeros((200, 150), np.uint8)
    mask[120:190, 10:140] = 255
    for seed in range(50):
        top, bottom, left, right = encode._frame(mask, 0.3, np.random.default_rng(seed))
        assert top <= 120 and bottom >= 190 and left <= 10 and right >= 140
        assert bottom <= 200 and right <= 150


# Questions


def test_what_is_told_is_not_asked(made: Path) -> None:
    """A question's loss looks only at what was not told, and labels are left out independently."""
    index = encode.read_index(made / "shards")
    images = [image for path, _ in index.of("train") for image in encode.read(path)] * 12
    odds = questions.Odds(drop=0.5, drop_all=0.0)
    question = questions.ask(images, Vocabulary(index.labels), SIZE, odds, torch.Generator().manual_seed(0))
    known = 1 - question.weight
    assert torch.equal(question.given.data, question.data * known)
    kinds = {tuple(k) for k in torch.stack([known[:, 0].amax((1, 2)), known[:, -1].amin((1, 2))], 1).tolist()}
    assert kinds == {(0.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, 0.0)}
    labels = question.given.labels
    said = labels[:, 0] > 0
    assert 0.35 < said.float().mean() < 0.65
    assert 0.3 < (labels[said, 2] > 0).float().mean() < 0.7  # the device does not follow the pathology's coin


def test_the_hole_holds_the_lesion(made: Path) -> None:
    """Where surroundings are known, no cell that the lesion's box touches is."""
    index = encode.read_index(made / "shards")
    images = [i for path, _ in index.of("train") for i in encode.read(path) if i.box]
    odds = questions.Odds(propose=1.0, paint=0.0, outline=0.0, box=1.0, drop_all=0.0)
    question = questions.ask(images, Vocabulary(index.labels), SIZE, odds, torch.Generator().manual_seed(0))
    assert not (question.given.where * (question.given.box > 0)).any()
    assert question.given.where.any()


def test_the_transformer_learns_by_the_same_recipe(made: Path, tmp_path: Path) -> None:
    """The transformer is a setting, not another recipe."""
    settings = pretrain.Settings(**{**vars(LEARNING), "shape": NETWORKS["transformer"], "steps": 3})
    assert learn(made, tmp_path, settings)[-1].step == 3
    assert isinstance(Generator.load(tmp_path / pretrain.RESULT, device="cpu").network, networks.Transformer)
