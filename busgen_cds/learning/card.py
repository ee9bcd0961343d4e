"""A model card made from a run: what a reader of its results must know before trusting them.

Rules: every figure comes from the run or from the evaluation that is handed in; what was not measured says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from busgen_cds import pixels
from busgen_cds.bundle import Calibration, Thresholds
from busgen_cds.learning.data import Images

LICENCES = {
    "busbra": "BUS-BRA (Gómez-Flores et al., Medical Physics 2024;51:3110), permissive with citation",
    "busi": "BUSI (Al-Dhabyani et al., Data in Brief 2020;28:104863), research use with citation; commercial terms "
    "unsettled",
}

STARTS = {
    "mobilenet": "MobileNetV2 1.0 (ImageNet, Apache-2.0)",
    "lite0": "EfficientNet-Lite0 (ImageNet, Apache-2.0)",
}

_TEXT = """# {name} {version}

A network that reads still frames of B-mode breast ultrasound: lesion outline, presence of a lesion, likelihood of
malignancy and the map of evidence that sums to it. **Research software, not a medical device.** It supports a
radiologist; it never decides.

## Intended use
- Grey-scale B-mode frames of the female breast, lesion in view, read by a physician who sees the same images.
- Screening (is there a lesion?) and diagnosis (how suspicious is it?), as a second opinion on a PACS.

## Not for
- Doppler, elastography, contrast, 3-D or breast-specific tomographic ultrasound; axilla; male breasts; implants;
  children; follow-up of a treated tumour; any other organ. Frames unlike the training data are declined.
- Ruling out disease. The categories 0, 1, 2 and 6 are never stated.

## Trained on
{data}
{generated}

No patient of a test split was seen; the code refuses to train otherwise. Near-duplicate images of BUSI stay together.
Start of training: {starts}. Input: `pixels` version {pixels}, {size} × {size}.

| device | images in training | malignant |
|---|---|---|
{devices}

## Calibrated
On {val} images of `val`, where {prevalence:.1%} are malignant. A site must state its own prevalence; the log-odds move
by the difference. A score at or above {rule_out:.4f} (probability at the calibration's prevalence) is never a "3".
A frame farther than {domain:.2f} from the training data is declined.

## Figures
{figures}

## Limits
- {patients:,} public patients or groups trained it, most of them referred for a suspicious finding: benign lesions
  are harder and cancers commoner than in screening.
- Age, ethnicity and breast density are not recorded in the data: performance by group is **not measured**.
- The retrospective data hold no follow-up and no prior studies; prospective performance is **not measured**.
- BUSI's labels and duplicates are known to be imperfect; conflicting pairs were left out.
- A map of evidence shows where the score came from, not how far a lesion reaches.

## Settings
Two or more members are averaged inside the graph; the seeds, steps and rates of each are in the signed manifest.
"""


def write(
    name: str,
    version: str,
    train: Images,
    val: Images,
    calibration: Calibration,
    thresholds: Thresholds,
    figures: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> str:
    return _TEXT.format(
        name=name,
        version=version,
        data="\n".join(_source(source, train) for source in sorted({row.source for row in train.rows})),
        generated=_generated(settings),
        starts=_starts(settings),
        pixels=pixels.VERSION,
        size=pixels.SIZE,
        devices=_devices(train),
        val=len(val),
        patients=len({(row.source, row.patient) for row in train.rows}),
        prevalence=calibration.prevalence,
        rule_out=thresholds.rule_out,
        domain=thresholds.domain,
        figures=_figures(figures),
    )


def _source(source: str, images: Images) -> str:
    mine = [row for row in images.rows if row.source == source]
    counts = Counter(row.pathology for row in mine)
    classes = ", ".join(f"{counts[name]} {name}" for name in ("normal", "benign", "malignant") if counts[name])
    patients = len({row.patient for row in mine})
    return f"- {LICENCES.get(source, source)}: {len(mine)} images of {patients} patients or groups ({classes})."


def _generated(settings: Mapping[str, Any]) -> str:
    shares = sorted({member.get("settings", {}).get("generated", 0.0) for member in settings.get("members", ())})
    if not any(shares):
        return "- No generated image."
    return "- Generated images: " + ", ".join(f"{share:.0%}" for share in shares) + " of every batch, member by member."


def _starts(settings: Mapping[str, Any]) -> str:
    shapes = [member.get("settings", {}).get("shape", {}) for member in settings.get("members", ())]
    encoders = dict.fromkeys(shape.get("encoder", "mobilenet") for shape in shapes)
    return ", ".join(STARTS.get(name, name) for name in encoders) or "not stated"


def _devices(images: Images) -> str:
    devices = Counter(row.labels.get("device", "") or "not stated" for row in images.rows)
    cancers = Counter(row.labels.get("device", "") or "not stated" for row in images.rows if row.malignant)
    return "\n".join(f"| {name} | {count} | {cancers[name]} |" for name, count in sorted(devices.items()))


def _figures(figures: Mapping[str, Any]) -> str:
    lines = ["| figure | value |", "|---|---|"]
    for group, values in figures.items():
        for name, value in values.items() if isinstance(values, Mapping) else ():
            if isinstance(value, (int, float, str)):
                lines.append(f"| {group}: {name.replace('_', ' ')} | {value} |")
    return "\n".join(lines)
