"""What a site's own cases are worth to its reader: BUS-UCLM plays the new site, in a resumable queue of runs.

Rules:
- Cases come from patients of `site-adapt`, judgement from patients of `site-test`; Doppler-flagged frames are left out.
- A draw is so many images at random, classes in turn; every arm at a number of cases adapts with the same draws.
- Every arm begins from the same member of the shipped reader and is read at the reader's own size, without any view
  averaged. What is compared is the same patients read before and after.
- The interval resamples patients and draws. One that holds both 0 and the bar concludes nothing, and is called so.
- No setting was chosen by what is found here: `site-test` and BUS-BRA's `test` are looked at for reporting only.
- Forgetting is read where a bar asks for it, at the most cases: reading costs as much as adapting.
- A run is a file with its scores, or it is to be done.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from busgen_cds.learning import checkpoint, data, figures
from busgen_cds.learning.figures import Interval
from busgen_cds.learning.recipes import adapt_reader, value

NAME = "site-adaptation"
SITE, HOME = "bus_uclm", "busbra"
SOURCE = "site"
BAR, LOWEST, DROP = 0.03, -0.01, 0.01  # at the most cases; at the fewest; on BUS-BRA's test
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Arm:
    name: str
    says: str
    method: adapt_reader.Method = "fine-tune"
    kept: float = 0.0
    replay: bool = False


ARMS = (
    Arm("head", "the last weights alone", "head"),
    Arm("plain", "all weights, the cases alone"),
    Arm("plain, half-way", "the mean of the weights before and after `plain`", kept=0.5),
    Arm("replay", "all weights, half of each batch the release's generated images", replay=True),
    Arm("replay, half-way", "the mean of the weights before and after `replay`", kept=0.5, replay=True),
)


@dataclass(frozen=True)
class Settings:
    cases: tuple[int, ...] = (16, 32, 64)
    draws: int = 10
    adapt: adapt_reader.Settings = dataclasses.field(default_factory=adapt_reader.Settings)


@dataclass(frozen=True)
class Run:
    arm: Arm
    cases: int
    draw: int

    def file(self, out: Path) -> Path:
        return out / f"{self.arm.name.replace(', ', '-')}-{self.cases}-{self.draw}" / "scores.json"


def queue(settings: Settings, replay: bool) -> list[Run]:
    """The cheap arms first; then the sizes that a bar names, draw by draw: a stopped queue compares all arms."""
    arms = [arm for arm in ARMS if replay or not arm.replay]
    cheap = [arm for arm in arms if arm.method == "head"]
    first = [Run(arm, k, d) for arm in cheap for d in range(settings.draws) for k in settings.cases]
    rest = [arm for arm in arms if arm not in cheap]
    sizes = sorted(settings.cases, key=lambda k: (k not in (max(settings.cases), min(settings.cases)), -k))
    return first + [Run(arm, k, d) for k in sizes for d in range(settings.draws) for arm in rest]


def b_mode(rows: Sequence[data.Row], split: str) -> list[data.Row]:
    """The site's rows of a split, without Doppler-flagged frames."""
    return [r for r in rows if r.source == SITE and r.split == split and r.labels.get("doppler") != "1"]


def drawn(rows: Sequence[data.Row], cases: int, draw: int) -> list[data.Row]:
    """So many images at random, classes in turn for as long as each lasts."""
    rng = np.random.default_rng((draw, cases))
    waiting = {name: [r for r in rows if r.pathology == name] for name in data.PATHOLOGIES}
    mixed = {name: [part[i] for i in rng.permutation(len(part))] for name, part in waiting.items()}
    chosen: list[data.Row] = []
    while len(chosen) < cases and any(mixed.values()):
        for name in reversed(data.PATHOLOGIES):
            if mixed[name] and len(chosen) < cases:
                chosen.append(mixed[name].pop())
    return chosen


@dataclass(frozen=True)
class Tests:
    site: data.Images
    home: data.Images

    def read(self, member: adapt_reader.Member, *, home: bool) -> dict[str, list[float]]:
        reader = adapt_reader.reader_of(member)
        sets = {"site": self.site, "home": self.home} if home else {"site": self.site}
        return {name: adapt_reader.scores(reader, images.image).round(4).tolist() for name, images in sets.items()}


def tests(root: Path, cache: Path | None) -> Tests:
    rows = data.read_manifest(root)
    home = [r for r in rows if r.source == HOME and r.split == "test"]
    return Tests(data.load(root, b_mode(rows, "site-test"), cache), data.load(root, home, cache))


def work(
    root: Path,
    start: Path,
    out: Path,
    settings: Settings,
    replay: Path | None = None,
    cache: Path | None = None,
    most: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> int:
    """Do what is not done yet, at most so many; returns how many are left."""
    import torch

    torch.set_num_threads(max(1, settings.adapt.threads))
    judged = tests(root, cache)
    before = out / "before.json"
    if not before.exists():
        checkpoint.write_json(before, judged.read(adapt_reader.open_member(start), home=True))
    waiting = [run for run in queue(settings, replay is not None) if not run.file(out).exists()]
    for run in waiting[:most]:
        tell(f"{run.arm.name}, {run.cases} cases, draw {run.draw}")
        if run.arm.method == "head":
            checkpoint.write_json(run.file(out), _head(run, root, start, out, judged, cache))
            continue
        member = adapted(run, root, start, out, settings, replay if run.arm.replay else None, cache)
        checkpoint.write_json(run.file(out), judged.read(member, home=run.cases == max(settings.cases)))
    return max(0, len(waiting) - len(waiting[:most]))


def _head(run: Run, root: Path, start: Path, out: Path, judged: Tests, cache: Path | None) -> dict[str, list[float]]:
    """The features are pooled once for all draws: another head is a sum over them."""
    rows = b_mode(data.read_manifest(root), "site-adapt")
    path = out / "pooled.npz"
    if not path.exists():
        reader = adapt_reader.reader_of(adapt_reader.open_member(start))
        sets = {"cases": data.load(root, rows, cache), "site": judged.site, "home": judged.home}
        parts = {name: adapt_reader.pooled(reader, images.image) for name, images in sets.items()}
        arrays = {f"{name} {kind}": part[k] for name, part in parts.items() for k, kind in enumerate(("x", "logit"))}
        np.savez(path.with_suffix(".partial.npz"), **arrays)  # type: ignore[arg-type]
        path.with_suffix(".partial.npz").replace(path)
    with np.load(path) as kept:
        few = drawn(rows, run.cases, run.draw)
        index = [rows.index(row) for row in few]
        truth, patients = np.array([int(r.malignant) for r in few]), np.array([r.patient for r in few])
        change, _ = adapt_reader.fitted(kept["cases x"][index], kept["cases logit"][index], truth, patients)
        after = {n: kept[f"{n} logit"] + kept[f"{n} x"] @ change[:-1] + change[-1] for n in ("site", "home")}
    return {name: score.round(4).tolist() for name, score in after.items()}


def adapted(
    run: Run, root: Path, start: Path, out: Path, settings: Settings, replay: Path | None, cache: Path | None
) -> adapt_reader.Member:
    """One run's member. An arm that stops half-way takes the weights of the arm that does not."""
    whole = dataclasses.replace(run, arm=dataclasses.replace(run.arm, kept=0.0, name=run.arm.name.split(",")[0]))
    folder = whole.file(out).parent
    how = dataclasses.replace(settings.adapt, method=run.arm.method, kept=0.0, seed=run.draw)
    path = folder / "member.safetensors"
    if not path.exists():
        assemble(root, folder / "data", run)
        adapt_reader.adapt(start, folder / "data", (SOURCE,), folder, how, replay, cache)
        (folder / "reader.safetensors").unlink(missing_ok=True)
    weights, notes = adapt_reader.open_member(path)
    return adapt_reader.mixed(adapt_reader.open_member(start)[0], weights, run.arm.kept), notes


def assemble(root: Path, folder: Path, run: Run) -> Path:
    """The cases of a draw as a manifest of their own."""
    rows = data.read_manifest(root)
    return lesson(root, folder, drawn(b_mode(rows, "site-adapt"), run.cases, run.draw), rows)


def lesson(root: Path, folder: Path, few: Sequence[data.Row], rows: Sequence[data.Row]) -> Path:
    """Some cases to train on; a few home images stand where training wants a `val`."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = [r for r in rows if r.source == HOME and r.split == "val"][:8]
    records = [value.moved(r, root) | {"source": SOURCE, "split": "train"} for r in few]
    records += [value.moved(r, root) | {"source": SOURCE} for r in shown]
    data.write_table(folder / data.MANIFEST, records)
    return folder


# What was found


@dataclass(frozen=True)
class Compared:
    arm: str
    cases: int
    draws: int
    auc: float  # on the site's test patients, mean over draws
    gain: Interval
    lesions: Interval  # gain between benign and malignant alone
    home: Interval | None  # change on BUS-BRA's test; None: not read at so many cases


def compare(root: Path, out: Path, settings: Settings, cache: Path | None = None) -> list[Compared]:
    judged = tests(root, cache)
    before = _read(out / "before.json")
    found = []
    for arm in ARMS:
        for k in settings.cases:
            files = [Run(arm, k, d).file(out) for d in range(settings.draws)]
            done = [_read(path) for path in files if path.exists()]
            if done:
                found.append(_compared(arm.name, k, judged, before, done))
    return found


def _read(path: Path) -> dict[str, Floats]:
    return {name: np.array(v) for name, v in json.loads(path.read_text(encoding="utf-8")).items()}


def _compared(
    arm: str, cases: int, judged: Tests, before: Mapping[str, Floats], done: Sequence[Mapping[str, Floats]]
) -> Compared:
    site = np.stack([d["site"] for d in done])
    home = np.stack([d["home"] for d in done]) if all("home" in d for d in done) else None
    lesion = judged.site.lesion == 1
    truth, patients = judged.site.malignant, judged.site.patients
    return Compared(
        arm,
        cases,
        len(done),
        float(np.mean([figures.auc(s, truth) for s in site])),
        gain(before["site"], site, truth, patients),
        gain(before["site"][lesion], site[:, lesion], truth[lesion], patients[lesion]),
        None if home is None else gain(before["home"], home, judged.home.malignant, judged.home.patients),
    )


def gain(
    before: Floats, after: Floats, truth: NDArray[np.int64], patients: NDArray[np.str_], count: int = 1000
) -> Interval:
    """Mean change of the AUC over draws (D, N), with an interval over resampled patients and draws."""
    rng = np.random.default_rng(0)
    names, inverse = np.unique(patients, return_inverse=True)
    drawn_patients = rng.integers(0, len(names), (count, len(names)))
    weight = np.stack([np.bincount(each, minlength=len(names)) for each in drawn_patients])[:, inverse]
    changes = np.stack([_aucs(score, truth, weight) for score in after]) - _aucs(before, truth, weight)  # (D, count)
    chosen = rng.integers(0, len(after), (count, len(after)))
    values = np.take_along_axis(changes.T, chosen, 1).mean(1)
    once = np.ones((1, len(truth)))
    whole = float(np.mean([_aucs(score, truth, once) for score in after]) - _aucs(before, truth, once)[0])
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return Interval(whole, float(low), float(high))


def _aucs(score: Floats, truth: NDArray[np.int64], weight: NDArray[Any]) -> Floats:
    """The AUC under each row of weights (R, N): how often a positive outranks a negative; ties count half."""
    positive, negative = np.flatnonzero(truth > 0), np.flatnonzero(truth == 0)
    gap = score[positive][:, None] - score[negative][None]
    wins = (gap > 0) + 0.5 * (gap == 0)
    above, below = weight[:, positive].astype(float), weight[:, negative].astype(float)
    total = above.sum(1) * below.sum(1)
    won = ((above @ wins) * below).sum(1)
    return np.asarray(np.divide(won, total, out=np.full(len(weight), np.nan), where=total > 0))


def verdict(found: Compared, settings: Settings) -> str:
    """Where the interval lies, in words."""
    most, fewest = max(settings.cases), min(settings.cases)
    bar = BAR if found.cases == most else 0.0
    if found.cases == fewest and found.gain.low > LOWEST:
        return f"not worse (lower bound above {LOWEST:+.2f})"
    if found.gain.low >= bar and found.gain.low > 0:
        return "better" if not bar else f"better, beyond the bar of {BAR:+.2f}"
    if found.gain.high < 0:
        return "worse"
    return "inconclusive"


def winner(found: Sequence[Compared], settings: Settings) -> str:
    """The arm with the best gain at the most cases among those that do not forget; empty: none is better."""
    most = max(settings.cases)
    able = [f for f in found if f.cases == most and f.home and f.home.value >= -DROP and f.gain.value > 0]
    return max(able, key=lambda f: f.gain.value).arm if able else ""


def write(
    found: Sequence[Compared], root: Path, out: Path, settings: Settings, left: int, results: Path, cache: Path | None
) -> Path:
    """The page, and its numbers."""
    results.mkdir(parents=True, exist_ok=True)
    judged, before = tests(root, cache), _read(out / "before.json")
    site = figures.auc_interval(before["site"], judged.site.malignant, judged.site.patients)
    home = figures.auc_interval(before["home"], judged.home.malignant, judged.home.patients)
    numbers = {"before": {"site": site, "home": home}, "left": left, "found": [dataclasses.asdict(f) for f in found]}
    text = json.dumps(numbers | {"settings": dataclasses.asdict(settings)}, indent=1)
    (results / f"{NAME}.json").write_text(text + "\n", encoding="utf-8")
    page = results / f"{NAME}.md"
    page.write_text("\n".join(_page(found, settings, judged, site, home, left)), encoding="utf-8")
    return page


def _page(
    found: Sequence[Compared], settings: Settings, judged: Tests, site: Interval, home: Interval, left: int
) -> list[str]:
    won = winner(found, settings)
    patients = len(set(judged.site.patients.tolist()))
    return [
        "# What a site's own cases are worth",
        "",
        f"Made by `busgen-cds site-adaptation`; numbers in `{NAME}.json`. Runs still to do: {left}.",
        "",
        "BUS-UCLM plays the new site: cases are B-mode images of its `site-adapt` patients, classes in turn; judged",
        f"are {len(judged.site)} B-mode images ({int(judged.site.malignant.sum())} malignant) of {patients} `site-test`"
        " patients, normal images counted as not malignant.",
        "Every arm starts from one member of the shipped reader, read at its own size without averaged views.",
        "Intervals are 95 % bootstraps over patients and draws, of the paired change.",
        "",
        f"Before: AUC {site} on the site's patients, {home} on BUS-BRA `test`.",
        "",
        "| arm | cases | draws | AUC after | gain | gain, lesions only | change on BUS-BRA `test` | |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {f.arm} | {f.cases} | {f.draws} | {f.auc:.3f} | {f.gain.signed} | {f.lesions.signed} |"
            f" {f.home.signed if f.home else '–'} | {verdict(f, settings)} |"
            for f in found
        ),
        "",
        *(
            f"- `{arm.name}`: {arm.says}{'' if arm.name in {f.arm for f in found} else ' (not run yet)'}."
            for arm in ARMS
        ),
        "",
        *_bars(found, settings),
        "",
        f"**What the product uses**: {f'`{won}`' if won else 'no arm is better than the reader as it is'}."
        " Whatever it makes at a site is judged there before anybody may promote it.",
        "",
        f"Settings: {settings.adapt.steps} steps of {settings.adapt.batch} images at {settings.adapt.size} px,"
        f" rate {settings.adapt.rate:g} (encoder {settings.adapt.encoder_rate:g}), one thread; none was chosen by these"
        " results.",
        "",
    ]


def _bars(found: Sequence[Compared], settings: Settings) -> list[str]:
    most, fewest = max(settings.cases), min(settings.cases)
    lines = ["| bar | arm | found | |", "|---|---|---|---|"]
    for f in found:
        if f.cases == most and f.home:
            met, kept = f.gain.value >= BAR, f.home.value >= -DROP
            lines.append(_bar(f"gain ≥ {BAR:+.2f} with {most} cases", f, settings, f.gain.signed, met))
            lines.append(_bar(f"BUS-BRA drops by ≤ {DROP:.2f}", f, settings, f"{f.home.value:+z.3f}", kept))
        if f.cases == fewest:
            held = f.gain.low > LOWEST
            lines.append(
                _bar(f"lower bound > {LOWEST:+.2f} with {fewest} cases", f, settings, f"{f.gain.low:+.3f}", held)
            )
    return lines


def _bar(bar: str, of: Compared, settings: Settings, found: str, met: bool) -> str:
    few = f", on {of.draws} of {settings.draws} draws" if of.draws < settings.draws else ""
    return f"| {bar} | {of.arm} | {found} | {'met' if met else 'missed'}{few} |"
