"""What the laboratory's page asks of a generator: choices, healthy images to start from, and pictures one by one.

Rules:
- The generator is opened when it is first asked, and once; images are made one after another, for one person at a time.
- A picture too near to a training image is dropped and counted, where the folder holds a release filter.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from busgen_cds.errors import Misconfigured
from busgen_cds.learning import generator, release
from busgen_cds.learning.generator import Card, Generator, Sample, Sampling

HEALTHY = Path(__file__).parent.parent / "demo_images"


@dataclass(frozen=True)
class Picture:
    """One made image, ready to be shown."""

    image: bytes = field(repr=False)  # PNG, grey
    mask: bytes = field(repr=False)  # PNG, 0 or 255
    facts: Mapping[str, Any]


class Studio:
    def __init__(self, folder: Path = generator.SHIPPED, sampling: Sampling | None = None) -> None:
        self.folder, self._sampling = folder, sampling or Sampling()
        self._lock = threading.Lock()
        self._opened: Generator | None = None

    def problem(self) -> str:
        """Why nothing can be made here; empty when it can."""
        return "" if (self.folder / generator.CARD).exists() else f"There is no generator in {self.folder}."

    def choices(self) -> Mapping[str, tuple[str, ...]]:
        """What can be said of an image: pathology, birads, device → labels."""
        return Card.from_json((self.folder / generator.CARD).read_text(encoding="utf-8")).vocabulary.names

    def healthy(self) -> tuple[str, ...]:
        """Synthetic healthy breasts to put a lesion into."""
        return tuple(path.stem for path in sorted(HEALTHY.glob("normal_*.png")))

    def healthy_png(self, name: str) -> bytes:
        if name not in self.healthy():
            raise KeyError(name)
        return (HEALTHY / f"{name}.png").read_bytes()

    def make(
        self, count: int, asked: Mapping[str, Any], seed: int, tell: Callable[[int, int], None]
    ) -> Iterator[Picture | None]:
        """Pictures as they come; None for one that was dropped."""
        with self._lock:
            makes = self._open()
            gate = release.of(self.folder)
            for number in range(count):
                sample = makes.sample(1, first=number, seed=seed, sampling=self._sampling, tell=tell, **_said(asked))[0]
                near = gate and not release.clear(gate, makes.coder, [sample.image], makes.card.size)[0]
                yield None if near else _picture(sample)

    def _open(self) -> Generator:
        if self._opened is None:
            self._opened = Generator.load(self.folder)
        return self._opened


def _said(asked: Mapping[str, Any]) -> dict[str, Any]:
    known = {name: asked.get(name) or None for name in ("birads", "device", "box")}
    name = asked.get("healthy") or ""
    if not name:
        return {**known, "pathology": asked["pathology"]}
    try:
        breast = np.asarray(Image.open(HEALTHY / f"{Path(name).name}.png").convert("L"))
    except OSError as missing:
        raise Misconfigured(f"There is no healthy image {name!r} here.") from missing
    return {**known, "pathology": asked["pathology"], "healthy": breast}


def _picture(sample: Sample) -> Picture:
    facts = {
        "pathology": sample.pathology,
        "birads": sample.birads,
        "device": sample.device,
        "lesion": bool(sample.mask.any()),
        "box": [round(float(each), 4) for each in sample.box] if sample.box else None,
        "seed": sample.seed,
        "index": sample.index,
    }
    return Picture(_png(sample.image), _png(np.where(sample.mask, 255, 0).astype(np.uint8)), facts)


def _png(grey: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(grey).save(out, "PNG")
    return out.getvalue()
