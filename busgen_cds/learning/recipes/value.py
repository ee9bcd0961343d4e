"""What generated images are worth to a reader: a resumable queue of arms, the same steps for each.

Rules:
- The arms: real; real with classic augmentation; real with as many duplicates; real with generated images at several
  ratios; generated only, and that with classic augmentation. Besides, scaling: fewer real images, and ever more
  generated ones.
- Every arm sees the same number of images, classes in the same balance; only what they are drawn from differs. Classic
  augmentation is an arm of its own, so that what it gives or costs is not mixed with what images give or cost: all
  other arms' images are mirrored, and now and then darker, brighter or coarser, and nothing else.
- No patient of a test is seen by any part of an arm: not by its reader, nor by the generator, its autoencoder or its
  filter. This is asserted from what each says it learnt from.
- A run is a folder with its result, or it is to be done: the queue may be stopped and called again at any time,
  for more seeds too; a queue of other settings takes another folder.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from busgen_cds.errors import Misconfigured
from busgen_cds.learning import augment, checkpoint, data, embed, evaluate, figures
from busgen_cds.learning.generator import Card
from busgen_cds.learning.recipes import synthesise, train_reader

NAME, SCALING = "generator-value", "generator-scaling"  # pages: the comparison; the arms of growing size
RESULT, SETTINGS = "value.json", "settings.json"
SETS = (
    *("BUS-BRA test", "BUS-BRA unseen devices", "BUSI external, lesions", "BUSI external, all 780"),
    *("BUSI test, lesions", "BUSI test, all", "BUS-UCLM, lesions", "BUS-UCLM, all"),
)
STILL = augment.Strength(*[0.0] * len(dataclasses.fields(augment.Strength)))  # what every arm has


@dataclass(frozen=True)
class Arm:
    """What a reader is trained on."""

    name: str
    real: float = 1.0  # share of the real training patients
    duplicates: float = 0.0  # of the real images, as often again
    generated: int = 0  # images
    augmented: bool = False


@dataclass(frozen=True)
class Run:
    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm.name}-{self.seed}"


@dataclass(frozen=True)
class Settings:
    sources: tuple[str, ...] = ("busbra",)  # what every part of an arm learns from; all else is external
    steps: int = 1200
    batch: int = 16
    size: int = 128
    seeds: int = 3


def arms(real: int) -> list[Arm]:
    """The comparison that decides, at the count of real training images."""
    ratios = [Arm(f"real+generated-x{r:g}", generated=round(r * real)) for r in (0.25, 0.5, 1)]
    return [
        Arm("real"),
        Arm("real+augmentation", augmented=True),
        Arm("real+duplicates", duplicates=1.0),
        *ratios,
        Arm("generated only", real=0.0, generated=real),
        Arm("generated only+augmentation", real=0.0, generated=real, augmented=True),
    ]


def scaling(counts: Sequence[int], shares: Sequence[float] = (0.25, 0.5)) -> list[Arm]:
    """Ever more generated images alone, beside ever more real ones."""
    generated = [Arm(f"generated-{count}", real=0.0, generated=count) for count in counts]
    return generated + [Arm(f"real-{share:g}", real=share) for share in shares]


def queue(every: Sequence[Arm], seeds: int) -> list[Run]:
    """Seed by seed, so that a queue that is stopped has compared all arms at least once."""
    return [Run(arm, seed) for seed in range(seeds) for arm in every]


def work(
    runs: Sequence[Run],
    root: Path,
    generated: Path | None,
    card: Card | None,
    out: Path,
    settings: Settings,
    init: Path | None = None,
    cache: Path | None = None,
    most: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> int:
    """Do what is not done yet, at most so many; returns how many are left."""
    made = {"images": synthesise.digest(generated)} if generated else {}
    asked = {k: v for k, v in vars(settings).items() if k != "seeds"} | made
    checkpoint.same_work(out / SETTINGS, asked | {"data": data.digest(data.read_manifest(root))}, "results")
    waiting = [run for run in runs if not (out / run.name / RESULT).exists()]
    for run in waiting[:most]:
        tell(f"{run.name}: {len(waiting)} runs to do")
        folder = out / run.name
        assert_unseen(run.arm, data.read_manifest(root), card, settings)
        assemble(run, root, generated, folder / "data", settings)
        trained = train_reader.train(folder / "data", folder, reader_settings(run, settings), init, None, cache)
        found = {"arm": dataclasses.asdict(run.arm), "seed": run.seed, **judge(trained, root, settings, cache)}
        checkpoint.write_json(folder / RESULT, found)
    return max(0, len(waiting) - len(waiting[:most]))


def assert_unseen(arm: Arm, rows: Sequence[data.Row], card: Card | None, settings: Settings) -> None:
    """What the arm's parts learnt from holds no patient of a test."""
    if not arm.generated:
        return
    if card is None:
        raise Misconfigured(f"The arm {arm.name} needs generated images, and the generator's card says what it saw.")
    if set(card.trained_on) != set(settings.sources):
        raise Misconfigured(
            f"The arm {arm.name} calls all but {', '.join(settings.sources)} external;"
            f" its generator saw {', '.join(card.trained_on)}."
        )
    seen = {(r.source, r.patient) for r in rows if r.source in card.trained_on and r.split in ("train", "val")}
    tested = {(r.source, r.patient) for r in rows if r.source not in settings.sources or r.split in data.HELD_OUT}
    if seen & tested:
        raise AssertionError(f"Patient {sorted(seen & tested)[0]} was seen by the generator and is in a test.")


def reader_settings(run: Run, s: Settings) -> train_reader.Settings:
    """The same for every arm but for what it sees."""
    sources = list(s.sources) if run.arm.real else []
    sources += ["duplicate"] if run.arm.duplicates else []
    sources += [synthesise.SOURCE] if run.arm.generated else []
    return train_reader.Settings(
        sources=tuple(sources) if run.arm.real else (*s.sources, *sources),
        seed=run.seed,
        steps=s.steps,
        batch=s.batch,
        size=s.size,
        warm_size=s.size,
        report_every=max(1, s.steps // 2),
        save_every=max(1, s.steps // 4),
        strength=augment.Strength() if run.arm.augmented else STILL,
    )


def assemble(run: Run, root: Path, generated: Path | None, out: Path, settings: Settings) -> Path:
    """A manifest of the arm, its images named where they lie; validation is always the real one."""
    rows = data.read_manifest(root)
    real = [r for r in rows if r.source in settings.sources and r.split == "train"]
    names = sorted({(r.source, r.patient) for r in real})
    order = np.random.default_rng((run.seed, 7)).permutation(len(names))
    kept = {names[i] for i in order[: math.ceil(run.arm.real * len(names))]}
    chosen = [moved(r, root) for r in real if (r.source, r.patient) in kept]
    chosen += [moved(r, root) for r in rows if r.source in settings.sources and r.split == "val"]
    copies = [r for r in real if (r.source, r.patient) in kept][: round(run.arm.duplicates * len(real))]
    chosen += [moved(r, root) | {"source": "duplicate"} for r in copies]
    if run.arm.generated:
        chosen += _generated(generated, run)
    data.write_table(out / data.MANIFEST, chosen)
    return out


def moved(row: data.Row, root: Path) -> dict[str, str]:
    root = root.resolve()
    return row.labels | {"image": str(root / row.image), "mask": str(root / row.mask) if row.mask else ""}


def _generated(folder: Path | None, run: Run) -> list[dict[str, str]]:
    if folder is None:
        raise Misconfigured(f"The arm {run.arm.name} needs generated images: name their folder.")
    rows = data.read_manifest(folder)
    if len(rows) < run.arm.generated:
        raise Misconfigured(f"The arm {run.arm.name} needs {run.arm.generated} images; {folder} holds {len(rows)}.")
    order = np.random.default_rng((run.seed, 8)).permutation(len(rows))[: run.arm.generated]
    return [moved(rows[i], folder) for i in order]


@torch.inference_mode()
def judge(trained: Path, root: Path, settings: Settings, cache: Path | None) -> dict[str, Any]:
    """Scores of every test, kept for paired comparisons, and their AUC."""
    images = data.load(root, data.read_manifest(root), cache, settings.size)
    kept = {t.name: np.flatnonzero(t.keep) for t in evaluate.tests(images, settings.sources) if t.name in SETS}
    judged = np.unique(np.concatenate(list(kept.values())))
    score = np.full(len(images), np.nan)
    score[judged] = read(trained, images.image[judged])
    return {
        "auc": {name: figures.auc(score[keep], images.malignant[keep]) for name, keep in kept.items()},
        "scores": {name: score[keep].round(4).tolist() for name, keep in kept.items()},
    }


@torch.inference_mode()
def read(trained: Path, images: embed.Squares) -> NDArray[np.float64]:
    network = embed.read_reader(trained)
    found = []
    for i in range(0, len(images), 32):
        batch = torch.from_numpy(images[i : i + 32])[:, None].float() / 255
        found.append(network(batch).malignancy.float().numpy())
    return np.concatenate(found).astype(np.float64)


# The page


def results(runs: Sequence[Run], out: Path) -> list[dict[str, Any]]:
    """Of those runs of a queue that are done."""
    files = [out / run.name / RESULT for run in runs]
    return [json.loads(path.read_text(encoding="utf-8")) for path in files if path.exists()]


def compared(found: list[dict[str, Any]], root: Path, settings: Settings, cache: Path | None = None) -> dict[str, Any]:
    """Each arm's AUC over the seeds that all have, and the paired difference to the best control."""
    rows = data.read_manifest(root)
    images = data.load(root, rows, cache, settings.size)
    tests = {t.name: np.flatnonzero(t.keep) for t in evaluate.tests(images, settings.sources) if t.name in SETS}
    found = _even(found)
    names = list(dict.fromkeys(run["arm"]["name"] for run in found))
    table: dict[str, Any] = {}
    for test, keep in tests.items():
        truth, patients = images.malignant[keep], images.patients[keep]
        means = {n: np.mean([r["scores"][test] for r in found if r["arm"]["name"] == n], axis=0) for n in names}
        aucs = {n: [r["auc"][test] for r in found if r["arm"]["name"] == n] for n in names}
        controls = [n for n in names if not _made(found, n) and not n.startswith("real-")]
        best = max(controls, key=lambda n: float(np.mean(aucs[n])), default=None)
        table[test] = {n: _line(n, best, means, aucs, truth, patients) for n in names}
    return table


def _even(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Only seeds that every arm has: a mean over more of them is better by itself."""
    seeds = [{run["seed"] for run in found if run["arm"] == arm} for arm in [run["arm"] for run in found]]
    common = set.intersection(*seeds) if seeds else set()
    return [run for run in found if run["seed"] in common]


def _made(found: list[dict[str, Any]], name: str) -> bool:
    return any(r["arm"]["generated"] for r in found if r["arm"]["name"] == name)


def _line(
    name: str,
    best: str | None,
    means: dict[str, NDArray[np.float64]],
    aucs: dict[str, list[float]],
    truth: NDArray[np.int64],
    patients: NDArray[np.str_],
) -> dict[str, Any]:
    line: dict[str, Any] = {
        "seeds": aucs[name],
        "ensemble": figures.auc_interval(means[name], truth, patients)._asdict(),
    }
    if best is not None and name != best:
        gain = figures.bootstrap(
            lambda i: figures.auc(means[name][i], truth[i]) - figures.auc(means[best][i], truth[i]), patients
        )
        line |= {"against": best, "gain": gain._asdict()}
    return line


def write(table: dict[str, Any], left: int, generator: str, settings: Settings, out: Path, page: str = NAME) -> Path:
    """`generator`: the digest of that which made the images; empty: none did."""
    out.mkdir(parents=True, exist_ok=True)
    found = {"left": left, "generator": generator, "table": table}
    (out / f"{page}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    lines = [f"# What {'ever more' if page == SCALING else 'generated'} images are worth to a reader", ""]
    lines += [
        f"Every arm: {settings.steps} steps of {settings.batch} images at {settings.size} px, from ImageNet."
        f" Real images, and the generator's, are those of {', '.join(settings.sources)}; every other source is"
        " external. Arms without classic augmentation mirror their images, and now and then darken, brighten or"
        " coarsen them.",
        "",
        f"Runs still to do: {left}." if left else "All runs of the queue are done.",
    ]
    for test, arms_ in table.items():
        lines += [
            "",
            f"## {test}",
            "",
            "| arm | seeds | AUC of each seed | AUC of their mean | gain over best control |",
        ]
        lines.append("|---|---|---|---|---|")
        for name, line in arms_.items():
            gain = figures.Interval(**line["gain"]).signed if "gain" in line else "–"
            seeds = ", ".join(f"{x:.3f}" for x in line["seeds"])
            whole = figures.Interval(**line["ensemble"])
            lines.append(f"| {name} | {len(line['seeds'])} | {seeds} | {whole} | {gain} |")
    (out / f"{page}.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    return out / f"{page}.md"
