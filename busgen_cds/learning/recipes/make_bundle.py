"""Trained checkpoints → a calibrated Candidate: open, export, check parity, calibrate on `val`, describe.

Rules:
- Members of one ensemble come from one arm: the same sources, the same split. What a run started from counts as seen.
- Every number in the Candidate that was fitted was fitted on `val`; the gate's directions come from `train`.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from busgen_cds import bundle, signing
from busgen_cds.birads import logit
from busgen_cds.errors import Misconfigured
from busgen_cds.learning import calibrate, card, checkpoint, data, export, figures
from busgen_cds.learning.recipes import train_reader


@dataclass(frozen=True)
class Choice:
    """What a person decides about a bundle."""

    name: str
    version: str
    created: datetime.date
    mirrored: bool = True
    drawing: int = 0  # the first members, which draw the outline; 0: all of them
    floor: float | None = 0.02  # of the attention, once trained: less evidence is spread where no lesion is
    sweeps: int = 40  # simulated studies that the pooling is fitted on
    sweep_frames: int = 48
    threads: int = 0  # 0: as many as the machine has


def make(
    root: Path,
    checkpoints: Sequence[Path],
    choice: Choice,
    cache: Path | None = None,
    figures_so_far: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> bundle.Candidate:
    """Everything from checkpoints to an unsigned Candidate."""
    tell("opening the checkpoints")
    deployed, notes = export.open_checkpoints(checkpoints, choice.mirrored, choice.floor, choice.drawing)
    sources = _one_arm(notes)
    rows = data.read_manifest(root)
    settings = train_reader.Settings(sources=sources)
    train_rows, val_rows = train_reader.choose(rows, settings)
    data.check_arm(train_rows, rows)
    data.check_val(val_rows)
    train = data.load(root, train_rows, cache)
    val = data.load(root, val_rows, cache)

    tell("exporting and comparing with torch")
    graph = export.to_onnx(deployed)
    run = export.open_graph(graph, choice.threads)
    parity = export.parity(deployed, run, np.asarray(val.image[:4, None] / 255, np.float32))

    tell("calibrating on val")
    read = calibrate.read(run, val.image)
    calibration = calibrate.fit(read, val)
    gate, reach = _gate(run, train, val, read)
    thresholds = calibrate.thresholds(read, val, calibration, reach)

    tell("simulating studies of many frames")
    sweeps = calibrate.simulate(run, val, calibration, choice.sweeps, choice.sweep_frames)
    pooling = calibrate.pooling(sweeps, lowest_suspicion(thresholds))

    on_val = _on_val(read, val, calibration, thresholds) | {"parity": parity}
    measured = {"val": on_val, **(figures_so_far or {})}
    described = {
        "members": [dict(note) for note in notes],
        "mirrored": choice.mirrored,
        "drawing": choice.drawing or len(checkpoints),
        "floor": choice.floor,
    }
    return export.candidate(
        name=choice.name,
        version=choice.version,
        created=choice.created,
        graph=graph,
        domain=gate.to_bytes(),
        card=card.write(choice.name, choice.version, train, val, calibration, thresholds, measured, described),
        calibration=calibration,
        thresholds=thresholds,
        pooling=pooling,
        trained_on=sources,
        settings=described,
        figures=measured,
    )


def with_figures(
    root: Path, sealed: bundle.Bundle, measured: Mapping[str, Any], cache: Path | None = None
) -> bundle.Candidate:
    """The same network, gate and thresholds, with what an evaluation of it found in its card and manifest."""
    manifest = sealed.manifest
    rows = data.read_manifest(root)
    chosen = train_reader.choose(rows, train_reader.Settings(sources=manifest.trained_on))
    train, val = (data.load(root, part, cache) for part in chosen)
    found = {**manifest.figures, **measured}
    text = card.write(
        manifest.name, manifest.version, train, val, manifest.calibration, manifest.thresholds, found, manifest.settings
    )
    files = {**sealed.files, bundle.CARD: text.encode()}
    digests = {name: signing.digest(content) for name, content in files.items()}
    return bundle.Candidate(dataclasses.replace(manifest, files=digests, figures=found), files)


def _gate(
    run: export.Run, train: data.Images, val: data.Images, read: calibrate.Readings, most: int = 800
) -> tuple[calibrate.Gate, float]:
    """Fitted on `train` as it is and as other scanners might show it; how far it reaches is set on `val` likewise."""
    chosen = np.random.default_rng(0).permutation(len(train))[:most]
    images = train.image[np.sort(chosen)]
    own, others = (calibrate.read(run, shown).embedding for shown in (images, calibrate.views(images, seed=1)))
    gate = calibrate.Gate.fit(np.concatenate([own, others]))
    elsewhere = calibrate.read(run, calibrate.views(val.image, seed=2)).embedding
    return gate, calibrate.reach(gate.distance(read.embedding), gate.distance(elsewhere))


def lowest_suspicion(thresholds: bundle.Thresholds) -> float:
    """Log-odds at and above which a category is 4A or more wherever malignancy is rare: the rule-out score.

    At the calibration's own prevalence the band of 2 % is stricter still; it is the site's prevalence that moves it.
    """
    return logit(thresholds.rule_out)


def _one_arm(notes: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    if any(checkpoint.folds(note) for note in notes):
        raise Misconfigured(
            "A run of cross-validation has seen patients of test splits: it is never made into a bundle."
        )
    arms = {tuple(checkpoint.sources(note)) for note in notes}
    if len(arms) != 1:
        raise Misconfigured(f"The checkpoints come from different arms: {sorted(arms)}.")
    return arms.pop()


def _on_val(
    read: calibrate.Readings, val: data.Images, calibration: bundle.Calibration, thresholds: bundle.Thresholds
) -> dict[str, Any]:
    drawn = (val.lesion == 1) & (val.masked == 1)
    overlap = figures.dice(read.mask[drawn] > thresholds.mask, calibrate.half(val.mask[drawn]))
    log_odds = calibration.scale * read.malignancy + calibration.offset
    floor = lowest_suspicion(thresholds)
    found = {
        "images": len(val),
        "auc": figures.auc(read.malignancy, val.malignant),
        "presence_auc": figures.auc(read.presence, val.lesion),
        "dice": float(overlap.mean()),
        "sensitivity_4a": figures.sensitivity(log_odds, val.malignant, floor),
        "specificity_4a": figures.specificity(log_odds, val.malignant, floor),
    }
    return {name: None if isinstance(v, float) and math.isnan(v) else round(v, 4) for name, v in found.items()}
