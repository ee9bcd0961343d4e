"""Figures of a reader, with intervals: what a critical reviewer would ask for.

Rules:
- Test splits are read here and nowhere else; nothing here chooses anything.
- Each arm says what it saw; a set that shares a patient with its training is never reported as a test.
- Intervals are bootstraps over patients. A figure without enough cases is "not measured".
- Every table and plot in docs/results/ is made from the document that `measure` returns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from scipy import ndimage

from busgen_cds import birads, bundle
from busgen_cds.learning import calibrate, data, export, figures, probes
from busgen_cds.learning.calibrate import Readings, Run
from busgen_cds.learning.figures import Interval

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
BANDS = birads.CATEGORIES
FRAMES = (1, 5, 20, 300)
LEAST_SPECIFICITY = 0.10  # of single frames, below which a gap between frame counts says nothing


@dataclass(frozen=True)
class Arm:
    """A bundle that is judged, and what it saw."""

    name: str
    manifest: bundle.Manifest
    files: Mapping[str, bytes]

    @property
    def sources(self) -> tuple[str, ...]:
        return self.manifest.trained_on


@dataclass(frozen=True)
class Set:
    """Images of one test, and which of them answer which question."""

    name: str
    keep: Flags  # over all images


class ForeignFile(NamedTuple):
    """A DICOM file that shows no breast."""

    refused: bool  # by intake, from what its header and its picture say
    pictures: NDArray[np.uint8]  # (k, S, S): what the gate alone would have to judge


def tests(images: data.Images, sources: Sequence[str]) -> list[Set]:
    """The tests of an arm: what it never saw."""
    rows = images.rows

    def where(ask: Callable[[data.Row], bool]) -> Flags:
        return np.array([ask(row) for row in rows], np.bool_)

    def lesions(keep: Flags) -> Flags:
        return np.asarray(keep & (images.lesion == 1))

    test = where(lambda r: r.source == "busbra" and r.split == "test")
    device = where(lambda r: r.source == "busbra" and r.split.startswith("device"))
    uclm = where(lambda r: r.source == "bus_uclm" and r.split.startswith("site"))
    plain = where(lambda r: r.labels.get("doppler") != "1")
    found = [Set("BUS-BRA test", test), Set("BUS-BRA unseen devices", device)]
    found.append(Set("BUS-BRA device-test", where(lambda r: r.split == "device-test")))
    if "busi" in sources:
        busi = where(lambda r: r.source == "busi" and r.split == "test")
        found += [Set("BUSI test, lesions", lesions(busi)), Set("BUSI test, all", busi)]
    else:
        busi = where(lambda r: r.source == "busi")
        found += [Set("BUSI external, lesions", lesions(busi)), Set("BUSI external, all 780", busi)]
        found.append(Set("BUSI external, without excluded", busi & where(lambda r: r.split != "excluded")))
    found += [
        Set("BUS-UCLM, lesions", lesions(uclm)),
        Set("BUS-UCLM, all", uclm),
        Set("BUS-UCLM, B-mode only, all", uclm & plain),
        Set("BUS-UCLM, with marks, all", uclm & where(lambda r: r.labels.get("marks") == "1")),
        Set("BUS-UCLM, without marks, all", uclm & where(lambda r: r.labels.get("marks") == "0")),
        Set("BUS-UCLM site-test, all", uclm & where(lambda r: r.split == "site-test")),
    ]
    _unseen(found, images, sources)
    return found


def unseen(images: data.Images, sources: Sequence[str]) -> data.Images:
    """What an arm may be tested on: every image of a patient who did not train, choose or calibrate it."""
    seen = _seen(images, sources)
    return images.pick([(row.source, row.patient) not in seen for row in images.rows])


def _seen(images: data.Images, sources: Sequence[str]) -> set[tuple[str, str]]:
    return {(row.source, row.patient) for row in images.rows if row.source in sources and row.split in ("train", "val")}


def _unseen(sets: Sequence[Set], images: data.Images, sources: Sequence[str]) -> None:
    seen = _seen(images, sources)
    for test in sets:
        for i in np.flatnonzero(test.keep):
            row = images.rows[i]
            if (row.source, row.patient) in seen:
                raise AssertionError(f"{test.name} holds {row.image}, whose patient {row.patient} the arm has seen")


def measure(
    arm: Arm,
    images: data.Images,
    read: Readings,
    run: Run,
    foreign: Mapping[str, ForeignFile],
    tell: Callable[[str], None] = lambda line: None,
    sweeps: tuple[int, int] = (25, 300),
) -> dict[str, Any]:
    """Everything that is reported about one arm."""
    sets = tests(images, arm.sources)
    logit = _log_odds(arm, read)
    by_name = {s.name: s.keep for s in sets}
    test = by_name["BUS-BRA test"]
    tell(f"{arm.name}: classes")
    found: dict[str, Any] = {
        "arm": {"name": arm.name, "trained_on": list(arm.sources), "version": arm.manifest.version},
        "classification": {s.name: classification(arm, images, logit, s.keep) for s in sets},
        "presence": presence(images, read, arm.sources),
        "devices": by_device(images, logit, test | by_name["BUS-BRA unseen devices"]),
    }
    tell(f"{arm.name}: outlines")
    found["outlines"] = outlines(arm, images, read, arm.sources)
    found["radiologists"] = radiologists(images, logit, test)
    found["radiologists, unseen devices"] = radiologists(images, logit, by_name["BUS-BRA unseen devices"])
    found["calibration"] = {s.name: calibration(images, logit, s.keep) for s in sets if s.keep.sum() > 100}
    found["categories"] = {s.name: categories(arm, images, logit, s.keep) for s in sets}
    found["decision"] = decision(images, logit, test)
    found["roc"] = {s.name: _curve(logit[s.keep], images.malignant[s.keep]) for s in sets[:7]}
    tell(f"{arm.name}: shortcuts")
    found["shortcuts"] = probes.shortcuts(images, run, logit, test)
    tell(f"{arm.name}: evidence maps")
    found["heat"] = probes.evidence(images, read, test & (images.malignant == 1), arm.files[bundle.NETWORK])
    found["gate"] = gate(arm, images, read, run, foreign)
    tell(f"{arm.name}: studies of many frames")
    found["frames"] = frames(arm, images.pick(test), run, *sweeps) if sweeps[0] else {}
    return found


def _log_odds(arm: Arm, read: Readings) -> Floats:
    line = arm.manifest.calibration
    return line.scale * read.malignancy + line.offset


def _probability(log_odds: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-log_odds)))


def _floor(arm: Arm) -> float:
    """Where 3 becomes 4A wherever malignancy is rare: the rule-out score, which no prevalence moves."""
    return birads.logit(arm.manifest.thresholds.rule_out)


def classification(arm: Arm, images: data.Images, logit: Floats, keep: Flags) -> dict[str, Any]:
    """AUC by image and patient; sensitivity and specificity at the two borders of 4A."""
    score, truth, patients = logit[keep], images.malignant[keep], images.patients[keep]
    found: dict[str, Any] = {"images": int(keep.sum()), "malignant": int(truth.sum()), "patients": len(set(patients))}
    found["auc"] = figures.auc_interval(score, truth, patients)
    means, positive, names = figures.by_patient(score, truth, patients)
    found["auc_patient"] = figures.auc_interval(means, positive, names)
    for name, border in (("3/4A", _floor(arm)), ("4A/4B", birads.logit(0.10))):
        hits, misses = score[truth == 1] >= border, score[truth == 0] < border
        found[f"sensitivity {name}"] = figures.share_interval(hits, patients[truth == 1])
        found[f"specificity {name}"] = figures.share_interval(misses, patients[truth == 0])
    probability = _probability(score)
    found["ece"] = figures.expected_calibration_error(probability, truth)
    found["brier"] = float(((probability - truth) ** 2).mean())
    return found


def presence(images: data.Images, read: Readings, sources: Sequence[str]) -> dict[str, Interval]:
    """Screening: a lesion against a normal breast."""
    sets = {"BUS-UCLM": _rows(images, "bus_uclm", "site-adapt", "site-test")}
    if "busi" in sources:
        sets["BUSI test"] = _rows(images, "busi", "test")
    else:
        sets["BUSI external"] = _rows(images, "busi", "train", "val", "test")
    return {
        name: figures.auc_interval(read.presence[keep], images.lesion[keep], images.patients[keep])
        for name, keep in sets.items()
    }


def _rows(images: data.Images, source: str, *splits: str) -> Flags:
    return np.array([row.source == source and row.split in splits for row in images.rows])


def by_device(images: data.Images, logit: Floats, keep: Flags) -> dict[str, Any]:
    devices = np.array([row.labels.get("device", "") for row in images.rows])
    found = {}
    for name in sorted(set(devices[keep])):
        mine = keep & (devices == name)
        auc = figures.auc_interval(logit[mine], images.malignant[mine], images.patients[mine])
        found[str(name)] = {"images": int(mine.sum()), "malignant": int(images.malignant[mine].sum()), "auc": auc}
    return found


def outlines(arm: Arm, images: data.Images, read: Readings, sources: Sequence[str]) -> dict[str, Any]:
    """Dice and distance of outlines at the network's input size (224 px); normals count 1 when left empty."""
    sets = {
        "BUS-BRA test": _rows(images, "busbra", "test"),
        "BUS-BRA unseen devices": _rows(images, "busbra", "device-adapt", "device-test"),
    }
    sets["BUSI test" if "busi" in sources else "BUSI external"] = (
        _rows(images, "busi", "test") if "busi" in sources else _rows(images, "busi", "train", "val", "test")
    )
    sets["BUS-UCLM"] = _rows(images, "bus_uclm", "site-adapt", "site-test")
    return {name: _outlines(arm, images, read, keep) for name, keep in sets.items()}


def _outlines(arm: Arm, images: data.Images, read: Readings, keep: Flags) -> dict[str, Any]:
    keep = keep & (images.masked == 1)
    index = np.flatnonzero(keep)
    shown = _probability(read.presence) >= arm.manifest.thresholds.presence
    overlap, near, far, with_presence = [], [], [], []
    for i in index:
        drawn = images.mask[i] > 127
        found = enlarge(read.mask[i]) > arm.manifest.thresholds.mask
        dice = float(figures.dice(found[None], drawn[None])[0])
        overlap.append(dice)
        with_presence.append(dice if shown[i] else float(not drawn.any()))
        mean, hausdorff = figures.boundary_distance(found, drawn)
        near.append(mean)
        far.append(hausdorff)
    lesion, patients = images.lesion[index] == 1, images.patients[index]
    values = np.array(overlap)
    return {
        "lesions": int(lesion.sum()),
        "images": len(index),
        "dice": figures.mean_interval(values[lesion], patients[lesion]),
        "dice_median": float(np.median(values[lesion])),
        "dice_with_normals": figures.mean_interval(np.array(with_presence), patients),
        "distance_px": float(np.nanmean(np.array(near)[lesion])),
        "hausdorff95_px": float(np.nanmean(np.array(far)[lesion])),
        "missed": int((values[lesion] < 0.1).sum()),
    }


def enlarge(mask: NDArray[Any]) -> Floats:
    """(h, w) probabilities → twice the size, bilinear with aligned cells."""
    return np.asarray(ndimage.zoom(mask.astype(np.float32), 2, order=1, grid_mode=True, mode="nearest"))


def radiologists(images: data.Images, logit: Floats, keep: Flags) -> dict[str, Any]:
    """Against the readers' own BI-RADS: sensitivity at their specificity, on the same images, paired by patient."""
    given = grades(images)
    keep = keep & (given > 0)
    score, truth, patients, grade = logit[keep], images.malignant[keep], images.patients[keep], given[keep]
    theirs = (grade >= 4).astype(np.float64)

    def at_theirs(index: NDArray[np.int64]) -> tuple[float, float, float]:
        t, s = truth[index], score[index]
        specificity = figures.specificity(theirs[index], t, 0.5)
        return (
            figures.sensitivity_at_specificity(s, t, specificity),
            figures.sensitivity(theirs[index], t, 0.5),
            specificity,
        )

    _, readers, specificity = at_theirs(np.arange(len(score)))
    return {
        "images": len(score),
        "malignant": int(truth.sum()),
        "readers_sensitivity": readers,
        "readers_specificity": specificity,
        "our_sensitivity": figures.bootstrap(lambda i: at_theirs(i)[0], patients),
        "difference": figures.bootstrap(lambda i: at_theirs(i)[0] - at_theirs(i)[1], patients, 2000),
        "readers_auc_of_grade": figures.auc_interval(grade.astype(float), truth, patients),
        "difference_in_auc": figures.bootstrap(
            lambda i: figures.auc(score[i], truth[i]) - figures.auc(grade[i], truth[i]), patients
        ),
    }


def grades(images: data.Images) -> NDArray[np.int64]:
    """The readers' BI-RADS of each image, 4A to 4C as 4; 0 where none is stated."""
    said = [row.labels.get("birads", "")[:1] for row in images.rows]
    return np.array([int(grade) if grade.isdigit() else 0 for grade in said], np.int64)


def calibration(images: data.Images, logit: Floats, keep: Flags) -> dict[str, Any]:
    score, truth, patients = logit[keep], images.malignant[keep], images.patients[keep]
    order = np.argsort(score)
    bins = [
        {
            "stated": float(_probability(score[p]).mean()),
            "found": figures.wilson(int(truth[p].sum()), len(p)),
            "n": len(p),
        }
        for p in np.array_split(order, 10)
        if len(p)
    ]
    return {
        "slope": figures.bootstrap(lambda i: figures.calibration_line(score[i], truth[i])[0], patients, 200),
        "intercept": figures.bootstrap(lambda i: figures.calibration_line(score[i], truth[i])[1], patients, 200),
        "bins": bins,
    }


def categories(arm: Arm, images: data.Images, logit: Floats, keep: Flags) -> dict[str, Any]:
    """Malignancy per category, each with its interval: the bands promise ≤ 2, ≤ 10, ≤ 50, < 95 and ≥ 95 %."""
    score, truth = logit[keep], images.malignant[keep]
    rule_out = arm.manifest.thresholds.rule_out
    said = np.array([birads.category(p, score=p, rule_out=rule_out) for p in _probability(score)])
    return {
        band: {
            "images": int((said == band).sum()),
            "malignant": figures.wilson(int(truth[said == band].sum()), int((said == band).sum())),
        }
        for band in BANDS
    }


def decision(images: data.Images, logit: Floats, keep: Flags) -> dict[str, Any]:
    """Net benefit of acting on the reader, on everybody, and on the radiologists' BI-RADS ≥ 4."""
    probability, truth = _probability(logit[keep]), images.malignant[keep]
    theirs = (grades(images)[keep] >= 4).astype(np.float64)
    at = np.arange(0.01, 0.61, 0.01)
    return {
        "threshold": [round(float(t), 2) for t in at],
        "reader": [figures.net_benefit(probability, truth, t) for t in at],
        "everybody": [figures.net_benefit(np.ones(len(truth)), truth, t) for t in at],
        "radiologists": [figures.net_benefit(theirs, truth, t) for t in at],
    }


def _curve(score: Floats, truth: NDArray[np.int64]) -> dict[str, list[float]]:
    false, true = figures.roc(score, truth)
    return {"false": [round(float(v), 4) for v in false], "true": [round(float(v), 4) for v in true]}


def gate(arm: Arm, images: data.Images, read: Readings, run: Run, foreign: Mapping[str, ForeignFile]) -> dict[str, Any]:
    """Share of frames, and of files of other organs, that are declined as unlike the training data."""
    held = safetensors.numpy.load(arm.files[bundle.DOMAIN])
    fitted, reach = calibrate.Gate(held["mean"], held["whiten"]), arm.manifest.thresholds.domain

    def strange(embedding: NDArray[np.float32]) -> Flags:
        return np.asarray(fitted.distance(embedding) > reach)

    declined = strange(read.embedding)
    doppler = np.array([row.labels.get("doppler") == "1" for row in images.rows])
    uclm = _rows(images, "bus_uclm", "site-adapt", "site-test")
    sets = {
        "BUS-BRA test": _rows(images, "busbra", "test"),
        "BUS-BRA unseen devices": _rows(images, "busbra", "device-adapt", "device-test"),
        "BUSI test": _rows(images, "busi", "test"),
        "BUS-UCLM B-mode": uclm & ~doppler,
        "BUS-UCLM Doppler": uclm & doppler,
    }
    found: dict[str, Any] = {name: figures.wilson(int(declined[k].sum()), int(k.sum())) for name, k in sets.items()}
    alone = {
        name: float(strange(calibrate.read(run, file.pictures).embedding).mean()) >= 0.5
        for name, file in foreign.items()
        if len(file.pictures)
    }
    return found | (_other_organs(foreign, alone) if foreign else {})


def _other_organs(foreign: Mapping[str, ForeignFile], alone: Mapping[str, bool]) -> dict[str, Any]:
    """`alone`: whether the gate would decline a file that intake had let through."""
    kept = sorted(name for name, file in foreign.items() if not file.refused and not alone.get(name, False))
    refused = sum(file.refused for file in foreign.values())
    return {
        "files of other organs": figures.wilson(len(foreign) - len(kept), len(foreign)),
        "files of other organs, by what their header says": figures.wilson(refused, len(foreign)),
        "files of other organs, by the gate alone": figures.wilson(sum(alone.values()), len(alone)),
        "files read after all": kept,
        "files the gate alone would read": sorted(name for name, far in alone.items() if not far),
    }


def frames(arm: Arm, images: data.Images, run: Run, patients: int, count: int) -> dict[str, Any]:
    """Specificity and sensitivity at the 3/4A border of studies of n frames, corrected as the engine corrects them."""
    simulated = calibrate.simulate(run, images, arm.manifest.calibration, patients, count, seed=7)
    border, pooling = _floor(arm), arm.manifest.pooling
    found: dict[str, Any] = {"patients": len(simulated.malignant), "malignant": sum(simulated.malignant)}
    gaps: list[float] = []
    for n in FRAMES:
        score, truth = calibrate.highest(simulated, n)
        for kind, shift in (("corrected", pooling.correction(n)), ("uncorrected", 0.0)):
            found[f"{n} {kind}"] = {
                "specificity": figures.specificity(score - shift, truth, border),
                "sensitivity": figures.sensitivity(score - shift, truth, border),
            }
        gaps.append(found[f"{n} corrected"]["specificity"])
    # a reader that calls every single frame suspicious has nothing left to lose: no gap is no proof then
    found["specificity gap"] = max(gaps) - min(gaps) if gaps[0] >= LEAST_SPECIFICITY else math.nan
    return found


def cost(arm: Arm, repeats: int = 30) -> dict[str, float]:
    """Size of the bundle, and the time of one frame on two threads of this machine (the median)."""
    run = export.open_graph(arm.files[bundle.NETWORK], threads=2)
    frame = np.full((1, 1, arm.manifest.size, arm.manifest.size), 0.3, np.float32)
    run(frame)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run(frame)
        times.append(time.perf_counter() - began)
    size = sum(len(data) for data in arm.files.values()) / 1e6
    return {"size_mb": round(size, 2), "milliseconds": round(1000 * float(np.median(times)), 1)}


def rounded(value: Any) -> Any:
    """The document as JSON: four digits, NaN as null."""
    if isinstance(value, Mapping):
        return {str(k): rounded(v) for k, v in value.items()}
    if isinstance(value, Interval):
        return {"value": rounded(value.value), "low": rounded(value.low), "high": rounded(value.high)}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    if isinstance(value, float | np.floating):
        return None if math.isnan(value) else round(float(value), 4)
    return int(value) if isinstance(value, np.integer) else value
