"""Image ⇄ latent: eight times smaller each way, cheap at full resolution, without a checkerboard.

Rules:
- It begins as the best linear code of the training images: the principal components of their 8 x 8 blocks, whitened.
  The network, which starts at zero, learns what they lack; so it is good at once and better with every step.
- The network works after a space-to-depth stem; only the last two thin convolutions see every pixel, after the
  shuffle, and they are what smooths its grid and draws the speckle.
- Images are (N, 1, S, S) in -1..1; latents (N, L, S/8, S/8) are returned with mean 0 and spread 1 per channel.
- What no latent can hold, the last touch draws: it sees the decoded picture and fresh noise at half the resolution,
  mends the grid of the blocks and makes speckle instead of smoothing it. The same noise is always the same picture.
- Nothing mixes the images of a batch.

Network: AutoencoderKL (Rombach et al. 2022, arXiv 2112.10752) of MONAI. Loss: absolute difference, and the difference
in the features of an ImageNet encoder (Johnson et al. 2016); a patch discriminator (Isola et al. 2017) may be added
for the last part of the training, where the speckle is learnt.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from monai.networks.nets.autoencoderkl import AutoencoderKL
from monai.networks.nets.patchgan_discriminator import PatchDiscriminator
from torch import Tensor, nn

from busgen_cds.learning.encoders import Encoder
from busgen_cds.pixels import Grey

FACTOR = 8  # pixels per latent cell, each way
QUIET = -6.0  # logarithm of the latent's first variance: little noise, so that the linear code survives


@dataclass(frozen=True)
class Shape:
    """What must be known to build the network again."""

    stem: int = 4  # pixels folded into channels before the network
    channels: tuple[int, ...] = (96, 128)
    blocks: int = 1  # residual blocks per level
    latent: int = 8
    fine: int = 12  # channels at full resolution, behind the shuffle
    finish: int = 0  # channels of the last touch; 0: there is none

    def __post_init__(self) -> None:
        if self.stem * 2 ** (len(self.channels) - 1) != FACTOR:
            raise ValueError(f"stem {self.stem} and {len(self.channels)} levels do not shrink by {FACTOR}")


def signed(grey: Grey, device: torch.device | str = "cpu") -> Tensor:
    """Grey squares (N, S, S) as the networks take them: (N, 1, S, S) in -1..1."""
    return torch.from_numpy(grey)[:, None].to(device).float() / 127.5 - 1


def greyed(image: Tensor) -> Grey:
    """(N, 1, S, S) in -1..1 as grey squares."""
    return ((image[:, 0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


HALF = 2  # pixels per cell of the last touch, each way
GRAINS = HALF**2  # planes of noise at its resolution


class Grainy(nn.Module):
    """A residual block into which noise is mixed, as much as each channel has learnt to want (Karras et al. 2019)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.grain = nn.Conv2d(GRAINS, channels, 1, bias=False)

    def forward(self, x: Tensor, grain: Tensor) -> Tensor:
        mended: Tensor = self.second(F.silu(self.first(F.silu(x + self.grain(grain)))))
        return x + mended


class Finish(nn.Module):
    """What the decoder drew, its last features and noise → what is still missing; nothing at first."""

    def __init__(self, inputs: int, channels: int, blocks: int = 3) -> None:
        super().__init__()
        self.inward = nn.Conv2d(inputs + HALF**2, channels, 3, padding=1)
        self.blocks = nn.ModuleList(Grainy(channels) for _ in range(blocks))
        self.spread = nn.Conv2d(channels, 4 * HALF**2, 1)
        self.outward = nn.Conv2d(4, 1, 3, padding=1)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)  # type: ignore[arg-type]

    def forward(self, picture: Tensor, features: Tensor, grain: Tensor) -> Tensor:
        """(N, 1, S, S), (N, C, S/2, S/2) and noise (N, 1, S, S) → (N, 1, S, S)."""
        x = self.inward(torch.cat([F.pixel_unshuffle(picture, HALF).to(features.dtype), features], 1))
        noise = F.pixel_unshuffle(grain, HALF)
        for block in self.blocks:
            x = block(x, noise)
        missing: Tensor = self.outward(F.pixel_shuffle(self.spread(F.silu(x)), HALF))
        return missing.float()


class Autoencoder(nn.Module):
    def __init__(self, shape: Shape = Shape()) -> None:
        super().__init__()
        self.shape = shape
        self.core = AutoencoderKL(
            spatial_dims=2,
            in_channels=shape.stem**2,
            out_channels=shape.fine * shape.stem**2,
            num_res_blocks=shape.blocks,
            channels=shape.channels,
            attention_levels=[False] * len(shape.channels),
            latent_channels=shape.latent,
            with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False,
        )
        self.fine = nn.Sequential(
            nn.Conv2d(shape.fine, shape.fine, 3, padding=1), nn.SiLU(), nn.Conv2d(shape.fine, 1, 3, padding=1)
        )
        self.finish = Finish(shape.fine * HALF**2, shape.finish) if shape.finish else None
        self.code = nn.Conv2d(1, shape.latent, FACTOR, FACTOR)
        self.picture = nn.ConvTranspose2d(shape.latent, 1, FACTOR, FACTOR)
        for part in (self.core.quant_conv_mu, self.core.quant_conv_log_sigma, self.fine[-1]):
            for parameter in part.parameters():
                nn.init.zeros_(parameter)
        for name, parameter in self.core.quant_conv_log_sigma.named_parameters():
            if name.endswith("bias"):
                nn.init.constant_(parameter, QUIET)
        self.mean, self.spread = nn.Buffer(torch.zeros(shape.latent)), nn.Buffer(torch.ones(shape.latent))

    def forward(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Image through the noisy latent → (its reconstruction, the latent's divergence from a standard normal)."""
        mu, sigma = self._latent(image)
        divergence = 0.5 * (mu.square() + sigma.square() - 2 * sigma.log() - 1).mean()
        return self._pixels(mu + sigma * noise), divergence

    def encode(self, image: Tensor) -> Tensor:
        mu, _ = self._latent(image)
        return (mu - self.mean[:, None, None]) / self.spread[:, None, None]

    def decode(self, latent: Tensor, grain: Tensor | None = None) -> Tensor:
        """The picture of a latent; `grain` is the noise (N, 1, S, S) of which the speckle is made, none without it."""
        return self.draw(latent, grain).clamp(-1, 1)

    def draw(self, latent: Tensor, grain: Tensor | None = None) -> Tensor:
        """The same before it is cut to black and white, as the training needs it."""
        z = latent * self.spread[:, None, None] + self.mean[:, None, None]
        return self._pixels(z, grain)

    def drawing_parts(self) -> list[nn.Module]:
        """All that only `decode` uses: what may be trained without making latents invalid."""
        parts = [self.core.post_quant_conv, self.core.decoder, self.fine, self.picture]
        return parts if self.finish is None else [*parts, self.finish]

    def _latent(self, image: Tensor) -> tuple[Tensor, Tensor]:
        mu, sigma = self.core.encode(F.pixel_unshuffle(image, self.shape.stem))
        linear: Tensor = self.code(image)
        return linear.float() + mu.float(), sigma.float()

    def _pixels(self, z: Tensor, grain: Tensor | None = None) -> Tensor:
        features = self.core.decode(z)
        learnt: Tensor = self.fine(F.pixel_shuffle(features, self.shape.stem))
        linear: Tensor = self.picture(z)
        picture = linear.float() + learnt.float()
        if self.finish is None:
            return picture
        noise = torch.zeros_like(picture) if grain is None else grain
        missing: Tensor = self.finish(picture, F.pixel_shuffle(features, self.shape.stem // HALF), noise)
        return picture + missing

    @torch.no_grad()
    def begin_linear(self, images: Tensor) -> None:
        """Set the linear code to the whitened principal components of the blocks of images (N, 1, S, S)."""
        blocks = F.pixel_unshuffle(images.double(), FACTOR).transpose(0, 1).flatten(1)  # (64, blocks)
        mean = blocks.mean(1, keepdim=True)
        variance, axes = torch.linalg.eigh((blocks - mean) @ (blocks - mean).T / blocks.shape[1])
        axes, spread = axes[:, -self.shape.latent :].flip(1), variance[-self.shape.latent :].flip(0).sqrt()
        inward = (axes / spread).T.reshape(-1, 1, FACTOR, FACTOR)
        outward = (axes * spread).T.reshape(-1, 1, FACTOR, FACTOR)
        self.code.weight.copy_(inward)
        self.code.bias.copy_(-(axes / spread).T @ mean[:, 0])  # type: ignore[union-attr]
        self.picture.weight.copy_(outward)
        # the mean block differs from place to place by little: one grey for all, so that no grid is painted
        self.picture.bias.fill_(float(mean.mean()))  # type: ignore[union-attr]

    @torch.no_grad()
    def measure(self, latents: Tensor) -> None:
        """Keep the mean and spread of raw latents (N, L, h, w), so that `encode` returns standard ones."""
        whole = latents.transpose(0, 1).flatten(1).double()
        self.mean.copy_(self.mean + self.spread * whole.mean(1).float())
        self.spread.copy_(self.spread * whole.std(1).float())


def within(image: Tensor, drawn: Tensor) -> Tensor:
    """Drawn pixels where the image (N, 1, S, S) has a region, black around it: the letter-box holds no picture."""
    some = image > -1
    region = some.any(-1, keepdim=True) & some.any(-2, keepdim=True)
    return torch.where(region, drawn.clamp(-1, 1), -1.0)


class Likeness(nn.Module):
    """How unlike two images look to an ImageNet encoder: normalised features at strides 4, 8 and 16."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.encoder.start_from(weights)
        self.requires_grad_(False)

    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        return unlike_features(self.encoder((image + 1) / 2), self.encoder((other + 1) / 2))


def unlike_features(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """The difference of an encoder's normalised features at strides 4, 8 and 16."""
    pairs = [
        (F.normalize(a.float(), dim=1), F.normalize(b.float(), dim=1))
        for a, b in zip(ours[:-1], theirs[:-1], strict=True)
    ]
    return torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).sum()


def discriminator() -> nn.Module:
    """Real or reconstructed, patch by patch; normalised image by image, so that a batch tells nothing."""
    return PatchDiscriminator(
        spatial_dims=2, channels=24, in_channels=1, out_channels=1, num_layers_d=3, norm="INSTANCE"
    )


def hinge(real: Tensor, made: Tensor) -> Tensor:
    """The discriminator's loss (Lim and Ye 2017)."""
    return (F.relu(1 - real) + F.relu(1 + made)).mean()
