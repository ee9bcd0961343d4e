"""DICOM files by their headers: whose study is this, and how would it be sent.

Rules:
- Whatever a damaged or hostile file does to its reader, it ends as a ValueError with a reason, and stops no other file.
- A deflated file is inflated up to a limit only.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import pydicom
from pydicom.uid import DeflatedExplicitVRLittleEndian

from busgen_cds.dicom import decode


@dataclass(frozen=True)
class File:
    """A whole Part 10 file, addressed by its own header."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    data: bytes = field(repr=False)


def study_uid(data: bytes) -> str:
    """The Study Instance UID; a ValueError says why there is none."""
    (uid,) = _said(data, "StudyInstanceUID")
    if not uid:
        raise ValueError("no Study Instance UID: this file belongs to no study")
    return uid


def open_file(data: bytes) -> File:
    """A file as the outbox takes it, bytes as they are; a ValueError says why it cannot be sent."""
    sop_class, sop_instance = _said(data, "SOPClassUID", "SOPInstanceUID")
    if not (sop_class and sop_instance):
        raise ValueError("no SOP class or SOP Instance UID: this file cannot be sent")
    return File(sop_class, sop_instance, str(decode.transfer_syntax(data)), data)


def _said(data: bytes, *names: str) -> list[str]:
    """Values are converted when they are asked for: that, too, may raise anything."""
    try:
        header = _header(data, list(names))
        return [str(header.get(name, "") or "").strip() for name in names]
    except decode.Unreadable as reason:
        raise ValueError(str(reason)) from reason
    except Exception as broken:
        raise ValueError(f"not a readable DICOM file ({type(broken).__name__})") from broken


def _header(data: bytes, names: list[str]) -> pydicom.Dataset:
    if decode.transfer_syntax(data) == DeflatedExplicitVRLittleEndian:
        return decode.open_file(data).header
    return pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True, specific_tags=names)
