"""Probes of a reader: what it still knows when the lesion is hidden, and where its evidence lies.

Rules:
- A probe changes the image or the weights, never the reader's thresholds; its figure stands beside its control.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from scipy.stats import spearmanr

from busgen_cds.learning import augment, calibrate, data, export, figures
from busgen_cds.learning.calibrate import Readings, Run

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
SHOWN = 0.05  # logits: an image with less positive evidence than this has no map to judge


def shortcuts(images: data.Images, run: Run, logit: Floats, keep: Flags) -> dict[str, Any]:
    """What the reader still knows when the lesion cannot be seen, and what its box alone tells."""
    chosen = images.pick(keep)
    truth, patients = chosen.malignant, chosen.patients
    views = {
        "lesion's box filled": np.stack([fill_box(i, m) for i, m in zip(chosen.image, chosen.mask, strict=True)]),
        "border only": np.stack([border_only(i) for i in chosen.image]),
        "painted marks added": np.stack([mark(i, k) for k, i in enumerate(chosen.image)]),
    }
    found: dict[str, Any] = {"as it is": figures.auc_interval(logit[keep], truth, patients)}
    for name, view in views.items():
        found[name] = figures.auc_interval(calibrate.read(run, view).malignancy, truth, patients)
    area = np.array([_box_area(m) for m in chosen.mask])
    found["area of the box alone"] = figures.auc_interval(area, truth, patients)
    width, height = chosen.placed[:, 1].astype(float), chosen.placed[:, 0].astype(float)
    found["shape of the image alone"] = figures.auc_interval(width / height, truth, patients)
    return found


def _box(mask: NDArray[np.uint8]) -> tuple[slice, slice]:
    ys, xs = np.nonzero(mask > 127)
    pad = 4
    return slice(max(0, ys.min() - pad), ys.max() + pad + 1), slice(max(0, xs.min() - pad), xs.max() + pad + 1)


def _box_area(mask: NDArray[np.uint8]) -> float:
    rows, columns = _box(mask)
    return float((rows.stop - rows.start) * (columns.stop - columns.start))


def fill_box(image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The lesion's box painted in the mean grey of the tissue around it."""
    out, box = image.copy(), _box(mask)
    outside = np.ones(image.shape, bool)
    outside[box] = False
    tissue = image[outside & (image > 8)]
    out[box] = int(tissue.mean()) if tissue.size else 0
    return out


def border_only(image: NDArray[np.uint8], share: float = 0.12) -> NDArray[np.uint8]:
    """Only the rim of what the scanner showed."""
    ys, xs = np.nonzero(image > 8)
    if not len(ys):
        return image
    top, bottom, left, right = ys.min(), ys.max(), xs.min(), xs.max()
    high, wide = int((bottom - top) * share), int((right - left) * share)
    out = image.copy()
    out[top + high : bottom - high, left + wide : right - wide] = 0
    return out


def mark(image: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """Painted marks in the grey that `pixels` does not take for marks."""
    stencil = augment.painted_marks(1, image.shape[-1], 10_000 + seed)[0, 0].numpy()
    return np.where(stencil > 0, np.uint8(205), image)


def evidence(images: data.Images, read: Readings, keep: Flags, network: bytes) -> dict[str, Any]:
    """Where the positive evidence lies: inside the outline grown by 10 % of its diameter, against two controls."""
    index = np.flatnonzero(keep & (images.masked == 1))
    shown = _positive(read.heat[index]) >= SHOWN
    silent, index = int((~shown).sum()), index[shown]
    grown = np.stack([_coarse(figures.dilate(images.mask[i] > 127), read.heat.shape[-1]) for i in index])
    broken = calibrate.read(export.open_graph(randomise(network)), images.image[index]).heat
    return {"images without positive evidence": silent} | located(
        read.heat[index], broken, grown, images.patients[index]
    )


def located(
    ours: NDArray[np.float32], broken: NDArray[np.float32], grown: Floats, patients: NDArray[np.str_]
) -> dict[str, Any]:
    """(N, h, w) each. A map without positive evidence has no place to judge: it is counted apart, a control's too."""
    speaks = _positive(broken) >= SHOWN
    inside, total = _inside(ours, grown), _positive(ours)
    alike = [float(spearmanr(a.ravel(), b.ravel()).statistic) for a, b in zip(ours, broken, strict=True)]
    centre = np.broadcast_to(_centre(ours.shape[-1]), grown.shape)
    return {
        "images": len(ours),
        "inside": figures.mean_interval(inside, patients),
        "inside_pooled": float((inside * total).sum() / total.sum()),
        "centre_prior": figures.mean_interval(_inside(centre, grown), patients),
        "mask_area": float(grown.mean()),
        "random_weights_images": int(speaks.sum()),
        "random_weights": figures.mean_interval(_inside(broken, grown)[speaks], patients[speaks]),
        "rank_correlation_with_random_weights": float(np.nanmean(alike)),
    }


def _positive(maps: NDArray[Any]) -> Floats:
    """(N, h, w) → (N,) the sum of the positive evidence."""
    return np.asarray(np.clip(maps, 0, None).sum((1, 2)), np.float64)


def _inside(maps: NDArray[Any], regions: Floats) -> Floats:
    """(N,) the share of each map's positive evidence that lies in its region."""
    return np.asarray((np.clip(maps, 0, None) * regions).sum((1, 2)) / np.maximum(_positive(maps), 1e-12))


def _coarse(region: Flags, grid: int) -> Floats:
    """The share of each cell of a coarser grid that lies in the region."""
    step = region.shape[0] // grid
    return np.asarray(region.reshape(grid, step, grid, step).mean((1, 3)), np.float64)


def _centre(grid: int) -> Floats:
    """A map that knows nothing but that lesions are photographed in the middle."""
    line = np.exp(-0.5 * ((np.arange(grid) + 0.5 - grid / 2) / (grid / 6)) ** 2)
    high = np.exp(-0.5 * ((np.arange(grid) + 0.5 - grid * 0.4) / (grid / 6)) ** 2)
    return np.asarray(high[:, None] * line[None, :])


def randomise(graph: bytes, seed: int = 0) -> bytes:
    """The same graph with the numbers of every stored weight shuffled."""
    model = onnx.load_from_string(graph)
    rng = np.random.default_rng(seed)
    for tensor in model.graph.initializer:
        if tensor.name.endswith("_half"):
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(rng.permutation(values.ravel()).reshape(values.shape), tensor.name))
    return bytes(model.SerializeToString())
