"""Put a finished generator into the package: weights, release filter and model card, small enough to travel.

Rules: the card says what the run's own notes and figures say; what was not measured is
said to be not measured.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from busgen_cds.errors import Misconfigured
from busgen_cds.learning import release
from busgen_cds.learning.card import LICENCES
from busgen_cds.learning.generator import AUTOENCODER, CARD, FLOW, Card, Generator

LIMIT = 60_000_000  # bytes, all together
MODEL_CARD = "card.md"


def ship(run: Path, results: Path, out: Path) -> Path:
    """Copy what is needed to generate, and describe it."""
    files = (AUTOENCODER, FLOW, CARD, release.FILE)
    missing = [name for name in files if not (run / name).is_file()]
    if missing:
        raise Misconfigured(f"{run} lacks {', '.join(missing)}: finish `pretrain` and `privacy --filter-only` first.")
    size = sum((run / name).stat().st_size for name in files)
    if size > LIMIT:
        raise Misconfigured(f"The generator takes {size / 1e6:.0f} MB; {LIMIT / 1e6:.0f} MB may be shipped.")
    out.mkdir(parents=True, exist_ok=True)
    for name in files:
        shutil.copyfile(run / name, out / name)
    makes = Generator.load(run, device="cpu")
    pages, digest = ("generator-fidelity", "privacy", "generator-value"), makes.digest
    figures = {name: _figures_of(digest, results / f"{name}.json") for name in pages}
    (out / MODEL_CARD).write_text(describe(makes.card, size, figures), encoding="utf-8")
    return out


def _figures_of(generator: str, path: Path) -> dict[str, Any] | None:
    """What a page found of this generator; what it found of another is not this one's."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if found.get("generator") == generator else None


def describe(card: Card, size: int, figures: Mapping[str, dict[str, Any] | None]) -> str:
    """The model card (Mitchell et al. 2019, arXiv 1810.03993)."""
    settings = card.settings
    boxes = ", ".join(f"{len(b)} {name}" for name, b in card.boxes.boxes.items())
    labels = "; ".join(f"{name}: {', '.join(words)}" for name, words in card.vocabulary.names.items())
    return "\n".join(
        [
            "# Model card: the generator",
            "",
            "Makes breast ultrasound images together with the outline of their lesion, from nothing or from a healthy"
            " image. Research software; nothing it makes shows a patient or diagnoses one.",
            "",
            f"- **Networks**: autoencoder {card.autoencoder.channels} with {card.autoencoder.latent} latent channels;"
            f" flow {card.network.kind} {card.network.channels if card.network.kind == 'unet' else card.network.width}."
            f" {size / 1e6:.1f} MB in half precision, safetensors.",
            f"- **Images**: {card.size} px on the longer side, grey.",
            f"- **Learnt from**: the `train` split of {'; '.join(LICENCES.get(s, s) for s in card.trained_on)}."
            " Held-out loss from `val`. No patient of a test split was seen.",
            f"- **Training**: {settings.get('steps_done', '?')} steps of {settings.get('batch', '?')}; kept the"
            f" averaged weights of step {settings.get('best_step', '?')},"
            f" held-out loss {_number(settings.get('held_out'))}.",
            f"- **Conditions**: {labels}. Boxes from a smooth density over {boxes} training boxes (views counted),"
            " which refuses copies.",
            "- **What travels of the training images**: the box coordinates above, and for the release filter a"
            " projection of each image's latent to 64 numbers. No image, name, date or file name.",
            "",
            "## Measured",
            "",
            *_fidelity(figures.get("generator-fidelity")),
            *_privacy(figures.get("privacy")),
            *_value(figures.get("generator-value")),
            "",
            "## For, and not for",
            "",
            "For training and testing software, for teaching, and for adding to real training images where a paired"
            " comparison on real patients shows that it helps. Not for diagnosis, not for judging a reader, and not as"
            " proof that a rare finding was learnt: what is rare in the training images is rarer, or wrong, here.",
            "",
            "Known limits: normal images come from one source and one scanner; fine speckle is smoother than real; the"
            " outline is drawn on a grid of 4 px; texture beside calipers or text was replaced before learning.",
            "",
        ]
    )


def _fidelity(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return ["- Fidelity: **not measured**."]
    judge = found["judge"]["generated"]
    validity = "" if found["judge"]["valid"] else "; the judge failed its own control, so this concludes nothing"
    lines = [f"- Real-vs-synthetic AUC {judge['value']:.3f} ({judge['low']:.3f}–{judge['high']:.3f}){validity}."]
    lines += [
        f"- {name}: {_number(d['ratio'])} times its real-vs-real floor."
        for name, d in found["distances"].items()
        if name.startswith("frechet")
    ]
    lines.append(f"- {found['speed']['images_per_second']:.1f} images/s on {found['speed']['threads']} threads.")
    return lines


def _privacy(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return ["- Privacy: **not measured**."]
    return [
        f"- Privacy, {f['attack']} ({f['figure']}): {_number(f['value']['value'])}, {f['verdict']}."
        for f in found["findings"]
    ]


def _value(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return ["- Worth to a reader: **not measured**."]
    sets = "; ".join(
        f"{arms['generated only']['ensemble']['value']:.3f} and {arms['real']['ensemble']['value']:.3f} on {name}"
        for name, arms in found["table"].items()
        if "generated only" in arms and "real" in arms
    )
    left = f" ({found['left']} runs still to do)" if found["left"] else ""
    return [f"- AUC of a reader taught by generated images alone, and by real ones{left}: {sets or 'not measured'}."]


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"
