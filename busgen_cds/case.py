"""What a reader, a final report or pathology said of a de-identified frame, ready to learn from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from busgen_cds.result import BundleName

Pathology = Literal["normal", "benign", "malignant"]
Word = Literal["agree", "edit", "reject"]
Origin = Literal["reader", "pathology", "report"]


@dataclass(frozen=True, eq=False)
class Case:
    patient_hash: str  # keyed hash: groups a patient's cases, names nobody
    tissue: NDArray[np.uint8] = field(repr=False)  # de-identified B-mode region
    mask: NDArray[np.bool_] | None = field(repr=False)
    pathology: Pathology  # as pathology found it, or as a reader's opinion has it: `origin` says which
    birads: str | None
    origin: Origin
    word: Word | None
    confirmed_on: str  # ISO date
    said_by: BundleName | None  # the bundle whose Result was confirmed or corrected
    device: str = ""
