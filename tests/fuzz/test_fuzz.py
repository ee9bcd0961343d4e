"""A fixed slice of the hostile input; `python -m tests.fuzz` runs the whole of it."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from busgen_cds.dicom import files
from tests.fuzz import associations, mutate, objects, seeds, talk, watch

OBJECTS, ASSOCIATIONS = 800, 200


@pytest.mark.slow
def test_mutated_objects(tmp_path: Path) -> None:
    """No mutated object crashes what reads it, takes more than 5 s, 200 MB, or writes outside the store."""
    report = objects.run(OBJECTS, seed=2, findings=tmp_path)
    assert (report.crashes, report.hangs, report.outside) == ([], [], [])
    assert report.held and report.done == OBJECTS
    assert len(report.outcomes) >= 6, "the mutations reach too little"


@pytest.mark.slow
def test_mutated_associations(tmp_path: Path) -> None:
    """No mutated association disturbs the listener: it stays, is soon done, and good senders store in between."""
    report = associations.run(ASSOCIATIONS, seed=2, findings=tmp_path)
    assert (report.crashes, report.hangs, report.outside) == ([], [], [])
    assert report.held and report.done == ASSOCIATIONS
    assert {"accepted", "rejected", "aborted"} <= set(report.outcomes), "the mutations reach too little"


def test_the_same_number_gives_the_same_bytes() -> None:
    """A finding can be made again from its seed and number."""
    assert objects.made(3, 17) == objects.made(3, 17) != objects.made(3, 18)
    assert talk.made(3, 17) == talk.made(3, 17) != talk.made(3, 18)


def test_the_watchdog_bites(tmp_path: Path) -> None:
    """What is written outside the store is told: the watch itself is tried on a process that does it."""
    program = (
        "import sys, os, tempfile; from pathlib import Path; from tests.fuzz import watch\n"
        "store = Path(sys.argv[1]) / 'store'; store.mkdir(); watch.only_writes_in(store, print)\n"
        "(store / 'inside').write_text(''); (store.parent / 'outside').write_text('')\n"
        "os.rename(store / 'inside', store.parent / 'moved'); open(store.parent / 'outside').close()\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    told = done.stdout.splitlines()
    assert [line.split()[0] for line in told] == ["open", "os.rename"] and told[0].endswith("/outside")
    assert watch.memory() > 10 << 20


# -- what the fuzzing found


def _small(syntax: str = "1.2.840.10008.1.2.1") -> seeds.Seed:
    return next(each for each in seeds.own() if each.syntax == syntax)


def test_deep_nesting_and_broken_streams_are_reasons() -> None:
    """A file of nested sequences, an unknown kind of value, or with a broken stream, is refused with a reason."""
    seed = _small()
    opened = struct.pack("<HH2s2xI", 0x0009, 0x1002, b"SQ", 0xFFFFFFFF) + struct.pack(
        "<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF
    )
    with pytest.raises(ValueError, match="not a readable DICOM file"):
        files.study_uid(seed.meta + opened * 3000 + seed.data)
    unknown = bytearray(seed.meta + seed.data)
    at = unknown.index(struct.pack("<HH2s", 0x0020, 0x000D, b"UI"))
    unknown[at + 4 : at + 6] = b"Ue"
    with pytest.raises(ValueError, match="not a readable DICOM file"):
        files.study_uid(bytes(unknown))
    packed = bytearray(mutate.unaltered(_small("1.2.840.10008.1.2.1.99")).file)
    for at in range(len(packed) - 3000, len(packed), 7):
        packed[at] ^= 0x55
    with pytest.raises(ValueError, match=r"not a readable|inflates"):
        files.study_uid(bytes(packed))
    with pytest.raises(ValueError, match="not a DICOM file"):
        files.open_file(b"x" * 200)


def test_a_deflate_bomb_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deflated file that grows without end is refused by whoever only asks for its header, too."""
    from busgen_cds.dicom import decode

    monkeypatch.setattr(decode, "MAX_BYTES", 1 << 20)
    seed = _small("1.2.840.10008.1.2.1.99")
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = packer.compress(seed.data + bytes(8 << 20)) + packer.flush()
    for ask in (files.study_uid, files.open_file):
        with pytest.raises(ValueError, match="inflates to more than"):
            ask(seed.meta + bomb)


def test_every_seed_is_good() -> None:
    """The seeds themselves are whole: what mutations break was sound before."""
    for seed in seeds.all_of_them():
        assert "whole" in objects.attack(mutate.unaltered(seed), random.Random(0), None), seed.name
    assert len(seeds.own()) >= 20


def test_a_picture_of_sixteen_megapixels() -> None:
    """A frame beyond a 4K screen is not decoded: JPEG 2000 takes 12 bytes a pixel for colour alone."""
    from busgen_cds.dicom import decode

    seed = next(each for each in seeds.own() if each.name.startswith("own rgb JPEG 2000"))
    data = bytearray(seed.meta + seed.data)
    places = [data.index(struct.pack("<HH2sH", 0x0028, element, b"US", 2)) + 8 for element in (0x0010, 0x0011)]
    for (rows, columns), is_read in (((4096, 4096), False), ((2160, 3840), True)):
        for at, number in zip(places, (rows, columns), strict=True):
            data[at : at + 2] = struct.pack("<H", number)
        opened = decode.open_file(bytes(data))
        if is_read:
            assert decode.shape(opened).columns == columns
        else:
            with pytest.raises(decode.Unreadable, match="outside what is read"):
                decode.shape(opened)
