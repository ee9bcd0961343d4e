"""The networks that learn the flow: a U-Net, and a transformer to compare it with, behind one call.

Rules:
- A network sees the noisy latent and outline, what is given of both, the box, the region, the labels and the time;
  it knows nothing of paths and samplers.
- Attention works at low resolution only.
- Both start as the zero field, and an adapter starts as no change at all, to the bit.

U-Net: DiffusionModelUNet of MONAI. Transformer: blocks after Peebles and Xie 2023 (arXiv 2212.09748), its labels and
time as tokens in front. Adapters: LoRA (Hu et al. 2021, arXiv 2106.09685) by peft.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet, get_timestep_embedding
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from busgen_cds.errors import Misconfigured
from busgen_cds.learning.conditions import OUTLINE, Vocabulary

CLOCK = 1000  # the sinusoids of the time were made for steps up to a thousand
ADAPTED = r".*(to_q|to_k|to_v|out_proj|conv1\.conv|conv2\.conv|linear1|linear2)$"


@dataclass(frozen=True)
class Shape:
    """What must be known to build the network again."""

    kind: Literal["unet", "transformer"] = "unet"
    latent: int = 8
    channels: tuple[int, ...] = (128, 192, 256)
    attention: tuple[bool, ...] = (False, True, True)
    blocks: int = 1  # residual blocks per level
    width: int = 256  # of the transformer
    depth: int = 8
    patch: int = 2  # latent cells per token, each way

    @property
    def planes(self) -> int:
        """Channels that flow: the latent image and the outline."""
        return self.latent + OUTLINE


class Given(NamedTuple):
    """What is known of the images asked for; N images, a latent grid of h x w."""

    labels: Tensor  # (N, K) long; 0 = not said
    data: Tensor  # (N, latent + OUTLINE, h, w): the known values, 0 elsewhere
    where: Tensor  # (N, 2, h, w): 1 where the image is known, 1 where the outline is
    box: Tensor  # (N, 1, h, w): how much of each cell the lesion's box covers
    boxed: Tensor  # (N,): 1 where a box is given
    region: Tensor  # (N, 1, h, w): how much of each cell lies in the image region

    def to(self, device: torch.device | str) -> Given:
        return Given(*(part.to(device) for part in self))

    def unconditional(self) -> Given:
        """Nothing asked for, though what is known of image and outline stays known."""
        return self._replace(
            labels=torch.zeros_like(self.labels), box=torch.zeros_like(self.box), boxed=torch.zeros_like(self.boxed)
        )

    @property
    def planes(self) -> Tensor:
        boxed = self.boxed.to(self.box.dtype).reshape(-1, 1, 1, 1).expand_as(self.box)
        return torch.cat([self.data, self.where, self.box * boxed, boxed, self.region], 1)


GIVEN_PLANES = OUTLINE + 5  # besides the latent's channels


def joined(givens: list[Given]) -> Given:
    return Given(*(torch.cat(parts) for parts in zip(*givens, strict=True)))


def nameable(part: str) -> bool:
    """Whether a table or a head can have its name: torch takes neither a dot nor a name of its own."""
    return bool(part) and "." not in part and not hasattr(nn.ModuleDict(), part)


class Conditions(nn.Module):
    """Labels (N, K) → (N, dim): the sum of one embedding per condition; "not said" has its own."""

    def __init__(self, vocabulary: Vocabulary, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.tables = nn.ModuleDict({name: nn.Embedding(len(v) + 1, dim) for name, v in vocabulary.names.items()})
        for table in self.tables.values():
            nn.init.normal_(table.weight, std=0.02)  # type: ignore[arg-type]

    def forward(self, labels: Tensor) -> Tensor:
        said = [table(labels[:, i]) for i, table in enumerate(self.tables.values())]
        return torch.stack(said).sum(0)

    @torch.no_grad()
    def grow(self, vocabulary: Vocabulary) -> None:
        """Room for new labels: a new one starts at its condition's mean, a new condition says nothing yet."""
        device = next(self.parameters()).device
        for name, labels in vocabulary.names.items():
            old = self.tables[name].weight if name in self.tables else torch.zeros(1, self.dim, device=device)
            new = old.mean(0, keepdim=True).expand(len(labels) + 1 - len(old), -1)  # type: ignore[operator, arg-type]
            table = nn.Embedding(len(labels) + 1, self.dim, device=device)
            table.weight.copy_(torch.cat([old, new]))  # type: ignore[list-item]
            self.tables[name] = table


class UNet(nn.Module):
    def __init__(self, shape: Shape, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.net = DiffusionModelUNet(
            spatial_dims=2,
            in_channels=2 * shape.planes + 5,
            out_channels=shape.planes,
            num_res_blocks=shape.blocks,
            channels=shape.channels,
            attention_levels=shape.attention,
            num_head_channels=32,
            num_class_embeds=1,
        )
        self.net.class_embedding = Conditions(vocabulary, shape.channels[0] * 4)  # type: ignore[assignment]

    @property
    def conditions(self) -> Conditions:
        return self.net.class_embedding  # type: ignore[return-value]

    def forward(self, x: Tensor, t: Tensor, given: Given) -> Tensor:
        return self.net(torch.cat([x, given.planes], 1), t * CLOCK, class_labels=given.labels).float()  # type: ignore[no-any-return]


class Transformer(nn.Module):
    def __init__(self, shape: Shape, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.patch, width = shape.patch, shape.width
        self.inward = nn.Conv2d(2 * shape.planes + 5, width, shape.patch, shape.patch)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.conditions = Conditions(vocabulary, width)
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, shape.depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.outward = nn.Linear(width, shape.planes * shape.patch**2)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)

    def forward(self, x: Tensor, t: Tensor, given: Given) -> Tensor:
        tokens = self.inward(torch.cat([x, given.planes], 1))  # (N, width, h/p, w/p)
        n, width, rows, columns = tokens.shape
        tokens = tokens.flatten(2).transpose(1, 2) + _places(rows, columns, width).to(x.device)
        said = self.time(get_timestep_embedding(t * CLOCK, width)) + self.conditions(given.labels)
        # the sum in every token and as a token of its own: the first layers see it at once
        tokens = torch.cat([said[:, None], tokens + said[:, None]], 1)
        out = self.outward(self.blocks(tokens)[:, 1:]).transpose(1, 2).reshape(n, -1, rows, columns)
        return F.pixel_shuffle(out, self.patch).float()


def _places(rows: int, columns: int, width: int) -> Tensor:
    """(1, rows * columns, width): sinusoids of the row beside those of the column."""
    down = get_timestep_embedding(torch.arange(rows), width // 2)
    across = get_timestep_embedding(torch.arange(columns), width // 2)
    grid = torch.cat([down[:, None].expand(-1, columns, -1), across[None].expand(rows, -1, -1)], -1)
    return grid.reshape(1, rows * columns, width)


Network = UNet | Transformer
KINDS: dict[str, type[UNet] | type[Transformer]] = {"unet": UNet, "transformer": Transformer}


def build(shape: Shape, vocabulary: Vocabulary) -> Network:
    return KINDS[shape.kind](shape, vocabulary)


def adapt(network: Network, rank: int) -> Network:
    """Freeze the network and put low-rank adapters beside its attention and convolutions, and free its labels."""
    network.requires_grad_(False)
    targets = [name for name, part in network.named_modules() if _adaptable(name, part)]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), network)
    network.conditions.requires_grad_(True)
    return network


def _adaptable(name: str, part: nn.Module) -> bool:
    return isinstance(part, nn.Linear | nn.Conv2d) and re.fullmatch(ADAPTED, name) is not None


def adapter_weights(network: Network) -> dict[str, Tensor]:
    """What `adapt` freed: the adapters and the labels' embeddings."""
    return {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}


def load_adapter_weights(network: Network, weights: dict[str, Any]) -> None:
    """Into a network on which `adapt` was called; every freed parameter must be there, and nothing else."""
    free = {name: weight.shape for name, weight in adapter_weights(network).items()}
    given = {name: weight.shape for name, weight in weights.items()}
    if wrong := sorted(name for name in free | given if free.get(name) != given.get(name)):
        raise Misconfigured(
            f"Not an adapter of this generator: {wrong[0]} and {len(wrong) - 1} more parts differ. Name the generator"
            " that it was made with."
        )
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
