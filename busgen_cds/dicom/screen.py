"""What a browser shows of a study: its frames as pictures, and the evidence as a veil to lay over them.

Rules:
- A frame is shown as it was received, whole; window and zoom are the viewer's.
- The evidence has the report template's one absolute scale, and is blank below its threshold (clinical safety 5).
- What cannot be read is not shown; the study's result says why.
- The clips last looked at stay open, up to a limit in bytes, so that a cine is decrypted once and not for each frame.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Generic, Protocol, TypeVar

import numpy as np
from PIL import Image
from pydicom import Dataset

from busgen_cds.dicom import decode, picture, region, relevance, templates
from busgen_cds.dicom.decode import Frames, Unreadable
from busgen_cds.result import HeatMap
from busgen_cds.study import Patient, Source, Spacing

MOST_BYTES_OPEN = 1 << 29
USUAL_SECONDS = 0.04
CELLS_TO_PIXELS = 16  # an evidence cell is drawn this wide; the browser stretches the veil over the region


class Instance(Protocol):
    @property
    def sop_instance_uid(self) -> str: ...


Held = TypeVar("Held", bound=Instance)


@dataclass(frozen=True)
class Slide:
    """One still picture or one clip."""

    source: Source  # of its first frame
    spacing: Spacing | None
    seconds_per_frame: float
    number: str = field(default="", repr=False)  # the scanner's own instance number
    patient: Patient = field(default=Patient(), repr=False)  # whose it says it is: id and issuer


class Screen(Generic[Held]):
    def __init__(self, instances: Callable[[str], Sequence[Held]], open_instance: Callable[[Held], bytes]) -> None:
        self._instances, self._open = instances, open_instance
        self._frames: OrderedDict[str, Frames] = OrderedDict()
        self._slides: OrderedDict[tuple[str, int], tuple[Slide, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def slides(self, study_ref: str) -> tuple[Slide, ...]:
        """In the scanner's order."""
        instances = self._instances(study_ref)
        known = self._slides.get((study_ref, len(instances)))
        if known is not None:
            return known
        placed = [slide for each in instances if (slide := self._slide(each)) is not None]
        slides = tuple(sorted(placed, key=lambda slide: (len(slide.number), slide.number)))
        with self._lock:
            self._slides[study_ref, len(instances)] = slides
            while len(self._slides) > 256:
                self._slides.popitem(last=False)
        return slides

    def picture(self, study_ref: str, sop_instance_uid: str, frame_number: int) -> bytes:
        """A frame as PNG. KeyError: this study has no such frame."""
        found = [each for each in self._instances(study_ref) if each.sop_instance_uid == sop_instance_uid]
        if not found:
            raise KeyError(sop_instance_uid)
        frames = self._opened(found[0])
        if not 1 <= frame_number <= frames.available:
            raise KeyError(frame_number)
        return _png(_image(frames.decode(frame_number - 1)))

    def _slide(self, instance: Held) -> Slide | None:
        try:
            frames = self._opened(instance)
        except Unreadable:
            return None
        header, shape = frames.opened.header, frames.shape
        source = Source(
            str(header.get("SOPClassUID", "")),
            instance.sop_instance_uid,
            str(header.get("SeriesInstanceUID", "")),
            shape.rows,
            shape.columns,
            frame_count=max(1, frames.available),
            colour=shape.samples > 1,
        )
        scales = {scale for _, scale in region.readable(region.stated(header, shape.rows, shape.columns))}
        spacing = scales.pop() if len(scales) == 1 else region.spacing_of_frame(header)
        patient = Patient(relevance.text(header, "PatientID"), issuer=relevance.text(header, "IssuerOfPatientID"))
        number = relevance.text(header, "InstanceNumber")
        return Slide(source, spacing, _seconds_per_frame(header), number, patient)

    def _opened(self, instance: Held) -> Frames:
        with self._lock:
            frames = self._frames.get(instance.sop_instance_uid)
            if frames is not None:
                self._frames.move_to_end(instance.sop_instance_uid)
                return frames
        opened = decode.open_file(self._open(instance))
        if relevance.is_ours(opened.header):
            raise Unreadable("it is one of our own objects")
        frames = Frames(opened, decode.shape(opened))
        with self._lock:
            self._frames[instance.sop_instance_uid] = frames
            while len(self._frames) > 1 and sum(len(f.opened.data) for f in self._frames.values()) > MOST_BYTES_OPEN:
                self._frames.popitem(last=False)
        return frames


def evidence(heat: HeatMap) -> bytes:
    """The evidence over its region as a PNG with an alpha channel."""
    scale = templates.load()
    size = (heat.evidence.shape[1] * CELLS_TO_PIXELS, heat.evidence.shape[0] * CELLS_TO_PIXELS)
    smooth = np.asarray(Image.fromarray(picture.evidence(heat)).resize(size, Image.Resampling.BILINEAR))
    colour, opacity = picture.colours(
        smooth, scale.number("picture.heat.threshold"), scale.number("picture.heat.full_scale")
    )
    veil = np.dstack([colour, (opacity * 255).astype(np.uint8)])
    return _png(Image.fromarray(veil))


def _image(shown: decode.Picture) -> Image.Image:
    if shown.chroma is None:
        return Image.fromarray(shown.grey)
    difference = np.clip(shown.chroma + 128, 0, 255).astype(np.uint8)
    return Image.fromarray(np.dstack([shown.grey, difference]), "YCbCr").convert("RGB")


def _png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _seconds_per_frame(header: Dataset) -> float:
    try:
        milliseconds = float(header.get("FrameTime") or 0)
        rate = float(header.get("CineRate") or header.get("RecommendedDisplayFrameRate") or 0)
    except (TypeError, ValueError):
        return USUAL_SECONDS
    seconds = milliseconds / 1000 if milliseconds > 0 else 1 / rate if rate > 0 else USUAL_SECONDS
    return min(max(seconds, 0.01), 1.0)
