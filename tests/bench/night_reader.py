"""Reads one frame a second with the shipped bundle until it is ended, and prints what each took."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from busgen_cds import app, bundle
from busgen_cds.learning import export


def frames() -> Iterator[float]:
    """Seconds that each frame took."""
    run = export.open_graph(app.open_bundle().files[bundle.NETWORK])
    frame = np.random.default_rng(0).random((1, 1, 224, 224), np.float32)
    run(frame)
    while True:
        began = time.monotonic()
        run(frame)
        yield time.monotonic() - began


if __name__ == "__main__":
    for taken in frames():
        print(taken, flush=True)
        time.sleep(1)
