"""What reaches us from the network: who sent it, what its first bytes say, and what became of it.

Rules:
- An arrival is bytes as encoded; nothing here has been decoded beyond the few identifiers that file it.
- Identifiers of a patient never appear in a repr.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol


@dataclass(frozen=True)
class Arrival:
    """One C-STORE request: who sends, and what it says it is sending."""

    calling_ae: str
    address: str
    sop_class_uid: str
    sop_instance_uid: str = field(repr=False)
    transfer_syntax_uid: str
    called_ae: str = ""


@dataclass(frozen=True)
class Peek:
    """The identifiers under which a data set is filed, as its own encoded bytes state them."""

    study_instance_uid: str = field(repr=False)
    series_instance_uid: str = field(repr=False)
    sop_class_uid: str
    sop_instance_uid: str = field(repr=False)
    patient_id: str = field(default="", repr=False)
    issuer_of_patient_id: str = field(default="", repr=False)
    modality: str = ""


Outcome = Literal["new", "same", "conflict"]


@dataclass(frozen=True)
class Kept:
    """An instance that survives a power cut from now on.

    `same`: these bytes were kept before, no second copy was made. `conflict`: other bytes are already kept
    under this SOP Instance UID; the new ones are set aside and reported, and the study reads without them.
    """

    outcome: Outcome
    study_ref: str
    instance_ref: str
    study_held: str | None = None


class Incoming(Protocol):
    """Bytes on their way to the disk. Exactly one of keep, quarantine and abandon ends it."""

    def write(self, data: bytes | memoryview) -> None: ...
    def keep(self, header: Peek) -> Kept: ...
    def quarantine(self, reason: str) -> str: ...
    def abandon(self) -> None: ...


class NoRoom(Exception):
    """The disk is below its watermark: nothing was written; the sender keeps its copy and tries again."""
