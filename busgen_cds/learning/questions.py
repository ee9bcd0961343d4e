"""What a training image is turned into: the parts that are told, and the parts that must be found.

Rules:
- Each label is left out by its own coin, and now and then all are: guidance needs both, and a user may say any part.
- Four kinds of question: nothing known; the outline known; outline and surroundings known (paint the lesion in);
  surroundings known (propose a lesion that fits). What is known is never part of the loss.
- Everything drawn comes from the generator that is handed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from busgen_cds.learning import conditions, flow
from busgen_cds.learning.conditions import Box, Vocabulary
from busgen_cds.learning.generator import spread
from busgen_cds.learning.networks import Given, Network
from busgen_cds.pixels import Placement


@dataclass(frozen=True)
class Odds:
    """Chances of each kind of question."""

    drop: float = 0.1  # of each label
    drop_all: float = 0.1  # of all labels and the box
    box: float = 0.6  # that the box is told
    outline: float = 0.15  # that the outline is known
    paint: float = 0.15  # that outline and surroundings are known
    propose: float = 0.15  # that the surroundings are known
    shadow: float = 0.5  # that what lies below the lesion is unknown as well
    time_mean: float = 0.0  # of the logit of t
    time_spread: float = 1.0


class Example(Protocol):
    """One encoded image."""

    @property
    def latent(self) -> NDArray: ...  # type: ignore[type-arg]
    @property
    def outline(self) -> NDArray: ...  # type: ignore[type-arg]
    @property
    def labels(self) -> dict[str, str | None]: ...
    @property
    def box(self) -> Box | None: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...


class Question(NamedTuple):
    """One batch of training: N images."""

    given: Given
    data: Tensor  # (N, latent + OUTLINE, h, w)
    noise: Tensor
    time: Tensor  # (N,)
    weight: Tensor  # as data: 0 where the value is known

    def loss(self, network: Network) -> Tensor:
        """(N,) the flow's loss on what was not told."""
        return flow.loss(lambda x, t: network(x, t, self.given), self.data, self.noise, self.time, self.weight)

    def to(self, device: torch.device) -> Question:
        return Question(self.given.to(device), *(part.to(device) for part in self[1:]))


def ask(examples: Sequence[Example], vocabulary: Vocabulary, size: int, odds: Odds, generator: Generator) -> Question:
    """Turn images into questions."""
    n, cells = len(examples), size // conditions.CELL
    latent = torch.stack([torch.from_numpy(e.latent).float() for e in examples])
    outline = torch.stack([torch.from_numpy(e.outline).float() for e in examples])
    data = torch.cat([latent, outline], 1)
    places = [Placement(e.height, e.width, size) for e in examples]

    labels = torch.tensor([vocabulary.index(_said(e.labels, vocabulary)) for e in examples])
    told = torch.rand(labels.shape, generator=generator) >= odds.drop
    anything = torch.rand(n, generator=generator) >= odds.drop_all
    has_box = torch.tensor([e.box is not None for e in examples])
    boxed = (torch.rand(n, generator=generator) < odds.box) & anything & has_box
    box = torch.stack(
        [conditions.cover(*conditions.in_cells(e.box, p), cells) if e.box else torch.zeros(cells, cells)
         for e, p in zip(examples, places, strict=True)]
    )[:, None]  # fmt: skip
    where = _known(box, has_box, odds, generator)
    given = Given(
        labels * told * anything[:, None],
        data * spread(where, latent.shape[1]),
        where,
        box * boxed.reshape(-1, 1, 1, 1),
        boxed.float(),
        torch.stack([conditions.region_plane(p) for p in places])[:, None],
    )
    noise = torch.randn(data.shape, generator=generator)
    time = flow.draw_times(n, generator, odds.time_mean, odds.time_spread)
    return Question(given, data, noise, time, 1 - spread(where, latent.shape[1]))


def _said(labels: dict[str, str | None], vocabulary: Vocabulary) -> dict[str, str | None]:
    """The labels that the vocabulary knows; a rare label that training never saw says nothing."""
    return {name: labels.get(name) if labels.get(name) in words else None for name, words in vocabulary.names.items()}


def _known(box: Tensor, has_box: Tensor, odds: Odds, generator: Generator) -> Tensor:
    """(N, 2, h, w): where the image, and where the outline is known."""
    n, cells = len(box), box.shape[-1]
    kind = torch.rand(n, generator=generator)
    hole = torch.stack([_hole(box[i, 0], bool(has_box[i]), cells, odds, generator) for i in range(n)])
    outline_only = kind < odds.outline
    paint = ~outline_only & (kind < odds.outline + odds.paint)
    propose = ~outline_only & ~paint & (kind < odds.outline + odds.paint + odds.propose)
    outside = 1 - hole
    image = outside * (paint | propose).reshape(-1, 1, 1)
    outline = torch.where(propose.reshape(-1, 1, 1), outside, (outline_only | paint).float().reshape(-1, 1, 1))
    return torch.stack([image, outline], 1)


def _hole(box: Tensor, has_box: bool, cells: int, odds: Odds, generator: Generator) -> Tensor:
    """The unknown part: around the lesion, or anywhere in a normal image; often with the shadow's place below."""
    margin = torch.randint(1, 4, (4,), generator=generator).tolist()
    down = bool(torch.rand((), generator=generator) < odds.shadow)
    if has_box:
        rows, columns = torch.nonzero(box.amax(1)).flatten(), torch.nonzero(box.amax(0)).flatten()
        top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    else:
        side = torch.randint(2, max(3, cells // 2), (2,), generator=generator)
        corner = (torch.rand(2, generator=generator) * (cells - side)).long()
        top, left = (int(x) for x in corner)
        bottom, right = top + int(side[0]), left + int(side[1])
    hole = torch.zeros(cells, cells)
    bottom = cells if down else bottom + margin[1]
    hole[max(0, top - margin[0]) : bottom, max(0, left - margin[2]) : right + margin[3]] = 1
    return hole
