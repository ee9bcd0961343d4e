"""Where the elements of an encoded data set are, as far as they can be followed; independent of the code under test."""

from __future__ import annotations

import struct
from typing import NamedTuple

LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
PIXELS = 0x7FE00010
UNDEFINED = 0xFFFFFFFF
DEEPEST = 8


class Spot(NamedTuple):
    """An element, an item or a delimiter: header at `start`, value from `value` to `end`."""

    tag: int
    vr: bytes
    start: int
    value: int
    end: int
    length_at: int
    length_size: int


def spots(data: bytes, *, implicit: bool, big: bool = False) -> list[Spot]:
    found: list[Spot] = []
    _elements(data, 0, len(data), implicit, ">" if big else "<", found, 0)
    return found


def _elements(data: bytes, at: int, end: int, implicit: bool, order: str, found: list[Spot], depth: int) -> int:
    while at + 8 <= end:
        spot, length = _header(data, at, implicit, order)
        undefined = length == UNDEFINED
        here = spot._replace(end=spot.value if undefined else min(end, spot.value + length))
        found.append(here)
        at = here.end
        if spot.tag in (ITEM_END, SEQUENCE_END):
            return at
        inside = spot.tag == ITEM or spot.vr == b"SQ" or (undefined and depth < DEEPEST)
        if inside and depth < DEEPEST:
            until = end if undefined else here.end
            at = max(at, _elements(data, spot.value, until, implicit, order, found, depth + 1))
    return at


def _header(data: bytes, at: int, implicit: bool, order: str) -> tuple[Spot, int]:
    group, element = struct.unpack_from(order + "HH", data, at)
    tag, vr = group << 16 | element, data[at + 4 : at + 6]
    if implicit or group == 0xFFFE:
        return Spot(tag, b"", at, at + 8, 0, at + 4, 4), struct.unpack_from(order + "I", data, at + 4)[0]
    if vr in LONG and at + 12 <= len(data):
        return Spot(tag, vr, at, at + 12, 0, at + 8, 4), struct.unpack_from(order + "I", data, at + 8)[0]
    return Spot(tag, vr, at, at + 8, 0, at + 6, 2), struct.unpack_from(order + "H", data, at + 6)[0]
