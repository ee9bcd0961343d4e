"""Adapt the generator to a task from a few images: the backbone stays, low-rank adapters and labels learn.

Rules:
- The shots are whole patients; a quarter of them is held out, and training stops when their loss no longer falls.
- Nothing but the shots is looked at: no other image of the site, and never a test split.
- An adapter is a small safetensors file beside a card of its own; without training it changes nothing, to the bit.
- A surrogate label is called one, in the card too.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from busgen_cds import signing
from busgen_cds.errors import Misconfigured
from busgen_cds.learning import checkpoint, conditions, data, embed, networks, questions, release, tasks
from busgen_cds.learning.conditions import Box, Vocabulary
from busgen_cds.learning.generator import ADAPTER, Generator
from busgen_cds.learning.questions import Odds, Question
from busgen_cds.learning.recipes import encode
from busgen_cds.learning.recipes.autoencode import describe
from busgen_cds.learning.tasks import Task

CARD = "adapter.md"
FEWEST, MOST = 8, 64
NEVER = ("test", "device-test", "site-test", "excluded")


@dataclass(frozen=True)
class Settings:
    shots: int = 32
    rank: int = 8
    seed: int = 0
    steps: int = 600  # at most
    batch: int = 16
    rate: float = 4e-4
    views: int = 12  # of each shot
    held_out: float = 0.25  # of the shots' patients
    report_every: int = 25
    patience: int = 4  # reports without a lower held-out loss
    odds: Odds = dataclasses.field(default_factory=Odds)

    def __post_init__(self) -> None:
        for name in ("rank", "steps", "batch", "views", "report_every", "patience"):
            if getattr(self, name) < 1:
                raise Misconfigured(f"The adapter's {name} is a number from 1 on, not {getattr(self, name)}.")
        if self.seed < 0 or self.rate < 0 or not 0 < self.held_out < 1:
            raise Misconfigured("The adapter's seed and rate are from 0 on; the share held out is between 0 and 1.")


@dataclass(frozen=True)
class Source:
    """Where a task's shots come from."""

    task: Task
    sources: tuple[str, ...]
    splits: tuple[str, ...]
    classes: tuple[str, ...]
    most: int
    surrogate: str


@dataclass(frozen=True)
class Report:
    step: int
    loss: float
    held_out: float
    images_per_second: float


def read_task(path: Path) -> Source:
    """The reader's task file, and its [shots]."""
    task = tasks.read(path)
    if not networks.nameable(task.column):
        raise Misconfigured(
            f"{path}: the generator can learn no label that is called {task.column!r}; call the column otherwise, in"
            " the manifest too."
        )
    document: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    shots = document.get("shots", {})
    if not isinstance(shots, dict) or not isinstance(most := shots.get("most", MOST), int):
        raise Misconfigured(f"{path}: [shots] is a table, and its `most` a whole number.")
    splits = tasks.words(path, "splits", shots.get("splits", ("train",)))
    sealed = set(splits) & set(NEVER)
    if sealed:
        raise Misconfigured(f"{path}: shots may not come from the split {', '.join(sorted(sealed))}.")
    known = tuple(c.name for c in task.classes)
    classes = tasks.words(path, "classes", shots.get("classes", known))
    if not classes or set(classes) - set(known):
        raise Misconfigured(
            f"{path}: shots are of the classes {', '.join(known)}, not of {', '.join(classes) or 'none'}."
        )
    sources = tasks.words(path, "sources", shots.get("sources", ()))
    return Source(task, sources, splits, classes, most, str(document.get("surrogate", "")))


def choose(rows: Sequence[data.Row], source: Source, shots: int, seed: int) -> list[data.Row]:
    """K images, classes and their patients in turn; a lesion without an outline would be taught as none."""
    if not FEWEST <= shots <= min(MOST, source.most):
        raise Misconfigured(
            f"Shots are {FEWEST} to {min(MOST, source.most)} for the task {source.task.name}, not {shots}."
        )
    there = [row for row in rows if row.split in source.splits and (not source.sources or row.source in source.sources)]
    mine = [row for row in there if row.outlined]
    rng = np.random.default_rng(seed)
    waiting: dict[str, list[data.Row]] = {}
    for wanted in source.task.classes:
        if wanted.name not in source.classes:
            continue
        patients: dict[str, list[data.Row]] = {}
        for row in mine:
            if row.labels.get(source.task.column) in wanted.values:
                patients.setdefault(row.patient, []).append(row)
        groups = list(patients.values())
        waiting[wanted.name] = _in_turn([groups[i] for i in rng.permutation(len(groups))])
    chosen = _in_turn(list(waiting.values()))[:shots]
    if len(chosen) < FEWEST:
        bare = len(there) - len(mine)
        without = f" ({bare} lesions without an outline are left out)" if bare else ""
        raise Misconfigured(
            f"The task {source.task.name} finds {len(chosen)} images{without}; {FEWEST} are needed at least."
        )
    shown = {row.labels.get(source.task.column) for row in chosen}
    for wanted in source.task.classes:
        if wanted.name in source.classes and not shown & set(wanted.values):
            raise Misconfigured(
                f"None of the {len(chosen)} shots of the task {source.task.name} shows the class {wanted.name}"
                f" ({source.task.column} = {' or '.join(wanted.values)}): an adapter would learn the others alone."
            )
    return chosen


def _in_turn(groups: Sequence[Sequence[data.Row]]) -> list[data.Row]:
    """The first of every group, then the second of every group, and so on: a clip of twenty frames is one patient."""
    return [row for turn in itertools.zip_longest(*groups) for row in turn if row is not None]


def parted(rows: Sequence[data.Row], column: str, share: float, seed: int) -> tuple[list[data.Row], list[data.Row]]:
    """Shots that teach and shots that judge, no patient in both; what the last patient to show it is, is taught."""
    patients = sorted({row.patient for row in rows})
    if len(patients) < 4:
        raise Misconfigured(f"The shots show {len(patients)} patients; four are needed to hold one out.")
    teach, judge = list(rows), list[data.Row]()
    for i in np.random.default_rng((seed, 1)).permutation(len(patients)):
        rest = [row for row in teach if row.patient != patients[i]]
        if {row.labels[column] for row in rest} == {row.labels[column] for row in rows}:
            judge, teach = [row for row in rows if row not in rest], rest
        if len({row.patient for row in judge}) == max(1, round(share * len(patients))):
            break
    if not judge:
        raise Misconfigured("Every patient of the shots is the only one of a class: show more patients of each.")
    return teach, judge


def learnt_from(adapter: Path, rows: Sequence[data.Row], source: Source) -> list[data.Row]:
    """The images that taught an adapter, by its own word on how they were chosen; who judged it is not among them."""
    notes = checkpoint.read(adapter)[1]
    if "taught" not in notes:
        raise Misconfigured(f"{adapter} does not say which images taught it: make it anew with `busgen-cds fewshot`.")
    how = notes["settings"]
    shots = choose(rows, source, how["shots"], how["seed"])
    taught = parted(shots, source.task.column, how["held_out"], how["seed"])[0]
    if notes["task"] != source.task.name or notes["taught"] != _names(taught):
        raise Misconfigured(
            f"{adapter} was taught by other images, for the task {notes['task']}: name the task file and the data"
            " that it was made with."
        )
    return taught


def _names(rows: Sequence[data.Row]) -> str:
    """A digest of which images these are."""
    return signing.digest("\n".join(row.image for row in rows).encode())


def adapt(
    makes: Generator,
    root: Path,
    source: Source,
    out: Path,
    settings: Settings,
    cache: Path | None = None,
    tell: Callable[[Report], None] = lambda report: None,
    gate: release.Filter | None = None,
) -> Path:
    """Train an adapter; returns its file. `gate`: the generator's release filter, to which the shots are added."""
    # Set up.
    shots = choose(data.read_manifest(root), source, settings.shots, settings.seed)
    teach, judge = parted(shots, source.task.column, settings.held_out, settings.seed)
    vocabulary, generator = wider(makes.card.vocabulary, source, shots), makes.digest
    makes.network.conditions.grow(vocabulary)
    network = networks.adapt(makes.network, settings.rank)
    taught, judged = (views(makes, root, rows, settings, cache) for rows in (teach, judge))
    lessons = encode.encoded(makes.coder, teach, taught, vocabulary.names)
    judges = _judges(encode.encoded(makes.coder, judge, judged, vocabulary.names), vocabulary, makes, settings)
    free = [p for p in network.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(free, settings.rate, betas=(0.9, 0.99))
    best, since = held_out(makes, judges), 0
    kept = _copy(network)
    start = best
    tell(Report(0, math.nan, best, math.nan))
    began = time.monotonic()

    # Loop.
    step = 0
    for step in range(1, settings.steps + 1):
        loss = _step(makes, lessons, vocabulary, optimiser, free, settings, step)
        if step % settings.report_every and step < settings.steps:
            continue
        now = held_out(makes, judges)
        tell(Report(step, loss, now, step * settings.batch / (time.monotonic() - began)))
        since += 1
        if now < best:
            best, since, kept = now, 0, _copy(network)
        if since >= settings.patience:
            break

    # Keep.
    if gate is not None:
        seen = np.stack([view.image for shown in (*taught, *judged) for view in shown])
        gate.including(release.both_ways(embed.latent(makes.coder), seen)).save(out / release.FILE)
    networks.load_adapter_weights(network, kept)
    told = {"steps": step, "held_out_before": start, "held_out": best, "shots": len(shots)}
    notes = _notes(makes, vocabulary, lessons, source, settings, told)
    notes |= {"taught": _names(teach), "generator": generator}
    checkpoint.write(out / ADAPTER, {name: tensor.half() for name, tensor in kept.items()}, notes)
    (out / CARD).write_text(card(source, shots, settings, told, (out / ADAPTER).stat().st_size), encoding="utf-8")
    return out / ADAPTER


def wider(vocabulary: Vocabulary, source: Source, shots: Sequence[data.Row]) -> Vocabulary:
    """Room for devices that were never seen, and for the task's own label."""
    for row in shots:
        if row.labels.get("device"):
            vocabulary = vocabulary.with_label("device", row.labels["device"])
        if source.task.column not in ("pathology", "birads", "device"):
            vocabulary = vocabulary.with_label(source.task.column, row.labels[source.task.column])
    return vocabulary


def views(
    makes: Generator, root: Path, rows: Sequence[data.Row], settings: Settings, cache: Path | None
) -> list[list[encode.View]]:
    """Each shot in several views."""
    size = makes.card.size
    whole, double = data.load(root, rows, cache, size), data.load(root, rows, cache, 2 * size)
    how = encode.Settings(size=size, views=settings.views, seed=settings.seed)
    draws = [np.random.default_rng((settings.seed, i)) for i in range(len(rows))]
    return [[encode.view(whole, double, i, k, how, rng) for k in range(settings.views)] for i, rng in enumerate(draws)]


def _judges(
    images: list[encode.Encoded], vocabulary: Vocabulary, makes: Generator, settings: Settings
) -> list[Question]:
    generator = torch.Generator().manual_seed(settings.seed + 99)
    chosen = [images[i % len(images)] for i in range(max(64, len(images)))]
    return [
        questions.ask(chosen[i : i + 64], vocabulary, makes.card.size, settings.odds, generator)
        for i in range(0, len(chosen), 64)
    ]


@torch.inference_mode()
def held_out(makes: Generator, judges: Sequence[Question]) -> float:
    makes.network.eval()
    with torch.autocast(makes.device.type, torch.bfloat16):
        losses = [question.to(makes.device).loss(makes.network) for question in judges]
    return float(torch.cat(losses).mean())


def _step(
    makes: Generator,
    lessons: list[encode.Encoded],
    vocabulary: Vocabulary,
    optimiser: torch.optim.Optimizer,
    free: list[nn.Parameter],
    settings: Settings,
    step: int,
) -> float:
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    index = torch.randint(0, len(lessons), (settings.batch,), generator=generator).tolist()
    asked = questions.ask([lessons[i] for i in index], vocabulary, makes.card.size, settings.odds, generator)
    makes.network.train()
    with torch.autocast(makes.device.type, torch.bfloat16):
        loss = asked.to(makes.device).loss(makes.network).mean()
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(free, 1.0)
    optimiser.step()
    return float(loss.detach())


def _copy(network: networks.Network) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in networks.adapter_weights(network).items()}


def _notes(
    makes: Generator,
    vocabulary: Vocabulary,
    lessons: Sequence[encode.Encoded],
    source: Source,
    settings: Settings,
    told: dict[str, Any],
) -> dict[str, Any]:
    """What `Generator.load` needs besides the weights: labels, shapes, and boxes of the shots' kinds."""
    boxes: dict[str, list[Box]] = {}
    aspects: dict[str, list[float]] = {}
    for image in lessons:
        if image.box is not None and (image.labels["pathology"] or "") not in makes.card.boxes.boxes:
            boxes.setdefault(image.labels["pathology"] or "", []).append(image.box)
        if image.labels.get("device") and image.labels["device"] not in makes.card.regions.quantiles:
            aspects.setdefault(image.labels["device"] or "", []).append(image.height / image.width)
    regions = conditions.fit_regions(aspects).quantiles if aspects else {}
    return {
        "rank": settings.rank,
        "vocabulary": [[name, list(labels)] for name, labels in vocabulary.names.items()],
        "boxes": {name: np.array(b).round(4).tolist() for name, b in boxes.items()},
        "bandwidth": dict.fromkeys(boxes, conditions.UNTOLD),
        "regions": {name: list(q) for name, q in regions.items() if name},
        "task": source.task.name,
        "surrogate": source.surrogate,
        "settings": describe(settings),
        "told": json.loads(json.dumps(told)),
    }


def card(source: Source, shots: Sequence[data.Row], settings: Settings, told: dict[str, Any], size: int) -> str:
    """The adapter's own card."""
    column = source.task.column
    counts: dict[str, int] = {}
    for row in shots:
        counts[row.labels[column]] = counts.get(row.labels[column], 0) + 1
    devices = sorted({row.labels.get("device", "") for row in shots} - {""})
    warning = [f"**The label is a surrogate: {source.surrogate}.**", ""] if source.surrogate else []
    return "\n".join(
        [
            f"# Adapter of the generator for the task {source.task.name}",
            "",
            *warning,
            f"- **Learnt from** {len(shots)} images of {len({row.patient for row in shots})} patients"
            f" ({', '.join(source.sources) or 'any source'}; {', '.join(source.splits)}):"
            f" {', '.join(f'{n} {name}' for name, n in sorted(counts.items()))}.",
            f"- **Devices**: {', '.join(devices) or 'not said'}.",
            f"- **Held-out flow loss** {told['held_out_before']:.4f} before, {told['held_out']:.4f} after;"
            f" stopped after {told['steps']} steps.",
            f"- **Size** {size / 1e6:.1f} MB: low-rank adapters of rank {settings.rank} and the labels' embeddings;"
            " the backbone is untouched.",
            "- **Privacy**: audit this adapter apart (`busgen-cds privacy --adapter`) before any image of it is shared:"
            " few images are learnt by heart sooner than many.",
            "- **Use**: images made with it train a reader for this task; they diagnose nobody.",
            "",
        ]
    )
