"""The encoders that a reader can stand on: inverted residuals (Sandler et al. 2018, arXiv 1801.04381) from a table.

Rules:
- Every encoder takes (N, 1, H, W) in 0..1 and gives features at strides 4, 8, 16 and 32.
- Batch norm is folded into the convolutions with the statistics it was trained with, so that a frame's answer depends
  on that frame alone. Renewing the statistics on ultrasound was tried and costs accuracy (docs/results/log-reader.md).
- Padding is TensorFlow's, because the starting weights were trained with it.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from busgen_cds.errors import Misconfigured

DEEP = 1280  # channels at stride 32, in each of them
STEM = 32
KEPT = (1, 2, 4)  # the stages whose features are kept, at strides 4, 8 and 16


class Stage(NamedTuple):
    expansion: int
    channels: int
    blocks: int
    stride: int
    kernel: int = 3


# table 2 of the MobileNetV2 paper
MOBILENET = (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 2),
    Stage(6, 32, 3, 2),
    Stage(6, 64, 4, 2),
    Stage(6, 96, 3, 1),
    Stage(6, 160, 3, 2),
    Stage(6, 320, 1, 1),
)
# EfficientNet-B0 (Tan and Le 2019, arXiv 1905.11946), without squeeze-and-excitation and with ReLU6
LITE0 = (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 2),
    Stage(6, 40, 2, 2, 5),
    Stage(6, 80, 3, 2),
    Stage(6, 112, 3, 1, 5),
    Stage(6, 192, 4, 2, 5),
    Stage(6, 320, 1, 1),
)
PLANS = {"mobilenet": MOBILENET, "lite0": LITE0}


class Same(nn.Conv2d):
    """A convolution that pads as TensorFlow does: at stride 2 one pixel more on the right and below."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1, blank: float = 0.0
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=kernel // 2 if stride == 1 else 0, groups=groups)
        self.blank = blank

    def forward(self, x: Tensor) -> Tensor:
        if self.stride[0] == 2:
            before, after = (self.kernel_size[0] - 2) // 2, (self.kernel_size[0] - 1) // 2
            x = F.pad(x, (before, after, before, after), value=self.blank)
        return super().forward(x)


class Inverted(nn.Module):
    """Expand, filter each channel, project back; added to its input where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, kernel: int) -> None:
        super().__init__()
        middle = inputs * expansion
        layers: list[nn.Module] = [nn.Conv2d(inputs, middle, 1), nn.ReLU6()] if expansion > 1 else []
        layers += [Same(middle, middle, kernel, stride, groups=middle), nn.ReLU6(), nn.Conv2d(middle, outputs, 1)]
        self.layers = nn.Sequential(*layers)
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.layers(x)
        return x + projected if self.skips else projected


class Encoder(nn.Module):
    """(N, 1, H, W) in 0..1 → features at strides 4, 8, 16 and 32."""

    def __init__(self, name: str = "mobilenet") -> None:
        super().__init__()
        stages = PLANS[name]
        self.stem = Same(1, STEM, 3, 2, blank=0.5)  # 0.5 is the zero of the RGB network's -1..1 input
        blocks, ends, inputs = [], [], STEM
        for expansion, channels, count, stride, kernel in stages:
            for i in range(count):
                blocks.append(Inverted(inputs, channels, stride if i == 0 else 1, expansion, kernel))
                inputs = channels
            ends.append(len(blocks) - 1)
        self.blocks = nn.ModuleList(blocks)
        self.deep = nn.Conv2d(inputs, DEEP, 1)
        self.taps = tuple(ends[kept] for kept in KEPT)
        self.channels = (*(stages[kept].channels for kept in KEPT), DEEP)

    def forward(self, image: Tensor) -> list[Tensor]:
        x, taps = F.relu6(self.stem(image)), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.taps:
                taps.append(x)
        return [*taps, F.relu6(self.deep(x))]

    def hold(self, blocks: int | None) -> None:
        """Let the stem and the first `blocks` blocks learn nothing; None holds the whole encoder."""
        still = [self] if blocks is None else [self.stem, *self.blocks[:blocks]] if blocks else []
        self.requires_grad_(True)
        for part in still:
            part.requires_grad_(False)

    @torch.no_grad()
    def start_from(self, path: Path) -> None:
        """ImageNet weights: MobileNetV2 as npz, EfficientNet-Lite as its PyTorch file; colours are summed into grey."""
        try:
            read = list(_folded(path) if path.suffix == ".pth" else _in_order(path))
        except (OSError, KeyError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
            raise Misconfigured(
                f"{path} holds no starting weights that an encoder can read: MobileNetV2 as npz or EfficientNet-Lite "
                f"as pth is expected ({type(error).__name__})."
            ) from error
        convolutions = [module for module in self.modules() if isinstance(module, nn.Conv2d)]
        if len(read) < len(convolutions):  # more: the classifier behind the encoder
            raise Misconfigured(
                f"{path} holds the weights of another encoder, or not all of them: {len(read)} convolutions of"
                f" {len(convolutions)}."
            )
        for convolution, (weight, bias, scale, zero) in zip(convolutions, read, strict=False):
            if convolution is self.stem:  # W(s v + z) + b = (s sum W) v + (b + z sum W)
                weight, bias = scale * weight.sum(1, keepdim=True), bias + zero * weight.sum((1, 2, 3))
            if convolution.weight.shape != weight.shape:
                raise Misconfigured(f"{path} holds the weights of another encoder: choose the one they belong to.")
            convolution.weight.copy_(weight)
            convolution.bias.copy_(bias)  # type: ignore[union-attr]


Folded = tuple[Tensor, Tensor, float, float]  # weight, bias, and how a grey of 0..1 became the input: s v + z


def _in_order(path: Path) -> Iterator[Folded]:
    """MobileNetV2 in op order, batch norm already folded; depthwise kernels are 1HWC, the rest OHWI."""
    arrays = np.load(path)
    for name in sorted(name[:-2] for name in arrays if name.endswith("_w")):
        weight, bias = torch.tensor(arrays[name + "_w"]), torch.tensor(arrays[name + "_b"])
        yield weight.permute(3, 0, 1, 2) if "depthwise" in name else weight.permute(0, 3, 1, 2), bias, 2.0, -1.0


def _folded(path: Path) -> Iterator[Folded]:
    """EfficientNet-Lite, each convolution with the batch norm behind it; only tensors are unpickled."""
    tensors: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    convolutions = [name for name, tensor in tensors.items() if tensor.ndim == 4]
    norms = [name.removesuffix("running_var") for name in tensors if name.endswith("running_var")]
    for name, norm in zip(convolutions, norms, strict=True):
        gain = tensors[norm + "weight"] / torch.sqrt(tensors[norm + "running_var"] + 1e-3)
        bias = tensors[norm + "bias"] - tensors[norm + "running_mean"] * gain
        yield tensors[name] * gain[:, None, None, None], bias, 255 / 128, -127 / 128
