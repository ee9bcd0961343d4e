"""Measure how real a generator's images are, and write docs/results/generator-fidelity.{json,md} and its picture.

Rules: the test splits are looked at here and nowhere before; what was not measured is said to be not measured.
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from busgen_cds.errors import Misconfigured
from busgen_cds.learning import data, embed, fidelity, figures, release
from busgen_cds.learning.embed import Embedding, Squares
from busgen_cds.learning.fidelity import Judging
from busgen_cds.learning.figures import Interval
from busgen_cds.learning.generator import Generator, Sample, Sampling
from busgen_cds.learning.recipes import synthesise

NAME = "generator-fidelity"


@dataclass(frozen=True)
class Settings:
    images: int = 600  # most of each side
    speed_images: int = 32
    pairs: int = 4  # healthy → lesion pairs in the picture
    judging: Judging = field(default_factory=Judging)


def measure(
    makes: Generator,
    root: Path,
    generated: Path,
    embeddings: Mapping[str, Embedding],
    settings: Settings,
    init: Path | None = None,
    read: Read | None = None,
    cache: Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Everything that is reported about the images; real images are those of the sources it learnt from."""
    synthesise.check_maker(generated, makes)
    size = makes.card.size
    rows = [
        r for r in data.read_manifest(root) if r.source in makes.card.trained_on and r.split in ("train", "val", "test")
    ]
    real = data.load(root, _fair(rows, generated, settings.images), cache, size)
    made, labels = synthesise.read_images(generated, size, settings.images)
    found: dict[str, Any] = {"images": {"real": len(real), "generated": len(made)}, "size": size}
    found |= {"generator": makes.digest, "manner": synthesise.manner(generated)}
    tell("distances")
    found["distances"] = fidelity.compare(real.image, real.patients, made, embeddings)
    busi = [r for r in data.read_manifest(root) if r.source == "busi" and r.lesion and r.split != "excluded"]
    if busi and "busi" in makes.card.trained_on:
        chosen = np.random.default_rng(0).permutation(len(busi))[: settings.images]  # the list begins with one class
        wen = data.load(root, [busi[i] for i in sorted(chosen)], cache, size)
        found["distances, BUSI as Wen counts it"] = fidelity.compare(wen.image, wen.patients, made, embeddings)
    tell("the judge")
    found["judge"] = judged(makes, real, made, init, settings)
    if read is not None:
        tell("agreement of label, mask and image")
        seen = read(made)
        found["mask agreement"] = agreement(generated, labels, seen.mask)
        held_out = real.of(None, "val", "test")
        found["label agreement"] = {
            "generated": told(seen, [row["pathology"] for row in labels], [str(i) for i in range(len(labels))]),
            "real": told(read(held_out.image), [r.pathology for r in held_out.rows], held_out.patients),
        }
    tell("speed")
    found["speed"] = speed(makes, settings.speed_images)
    return found


def _fair(rows: Sequence[data.Row], generated: Path, most: int) -> list[data.Row]:
    """Real images in the class balance of the generated ones: a judge must not go by the class."""
    with (generated / data.MANIFEST).open(newline="", encoding="utf-8") as file:
        classes = [row["pathology"] for row in csv.DictReader(file)]
    share = {name: classes.count(name) / len(classes) for name in set(classes)}
    groups = {name: [r for r in rows if r.pathology == name] for name in share}
    total = int(min(most, *(len(group) / share[name] for name, group in groups.items())))
    rng = np.random.default_rng(0)
    chosen = []
    for name, group in sorted(groups.items()):
        picked = rng.permutation(len(group))[: round(total * share[name])]
        chosen += [group[i] for i in sorted(picked)]
    return chosen


def judged(makes: Generator, real: data.Images, made: Squares, init: Path | None, settings: Settings) -> dict[str, Any]:
    """The judge on generated images, on reconstructions, and on blurred real images, which it must notice."""
    how = settings.judging
    generated = fidelity.told_apart(real.image, real.patients, made, init, how)
    rebuilt = fidelity.paired(real.image, real.patients, makes.redrawn, init, how)
    noticed = fidelity.paired(real.image, real.patients, fidelity.blurred, init, how)
    return {
        "generated": generated._asdict(),
        "reconstructions": rebuilt._asdict(),
        "blurred": noticed._asdict(),
        "valid": noticed.value >= fidelity.NOTICES,
    }


def agreement(generated: Path, labels: list[dict[str, str]], seen: NDArray[np.bool_]) -> dict[str, Any]:
    """Dice between the mask that came with an image and what a reader of real lesions sees in it."""
    asked = [i for i, row in enumerate(labels) if row["pathology"] != "normal"]
    masks = np.zeros((len(asked), *seen.shape[1:]), np.bool_)  # a lesion without an outline agrees with nothing
    for k, i in enumerate(asked):
        if labels[i]["mask"]:
            with Image.open(generated / labels[i]["mask"]) as mask:
                masks[k] = embed.squares([np.asarray(mask.convert("L"))], seen.shape[-1])[0] > 127
    dice = np.where(masks.any((1, 2)), figures.dice(seen[asked], masks), 0.0)
    names = np.array([str(i) for i in asked])
    return {"dice": figures.mean_interval(dice, names)._asdict(), "images": len(asked)}


def told(seen: Seen, pathology: Sequence[str], patients: Sequence[str] | NDArray[np.str_]) -> dict[str, Any]:
    """AUC of a reader of real lesions: does a lesion look like what its label says?"""
    lesion = np.array([name != "normal" for name in pathology])
    malignant = np.array([name == "malignant" for name in pathology], np.int64)
    found = figures.auc_interval(seen.malignancy[lesion], malignant[lesion], np.asarray(patients)[lesion])
    return {"auc": found._asdict(), "images": int(lesion.sum())}


class Seen(NamedTuple):
    """What a reader sees in images."""

    malignancy: NDArray[np.float64]  # (N,)
    mask: NDArray[np.bool_]  # (N, S, S)


Read = Callable[[Squares], Seen]


def reader(run: Path) -> Read:
    """A reader that was trained on real images only, from its checkpoint."""
    network = embed.read_reader(run)

    @torch.inference_mode()
    def read(images: Squares) -> Seen:
        malignancy, masks = [], []
        for i in range(0, len(images), 16):
            batch = torch.from_numpy(images[i : i + 16])[:, None].float() / 255
            large = torch.nn.functional.interpolate(batch, size=(224, 224), mode="bilinear", align_corners=False)
            reading = network(large)
            mask = torch.nn.functional.interpolate(reading.mask.float(), size=images.shape[-2:], mode="bilinear")
            malignancy.append(reading.malignancy.double().numpy())
            masks.append((mask[:, 0] > 0).numpy())
        return Seen(np.concatenate(malignancy), np.concatenate(masks))

    return read


def speed(makes: Generator, count: int) -> dict[str, Any]:
    """Images a second from question to picture, with the steps that were taken."""
    makes.sample(min(count, 8), pathology="benign")
    began = time.monotonic()
    makes.sample(count, pathology="malignant", seed=1)
    seconds = time.monotonic() - began
    return {"images_per_second": count / seconds, "steps": Sampling().steps, "threads": torch.get_num_threads()}


# The picture


def picture(makes: Generator, out: Path, gate: release.Filter, pairs: int = 4) -> Path:
    """Generated images by class, and healthy → lesion. No patient is shown: the healthy ones are made too, and what
    lies too near to a training image is left out.
    """
    size = makes.card.size
    rows: list[tuple[str, list[NDArray[np.uint8]]]] = []
    for pathology in ("normal", "benign", "malignant"):
        if pathology == "normal" or pathology in makes.card.boxes.boxes:
            samples = _released(makes, gate, 8, pathology=pathology, seed=41)
            rows.append((f"{pathology}, generated", [_framed(s.image, s.mask, size) for s in samples]))
    healthy = _released(makes, gate, pairs, pathology="normal", seed=7)
    for pathology in ("benign", "malignant"):
        cells: list[NDArray[np.uint8]] = []
        for i, one in enumerate(healthy):
            lesion = _released(makes, gate, 1, pathology=pathology, healthy=one.image, seed=11 + i)[0]
            cells += [_framed(one.image, one.mask, size), _framed(lesion.image, lesion.mask, size)]
        rows.append((f"healthy to {pathology}, in pairs", cells))
    sheet = Image.new("RGB", (8 * size, len(rows) * (size + 14)), "black")
    draw = ImageDraw.Draw(sheet)
    for y, (title, row) in enumerate(rows):
        draw.text((4, y * (size + 14) + 1), title, fill="white")
        for x, cell in enumerate(row):
            sheet.paste(Image.fromarray(cell), (x * size, y * (size + 14) + 14))
    out.mkdir(parents=True, exist_ok=True)
    sheet.save(out / f"{NAME}.png")
    return out / f"{NAME}.png"


def _released(makes: Generator, gate: release.Filter, count: int, **asked: Any) -> list[Sample]:
    """The first images of a seed that may leave and show what was asked for, as `generate` releases them."""
    found: list[Sample] = []
    for first in range(0, synthesise.MOST_TRIES * count, count):
        made = makes.sample(count, first=first, **asked)
        clear = release.clear(gate, makes.coder, [one.image for one in made], makes.card.size)
        shown = [one.pathology == "normal" or one.mask.any() for one in made]
        found += [one for one, *yes in zip(made, clear, shown, strict=True) if all(yes)]
        if len(found) >= count:
            return found[:count]
    raise Misconfigured("The generator copies, or draws no lesion that it is asked for: no picture of it is shown.")


def _framed(image: NDArray[np.uint8], mask: NDArray[np.bool_], size: int) -> NDArray[np.uint8]:
    """The image on a black square, its mask's edge drawn in yellow."""
    cell = np.zeros((size, size, 3), np.uint8)
    left = (size - image.shape[1]) // 2
    cell[: image.shape[0], left : left + image.shape[1]] = image[..., None]
    inner = mask.copy()
    inner[1:-1, 1:-1] = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    edge = np.zeros((size, size), np.bool_)
    edge[: image.shape[0], left : left + image.shape[1]] = mask & ~inner
    cell[edge] = (255, 200, 0)
    return cell


# The page


def write(found: dict[str, Any], out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{NAME}.json").write_text(json.dumps(_finite(found), indent=1) + "\n", encoding="utf-8")
    (out / f"{NAME}.md").write_text("\n".join(_page(found)), encoding="utf-8")
    return out / f"{NAME}.md"


def _page(found: dict[str, Any]) -> list[str]:
    counts = found["images"]
    lines = [
        "# Fidelity of generated images",
        "",
        f"{counts['real']} real and {counts['generated']} generated images at {found['size']} px. Real images in the"
        " class balance of the generated ones. The floor is the same distance between two halves of the real images"
        " that share no patient, at the same number of images.",
    ]
    for title in [name for name in found if name.startswith("distances")]:
        lines += ["", f"## {title[0].upper()}{title[1:]}", ""]
        lines += ["| distance (encoder) | images | generated | real to real | ratio |", "|---|---|---|---|---|"]
        lines += [
            f"| {name} | {f['images']} | {f['generated']:.4g} ± {f['generated_sd']:.2g}"
            f" | {f['floor']:.4g} ± {f['floor_sd']:.2g} | {_or_not(f['ratio'])} |"
            for name, f in found[title].items()
        ]
    judge = found["judge"]
    lines += [
        "",
        "## Can a judge tell them apart?",
        "",
        "| images against real ones | AUC (95 % interval) |",
        "|---|---|",
        *(f"| {name} | {Interval(**judge[name])} |" for name in ("generated", "reconstructions", "blurred")),
        "",
        "The judge notices a slight blur: the figures count."
        if judge["valid"]
        else "The judge does not notice a slight blur (AUC below 0.9): **it concludes nothing**.",
        "",
        "## Masks, labels and speed",
        "",
        *_agreements(found),
        "",
    ]
    pace = found["speed"]
    lines += [
        f"{pace['images_per_second']:.1f} images/s in {pace['steps']} steps on {pace['threads']} threads.",
        "",
        *([] if _inception(found) else ["Inception weights were not at hand (`--inception`); see the tables.", ""]),
    ]
    return lines


def _agreements(found: dict[str, Any]) -> list[str]:
    if "mask agreement" not in found:
        return ["Agreement of mask and label with the lesion: not measured (no reader's checkpoint was named)."]
    dice, label = found["mask agreement"], found["label agreement"]
    made, real = (
        f"{Interval(**label[name]['auc'])} ({label[name]['images']} images)" for name in ("generated", "real")
    )
    return [
        f"Dice of mask and lesion, by a reader of real lesions: {Interval(**dice['dice'])}, {dice['images']} images.",
        "",
        f"The same reader tells malignant from benign with an AUC of {made} in generated images,"
        f" of {real} in real ones of `val` and `test`.",
    ]


def _inception(found: dict[str, Any]) -> bool:
    return any("inception" in name for name in found["distances"])


def _or_not(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
