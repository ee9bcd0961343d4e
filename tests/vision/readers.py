"""A reader so simple that its answers can be worked out by hand, and frames made for it. Never shipped.

What the network says of a frame, with brightness in 0..1:
- mask: where it is brighter than 0.5;
- presence: surely, when anything is that bright;
- malignancy: the logit 40 x (brightest - 0.68), so grey 173 is even odds;
- heat: brightness above 0.2, a hundredth of it for each cell;
- embedding: the mean brightness, 0.15 in training; spread: the brightness of the upper left corner.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import safetensors.numpy
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import TensorProto, helper

from busgen_cds import pixels, signing
from busgen_cds.birads import Pooling
from busgen_cds.bundle import CARD, DOMAIN, KIND, NETWORK, Bundle, Calibration, Candidate, Manifest, Thresholds
from busgen_cds.study import Frame, Header, Patient, Region, Scanner, Side, Source, Spacing, Study

CALIBRATION = Calibration(scale=1.0, offset=0.0, prevalence=0.3, uncertainty=0.2)
THRESHOLDS = Thresholds(rule_out=0.05, presence=0.5, mask=0.5, domain=3.0, uncertainty=0.3)
REGION = Region(100, 50, 548, 498)  # 448 square: two pixels of the frame for each of the input
SPACING = Spacing(0.1, 0.1)
PLAIN = Pooling()
EVEN = 173  # the grey of a lesion as likely malignant as not, at the calibration's prevalence


def bundle(
    folder: Path,
    *,
    calibration: Calibration = CALIBRATION,
    thresholds: Thresholds = THRESHOLDS,
    pooling: Pooling = PLAIN,
    network_bytes: bytes | None = None,
) -> Bundle:
    """A real, signed bundle, opened by verifying it."""
    made = files(network_bytes)
    key = Ed25519PrivateKey.from_private_bytes(b"a key for tests, 32 bytes long..")
    Candidate(manifest(made, calibration, thresholds, pooling), made).seal(folder, signing.KeySigner(key))
    return Bundle.open(folder, signing.Verifier.of((key.public_key(), frozenset({KIND}))))


def files(network_bytes: bytes | None = None) -> dict[str, bytes]:
    domain = safetensors.numpy.save(
        {"mean": np.asarray([0.15], np.float32), "whiten": np.asarray([[20.0]], np.float32)}
    )
    return {NETWORK: network_bytes or network(), DOMAIN: domain, CARD: b"# A reader for tests\n"}


def manifest(
    files: Mapping[str, bytes],
    calibration: Calibration = CALIBRATION,
    thresholds: Thresholds = THRESHOLDS,
    pooling: Pooling = PLAIN,
) -> Manifest:
    return Manifest(
        name="tiny",
        version="0.0.1",
        created="2026-01-02",
        pixels_version=pixels.VERSION,
        size=pixels.SIZE,
        calibration=calibration,
        thresholds=thresholds,
        pooling=pooling,
        files={name: signing.digest(data) for name, data in files.items()},
    )


def network(*, without: str = "") -> bytes:
    """The graph of the module's docstring."""
    shapes: dict[str, list[Any]] = {
        "mask": ["n", 1, 112, 112],
        "presence": ["n"],
        "malignancy": ["n"],
        "heat": ["n", 56, 56],
        "embedding": ["n", 1],
        "spread": ["n"],
    }
    numbers = {
        "half": 0.5, "steep": 40.0, "dim": 0.2, "even": 0.68, "twenty": 20.0, "ten": 10.0, "hundredth": 0.01
    }  # fmt: skip
    constants = [helper.make_tensor(name, TensorProto.FLOAT, [], [value]) for name, value in numbers.items()]
    lists = {"flat": [-1], "one": [-1, 1], "map": [-1, 56, 56], "space": [1, 2, 3], "from": [0, 0], "to": [8, 8],
             "sides": [2, 3]}  # fmt: skip
    constants += [helper.make_tensor(name, TensorProto.INT64, [len(v)], v) for name, v in lists.items()]
    node = helper.make_node
    nodes = [
        node("AveragePool", ["image"], ["fine"], kernel_shape=[2, 2], strides=[2, 2]),
        node("AveragePool", ["image"], ["coarse"], kernel_shape=[4, 4], strides=[4, 4]),
        node("Sub", ["fine", "half"], ["over"]),
        node("Mul", ["over", "steep"], ["over_steep"]),
        node("Sigmoid", ["over_steep"], ["mask"]),
        node("ReduceMax", ["fine", "space"], ["brightest"], keepdims=0),
        node("Sub", ["brightest", "half"], ["present"]),
        node("Mul", ["present", "steep"], ["presence"]),
        node("Sub", ["brightest", "even"], ["above"]),
        node("Mul", ["above", "steep"], ["malignancy"]),
        node("Sub", ["coarse", "dim"], ["light"]),
        node("Mul", ["light", "hundredth"], ["light_map"]),
        node("Reshape", ["light_map", "map"], ["heat"]),
        node("ReduceMean", ["image", "space"], ["mean"], keepdims=0),
        node("Reshape", ["mean", "one"], ["embedding"]),
        node("Slice", ["image", "from", "to", "sides"], ["corner"]),
        node("ReduceMean", ["corner", "space"], ["corner_mean"], keepdims=0),
        node("Mul", ["corner_mean", "ten"], ["spread"]),
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
        if name != without
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, 224, 224])
    graph = helper.make_graph(nodes, "tiny", [image], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def frame(
    *lesions: tuple[float, float, float, float, int],
    number: int = 1,
    count: int = 1,
    instance: str = "1.2.3",
    tissue: int = 35,
    corner: int = 0,
    spacing: Spacing | None = SPACING,
    laterality: Side | None = None,
) -> Frame:
    """Even tissue with elliptic lesions, each (centre x, centre y, radius x, radius y, grey) in pixels of the frame."""
    grey = np.zeros((600, 700), np.uint8)
    left, top, right, bottom = REGION
    grey[top:bottom, left:right] = tissue
    grey[top : top + 16, left : left + 16] = corner
    y, x = np.mgrid[:600, :700]
    for cx, cy, rx, ry, value in lesions:
        grey[((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1] = value
    source = Source("1.2.840.10008.5.1.4.1.1.6.1", instance, "1.2", 600, 700, number, count)
    return Frame(source, grey, REGION, spacing, laterality)


def study(*frames: Frame, **more: Any) -> Study:
    return Study("1.9", Patient(), Header(), Scanner(), frames, received=(("1.2.3", "ab"),), **more)


def lesion(grey: int = EVEN, x: float = 320, y: float = 270, rx: float = 60, ry: float = 40) -> Any:
    return (x, y, rx, ry, grey)
