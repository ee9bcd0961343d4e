"""One warm session for everybody: what ran is said, and company changes no answer."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from busgen_cds.bundle import Bundle
from busgen_cds.errors import Misconfigured
from busgen_cds.vision import engine
from busgen_cds.vision.engine import Engine
from tests.vision import readers


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return readers.bundle(tmp_path / "bundle")


@pytest.fixture
def cpu(bundle: Bundle) -> Iterator[Engine]:
    with engine.opened(bundle, "cpu") as opened:
        yield opened


class Counting:
    """The real session, with a count of its runs."""

    def __init__(self, session: Any) -> None:
        self.session, self.sizes = session, []

    def run(self, names: Any, inputs: dict[str, Any]) -> Any:
        self.sizes.append(len(inputs["image"]))
        return self.session.run(names, inputs)


def frames(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, 1, 224, 224), np.float32)


def test_says_what_ran(cpu: Engine) -> None:
    """The provider that really ran is named."""
    assert cpu.provider == "CPUExecutionProvider"


@pytest.mark.skipif(engine._sees_gpu(), reason="this machine has a GPU")
def test_cuda_is_never_replaced_in_silence(bundle: Bundle) -> None:
    """Asked for CUDA where there is none: Misconfigured, which names the setting."""
    with pytest.raises(Misconfigured, match=r"engine\.device"):
        engine.open(bundle, "cuda")


def test_nothing_is_printed_while_looking_for_a_gpu(bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    """`auto` and a refused `cuda` leave output to those who parse it."""
    with engine.opened(bundle, "auto"):
        pass
    if not engine._sees_gpu():
        with pytest.raises(Misconfigured):
            engine.open(bundle, "cuda")
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not engine._sees_gpu(), reason="no GPU at hand")
def test_cpu_and_cuda_agree(bundle: Bundle) -> None:
    """Scores by CPU and by CUDA lie within 1e-3."""
    assert engine.compare_providers(bundle, frames(8))["probability"] <= engine.SAME_SCORE


def test_company_changes_no_answer(cpu: Engine) -> None:
    """A frame read among others gets the answer it gets alone."""
    alone = [cpu.read(frames(1, seed)) for seed in range(24)]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda seed: cpu.read(frames(1, seed)), range(24)))
    for a, b in zip(alone, together, strict=True):
        for one, other in zip(a, b, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)


def test_frames_that_wait_together_are_read_together(cpu: Engine) -> None:
    """Callers on many threads share runs of the network."""
    counting = Counting(cpu._session)
    cpu._session = counting
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda seed: cpu.read(frames(1, seed)), range(48)))
    assert sum(counting.sizes) == 48
    assert len(counting.sizes) < 48
    assert max(counting.sizes) <= engine.TOGETHER[cpu.provider]


def test_a_long_clip_is_read_in_parts(cpu: Engine) -> None:
    """More frames than one run takes come back whole and in order."""
    clip = frames(21)
    reading = cpu.read(clip)
    assert reading.mask.shape == (21, 1, 112, 112)
    np.testing.assert_allclose(reading.embedding[:, 0], clip.mean((1, 2, 3)), rtol=1e-5)


def test_a_failure_reaches_the_caller_and_only_then(cpu: Engine) -> None:
    """A run that breaks raises where it was asked for, and the engine goes on."""
    good = cpu._session

    class Broken:
        def run(self, *_: Any) -> Any:
            raise RuntimeError("out of memory")

    cpu._session = Broken()
    with pytest.raises(RuntimeError, match="out of memory"):
        cpu.read(frames(1))
    cpu._session = good
    assert len(cpu.read(frames(1)).presence) == 1


def test_only_frames_as_pixels_prepares_them(cpu: Engine) -> None:
    """Another size is our own mistake, and is not resized in passing."""
    with pytest.raises(ValueError, match="224"):
        cpu.read(np.zeros((1, 1, 192, 192), np.float32))


def test_a_closed_engine_says_so(bundle: Bundle) -> None:
    """After close nothing waits for ever."""
    closed = engine.open(bundle, "cpu")
    closed.close()
    with pytest.raises(RuntimeError, match="closed"):
        closed.read(frames(1))


def test_another_network_is_refused(tmp_path: Path) -> None:
    """A bundle whose network lacks an output is Misconfigured when it is opened, not when it is used."""
    lacking = readers.bundle(tmp_path / "lacking", network_bytes=readers.network(without="spread"))
    with pytest.raises(Misconfigured, match="spread"):
        engine.open(lacking, "cpu")


def test_the_gate_measures_distance_from_training(cpu: Engine) -> None:
    """Distance is the norm of the whitened difference from the mean."""
    np.testing.assert_allclose(cpu.gate.distance(np.asarray([[0.15], [0.25]], np.float32)), [0, 2], atol=1e-5)
