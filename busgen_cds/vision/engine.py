"""A verified Bundle → an Engine: one warm session that reads frames for everybody.

Rules:
- The network's bytes come from the Bundle in memory: what was verified is what runs.
- Asked for CUDA and not given it is Misconfigured. `auto` may choose; what really runs is `provider`.
- Callers on many threads share one session: frames that wait at the same moment are read together.
- A frame's answer does not depend on what it was read together with.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnxruntime
import safetensors.numpy
from numpy.typing import NDArray

from busgen_cds.bundle import DOMAIN, NETWORK, Bundle
from busgen_cds.errors import Misconfigured
from busgen_cds.result import BundleName

Device = Literal["auto", "cuda", "cpu"]
Array = NDArray[np.float32]

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
INPUT = "image"
WAIT = 0.003  # seconds that a frame waits for company
TOGETHER = {CUDA: 32, CPU: 8}  # frames in one run
SAME_SCORE = 1e-3  # how far two providers' scores may lie apart


class Reading(NamedTuple):
    """What the network says of N frames."""

    mask: Array  # (N, 1, h, w) probability that a cell belongs to a lesion
    presence: Array  # (N,) logit
    malignancy: Array  # (N,) logit
    heat: Array  # (N, gh, gw) signed evidence
    embedding: Array  # (N, D)
    spread: Array  # (N,) of the malignancy logit


@dataclass(frozen=True)
class Gate:
    """How far an embedding lies from those seen in training."""

    mean: Array = field(repr=False)  # (D,)
    whiten: Array = field(repr=False)  # (D, K)

    def whitened(self, embedding: Array) -> Array:
        """(N, D) → (N, K), about standard normal for the images seen in training."""
        return np.asarray((embedding - self.mean) @ self.whiten, np.float32)

    def distance(self, embedding: Array) -> Array:
        return np.asarray(np.linalg.norm(self.whitened(embedding), axis=-1), np.float32)


class _Waiting(NamedTuple):
    frames: Array
    answer: Future[Reading]


class Engine:
    """Made by `open` only."""

    def __init__(self, bundle: Bundle, session: Any, provider: str) -> None:
        self.manifest = bundle.manifest
        self.bundle: BundleName = bundle.name
        self.provider = provider
        self.gate = _gate(bundle)
        self._session = session
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    def read(self, frames: Array) -> Reading:
        """(N, 1, size, size) in 0..1 → Reading; waits until it is read."""
        size = self.manifest.size
        if frames.ndim != 4 or frames.shape[1:] != (1, size, size) or len(frames) == 0:
            raise ValueError(f"expected frames of (N, 1, {size}, {size}), got {frames.shape}")
        if self._closed:
            raise RuntimeError("the engine is closed")
        answer: Future[Reading] = Future()
        self._queue.put(_Waiting(np.asarray(frames, np.float32), answer))
        return answer.result()

    def close(self) -> None:
        """Finish what waits, then stop."""
        self._closed = True
        self._queue.put(None)
        self._thread.join()

    def _serve(self) -> None:
        for group in self._groups():
            try:
                together = np.concatenate([waiting.frames for waiting in group])
                _hand_out(group, self._run(together))
            except BaseException as broken:  # noqa: BLE001 - whatever it is belongs to those who wait
                for waiting in group:
                    waiting.answer.set_exception(broken)

    def _groups(self) -> Iterator[list[_Waiting]]:
        """Who waits now, and whoever comes before the deadline or until a run is full."""
        while (first := self._queue.get()) is not None:
            group, deadline = [first], time.monotonic() + WAIT
            while sum(len(waiting.frames) for waiting in group) < TOGETHER[self.provider]:
                try:
                    further = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    break
                if further is None:
                    yield group
                    return
                group.append(further)
            yield group

    def _run(self, frames: Array) -> Reading:
        step = TOGETHER[self.provider]
        parts = [
            Reading(*self._session.run(list(Reading._fields), {INPUT: frames[i : i + step]}))
            for i in range(0, len(frames), step)
        ]
        return Reading(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def open(bundle: Bundle, device: Device = "auto", threads: int = 0) -> Engine:
    """Load the network and run it once. `threads`: of one run on the CPU; 0 takes all cores."""
    session, provider = _session(bundle, device, threads)
    _check_signature(bundle, session)
    engine = Engine(bundle, session, provider)
    engine.read(np.zeros((1, 1, bundle.manifest.size, bundle.manifest.size), np.float32))
    return engine


@contextmanager
def opened(bundle: Bundle, device: Device = "auto", threads: int = 0) -> Iterator[Engine]:
    engine = open(bundle, device, threads)
    try:
        yield engine
    finally:
        engine.close()


def compare_providers(bundle: Bundle, frames: Array) -> Mapping[str, float]:
    """The largest difference between CPU and CUDA in each output; Misconfigured where scores do not agree."""
    with opened(bundle, "cpu") as on_cpu, opened(bundle, "cuda") as on_cuda:
        here, there = on_cpu.read(frames), on_cuda.read(frames)
    apart = {name: float(np.abs(a - b).max()) for name, a, b in zip(Reading._fields, here, there, strict=True)}
    calibration = bundle.manifest.calibration
    scores = [[calibration.probability(float(m)) for m in reading.malignancy] for reading in (here, there)]
    apart["probability"] = max(abs(a - b) for a, b in zip(*scores, strict=True))
    if apart["probability"] > SAME_SCORE:
        raise Misconfigured(
            f"CUDA and CPU disagree on bundle {bundle.name.name} {bundle.name.version} by {apart['probability']:.4f}: "
            "set engine.device to cpu, and report the driver's version."
        )
    return apart


def _session(bundle: Bundle, device: Device, threads: int) -> tuple[Any, str]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what goes wrong is raised or seen in the providers; nothing is printed
    network = bundle.files[NETWORK]
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the cores are not ours alone
    if device == "cuda" or (device == "auto" and _sees_gpu()):
        onnxruntime.set_default_logger_severity(4)
        _preload_cuda()
        # tf32 would move scores by more than providers may differ
        cuda = (CUDA, {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"})
        session = onnxruntime.InferenceSession(network, options, providers=[cuda, CPU])
        if CUDA in session.get_providers():
            return session, CUDA
    if device == "cuda":
        raise Misconfigured(
            "engine.device is cuda, but ONNX Runtime cannot use it here: install the gpu extra "
            "(pip install 'busgen-cds[gpu]') and an NVIDIA driver, or set engine.device to cpu or auto."
        )
    return onnxruntime.InferenceSession(network, options, providers=[CPU]), CPU


def _sees_gpu() -> bool:
    """A driver's device node: without one, trying CUDA only costs time."""
    nodes = ("/dev/nvidiactl", "/dev/dxg")
    return CUDA in onnxruntime.get_available_providers() and any(Path(node).exists() for node in nodes)


def _preload_cuda() -> None:
    """The gpu extra puts CUDA and cuDNN beside Python, where the loader does not look by itself."""
    if hasattr(onnxruntime, "preload_dlls"):
        with redirect_stdout(StringIO()):  # it prints what it misses; the providers of the session say it better
            onnxruntime.preload_dlls()


def _check_signature(bundle: Bundle, session: Any) -> None:
    inputs = [value.name for value in session.get_inputs()]
    missing = set(Reading._fields) - {value.name for value in session.get_outputs()}
    if inputs != [INPUT] or missing:
        raise Misconfigured(
            f"Bundle {bundle.name.name} {bundle.name.version} holds a network that this version cannot use "
            f"(inputs {inputs}, missing outputs {sorted(missing)}): install a matching bundle."
        )


def _gate(bundle: Bundle) -> Gate:
    tensors = safetensors.numpy.load(bundle.files[DOMAIN])
    return Gate(tensors["mean"], tensors["whiten"])


def _hand_out(group: list[_Waiting], reading: Reading) -> None:
    start = 0
    for waiting in group:
        end = start + len(waiting.frames)
        waiting.answer.set_result(Reading(*(part[start:end] for part in reading)))
        start = end
