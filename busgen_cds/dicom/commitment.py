"""A PACS's word on a request for storage commitment (PS3.4 annex J.3.3), on whichever association it comes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from pydicom.dataset import Dataset

# PS3.4 J.3.3.1.1: failure reasons.
NOT_KEPT = {
    0x0110: "processing failure",
    0x0112: "no such object",
    0x0119: "class and instance conflict",
    0x0122: "SOP class not supported",
    0x0131: "duplicate transaction",
    0x0213: "resource limitation",
}


@dataclass(frozen=True)
class Commitment:
    """What it keeps, and what it does not, with the reason; by SOP Instance UID."""

    transaction_uid: str
    kept: tuple[str, ...] = field(repr=False)
    failed: tuple[tuple[str, str], ...] = field(default=(), repr=False)


class Speaker(NamedTuple):
    """Who opened the association on which it was said: a title that was let in, from this address."""

    ae_title: str
    address: str


def read_report(report: Dataset) -> Commitment:
    """The data set of an N-EVENT-REPORT."""
    kept = tuple(str(item.ReferencedSOPInstanceUID) for item in report.get("ReferencedSOPSequence", ()))
    failed = tuple(
        (str(item.ReferencedSOPInstanceUID), NOT_KEPT.get(code := int(item.get("FailureReason", 0)), f"0x{code:04X}"))
        for item in report.get("FailedSOPSequence", ())
    )
    return Commitment(str(report.get("TransactionUID", "")), kept, failed)
