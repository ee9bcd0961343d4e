"""Rectified flow: the straight path between noise and data, its loss, and the samplers.

Rules:
- t = 0 is data, t = 1 is noise: x_t = (1 - t) x_0 + t e, so that dx/dt = e - x_0 everywhere on the path.
- A velocity is any function of (x, t); nothing here knows a network, an image, an epoch or a file.
- Randomness is handed in as tensors or a generator.

Liu, Gong and Liu 2022 (arXiv 2209.03003); times and shift as in Esser et al. 2024 (arXiv 2403.03206);
guidance in a middle interval as in Kynkäänniemi et al. 2024 (arXiv 2404.07724).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # x (N, C, h, w), t (N,) → dx/dt (N, C, h, w)
Method = Literal["euler", "heun"]


class Known(NamedTuple):
    """The part of the data that is given: its values, the noise it is mixed with, and where (1 = given)."""

    data: Tensor
    noise: Tensor
    where: Tensor

    def hold(self, x: Tensor, t: float) -> Tensor:
        """Put the known part back on its own path (RePaint, Lugmayr et al. 2022, without the resampling)."""
        path = between(self.data, self.noise, torch.full((len(x),), t, device=x.device))
        return torch.where(self.where > 0.5, path, x)


def _like(t: Tensor, x: Tensor) -> Tensor:
    return t.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def between(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t e; t is (N,)."""
    t = _like(t, data)
    return (1 - t) * data + t * noise


def loss(velocity: Velocity, data: Tensor, noise: Tensor, t: Tensor, weight: Tensor | None = None) -> Tensor:
    """(N,) mean squared error of the velocity, weighed per element where a weight is given."""
    error = (velocity(between(data, noise, t), t).float() - (noise - data)).square()
    if weight is None:
        return error.flatten(1).mean(1)
    weight = weight.expand_as(error)
    return (error * weight).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp(min=1e-6)


def draw_times(count: int, generator: torch.Generator, mean: float = 0.0, spread: float = 1.0) -> Tensor:
    """Logit-normal times: most of the work lies in the middle of the path."""
    return torch.sigmoid(mean + spread * torch.randn(count, generator=generator))


def schedule(steps: int, start: float = 1.0, shift: float = 1.0) -> Tensor:
    """Times from `start` down to 0; a shift above 1 spends more of the steps near the noise."""
    t = torch.linspace(1, 0, steps + 1)
    return start * shift * t / (1 + (shift - 1) * t)


def guided(conditional: Velocity, unconditional: Velocity, scale: float, low: float, high: float) -> Velocity:
    """Classifier-free guidance (Ho and Salimans 2022) for low < t < high only; elsewhere one evaluation."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        with_conditions = conditional(x, t)
        if scale == 1 or not low < float(t[0]) < high:
            return with_conditions
        without = unconditional(x, t)
        return without + scale * (with_conditions - without)

    return velocity


def sample(
    velocity: Velocity, x: Tensor, times: Tensor, known: Known | None = None, method: Method = "euler"
) -> Tensor:
    """Integrate from times[0] to times[-1]; what is known is held on its path after every step."""
    step = {"euler": _euler, "heun": _heun}[method]
    if known is not None:
        x = known.hold(x, float(times[0]))
    for now, then in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        x = step(velocity, x, now, then)
        if known is not None:
            x = known.hold(x, then)
    return x


def _euler(velocity: Velocity, x: Tensor, now: float, then: float) -> Tensor:
    return x + (then - now) * velocity(x, torch.full((len(x),), now, device=x.device))


def _heun(velocity: Velocity, x: Tensor, now: float, then: float) -> Tensor:
    """The trapezoid rule; its second slope at t = 0 is defined, so the last step needs no exception."""
    first = velocity(x, torch.full((len(x),), now, device=x.device))
    second = velocity(x + (then - now) * first, torch.full((len(x),), then, device=x.device))
    return x + (then - now) * (first + second) / 2
