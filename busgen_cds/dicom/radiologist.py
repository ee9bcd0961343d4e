"""A radiologist's final report received as DICOM SR: the category that it states for the study.

Rules:
- Only a complete and verified report counts, and never one of ours.
- The category is a code of BI-RADS as SNOMED CT or the ACR's own list writes it; a report that states two is not used.
"""

from __future__ import annotations

from dataclasses import dataclass

from busgen_cds.birads import CODES
from busgen_cds.dicom import content, decode
from busgen_cds.dicom.identity import PRODUCT
from busgen_cds.dicom.relevance import text

SR = frozenset(f"1.2.840.10008.5.1.4.1.1.88.{last}" for last in ("11", "22", "33"))
# PS3.16 CID 6027, besides those that this product says itself
_OTHERS = {
    ("397141009", "SCT"): "2", ("MA.II.A.5.2", "BI"): "2", ("MA.II.A.5.3", "BI"): "3", ("MA.II.A.5.5", "BI"): "5",
}  # fmt: skip
_CATEGORIES = {(said.value, said.scheme): category for category, said in CODES.items()} | _OTHERS


@dataclass(frozen=True)
class Final:
    birads: str


@dataclass(frozen=True)
class NotFinal:
    reason: str


def read(data: bytes) -> Final | NotFinal:
    """The category of a whole Part 10 file."""
    try:
        header = decode.open_file(data).header
    except decode.Unreadable as reason:
        return NotFinal(str(reason))
    if text(header, "SOPClassUID") not in SR:
        return NotFinal("no structured report")
    if PRODUCT in (text(header, "Manufacturer"), text(header, "ManufacturerModelName")):
        return NotFinal("a report of ours")
    if text(header, "CompletionFlag") != "COMPLETE" or text(header, "VerificationFlag") != "VERIFIED":
        return NotFinal("not complete and verified")
    stated = {category for item in content.walk(header) if (category := _category(item)) is not None}
    if len(stated) != 1:
        return NotFinal(f"it states {len(stated)} categories")
    return Final(stated.pop())


def _category(item: object) -> str | None:
    codes = getattr(item, "ConceptCodeSequence", None)
    if not codes:
        return None
    return _CATEGORIES.get((text(codes[0], "CodeValue"), text(codes[0], "CodingSchemeDesignator")))
