"""Changes that leave a frame's truth as it is, made on whole batches.

Rules:
- Never a vertical flip: skin is at the top. Image and outline always move together.
- Everything comes from the generator that is handed in: the same seed gives the same batch.
- A lesion-free image may be made from any image: tissue of the same depth is laid over the lesion, and the same patch
  is laid elsewhere in other images, so that a seam tells nothing.
- Marks that a scanner or a person paints are painted at random over every class, so that they tell nothing either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Generator, Tensor


@dataclass(frozen=True)
class Strength:
    """How far each change may go; the figures are half-ranges or standard deviations."""

    angle: float = 12.0  # degrees
    zoom: float = 0.25  # natural logarithm
    aspect: float = 0.12  # natural logarithm
    shift: float = 0.08  # of the image's side
    focus: float = 0.25  # chance of a view centred on the lesion
    gamma: float = 0.25
    gain: float = 0.35  # natural logarithm, along the depth and across
    blur: float = 0.35  # chance
    noise: float = 0.5  # chance
    erase: float = 0.3  # chance
    marks: float = 0.4  # chance
    heal: float = 0.12  # chance that a lesion image becomes a lesion-free one

    def scaled(self, share: float) -> Strength:
        return Strength(**{name: share * value for name, value in vars(self).items()})


def uniform(generator: Generator, low: float, high: float, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def chance(generator: Generator, p: float, n: int) -> Tensor:
    return torch.rand(n, generator=generator) < p


def augment(
    image: Tensor, mask: Tensor, marks: Tensor, generator: Generator, strength: Strength, size: int
) -> tuple[Tensor, Tensor]:
    """(N, 1, S, S) in 0..1 and its outline → the same, changed, at `size`."""
    image, mask = move(image, mask, generator, strength, size)
    image = weather(image, generator, strength)
    image = paint(image, marks, generator, strength)
    return erase(image, mask, generator, strength), mask


def move(image: Tensor, mask: Tensor, generator: Generator, s: Strength, size: int) -> tuple[Tensor, Tensor]:
    """One affine map per image: mirrored, turned, stretched, shifted; now and then centred on the lesion."""
    n = len(image)
    flip = torch.where(chance(generator, 0.5, n), -1.0, 1.0)
    angle = uniform(generator, -1, 1, n) * s.angle * math.pi / 180
    zoom = torch.exp(uniform(generator, -s.zoom, s.zoom, n))
    aspect = torch.exp(uniform(generator, -s.aspect, s.aspect, n))
    shift = uniform(generator, -s.shift, s.shift, n, 2) * 2
    focused = chance(generator, s.focus, n) & (mask.sum((1, 2, 3)) > 20)
    centre, extent = _box(mask)
    # a focused view shows 1.6 to 3 times the lesion's box, and never less than 45 % of the image
    closeness = (extent * uniform(generator, 1.6, 3.0, n)).clamp(0.45, 1.0)
    zoom = torch.where(focused, closeness, zoom)
    middle = centre.clamp(-1, 1) * (1 - closeness[:, None]).clamp(min=0) / (1 - closeness[:, None] + 1e-6)
    shift = torch.where(focused[:, None], middle + 0.3 * shift, shift)
    cos, sin = torch.cos(angle), torch.sin(angle)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = cos * zoom * aspect * flip, -sin * zoom / aspect
    theta[:, 1, 0], theta[:, 1, 1] = sin * zoom * aspect * flip, cos * zoom / aspect
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, [n, 1, size, size], align_corners=False)
    both = F.grid_sample(torch.cat([image, mask], 1), grid, align_corners=False)
    return both[:, :1], both[:, 1:]


def _box(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Centre (x, y in -1..1) and longest side (share of the image) of each outline."""
    n, size = len(mask), mask.shape[-1]
    places = torch.arange(size, dtype=torch.float32)
    ends = []
    for axis in (2, 3):  # columns remain, then rows
        line = mask.amax(axis).reshape(n, size) > 0.5
        low = torch.where(line, places, torch.inf).amin(1)
        high = torch.where(line, places, -torch.inf).amax(1)
        ends.append((low.nan_to_num(posinf=0), high.nan_to_num(neginf=size - 1.0)))
    centre = torch.stack([(low + high + 1) / size - 1 for low, high in ends], 1)
    extent = torch.stack([(high - low + 1) / size for low, high in ends], 1).amax(1)
    return centre, extent


def weather(image: Tensor, generator: Generator, s: Strength) -> Tensor:
    """What another scanner, preset or operator would have changed: gains, gamma, resolution, speckle."""
    n, size = len(image), image.shape[-1]
    shown = image > 0.004  # the black surround stays black
    knots = uniform(generator, -s.gain, s.gain, n, 1, 4, 3)
    image = image * torch.exp(F.interpolate(knots, size=(size, size), mode="bicubic", align_corners=True))
    floor = uniform(generator, -0.04, 0.06, n, 1, 1, 1)
    gamma = torch.exp(uniform(generator, -1.6 * s.gamma, 1.6 * s.gamma, n, 1, 1, 1))
    image = ((image - floor) / (1 - floor)).clamp(1e-4, 1) ** gamma
    image = _soften(image, generator, s)
    grain = torch.randn(n, 1, size, size, generator=generator)
    coarse = torch.randn(n, 1, size // 2, size // 3, generator=generator)
    grain = 0.5 * grain + F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    amount = uniform(generator, 0, 0.16, n, 1, 1, 1) * chance(generator, s.noise, n)[:, None, None, None]
    return ((image * (1 + grain * amount) + 0.1 * grain * amount) * shown).clamp(0, 1)


def _soften(image: Tensor, generator: Generator, s: Strength) -> Tensor:
    """Blurred or sharpened, and sometimes at a coarser matrix."""
    n, size = len(image), image.shape[-1]
    blurred = F.avg_pool2d(F.avg_pool2d(image, 3, 1, 1, count_include_pad=False), 3, 1, 1, count_include_pad=False)
    share = uniform(generator, -0.6, 1.0, n, 1, 1, 1) * chance(generator, s.blur, n)[:, None, None, None]
    image = image + share * (blurred - image)
    coarse = int(size * float(uniform(generator, 0.45, 0.8, 1)))
    low = F.interpolate(image, size=(coarse, coarse), mode="bilinear", align_corners=False)
    low = F.interpolate(low, size=(size, size), mode="bilinear", align_corners=False)
    return torch.where(chance(generator, 0.15, n)[:, None, None, None], low, image).clamp(0, 1)


def paint(image: Tensor, marks: Tensor, generator: Generator, s: Strength) -> Tensor:
    """Lay painted marks over some images, moved and mirrored at random."""
    n, size = len(image), image.shape[-1]
    chosen = marks[torch.randint(len(marks), (n,), generator=generator)].float() / 255
    if chosen.shape[-1] != size:
        chosen = F.interpolate(chosen, size=(size, size), mode="bilinear", align_corners=False)
    shift = torch.randint(size, (2,), generator=generator)
    chosen = chosen.roll((int(shift[0]), int(shift[1])), (2, 3))
    ink = uniform(generator, 0.45, 1.0, n, 1, 1, 1)
    chosen = chosen * chance(generator, s.marks, n)[:, None, None, None]
    return image * (1 - chosen) + ink * chosen


def erase(image: Tensor, mask: Tensor, generator: Generator, s: Strength) -> Tensor:
    """Grey out a rectangle that leaves most of the lesion to be seen."""
    n, size = len(image), image.shape[-1]
    rows = torch.arange(size, dtype=torch.float32)
    top, left = uniform(generator, 0, 1, n, 1) * size, uniform(generator, 0, 1, n, 1) * size
    high, wide = uniform(generator, 0.08, 0.35, n, 1) * size, uniform(generator, 0.08, 0.35, n, 1) * size
    inside = ((rows >= top) & (rows < top + high))[:, :, None] & ((rows >= left) & (rows < left + wide))[:, None, :]
    covered = (mask[:, 0] * inside).sum((1, 2)) / mask[:, 0].sum((1, 2)).clamp(min=1)
    used = chance(generator, s.erase, n) & (covered < 0.25)
    shade = uniform(generator, 0, 0.5, n, 1, 1, 1)
    return torch.where((inside & used[:, None, None])[:, None], shade, image)


def heal(
    image: np.ndarray, mask: np.ndarray, rng: np.random.Generator, strength: Strength
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Now and then lay tissue of the same depth over the lesion (it is gone) or beside it (it stays).

    Returns the image, its outline, and whether the lesion is gone. Both 8-bit, (S, S).
    """
    dice = rng.random()
    if not mask.any() or dice > 2 * strength.heal:
        return image, mask, False
    ys, xs = np.nonzero(mask)
    pad = 6
    top, bottom = max(0, ys.min() - pad), min(mask.shape[0], ys.max() + 1 + pad)
    left, right = max(0, xs.min() - pad), min(mask.shape[1], xs.max() + 1 + pad)
    wide = right - left
    columns = np.flatnonzero(image[: max(1, ys.max())].max(0) > 12)  # the letter-box lends no tissue
    if not len(columns):
        return image, mask, False
    free = [x for x in range(columns[0], columns[-1] + 2 - wide) if x + wide <= left + pad or x >= right - pad]
    if not free:
        return image, mask, False
    source = int(rng.choice(free))
    target = left if dice < strength.heal else int(rng.choice(free))
    lent = image[top:bottom, source : source + wide].astype(np.float32)
    if rng.random() < 0.5:
        lent = lent[:, ::-1]
    soft = _soft_edge(lent.shape, pad)
    out = image.copy()
    under = out[top:bottom, target : target + wide].astype(np.float32)
    level = np.clip((under[soft < 0.5].mean() + 4) / (lent[soft < 0.5].mean() + 4), 0.6, 1.6)
    out[top:bottom, target : target + wide] = np.clip(under * (1 - soft) + lent * level * soft, 0, 255)
    gone = target == left
    return out, (np.zeros_like(mask) if gone else mask), gone


def _soft_edge(shape: tuple[int, int], pad: int) -> np.ndarray:
    ramps = [np.clip((np.minimum(np.arange(n), np.arange(n)[::-1]) + 0.5) / pad, 0, 1) for n in shape]
    return np.asarray(ramps[0][:, None] * ramps[1][None, :], np.float32)


def painted_marks(count: int, size: int, seed: int) -> Tensor:
    """(count, 1, size, size) 8-bit stencils: text, calipers, dotted lines, boxes, rulers, arrows."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([_stencil(rng, size) for _ in range(count)])[:, None])


def _stencil(rng: np.random.Generator, size: int) -> np.ndarray:
    sheet = Image.new("L", (size, size), 0)
    pen = ImageDraw.Draw(sheet)
    for _ in range(rng.integers(1, 5)):
        x, y = (int(v) for v in rng.integers(0, size, 2))
        kind = rng.integers(0, 6)
        reach = int(rng.integers(20, size // 2))
        turn = rng.uniform(-math.pi, math.pi)
        end = (x + reach * math.cos(turn), y + reach * math.sin(turn))
        if kind == 0:
            letters = "ABCDEFGHILMNOPRSTUV 0123456789.:cm+-/"
            text = "".join(letters[i] for i in rng.integers(0, len(letters), rng.integers(2, 14)))
            pen.text((x, y), text, fill=255, font=ImageFont.load_default(int(rng.integers(7, 15))))
        elif kind == 1:
            for px, py in ((x, y), end):
                arm = int(rng.integers(2, 6))
                pen.line((px - arm, py, px + arm, py), fill=255)
                pen.line((px, py - arm, px, py + arm), fill=255)
        elif kind == 2:
            step = float(rng.uniform(4, 9))
            for t in np.arange(0, reach, step):
                px, py = x + t * math.cos(turn), y + t * math.sin(turn)
                pen.rectangle((px, py, px + 1, py + 1), fill=255)
        elif kind == 3:
            pen.rectangle((x, y, x + reach, y + int(reach * rng.uniform(0.4, 1.2))), outline=255)
        elif kind == 4:
            for t in range(0, size, int(rng.integers(8, 20))):
                pen.line((x, t, x + 4, t), fill=255)
        else:
            pen.line((x, y, *end), fill=255, width=int(rng.integers(1, 3)))
    return np.asarray(sheet, np.uint8)
