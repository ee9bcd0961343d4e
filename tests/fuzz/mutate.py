"""A seed and a number → an object as an attacker, a broken archive or a careless vendor would write it."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tests.fuzz import structure
from tests.fuzz.seeds import Seed
from tests.fuzz.structure import ITEM, PIXELS, UNDEFINED, Spot

LENGTHS = (0, 1, 2, 3, 7, 255, 1024, 0x7FFF, 0xFFFE, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFE, UNDEFINED)
NUMBERS = (0, 1, 2, 3, 7, 8, 9, 15, 16, 31, 32, 33, 64, 95, 97, 255, 256, 4096, 8192, 8193, 0x7FFF, 0x8000, 0xFFFF)
TEXTS = (
    b"", b"-1", b"0", b"1e999", b"NaN", b"99999999999999999999", b"\\\\\\\\", b"1\\2\\3", b"\0\0\0\0", b"\xff\xfe\xfd",
    b"../../../../tmp/escape", b"/etc/passwd\0", b"%s%n{0}", b"\x1b$B\x1b(J", b"A" * 5000, b"1." * 40, b" " * 64,
    b"ISO 2022 IR 87\\ISO 2022 IR 159", b"ISO_IR 999", b"GB18030", b"BREAST", b"ORIGINAL\\PRIMARY", b"2.25.1",
)  # fmt: skip
VRS = tuple(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US OB OW SQ UN UT UC UR OF OV".split())
GEOMETRY = (
    0x00280002, 0x00280004, 0x00280006, 0x00280008, 0x00280010, 0x00280011, 0x00280100, 0x00280101, 0x00280102,
    0x00280103, 0x00281050, 0x00281051, 0x00281101, 0x00281102, 0x00281103, 0x00280030,
)  # fmt: skip
TAGS = (*GEOMETRY, PIXELS, ITEM, 0xFFFEE00D, 0xFFFEE0DD, 0x00020010, 0x00080005, 0x00080018, 0x00186011, 0x7FE00001, 0)
SYNTAXES = tuple(
    f"1.2.840.10008.1.2{tail}"
    for tail in (
        "", ".1", ".2", ".1.99", ".5", ".4.50", ".4.51", ".4.57", ".4.70", ".4.80", ".4.81", ".4.90", ".4.91", ".4.201",
        ".4.100", ".4.999",
    )
)  # fmt: skip


class Mutated(NamedTuple):
    seed: str
    what: tuple[str, ...]
    file: bytes  # Part 10
    data_set: bytes  # as it travels
    syntax: str


class _Work:
    """A data set being altered, and where its elements were when it was last looked at."""

    def __init__(self, seed: Seed, others: Sequence[Seed], dice: random.Random) -> None:
        self.seed, self.others, self.dice = seed, others, dice
        self.data = bytearray(seed.data)
        self.order = ">" if seed.big else "<"

    def spots(self) -> list[Spot]:
        return structure.spots(bytes(self.data), implicit=self.seed.implicit, big=self.seed.big)

    def spot(self, *tags: int) -> Spot | None:
        found = [each for each in self.spots() if not tags or each.tag in tags]
        return self.dice.choice(found) if found else None

    def number(self, bits: int = 32) -> int:
        return self.dice.choice(LENGTHS) & ((1 << bits) - 1)


def unaltered(seed: Seed) -> Mutated:
    data = _deflate(seed.data, random.Random(0), []) if seed.deflated else seed.data
    return Mutated(seed.name, (), seed.meta + data, data, seed.syntax)


def mutated(seed: Seed, others: Sequence[Seed], dice: random.Random) -> Mutated:
    work = _Work(seed, others, dice)
    steps = dice.choices(list(STEPS), weights=WEIGHTS, k=dice.choice((1, 1, 2, 2, 3, 4)))
    for step in steps:
        STEPS[step](work)
    meta, syntax = bytearray(seed.meta), seed.syntax
    if dice.random() < 0.05:
        steps.append("transfer syntax")
        syntax = dice.choice(SYNTAXES)
        meta = bytearray(bytes(meta).replace(seed.syntax.encode(), syntax.encode().ljust(len(seed.syntax), b"\0"), 1))
    if dice.random() < 0.04:
        steps.append("file header")
        meta[dice.randrange(len(meta))] ^= 1 << dice.randrange(8)
    data = bytes(work.data)
    if seed.deflated:
        data = _deflate(data, dice, steps)
    return Mutated(seed.name, tuple(steps), bytes(meta) + data, data, syntax)


def _deflate(data: bytes, dice: random.Random, steps: list[str]) -> bytes:
    packer = zlib.compressobj(dice.choice((0, 1, 6)), zlib.DEFLATED, -zlib.MAX_WBITS)
    packed = bytearray(packer.compress(data) + packer.flush())
    if dice.random() < 0.3:
        steps.append("deflated stream")
        packed[dice.randrange(len(packed))] ^= 1 << dice.randrange(8)
    return bytes(packed)


# -- steps: each alters the work in place


def _bits(work: _Work) -> None:
    spot = work.spot()
    if spot and spot.end > spot.value:
        for _ in range(work.dice.randint(1, 8)):
            work.data[work.dice.randrange(spot.value, spot.end)] ^= 1 << work.dice.randrange(8)


def _anywhere(work: _Work) -> None:
    for _ in range(work.dice.randint(1, 16)):
        if work.data:
            work.data[work.dice.randrange(len(work.data))] = work.dice.randrange(256)


def _length(work: _Work) -> None:
    spot = work.spot()
    if spot:
        real = spot.end - spot.value
        length = work.dice.choice((real - 1, real + 1, real + 2, real * 2, work.number()))
        _put_length(work, spot, length)


def _put_length(work: _Work, spot: Spot, length: int) -> None:
    form = "H" if spot.length_size == 2 else "I"
    most = (1 << 8 * spot.length_size) - 1
    work.data[spot.length_at : spot.length_at + spot.length_size] = struct.pack(work.order + form, length & most)


def _representation(work: _Work) -> None:
    spot = work.spot()
    if spot and spot.vr:
        work.data[spot.start + 4 : spot.start + 6] = work.dice.choice((*VRS, b"??", b"\0\0"))


def _tag(work: _Work) -> None:
    spot = work.spot()
    if spot:
        tag = work.dice.choice((*TAGS, work.dice.getrandbits(32)))
        work.data[spot.start : spot.start + 4] = struct.pack(work.order + "HH", tag >> 16, tag & 0xFFFF)


def _remove(work: _Work) -> None:
    spot = work.spot()
    if spot:
        del work.data[spot.start : spot.end]


def _repeat(work: _Work) -> None:
    spot = work.spot()
    if spot and spot.end - spot.start < 1 << 17:
        work.data[spot.end : spot.end] = work.data[spot.start : spot.end] * work.dice.choice((1, 1, 2, 20))


def _swap(work: _Work) -> None:
    found = work.spots()
    if len(found) > 1:
        one, two = sorted(work.dice.sample(found, 2), key=lambda spot: spot.start)
        if one.end <= two.start:
            first, second = bytes(work.data[one.start : one.end]), bytes(work.data[two.start : two.end])
            work.data[two.start : two.end] = first
            work.data[one.start : one.end] = second


def _splice(work: _Work) -> None:
    """An element of another object, put in the place of the same one here, or anywhere."""
    other = work.dice.choice(work.others)
    theirs = structure.spots(other.data, implicit=other.implicit, big=other.big)
    donor = work.dice.choice(theirs) if theirs else None
    spot = donor and (work.spot(donor.tag) or work.spot())
    if donor and spot and donor.end - donor.start < 1 << 17:
        work.data[spot.start : spot.end] = other.data[donor.start : donor.end]


def _text(work: _Work) -> None:
    spot = work.spot()
    if spot and spot.tag != PIXELS:
        value = work.dice.choice(TEXTS)
        value += b" " * (len(value) % 2)
        _put_length(work, spot, len(value))
        work.data[spot.value : spot.end] = value


def _geometry(work: _Work) -> None:
    for _ in range(work.dice.randint(1, 3)):
        spot = work.spot(*GEOMETRY)
        if spot is None:
            continue
        number = work.dice.choice(NUMBERS)
        length = spot.end - spot.value
        if spot.tag in (0x00280008, 0x00281050, 0x00281051, 0x00280030):
            value = str(number - work.dice.choice((0, 1, 70000))).encode().ljust(length)[: max(length, 0)]
        else:
            value = struct.pack(work.order + "H", number).ljust(length, b"\0")[:length]
        work.data[spot.value : spot.end] = value


def _nest(work: _Work) -> None:
    """Sequences in sequences, closed, unclosed or with lengths."""
    spot, depth = work.spot(), work.dice.choice((2, 20, 40, 200, 1500))
    if spot is None or work.seed.big:
        return
    head = (
        struct.pack("<HH", 0x0009, 0x1002) + (b"" if work.seed.implicit else b"SQ\0\0") + struct.pack("<I", UNDEFINED)
    )
    nest = (head + struct.pack("<HHI", 0xFFFE, 0xE000, UNDEFINED)) * depth
    if work.dice.random() < 0.7:
        nest += (struct.pack("<HHI", 0xFFFE, 0xE00D, 0) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)) * depth
    work.data[spot.start : spot.start] = nest


def _cut(work: _Work) -> None:
    if work.data:
        del work.data[work.dice.randrange(len(work.data)) :]


def _grow(work: _Work) -> None:
    work.data += bytes(work.dice.randrange(256) for _ in range(work.dice.choice((1, 2, 8, 100, 4096))))


def _picture(work: _Work) -> None:
    """Inside the pixels: the beginning of a codestream has its markers and tables."""
    pixels = work.spot(PIXELS)
    if pixels is None or pixels.value + 32 >= len(work.data):
        return
    reach = work.dice.choice((64, 256, 1024, len(work.data)))
    for _ in range(work.dice.randint(1, 6)):
        at = work.dice.randrange(pixels.value, min(len(work.data), pixels.value + reach))
        work.data[at] = work.dice.choice((0, 1, 0x7F, 0x80, 0xFF, work.dice.randrange(256)))


def _fragment(work: _Work) -> None:
    """Lengths of fragments, and the offset table."""
    items = [each for each in work.spots() if each.tag == ITEM]
    if not items:
        return
    spot = work.dice.choice(items[-4:])
    if work.dice.random() < 0.5:
        _put_length(work, spot, work.dice.choice((0, 1, spot.end - spot.value - 1, work.number())))
    else:
        table = struct.pack("<4I", *(work.number() for _ in range(4)))
        _put_length(work, spot, len(table))
        work.data[spot.value : spot.end] = table


def _huge_picture(work: _Work) -> None:
    """Header and codestream agree on a size that nobody sends."""
    rows, columns = (work.dice.choice((64, 2048, 4096, 8192, 65535)) for _ in range(2))
    for tag, number in ((0x00280010, rows), (0x00280011, columns)):
        spot = work.spot(tag)
        if spot and spot.end - spot.value == 2:
            work.data[spot.value : spot.end] = struct.pack(work.order + "H", number)
    siz = work.data.find(b"\xff\x4f\xff\x51")
    if siz >= 0 and siz + 40 < len(work.data):
        work.data[siz + 8 : siz + 16] = struct.pack(">II", columns, rows)
    for marker in (b"\xff\xc0", b"\xff\xc3", b"\xff\xf7"):
        at = work.data.find(marker)
        if at >= 0 and at + 9 < len(work.data):
            work.data[at + 5 : at + 9] = struct.pack(">HH", rows, columns)
            return


STEPS: dict[str, Callable[[_Work], None]] = {
    "bits": _bits, "anywhere": _anywhere, "length": _length, "representation": _representation, "tag": _tag,
    "remove": _remove, "repeat": _repeat, "swap": _swap, "splice": _splice, "text": _text, "geometry": _geometry,
    "nest": _nest, "cut": _cut, "grow": _grow, "picture": _picture, "fragment": _fragment,
    "huge picture": _huge_picture,
}  # fmt: skip
WEIGHTS = [4, 2, 4, 2, 2, 2, 2, 1, 3, 3, 5, 1, 1, 1, 5, 3, 1]
