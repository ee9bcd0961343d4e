"""What pre-training on millions of images takes: measured here, multiplied out, and written down with its assumptions.

Rules: speeds are measured on this machine by the recipes' own steps; what is assumed (images, epochs, price) is an
argument and is named beside the figure.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from busgen_cds.learning import conditions, processes
from busgen_cds.learning.autoencoder import FACTOR
from busgen_cds.learning.conditions import Vocabulary
from busgen_cds.learning.recipes import autoencode, encode, pretrain

PAGE = "pretraining-cost.md"
LATENT_BYTES = 2  # half precision


@dataclass(frozen=True)
class Assumed:
    images: int = 3_518_495  # BUSGen's
    epochs: float = 100.0  # of the flow
    coder_images: int = 2_000_000  # images seen by the autoencoder: it learns texture, not patients
    devices: int = 8
    views: int = encode.Settings.views  # of each image, every one encoded and kept
    price: float = 2.5  # of one device for an hour, in the operator's currency
    efficiency: float = 0.9  # of several devices against one, times their number


@dataclass(frozen=True)
class Speeds:
    """Images a second on one device."""

    preset: str
    device: str
    coder: float
    encoding: float
    flow: float
    sample_bytes: int


def measure(preset: str, seconds: float = 20.0, tell: Callable[[str], None] = lambda line: None) -> Speeds:
    """The recipes' own steps on made-up images of the preset's size."""
    team = processes.Team()
    coding = autoencode.Settings(**autoencode.preset(autoencode.PRESETS, preset))
    learning = pretrain.Settings(**autoencode.preset(pretrain.PRESETS, preset))
    coder_run = autoencode.begin(coding, team)
    image = torch.rand(coding.batch, 1, coding.size, coding.size, device=team.device) * 2 - 1
    tell("autoencoder")
    coder = coding.batch * _per_second(
        lambda: autoencode.step(coder_run, coder_run.coder, image, None, coding, team), seconds
    )
    tell("encoding")
    with torch.inference_mode():
        encoding = coding.batch * _per_second(lambda: coder_run.average.encode(image), seconds / 4)
    vocabulary = Vocabulary({"pathology": ("normal", "benign", "malignant"), "birads": ("3",), "device": ("A", "B")})
    images = [_example(coding.size, learning.shape.latent, i) for i in range(learning.batch)]
    run = pretrain.begin(learning, vocabulary, team)
    tell("flow")
    flow = learning.batch * _per_second(
        lambda: pretrain.step(run, run.network, images, vocabulary, coding.size, learning, team), seconds
    )
    cells = (coding.size // FACTOR) ** 2
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return Speeds(preset, name, coder, encoding, flow, cells * learning.shape.planes * LATENT_BYTES)


def _per_second(act: Callable[[], Any], seconds: float) -> float:
    act()
    began, count = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        act()
        count += 1
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return count / (time.monotonic() - began)


def _example(size: int, latent: int, seed: int) -> encode.Encoded:
    rng = np.random.default_rng(seed)
    cells = size // conditions.CELL
    mask = np.zeros((size, size), np.uint8)
    mask[size // 3 : size // 2, size // 3 : size // 2] = 255
    labels: dict[str, str | None] = {"pathology": "benign", "birads": "3", "device": "A"}
    box = conditions.Box(0.33, 0.33, 0.5, 0.5)
    noise = rng.standard_normal((latent, cells, cells)).astype(np.float16)
    return encode.Encoded(noise, conditions.outline_planes(mask).half().numpy(), labels, box, 100, 100)


def _processor() -> str:
    """Which processor, how much of it, and how busy it was with other work."""
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    return f"{torch.get_num_threads()} threads of {_cpu()}, load {busy:.1f}"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def hours(speeds: Speeds, assumed: Assumed) -> dict[str, float]:
    """Device hours of each part."""
    return {
        "autoencoder": assumed.coder_images / speeds.coder / 3600,
        "encoding": assumed.images * assumed.views / speeds.encoding / 3600,
        "flow": assumed.images * assumed.epochs / speeds.flow / 3600,
    }


def write(measured: list[Speeds], assumed: Assumed, out: Path) -> Path:
    """The page, with every assumption on it."""
    lines = [
        "# What pre-training on 3.5 million images takes",
        "",
        "Written by `busgen-cds cost`. Speeds were measured on this machine by the recipes' own steps; hours, money and"
        " storage are multiplied out from them. The autoencoder's speed is that of its first part, without"
        " perceptual loss and critic. What else the machine did meanwhile lowers the figures: its load"
        " then stands in the table.",
        "",
        f"Assumed: {assumed.images:,} images; the flow sees each {assumed.epochs:g} times; the autoencoder sees"
        f" {assumed.coder_images:,} images; each image is encoded in {assumed.views} views, as a lesion is (a normal"
        f" image in {encode.Settings.normal_views}); {assumed.devices} devices work at {assumed.efficiency:.0%} of"
        f" {assumed.devices} times the speed of one; a device costs {assumed.price:g} an hour.",
        "",
        "| preset | device | autoencoder | encoding | flow | latents of all views |",
        "|---|---|---|---|---|---|",
    ]
    for s in measured:
        storage = assumed.images * assumed.views * s.sample_bytes / 1e9
        lines.append(
            f"| {s.preset} | {s.device} | {s.coder:.1f} images/s | {s.encoding:.0f} images/s | {s.flow:.1f} images/s"
            f" | {storage:.0f} GB |"
        )
    lines += ["", "| preset | device | part | device hours | days on one | cost |", "|---|---|---|---|---|---|"]
    for s in measured:
        found = hours(s, assumed)
        lines += [_line(s, part, h, assumed) for part, h in found.items()]
        lines.append(_line(s, "**all**", sum(found.values()), assumed))
        together = sum(found.values()) / (assumed.devices * assumed.efficiency) / 24
        lines.append(f"| {s.preset} | {assumed.devices} of them | **all, together** | | {together:,.1f} | |")
    lines += [
        "",
        "A processor is the wrong tool for this, and the table says how wrong. On a GPU the same command measures"
        " it: `busgen-cds cost --preset gpu`. Figures of devices that were not at hand are not given here.",
        "",
        "Shards stream from disk or object storage; a process holds two shards at a time. Every run resumes after"
        " a kill, and interruptible machines can be used: what is lost is the time since the last checkpoint.",
        "",
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / PAGE).write_text("\n".join(lines), encoding="utf-8")
    (out / "results").mkdir(exist_ok=True)
    figures = {"measured": [vars(s) for s in measured], "assumed": vars(assumed)}
    (out / "results" / "pretraining-cost.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return out / PAGE


def _line(s: Speeds, part: str, h: float, assumed: Assumed) -> str:
    return f"| {s.preset} | {s.device} | {part} | {h:,.0f} | {h / 24:,.1f} | {h * assumed.price:,.0f} |"
