"""The generator: image and lesion outline together, from nothing or from a healthy breast.

Rules:
- One network learns p(image, outline | pathology, BI-RADS, device, box, whatever part is known); every use of it,
  each stage of healthy → lesion too, is a question to that one network.
- Image i of a seed is always the same image, whatever batch, shard or process makes it.
- The outline comes out with the image; a normal image has none.
- Weights travel as safetensors; what the weights need to be used stands in `generator.json` beside them.

The stages of healthy → lesion follow Wen et al. 2026 (J. Med. Imaging 13(2):024002); the box is the user's as in
BUSGen (Yu et al. 2026, 10.1038/s41551-026-01639-1).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from busgen_cds import pixels
from busgen_cds.errors import Misconfigured
from busgen_cds.learning import autoencoder, checkpoint, conditions, data, flow, networks, processes
from busgen_cds.learning.autoencoder import Autoencoder
from busgen_cds.learning.conditions import CELL, OUTLINE, Box, BoxPrior, RegionPrior, Vocabulary
from busgen_cds.learning.networks import Given
from busgen_cds.pixels import Placement

SHIPPED = Path(__file__).parent.parent / "weights"
CARD, AUTOENCODER, FLOW, ADAPTER = (
    "generator.json",
    "autoencoder.safetensors",
    "flow.safetensors",
    "adapter.safetensors",
)
Pathology = Literal["normal", "benign", "malignant"]
Grey = NDArray[np.uint8]


@dataclass(frozen=True)
class Sampling:
    """How a picture is asked for; the defaults are those that fidelity and privacy were measured with."""

    steps: int = 16
    method: flow.Method = "euler"
    guidance: float = 6.0
    low: float = 0.6  # guidance works for low < t < high: early, while what is shown and where is decided
    high: float = 1.0
    shift: float = 1.0
    propose_steps: int = 12  # healthy → lesion: the outline needs fewer steps than the picture
    refine_steps: int = 5
    refine_from: float = 0.25  # noise of the last stage: enough for a seam, too little for another breast

    def __post_init__(self) -> None:
        if min(self.steps, self.propose_steps, self.refine_steps) < 1:
            raise Misconfigured("The sampler takes one step or more; the shipped figures were measured with 16.")
        if not 0 <= self.guidance < math.inf:
            raise Misconfigured(f"Guidance is a number from 0 on (1: none, 6: the default), not {self.guidance}.")
        if not 0 <= self.low < self.high <= 1:
            raise Misconfigured(f"Guidance works between two times from 0 to 1, not from {self.low} to {self.high}.")


VARIOUS = Sampling(guidance=1.5, low=0.2, high=0.8)  # more unlike each other, less true to their label: for training


@dataclass(frozen=True)
class Sample:
    """One made image: what it shows, and what it was asked to show."""

    image: Grey = field(repr=False)  # (rows, columns)
    mask: NDArray[np.bool_] = field(repr=False)
    pathology: Pathology
    birads: str | None
    device: str | None
    box: Box | None
    seed: int
    index: int


@dataclass(frozen=True)
class Card:
    """Everything beside the weights that is needed to use them."""

    size: int
    autoencoder: autoencoder.Shape
    network: networks.Shape
    vocabulary: Vocabulary
    boxes: BoxPrior
    regions: RegionPrior
    trained_on: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        document = {
            "size": self.size,
            "autoencoder": dataclasses.asdict(self.autoencoder),
            "network": dataclasses.asdict(self.network),
            "vocabulary": [[name, list(labels)] for name, labels in self.vocabulary.names.items()],
            "boxes": {name: boxes.round(4).tolist() for name, boxes in self.boxes.boxes.items()},
            "bandwidth": dict(self.boxes.bandwidth),
            "regions": {name: list(q) for name, q in self.regions.quantiles.items()},
            "trained_on": list(self.trained_on),
            "settings": dict(self.settings),
        }
        return json.dumps(document, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Card:
        document = json.loads(text)
        boxes = {name: np.array(b, np.float32).reshape(-1, 4) for name, b in document["boxes"].items()}
        return cls(
            size=document["size"],
            autoencoder=autoencoder.Shape(**_tuples(document["autoencoder"])),
            network=networks.Shape(**_tuples(document["network"])),
            vocabulary=Vocabulary({name: tuple(labels) for name, labels in document["vocabulary"]}),
            boxes=BoxPrior(boxes, document["bandwidth"]),
            regions=RegionPrior({name: tuple(q) for name, q in document["regions"].items()}),
            trained_on=tuple(document["trained_on"]),
            settings=document["settings"],
        )


def _tuples(document: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in document.items()}


@dataclass(frozen=True)
class Wish:
    """One image asked for, with everything drawn that was left open."""

    index: int
    pathology: Pathology
    birads: str | None
    device: str | None
    box: Box | None
    placement: Placement
    mask: Grey | None = field(default=None, repr=False)  # (S, S), 0..255, as prepared
    healthy: Grey | None = field(default=None, repr=False)  # (S, S), as prepared
    labels: Mapping[str, str] = field(default_factory=dict)  # of a task's own conditions


class Generator:
    def __init__(self, card: Card, coder: Autoencoder, network: networks.Network, device: torch.device | str = "cpu"):
        self.card, self.device = card, torch.device(device)
        self.coder = coder.to(self.device).eval()
        self.network = network.to(self.device).eval()

    @classmethod
    def load(
        cls,
        folder: Path | str = SHIPPED,
        *,
        adapter: Path | str | None = None,
        device: torch.device | str | None = None,
    ) -> Generator:
        """The generator of a folder (that of the package unless another is named), with an adapter if wished."""
        device, folder = _machine(device), Path(folder)
        card = cls.card_of(folder)
        coder = Autoencoder(card.autoencoder)
        coder.load_state_dict(_wide(checkpoint.read(folder / AUTOENCODER)[0]))
        network = networks.build(card.network, card.vocabulary)
        network.load_state_dict(_wide(checkpoint.read(folder / FLOW)[0]))
        if adapter is not None:
            card = adapted(card, network, Path(adapter), named(coder, network))
        return cls(card, coder, network, device)

    @staticmethod
    def card_of(folder: Path) -> Card:
        try:
            return Card.from_json((folder / CARD).read_text(encoding="utf-8"))
        except OSError as missing:
            raise Misconfigured(f"No generator in {folder}: {CARD} cannot be read ({missing.strerror}).") from missing

    def save(self, folder: Path) -> None:
        """Half precision; the card last, so that a folder without it is no generator."""
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write(folder / AUTOENCODER, _half(self.coder.state_dict()), {})
        checkpoint.write(folder / FLOW, _half(self.network.state_dict()), {})
        (folder / CARD).write_text(self.card.to_json(), encoding="utf-8")

    @property
    def digest(self) -> str:
        """Names the weights, an adapter's included."""
        return named(self.coder, self.network)

    # Asking

    def sample(
        self,
        count: int = 1,
        *,
        pathology: Pathology,
        birads: str | None = None,
        device: str | None = None,
        box: Box | Sequence[float] | None = None,
        mask: NDArray[Any] | None = None,
        healthy: Grey | None = None,
        labels: Mapping[str, str] | None = None,
        seed: int = 0,
        first: int = 0,
        sampling: Sampling = Sampling(),
        tell: Callable[[int, int], None] = lambda done, steps: None,
    ) -> list[Sample]:
        """Images `first` to `first + count` of a seed. A box or a mask, and a healthy image may be given.

        box: left, top, right, bottom as fractions of the image; mask: an outline of any size, true in the lesion;
        healthy: a grey breast image in which the lesion shall grow. What is not given is drawn. Now and then, and
        often in a box of few pixels, no lesion comes: the sample's mask is empty then.
        """
        if min(count, seed, first) < 0:
            raise Misconfigured(f"Count, seed and first are numbers from 0 on, not {count}, {seed} and {first}.")
        wishes = [
            self.wish(first + i, seed, pathology, birads, device, box, mask, healthy, labels or {})
            for i in range(count)
        ]
        return self.grant(wishes, seed, sampling, tell)

    def wish(
        self,
        index: int,
        seed: int,
        pathology: Pathology,
        birads: str | None = None,
        device: str | None = None,
        box: Box | Sequence[float] | None = None,
        mask: NDArray[Any] | None = None,
        healthy: Grey | None = None,
        labels: Mapping[str, str] = {},
    ) -> Wish:
        """Check one question and draw what it leaves open."""
        _check(pathology, box, mask, healthy, labels)
        self.card.vocabulary.index({"pathology": pathology, "birads": birads, "device": device, **labels})
        box = None if box is None else _checked(box)
        rng = np.random.default_rng((seed, index))
        drawn = conditions.placement(self.card.regions.draw(device, rng), self.card.size)
        given = healthy if healthy is not None else mask
        place = drawn if given is None else Placement(given.shape[0], given.shape[1], self.card.size)
        if box is None and mask is None and pathology != "normal":
            box = self.card.boxes.draw(pathology, rng)
        outline = None if mask is None else _outline(mask, place)
        breast = None if healthy is None else np.rint(pixels.prepare(healthy, self.card.size)[0][0] * 255)
        return Wish(
            index,
            pathology,
            birads,
            device,
            conditions.box_of(outline, place) if outline is not None else box,
            place,
            outline,
            None if breast is None else breast.astype(np.uint8),
            labels,
        )

    @torch.inference_mode()
    def grant(
        self,
        wishes: Sequence[Wish],
        seed: int,
        sampling: Sampling = Sampling(),
        tell: Callable[[int, int], None] = lambda done, steps: None,
    ) -> list[Sample]:
        """Make the images of some wishes, all from nothing or all from a healthy image."""
        if not wishes:
            return []
        noise = torch.stack([self._noise(seed, wish.index) for wish in wishes]).to(self.device)
        if wishes[0].healthy is None:
            x = self._from_nothing(wishes, noise, sampling, tell)
        else:
            x = self._from_healthy(wishes, noise, sampling, tell)
        grain = torch.stack([self._grain(seed, wish.index) for wish in wishes]).to(self.device)
        image, mask = self.decode(x, grain)
        return [self._sample(wish, image[i], mask[i], seed) for i, wish in enumerate(wishes)]

    def decode(self, x: Tensor, grain: Tensor) -> tuple[Grey, NDArray[np.bool_]]:
        """(N, latent + OUTLINE, h, w) and noise (N, 1, S, S) → grey images (N, S, S) and their outlines."""
        latent = self.card.network.latent
        parts = zip(torch.split(x.float(), 32), torch.split(grain, 32), strict=True)
        image = torch.cat([self.coder.decode(part[:, :latent], noise) for part, noise in parts])
        return autoencoder.greyed(image), conditions.outline_mask(x[:, latent:]).cpu().numpy()

    @torch.inference_mode()
    def redrawn(self, images: Grey) -> Grey:
        """Squares (N, S, S) as the decoder draws them from their own latents; the letter-box is none of its work."""
        drawn = [images[:0]]
        for i in range(0, len(images), 32):
            batch = autoencoder.signed(images[i : i + 32], self.device)
            grain = torch.randn(batch.shape, generator=torch.Generator().manual_seed(i)).to(self.device)
            back = self.coder.decode(self.coder.encode(batch), grain)
            drawn.append(autoencoder.greyed(autoencoder.within(batch, back)))
        return np.concatenate(drawn)

    # The questions

    def _from_nothing(
        self, wishes: Sequence[Wish], noise: Tensor, s: Sampling, tell: Callable[[int, int], None]
    ) -> Tensor:
        given = self.given(wishes)
        known = flow.Known(given.data, noise, self._everywhere(given.where))
        return flow.sample(
            self._velocity(given, s, tell, s.steps), noise, flow.schedule(s.steps, 1.0, s.shift), known, s.method
        )

    def _from_healthy(
        self, wishes: Sequence[Wish], noise: Tensor, s: Sampling, tell: Callable[[int, int], None]
    ) -> Tensor:
        """Propose an outline that fits this breast; set the lesion in; smooth the whole."""
        breast = np.stack([wish.healthy for wish in wishes if wish.healthy is not None])
        latent = self.coder.encode(autoencoder.signed(breast, self.device))
        given = self.given(wishes)
        steps = s.propose_steps + s.steps + s.refine_steps

        # 1. An outline, in a room around the box; breast and emptiness known outside.
        asked = torch.tensor([wish.mask is None for wish in wishes], device=self.device).reshape(-1, 1, 1, 1)
        empty = torch.full_like(given.data[:, latent.shape[1] :], -1)
        room = grown(given.box, 1)
        outside = torch.where(asked, 1 - room, torch.zeros_like(room))
        first = given._replace(
            data=torch.cat([latent, torch.where(asked, empty, given.data[:, latent.shape[1] :])], 1),
            where=torch.cat([1 - room, torch.where(asked, outside, torch.ones_like(room))], 1),
        )
        proposal = self._solve(first, noise, s, s.propose_steps, 1.0, lambda done, _: tell(done, steps))

        # 2. The lesion, its outline and the healthy surroundings known; its shadow may fall below it.
        outline = proposal[:, latent.shape[1] :]
        free = shadowed(grown((outline.amax(1, keepdim=True) > -0.5).float(), 1))
        second = given._replace(
            data=torch.cat([latent, outline], 1), where=torch.cat([1 - free, torch.ones_like(free)], 1)
        )
        painted = self._solve(second, noise, s, s.steps, 1.0, lambda done, _: tell(s.propose_steps + done, steps))

        # 3. The whole at low noise, only the outline known: no seam is left.
        third = second._replace(where=torch.cat([torch.zeros_like(free), torch.ones_like(free)], 1))
        third = third._replace(data=third.data * self._everywhere(third.where))
        start = flow.between(painted, noise, torch.full((len(noise),), s.refine_from, device=self.device))
        before = s.propose_steps + s.steps
        return self._solve(
            third, start, s, s.refine_steps, s.refine_from, lambda done, _: tell(before + done, steps), noise
        )

    def _solve(
        self,
        given: Given,
        x: Tensor,
        s: Sampling,
        steps: int,
        start: float,
        tell: Callable[[int, int], None],
        noise: Tensor | None = None,
    ) -> Tensor:
        where = self._everywhere(given.where)
        known = flow.Known(given.data, x if noise is None else noise, where)
        given = given._replace(data=given.data * where)
        return flow.sample(
            self._velocity(given, s, tell, steps), x, flow.schedule(steps, start, s.shift), known, s.method
        )

    def _velocity(self, given: Given, s: Sampling, tell: Callable[[int, int], None], steps: int) -> flow.Velocity:
        without = given.unconditional()
        asked = 0

        def conditional(x: Tensor, t: Tensor) -> Tensor:
            nonlocal asked
            asked += 1
            tell(min(asked, steps), steps)
            return self._evaluate(x, t, given)

        return flow.guided(conditional, lambda x, t: self._evaluate(x, t, without), s.guidance, s.low, s.high)

    def _evaluate(self, x: Tensor, t: Tensor, given: Given) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.network(x, t, given)  # type: ignore[no-any-return]

    def given(self, wishes: Sequence[Wish]) -> Given:
        """What the network is told of each wish."""
        return networks.joined([self._given(wish) for wish in wishes]).to(self.device)

    def _given(self, wish: Wish) -> Given:
        cells, latent = self.card.size // CELL, self.card.network.latent
        labels = {"pathology": wish.pathology, "birads": wish.birads, "device": wish.device, **wish.labels}
        known = torch.zeros(1, latent + OUTLINE, cells, cells)
        where = torch.zeros(1, 2, cells, cells)
        if wish.mask is not None or wish.pathology == "normal":
            mask = np.zeros((self.card.size,) * 2, np.uint8) if wish.mask is None else wish.mask
            known[0, latent:] = conditions.outline_planes(mask)
            where[:, 1] = 1
        box = torch.zeros(cells, cells)
        if wish.box is not None:
            box = conditions.cover(*conditions.in_cells(wish.box, wish.placement), cells)
        return Given(
            torch.tensor([self.card.vocabulary.index(labels)]),
            known,
            where,
            box[None, None],
            torch.tensor([float(wish.box is not None)]),
            conditions.region_plane(wish.placement)[None, None],
        )

    def _everywhere(self, where: Tensor) -> Tensor:
        """(N, 2, h, w) → one plane per channel that flows."""
        return spread(where, self.card.network.latent)

    def _noise(self, seed: int, index: int) -> Tensor:
        cells = self.card.size // CELL
        return _normal((self.card.network.planes, cells, cells), seed, index, 1)

    def _grain(self, seed: int, index: int) -> Tensor:
        return _normal((1, self.card.size, self.card.size), seed, index, 2)

    def _sample(self, wish: Wish, image: Grey, mask: NDArray[np.bool_], seed: int) -> Sample:
        place = wish.placement
        mask = place.crop(mask) if wish.pathology != "normal" else np.zeros_like(place.crop(mask))
        return Sample(
            np.ascontiguousarray(place.crop(image)),
            np.ascontiguousarray(mask),
            wish.pathology,
            wish.birads,
            wish.device,
            wish.box,
            seed,
            wish.index,
        )


def _normal(shape: tuple[int, ...], *names: int) -> Tensor:
    """Normal noise that follows from some numbers."""
    number = int(np.random.default_rng(names).integers(2**62))
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


def spread(where: Tensor, latent: int) -> Tensor:
    """(N, 2, h, w), image and outline → (N, latent + OUTLINE, h, w)."""
    return torch.cat([where[:, :1].expand(-1, latent, -1, -1), where[:, 1:].expand(-1, OUTLINE, -1, -1)], 1)


def grown(plane: Tensor, cells: int) -> Tensor:
    """Every cell that a plane touches, and its neighbours up to some cells away."""
    return F.max_pool2d((plane > 0).float(), 2 * cells + 1, 1, cells)


def shadowed(plane: Tensor) -> Tensor:
    """A plane and everything below it: a lesion changes how its shadow looks, down to the last echo."""
    return plane.cummax(2).values


def _machine(device: torch.device | str | None) -> torch.device:
    """What computes: the device that was named, or the GPU where there is one."""
    try:
        return torch.empty(0, device=device or processes.own_device()).device
    except (RuntimeError, AssertionError) as error:
        raise Misconfigured(
            f"Nothing can be computed on {device} here: say cpu, or cuda where there is a GPU."
        ) from error


def _check(pathology: str, box: Any, mask: Any, healthy: Any, labels: Mapping[str, str]) -> None:
    """Whether what is given can be given, and together."""
    if not pathology:
        raise Misconfigured("Say a pathology: every image is asked for with one.")
    if pathology == "normal" and (box is not None or mask is not None or healthy is not None):
        raise Misconfigured("A normal image has no lesion: give no box, mask or healthy image with it.")
    if box is not None and mask is not None:
        raise Misconfigured("A mask says where the lesion lies: give no box with it.")
    if said := {"pathology", "birads", "device"} & set(labels):
        raise Misconfigured(f"{', '.join(sorted(said))}: said by its own name, not as a task's label.")
    if mask is not None and (np.ndim(mask) != 2 or not isinstance(mask, np.ndarray) or not (mask > 0).any()):
        raise Misconfigured(f"A mask is an array of rows and columns, true in the lesion, not {_kind(mask)}.")
    if healthy is not None and (
        np.ndim(healthy) != 2 or getattr(healthy, "dtype", None) != np.uint8 or not healthy.size
    ):
        raise Misconfigured(
            f"A healthy image is a grey 8-bit array of rows and columns, not {_kind(healthy)};"
            ' of a file: np.asarray(Image.open(PATH).convert("L")).'
        )
    if mask is not None and healthy is not None and mask.shape != healthy.shape:
        raise Misconfigured(f"The mask {mask.shape} and the healthy image {healthy.shape} differ in size.")


def _kind(given: Any) -> str:
    if not isinstance(given, np.ndarray):
        return f"a {type(given).__name__}"
    return f"{given.dtype} {given.shape}" + ("" if not given.size or (given > 0).any() else ", empty")


def _outline(mask: NDArray[Any], place: Placement) -> Grey:
    """The mask as the network sees it; what its grid cannot show is refused."""
    outline = data.prepare_mask(np.where(mask > 0, 255, 0).astype(np.uint8), place)
    if not conditions.outline_mask(conditions.outline_planes(outline)[None]).any():
        raise Misconfigured(f"The mask's lesion is too small to be drawn in an image of {place.size} pixels.")
    return outline


def _checked(box: Box | Sequence[float]) -> Box:
    try:
        edges = [float(edge) for edge in box]
        left, top, right, bottom = edges
    except (TypeError, ValueError):
        edges = []
    if not edges or not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise Misconfigured(f"A box is left, top, right, bottom as fractions of the image (0 to 1); {box!r} is none.")
    return Box(left, top, right, bottom)


def named(*parts: nn.Module) -> str:
    """A digest of weights."""
    name = hashlib.sha256()
    for part in parts:
        for key, tensor in sorted(part.state_dict().items()):
            name.update(key.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return name.hexdigest()


def adapted(card: Card, network: networks.Network, path: Path, generator: str) -> Card:
    """Put an adapter into the network of the generator of that digest, and its new labels into the card."""
    weights, notes = checkpoint.read(path)
    if "rank" not in notes or "vocabulary" not in notes:
        raise Misconfigured(f"{path} is no adapter: `busgen-cds fewshot` makes one, {ADAPTER}.")
    if notes.get("generator", generator) != generator:  # one made before that was noted is told by its shapes alone
        raise Misconfigured(f"{path} was made for another generator: adapt this one anew.")
    vocabulary = Vocabulary({name: tuple(labels) for name, labels in notes["vocabulary"]})
    if any(vocabulary.names.get(name, ())[: len(labels)] != labels for name, labels in card.vocabulary.names.items()):
        raise Misconfigured(f"{path} was made for a generator of other labels: adapt this one anew.")
    network.conditions.grow(vocabulary)
    networks.adapt(network, int(notes["rank"]))
    networks.load_adapter_weights(network, _wide(weights))
    boxes = {name: np.array(b, np.float32).reshape(-1, 4) for name, b in notes["boxes"].items()}
    regions = {name: tuple(q) for name, q in notes["regions"].items()}
    return dataclasses.replace(
        card,
        vocabulary=vocabulary,
        boxes=BoxPrior({**card.boxes.boxes, **boxes}, {**card.boxes.bandwidth, **notes["bandwidth"]}),
        regions=RegionPrior({**card.regions.quantiles, **regions}),
    )


def batches(wishes: Sequence[Wish], size: int) -> Iterator[Sequence[Wish]]:
    for i in range(0, len(wishes), size):
        yield wishes[i : i + size]


def _half(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}


def _wide(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
