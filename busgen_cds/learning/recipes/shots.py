"""What few shots are worth: the reader's AUC on an unseen device or site, against the number of shots.

Rules:
- Shots come from the adaptation split, judgement from the test split of the same device or site; no patient is in both.
- Four arms at each number of shots: nothing adapted; the shots themselves added; images of the adapted generator added;
  both. The same steps for each.
- A run is a folder with its result, or it is to be done.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from busgen_cds.learning import data, figures
from busgen_cds.learning.generator import Generator
from busgen_cds.learning.recipes import fewshot, synthesise, train_reader, value
from busgen_cds.learning.recipes.fewshot import Source

NAME = "generator-shots"
ARMS = ("nothing", "shots", "generated", "shots+generated")
JUDGED = {"device-adapt": "device-test", "site-adapt": "site-test"}


@dataclass(frozen=True)
class Settings:
    shots: tuple[int, ...] = (8, 16, 32, 64)
    seeds: int = 3
    generated: int = 500  # images of each adapter
    adapter: fewshot.Settings = dataclasses.field(default_factory=fewshot.Settings)
    reader: value.Settings = dataclasses.field(default_factory=value.Settings)


def work(
    load: Callable[[Path | None], Generator],
    root: Path,
    source: Source,
    out: Path,
    settings: Settings,
    init: Path | None = None,
    cache: Path | None = None,
    most: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> int:
    """Do what is not done yet; returns how many runs are left. `load` opens the generator, with an adapter or not."""
    runs = [(k, seed, arm) for seed in range(settings.seeds) for k in settings.shots for arm in ARMS]
    waiting = [run for run in runs if not _result(out, *run).exists()]
    for k, seed, arm in waiting[:most]:
        tell(f"{arm}, {k} shots, seed {seed}: {len(waiting)} runs to do")
        images = _adapted_images(load, root, source, out, k, seed, settings, cache) if "generated" in arm else None
        folder = _result(out, k, seed, arm).parent
        assemble(root, source, folder / "data", k, seed, arm, images, settings)
        sources = (
            *settings.reader.sources,
            *(["shots"] if "shots" in arm else []),
            *([synthesise.SOURCE] if images else []),
        )
        base = value.reader_settings(value.Run(value.Arm(arm), seed), settings.reader)
        reader = dataclasses.replace(base, sources=sources)
        trained = train_reader.train(folder / "data", folder, reader, init, None, cache)
        _result(out, k, seed, arm).write_text(
            json.dumps(judge(trained, root, source, settings, cache)), encoding="utf-8"
        )
    return max(0, len(waiting) - len(waiting[:most]))


def _result(out: Path, shots: int, seed: int, arm: str) -> Path:
    return out / f"{arm}-{shots}-{seed}" / "shots.json"


def _adapted_images(
    load: Callable[[Path | None], Generator],
    root: Path,
    source: Source,
    out: Path,
    shots: int,
    seed: int,
    settings: Settings,
    cache: Path | None,
) -> Path:
    folder = out / f"adapter-{shots}-{seed}"
    adapter = folder / "adapter.safetensors"
    if not adapter.exists():
        how = dataclasses.replace(settings.adapter, shots=shots, seed=seed)
        fewshot.adapt(load(None), root, source, folder, how, cache)
    makes = load(adapter)
    chosen = fewshot.choose(data.read_manifest(root), source, shots, seed)
    devices = tuple(sorted({row.labels.get("device", "") for row in chosen} - {""}))
    mix = {
        name: float(np.mean([row.pathology == name for row in chosen])) for name in {row.pathology for row in chosen}
    }
    how_many = synthesise.Settings(count=settings.generated, seed=seed, mix=mix, devices=devices, filtered=False)
    synthesise.generate(makes, folder / "images", how_many, None)
    return folder / "images"


def assemble(
    root: Path, source: Source, out: Path, shots: int, seed: int, arm: str, images: Path | None, settings: Settings
) -> Path:
    """Real training images, with what the arm adds."""
    out.mkdir(parents=True, exist_ok=True)
    rows = data.read_manifest(root)
    chosen = [value.moved(r, root) for r in rows if r.source in settings.reader.sources and r.split in ("train", "val")]
    if "shots" in arm:
        few = fewshot.choose(rows, source, shots, seed)
        chosen += [value.moved(r, root) | {"source": "shots", "split": "train"} for r in few]
    if images is not None:
        chosen += [value.moved(r, images) for r in data.read_manifest(images)]
    columns = list(dict.fromkeys(name for row in chosen for name in row))
    with (out / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, restval="")
        table.writeheader()
        table.writerows(chosen)
    return out


def judge(trained: Path, root: Path, source: Source, settings: Settings, cache: Path | None) -> dict[str, Any]:
    splits = [JUDGED[split] for split in source.splits if split in JUDGED]
    rows = [row for row in data.read_manifest(root) if row.split in splits]
    images = data.load(root, rows, cache, settings.reader.size)
    score = value.read(trained, images.image)
    return {"scores": score.round(4).tolist(), "auc": figures.auc(score, images.malignant)}


def write(out: Path, settings: Settings, left: int, results: Path, title: str) -> Path:
    """AUC of every seed, by arm and number of shots."""
    results.mkdir(parents=True, exist_ok=True)
    table: dict[str, dict[str, Sequence[float]]] = {}
    for arm in ARMS:
        for k in settings.shots:
            done = [_result(out, k, seed, arm) for seed in range(settings.seeds)]
            found = [float(json.loads(path.read_text(encoding="utf-8"))["auc"]) for path in done if path.exists()]
            table.setdefault(arm, {})[str(k)] = found
    (results / f"{NAME}-{title}.json").write_text(
        json.dumps({"left": left, "auc": table}, indent=1) + "\n", encoding="utf-8"
    )
    lines = [f"# What few shots are worth: {title}", "", f"Runs still to do: {left}.", ""]
    lines += [
        "| arm | " + " | ".join(f"{k} shots" for k in settings.shots) + " |",
        "|---" * (1 + len(settings.shots)) + "|",
    ]
    for arm, by_shots in table.items():
        cells = [", ".join(f"{x:.3f}" for x in found) or "not run" for found in by_shots.values()]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    (results / f"{NAME}-{title}.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    return results / f"{NAME}-{title}.md"
