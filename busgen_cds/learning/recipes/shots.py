"""What few shots are worth: the reader's AUC on an unseen device or site, against the number of shots.

Rules:
- Shots come from the adaptation split, judgement from the test split of the same device or site; no patient is in both.
- Every reader goes on from the same member of a trained one, by the night's own recipe. Four arms at each number of
  shots: as it was; the shots alone; images of the generator adapted to the shots alone; half a batch of each.
- The gain is the mean over seeds of their gains in AUC, its interval over resampled patients and seeds.
- A run is a folder with its result, or it is to be done.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from busgen_cds import signing
from busgen_cds.errors import Misconfigured
from busgen_cds.learning import checkpoint, data, figures
from busgen_cds.learning.figures import Interval
from busgen_cds.learning.generator import VARIOUS, Generator, Sampling
from busgen_cds.learning.recipes import adapt_reader, fewshot, site_adaptation, synthesise, value
from busgen_cds.learning.recipes.autoencode import describe
from busgen_cds.learning.recipes.fewshot import Source

NAME, SETTINGS = "generator-shots", "settings.json"
ARMS = ("shots", "generated", "shots+generated")
JUDGED = {"device-adapt": "device-test", "site-adapt": "site-test"}


@dataclass(frozen=True)
class Settings:
    shots: tuple[int, ...] = (8, 16, 32, 64)
    seeds: int = 3
    generated: int = 200  # images of each adapter
    adapter: fewshot.Settings = dataclasses.field(default_factory=fewshot.Settings)
    reader: adapt_reader.Settings = dataclasses.field(default_factory=adapt_reader.Settings)
    sampling: Sampling = VARIOUS  # as a night asks


@dataclass(frozen=True)
class Run:
    arm: str
    shots: int
    seed: int

    def file(self, out: Path) -> Path:
        return out / f"{self.arm}-{self.shots}-{self.seed}" / "shots.json"


def queue(settings: Settings) -> list[Run]:
    """Seed by seed, so that a queue that is stopped has compared all arms at least once."""
    return [Run(arm, k, seed) for seed in range(settings.seeds) for k in settings.shots for arm in ARMS]


def work(
    load: Callable[[Path | None], Generator],
    root: Path,
    source: Source,
    start: Path,
    out: Path,
    settings: Settings,
    cache: Path | None = None,
    most: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> int:
    """Do what is not done yet; returns how many runs are left. `load` opens the generator, with an adapter or not."""
    judged = tests(root, source, cache)
    asked = {"task": source.task.name, "start": signing.digest(start.read_bytes()), "generator": load(None).digest}
    asked["data"] = data.digest(data.read_manifest(root))
    asked |= {k: v for k, v in describe(settings).items() if k not in ("seeds", "shots")}
    checkpoint.same_work(out / SETTINGS, asked, "results")
    if not (before := out / "before.json").exists():
        checkpoint.write_json(before, {"scores": _scores(start, judged)})
    waiting = [run for run in queue(settings) if not run.file(out).exists()]
    for run in waiting[:most]:
        tell(f"{run.arm}, {run.shots} shots, seed {run.seed}: {len(waiting)} runs to do")
        folder = run.file(out).parent
        made = _adapted_images(load, root, source, out, run, settings, cache) if "generated" in run.arm else None
        assemble(root, source, folder / "data", run, made)
        how = dataclasses.replace(settings.reader, seed=run.seed)
        both = made if run.arm == "shots+generated" else None
        sources = (synthesise.SOURCE,) if run.arm == "generated" else ("shots",)
        member = adapt_reader.adapt(start, folder / "data", sources, folder, how, both, cache)
        checkpoint.write_json(run.file(out), {"scores": _scores(member, judged)})
        for done in (member, folder / "reader.safetensors"):
            done.unlink(missing_ok=True)
    return max(0, len(waiting) - len(waiting[:most]))


def tests(root: Path, source: Source, cache: Path | None) -> data.Images:
    """The images that judge; Doppler frames are none."""
    splits = [JUDGED[split] for split in source.splits if split in JUDGED]
    if not splits:
        raise Misconfigured(f"The task {source.task.name} has shots of no unseen device or site: {', '.join(JUDGED)}.")
    rows = [r for r in data.read_manifest(root) if r.split in splits and r.labels.get("doppler") != "1"]
    return data.load(root, rows, cache)


def _scores(member: Path, judged: data.Images) -> list[float]:
    reader = adapt_reader.reader_of(adapt_reader.open_member(member))
    return [float(x) for x in adapt_reader.scores(reader, judged.image).round(4)]


def _adapted_images(
    load: Callable[[Path | None], Generator],
    root: Path,
    source: Source,
    out: Path,
    run: Run,
    settings: Settings,
    cache: Path | None,
) -> Path:
    folder = out / f"adapter-{run.shots}-{run.seed}"
    adapter = folder / "adapter.safetensors"
    if not adapter.exists():
        how = dataclasses.replace(settings.adapter, shots=run.shots, seed=run.seed)
        fewshot.adapt(load(None), root, source, folder, how, cache)
    chosen = fewshot.choose(data.read_manifest(root), source, run.shots, run.seed)
    devices = tuple(sorted({row.labels.get("device", "") for row in chosen} - {""}))
    mix = {
        name: float(np.mean([row.pathology == name for row in chosen])) for name in {row.pathology for row in chosen}
    }
    asked = synthesise.Settings(
        count=settings.generated,
        seed=run.seed,
        mix=mix,
        devices=devices,
        filtered=False,
        sampling=settings.sampling,
    )
    synthesise.generate(load(adapter), folder / "images", asked, None)
    return folder / "images"


def assemble(root: Path, source: Source, out: Path, run: Run, made: Path | None) -> Path:
    """What the arm learns from; a few home images stand where training wants a `val`."""
    rows = data.read_manifest(root)
    home = [r for r in rows if r.split == "val"][:8]
    if run.arm == "generated" and made is not None:
        chosen = [value.moved(r, made) | {"split": "train"} for r in data.read_manifest(made)]
    else:
        few = fewshot.choose(rows, source, run.shots, run.seed)
        chosen = [value.moved(r, root) | {"source": "shots", "split": "train"} for r in few]
    name = chosen[0]["source"]
    chosen += [value.moved(r, root) | {"source": name} for r in home]
    data.write_table(out / data.MANIFEST, chosen)
    return out


# What was found


@dataclass(frozen=True)
class Compared:
    arm: str
    shots: int
    seeds: tuple[float, ...]  # AUC of each
    gain: Interval


def compare(root: Path, source: Source, out: Path, settings: Settings, cache: Path | None = None) -> list[Compared]:
    judged = tests(root, source, cache)
    before, found = _read(out / "before.json"), []
    for arm in ARMS:
        for k in settings.shots:
            files = [Run(arm, k, seed).file(out) for seed in range(settings.seeds)]
            if done := [_read(path) for path in files if path.exists()]:
                aucs = tuple(figures.auc(each, judged.malignant) for each in done)
                change = site_adaptation.gain(before, np.stack(done), judged.malignant, judged.patients)
                found.append(Compared(arm, k, aucs, change))
    return found


def _read(path: Path) -> NDArray[np.float64]:
    return np.array(json.loads(path.read_text(encoding="utf-8"))["scores"])


def write(found: Sequence[Compared], judged: data.Images, out: Path, left: int, results: Path, title: str) -> Path:
    """AUC of every seed and the gain, by arm and number of shots."""
    results.mkdir(parents=True, exist_ok=True)
    before = figures.auc_interval(_read(out / "before.json"), judged.malignant, judged.patients)
    numbers: dict[str, Any] = {"left": left, "before": before, "found": [dataclasses.asdict(f) for f in found]}
    page = results / f"{NAME}-{title}.md"
    page.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    patients = len(set(judged.patients.tolist()))
    lines = [
        f"# What few shots are worth: {title}",
        "",
        f"Runs still to do: {left}. Judged on {len(judged)} images of {patients} patients, none of whom gave a shot.",
        "",
        f"The reader before: AUC {before}.",
        "",
        "| arm | shots | AUC of each seed | gain (95 % interval over patients and seeds) |",
        "|---|---|---|---|",
        *(f"| {f.arm} | {f.shots} | {', '.join(f'{x:.3f}' for x in f.seeds)} | {f.gain.signed} |" for f in found),
        "",
    ]
    page.write_text("\n".join(lines), encoding="utf-8")
    return page
