"""A number → what one mutated association says on the wire, PDU by PDU (PS3.8 9.3, PS3.7 9.3)."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import NamedTuple

from tests.dicom import raw
from tests.fuzz import mutate, seeds
from tests.fuzz.mutate import LENGTHS

COMMITMENT, COMMITMENT_INSTANCE = "1.2.840.10008.1.20.1", "1.2.840.10008.1.20.1.1"
STORED = ("1.2.840.10008.5.1.4.1.1.6.1", "1.2.840.10008.5.1.4.1.1.3.1", "1.2.840.10008.5.1.4.1.1.7")
UIDS = (
    "", "1", "1.2.3", "." * 60, "9" * 64, "1." * 500, "../../etc/passwd", "\xff\xfe", raw.VERIFICATION, COMMITMENT,
    *STORED,
)  # fmt: skip
WORDS = (0, 1, 2, 0xFF, 0x0100, 0x0101, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
KINDS = (0x0001, 0x0020, 0x0021, 0x0010, 0x0030, 0x0100, 0x0130, 0x0140, 0x0150, 0x0FFF, 0x8001, 0x8030, 0x8100)


class Said(NamedTuple):
    what: tuple[str, ...]
    pieces: tuple[bytes, ...]  # as they are handed to the socket


def made(seed: int, number: int) -> Said:
    dice = random.Random(f"association {seed} {number}")
    pdus, what = _story(dice), []
    for _ in range(dice.choice((0, 1, 1, 2, 3))):
        name = dice.choice(list(STEPS))
        what.append(name)
        STEPS[name](pdus, dice)
    return Said(tuple(what), _pieces(b"".join(bytes(pdu) for pdu in pdus), dice))


def _pieces(data: bytes, dice: random.Random) -> tuple[bytes, ...]:
    if dice.random() < 0.7:
        return (data,)
    cuts = sorted(dice.randrange(len(data) + 1) for _ in range(dice.choice((1, 2, 10))))
    return tuple(data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True))


# -- the story, before it goes wrong


def _story(dice: random.Random) -> list[bytearray]:
    pdus = [_request(dice)]
    for number in range(dice.choice((1, 1, 2, 4))):
        pdus += dice.choice((_echo, _store, _store, _store, _commitment, _odd))(dice, number + 1)
    if dice.random() < 0.8:
        pdus.append(raw.pdu(5, bytes(4)))
    return [bytearray(pdu) for pdu in pdus]


def _request(dice: random.Random) -> bytes:
    contexts = [_context(1, STORED[0], (raw.EXPLICIT,)), _context(3, raw.VERIFICATION, (raw.IMPLICIT,))]
    contexts.append(_context(5, COMMITMENT, (raw.IMPLICIT, raw.EXPLICIT)))
    contexts.append(_context(7, STORED[0], (dice.choice(mutate.SYNTAXES),)))
    if dice.random() < 0.2:
        for _ in range(dice.choice((1, 20, 200))):
            syntaxes = tuple(dice.choice((*mutate.SYNTAXES, *UIDS)) for _ in range(dice.choice((0, 1, 3, 30))))
            contexts.append(_context(dice.randrange(256), dice.choice(UIDS), syntaxes))
    if dice.random() < 0.1:
        dice.shuffle(contexts)
    most = struct.pack(">I", dice.choice((16384, 16384, 16384, 0, 1, 6, 7, 128, 0xFFFFFFFF)))
    user = raw.item(0x51, most) + raw.item(0x52, b"1.2.3")
    if dice.random() < 0.3:
        title = dice.choice(UIDS).encode("latin-1")
        user += raw.item(0x54, struct.pack(">H", dice.choice((len(title), *WORDS))) + title + bytes((1, 1)))
    if dice.random() < 0.1:
        user += raw.item(dice.choice((0x53, 0x55, 0x56, 0x58, 0x59, 0xFF)), bytes(dice.choice((0, 1, 4, 300))))
    body = struct.pack(">HH", dice.choice((1, 1, 1, 1, 0, 2, 0xFFFF)), 0) + _title(dice) + _title(dice) + bytes(32)
    body += raw.item(0x10, b"1.2.840.10008.3.1.1.1") + b"".join(contexts) + raw.item(0x50, user)
    return raw.pdu(1, body)


def _title(dice: random.Random) -> bytes:
    words = (b"SCANNER", b"SCANNER", b"SCANNER", b"", b"\0" * 16, b"\xe9\xe8" * 8, b"A\\B", b"%s%n", b"\x1b[2J", b"'--")
    return dice.choice(words).ljust(16)[:16]


def _context(number: int, abstract: str, syntaxes: tuple[str, ...]) -> bytes:
    inner = raw.item(0x30, abstract.encode("latin-1"))
    inner += b"".join(raw.item(0x40, each.encode("latin-1")) for each in syntaxes)
    return raw.item(0x20, bytes((number, 0, 0, 0)) + inner)


def _echo(dice: random.Random, number: int) -> list[bytes]:
    return [raw.value(3, 3, _command(dice, 0x0030, raw.VERIFICATION, "", number, data=False))]


def _store(dice: random.Random, number: int) -> list[bytes]:
    every = seeds.own()
    seed = dice.choice(every)
    object_ = mutate.mutated(seed, every, dice) if dice.random() < 0.7 else mutate.unaltered(seed)
    uid = f"2.25.{dice.randrange(1 << 30)}"
    context = 1 if dice.random() < 0.8 else 7
    pdus = [raw.value(context, 3, _command(dice, 0x0001, STORED[0], uid, number))]
    data, size = object_.data_set, dice.choice((16000, 16000, 1000, 4))
    parts = [data[at : at + size] for at in range(0, min(len(data), 400 * size), size)] or [b""]
    pdus += [raw.value(context, 0, part) for part in parts[:-1]]
    return [*pdus, raw.value(context, 2, parts[-1])]


def _commitment(dice: random.Random, number: int) -> list[bytes]:
    kind = dice.choice((0x0130, 0x0130, 0x0100))
    fields = {0x0003: _even(COMMITMENT), 0x1001: _even(COMMITMENT_INSTANCE), 0x1008: struct.pack("<H", 1)}
    command = _fields({**fields, 0x0100: struct.pack("<H", kind), 0x0110: b"\7\0", 0x0800: b"\1\0"})
    uid = _even(dice.choice(("1.2.9", *UIDS)))
    references = b"".join(_reference(STORED[0], dice.choice(("1.2.3", *UIDS))) for _ in range(dice.choice((0, 1, 40))))
    data = _element(0x0008, 0x1195, uid) + _element(0x0008, 0x1199, references)
    broken = bytearray(data)
    if dice.random() < 0.5:
        broken[dice.randrange(len(broken))] ^= 1 << dice.randrange(8)
    return [raw.value(5, 3, command), raw.value(5, 2, bytes(broken))]


def _odd(dice: random.Random, number: int) -> list[bytes]:
    """Commands that contradict themselves."""
    kind, data = dice.choice(KINDS), dice.random() < 0.5
    context = dice.choice((1, 3, 5, 7, 9, 0, 255))
    pdus = [raw.value(context, 3, _command(dice, kind, dice.choice(UIDS), dice.choice(UIDS), number, data=data))]
    return [*pdus, raw.value(context, 2, bytes(dice.choice((0, 1, 100))))] if dice.random() < 0.5 else pdus


def _command(dice: random.Random, kind: int, sop_class: str, uid: str, number: int, *, data: bool = True) -> bytes:
    fields = {
        0x0002: _even(sop_class), 0x0100: struct.pack("<H", kind), 0x0110: struct.pack("<H", number),
        0x0700: b"\0\0", 0x0800: struct.pack("<H", 0x0001 if data else 0x0101), 0x1000: _even(uid),
    }  # fmt: skip
    if dice.random() < 0.15:
        name = dice.choice(list(fields))
        fields[name] = dice.choice(
            (b"", b"\0", struct.pack("<H", dice.choice(WORDS)), _even(dice.choice(UIDS)), bytes(70000))
        )
    if dice.random() < 0.05:
        del fields[dice.choice(list(fields))]
    return _fields(fields)


def _fields(fields: dict[int, bytes]) -> bytes:
    body = b"".join(_element(0, name, value) for name, value in sorted(fields.items()))
    return struct.pack("<HHII", 0, 0, 4, len(body)) + body


def _element(group: int, element: int, value: bytes) -> bytes:
    return struct.pack("<HHI", group, element, len(value)) + value


def _reference(sop_class: str, uid: str) -> bytes:
    inner = _element(0x0008, 0x1150, _even(sop_class)) + _element(0x0008, 0x1155, _even(uid))
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(inner)) + inner


def _even(text: str) -> bytes:
    encoded = text.encode("latin-1")
    return encoded + b"\0" * (len(encoded) % 2)


# -- steps: each lets the story go wrong


def _any(pdus: list[bytearray], dice: random.Random) -> bytearray:
    return dice.choice(pdus) if pdus else bytearray()


def _bits(pdus: list[bytearray], dice: random.Random) -> None:
    pdu = _any(pdus, dice)
    for _ in range(dice.randint(1, 6)):
        if pdu:
            pdu[dice.randrange(min(len(pdu), 400))] ^= 1 << dice.randrange(8)


def _kind(pdus: list[bytearray], dice: random.Random) -> None:
    pdu = _any(pdus, dice)
    if pdu:
        pdu[0] = dice.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 0x16, 0x47, 0xFF))


def _length(pdus: list[bytearray], dice: random.Random) -> None:
    pdu = _any(pdus, dice)
    if len(pdu) >= 6:
        real = len(pdu) - 6
        pdu[2:6] = struct.pack(
            ">I", dice.choice((real - 1 if real else 0, real + 1, real + 100, *LENGTHS)) & 0xFFFFFFFF
        )


def _item_length(pdus: list[bytearray], dice: random.Random) -> None:
    """Of an item in the request, or of a value in a PDU."""
    pdu = _any(pdus, dice)
    if len(pdu) > 78 and pdu[0] == 1:
        at = dice.choice((76, 74 + 4 + 21 + 2, dice.randrange(74, len(pdu) - 2)))
        pdu[at : at + 2] = struct.pack(">H", dice.choice(WORDS))
    elif len(pdu) >= 12:
        pdu[6:10] = struct.pack(">I", dice.choice((0, 1, 2, 3, len(pdu), *LENGTHS)))


def _value_header(pdus: list[bytearray], dice: random.Random) -> None:
    pdu = _any(pdus, dice)
    if len(pdu) >= 12 and pdu[0] == 4:
        pdu[10], pdu[11] = dice.choice((pdu[10], 0, 2, 9, 255)), dice.choice((0, 1, 2, 3, 4, 255))


def _cut(pdus: list[bytearray], dice: random.Random) -> None:
    pdu = _any(pdus, dice)
    del pdu[dice.randrange(len(pdu) + 1) :]


def _end_early(pdus: list[bytearray], dice: random.Random) -> None:
    del pdus[dice.randrange(len(pdus) + 1) :]


def _twice(pdus: list[bytearray], dice: random.Random) -> None:
    if pdus:
        at = dice.randrange(len(pdus))
        pdus[at:at] = [bytearray(pdus[at])] * dice.choice((1, 1, 5))


def _swap(pdus: list[bytearray], dice: random.Random) -> None:
    if len(pdus) > 1:
        a, b = dice.sample(range(len(pdus)), 2)
        pdus[a], pdus[b] = pdus[b], pdus[a]


def _junk(pdus: list[bytearray], dice: random.Random) -> None:
    junk = dice.choice(
        (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", bytes(6), b"\xff" * 64, dice.randbytes(500))
    )
    pdus.insert(dice.randrange(len(pdus) + 1), bytearray(junk))


def _abort(pdus: list[bytearray], dice: random.Random) -> None:
    pdus.insert(
        dice.randrange(len(pdus) + 1), bytearray(raw.pdu(7, bytes((0, 0, dice.randrange(256), dice.randrange(256)))))
    )


def _many_values(pdus: list[bytearray], dice: random.Random) -> None:
    """Values without content, by the thousand, and several in one PDU."""
    empty = struct.pack(">IBB", 2, dice.choice((1, 3)), dice.choice((0, 1, 2)))
    pdus.insert(dice.randrange(len(pdus) + 1), bytearray(raw.pdu(4, empty * dice.choice((1, 2, 1000, 2000)))))


STEPS: dict[str, Callable[[list[bytearray], random.Random], None]] = {
    "bits": _bits, "kind": _kind, "length": _length, "item length": _item_length, "value header": _value_header,
    "cut": _cut, "end early": _end_early, "twice": _twice, "swap": _swap, "junk": _junk, "abort": _abort,
    "many values": _many_values,
}  # fmt: skip
