"""Counts what comes in, for drift: the words of each result and where its images lie.

Rules:
- A study is counted after its result is kept, once, at its first revision. Counting that fails stops no study.
- Of the images only the sum of their features is kept, never a feature of one study by itself longer than it is read.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from busgen_cds import birads, drift
from busgen_cds.drift import Vector
from busgen_cds.result import Assessed, Result
from busgen_cds.store.drift import Drift
from busgen_cds.study import Study

log = logging.getLogger("busgen_cds.flows")
UNDER_WAY = 64  # studies read and not yet kept


class Watch:
    def __init__(self, store: Drift, live: Callable[[], str]) -> None:
        self.store, self._live = store, live
        self._seen: OrderedDict[str, Vector] = OrderedDict()
        self._lock = threading.Lock()

    def saw(self, result: Result, whitened: Sequence[NDArray[np.float32]]) -> None:
        """Where the images of a study lie, until its result is kept."""
        if not whitened:
            return
        try:
            vector = drift.features(np.concatenate(list(whitened)))
        except (ValueError, FloatingPointError) as error:
            log.warning("A study's images were not counted for drift: %s", error)
            return
        with self._lock:
            self._seen[result.evidence_digest] = vector
            while len(self._seen) > UNDER_WAY:
                self._seen.popitem(last=False)

    def count(self, study: Study, result: Result) -> None:
        """Add a study whose result was kept."""
        with self._lock:
            vector = self._seen.pop(result.evidence_digest, None)
        if vector is None or result.revision != 1:
            return
        device = " ".join(part for part in (study.scanner.manufacturer, study.scanner.model) if part)
        try:
            self.store.add(result.bundle.digest, device, drift.one(_category(result), _score(result), vector))
        except Exception as error:  # noqa: BLE001 - one study less in a sum; its result is kept
            log.warning("A study was not counted for drift: %s", type(error).__name__)

    def look(self) -> None:
        """Raise the alarms that are due."""
        for alarm in self.store.raise_alarms(self._live()):
            log.warning("Drift of %s at %s: %.3f.", alarm.figure, alarm.device or "all devices", alarm.value)


def _category(result: Result) -> str:
    return (result.birads or "none") if isinstance(result, Assessed) else "declined"


def _score(result: Result) -> float | None:
    """The same at every prevalence a site may state."""
    if not isinstance(result, Assessed):
        return None
    return birads.at_prevalence(result.probability, result.prevalence, result.calibrated_at)
