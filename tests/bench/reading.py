"""How long does a reading take, and how much memory? `python -m tests.bench.reading [--rounds 3] [--json FILE]`

Rules:
- The bundle shipped, the product's own command, and whole processes: what a user waits for.
- Processor seconds stand beside wall seconds, which say what else the machine was doing.
- The best round counts, as a slower one says what disturbed it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from busgen_cds import app, pixels
from tests import images

BARS = {"read one image, cold": 3.0, "read a clip of 300 frames": 20.0, "one frame, warm": 0.05}
CLIP_MEMORY = 1.5  # GB
_WRITE_CLIP = """
import sys, pathlib
from tests import images
ds = images.breast_dataset(cine=30, colour="rgb", seed=1)
ds.NumberOfFrames, ds.PixelData = 300, ds.PixelData * 10
pathlib.Path(sys.argv[1]).write_bytes(images.part10(ds))
"""


class Cost(NamedTuple):
    seconds: float
    processor_seconds: float
    gigabytes: float | None = None


def command(path: Path, out: Path) -> Cost:
    """`busgen-cds read` on one file, as a process."""
    began = time.monotonic()
    arguments = [sys.executable, "-m", "busgen_cds", "read", str(path), "--out", str(out), "--device", "cpu", "--json"]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"reading {path.name} failed")
    return Cost(time.monotonic() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024**2)


def one_frame() -> Cost:
    """Preparing and reading one frame, the network being warm."""
    engine = app.open_engine(None, "cpu")
    tissue = np.asarray(images.picture(seed=1))[60:560, 120:680, 0].copy()
    began, spent, repeats = time.monotonic(), _processor(), 20
    for _ in range(repeats):
        engine.read(pixels.prepare(tissue)[0][None])
    cost = Cost((time.monotonic() - began) / repeats, (_processor() - spent) / repeats)
    engine.close()
    return cost


def measure(rounds: int, folder: Path) -> dict[str, Cost]:
    still, clip = folder / "still.dcm", folder / "clip.dcm"
    still.write_bytes(images.breast_image(seed=1))
    # in a process of its own: a child's peak memory begins with its parent's
    subprocess.run([sys.executable, "-c", _WRITE_CLIP, str(clip)], check=True)
    work: dict[str, Callable[[], Cost]] = {
        "read one image, cold": lambda: command(still, folder / "still"),
        "read a clip of 300 frames": lambda: command(clip, folder / "clip"),
        "one frame, warm": one_frame,
    }
    return {name: min(once() for _ in range(rounds)) for name, once in work.items()}


def _processor() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        costs = measure(chosen.rounds, Path(folder))
    for name, cost in costs.items():
        memory = f", {cost.gigabytes:.2f} GB" if cost.gigabytes else ""
        print(f"{name}: {cost.seconds:.3f} s ({cost.processor_seconds:.3f} s of processor{memory}), bar {BARS[name]} s")
    if chosen.json:
        chosen.json.write_text(json.dumps({name: cost._asdict() for name, cost in costs.items()}, indent=2) + "\n")
    within = all(cost.seconds <= BARS[name] for name, cost in costs.items())
    return 0 if within and (costs["read a clip of 300 frames"].gigabytes or 0) < CLIP_MEMORY else 1


if __name__ == "__main__":
    sys.exit(main())
