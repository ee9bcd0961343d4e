"""Train the reader: set up, restore, loop (report, save, step).

Rules:
- An arm is a list of sources and its training split; what is held out is checked before the first step.
- Everything that a step does follows from (settings, step): a run that was killed ends as if it had not been.
- Nothing here looks at a test split; the average of the weights is judged on `val`.

Run on several GPUs with `torchrun --nproc-per-node N -m busgen_cds train …`: every process takes its share of a batch.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from busgen_cds.errors import Misconfigured
from busgen_cds.learning import augment, checkpoint, data, figures, networks, processes
from busgen_cds.learning.processes import Team
from busgen_cds.learning.reader import MALIGNANCY, Reader, Reading, Shape
from busgen_cds.learning.tasks import Task

CHECKPOINT = "reader.safetensors"
BIRADS = ("2", "3", "4", "5")


@dataclass(frozen=True)
class Settings:
    """All that decides what a run becomes."""

    sources: tuple[str, ...] = ("busbra", "busi")
    seed: int = 0
    steps: int = 3500
    batch: int = 16
    size: int = 224
    warm_size: int = 160  # the first part of the run sees smaller images: twice as many in the same time
    warm_part: float = 0.45
    rate: float = 4e-4  # of the new layers
    encoder_rate: float = 2e-4
    warm_up: int = 150  # steps
    probe: float = 0.0  # the first part of the run, in which the encoder holds still (Kumar et al. 2022)
    still: int = 0  # first blocks of the encoder that never learn
    decay: float = 0.03
    clip: float = 2.0  # of the gradient's norm
    average: float = 0.997  # of the weights, per step
    smoothing: float = 0.05  # of the malignancy label
    weight_malignancy: float = 1.0
    weight_presence: float = 0.4
    weight_mask: float = 1.0
    weight_task: float = 0.2
    report_every: int = 250
    save_every: int = 250
    half: bool = True  # bfloat16 arithmetic, float32 weights
    threads: int = 0  # 0: as many as torch likes
    generated: float = 0.0  # share of every batch that a generator made
    anchor: float = 0.0  # of the way back to the weights before, after every step
    fold: tuple[int, int] | None = None  # (k, n): fold k of n is left out of BUS-BRA's patients
    shape: Shape = field(default_factory=Shape)
    strength: augment.Strength = field(default_factory=augment.Strength)
    tasks: tuple[Task, ...] = ()

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "size", "warm_size", "warm_up", "report_every", "save_every"):
            if getattr(self, name) < 1:
                raise Misconfigured(f"The setting {name} is {getattr(self, name)}: it is at least 1.")
        for name in ("size", "warm_size"):  # the mask's grid is a quarter of the image
            if getattr(self, name) % 4:
                raise Misconfigured(f"The setting {name} is {getattr(self, name)}: it is a multiple of 4.")


PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {},
    "gpu": {"size": 320, "warm_size": 224, "batch": 64, "steps": 12000, "rate": 8e-4, "encoder_rate": 4e-4},
}


@dataclass(frozen=True)
class Report:
    step: int
    loss: float
    images_per_second: float
    figures: dict[str, float]


def train(
    root: Path,
    out: Path,
    settings: Settings,
    init: Path | None = None,
    start: Path | None = None,
    cache: Path | None = None,
    tell: Callable[[Report], None] = lambda report: None,
    generated: Path | None = None,
) -> Path:
    """Train one arm; returns its checkpoint.

    `init` is an encoder (npz), `start` another run's checkpoint, `generated` a folder of generated images.
    """
    with processes.team() as team:
        return _train(root, out, settings, init, start, cache, tell, generated, team)


def _train(
    root: Path,
    out: Path,
    settings: Settings,
    init: Path | None,
    start: Path | None,
    cache: Path | None,
    tell: Callable[[Report], None],
    generated: Path | None,
    team: Team,
) -> Path:
    # Set up.
    if settings.threads:
        torch.set_num_threads(settings.threads)
    images, val = _load(root, settings, cache, generated)
    weights = data.balanced(images)
    if settings.generated:
        weights = data.with_share(weights, images, data.GENERATED, settings.generated)
    targets = Targets.of(images, settings)
    marks = augment.painted_marks(256, settings.size, settings.seed)

    torch.manual_seed(settings.seed)
    reader, average = Reader(shape_of(settings)), Reader(shape_of(settings))
    before = _begin(reader, settings, init, start)
    average.load_state_dict(reader.state_dict())
    for one in (reader, average):
        one.to(team.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = _optimiser(reader, settings)
    # L2-SP (Li et al., ICML 2018): what few images teach is held to the weights before
    anchors = [p.detach().clone() for p in reader.parameters()] if settings.anchor else []

    # Restore.
    path = out / CHECKPOINT
    if path.exists():
        first, before = _restore(path, reader, average, optimiser, settings)
    else:
        first = 0
    reader.encoder.hold(held(first, settings))
    network: nn.Module = _shared(reader, settings) if team.world > 1 else reader
    began, seen, loss = time.monotonic(), 0, math.nan

    # Loop.
    for step in range(first, settings.steps + 1):
        if team.leads and step > first and _due(step, settings.report_every, settings):
            measured = judge(average, val, settings, team.device)
            tell(Report(step, loss, seen / (time.monotonic() - began), measured))
        if team.leads and step > first and _due(step, settings.save_every, settings):
            save(path, reader, average, optimiser, settings, step, before)
        if step == settings.steps:
            break
        if step > first and held(step, settings) != held(step - 1, settings):
            reader.encoder.hold(held(step, settings))
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * _pace(step, settings)
        batch = make_batch(images, targets, weights, marks, settings, step, team.rank, team.world)
        loss = _step(network, reader, average, optimiser, batch, settings, step, team.device)
        if anchors:
            with torch.no_grad():
                torch._foreach_lerp_(list(reader.parameters()), anchors, settings.anchor)
        seen += settings.batch
    return path


def _load(
    root: Path, settings: Settings, cache: Path | None, generated: Path | None
) -> tuple[data.Images, data.Images]:
    """The images that train, and those that judge."""
    rows = data.read_manifest(root)
    train_rows, val_rows = choose(rows, settings)
    data.check_arm(train_rows, rows, folds=settings.fold is not None)
    if settings.generated and generated is None:
        raise Misconfigured("A share of generated images needs the folder where they lie.")
    if settings.generated and generated is not None:
        train_rows = train_rows + data.read_generated(generated)
    return data.load(root, train_rows, cache, settings.size), data.load(root, val_rows, cache, settings.size)


def _due(step: int, every: int, settings: Settings) -> bool:
    return step % every == 0 or step == settings.steps


def held(step: int, settings: Settings) -> int | None:
    """How many of the encoder's blocks hold still; None: all of it."""
    return None if step < settings.probe * settings.steps else settings.still


def _shared(reader: Reader, settings: Settings) -> nn.Module:
    held = settings.probe > 0 or settings.still > 0  # what holds still has no gradient to wait for
    return nn.parallel.DistributedDataParallel(reader, find_unused_parameters=held)


def choose(rows: list[data.Row], settings: Settings) -> tuple[list[data.Row], list[data.Row]]:
    """The rows that train, and those that judge."""
    mine = [row for row in rows if row.source in settings.sources and row.split != "excluded"]
    if settings.fold is None:
        training = [row for row in mine if row.split == "train"]
        val = [row for row in mine if row.split == "val"]
    else:
        k, n = settings.fold
        training = [row for row in mine if data.fold_of(row.patient, n) != k]
        val = [row for row in mine if data.fold_of(row.patient, n) == k]
    if not training or not val:
        raise Misconfigured(f"No rows to train or to judge on for the sources {', '.join(settings.sources)}.")
    return training, val


def shape_of(settings: Settings) -> Shape:
    heads = {"birads": len(BIRADS)}
    for task in settings.tasks:
        if task.name in (MALIGNANCY, *heads) or not networks.nameable(task.name):
            raise Misconfigured(
                f"A task cannot be called {task.name!r}: the reader has that name already. Choose another."
            )
        heads[task.name] = len(task.classes)
    return dataclasses.replace(settings.shape, tasks=heads)


@dataclass(frozen=True)
class Targets:
    """What each training image is known to be; -1 or weight 0 where it is not known."""

    malignant: Tensor
    present: Tensor
    masked: Tensor
    tasks: dict[str, Tensor]

    @classmethod
    def of(cls, images: data.Images, settings: Settings) -> Targets:
        grades = [BIRADS.index(g) if (g := row.labels.get("birads", "")) in BIRADS else -1 for row in images.rows]
        tasks = {"birads": torch.tensor(grades)}
        tasks.update({task.name: torch.tensor(task.targets(images.rows)) for task in settings.tasks})
        return cls(
            torch.from_numpy(images.malignant), torch.from_numpy(images.lesion), torch.from_numpy(images.masked), tasks
        )


@dataclass(frozen=True)
class Batch:
    image: Tensor  # (N, 1, s, s)
    outline: Tensor  # (N, 1, s, s)
    malignant: Tensor
    present: Tensor
    masked: Tensor
    tasks: dict[str, Tensor]


def make_batch(
    images: data.Images,
    targets: Targets,
    weights: np.ndarray,
    marks: Tensor,
    settings: Settings,
    step: int,
    rank: int = 0,
    world: int = 1,
) -> Batch:
    """The images of one step, changed as augmentation wills; this process's share of them."""
    index = data.draw(weights, settings.batch, settings.seed, step)[rank::world]
    rng = np.random.default_rng((settings.seed, step, rank, 1))
    generator = torch.Generator().manual_seed((settings.seed * 1_000_003 + step) * 64 + rank)
    healed = [augment.heal(images.image[i], images.mask[i], rng, settings.strength) for i in index]
    gone = torch.tensor([bool(h[2]) for h in healed])
    image = torch.from_numpy(np.stack([h[0] for h in healed]))[:, None].float() / 255
    outline = torch.from_numpy(np.stack([h[1] for h in healed]))[:, None].float() / 255
    size = settings.warm_size if step < settings.warm_part * settings.steps else settings.size
    image, outline = augment.augment(image, outline, marks, generator, settings.strength, size)
    return Batch(
        image,
        outline,
        torch.where(gone, 0, targets.malignant[index]),
        torch.where(gone, 0, targets.present[index]),
        targets.masked[index],
        {name: torch.where(gone, -1, values[index]) for name, values in targets.tasks.items()},
    )


def losses(reading: Reading, batch: Batch, settings: Settings) -> dict[str, Tensor]:
    """What each answer got wrong, already weighed."""
    malignant = batch.malignant.float() * (1 - settings.smoothing) + settings.smoothing / 2
    outline = F.interpolate(batch.outline, scale_factor=0.5, mode="area")
    terms = {
        "malignancy": settings.weight_malignancy * F.binary_cross_entropy_with_logits(reading.malignancy, malignant),
        "presence": settings.weight_presence
        * F.binary_cross_entropy_with_logits(reading.presence, batch.present.float()),
        "mask": settings.weight_mask * outline_loss(reading.mask, outline, batch.masked),
    }
    for name, logits in reading.tasks.items():
        target = batch.tasks[name].clamp(min=-1)
        if (target >= 0).any():
            terms[name] = settings.weight_task * F.cross_entropy(logits, target, ignore_index=-1, label_smoothing=0.1)
    return terms


def outline_loss(logits: Tensor, outline: Tensor, known: Tensor) -> Tensor:
    """Cross-entropy of each cell plus one minus Dice of each lesion, at stride 2."""
    logits = F.interpolate(logits, size=outline.shape[-2:], mode="bilinear", align_corners=False)
    cells = F.binary_cross_entropy_with_logits(logits, outline, reduction="none").mean((1, 2, 3))
    shown = logits.sigmoid()
    overlap = (shown * outline).sum((1, 2, 3))
    dice = 1 - (2 * overlap + 1) / (shown.sum((1, 2, 3)) + outline.sum((1, 2, 3)) + 1)
    lesion = (outline.sum((1, 2, 3)) > 8) * known
    whole = (2 * cells * known).sum() / known.sum().clamp(min=1)
    return whole + (dice * lesion).sum() / lesion.sum().clamp(min=1)


def _step(
    network: nn.Module,
    reader: Reader,
    average: Reader,
    optimiser: torch.optim.Optimizer,
    batch: Batch,
    settings: Settings,
    step: int,
    device: torch.device | str,
) -> float:
    torch.manual_seed(settings.seed * 1_000_003 + step)  # dropout, too, follows from (seed, step)
    reader.train()
    batch = _to(batch, device)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=settings.half):
        reading = network(batch.image.to(memory_format=torch.channels_last))
    terms = losses(reading, batch, settings)
    loss = sum(terms.values(), torch.zeros((), device=device))
    if not torch.isfinite(loss):
        bad = ", ".join(name for name, term in terms.items() if not torch.isfinite(term))
        raise Misconfigured(
            f"The loss at step {step} is not a number ({bad}). What was saved is kept: train in another folder with a"
            " lower rate, from this one's last checkpoint (--start) if there is one."
        )
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(reader.parameters(), settings.clip)
    optimiser.step()
    keep = min(settings.average, (step + 1) / (step + 10))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(reader.parameters()), 1 - keep)
    return loss.item()


def _to(batch: Batch, device: torch.device | str) -> Batch:
    moved = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    tasks = {name: values.to(device) for name, values in moved.pop("tasks").items()}
    return Batch(**{name: value.to(device) for name, value in moved.items()}, tasks=tasks)


def _pace(step: int, settings: Settings) -> float:
    """Warm-up, then a half cosine to nothing."""
    warm = min(1.0, (step + 1) / settings.warm_up)
    return warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


def _optimiser(reader: Reader, settings: Settings) -> torch.optim.AdamW:
    """Weights decay, biases and norms do not; the encoder, which knows something already, moves slower."""
    groups = []
    for inner, rate in ((True, settings.encoder_rate), (False, settings.rate)):
        named = [(n, p) for n, p in reader.named_parameters() if n.startswith("encoder.") == inner]
        for decays in (True, False):
            chosen = [p for _, p in named if (p.ndim > 1) == decays]
            groups.append({"params": chosen, "peak": rate, "weight_decay": settings.decay if decays else 0.0})
    return torch.optim.AdamW(groups, lr=settings.rate, foreach=True)


def _begin(reader: Reader, settings: Settings, init: Path | None, start: Path | None) -> list[str]:
    """Give the reader its first weights; returns the sources that these have seen."""
    if start is not None:
        tensors, notes = checkpoint.read_run(start)
        theirs, fold = notes["settings"].get("shape", {}).get("encoder", "mobilenet"), notes["settings"].get("fold")
        if theirs != reader.shape.encoder:
            raise Misconfigured(f"{start} stands on the encoder {theirs}: go on from it with --encoder {theirs}.")
        if (settings.fold or fold) and fold != (list(settings.fold) if settings.fold else None):
            raise Misconfigured(f"{start} has seen patients that this run leaves out: start from a run of its fold.")
        known = reader.state_dict()
        taken = {k: v for k, v in checkpoint.part(tensors, "average.").items() if k in known}
        reader.load_state_dict({**known, **taken})
        return checkpoint.sources(notes)
    if init is not None:
        if not init.is_file():
            raise Misconfigured(f"The starting weights {init} are missing.")
        reader.encoder.start_from(init)
    return []


def _restore(
    path: Path, reader: Reader, average: Reader, optimiser: torch.optim.Optimizer, settings: Settings
) -> tuple[int, list[str]]:
    """The step to go on with, and the sources that the run's first weights had seen."""
    tensors, notes = checkpoint.read_run(path)
    asked = describe(settings)
    known = {**describe(Settings()), **notes["settings"]}  # a setting that did not exist yet was at its default
    changed = [k for k, v in asked.items() if known[k] != v]
    if changed:
        raise Misconfigured(f"{path} was trained with other settings ({', '.join(changed)}): choose another folder.")
    reader.load_state_dict(checkpoint.part(tensors, "reader."))
    average.load_state_dict(checkpoint.part(tensors, "average."))
    checkpoint.restore_optimiser(optimiser, tensors)
    return int(notes["step"]), list(notes.get("before", ()))


def save(
    path: Path,
    reader: Reader,
    average: Reader,
    optimiser: torch.optim.Optimizer,
    settings: Settings,
    step: int,
    before: Sequence[str] = (),
) -> None:
    """`before`: the sources that the weights it started from have seen."""
    tensors = {f"reader.{k}": v for k, v in reader.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.state_dict().items()}
    tensors |= checkpoint.optimiser_tensors(optimiser)
    checkpoint.write(path, tensors, {"step": step, "settings": describe(settings), "before": list(before)})


def describe(settings: Settings) -> dict[str, Any]:
    """The settings as JSON knows them, without what only concerns this machine."""
    described = dataclasses.asdict(settings)
    described.pop("threads")
    described["sources"] = list(settings.sources)
    described["tasks"] = [dataclasses.asdict(task) for task in settings.tasks]
    for task in described["tasks"]:
        task["classes"] = list(task["classes"])
    described["fold"] = list(settings.fold) if settings.fold else None
    return described


@torch.inference_mode()
def judge(reader: Reader, images: data.Images, settings: Settings, device: torch.device | str) -> dict[str, float]:
    """Quick figures on `val`: no intervals, no choice of thresholds."""
    reader.eval()
    score, presence, dice = [], [], []
    for i in range(0, len(images), 32):
        batch = torch.from_numpy(images.image[i : i + 32])[:, None].to(device).float() / 255
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=settings.half):
            reading = reader(batch.to(memory_format=torch.channels_last))
        score.append(reading.malignancy.float().cpu().numpy())
        presence.append(reading.presence.float().cpu().numpy())
        logits = F.interpolate(reading.mask.float().cpu(), scale_factor=4, mode="bilinear", align_corners=False)
        dice.append(figures.dice(logits[:, 0].numpy() > 0, images.mask[i : i + 32] > 127))
    scores, present, overlap = map(np.concatenate, (score, presence, dice))
    found: dict[str, float] = {}
    for source in settings.sources:
        mine = np.array([row.source == source for row in images.rows])
        drawn = mine & (images.lesion == 1) & (images.masked == 1)
        found[f"{source} auc"] = figures.auc(scores[mine], images.malignant[mine])
        found[f"{source} dice"] = float(overlap[drawn].mean()) if drawn.any() else math.nan
        found[f"{source} presence"] = figures.auc(present[mine], images.lesion[mine])
    return found
