"""The evaluation's document → docs/results/reader.md and its plots; nothing is computed here that is not in it."""

# ruff: noqa: E501 - a row of a table is read best on one line
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Document = Mapping[str, Any]


class Bar(NamedTuple):
    """One figure that was promised, and how to find what was reached."""

    name: str
    arm: str
    path: tuple[str, ...]
    test: Callable[[float], bool]
    wanted: str


def _least(bound: float) -> tuple[Callable[[float], bool], str]:
    return (lambda value: value >= bound), f"≥ {bound:g}"


def _most(bound: float) -> tuple[Callable[[float], bool], str]:
    return (lambda value: value <= bound), f"≤ {bound:g}"


BARS: tuple[Bar, ...] = (
    Bar("AUC by patient, BUS-BRA test", "shipped", ("classification", "BUS-BRA test", "auc_patient", "value"), *_least(0.945)),
    Bar("AUC, BUS-BRA unseen devices", "shipped", ("classification", "BUS-BRA unseen devices", "auc", "value"), *_least(0.90)),
    Bar("AUC, BUSI as external test, all 780", "external", ("classification", "BUSI external, all 780", "auc", "value"), *_least(0.930)),
    Bar("AUC, BUS-UCLM, benign against malignant", "shipped", ("classification", "BUS-UCLM, lesions", "auc", "value"), *_least(0.90)),
    Bar("AUC, BUS-UCLM, all images", "shipped", ("classification", "BUS-UCLM, all", "auc", "value"), *_least(0.92)),
    Bar("presence AUC, BUSI test", "shipped", ("presence", "BUSI test", "value"), *_least(0.97)),
    Bar("presence AUC, BUS-UCLM", "shipped", ("presence", "BUS-UCLM", "value"), *_least(0.90)),
    Bar("Dice on lesions, BUS-BRA test", "shipped", ("outlines", "BUS-BRA test", "dice", "value"), *_least(0.90)),
    Bar("Dice on lesions, BUSI test", "shipped", ("outlines", "BUSI test", "dice", "value"), *_least(0.82)),
    Bar("Dice on lesions, BUS-BRA alone → BUSI", "external", ("outlines", "BUSI external", "dice", "value"), *_least(0.72)),
    Bar(
        "sensitivity at the radiologists' specificity, lower bound of the paired difference", "shipped",
        ("radiologists", "difference", "low"), *_least(-0.03),
    ),
    Bar("calibration slope, BUS-BRA test, at least", "shipped", ("calibration", "BUS-BRA test", "slope", "value"), *_least(0.8)),
    Bar("calibration slope, BUS-BRA test, at most", "shipped", ("calibration", "BUS-BRA test", "slope", "value"), *_most(1.2)),
    Bar("calibration intercept, lower bound", "shipped", ("calibration", "BUS-BRA test", "intercept", "low"), *_most(0.0)),
    Bar("calibration intercept, upper bound", "shipped", ("calibration", "BUS-BRA test", "intercept", "high"), *_least(0.0)),
    Bar("positive evidence inside the grown mask", "shipped", ("heat", "inside", "value"), *_least(0.80)),
    Bar("declined: files of other organs", "shipped", ("gate", "files of other organs", "value"), *_least(0.95)),
    Bar("declined: BUS-BRA test", "shipped", ("gate", "BUS-BRA test", "value"), *_most(0.02)),
    Bar("declined: BUSI test", "shipped", ("gate", "BUSI test", "value"), *_most(0.02)),
    Bar("declined: BUS-UCLM B-mode", "shipped", ("gate", "BUS-UCLM B-mode", "value"), *_most(0.05)),
    Bar("specificity of studies of 1, 5, 20 and 300 frames: widest gap", "shipped", ("frames", "specificity gap"), *_most(0.05)),
    Bar("bundle size, MB", "shipped", ("size_mb",), *_most(25)),
    Bar("one frame on two CPU cores, ms", "shipped", ("milliseconds",), *_most(50)),
)  # fmt: skip


def find(document: Any, path: Sequence[str]) -> float:
    for name in path:
        document = document.get(name) if isinstance(document, Mapping) else None
    return math.nan if document is None else float(document)


def bars(document: Document) -> list[dict[str, Any]]:
    """Each bar with what was reached."""
    found = []
    for bar in BARS:
        value = find(document["arms"].get(bar.arm), bar.path)
        verdict = "not measured" if math.isnan(value) else "met" if bar.test(value) else "missed"
        found.append(
            {"bar": bar.name, "wanted": bar.wanted, "reached": None if math.isnan(value) else value, "verdict": verdict}
        )
    return found


def write(document: Document, folder: Path) -> Path:
    """reader.md and its pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PLOTS.items():
        figure, axes = plt.subplots(figsize=(4.6, 3.8), dpi=90)
        draw(axes, document)
        figure.tight_layout()
        figure.savefig(folder / f"reader-{name}.png", metadata={"Software": None})
        plt.close(figure)
    text = "\n".join(_page(document))
    page = folder / "reader.md"
    page.write_text(text + "\n", encoding="utf-8")
    return page


def _page(document: Document) -> Iterable[str]:
    yield "# The reader, measured"
    yield ""
    yield "Made by `busgen-cds evaluate`; the numbers are in `reader.json`. Intervals are 95 % bootstraps over patients,"
    yield "shares of 0 or 1, and those of the tables that say so, Wilson's. What was chosen on `val`, and what was looked at when, is in `log-reader.md`."
    yield ""
    yield "## Bars"
    yield from _table(
        ("figure", "bar", "reached", ""),
        [(b["bar"], b["wanted"], _text(b["reached"]), b["verdict"]) for b in document["bars"]],
    )
    yield "![ROC](reader-roc.png) ![reliability](reader-reliability.png)"
    yield "![decision curve](reader-decision.png) ![malignancy per category](reader-categories.png)"
    for name, arm in document["arms"].items():
        yield ""
        yield f"## Arm “{name}”: trained on {' and '.join(arm['arm']['trained_on'])}"
        yield from _arm(arm)


def _arm(arm: Document) -> Iterable[str]:
    yield ""
    yield "### Benign or normal against malignant"
    keys = ("auc", "auc_patient", "sensitivity 3/4A", "specificity 3/4A", "sensitivity 4A/4B", "specificity 4A/4B")
    yield from _table(
        (
            "set",
            "images (malignant)",
            "AUC by image",
            "AUC by patient",
            *(k.replace("/", "|") for k in keys[2:]),
            "ECE",
        ),
        [
            (name, f"{s['images']} ({s['malignant']})", *(_text(s[k]) for k in keys), _text(s["ece"]))
            for name, s in arm["classification"].items()
        ],
    )
    yield "3/4A is the rule-out score, which no prevalence moves: at or above it a category is never 3. At the"
    yield "calibration's own prevalence the band of 2 % is stricter still. 4A/4B is 10 % at the calibration's prevalence."
    yield ""
    yield "### A lesion against a normal breast"
    yield from _table(("set", "AUC"), [(name, _text(v)) for name, v in arm["presence"].items()])
    yield "### Outlines (224 px grid)"
    yield from _table(
        ("set", "lesions", "Dice", "median", "Dice with normals", "mean distance, px", "Hausdorff 95 %, px", "missed (Dice < 0.1)"),
        [
            (n, s["lesions"], _text(s["dice"]), _text(s["dice_median"]), _text(s["dice_with_normals"]), _text(s["distance_px"]), _text(s["hausdorff95_px"]), s["missed"])
            for n, s in arm["outlines"].items()
        ],
    )  # fmt: skip
    yield "### Against the radiologists' own BI-RADS (≥ 4), on the same images"
    yield from _table(
        ("set", "their sensitivity", "their specificity", "our sensitivity there", "difference (paired)", "difference in AUC"),
        [
            (n, _text(r["readers_sensitivity"]), _text(r["readers_specificity"]), _text(r["our_sensitivity"]), _text(r["difference"]), _text(r["difference_in_auc"]))
            for n, r in (("BUS-BRA test", arm["radiologists"]), ("BUS-BRA unseen devices", arm["radiologists, unseen devices"]))
        ],
    )  # fmt: skip
    yield "### By device"
    yield from _table(
        ("device", "images (malignant)", "AUC"),
        [(n, f"{d['images']} ({d['malignant']})", _text(d["auc"])) for n, d in arm["devices"].items()],
    )
    yield "### Calibration"
    yield from _table(
        ("set", "slope", "intercept"),
        [(n, _text(c["slope"]), _text(c["intercept"])) for n, c in arm["calibration"].items()],
    )
    yield "### Malignancy per category (images, share with Wilson's interval)"
    bands = next(iter(arm["categories"].values()))
    yield from _table(
        ("set", *bands),
        [
            (n, *(f"{c['images']}: {_text(c['malignant'])}" for c in row.values()))
            for n, row in arm["categories"].items()
        ],
    )
    yield "### Shortcuts (AUC on BUS-BRA test)"
    yield from _table(("what the reader sees", "AUC"), [(n, _text(v)) for n, v in arm["shortcuts"].items()])
    yield "### The map of evidence (malignant lesions of BUS-BRA test)"
    names = {
        "images": "images with positive evidence (0.05 of logit or more)",
        "images without positive evidence": "images without: left out",
        "inside": "positive evidence inside the mask grown by 10 %, mean per image",
        "inside_pooled": "the same, images weighed by their evidence",
        "centre_prior": "control: a map that only knows the centre",
        "mask_area": "share of the input that the grown mask covers",
        "random_weights_images": "weights shuffled: images that still show positive evidence",
        "random_weights": "weights shuffled: evidence inside, of those",
        "rank_correlation_with_random_weights": "weights shuffled: rank correlation of the maps",
    }
    yield from _table(("figure", "value"), [(text, _text(arm["heat"][k])) for k, text in names.items()])
    yield "### Declined as unlike the training data"
    gate = {k: v for k, v in arm["gate"].items() if isinstance(v, Mapping)}
    yield from _table(("set", "share declined"), [(n, _text(v)) for n, v in gate.items()])
    if arm["gate"].get("files read after all"):
        yield f"Read after all: {', '.join(arm['gate']['files read after all'])}."
        yield ""
    if arm["gate"].get("files the gate alone would read"):
        yield f"The gate alone would read: {', '.join(arm['gate']['files the gate alone would read'])}."
        yield ""
    if arm.get("frames"):
        yield "### Studies of many frames (simulated sweeps of BUS-BRA test patients, 3/4A border)"
        yield from _table(
            ("frames", "specificity", "sensitivity"),
            [
                (n, _text(v["specificity"]), _text(v["sensitivity"]))
                for n, v in arm["frames"].items()
                if isinstance(v, Mapping)
            ],
        )
        yield f"{arm['frames']['patients']} patients, {arm['frames']['malignant']} with a malignant lesion."


def _text(value: Any) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, Mapping):
        if value.get("value") is None:
            return "not measured"
        return f"{value['value']:.3f} ({_number(value['low'])}–{_number(value['high'])})"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}"


def _table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> Iterable[str]:
    yield ""
    yield "| " + " | ".join(str(h).replace("|", "/") for h in head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(str(cell) for cell in row) + " |"
    yield ""


def _roc(axes: Any, document: Document) -> None:
    for arm, name in (
        ("shipped", "BUS-BRA test"),
        ("shipped", "BUS-UCLM, lesions"),
        ("external", "BUSI external, all 780"),
    ):
        curve = document["arms"].get(arm, {}).get("roc", {}).get(name)
        if curve:
            auc = find(document["arms"][arm], ("classification", name, "auc", "value"))
            axes.plot(curve["false"], curve["true"], label=f"{name}: {auc:.3f}", linewidth=1.2)
    readers = document["arms"].get("shipped", {}).get("radiologists")
    if readers:
        axes.plot(
            1 - readers["readers_specificity"], readers["readers_sensitivity"], "k*", label="radiologists, BI-RADS ≥ 4"
        )
    axes.plot([0, 1], [0, 1], color="0.8", linewidth=0.8)
    axes.set(xlabel="1 − specificity", ylabel="sensitivity", title="ROC")
    axes.legend(fontsize=7)


def _reliability(axes: Any, document: Document) -> None:
    bins = document["arms"]["shipped"]["calibration"].get("BUS-BRA test", {"bins": []})["bins"]
    stated = [b["stated"] for b in bins]
    found = [b["found"]["value"] for b in bins]
    spread = [
        [f - b["found"]["low"] for f, b in zip(found, bins, strict=True)],
        [b["found"]["high"] - f for f, b in zip(found, bins, strict=True)],
    ]
    axes.errorbar(stated, found, yerr=spread, fmt="o", markersize=3, capsize=2)
    axes.plot([0, 1], [0, 1], color="0.8")
    axes.set(xlabel="stated probability", ylabel="malignant", title="Reliability, BUS-BRA test")


def _decision(axes: Any, document: Document) -> None:
    curve = document["arms"]["shipped"]["decision"]
    for name in ("reader", "radiologists", "everybody"):
        axes.plot(curve["threshold"], curve[name], label=name)
    axes.axhline(0, color="0.8")
    axes.set(
        xlabel="threshold probability", ylabel="net benefit", title="Decision curve, BUS-BRA test", ylim=(-0.1, None)
    )
    axes.legend(fontsize=7)


def _categories(axes: Any, document: Document) -> None:
    rows = document["arms"]["shipped"]["categories"]["BUS-BRA test"]
    names = [n for n, c in rows.items() if c["malignant"]["value"] is not None]
    found = [rows[n]["malignant"] for n in names]
    spread = [[f["value"] - f["low"] for f in found], [f["high"] - f["value"] for f in found]]
    axes.errorbar(names, [f["value"] for f in found], yerr=spread, fmt="o", capsize=3)
    for name, f in zip(names, found, strict=True):
        axes.annotate(f"n={rows[name]['images']}", (name, f["high"]), fontsize=7, ha="center", va="bottom")
    axes.set(ylabel="malignant", title="Malignancy per category, BUS-BRA test", ylim=(0, 1.08))


PLOTS: dict[str, Callable[[Any, Document], None]] = {
    "roc": _roc,
    "reliability": _reliability,
    "decision": _decision,
    "categories": _categories,
}
