"""A whole night with 64 cases, timed stage by stage, and what the live reader's latency is beside it.

    python -m tests.bench.night DATA START… [--generator DIR --source busi] --out docs/results/night.md

A source's B-mode images (BUS-UCLM's without being told) are the site's cases, kept and sealed as readers would have
confirmed them; everything after that is the product. A generator is adapted only where enough patients with a lesion
can be held back: then the cases are lesions alone, and of a source that has so many. Latency: one frame through the
live engine, in a process of ordinary priority, before and during.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from busgen_cds import app, settings
from busgen_cds.case import Case
from busgen_cds.cli.site import settings_text
from busgen_cds.flows import adapt_site
from busgen_cds.learning import data
from busgen_cds.learning.recipes import site_adaptation
from busgen_cds.operations import learning_loop

TAUGHT = 64
Taken = tuple[float, float]  # seconds that passed, and of the processor


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("data", type=Path)
    asked.add_argument("start", type=Path, nargs="+")
    asked.add_argument("--out", type=Path, required=True)
    asked.add_argument("--generator", type=Path)
    asked.add_argument("--source", default=site_adaptation.SITE)
    chosen = asked.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = app.found(Path(folder) / "site", _settings_text(chosen), "a passphrase of some length")
        with app.opened_site(settings.read(config)) as site:
            count = confirm(learning_loop.casebook(site), chosen.data, chosen.source, chosen.generator is not None)
            alone = latency(20)
            times, word, beside = night(site)
            digest = word.split()[1]
            judged = site.shelf.get(digest)
    said = [*(f"- {reason}" for reason in judged.reasons), "", f"Besides, {_said(judged.report, 'The generator')}."]
    chosen.out.write_text("\n".join(page(count, times, word.split()[0], said, alone, beside, chosen)), encoding="utf-8")
    print(chosen.out.read_text())


def _said(report: Mapping[str, Any], title: str) -> str:
    return next(str(table["rows"][0][0]) for table in report["tables"] if table["title"] == title)


def _settings_text(chosen: argparse.Namespace) -> str:
    start = ", ".join(f'"{path.resolve()}"' for path in chosen.start)
    text = settings_text("Night", 0.1, ["ANY"], "", 0)
    generator = f'generator = "{chosen.generator.resolve()}"\nreplay = 0.3\n' if chosen.generator else ""
    return f'{text}\n[adaptation]\nstart = [{start}]\ndata = "{chosen.data.resolve()}"\n{generator}'


def confirm(book: Any, root: Path, source: str, lesions_only: bool) -> dict[str, int]:
    """So many cases that teach, classes in turn, and all that test."""
    rows = data.read_manifest(root)
    mine = [r for r in rows if r.source == source and r.split != "excluded" and r.labels.get("doppler") != "1"]
    mine = [r for r in mine if r.lesion] if lesions_only else mine
    counts = {"teach": 0, "test": 0}
    for row in site_adaptation.drawn(mine, len(mine), 0):
        patient = hashlib.sha256(row.patient.encode()).hexdigest()[:16]
        part = book.part_of(patient)
        if part == "teach" and counts["teach"] == TAUGHT:
            continue
        tissue = np.asarray(Image.open(root / row.image).convert("L"))
        mask = np.asarray(Image.open(root / row.mask).convert("L")) > 0 if row.mask else None
        truth: Any = row.pathology
        one = Case(patient, tissue, mask, truth, None, "pathology", "agree", "2026-01-01", None, "")
        book.keep(one, study_ref=f"{sum(counts.values()):032x}", revision=1, finding=1, who="bench", grounds="")
        counts[part] += 1
    return counts


def night(site: Any) -> tuple[dict[str, Taken], str, list[float]]:
    times: dict[str, Taken] = {}
    stations = learning_loop.night_stations(site)
    made = vars(stations.recipes)
    timed = adapt_site.Recipes(**{name: _timed(name, work, times) for name, work in made.items()})
    reader = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.night_reader"], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    adapt_site.be_modest(15)
    adapt_site.launch(
        adapt_site.Stations(**{**vars(stations), "recipes": timed}), app.workflows_url(site.settings)
    )  # fmt: skip
    began = _now()
    try:
        word = adapt_site.run(anyway=True)
    finally:
        adapt_site.end()
        reader.terminate()
    times["the whole night"] = _since(began)
    assert reader.stdout is not None
    return times, word, [float(line) for line in reader.stdout.read().split()]


def _timed(name: str, work: Callable[..., Any], times: dict[str, Taken]) -> Callable[..., Any]:
    def run(*given: Any) -> Any:
        began, before = _now(), times.get(name, (0.0, 0.0))
        try:
            return work(*given)
        finally:
            wall, processor = _since(began)
            times[name] = before[0] + wall, before[1] + processor

    return run


def _now() -> Taken:
    return time.monotonic(), time.process_time()


def _since(began: Taken) -> Taken:
    now = _now()
    return now[0] - began[0], now[1] - began[1]


def latency(count: int) -> list[float]:
    """Seconds of single frames through the live engine."""
    from tests.bench.night_reader import frames

    return [next(taken) for taken in [frames()] for _ in range(count)]


def page(
    count: dict[str, int], times: dict[str, Taken], word: str, said: list[str], alone: list[float],
    beside: list[float], chosen: argparse.Namespace,
) -> list[str]:  # fmt: skip
    load = os.getloadavg()[1]
    return [
        "# A night, timed",
        "",
        f"Made by `python -m tests.bench.night`: B-mode images of {chosen.source} are the cases;"
        f" {'a generator' if chosen.generator else 'no generator'}, {len(chosen.start)} members.",
        f"{count['teach']} cases teach, {count['test']} test. {os.cpu_count()} cores,"
        f" shared with other work (five-minute load average {load:.0f}): an idle machine is faster.",
        "",
        "| stage | seconds | of the processor |",
        "|---|---|---|",
        *(f"| {name} | {wall:.0f} | {processor:.0f} |" for name, (wall, processor) in times.items()),
        "",
        f"Bar: 60 minutes on two cores: {'met' if times['the whole night'][0] <= 3600 else 'missed'}."
        f" What became of the candidate: {word}.",
        *said,
        "",
        "| one frame through the live engine | median, ms | 95th percentile, ms | frames |",
        "|---|---|---|---|",
        *(
            f"| {name} | {1000 * np.median(seen):.0f} | {1000 * np.percentile(seen, 95):.0f} | {len(seen)} |"
            for name, seen in (("before the night", alone), ("beside the night (niceness 15, one thread)", beside))
            if seen
        ),
        "",
        "Where other work shares the cores, the two rows are of different loads: their difference concludes nothing.",
        "",
    ]


if __name__ == "__main__":
    main()
