"""Do CPU and CUDA say the same? `python -m tests.bench.providers`, on a machine with a GPU, for the bundle shipped."""

from __future__ import annotations

import sys

import numpy as np
from PIL import Image

from busgen_cds import app, pixels
from busgen_cds.errors import Misconfigured
from busgen_cds.vision import engine
from tests.images import DEMO_IMAGES


def main() -> int:
    pictures = [np.asarray(Image.open(path).convert("L")) for path in sorted(DEMO_IMAGES.glob("*.png"))]
    frames = np.stack([pixels.prepare(picture)[0] for picture in pictures])
    try:
        apart = engine.compare_providers(app.open_bundle(), frames)
    except Misconfigured as reason:
        print(reason)
        return 1
    for name, difference in apart.items():
        print(f"{name}: at most {difference:.2e} apart over {len(frames)} frames")
    return 0


if __name__ == "__main__":
    sys.exit(main())
