"""Train the flow on shards of latents: set up, restore, loop (report, save, step).

Rules:
- Made for millions: shards stream, each process reads its own, nothing is held but the shard at work and the next.
- Everything that a step does follows from (settings, step, rank): a run that was killed goes on to the same losses,
  to the bit on a CPU, with as many processes as before.
- What is kept is the average of the weights at its lowest held-out loss; training stops when that has not fallen
  for `patience` reports, because a generator that goes on from there learns its training images by heart.

`torchrun --nproc-per-node N -m busgen_cds pretrain …` spreads it over N devices, each with `batch` images a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from busgen_cds.errors import Misconfigured
from busgen_cds.learning import checkpoint, conditions, networks, processes, questions
from busgen_cds.learning.autoencoder import Autoencoder
from busgen_cds.learning.conditions import Box, Vocabulary
from busgen_cds.learning.generator import Card, Generator
from busgen_cds.learning.networks import Network
from busgen_cds.learning.questions import Odds, Question
from busgen_cds.learning.recipes import encode
from busgen_cds.learning.recipes.autoencode import describe, learnt_from, read_coder, same_settings

CHECKPOINT = "flow-run.safetensors"
BEST = "flow-best.safetensors"
RESULT = "generator"  # folder of the finished generator
MOST_KEPT = 16_384  # boxes of one pathology, and shapes of one device, that make a prior: more tell it nothing


@dataclass(frozen=True)
class Settings:
    """All that decides what a run becomes."""

    seed: int = 0
    steps: int = 6000
    batch: int = 32  # per process
    rate: float = 5e-4
    warm_up: int = 200
    decay: float = 0.01
    average: float = 0.997
    clip: float = 1.0
    report_every: int = 500
    save_every: int = 500
    patience: int = 8  # reports
    held_out: int = 256  # questions of the validation split that every report answers
    half: bool = True
    shape: networks.Shape = field(default_factory=lambda: networks.Shape(channels=(96, 160, 224)))
    odds: Odds = field(default_factory=Odds)


PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {},
    "gpu": {
        "steps": 200_000,
        "batch": 128,
        "rate": 2e-4,
        "warm_up": 2000,
        "average": 0.9999,
        "report_every": 2000,
        "save_every": 2000,
        "shape": networks.Shape(channels=(192, 320, 448), attention=(False, True, True), blocks=2),
    },
}


@dataclass(frozen=True)
class Report:
    step: int
    loss: float  # mean since the last report
    held_out: float  # of the average of the weights
    images_per_second: float  # of all processes


@dataclass
class Run:
    """What a checkpoint holds."""

    network: Network
    average: Network
    optimiser: torch.optim.Optimizer
    step: int = 0
    best: float = math.inf
    reports_since: int = 0
    learnt: tuple[str, ...] = ()  # every source that any part of the generator has seen


def train(
    shards: Path,
    coder: Path,
    out: Path,
    settings: Settings,
    tell: Callable[[Report], None] = lambda report: None,
    start: Path | None = None,
) -> Path:
    """Train or go on; returns the folder of the finished generator. `start`: another one with that autoencoder."""
    with processes.team() as team:
        _train(shards, coder, out, settings, tell, team, start)
    return out / RESULT


def _train(
    shards: Path,
    coder: Path,
    out: Path,
    settings: Settings,
    tell: Callable[[Report], None],
    team: processes.Team,
    start: Path | None,
) -> None:
    # Set up.
    index = encode.read_index(shards)
    draws = read_coder(coder)
    encode.check_coder(shards, coder)
    vocabulary = Vocabulary(index.labels)
    run = begin(settings, vocabulary, team)
    run.learnt = (*index.sources, *learnt_from(coder))
    if start is not None:
        other = Generator.load(start)
        begin_from(run, vocabulary, other, settings)
        run.learnt += other.card.trained_on
    images = Stream(index.of("train"), settings.seed, team, settings.batch)
    judges = held_out_questions(index, vocabulary, settings)

    # Restore.
    coded = encode.digest_of(coder)
    restore(out / CHECKPOINT, run, settings, team, coded)
    network = team.parallel(run.network)
    began, seen, losses = time.monotonic(), 0, [math.nan]

    # Loop.
    batches = images.batches(run.step)
    finished = run.step >= settings.steps or run.reports_since >= settings.patience
    while not finished:
        losses.append(step(run, network, next(batches), vocabulary, index.size, settings, team))
        seen += settings.batch * team.world
        last = run.step == settings.steps
        reports = run.step % settings.report_every == 0 or last
        if reports:
            loss = float(np.nanmean(losses)) if len(losses) > 1 else math.nan
            speed, losses = seen / (time.monotonic() - began), [math.nan]
            if team.leads:
                found = judge(run.average, judges, settings, team)
                tell(Report(run.step, loss, found, speed))
                keep_best(out, run, found)
        if team.leads and (run.step % settings.save_every == 0 or last):
            save(out / CHECKPOINT, run, settings, team, coded)
        finished = reports and team.agree(last or run.reports_since >= settings.patience)

    if team.leads:
        finish(out, run, index, vocabulary, draws, settings)


class Stream:
    """The images of a process, in an order that follows from the seed; any step can be begun at."""

    def __init__(self, shards: list[tuple[Path, int]], seed: int, team: processes.Team, batch: int) -> None:
        if len(shards) < team.world:
            raise Misconfigured(
                f"{len(shards)} shards cannot feed {team.world} processes: encode anew with as many, or start fewer."
            )
        self.shards, self.seed, self.team, self.batch = shards, seed, team, batch

    def batches(self, step: int) -> Iterator[list[encode.Encoded]]:
        """The batches from a step on, without end."""
        images = self._images(step * self.batch)
        while True:
            yield [next(images) for _ in range(self.batch)]

    def _images(self, skip: int) -> Iterator[encode.Encoded]:
        with ThreadPoolExecutor(1) as reader:  # the next shard is read while this one is used
            order = self._order(skip)
            path, chosen = next(order)
            coming = reader.submit(encode.read, path)
            while True:
                images, now = coming.result(), chosen
                path, chosen = next(order)
                coming = reader.submit(encode.read, path)
                for i in now:
                    yield images[i]

    def _order(self, skip: int) -> Iterator[tuple[Path, list[int]]]:
        """Every epoch deals the shards anew, and every shard its images; what was seen is not even read."""
        epoch = 0
        while True:
            rng = np.random.default_rng((self.seed, epoch))
            for shard in rng.permutation(len(self.shards))[self.team.rank :: self.team.world]:
                path, count = self.shards[shard]
                if skip >= count:
                    skip -= count
                    continue
                inner = np.random.default_rng((self.seed, epoch, int(shard))).permutation(count)
                yield path, inner[skip:].tolist()
                skip = 0
            epoch += 1


def begin(settings: Settings, vocabulary: Vocabulary, team: processes.Team) -> Run:
    torch.manual_seed(settings.seed)
    network, average = networks.build(settings.shape, vocabulary), networks.build(settings.shape, vocabulary)
    average.load_state_dict(network.state_dict())
    for one in (network, average):
        one.to(team.device)
        one.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average.requires_grad_(False)
    optimiser = torch.optim.AdamW(
        network.parameters(), settings.rate, betas=(0.9, 0.99), weight_decay=settings.decay, foreach=True
    )
    return Run(network, average, optimiser)


@torch.no_grad()
def begin_from(run: Run, vocabulary: Vocabulary, other: Generator, settings: Settings) -> None:
    """Take over another generator's flow; a label that it does not know keeps its own first embedding."""
    if other.card.network != settings.shape:
        raise Misconfigured("The generator to start from has another shape of network: train with its settings.")
    for network in (run.network, run.average):
        own = {id(table.weight) for table in network.conditions.tables.values()}
        for name, parameter in network.named_parameters():
            if id(parameter) not in own:
                parameter.copy_(other.network.get_parameter(name))
        for condition, theirs in other.network.conditions.tables.items():
            known = ("", *other.card.vocabulary.names[condition])
            for i, label in enumerate(("", *vocabulary.names.get(condition, ()))):
                if condition in vocabulary.names and label in known:
                    network.conditions.tables[condition].weight[i] = theirs.weight[known.index(label)]  # type: ignore[index, operator]


def step(
    run: Run,
    network: nn.Module,
    images: list[encode.Encoded],
    vocabulary: Vocabulary,
    size: int,
    s: Settings,
    team: processes.Team,
) -> float:
    """One step; the loss of this process."""
    generator = torch.Generator().manual_seed((s.seed * 1_000_003 + run.step) * 4096 + team.rank)
    question = questions.ask(images, vocabulary, size, s.odds, generator).to(team.device)
    with torch.autocast(team.device.type, torch.bfloat16, enabled=s.half):
        loss = question.loss(network).mean()  # type: ignore[arg-type]
    if not torch.isfinite(loss):
        raise Misconfigured(
            f"The loss at step {run.step} is not a number; the last checkpoint is kept. Lower the rate."
        )
    for group in run.optimiser.param_groups:
        group["lr"] = s.rate * pace(run.step, s)
    run.optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(run.network.parameters(), s.clip)
    run.optimiser.step()
    run.step += 1
    follow(run.average, run.network, min(s.average, run.step / (run.step + 10)))
    return float(loss.detach())


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, keep: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in network.parameters()], 1 - keep)


def pace(step: int, settings: Settings) -> float:
    """Warm-up, then a half cosine down to a twentieth."""
    warm = min(1.0, (step + 1) / settings.warm_up)
    return warm * (0.525 + 0.475 * math.cos(math.pi * step / settings.steps))


# Judging


def held_out_questions(index: encode.Index, vocabulary: Vocabulary, settings: Settings) -> list[Question]:
    """The same questions at every report, so that the losses can be compared."""
    images = [image for path, _ in index.of("val") for image in encode.read(path)]
    if not images:
        raise Misconfigured(f"No held-out images in {index.folder}: encode the split `val` as well.")
    generator = torch.Generator().manual_seed(12_345)
    chosen = [images[i % len(images)] for i in range(settings.held_out)]
    return [
        questions.ask(chosen[i : i + 64], vocabulary, index.size, settings.odds, generator)
        for i in range(0, len(chosen), 64)
    ]


@torch.inference_mode()
def judge(network: Network, judges: list[Question], settings: Settings, team: processes.Team) -> float:
    losses: list[Tensor] = []
    for question in judges:
        with torch.autocast(team.device.type, torch.bfloat16, enabled=settings.half):
            losses.append(question.to(team.device).loss(network))
    return float(torch.cat(losses).mean())


def keep_best(out: Path, run: Run, found: float) -> None:
    """Keep the averaged weights when they explain held-out images better than ever."""
    run.reports_since += 1
    if found < run.best:
        run.best, run.reports_since = found, 0
        checkpoint.write(out / BEST, run.average.state_dict(), {"step": run.step, "held_out": found})


# Keeping


def save(path: Path, run: Run, settings: Settings, team: processes.Team, coded: str) -> None:
    """The run as it stands; `coded` names the autoencoder of its latents."""
    tensors = {f"network.{k}": v for k, v in run.network.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in run.average.state_dict().items()}
    tensors |= checkpoint.optimiser_tensors(run.optimiser)
    notes = {
        "step": run.step,
        "best": run.best,
        "reports_since": run.reports_since,
        "world": team.world,
        "autoencoder": coded,
        "learnt": run.learnt,
        "settings": describe(settings),
    }
    checkpoint.write(path, tensors, notes)


def restore(path: Path, run: Run, settings: Settings, team: processes.Team, coded: str) -> None:
    """Go on where the run stood; nothing happens where none was."""
    if not path.exists():
        return
    tensors, notes = checkpoint.read(path)
    then = {"processes": notes["world"], "autoencoder": notes.get("autoencoder", coded)}
    now = {"processes": team.world, "autoencoder": coded}
    same_settings(path, notes["settings"] | then, describe(settings) | now)
    run.network.load_state_dict(checkpoint.part(tensors, "network."))
    run.average.load_state_dict(checkpoint.part(tensors, "average."))
    checkpoint.restore_optimiser(run.optimiser, tensors)
    run.step, run.best, run.reports_since = int(notes["step"]), float(notes["best"]), int(notes["reports_since"])
    run.learnt += tuple(notes.get("learnt", ()))


def finish(
    out: Path, run: Run, index: encode.Index, vocabulary: Vocabulary, coder: Autoencoder, settings: Settings
) -> None:
    """Join the best weights, the autoencoder and the priors to a generator that can be asked."""
    tensors, notes = checkpoint.read(out / BEST)
    run.average.load_state_dict(tensors)
    boxes, aspects = priors(index, "train")
    fitted = conditions.fit_boxes(boxes, priors(index, "val")[0])
    regions = conditions.fit_regions(aspects)
    told = {**describe(settings), "best_step": notes["step"], "held_out": notes["held_out"], "steps_done": run.step}
    told["encoded"] = encode.views_of(index.folder)
    learnt = tuple(dict.fromkeys(run.learnt))
    card = Card(index.size, coder.shape, settings.shape, vocabulary, fitted, regions, learnt, told)
    Generator(card, coder, run.average, "cpu").save(out / RESULT)


def priors(index: encode.Index, split: str) -> tuple[dict[str, list[Box]], dict[str, list[float]]]:
    """Boxes by pathology and heights over width by device: of the shards' first images, and nothing else of them."""
    lesions, devices = set(index.labels["pathology"]) - {"normal"}, index.labels.get("device") or ("",)
    boxes: dict[str, list[Box]] = {}
    aspects: dict[str, list[float]] = {}
    for path, _ in index.of(split):
        if _full(boxes, lesions) and _full(aspects, devices):
            break
        for image in encode.read(path):
            if image.box is not None:
                _keep(boxes, image.labels["pathology"] or "", image.box)
            _keep(aspects, image.labels.get("device") or "", image.height / image.width)
    return boxes, aspects


def _full(kept: dict[str, list[Any]], names: Iterable[str]) -> bool:
    return all(len(kept.get(name, ())) == MOST_KEPT for name in names)


def _keep(kept: dict[str, list[Any]], name: str, value: Any) -> None:
    values = kept.setdefault(name, [])
    if len(values) < MOST_KEPT:
        values.append(value)
