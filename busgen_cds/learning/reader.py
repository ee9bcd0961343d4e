"""The network that reads: lesion mask, presence, malignancy and its evidence map in one pass.

Rules:
- The malignancy logit is the exact sum of the evidence map plus one bias: what the map shows is what was scored.
- Evidence is weighed by the lesion mask, with a small uniform floor, so that a reader finds it in the lesion;
  what lies around the lesion still speaks through the receptive field.
- Every further task is one more head of the same shape: evidence, weighed, summed.
- Normalisation never mixes images of a batch: a frame's answer depends on that frame alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from busgen_cds.learning.encoders import DEEP, Encoder

MALIGNANCY = "malignancy"


@dataclass(frozen=True)
class Shape:
    """What must be known to build the network again."""

    encoder: str = "mobilenet"  # or lite0
    width: int = 96
    floor: float = 0.05  # share of the attention that is spread over the whole image
    quantum: float = 4.0  # cells of mask below which attention falls back to the whole image
    blind: float = 0.0  # share of training steps whose attention is even, so that evidence holds without a mask
    tasks: dict[str, int] = field(default_factory=lambda: {"birads": 4})  # further head → outputs


class Reading(NamedTuple):
    """One forward pass; N images, a grid of h x w at stride 4."""

    mask: Tensor  # (N, 1, h, w) logits
    presence: Tensor  # (N,) logit
    malignancy: Tensor  # (N,) logit
    heat: Tensor  # (N, h, w) signed evidence: heat.sum + bias = malignancy
    embedding: Tensor  # (N, D)
    tasks: dict[str, Tensor]  # (N, outputs) logits of each further head


def _norm(channels: int) -> nn.Module:
    return nn.GroupNorm(8, channels)


class Smooth(nn.Sequential):
    """A depth-wise separable convolution with its normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.Conv2d(width, width, 3, padding=1, groups=width),
            nn.Conv2d(width, width, 1, bias=False),
            _norm(width),
            nn.ReLU(),
        )


class Evidence(nn.Module):
    """Features at strides 8, 16 and 32 → a map of evidence at the attention's grid, weighed and summed."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Conv2d(c, outputs, 1, bias=False) for c in (width, width, DEEP))
        self.bias = nn.Parameter(torch.zeros(outputs))
        for conv in self.maps:
            nn.init.normal_(conv.weight, std=0.01)  # type: ignore[arg-type]

    def forward(self, features: list[Tensor], attention: Tensor) -> tuple[Tensor, Tensor]:
        grid = attention.shape[-2:]
        maps = [up(conv(f).float(), grid) for conv, f in zip(self.maps, features, strict=True)]
        heat = attention * (maps[0] + maps[1] + maps[2])  # (N, outputs, h, w)
        return heat.sum((2, 3)) + self.bias, heat


class Reader(nn.Module):
    def __init__(self, shape: Shape = Shape()) -> None:
        super().__init__()
        width, self.shape = shape.width, shape
        self.encoder = Encoder(shape.encoder)
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, width, 1, bias=False), _norm(width)) for c in self.encoder.channels
        )
        self.smooth = nn.ModuleList(Smooth(width) for _ in self.lateral)
        self.mask = nn.Conv2d(width, 1, 1)
        nn.init.constant_(self.mask.bias, -2.0)  # type: ignore[arg-type]
        self.tower = nn.ModuleList(Smooth(width) for _ in range(2))
        self.drop = nn.Dropout2d(0.2)
        self.presence = nn.Linear(DEEP + 2, 1)
        self.heads = nn.ModuleDict({MALIGNANCY: Evidence(width, 1)})
        self.heads.update({name: Evidence(width, n) for name, n in shape.tasks.items()})

    def forward(self, image: Tensor) -> Reading:
        taps = self.encoder(image)
        p4, p8, p16 = self._decode(taps)
        mask = self.mask(p4).float()
        features = [self.drop(f) for f in (self.tower[0](p8), self.tower[1](p16), taps[-1])]
        attention = attend(mask.detach(), self._floor(), self.shape.quantum)
        answers = {name: head(features, attention) for name, head in self.heads.items()}
        score, heat = answers.pop(MALIGNANCY)
        embedding = torch.cat([taps[2].mean((2, 3)), taps[3].mean((2, 3))], 1).float()
        presence = self._presence(features[-1], mask.detach())
        tasks = {name: logits for name, (logits, _) in answers.items()}
        return Reading(mask, presence, score[:, 0], heat[:, 0], embedding, tasks)

    def _floor(self) -> float:
        blind = self.training and self.shape.blind > 0 and float(torch.rand(())) < self.shape.blind
        return 1.0 if blind else self.shape.floor

    def _decode(self, taps: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """A feature pyramid (Lin et al. 2017): from stride 32 down to stride 4."""
        laterals = [lateral(tap) for lateral, tap in zip(self.lateral, taps, strict=True)]
        level, levels = self.smooth[3](laterals[3]), []
        for i in (2, 1, 0):
            level = self.smooth[i](laterals[i] + up(level, laterals[i].shape[-2:]))
            levels.append(level)
        return levels[2], levels[1], levels[0]

    def _presence(self, deep: Tensor, mask: Tensor) -> Tensor:
        area = torch.log1p(mask.sigmoid().sum((1, 2, 3)))
        peak = torch.logsumexp(mask.flatten(1), 1) - 5.0
        described = torch.cat([deep.mean((2, 3)).float(), 0.3 * area[:, None], 0.1 * peak[:, None]], 1)
        logit: Tensor = self.presence(described)
        return logit[:, 0]


def attend(mask: Tensor, floor: float, quantum: float) -> Tensor:
    """Mask logits → (N, 1, h, w) weights that sum to one; the whole image where no lesion is seen."""
    lesion = mask.sigmoid()
    size = lesion.sum((2, 3), keepdim=True)
    spread = floor + (1 - floor) * quantum / (size + quantum)
    cells = mask.shape[-1] * mask.shape[-2]
    return (1 - spread) * lesion / (size + 1e-6) + spread / cells


def up(x: Tensor, grid: torch.Size | tuple[int, ...]) -> Tensor:
    return F.interpolate(x, size=(int(grid[0]), int(grid[1])), mode="bilinear", align_corners=False)
