"""A DICOM file's bytes → its header, and its frames one by one, as grey and colour difference.

Rules:
- Sizes are judged before anything is decoded: what the header says, and what the compressed picture itself says.
- Frames are decoded only when asked for; a long cine is never whole in memory.
- What cannot be read is `Unreadable` with the reason; what a picture holds decides over what its tag says.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000TransferSyntaxes,
    JPEGBaseline8Bit,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
)

MAX_BYTES = 1 << 30  # of one instance: a cine of some 400 uncompressed colour frames of 1024 x 768
MAX_SIDE = 8192
MAX_PIXELS = 9 << 20  # of one frame: a 4K screen, and what a decoder takes for it (16 bytes a pixel) stays below 200 MB
MIN_SIDE = 32
MAX_FRAMES = 20_000
MAX_TILES = 4096
UNDEFINED_LENGTH = 0xFFFFFFFF
NEAR = 8  # of 255: two colour values this close are the same to the eye

Chroma = NDArray[np.int16]
Samples = NDArray[np.generic]


class Unreadable(Exception):
    """This instance or frame cannot be read; the message is the reason."""


class Picture(NamedTuple):
    """One frame as a screen shows it."""

    grey: NDArray[np.uint8]  # (rows, columns)
    chroma: Chroma | None  # (rows, columns, 2): blue and red difference around 0; None: no colour at all


class Shape(NamedTuple):
    """What the header says of the pixels."""

    rows: int
    columns: int
    frames: int
    samples: int
    photometric: str
    allocated: int
    stored: int
    signed: bool
    planar: int

    @property
    def colour(self) -> bool:
        return self.samples == 3 or self.photometric == "PALETTE COLOR"


@dataclass(frozen=True, eq=False)
class Opened:
    """A data set without its pixels, and where in the bytes the pixels are."""

    header: Dataset = field(repr=False)
    data: bytes = field(repr=False)
    syntax: UID
    pixels_at: int | None  # where the pixel data's value begins
    pixels_length: int = 0


def open_file(data: bytes) -> Opened:
    """Read the header; the pixels are not touched."""
    if len(data) > MAX_BYTES:
        raise Unreadable(f"the file has {len(data) >> 20} MiB; more than {MAX_BYTES >> 20} MiB are not read")
    syntax, start = _meta(data)
    if syntax == DeflatedExplicitVRLittleEndian:
        data = _inflate(data[start:])
    stream = BytesIO(data)
    header = dcmread(stream, stop_before_pixels=True, force=True)
    if syntax == DeflatedExplicitVRLittleEndian:
        header.file_meta = FileMetaDataset()
        header.file_meta.TransferSyntaxUID = syntax
    return Opened(header, data, syntax, *_pixel_data(data, stream.tell(), syntax))


def transfer_syntax(data: bytes) -> UID:
    return _meta(data)[0]


def shape(opened: Opened) -> Shape:
    """Judge what the header says of the pixels, before a byte of them is decoded."""
    _check_syntax(opened.syntax)
    if opened.pixels_at is None:
        raise Unreadable("it has no pixel data")
    header = opened.header
    rows, columns = (_whole(header, name, 0) for name in ("Rows", "Columns"))
    frames = _whole(header, "NumberOfFrames", 1)
    if not 0 < rows <= MAX_SIDE or not 0 < columns <= MAX_SIDE or rows * columns > MAX_PIXELS:
        raise Unreadable(f"a frame of {columns} x {rows} pixels is outside what is read: at most {MAX_SIDE} on a side")
    if min(rows, columns) < MIN_SIDE:
        raise Unreadable(f"a frame of {columns} x {rows} pixels is too small to show a lesion")
    if not 0 < frames <= MAX_FRAMES:
        raise Unreadable(f"it says that it has {frames} frames")
    said = Shape(
        rows,
        columns,
        frames,
        _whole(header, "SamplesPerPixel", 1),
        str(header.get("PhotometricInterpretation") or "").strip().upper(),
        _whole(header, "BitsAllocated", 8),
        _whole(header, "BitsStored", 8),
        bool(_whole(header, "PixelRepresentation", 0)),
        _whole(header, "PlanarConfiguration", 0),
    )
    _check_pixel_format(said)
    return said


def _check_syntax(syntax: UID) -> None:
    try:
        get_decoder(syntax)
    except NotImplementedError as unknown:
        name = syntax.name if syntax.name != str(syntax) else "a private transfer syntax"
        raise Unreadable(f"it is encoded in a way that is not read: {name}") from unknown


def _check_pixel_format(said: Shape) -> None:
    expected = 1 if said.photometric in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR") else 3
    known = expected == 1 or said.photometric == "RGB" or said.photometric.startswith("YBR_")
    if not known:
        raise Unreadable("its photometric interpretation is missing or unknown")
    if said.samples != expected:
        raise Unreadable(f"{said.photometric} with {said.samples} samples per pixel contradicts itself")
    if said.allocated not in (8, 16) or not 0 < said.stored <= said.allocated:
        raise Unreadable(f"pixels of {said.stored} bits stored in {said.allocated} are not read")


@dataclass(eq=False)
class Frames:
    """The frames of one instance; each is decoded when it is asked for."""

    opened: Opened
    shape: Shape
    _parts: list[Sequence[slice]] = field(init=False)
    _bounds: tuple[float, float] | None = field(init=False, default=None)
    _table: NDArray[np.int16] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._parts = self._native() if not self.opened.syntax.is_encapsulated else _encapsulated(self)

    @property
    def available(self) -> int:
        """How many frames the pixel data really hold: never more than the header says."""
        return min(len(self._parts), self.shape.frames)

    def decode(self, index: int) -> Picture:
        encoded = b"".join(self.opened.data[part] for part in self._parts[index])
        samples = self._samples(encoded)
        if self.shape.photometric == "PALETTE COLOR":
            return self._through_palette(samples)
        if self.shape.samples == 1:
            return Picture(self._window(samples), None)
        return self._colour(samples)

    def _native(self) -> list[Sequence[slice]]:
        said, at = self.shape, self.opened.pixels_at or 0
        length = said.rows * said.columns * said.samples * said.allocated // 8
        # PS3.3 C.7.6.3.1.2: uncompressed YBR_FULL_422 has two samples per pixel; some writers leave all three
        if said.photometric == "YBR_FULL_422" and self.opened.pixels_length < length * said.frames:
            length = length * 2 // 3
        whole = min(said.frames, self.opened.pixels_length // length)
        return [(slice(at + i * length, at + (i + 1) * length),) for i in range(whole)]

    def _samples(self, encoded: bytes) -> Samples:
        """(rows, columns) or (rows, columns, 3), colours as they are stored."""
        said, syntax = self.shape, self.opened.syntax
        photometric = said.photometric
        if syntax.is_encapsulated:
            _check_codestream(encoded, said, syntax)
            encoded = encapsulate([encoded], has_bot=False)
        elif photometric == "YBR_FULL_422" and len(encoded) >= said.rows * said.columns * 3:
            photometric = "YBR_FULL"
        options: dict[str, Any] = {
            "rows": said.rows,
            "columns": said.columns,
            "number_of_frames": 1,
            "samples_per_pixel": said.samples,
            "photometric_interpretation": photometric,
            "bits_allocated": said.allocated,
            "bits_stored": said.stored,
            "pixel_representation": int(said.signed),
            "planar_configuration": said.planar,
            "pixel_keyword": "PixelData",
            "pixel_vr": "OW" if said.allocated > 8 else "OB",
        }
        # libjpeg-turbo, through Pillow, is by far the most tried reader of hostile JPEG
        plugin = "pillow" if syntax == JPEGBaseline8Bit else ""
        samples, _ = get_decoder(syntax).as_array(encoded, index=0, raw=True, decoding_plugin=plugin, **options)
        return samples

    def _window(self, samples: Samples) -> NDArray[np.uint8]:
        """Stored grey values → 0..255; a whole clip is brought to one scale."""
        values = samples.astype(np.float32)
        if self._bounds is None:
            self._bounds = _window_bounds(self.opened.header, self.shape, values)
        low, high = self._bounds
        grey = np.clip((values - low) * (255 / max(high - low, 1e-6)), 0, 255)
        if self.shape.photometric == "MONOCHROME1":
            grey = 255 - grey
        return np.asarray(np.rint(grey), np.uint8)

    def _through_palette(self, samples: Samples) -> Picture:
        if self._table is None:
            self._table = _palette(self.opened.header)
        first = int(self.opened.header.RedPaletteColorLookupTableDescriptor[1])
        index = np.clip(samples.astype(np.int32) - first, 0, len(self._table) - 1)
        looked_up = self._table[index]
        return _picture(looked_up[..., 0].astype(np.uint8), looked_up[..., 1:])

    def _colour(self, samples: Samples) -> Picture:
        values = samples if self.shape.stored <= 8 else samples.astype(np.int32) >> (self.shape.stored - 8)
        bytes_ = np.clip(values, 0, 255).astype(np.uint8)
        tagged = self.shape.photometric.startswith("YBR_FULL")  # YBR_RCT and YBR_ICT are undone by the decoder
        if _holds_difference(bytes_[::3, ::3].astype(np.int16), tagged):
            return _picture(bytes_[..., 0], bytes_[..., 1:].astype(np.int16) - 128)
        return _from_rgb(bytes_)


def _whole(header: Dataset, name: str, default: int) -> int:
    value = header.get(name)
    try:
        return default if value is None or str(value) == "" else int(value)
    except (TypeError, ValueError) as broken:
        raise Unreadable(f"its {name} is not a number") from broken


def _meta(data: bytes) -> tuple[UID, int]:
    """The transfer syntax, and where the data set begins (PS3.10 7.1: always explicit little endian)."""
    if data[128:132] != b"DICM":
        raise Unreadable("it is not a DICOM file")
    at, syntax = 132, ""
    while data[at : at + 2] == b"\2\0" and at + 12 <= len(data):
        element, vr, length = struct.unpack_from("<H2sH", data, at + 2)
        head = 8
        if vr in (b"OB", b"UN"):
            head, length = 12, struct.unpack_from("<I", data, at + 8)[0]
        if element == 0x0010:
            syntax = data[at + head : at + head + length].decode("ascii", "replace").rstrip("\0 ")
        at += head + length
    if not syntax:
        raise Unreadable("it does not say its transfer syntax")
    if at >= len(data):
        raise Unreadable("it has a file header and no data set")
    return UID(syntax), at


def _inflate(data: bytes) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    plain = inflater.decompress(data, MAX_BYTES)
    if inflater.unconsumed_tail:
        raise Unreadable(f"it inflates to more than the {MAX_BYTES >> 20} MiB that are read")
    return plain


def _pixel_data(data: bytes, at: int, syntax: UID) -> tuple[int | None, int]:
    """Where the pixel data's value begins, and how many bytes are really there."""
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    if len(data) < at + 12 or struct.unpack_from(order + "HH", data, at) != (0x7FE0, 0x0010):
        return None, 0
    head = 8 if syntax == ImplicitVRLittleEndian else 12
    (length,) = struct.unpack_from(order + "I", data, at + head - 4)
    return at + head, min(length, len(data) - at - head)


def _encapsulated(frames: Frames) -> list[Sequence[slice]]:
    """Group the fragments into frames (PS3.5 A.4), whatever the offset table claims."""
    data, at = frames.opened.data, frames.opened.pixels_at or 0
    items = list(_items(data, at, at + frames.opened.pixels_length))
    if not items:
        raise Unreadable("its pixel data hold no compressed picture")
    table, fragments = items[0], items[1:]
    count = frames.shape.frames
    if len(fragments) == count:
        return [(fragment,) for fragment in fragments]
    if count == 1:
        return [fragments] if fragments else []
    return _by_offsets(data[table], fragments, count) or _by_end_marker(data, fragments)


def _items(data: bytes, at: int, end: int) -> Iterator[slice]:
    while at + 8 <= end:
        group, element, length = struct.unpack_from("<HHI", data, at)
        if (group, element) != (0xFFFE, 0xE000):
            return
        yield slice(at + 8, min(at + 8 + length, end))
        at += 8 + length


def _by_offsets(table: bytes, fragments: Sequence[slice], count: int) -> list[Sequence[slice]]:
    """Nothing unless the table names the beginning of a fragment for each frame."""
    offsets = struct.unpack(f"<{len(table) // 4}I", table[: len(table) // 4 * 4])
    begins = {fragment.start - 8 - (fragments[0].start - 8): i for i, fragment in enumerate(fragments)}
    if len(offsets) != count or any(offset not in begins for offset in offsets) or list(offsets) != sorted(offsets):
        return []
    edges = [*(begins[offset] for offset in offsets), len(fragments)]
    return [fragments[a:b] for a, b in pairwise(edges)]


def _by_end_marker(data: bytes, fragments: Iterable[slice]) -> list[Sequence[slice]]:
    """JPEG, JPEG-LS and JPEG 2000 all end a picture with FFD9."""
    frames, current = [], []
    for fragment in fragments:
        current.append(fragment)
        if b"\xff\xd9" in data[max(fragment.start, fragment.stop - 10) : fragment.stop]:
            frames.append(current)
            current = []
    return [tuple(frame) for frame in frames]


def _check_codestream(encoded: bytes, said: Shape, syntax: UID) -> None:
    """A small header may hide a huge picture: compare the two before decoding."""
    if syntax in JPEG2000TransferSyntaxes:
        size = _j2k_size(encoded)
    elif syntax in JPEGTransferSyntaxes or syntax in JPEGLSTransferSyntaxes:
        size = _jpeg_size(encoded)
    else:
        return
    if size is None:
        raise Unreadable("the compressed picture is damaged")
    if size != (said.rows, said.columns):
        raise Unreadable(
            f"the compressed picture has {size[1]} x {size[0]} pixels, its header says {said.columns} x {said.rows}"
        )


def _jpeg_size(encoded: bytes) -> tuple[int, int] | None:
    """ISO 10918-1 B.2.2: rows and columns from the frame header; FFF7 is JPEG-LS's."""
    at = encoded.find(b"\xff\xd8") + 2
    while 2 <= at <= len(encoded) - 9:
        if encoded[at] != 0xFF:
            return None
        marker = encoded[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            rows, columns = struct.unpack_from(">HH", encoded, at + 5)
            return rows, columns
        at += 2 + struct.unpack_from(">H", encoded, at + 2)[0]
    return None


def _j2k_size(encoded: bytes) -> tuple[int, int] | None:
    """ISO 15444-1 A.5.1: the SIZ segment follows the start of the codestream at once."""
    at = encoded.find(b"\xff\x4f\xff\x51", 0, 4096)
    if at < 0 or len(encoded) < at + 42:
        return None
    width, height, left, top, tile_width, tile_height = struct.unpack_from(">6I", encoded, at + 8)
    if not tile_width or not tile_height or -(-width // tile_width) * -(-height // tile_height) > MAX_TILES:
        return None
    return height - top, width - left


def _window_bounds(header: Dataset, said: Shape, values: NDArray[np.float32]) -> tuple[float, float]:
    """Which stored values are black and white: the header's window, else eight bits as they are, else their range."""
    if said.stored == 8 and not said.signed:
        return 0.0, 255.0
    try:
        centre, width = (float(np.ravel(header[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
        if width >= 1:
            return centre - width / 2, centre + width / 2
    except (KeyError, IndexError, TypeError, ValueError):
        pass  # no window, or none that is a number: the range of the values speaks
    low, high = float(values.min()), float(values.max())
    return (0.0, 255.0) if low >= 0 and high <= 255 and said.stored > 8 else (low, high)


def _palette(header: Dataset) -> NDArray[np.int16]:
    """(entries, 3): grey, blue and red difference of each entry of the colour table."""
    entries = int(header.RedPaletteColorLookupTableDescriptor[0]) or 65536  # PS3.3 C.7.6.3.1.5: 0 says 65536
    first = int(header.RedPaletteColorLookupTableDescriptor[1])
    wide = np.uint16 if entries + first > 256 else np.uint8
    table: NDArray[np.uint16] = apply_color_lut(np.arange(first, first + entries).astype(wide), header)
    # 16-bit entries whose values stay below 256 exist: their writers forgot to scale them
    values = table >> 8 if table.max() > 255 else table
    return _to_difference(values.astype(np.int16))


def _holds_difference(values: NDArray[np.int16], tagged: bool) -> bool:
    """Is this grey with colour differences, or red, green and blue? Ultrasound is mostly grey, and that shows which."""
    first, second, third = values[..., 0], values[..., 1], values[..., 2]
    as_rgb = float(np.mean((abs(first - second) <= NEAR) & (abs(second - third) <= NEAR)))
    as_difference = float(np.mean((abs(second - 128) <= NEAR) & (abs(third - 128) <= NEAR)))
    if max(as_rgb, as_difference) < 0.5 or as_rgb == as_difference:
        return tagged
    return as_difference > as_rgb


def _from_rgb(rgb: NDArray[np.uint8]) -> Picture:
    """Most pixels are grey: the colour difference is worked out only where there is any."""
    grey = np.asarray(Image.fromarray(rgb).convert("L"))  # ITU-R BT.601, as PS3.3 C.7.6.3.1.2 has it
    tinted = (abs(rgb[..., 0] - grey.astype(np.int16)) > 2) | (abs(rgb[..., 2] - grey.astype(np.int16)) > 2)
    if not tinted.any():
        return Picture(grey, None)
    chroma = np.zeros((*grey.shape, 2), np.int16)
    chroma[tinted] = _to_difference(rgb[tinted].astype(np.int16))[:, 1:]
    return _picture(grey, chroma)


def _to_difference(rgb: NDArray[np.int16]) -> NDArray[np.int16]:
    """Grey, blue difference and red difference around 0 (ITU-R BT.601)."""
    red, green, blue = (rgb[..., i].astype(np.float32) for i in range(3))
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    return np.asarray(np.rint(np.stack([grey, (blue - grey) / 1.772, (red - grey) / 1.402], -1)), np.int16)


def _picture(grey: NDArray[np.uint8], chroma: Chroma) -> Picture:
    colourless = int(chroma.max()) <= NEAR and int(chroma.min()) >= -NEAR
    return Picture(grey, None if colourless else chroma)
