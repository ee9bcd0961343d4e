"""torch → ONNX with a parity check → Candidate.

Rules:
- Members of an ensemble, and the mirrored view, are averaged inside the one graph: the engine runs one pass.
- heat.sum() + bias = malignancy holds in the graph as in training, since a mean of sums is the sum of means.
- Weights are stored in half precision and used in single; they are rounded before the parity check, so that
  what is checked is what is shipped.
- A graph that does not agree with torch is never made into a Candidate.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from busgen_cds import bundle, pixels, signing
from busgen_cds.birads import Pooling
from busgen_cds.errors import Misconfigured
from busgen_cds.learning import checkpoint
from busgen_cds.learning.reader import MALIGNANCY, Evidence, Reader, Shape

INPUT = "image"
OUTPUTS = ("mask", "presence", "malignancy", "heat", "embedding", "spread")
TOLERANCE = 1e-3
OPSET = 20
Run = Callable[[NDArray[np.float32]], Mapping[str, NDArray[np.float32]]]


class Deployed(nn.Module):
    """What is shipped: members and the mirrored view averaged; mask as probabilities at stride 2.

    The first `drawing` members draw the outline, all of them where it is 0: who judges best need not draw best.
    """

    def __init__(self, members: Sequence[Reader], mirrored: bool = True, drawing: int = 0) -> None:
        super().__init__()
        if not 0 <= drawing <= len(members):
            raise Misconfigured(f"{drawing} members cannot draw the outline: there are {len(members)}.")
        self.members, self.mirrored, self.drawing = nn.ModuleList(members), mirrored, drawing or len(members)
        self.tasks = tuple(members[0].shape.tasks)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        views = [(member(image), False) for member in self.members]
        drawn = views[: self.drawing]
        if self.mirrored:
            turned = image.flip(3)
            mirrored = [(member(turned), True) for member in self.members]
            views, drawn = views + mirrored, drawn + mirrored[: self.drawing]
        masks = torch.stack([_turn(r.mask, back) for r, back in drawn])  # (V, N, 1, h, w) logits
        grid = (2 * masks.shape[-2], 2 * masks.shape[-1])
        mask = F.interpolate(masks.mean(0), size=grid, mode="bilinear", align_corners=False).sigmoid()
        scores = torch.stack([r.malignancy for r, _ in views])
        malignancy = scores.mean(0)
        spread = ((scores - malignancy) ** 2).mean(0).sqrt()
        presence = torch.stack([r.presence for r, _ in views]).mean(0)
        heat = torch.stack([_turn(r.heat, back) for r, back in views]).mean(0)
        embedding = views[0][0].embedding
        tasks = [torch.stack([r.tasks[name] for r, _ in views]).mean(0) for name in self.tasks]
        return mask, presence, malignancy, heat, embedding, spread, *tasks

    @property
    def bias(self) -> float:
        heads = [member.heads[MALIGNANCY] for member in self.members if isinstance(member, Reader)]
        return float(np.mean([float(head.bias) for head in heads if isinstance(head, Evidence)]))

    @property
    def outputs(self) -> tuple[str, ...]:
        return (*OUTPUTS, *(f"task_{name}" for name in self.tasks))


def _turn(map_: Tensor, back: bool) -> Tensor:
    return map_.flip(map_.ndim - 1) if back else map_


def open_checkpoints(
    paths: Sequence[Path], mirrored: bool = True, floor: float | None = None, drawing: int = 0
) -> tuple[Deployed, list[dict[str, Any]]]:
    """The averaged weights of some runs as one network, rounded to what will be stored, and what each run was."""
    members, notes = [], []
    for path in paths:
        tensors, note = checkpoint.read_run(path)
        changed = {"tasks": _heads(note["settings"])} | ({} if floor is None else {"floor": floor})
        member = Reader(Shape(**note["settings"]["shape"] | changed))
        member.load_state_dict(checkpoint.part(tensors, "average."))
        members.append(member)
        notes.append(note)
    deployed = Deployed(members, mirrored, drawing)
    with torch.no_grad():
        for tensor in deployed.state_dict().values():
            tensor.copy_(tensor.half().float())
    return deployed.eval(), notes


def _heads(settings: Mapping[str, Any]) -> dict[str, int]:
    return {"birads": 4, **{task["name"]: len(task["classes"]) for task in settings["tasks"]}}


def to_onnx(deployed: Deployed, size: int = pixels.SIZE) -> bytes:
    """The graph as bytes, with its bias and the version of `pixels` in its metadata."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision, which we do not use, is absent
    example = torch.rand(2, 1, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        program = torch.onnx.export(
            deployed,
            (example,),
            input_names=[INPUT],
            output_names=list(deployed.outputs),
            dynamic_shapes={"image": {0: torch.export.Dim("frames", min=1, max=4096)}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
            optimize=True,
        )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    _halve(model)
    notes = {"bias": repr(deployed.bias), "pixels_version": pixels.VERSION, "size": str(size)}
    for key, value in notes.items():
        model.metadata_props.add(key=key, value=value)
    for node in model.graph.node:  # paths and stack traces of the machine that exported are nobody's business
        del node.metadata_props[:]
        node.doc_string = ""
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _halve(model: onnx.ModelProto) -> None:
    """Store large weights as float16, each followed by a Cast that the engine folds when it loads."""
    casts = []
    for tensor in list(model.graph.initializer):
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < 64:
            continue
        half = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name + "_half")
        casts.append(helper.make_node("Cast", [half.name], [tensor.name], to=TensorProto.FLOAT))
        model.graph.initializer.remove(tensor)
        model.graph.initializer.append(half)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(casts + nodes)


def open_graph(graph: bytes, threads: int = 0) -> Run:
    """A graph that is not yet a Bundle, to be measured."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others need the cores while we wait
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda frames: dict(zip(names, session.run(None, {INPUT: frames}), strict=True))


@torch.inference_mode()
def parity(deployed: Deployed, run: Run, frames: NDArray[np.float32]) -> dict[str, float]:
    """Largest difference between torch and the graph, per output; Misconfigured beyond the tolerance."""
    expected = dict(zip(deployed.outputs, deployed(torch.from_numpy(frames)), strict=True))
    got = run(frames)
    worst = {name: float(np.abs(got[name] - value.numpy()).max()) for name, value in expected.items()}
    total = np.abs(got["heat"].sum((1, 2)) + deployed.bias - got["malignancy"]).max()
    worst["heat_sum"] = float(total)
    bad = {name: value for name, value in worst.items() if not value <= TOLERANCE}
    if bad:
        raise Misconfigured(f"The exported graph does not agree with torch: {bad}. No candidate is made.")
    return worst


def candidate(
    *,
    name: str,
    version: str,
    created: datetime.date,
    graph: bytes,
    domain: bytes,
    card: str,
    calibration: bundle.Calibration,
    thresholds: bundle.Thresholds,
    pooling: Pooling,
    trained_on: Sequence[str],
    settings: Mapping[str, Any],
    figures: Mapping[str, Any],
) -> bundle.Candidate:
    """Everything a reader needs, unsigned."""
    files = {bundle.NETWORK: graph, bundle.DOMAIN: domain, bundle.CARD: card.encode()}
    manifest = bundle.Manifest(
        name=name,
        version=version,
        created=created.isoformat(),
        pixels_version=pixels.VERSION,
        size=pixels.SIZE,
        calibration=calibration,
        thresholds=thresholds,
        pooling=pooling,
        files={key: signing.digest(data) for key, data in files.items()},
        trained_on=tuple(trained_on),
        settings=settings,
        figures=figures,
    )
    return bundle.Candidate(manifest, files)
