"""How to adapt: recipes compared on the patients of `site-adapt` alone, part of them held back in turn.

Rules:
- No patient of `site-test`, and no image of BUS-BRA's `test`, is looked at: forgetting is seen on BUS-BRA's `val`.
- The patients are dealt into folds anew for each round, those with a cancer and the others apart; a recipe learns from
  cases of all folds but one and is read on that one, so that every recipe meets the same rounds.
- A run is a file with what it changed, or it is to be done; a round is done for every recipe before the next begins.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from busgen_cds.learning import checkpoint, data, figures
from busgen_cds.learning.recipes import adapt_reader, site_adaptation
from busgen_cds.learning.recipes.site_adaptation import HOME, SOURCE

NAME = "site-recipe"
FOLDS = 3
KEPT = (0.0, 0.5)
WATCHED = 96  # images of BUS-BRA's `val`

_BASE = adapt_reader.Settings(steps=48, rate=1e-4, encoder_rate=5e-5)
RECIPES: dict[str, adapt_reader.Settings] = {
    "base": _BASE,
    "still 6": dataclasses.replace(_BASE, still=6),
    "gentle": dataclasses.replace(_BASE, strength=0.5),
    "rate x2": dataclasses.replace(_BASE, rate=2e-4, encoder_rate=1e-4),
    "anchor 0.02": dataclasses.replace(_BASE, anchor=0.02),
    "size 224, batch 8": dataclasses.replace(_BASE, size=224, batch=8),
}


@dataclass(frozen=True)
class Run:
    recipe: str
    round: int
    fold: int

    def file(self, out: Path) -> Path:
        return out / self.recipe.replace(" ", "-").replace(",", "") / f"{self.round}-{self.fold}" / "found.json"


@dataclass(frozen=True)
class Compared:
    """Means over runs, with the standard error of the first."""

    recipe: str
    kept: float
    runs: int
    gain: float  # AUC on the patients held back
    error: float | None  # None: one run has no scatter
    home: float  # change of AUC on BUS-BRA's `val`


def queue(rounds: int) -> list[Run]:
    return [Run(name, r, fold) for r in range(rounds) for name in RECIPES for fold in range(FOLDS)]


def folds(rows: Sequence[data.Row], round_: int) -> list[set[str]]:
    """The patients in parts; those with a cancer are dealt first."""
    malignant = {row.patient for row in rows if row.malignant}
    sides = (sorted(malignant), sorted({row.patient for row in rows} - malignant))
    rng = np.random.default_rng((round_, 5))
    dealt = [side[i] for side in sides for i in rng.permutation(len(side))]
    return [set(dealt[k::FOLDS]) for k in range(FOLDS)]


def work(
    root: Path,
    start: Path,
    out: Path,
    rounds: int,
    cases: int,
    cache: Path | None = None,
    most: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> int:
    """Do what is not done yet, at most so many; returns how many are left."""
    import torch

    torch.set_num_threads(_BASE.threads)
    rows = data.read_manifest(root)
    mine = site_adaptation.b_mode(rows, "site-adapt")
    site = data.load(root, mine, cache)
    val = [r for r in rows if r.source == HOME and r.split == "val"]
    home = data.load(root, val[:: max(1, len(val) // WATCHED)], cache)
    before = _scores(adapt_reader.open_member(start), site, home)
    waiting = [run for run in queue(rounds) if not run.file(out).exists()]
    for run in waiting[:most]:
        tell(f"{run.recipe}, round {run.round}, fold {run.fold}")
        held = folds(mine, run.round)[run.fold]
        folder = run.file(out).parent
        few = site_adaptation.drawn([r for r in mine if r.patient not in held], cases, run.round)
        site_adaptation.lesson(root, folder / "data", few, rows)
        how = dataclasses.replace(RECIPES[run.recipe], seed=run.round)
        path = adapt_reader.adapt(start, folder / "data", (SOURCE,), folder, how, None, cache)
        found = _changes(start, path, site, home, before, np.array([r.patient in held for r in mine]))
        (folder / "reader.safetensors").unlink(missing_ok=True)
        path.unlink()
        checkpoint.write_json(run.file(out), {"changes": found})
    return max(0, len(waiting) - len(waiting[:most]))


def _scores(member: adapt_reader.Member, *sets: data.Images) -> list[np.ndarray]:
    reader = adapt_reader.reader_of(member)
    return [adapt_reader.scores(reader, images.image) for images in sets]


def _changes(
    start: Path, path: Path, site: data.Images, home: data.Images, before: Sequence[np.ndarray], held: np.ndarray
) -> list[list[float]]:
    """For each share kept: that share, the gain on the patients held back, and the change at home."""
    after, notes = adapt_reader.open_member(path)
    first, back = adapt_reader.open_member(start)[0], site.pick(held)
    found = []
    for kept in KEPT:
        here, there = _scores((adapt_reader.mixed(first, after, kept), notes), back, home)
        gain = figures.auc(here, back.malignant) - figures.auc(before[0][held], back.malignant)
        found.append([kept, gain, figures.auc(there, home.malignant) - figures.auc(before[1], home.malignant)])
    return found


def compare(out: Path, rounds: int) -> list[Compared]:
    """Best first."""
    found = []
    for name in RECIPES:
        files = [run.file(out) for run in queue(rounds) if run.recipe == name and run.file(out).exists()]
        changes = np.array([json.loads(path.read_text(encoding="utf-8"))["changes"] for path in files])
        for k, kept in enumerate(KEPT if files else ()):
            gains, homes = changes[:, k, 1], changes[:, k, 2]
            error = float(gains.std(ddof=1) / np.sqrt(len(gains))) if len(gains) > 1 else None
            found.append(Compared(name, kept, len(files), float(gains.mean()), error, float(homes.mean())))
    return sorted(found, key=lambda each: -each.gain)


def chosen(found: Sequence[Compared]) -> Compared:
    """The best that forgets no more than it may; the plain one, where the best is not a standard error above it."""
    able = [each for each in found if each.home >= -site_adaptation.DROP] or list(found)
    best = max(able, key=lambda each: each.gain)
    plain = next((each for each in able if (each.recipe, each.kept) == ("base", 0.0)), best)
    return best if best.error is not None and best.gain - best.error > plain.gain else plain


def write(found: Sequence[Compared], cases: int, left: int, results: Path) -> Path:
    """The page, and its numbers."""
    results.mkdir(parents=True, exist_ok=True)
    document = {"cases": cases, "left": left, "found": [dataclasses.asdict(each) for each in found]}
    (results / f"{NAME}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    won, run = chosen(found), {each.recipe for each in found}
    lines = [
        "# How to adapt to a site: recipes compared",
        "",
        f"Made by `busgen-cds site-recipe`; numbers in `{NAME}.json`. Runs still to do: {left}.",
        "",
        f"{cases} cases of BUS-UCLM's `site-adapt` patients teach; the patients of one fold in {FOLDS} are held back",
        f"and read. No `site-test` patient was looked at; forgetting is seen on BUS-BRA's `val` ({WATCHED} or more).",
        "",
        "| recipe | kept of the weights before | runs | gain of AUC, ± standard error | BUS-BRA `val` |",
        "|---|---|---|---|---|",
        *(f"| {f.recipe} | {f.kept:g} | {f.runs} | {_gain(f)} | {f.home:+.3f} |" for f in found),
        "",
        *(f"- `{name}`: {_differs(how)}{'' if name in run else ' (not run yet)'}." for name, how in RECIPES.items()),
        "",
        f"**{'So far' if left else 'Chosen'}**: `{won.recipe}`, keeping {won.kept:g} of the weights before.",
        "",
    ]
    page = results / f"{NAME}.md"
    page.write_text("\n".join(lines), encoding="utf-8")
    return page


def _gain(found: Compared) -> str:
    return f"{found.gain:+.3f}" + ("" if found.error is None else f" ± {found.error:.3f}")


def _differs(how: adapt_reader.Settings) -> str:
    """What a recipe sets otherwise than the plain one."""
    base, mine = dataclasses.asdict(_BASE), dataclasses.asdict(how)
    changed = [f"{name.replace('_', ' ')} {value:g}" for name, value in mine.items() if value != base[name]]
    return ", ".join(changed) or f"{how.steps} steps of {how.batch} images at {how.size} px, rate {how.rate:g}"
