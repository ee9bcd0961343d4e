"""What mutations begin with: our own objects always; real files of public libraries where BUSGEN_DATA names them."""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLSLossless,
    RLELossless,
)

from tests import images
from tests.dicom import real

SIDE = 96  # pixels: large enough to be read, small enough to be read a hundred thousand times
ROWS_LEFT = 64  # of a large real file that is not compressed
IMAGE = "1.2.840.10008.5.1.4.1.1.6.1"
CODESTREAMS = Path(__file__).parents[1] / "golden" / "codestreams"


class Seed(NamedTuple):
    name: str
    meta: bytes  # preamble and file meta group
    data: bytes  # the data set as it would travel, inflated
    syntax: str

    @property
    def implicit(self) -> bool:
        return self.syntax == ImplicitVRLittleEndian

    @property
    def big(self) -> bool:
        return self.syntax == ExplicitVRBigEndian

    @property
    def deflated(self) -> bool:
        return self.syntax == DeflatedExplicitVRLittleEndian


@cache
def all_of_them() -> tuple[Seed, ...]:
    return (*own(), *real_ones())


@cache
def own() -> tuple[Seed, ...]:
    made = [_own("grey", s) for s in _SYNTAXES]
    made += [_own(colour, ExplicitVRLittleEndian) for colour in ("rgb", "ybr", "ybr422", "palette")]
    made += [
        _own("ybr", JPEGBaseline8Bit),
        _own("rgb", JPEG2000),
        _own("rgb", RLELossless),
        _own("grey", RLELossless, 3),
    ]
    made += [_own("grey", ExplicitVRLittleEndian, 4), _own("grey", JPEGBaseline8Bit, 3), _big_endian(), _report()]
    made += [_codestream("htj2k.j2c", HTJ2KLossless), _codestream("lossless.jpg", JPEGLossless)]
    return tuple(made)


def real_ones() -> tuple[Seed, ...]:
    return tuple(_real(path) for path in real.FILES if path.suffix != ".csv")


_SYNTAXES = (
    ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless, JPEGBaseline8Bit,
    JPEGLSLossless, JPEG2000Lossless,
)  # fmt: skip


def _small(cine: int = 1, colour: images.Colour = "grey", syntax: UID = ExplicitVRLittleEndian) -> Dataset:
    ds = images.breast_dataset(cine=cine if cine > 1 else 0)
    shown = [Image.fromarray(images.picture(seed=t)).resize((SIDE, SIDE)) for t in range(cine)]
    images.set_pixels(ds, np.stack([np.asarray(each) for each in shown]), colour, syntax)
    ds.SequenceOfUltrasoundRegions[0].RegionLocationMaxX1 = SIDE - 1
    ds.SequenceOfUltrasoundRegions[0].RegionLocationMaxY1 = SIDE - 1
    ds.SequenceOfUltrasoundRegions[0].RegionLocationMinX0 = ds.SequenceOfUltrasoundRegions[0].RegionLocationMinY0 = 0
    return ds


def _own(colour: images.Colour, syntax: UID, cine: int = 1) -> Seed:
    return _seed(f"own {colour} {syntax.name} {cine}", images.part10(_small(cine, colour, syntax)))


def _big_endian() -> Seed:
    ds = _small()
    ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    ds["PixelData"].VR = "OB"
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, ds, implicit_vr=False, little_endian=False, enforce_file_format=True)
    return _seed("own big endian", buffer.getvalue())


def _report() -> Seed:
    from busgen_cds.dicom import objects
    from tests.dicom import answers

    study = answers.breast(1)
    (made,) = objects.render(
        study, answers.assessed(study, answers.finding(study.frames[0])), profile=objects.Profile(("sr",)),
        rendered_at=answers.AT,
    )  # fmt: skip
    return _seed("own report", made.data)


def _codestream(name: str, syntax: UID) -> Seed:
    ds = _small()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = encapsulate([(CODESTREAMS / name).read_bytes()])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    return _seed(f"own {name}", images.part10(ds))


def _real(path: Path) -> Seed:
    data = path.read_bytes()
    ds = pydicom.dcmread(io.BytesIO(data))
    if not ds.file_meta.TransferSyntaxUID.is_compressed and ds.get("PlanarConfiguration", 0) == 0:
        rows = int(ds.Rows)
        kept = len(ds.PixelData) // int(ds.get("NumberOfFrames", 1) or 1) * ROWS_LEFT // rows
        if rows > ROWS_LEFT and kept % 2 == 0:
            ds.Rows, ds.PixelData = ROWS_LEFT, ds.PixelData[:kept]
            buffer = io.BytesIO()
            ds.save_as(buffer)
            data = buffer.getvalue()
    return _seed(path.name, data)


def _seed(name: str, data: bytes) -> Seed:
    at = 144 + struct.unpack_from("<I", data, 140)[0]  # PS3.10 7.1: the group's length stands first
    syntax = str(pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True).file_meta.TransferSyntaxUID)
    plain = zlib.decompress(data[at:], -zlib.MAX_WBITS) if syntax == DeflatedExplicitVRLittleEndian else data[at:]
    return Seed(name, data[:at], plain, syntax)
