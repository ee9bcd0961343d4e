"""The identifiers of a data set and whether it holds together, read while its encoded bytes pass by.

Rules:
- Nothing is decoded: values are skipped by their length, and only a few short ones are looked at.
- Memory is bounded: what is kept between two pieces is at most one element's header and one short value.
- Every length is believed only as far as the bytes bear it out: a data set that ends inside a value, goes on after
  its end, or whose elements do not rise is Corrupt, with a reason that names the element and no content.
- A deflated data set is inflated a piece at a time, and only up to a limit.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass, field
from typing import Literal

from busgen_cds.arrival import Peek

IMPLICIT_LITTLE = "1.2.840.10008.1.2"
EXPLICIT_BIG = "1.2.840.10008.1.2.2"
DEFLATED = frozenset(
    {
        "1.2.840.10008.1.2.1.99",  # Deflated Explicit VR Little Endian
        "1.2.840.10008.1.2.4.95",  # JPIP Referenced Deflate
        "1.2.840.10008.1.2.4.205",  # JPIP HTJ2K Referenced Deflate
    }
)
MOST_INFLATED = 4 << 30
DEEPEST = 32

_SOP_CLASS, _SOP_INSTANCE = 0x00080016, 0x00080018
_MODALITY, _PATIENT_ID, _ISSUER = 0x00080060, 0x00100020, 0x00100021
_STUDY, _SERIES = 0x0020000D, 0x0020000E
_WANTED = frozenset({_SOP_CLASS, _SOP_INSTANCE, _MODALITY, _PATIENT_ID, _ISSUER, _STUDY, _SERIES})
_LONGEST_WANTED = 1024
_PIXEL_DATA = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF
# PS3.5 7.1.2: these have a reserved field and a 32-bit length; all other VRs have a 16-bit length
_LONG_VRS = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_SHORT_VRS = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
LONGEST_UID = 64  # PS3.5 9.1
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")


class Corrupt(Exception):
    """These bytes are no data set of the transfer syntax they came in."""


def is_uid(text: str) -> bool:
    return len(text) <= LONGEST_UID and _UID.fullmatch(text) is not None


@dataclass
class _Level:
    """Where we are: among elements, among items of a sequence, or among fragments of pixel data."""

    kind: Literal["elements", "items", "fragments"]
    implicit: bool
    last_tag: int = -1


@dataclass
class Reader:
    """Feed it the encoded data set in pieces of any size; `finish` gives the identifiers."""

    transfer_syntax_uid: str
    most_inflated: int = MOST_INFLATED
    _found: dict[int, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        big = self.transfer_syntax_uid == EXPLICIT_BIG
        self._tag, self._short, self._long = (
            struct.Struct(">HH" if big else "<HH"),
            *(struct.Struct(form) for form in ((">H", ">I") if big else ("<H", "<I"))),
        )
        self._levels = [_Level("elements", self.transfer_syntax_uid == IMPLICIT_LITTLE)]
        self._pending = b""
        self._skip = 0
        self._at = 0  # the element being read, for messages
        self._inflater = zlib.decompressobj(-15) if self.transfer_syntax_uid in DEFLATED else None
        self._inflated = 0

    def feed(self, data: bytes | memoryview) -> None:
        if self._inflater is None:
            self._walk(data)
        else:
            self._inflate(self._inflater, data)

    def finish(self) -> Peek:
        """All bytes have passed: do they end where the lengths say, and do they say what must be known?"""
        if self._inflater is not None and not self._inflater.eof:
            raise Corrupt("The deflated data set is cut: its stream does not end.")
        if self._skip or self._pending:
            raise Corrupt(f"The data set ends inside {_name(self._at)}: it is cut, or a length lies.")
        if len(self._levels) > 1:
            raise Corrupt(f"The data set ends inside a sequence, after {_name(self._at)}.")
        return Peek(
            study_instance_uid=self._uid(_STUDY, "Study Instance UID"),
            series_instance_uid=self._uid(_SERIES, "Series Instance UID"),
            sop_class_uid=self._uid(_SOP_CLASS, "SOP Class UID"),
            sop_instance_uid=self._uid(_SOP_INSTANCE, "SOP Instance UID"),
            patient_id=self._found.get(_PATIENT_ID, ""),
            issuer_of_patient_id=self._found.get(_ISSUER, ""),
            modality=self._found.get(_MODALITY, ""),
        )

    def _uid(self, tag: int, name: str) -> str:
        uid = self._found.get(tag, "")
        if not uid:
            raise Corrupt(f"The data set has no {name}.")
        if len(uid) > LONGEST_UID:
            raise Corrupt(f"The {name} of the data set is longer than {LONGEST_UID} characters.")
        if not is_uid(uid):
            raise Corrupt(f"The {name} of the data set is not a UID.")
        return uid

    def _inflate(self, inflater: zlib._Decompress, data: bytes | memoryview) -> None:
        try:
            while data and not inflater.eof:
                piece = inflater.decompress(data, 1 << 20)
                data = inflater.unconsumed_tail
                self._inflated += len(piece)
                if self._inflated > self.most_inflated:
                    raise Corrupt(f"The deflated data set grows beyond {self.most_inflated} bytes.")
                self._walk(piece)
        except zlib.error:
            raise Corrupt("The deflated data set does not inflate.") from None

    def _walk(self, data: bytes | memoryview) -> None:
        if self._skip:
            if self._skip >= len(data):
                self._skip -= len(data)
                return
            data = memoryview(data)[self._skip :]
            self._skip = 0
        view = memoryview(self._pending + bytes(data) if self._pending else data)
        position = 0
        while position < len(view):
            used = self._step(view, position)
            if used == 0:
                break
            position += used
        else:
            self._skip = position - len(view)
        self._pending = bytes(view[position:])

    def _step(self, view: memoryview, at: int) -> int:
        """Read the header at `at` and pass over its value; 0 when more bytes are needed to know how far."""
        if len(view) - at < 8:
            return 0
        group, element = self._tag.unpack_from(view, at)
        tag = group << 16 | element
        if self._levels[-1].kind == "elements":
            return self._element(view, at, tag)
        return self._item(view, at, tag)

    def _element(self, view: memoryview, at: int, tag: int) -> int:
        level = self._levels[-1]
        if tag == _ITEM_END and len(self._levels) > 1:
            self._levels.pop()
            return 8
        if tag <= level.last_tag or tag >> 16 == 0xFFFE:
            raise Corrupt(f"{_name(tag)} follows {_name(level.last_tag)}: a length lies, or these are no elements.")
        header, vr, length = self._header(view, at, tag, level.implicit)
        if header == 0:
            return 0
        self._at = tag
        if length == _UNDEFINED:
            self._enter(tag, vr, level)
            level.last_tag = tag
            return header
        if len(self._levels) == 1 and tag in _WANTED:
            if length > _LONGEST_WANTED:
                raise Corrupt(f"{_name(tag)} is said to have {length} bytes.")
            if len(view) - at < header + length:
                return 0
            value = bytes(view[at + header : at + header + length])
            self._found[tag] = value.decode("latin-1").strip("\0 ")
        level.last_tag = tag
        return header + length

    def _header(self, view: memoryview, at: int, tag: int, implicit: bool) -> tuple[int, bytes, int]:
        """(bytes of the header, VR, length of the value); the first is 0 when the header is not all there."""
        if implicit:
            return 8, b"", self._long.unpack_from(view, at + 4)[0]
        vr = bytes(view[at + 4 : at + 6])
        if vr in _SHORT_VRS:
            return 8, vr, self._short.unpack_from(view, at + 6)[0]
        if vr not in _LONG_VRS:
            raise Corrupt(f"{_name(tag)} has no value representation of DICOM.")
        if len(view) - at < 12:
            return 0, vr, 0
        return 12, vr, self._long.unpack_from(view, at + 8)[0]

    def _enter(self, tag: int, vr: bytes, level: _Level) -> None:
        if len(self._levels) >= 2 * DEEPEST:
            raise Corrupt(f"Sequences are nested deeper than {DEEPEST} in {_name(tag)}.")
        if tag in _PIXEL_DATA and vr != b"SQ":
            self._levels.append(_Level("fragments", level.implicit))
        elif vr in (b"SQ", b"UN", b""):
            # PS3.5 6.2.2 note 2: UN of undefined length holds items in implicit VR little endian
            self._levels.append(_Level("items", level.implicit or vr == b"UN"))
        else:
            raise Corrupt(f"{_name(tag)} has no length.")

    def _item(self, view: memoryview, at: int, tag: int) -> int:
        length = self._long.unpack_from(view, at + 4)[0]
        if tag == _SEQUENCE_END:
            self._levels.pop()
            return 8
        if tag != _ITEM:
            raise Corrupt(f"Inside {_name(self._at)} comes {_name(tag)} where an item must be.")
        if length != _UNDEFINED:
            return 8 + int(length)
        level = self._levels[-1]
        if level.kind == "fragments":
            raise Corrupt(f"A fragment of {_name(self._at)} has no length.")
        if len(self._levels) >= 2 * DEEPEST:
            raise Corrupt(f"Sequences are nested deeper than {DEEPEST} in {_name(self._at)}.")
        self._levels.append(_Level("elements", level.implicit))
        return 8


def _name(tag: int) -> str:
    return "the beginning" if tag < 0 else f"({tag >> 16:04X},{tag & 0xFFFF:04X})"
