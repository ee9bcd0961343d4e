"""Images → vectors, in which distances are measured.

Rules:
- An embedding takes grey squares (N, S, S) as `pixels.prepare` makes them, and nothing else: two images are compared
  as the reader would see them.
- What the release filter uses (`latent`) is never what judges the release.
- An ImageNet or a reader's network is used where its weights are named; what is missing is said, not replaced.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from busgen_cds import pixels
from busgen_cds.errors import Misconfigured
from busgen_cds.learning import checkpoint, data
from busgen_cds.learning.autoencoder import Autoencoder
from busgen_cds.learning.encoders import Encoder
from busgen_cds.learning.reader import Reader, Reading, Shape

Squares = NDArray[np.uint8]  # (N, S, S)
Vectors = NDArray[np.float32]  # (N, D)
Embedding = Callable[[Squares], Vectors]
BATCH = 32


def squares(images: Sequence[NDArray[np.uint8]], size: int) -> Squares:
    """Images of any shape → the squares that an embedding takes."""
    made = [np.rint(pixels.prepare(image, size)[0][0] * 255).astype(np.uint8) for image in images]
    return np.stack(made) if made else np.zeros((0, size, size), np.uint8)


def raw(images: Squares, side: int = 32) -> Vectors:
    """Grey values at low resolution, without the image's own brightness and contrast."""
    small = F.interpolate(torch.from_numpy(images)[:, None].float(), size=(side, side), mode="area").flatten(1)
    small = small - small.mean(1, keepdim=True)
    return F.normalize(small, dim=1).numpy()


def latent(coder: Autoencoder, side: int = 8) -> Embedding:
    """The autoencoder's latent at low resolution."""

    def embed(images: Tensor) -> Tensor:
        z = coder.encode(images * 2 - 1)
        return F.normalize(F.adaptive_avg_pool2d(z, side).flatten(1), dim=1)

    return _batched(embed, coder)


def imagenet(weights: Path) -> Embedding:
    """MobileNetV2 of ImageNet: mean features of its last layers; for distances between distributions."""
    encoder = _encoder(weights)

    def embed(images: Tensor) -> Tensor:
        features = encoder(F.interpolate(images, size=(224, 224), mode="bilinear", align_corners=False))
        return torch.cat([f.float().mean((2, 3)) for f in features[-2:]], 1)

    return _batched(embed, encoder)


def _encoder(weights: Path) -> Encoder:
    if not weights.is_file():
        raise Misconfigured(f"The ImageNet weights {weights} are missing.")
    encoder = Encoder()
    encoder.start_from(weights)
    return encoder.eval()


def imagenet_layout(weights: Path, cells: int = 4) -> Embedding:
    """MobileNetV2 of ImageNet: what lies where, at stride 16; for copies.

    Mean features tell a texture, and breasts share textures: noise of three grey levels moves them further than another
    patient's image lies. The directions of features on a grid of places stay.
    """
    encoder = _encoder(weights)

    def embed(images: Tensor) -> Tensor:
        features = encoder(F.interpolate(images, size=(224, 224), mode="bilinear", align_corners=False))
        return F.normalize(F.adaptive_avg_pool2d(features[-2].float(), cells), dim=1).flatten(1)

    return _batched(embed, encoder)


def read_reader(run: Path) -> Reader:
    """A reader from the checkpoint of its training: the average of its weights."""
    tensors, notes = checkpoint.read(run)
    shape = notes["settings"]["shape"]
    tasks = {"birads": 4, **{task["name"]: len(task["classes"]) for task in notes["settings"]["tasks"]}}
    network = Reader(Shape(**{**shape, "tasks": tasks}))
    network.load_state_dict(checkpoint.part(tensors, "average."))
    return network.eval()


def reader(run: Path) -> Embedding:
    """Our reader's embedding."""
    network = read_reader(run)

    def embed(images: Tensor) -> Tensor:
        reading: Reading = network(F.interpolate(images, size=(224, 224), mode="bilinear", align_corners=False))
        return reading.embedding

    return _batched(embed, network)


def inception(path: Path) -> Embedding:
    """Inception of ImageNet as TorchScript, as the Fréchet distance is usually told: (N, 3, S, S) bytes → (N, D)."""
    try:
        network = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as broken:
        raise Misconfigured(f"{path} cannot be read as a TorchScript network: {str(broken)[:120]}") from broken

    def embed(images: Tensor) -> Tensor:
        features: Tensor = network((images * 255).round().to(torch.uint8).expand(-1, 3, -1, -1), return_features=True)
        return features.flatten(1)

    return _batched(embed, network)


def remembered(embedding: Embedding) -> Embedding:
    """The same embedding, which looks at no set of images twice: attacks ask for the same ones again and again."""
    known: dict[tuple[tuple[int, ...], bytes], Vectors] = {}

    def embed(images: Squares) -> Vectors:
        name = (images.shape, hashlib.sha256(images.tobytes()).digest())
        if name not in known:
            known[name] = embedding(images)
        return known[name]

    return embed


def _batched(embed: Callable[[Tensor], Tensor], network: nn.Module) -> Embedding:
    def whole(images: Squares) -> Vectors:
        device = next(iter(network.parameters()), torch.empty(0)).device
        found = []
        with torch.inference_mode():
            for i in range(0, len(images), BATCH):
                batch = torch.from_numpy(images[i : i + BATCH])[:, None].to(device).float() / 255
                found.append(embed(batch).float().cpu().numpy())
        return np.concatenate(found)

    return whole


def for_copies(coder: Autoencoder, init: Path | None, reader_run: Path | None) -> dict[str, Embedding]:
    """In which a copy lies near its original; of networks, those whose weights were named."""
    found: dict[str, Embedding] = {"latent": latent(coder), "pixels": raw}
    if init is not None:
        found["imagenet"] = imagenet_layout(init)
    if reader_run is not None:
        found["reader"] = reader(reader_run)
    return found


def for_fidelity(init: Path | None, reader_run: Path | None, inception_file: Path | None) -> dict[str, Embedding]:
    """In which distributions are compared: the networks whose weights were named."""
    found: dict[str, Embedding] = {}
    if init is not None:
        found["imagenet"] = imagenet(init)
    if reader_run is not None:
        if data.GENERATED in checkpoint.sources(checkpoint.read_run(reader_run)[1]):
            raise Misconfigured(f"{reader_run} has learnt from generated images and cannot judge how real they are.")
        found["reader"] = reader(reader_run)
    if inception_file is not None:
        found["inception"] = inception(inception_file)
    return found


def mirrored(images: Squares) -> Squares:
    return np.ascontiguousarray(images[..., ::-1])


def closer(images: Squares, share: float = 0.9) -> Squares:
    """The middle of each image, at its size: a copy that was cropped is still a copy."""
    size = images.shape[-1]
    edge = round(size * (1 - share) / 2)
    part = torch.from_numpy(images[..., : size - 2 * edge, edge : size - edge])[:, None].float()
    whole = F.interpolate(part, size=(size, size), mode="bilinear", align_corners=False)
    return whole[:, 0].round().to(torch.uint8).numpy()


def nearest(queries: NDArray[Any], known: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Distance of each query to its nearest known vector, and which that is."""
    a, b = torch.from_numpy(np.asarray(queries, np.float32)), torch.from_numpy(np.asarray(known, np.float32))
    parts = [torch.cdist(part, b).min(1) for part in a.split(512)]  # type: ignore[no-untyped-call]
    return torch.cat([p.values for p in parts]).numpy(), torch.cat([p.indices for p in parts]).numpy()
