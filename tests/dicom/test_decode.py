"""Whatever a picture is encoded in, the same picture comes out; and nothing huge is ever begun."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset
from pydicom.encaps import encapsulate, generate_fragments
from pydicom.uid import (
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from busgen_cds.dicom import decode
from busgen_cds.dicom.decode import Picture, Unreadable
from tests import images
from tests.dicom import real

CODESTREAMS = Path(__file__).parent.parent / "golden" / "codestreams"  # of malignant_1.png, by OpenJPH and DCMTK
SMALL = np.asarray(Image.open(images.DEMO_IMAGES / "malignant_1.png").convert("L"))
SCREEN = np.asarray(Image.fromarray(images.picture(seed=1)).convert("L")).astype(int)  # what breast_image() shows


def decoded(data: bytes, index: int = 0) -> Picture:
    opened = decode.open_file(data)
    return decode.Frames(opened, decode.shape(opened)).decode(index)


def small(codestream: bytes, syntax: str, **more: Any) -> bytes:
    """A 128 x 128 file around a codestream."""
    ds = images.breast_dataset(regions=False)
    images.set_pixels(ds, np.stack([SMALL] * 3, -1)[None], "grey")
    ds.PixelData = encapsulate([codestream])
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = syntax
    for name, value in more.items():
        setattr(ds, name, value)
    return images.part10(ds)


def grey_values(values: np.ndarray, **header: Any) -> bytes:
    """A file of one-sample 16-bit values."""
    ds = images.breast_dataset(regions=False)
    ds.Rows, ds.Columns = values.shape
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit, ds.PixelRepresentation = 15, int(values.dtype.kind == "i")
    for name, value in header.items():
        setattr(ds, name, value)
    ds.PixelData = values.tobytes()
    ds["PixelData"].VR = "OW"
    return images.part10(ds)


@pytest.mark.parametrize(
    ("colour", "syntax", "off"),
    [
        ("grey", ImplicitVRLittleEndian, 0),
        ("grey", ExplicitVRLittleEndian, 0),
        ("grey", DeflatedExplicitVRLittleEndian, 0),
        ("grey", RLELossless, 0),
        ("grey", JPEGLSLossless, 0),
        ("grey", JPEG2000Lossless, 0),
        ("grey", JPEG2000, 6),
        ("grey", JPEGBaseline8Bit, 12),
        ("rgb", ExplicitVRLittleEndian, 0),
        ("rgb", RLELossless, 0),
        ("rgb", JPEGLSLossless, 0),
        ("rgb", JPEG2000Lossless, 0),
        ("rgb", JPEGBaseline8Bit, 12),
        ("ybr", ExplicitVRLittleEndian, 1),
        ("ybr", RLELossless, 1),
        ("ybr", JPEGBaseline8Bit, 12),
        ("ybr422", ExplicitVRLittleEndian, 1),
        ("ybr422", JPEGBaseline8Bit, 12),
        ("palette", ExplicitVRLittleEndian, 0),
        ("palette", RLELossless, 0),
    ],
)
def test_every_encoding_shows_the_same_picture(colour: Any, syntax: str, off: int) -> None:
    """Each transfer syntax and colour model that scanners use decodes to what the screen showed."""
    picture = decoded(images.breast_image(colour=colour, syntax=syntax))
    assert picture.grey.shape == SCREEN.shape
    assert np.abs(picture.grey - SCREEN).max() <= off


@pytest.mark.parametrize(
    ("name", "syntax"),
    [
        ("htj2k.j2c", "1.2.840.10008.1.2.4.201"),
        ("htj2k.j2c", "1.2.840.10008.1.2.4.203"),
        ("lossless_sv1.jpg", "1.2.840.10008.1.2.4.70"),
        ("lossless.jpg", "1.2.840.10008.1.2.4.57"),
    ],
)
def test_codestreams_that_nothing_here_writes(name: str, syntax: str) -> None:
    """High-throughput JPEG 2000 and lossless JPEG decode without loss."""
    assert np.array_equal(decoded(small((CODESTREAMS / name).read_bytes(), syntax)).grey, SMALL)


def test_big_endian() -> None:
    """The retired big-endian syntax is still read."""
    ds = images.breast_dataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    assert np.array_equal(decoded(images.part10(ds)).grey, SCREEN)


@pytest.mark.parametrize("marker", [True, False])
def test_jpeg_tagged_rgb_but_encoded_ycbcr(marker: bool) -> None:
    """What the picture holds decides, not the tag: no green faces from a wrong photometric interpretation."""
    buffer = io.BytesIO()
    Image.fromarray(images.picture(seed=1)).save(buffer, "JPEG", quality=95)
    codestream = buffer.getvalue()
    if not marker:  # without its JFIF segment nothing in the file contradicts the tag
        length = struct.unpack(">H", codestream[4:6])[0]
        codestream = codestream[:2] + codestream[4 + length :]
    ds = images.breast_dataset(colour="rgb", syntax=JPEGBaseline8Bit)
    ds.PixelData = encapsulate([codestream])
    ds["PixelData"].VR = "OB"
    assert ds.PhotometricInterpretation == "RGB"
    assert np.abs(decoded(images.part10(ds)).grey - SCREEN).max() <= 10


@pytest.mark.parametrize(("held", "tagged"), [("rgb", "YBR_FULL"), ("ybr", "RGB")])
def test_uncompressed_colour_with_the_wrong_tag(held: Any, tagged: str) -> None:
    """The same without compression, in both directions."""
    ds = images.breast_dataset(colour=held)
    ds.PhotometricInterpretation = tagged
    assert np.abs(decoded(images.part10(ds)).grey - SCREEN).max() <= 1


def test_subsampled_tag_on_full_colour() -> None:
    """Uncompressed YBR_FULL_422 that in truth holds all three samples is read as it is."""
    ds = images.breast_dataset(colour="ybr")
    ds.PhotometricInterpretation = "YBR_FULL_422"
    assert np.abs(decoded(images.part10(ds)).grey - SCREEN).max() <= 1


def test_planar_colour() -> None:
    """Colour stored plane by plane shows the same picture."""
    ds = images.breast_dataset(colour="rgb")
    ds.PlanarConfiguration = 1
    ds.PixelData = images.picture(seed=1).transpose(2, 0, 1).tobytes()
    assert np.array_equal(decoded(images.part10(ds)).grey, SCREEN)


def test_monochrome1_is_turned() -> None:
    """MONOCHROME1 stores white as 0."""
    ds = images.breast_dataset()
    ds.PixelData = (255 - SCREEN).astype(np.uint8).tobytes()
    ds.PhotometricInterpretation = "MONOCHROME1"
    assert np.array_equal(decoded(images.part10(ds)).grey, SCREEN)


def test_sixteen_bits_signed_and_not() -> None:
    """16-bit grey, signed or not, is brought to the screen's 8 bits."""
    signed = (SCREEN * 200 - 20000).astype(np.int16)
    unsigned = (SCREEN * 200).astype(np.uint16)
    full = np.rint((SCREEN - SCREEN.min()) * 255 / np.ptp(SCREEN))
    for values in (signed, unsigned):
        assert np.abs(decoded(grey_values(values)).grey - full).max() <= 1


def test_a_window_is_used() -> None:
    """A stated window decides which stored values are black and white."""
    picture = decoded(grey_values((SCREEN * 16).astype(np.uint16), WindowCenter="2040", WindowWidth="4080"))
    assert np.abs(picture.grey - SCREEN).max() <= 1


def test_eight_bits_in_sixteen() -> None:
    """8-bit values stored in 16 bits keep their brightness."""
    assert np.array_equal(decoded(grey_values(SCREEN.astype(np.uint16))).grey, SCREEN)


def test_sixteen_bit_palette() -> None:
    """A palette of 65536 entries, indexed by 16 bits, is looked up."""
    ramp = np.repeat(np.arange(256, dtype=np.uint16), 256)[::-1] * 257
    palette = {f"{c}PaletteColorLookupTableDescriptor": [0, 0, 16] for c in ("Red", "Green", "Blue")}
    palette |= {f"{c}PaletteColorLookupTableData": ramp.tobytes() for c in ("Red", "Green", "Blue")}
    values = ((255 - SCREEN) * 256).astype(np.uint16)
    picture = decoded(grey_values(values, PhotometricInterpretation="PALETTE COLOR", **palette))
    assert np.array_equal(picture.grey, SCREEN)


def test_a_palette_whose_writer_forgot_to_scale() -> None:
    """16-bit entries that stop at 255 are 8-bit entries."""
    ds = images.breast_dataset(colour="palette")
    for name in ("Red", "Green", "Blue"):
        setattr(ds, f"{name}PaletteColorLookupTableData", np.arange(255, -1, -1, dtype=np.uint16).tobytes())
    assert np.array_equal(decoded(images.part10(ds)).grey, SCREEN)


def cine(**more: Any) -> Dataset:
    return images.breast_dataset(cine=4, colour="rgb", syntax=JPEGBaseline8Bit, **more)


def fragments(ds: Dataset) -> list[bytes]:
    return list(generate_fragments(ds.PixelData))[1:]


@pytest.mark.parametrize("offsets", ["good", "none", "lying"])
def test_frames_in_several_fragments(offsets: str) -> None:
    """A compressed clip cut into fragments is put together with its offset table, without one, and against one."""
    whole = cine()
    expected = [decoded(images.part10(whole), i).grey for i in range(4)]
    pieces, starts, at = [], [], 0
    for frame in fragments(whole):
        starts.append(at)
        for piece in (frame[:1000], frame[1000:]):
            pieces.append(struct.pack("<HHI", 0xFFFE, 0xE000, len(piece)) + piece)
            at += 8 + len(piece)
    table = {"good": starts, "none": [], "lying": [7, 8, 9, 10]}[offsets]
    head = struct.pack("<HHI", 0xFFFE, 0xE000, 4 * len(table)) + struct.pack(f"<{len(table)}I", *table)
    whole.PixelData = head + b"".join(pieces) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    for i, picture in enumerate(expected):
        assert np.array_equal(decoded(images.part10(whole), i).grey, picture)


def test_frames_are_decoded_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for one frame of a clip decodes that frame alone."""
    opened = decode.open_file(images.part10(cine()))
    frames = decode.Frames(opened, decode.shape(opened))
    asked: list[int] = []
    monkeypatch.setattr(decode, "_check_codestream", lambda encoded, *_: asked.append(len(encoded)))
    frames.decode(2)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"Rows": 20000, "Columns": 20000}, "20000 x 20000"),
        ({"Rows": 0, "Columns": 0}, "0 x 0"),
        ({"Rows": 8, "Columns": 8}, "too small"),
        ({"NumberOfFrames": 0}, "0 frames"),
        ({"NumberOfFrames": 2_000_000_000}, "2000000000 frames"),
        ({"NumberOfFrames": -3}, "-3 frames"),
        ({"BitsAllocated": 32}, "32"),
        ({"BitsStored": 12}, "12 bits"),
        ({"SamplesPerPixel": 3}, "contradicts"),
        ({"PhotometricInterpretation": "CMYK"}, "photometric"),
        ({"PhotometricInterpretation": ""}, "photometric"),
    ],
)
def test_sizes_and_formats_are_judged_before_decoding(header: dict[str, Any], reason: str) -> None:
    """What no scanner makes is refused from the header, with the reason, and at once."""
    ds = images.breast_dataset()
    for name, value in header.items():
        setattr(ds, name, value)
    with pytest.raises(Unreadable, match=reason):
        decode.shape(decode.open_file(images.part10(ds)))


def jpeg_of(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_a_huge_picture_behind_a_small_header() -> None:
    """A codestream that is larger than its header says is refused before it is decoded."""
    bomb = bytearray(jpeg_of(128, 128))
    at = bomb.index(b"\xff\xc0") + 5
    bomb[at : at + 4] = struct.pack(">HH", 65500, 65500)
    with pytest.raises(Unreadable, match="65500 x 65500"):
        decoded(small(bytes(bomb), JPEGBaseline8Bit))


def test_a_huge_jpeg2000_behind_a_small_header() -> None:
    """The same for JPEG 2000, and for one that is cut into millions of tiles."""
    stream = bytearray((CODESTREAMS / "htj2k.j2c").read_bytes())
    huge, tiled = stream.copy(), stream.copy()
    huge[8:16] = struct.pack(">II", 60000, 60000)
    tiled[24:32] = struct.pack(">II", 1, 1)
    with pytest.raises(Unreadable, match=r"60000 x 60000|damaged"):
        decoded(small(bytes(huge), "1.2.840.10008.1.2.4.201"))
    with pytest.raises(Unreadable, match="damaged"):
        decoded(small(bytes(tiled), "1.2.840.10008.1.2.4.201"))


def test_a_deflate_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deflated data set is never inflated past the limit."""
    monkeypatch.setattr(decode, "MAX_BYTES", 1 << 20)
    plain = images.breast_image(syntax=DeflatedExplicitVRLittleEndian)
    _, start = decode._meta(plain)
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    bomb = plain[:start] + packer.compress(b"\0" * (8 << 20)) + packer.flush()
    assert len(bomb) < 1 << 20
    with pytest.raises(Unreadable, match="inflates"):
        decode.open_file(bomb)


def test_a_file_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file larger than what is read is refused unparsed."""
    monkeypatch.setattr(decode, "MAX_BYTES", 100_000)
    with pytest.raises(Unreadable, match="MiB"):
        decode.open_file(images.breast_image())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a DICOM file"),
        (b"\x89PNG" * 200, "not a DICOM file"),
        (images.breast_image()[:132], "transfer syntax"),
        (images.breast_image()[: decode._meta(images.breast_image())[1]], "no data set"),
    ],
)
def test_what_is_no_data_set(data: bytes, reason: str) -> None:
    """An empty file, another format, a preamble alone: refused with the reason."""
    with pytest.raises(Unreadable, match=reason):
        decode.open_file(data)


@real.needs_files
@pytest.mark.parametrize("path", real.FILES, ids=lambda path: path.name)
def test_real_files_decode(path: Path) -> None:
    """Every real ultrasound file at hand decodes, whatever library it comes from."""
    opened = decode.open_file(path.read_bytes())
    shape = decode.shape(opened)
    frames = decode.Frames(opened, shape)
    assert frames.available == shape.frames
    picture = frames.decode(shape.frames - 1)
    assert picture.grey.shape == (shape.rows, shape.columns)
    assert picture.grey.std() > 3


@real.needs_files
def test_one_picture_in_seven_encodings() -> None:
    """The same real image in RLE, JPEG 2000 and uncompressed shows the same grey."""
    same = [path for path in real.FILES if path.name in ("US1_RLE", "US1_J2KR.dcm", "US1_UNCI.dcm")]
    pictures = [decoded(path.read_bytes()).grey.astype(int) for path in same]
    assert len(pictures) == 3
    for picture in pictures[1:]:
        assert np.abs(picture - pictures[0]).mean() < 3
