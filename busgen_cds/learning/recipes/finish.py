"""Train the drawing half of a finished generator's autoencoder: set up, restore, loop (report, save, step).

Rules:
- The encoder and the scale of the latents are not touched: a flow that was trained on the latents stays valid.
- What a latent holds (grey values at a quarter of the resolution, features, the spectrum) is compared with the real
  image; what it cannot hold, the speckle, is only asked to look real: a critic sees drawn and real patches, in pixels
  and in the features of an ImageNet encoder.
- The critic's pull on the pictures is as strong as that of the comparison, so that neither drowns the other.
- It sees the training split alone, of the sources that the generator learnt from.

Critic: Sauer et al. 2021 (arXiv 2111.01007); hinge loss: Lim and Ye 2017.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from busgen_cds.errors import Misconfigured
from busgen_cds.learning import autoencoder, data, fidelity
from busgen_cds.learning.autoencoder import Autoencoder
from busgen_cds.learning.encoders import Encoder
from busgen_cds.learning.generator import Generator
from busgen_cds.learning.recipes import autoencode

CHECKPOINT = "finish-run.safetensors"
RESULT = "generator"
WEIGH_EVERY = 10  # steps
LOW = 4  # pixels: below this the latent says what is there


@dataclass(frozen=True)
class Settings:
    """All that decides what a run becomes."""

    sources: tuple[str, ...] = ("busbra", "busi")
    size: int = 128
    seed: int = 0
    steps: int = 2500
    batch: int = 8
    most: int = autoencode.MOST  # images held
    rate: float = 2e-4
    critic_rate: float = 6e-4
    warm_up: int = 50
    average: float = 0.997
    channels: int = 48  # of the last touch
    exact: float = 0.2  # weight of the difference at full resolution
    likeness: float = 0.1  # weight of the difference in features
    spectrum: float = 0.1  # weight of the difference of the spectra
    pull: float = 1.0  # of the critic, relative to the comparison's
    shift: int = 8  # pixels
    report_every: int = 250
    save_every: int = 250
    half: bool = True


@dataclass(frozen=True)
class Report:
    step: int
    difference: float  # mean absolute difference on `val`, range -1..1
    spectrum: float  # mean difference of the logarithmic power of `val`, over frequencies
    critic: float  # mean hinge loss since the last report; 2: it cannot tell
    images_per_second: float


class Critic(nn.Module):
    """Real or drawn, patch by patch: from pixels, and from the encoder's features at strides 4, 8 and 16."""

    def __init__(self, width: int = 48, features: tuple[int, ...] = (24, 32, 96)) -> None:
        super().__init__()
        self.pixels = nn.Sequential(
            nn.Conv2d(4, width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 3, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 2 * width, 3, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 3, padding=1),
        )
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(n, 3 * width, 3, padding=1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(3 * width, 2 * width, 1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(2 * width, 1, 1),
            )
            for n in features
        )

    def forward(self, image: Tensor, features: list[Tensor]) -> list[Tensor]:
        words = [self.pixels(F.pixel_unshuffle(image, 2))]
        return words + [head(f) for head, f in zip(self.heads, features, strict=False)]


@dataclass
class Run(autoencode.Run):
    """What a checkpoint holds."""

    ratio: float = 0.0  # of the comparison's pull on the pictures to the critic's
    told: list[float] = field(default_factory=list)


def train(
    start: Path,
    root: Path,
    out: Path,
    settings: Settings,
    init: Path,
    cache: Path | None = None,
    tell: Callable[[Report], None] = lambda report: None,
) -> Path:
    """Train or go on; returns the folder of the generator with the better drawing. `init`: the ImageNet encoder."""
    # Set up.
    makes = Generator.load(start)
    settings = dataclasses.replace(settings, sources=makes.card.trained_on, size=makes.card.size)
    images, val = autoencode.hold(root, settings.sources, settings.size, settings.most, cache)
    if not len(images) or not len(val):
        raise Misconfigured(f"No training or no validation images of {', '.join(settings.sources)} in {root}.")
    device = makes.device
    eye = Encoder()
    eye.start_from(init)
    eye.to(device, memory_format=torch.channels_last).requires_grad_(False)  # type: ignore[call-overload]
    run = begin(makes.coder, settings, device)

    # Restore.
    digest = makes.digest  # a run's drawing belongs to one generator's latents
    if notes := autoencode.restore(out / CHECKPOINT, run, settings, generator=digest):
        run.ratio, run.told = notes["ratio"], notes["told"]
    began, first = time.monotonic(), run.step

    # Loop.
    while run.step < settings.steps:
        image = batch(images, settings, run.step).to(device)
        run.told.append(step(run, eye, image, settings))
        last = run.step == settings.steps
        if run.step % settings.report_every == 0 or last:
            speed = (run.step - first) * settings.batch / (time.monotonic() - began)
            difference, spectrum = unlike(run.average, val, device)
            tell(Report(run.step, difference, spectrum, float(np.mean(run.told)), speed))
            run.told.clear()
        if run.step % settings.save_every == 0 or last:
            notes = {"generator": digest, "ratio": run.ratio, "told": run.told}
            autoencode.save(out / CHECKPOINT, run, settings, **notes)

    # Join the better drawing to the flow as it was.
    card = dataclasses.replace(
        makes.card,
        autoencoder=run.average.shape,
        settings={**makes.card.settings, "finish": autoencode.describe(settings)},
    )
    Generator(card, run.average, makes.network, device).save(out / RESULT)
    return out / RESULT


def begin(old: Autoencoder, settings: Settings, device: torch.device) -> Run:
    """The old autoencoder; where it has no last touch, with one that does nothing yet."""
    torch.manual_seed(settings.seed)
    shape = dataclasses.replace(old.shape, finish=old.shape.finish or settings.channels)
    coder, average, critic = Autoencoder(shape), Autoencoder(shape), Critic()
    coder.load_state_dict(old.state_dict(), strict=False)
    average.load_state_dict(coder.state_dict())
    for network in (coder, average, critic):
        network.to(device)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    coder.requires_grad_(False)
    for part in coder.drawing_parts():
        part.requires_grad_(True)
    return Run(
        coder,
        average.eval(),
        critic,
        torch.optim.AdamW(
            [p for p in coder.parameters() if p.requires_grad], settings.rate, betas=(0.5, 0.99), weight_decay=1e-4
        ),
        torch.optim.AdamW(critic.parameters(), settings.critic_rate, betas=(0.5, 0.99), weight_decay=1e-4),
    )


def batch(images: data.Images, settings: Settings, step: int) -> Tensor:
    """The images of one step (N, 1, S, S) in -1..1, mirrored and shifted."""
    rng = np.random.default_rng((settings.seed, 5, step))
    index = rng.integers(0, len(images), settings.batch)
    return autoencode.moved(autoencoder.signed(images.image[index]), rng, settings.shift)


def step(run: Run, eye: Encoder, image: Tensor, s: Settings) -> float:
    """One step of the drawing and one of its critic; the critic's loss."""
    pace = min(1.0, (run.step + 1) / s.warm_up, 2.05 - 2 * run.step / s.steps)  # warm-up; down from half-way on
    with torch.autocast(image.device.type, torch.bfloat16, enabled=s.half), torch.no_grad():
        seen = eye((image + 1) / 2)
    made, found = _draw_better(run, eye, image, seen, s, s.rate * pace)
    told = _look_closer(run, [image, made], [seen, found], s, s.critic_rate * pace)
    run.step += 1
    with torch.no_grad():
        keep = min(s.average, run.step / (run.step + 10))
        torch._foreach_lerp_(list(run.average.parameters()), [p.detach() for p in run.coder.parameters()], 1 - keep)
    return told


def _draw_better(
    run: Run, eye: Encoder, image: Tensor, seen: list[Tensor], s: Settings, rate: float
) -> tuple[Tensor, list[Tensor]]:
    """Make what is drawn more like the image, and more pleasing; what was drawn, and what the eye saw in it."""
    number = torch.Generator().manual_seed(s.seed * 1_000_003 + run.step)
    grain = torch.randn(image.shape, generator=number).to(image.device)
    run.critic.requires_grad_(False)
    with torch.autocast(image.device.type, torch.bfloat16, enabled=s.half):
        with torch.no_grad():
            latent = run.coder.encode(image)
        drawn = autoencoder.within(image, run.coder.draw(latent, grain))
        there = drawn.detach().requires_grad_(True)
        found = eye((there + 1) / 2)
        alike = F.l1_loss(F.avg_pool2d(there, LOW), F.avg_pool2d(image, LOW)) + s.exact * F.l1_loss(there, image)
        alike = alike + s.likeness * autoencoder.unlike_features(found, seen)
        alike = alike + s.spectrum * F.l1_loss(fidelity.spectra(there), fidelity.spectra(image))
        pleased = -torch.stack([word.float().mean() for word in run.critic(there, found)]).mean()
    run.critic.requires_grad_(True)
    if run.step % WEIGH_EVERY == 0:
        run.ratio = _pull(alike, there) / _pull(pleased, there)
    total = alike + s.pull * run.ratio * pleased
    if not torch.isfinite(total):
        raise Misconfigured(f"The loss at step {run.step} is not a number; the last checkpoint is kept.")
    total.backward()  # type: ignore[no-untyped-call]
    drawn.backward(there.grad)  # type: ignore[no-untyped-call]
    autoencode.descend(run.coder, run.optimiser, rate, 1.0)
    return there.detach(), [feature.detach() for feature in found]


def _look_closer(run: Run, images: list[Tensor], features: list[list[Tensor]], s: Settings, rate: float) -> float:
    """Make the critic tell real from drawn better; its loss."""
    with torch.autocast(images[0].device.type, torch.bfloat16, enabled=s.half):
        real, made = (run.critic(image, feature) for image, feature in zip(images, features, strict=True))
        told = torch.stack([autoencoder.hinge(r.float(), m.float()) for r, m in zip(real, made, strict=True)]).mean()
    told.backward()  # type: ignore[no-untyped-call]
    autoencode.descend(run.critic, run.critic_optimiser, rate, 10.0)
    return float(told.detach())


def _pull(loss: Tensor, pictures: Tensor) -> float:
    """How strongly a loss pulls at the pictures."""
    (gradient,) = torch.autograd.grad(loss, pictures, retain_graph=True)
    return float(gradient.norm().clamp(min=1e-12))


@torch.inference_mode()
def unlike(coder: Autoencoder, images: data.Images, device: torch.device) -> tuple[float, float]:
    """Absolute difference, and the distance of the spectra, of held-out images and what is drawn of their latents."""
    real, drawn = [], []
    for i in range(0, len(images), 32):
        image = autoencoder.signed(images.image[i : i + 32], device)
        grain = torch.randn(image.shape, generator=torch.Generator().manual_seed(i)).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            drawn.append(autoencoder.within(image, coder.draw(coder.encode(image), grain)))
        real.append(image)
    one, other = torch.cat(real), torch.cat(drawn)
    return float((one - other).abs().mean()), fidelity.spectral(one, other)
