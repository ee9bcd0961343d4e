"""Train the autoencoder: set up, restore, loop (report, save, step); then fix the scale of its latents.

Rules:
- It sees the training split alone, whole images mirrored and shifted, so that no cell's place is special.
- It holds its images in memory, and so never more than a fair sample of them: a code of a million weights needs no
  more, however many images the flow will stream.
- Without the ImageNet encoder's weights there is no perceptual loss, and the run's settings say so.
- Everything that a step does follows from (settings, step).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from busgen_cds.errors import Misconfigured
from busgen_cds.learning import autoencoder, checkpoint, data, processes
from busgen_cds.learning.autoencoder import Autoencoder, Likeness, Shape
from busgen_cds.learning.generator import Generator

CHECKPOINT = "autoencoder-run.safetensors"
WEIGHTS = "autoencoder.safetensors"
MOST = 50_000  # images that a run holds: 6.5 GB with their masks at 256 px


@dataclass(frozen=True)
class Settings:
    """All that decides what a run becomes."""

    sources: tuple[str, ...] = ("busbra", "busi")
    size: int = 128
    seed: int = 0
    steps: int = 4000
    batch: int = 16
    most: int = MOST  # images held
    rate: float = 6e-4
    warm_up: int = 100
    average: float = 0.998
    clip: float = 1.0
    likeness: float = 0.2  # weight of the perceptual difference
    divergence: float = 1e-4
    adversarial: float = 0.04  # weight of the discriminator's word
    adversarial_from: float = 0.6  # of the steps
    shift: int = 8  # pixels
    report_every: int = 500
    save_every: int = 250
    half: bool = True
    shape: Shape = field(default_factory=Shape)


PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {},
    "gpu": {
        "size": 256,
        "steps": 60_000,
        "batch": 32,
        "rate": 3e-4,
        "shape": Shape(channels=(192, 256), blocks=2, fine=24),
    },
}


def preset(presets: Mapping[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """What a preset sets."""
    if name not in presets:
        raise Misconfigured(f"There is no preset {name!r}: choose {' or '.join(presets)}.")
    return presets[name]


@dataclass(frozen=True)
class Report:
    step: int
    loss: float
    difference: float  # mean absolute difference on `val`, range -1..1
    images_per_second: float


@dataclass
class Run:
    """What a checkpoint holds."""

    coder: Autoencoder
    average: Autoencoder
    critic: nn.Module
    optimiser: torch.optim.Optimizer
    critic_optimiser: torch.optim.Optimizer
    step: int = 0


def train(
    root: Path,
    out: Path,
    settings: Settings,
    init: Path | None = None,
    cache: Path | None = None,
    tell: Callable[[Report], None] = lambda report: None,
) -> Path:
    """Train or go on; returns the finished weights. `init` is the ImageNet encoder (npz)."""
    with processes.team() as team:
        _train(root, out, settings, init, cache, tell, team)
    return out / WEIGHTS


def _train(
    root: Path,
    out: Path,
    settings: Settings,
    init: Path | None,
    cache: Path | None,
    tell: Callable[[Report], None],
    team: processes.Team,
) -> None:
    # Set up.
    if init is None:
        settings = dataclasses.replace(settings, likeness=0.0)
    images, val = hold(root, settings.sources, settings.size, settings.most, cache)
    if not len(images):
        raise Misconfigured(f"No training images of {', '.join(settings.sources)} in {root}.")
    run = begin(settings, team, images)

    # Restore.
    restore(out / CHECKPOINT, run, settings)
    if team.agree(run.step >= settings.steps and (out / WEIGHTS).exists()):
        return  # shards and flow know the file by its bytes, and another machine's arithmetic would write others
    likeness = Likeness(init).to(team.device) if init is not None and settings.likeness else None
    coder = team.parallel(run.coder)
    began, seen, loss = time.monotonic(), 0, math.nan

    # Loop.
    first = run.step
    while True:
        if run.step > first and team.leads:
            if run.step % settings.report_every == 0 or run.step == settings.steps:
                speed = seen / (time.monotonic() - began)
                tell(Report(run.step, loss, difference(run.average, val, team.device), speed))
            if run.step % settings.save_every == 0 or run.step == settings.steps:
                save(out / CHECKPOINT, run, settings)
        if run.step >= settings.steps:
            break
        image = batch(images, settings, run.step, team).to(team.device)
        loss = step(run, coder, image, likeness, settings, team)
        seen += settings.batch

    # Fix the scale of the latents.
    if team.leads:
        scale(run.average, images, team.device)
        checkpoint.write(out / WEIGHTS, run.average.state_dict(), {"settings": describe(settings)})


def hold(
    root: Path, sources: Sequence[str], size: int, most: int, cache: Path | None
) -> tuple[data.Images, data.Images]:
    """The images that train, and those that judge: all of them, or a fair sample of so many."""
    rows = [row for row in data.read_manifest(root) if row.source in sources]
    chosen = [data.sample([row for row in rows if row.split == split], most) for split in ("train", "val")]
    return data.load(root, chosen[0], cache, size), data.load(root, chosen[1], cache, size)


def begin(settings: Settings, team: processes.Team, images: data.Images | None = None) -> Run:
    """A run at its first step: the linear code of some images, where images are given."""
    torch.manual_seed(settings.seed)
    coder, average, critic = Autoencoder(settings.shape), Autoencoder(settings.shape), autoencoder.discriminator()
    if images is not None:
        some = images.image[:: max(1, len(images) // 400)]
        coder.begin_linear(autoencoder.signed(some))
    average.load_state_dict(coder.state_dict())
    for network in (coder, average, critic):
        network.to(team.device)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Run(
        coder,
        average,
        critic,
        torch.optim.AdamW(coder.parameters(), settings.rate, betas=(0.9, 0.98), weight_decay=1e-4),
        torch.optim.AdamW(critic.parameters(), settings.rate / 2, betas=(0.5, 0.98)),
    )


def batch(images: data.Images, settings: Settings, step: int, team: processes.Team) -> Tensor:
    """The images of one step (N, 1, S, S) in -1..1; this process's share."""
    rng = np.random.default_rng((settings.seed, step))
    index = rng.integers(0, len(images), settings.batch)[team.rank :: team.world]
    return moved(autoencoder.signed(images.image[index]), rng, settings.shift)


def moved(images: Tensor, rng: np.random.Generator, most: int) -> Tensor:
    """Each image shifted, and half of them mirrored."""
    shifts = [shifted(one, rng, most) for one in images]
    return torch.stack([one.flip(-1) if rng.random() < 0.5 else one for one in shifts])


def shifted(image: Tensor, rng: np.random.Generator, most: int) -> Tensor:
    """Moved by whole pixels, black where nothing was; the skin may move up, never down."""
    across, up = (int(x) for x in rng.integers((-most, 0), most + 1))
    padded = F.pad(image, (most, most, 0, most), value=-1.0)
    size = image.shape[-1]
    return padded[:, up : up + size, most + across : most + across + size]


def step(
    run: Run, coder: nn.Module, image: Tensor, likeness: Likeness | None, s: Settings, team: processes.Team
) -> float:
    """One step of the coder and, late in the run, of its critic; the step's loss."""
    generator = torch.Generator().manual_seed((s.seed * 1_000_003 + run.step) * 64 + team.rank)
    noise = torch.randn(
        len(image), s.shape.latent, *(n // autoencoder.FACTOR for n in image.shape[-2:]), generator=generator
    )
    judged = s.adversarial > 0 and run.step >= s.adversarial_from * s.steps
    with torch.autocast(team.device.type, torch.bfloat16, enabled=s.half):
        back, divergence = coder(image, noise.to(team.device))
        loss = (back - image).abs().mean() + s.divergence * divergence
        if likeness is not None:
            loss = loss + s.likeness * likeness(back, image)
        if judged:
            loss = loss - s.adversarial * run.critic(back)[-1].float().mean()
    if not torch.isfinite(loss):
        raise Misconfigured(
            f"The loss at step {run.step} is not a number; the last checkpoint is kept. Lower the rate."
        )
    loss.backward()
    descend(run.coder, run.optimiser, s.rate * pace(run.step, s), s.clip)
    if judged:
        with torch.autocast(team.device.type, torch.bfloat16, enabled=s.half):
            told = autoencoder.hinge(run.critic(image)[-1].float(), run.critic(back.detach())[-1].float())
        run.critic_optimiser.zero_grad(set_to_none=True)  # the coder's step left its own gradients there
        told.backward()  # type: ignore[no-untyped-call]
        team.share_gradients(run.critic)
        descend(run.critic, run.critic_optimiser, s.rate / 2, s.clip)
    run.step += 1
    keep = min(s.average, run.step / (run.step + 10))
    with torch.no_grad():
        torch._foreach_lerp_(list(run.average.parameters()), list(run.coder.parameters()), 1 - keep)
    return float(loss.detach())


def descend(network: nn.Module, optimiser: torch.optim.Optimizer, rate: float, clip: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate
    nn.utils.clip_grad_norm_(network.parameters(), clip)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def pace(step: int, settings: Settings) -> float:
    """Warm-up, then a half cosine down to a tenth."""
    return min(1.0, (step + 1) / settings.warm_up) * (0.55 + 0.45 * math.cos(math.pi * step / settings.steps))


@torch.inference_mode()
def difference(coder: Autoencoder, images: data.Images, device: torch.device) -> float:
    """Mean absolute difference of image and reconstruction, range -1..1."""
    coder.eval()
    total = [math.nan] if not len(images) else []
    for i in range(0, len(images), 32):
        image = autoencoder.signed(images.image[i : i + 32], device)
        total += (coder.decode(coder.encode(image)) - image).abs().mean((1, 2, 3)).tolist()
    return float(np.mean(total))


@torch.no_grad()
def scale(coder: Autoencoder, images: data.Images, device: torch.device) -> None:
    chosen = images.image[:: max(1, len(images) // 512)]
    latents = [coder.encode(autoencoder.signed(chosen[i : i + 32], device)) for i in range(0, len(chosen), 32)]
    coder.measure(torch.cat(latents))


def save(path: Path, run: Run, settings: Any, **notes: Any) -> None:
    """The run as it stands; `notes` are what else its recipe goes on with."""
    tensors = {f"coder.{k}": v for k, v in run.coder.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in run.average.state_dict().items()}
    tensors |= {f"critic.{k}": v for k, v in run.critic.state_dict().items()}
    tensors |= checkpoint.optimiser_tensors(run.optimiser)
    tensors |= {f"critic_{k}": v for k, v in checkpoint.optimiser_tensors(run.critic_optimiser).items()}
    checkpoint.write(path, tensors, {"step": run.step, "settings": describe(settings)} | notes)


def restore(path: Path, run: Run, settings: Any, **same: Any) -> dict[str, Any]:
    """Go on where the run stood, if it has the same settings and notes; returns its notes, none where no run was."""
    if not path.exists():
        return {}
    tensors, notes = checkpoint.read(path)
    then = {name: notes.get(name, value) for name, value in same.items()}
    same_settings(path, notes["settings"] | then, describe(settings) | same)
    run.coder.load_state_dict(checkpoint.part(tensors, "coder."))
    run.average.load_state_dict(checkpoint.part(tensors, "average."))
    run.critic.load_state_dict(checkpoint.part(tensors, "critic."))
    checkpoint.restore_optimiser(run.optimiser, tensors)
    checkpoint.restore_optimiser(
        run.critic_optimiser, {k.removeprefix("critic_"): v for k, v in tensors.items() if k.startswith("critic_")}
    )
    run.step = int(notes["step"])
    return notes


def same_settings(path: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """A run goes on with the settings it began with."""
    changed = [name for name in now if then.get(name) != now[name]]
    if changed:
        raise Misconfigured(f"{path} was trained with other settings ({', '.join(changed)}): choose another folder.")


def describe(settings: Any) -> dict[str, Any]:
    """Settings as JSON knows them."""
    return {name: _plain(value) for name, value in dataclasses.asdict(settings).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def learnt_from(path: Path) -> tuple[str, ...]:
    """The sources of a finished autoencoder: its own, or all that its generator saw."""
    notes = checkpoint.read(path)[1]
    return tuple(notes["settings"]["sources"]) if "settings" in notes else Generator.card_of(path.parent).trained_on


def read_coder(path: Path) -> Autoencoder:
    """The finished autoencoder of a run, with the shape that its settings name; or that of a generator."""
    tensors, notes = checkpoint.read(path)
    if "settings" not in notes:  # a generator's card names its shape
        return Generator.load(path.parent, device="cpu").coder
    shape: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in notes["settings"]["shape"].items()}
    coder = Autoencoder(Shape(**shape))
    coder.load_state_dict(tensors)
    return coder.eval()
