"""A Study and an Engine → a Result: what was found and how suspicious it is, or why nothing can be said.

Rules:
- Probabilities are stated for the site's prevalence. "3" also needs a score below the bundle's rule-out score.
- The highest of many scores is lowered by what chance alone would add (`Pooling`); in a clip a lesion counts
  only when neighbouring frames show it too.
- Frames unlike anything seen in training are left out with that reason; when they are the most, we decline.
- Side and millimetres are stated only where the source states them.
- Evidence is handed on in the network's own logits, never stretched to fit an image.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from busgen_cds import birads, geometry, pixels
from busgen_cds.birads import Category, sigmoid
from busgen_cds.bundle import Manifest
from busgen_cds.errors import Misconfigured
from busgen_cds.result import Answer, Assessed, Declined, Finding, HeatMap, Orientation, Result
from busgen_cds.study import Frame, NotAnalysed, Region, Study
from busgen_cds.vision.engine import Engine, Reading

BATCH = 16  # frames prepared at a time
NEIGHBOURS = 3  # frames of a clip that must show a lesion, one after the other
GAP = 1  # frames that a lesion may vanish for in between, or that could not be read
SAME_LESION = 0.1  # overlap of a lesion's outlines in two neighbouring frames
PIECES = 3  # lesions in one frame
SMALL_PIECE = 0.2  # of the largest piece in its frame: what is smaller is not listed beside it
MIN_CELLS = 8  # of the mask, 112 x 112: about 2 mm of a 50 mm picture
FAINT_MASK = 0.2  # a lesion's outline is looked for down to this probability where the frame surely shows one
UNEXPLAINED = 0.5  # a calibrated score this high without any outlined lesion is no answer
INTERVAL = 1.96  # standard deviations: 95 %
STRANGE = "unlike anything seen in training"


class _View(NamedTuple):
    """One frame and what the network says of it."""

    frame: Frame
    placement: pixels.Placement
    log_odds: float  # calibrated, at the calibration's prevalence
    presence: float  # probability that the frame shows a lesion
    spread: float  # of the calibrated log-odds
    distance: float  # from what was seen in training
    mask: NDArray[np.float32]
    heat: NDArray[np.float32]


class _Piece(NamedTuple):
    """One lesion in one frame."""

    view: _View
    cells: NDArray[np.bool_]
    level: float


@dataclass
class _Lesion:
    """One lesion, in the frames that show it."""

    pieces: list[_Piece]

    @property
    def key(self) -> _Piece:
        return max(self.pieces, key=lambda piece: piece.view.log_odds)


@dataclass(frozen=True)
class _Scale:
    """From calibrated log-odds to what is said at this site, of a study of so many frames."""

    manifest: Manifest = field(repr=False)
    prevalence: float
    frames: int

    def score(self, log_odds: float) -> float:
        """Calibrated and corrected for the number of frames; the same at every site."""
        return sigmoid(log_odds - self.manifest.pooling.correction(self.frames))

    def probability(self, log_odds: float) -> float:
        at_site = birads.at_prevalence(self.score(log_odds), self.manifest.calibration.prevalence, self.prevalence)
        return round(at_site, 6)

    def category(self, log_odds: float) -> Category:
        rule_out = self.manifest.thresholds.rule_out
        return birads.category(self.probability(log_odds), score=self.score(log_odds), rule_out=rule_out)

    def uncertainty(self, log_odds: float, spread: float) -> float:
        low, high = self._interval(log_odds, spread)
        return round((self.probability(high) - self.probability(low)) / 2, 6)

    def too_uncertain(self, log_odds: float, spread: float) -> bool:
        """Judged before the site's prevalence, which would make everything rare look certain."""
        low, high = self._interval(log_odds, spread)
        return (self.score(high) - self.score(low)) / 2 > self.manifest.thresholds.uncertainty

    def _interval(self, log_odds: float, spread: float) -> tuple[float, float]:
        deviation = float(np.hypot(spread, self.manifest.calibration.uncertainty))
        return log_odds - INTERVAL * deviation, log_odds + INTERVAL * deviation


def assess(
    study: Study,
    engine: Engine,
    *,
    prevalence: float,
    revision: int = 1,
    clock: Callable[[], float] = time.monotonic,
    heard: Callable[[Reading], None] = lambda reading: None,
) -> Result:
    """Read every frame, and say what they say together. `heard` is told what the network itself said."""
    if not 0 < prevalence < 1:
        raise Misconfigured(f"The prevalence of malignancy is {prevalence}: set the site's own, between 0 and 1.")
    start = clock()
    views = list(_views(study.frames, engine, heard))
    known = [view for view in views if view.distance <= engine.manifest.thresholds.domain]
    read = {view.frame.source for view in known}
    strange = dict.fromkeys(view.frame.source for view in views if view.frame.source not in read)
    answer = Answer(
        study_uid=study.uid,
        evidence_digest=study.evidence_digest,
        bundle=engine.bundle,
        provider=engine.provider,
        revision=revision,
        images_read=len(read),
        not_analysed=(*study.not_analysed, *(NotAnalysed(source, STRANGE) for source in strange)),
        seconds=0.0,
    )
    if 2 * len(known) <= len(views):
        result: Result = _declined(answer, f"{STRANGE}: {len(views) - len(known)} of {len(views)} images")
    else:
        result = _judge(answer, known, _Scale(engine.manifest, prevalence, len(known)))
    return dataclasses.replace(result, seconds=round(clock() - start, 3))


def _judge(answer: Answer, views: Sequence[_View], scale: _Scale) -> Result:
    lesions = sorted(_lesions(views, scale.manifest), key=lambda lesion: -lesion.key.view.log_odds)
    key = lesions[0].key.view if lesions else max(views, key=lambda view: view.log_odds)
    unsure = _unsure(key, bool(lesions), scale)
    if unsure:
        return _declined(answer, unsure)
    findings = tuple(_finding(lesion, scale) for lesion in lesions)
    return Assessed(
        **vars(answer),
        probability=scale.probability(key.log_odds),
        birads=findings[0].birads if findings else None,
        prevalence=scale.prevalence,
        calibrated_at=scale.manifest.calibration.prevalence,
        findings=findings,
        key_image=None if findings else key.frame.source,
        key_heat=None if findings else _heat(key),
    )


def _declined(answer: Answer, reason: str) -> Declined:
    return Declined(**vars(answer), reason=reason)


def _unsure(key: _View, outlined: bool, scale: _Scale) -> str | None:
    if outlined and scale.too_uncertain(key.log_odds, key.spread):
        return "too uncertain: the answers for the most suspicious finding lie too far apart"
    if not outlined and scale.score(key.log_odds) >= UNEXPLAINED:
        return "too uncertain: suspicious, but no lesion can be outlined"
    return None


def _views(frames: Sequence[Frame], engine: Engine, heard: Callable[[Reading], None]) -> Iterator[_View]:
    calibration = engine.manifest.calibration
    for i in range(0, len(frames), BATCH):
        some = frames[i : i + BATCH]
        prepared = [pixels.prepare(frame.tissue, engine.manifest.size) for frame in some]
        reading = engine.read(np.stack([plane for plane, _ in prepared]))
        heard(reading)
        distances = engine.gate.distance(reading.embedding)
        for k, (frame, (_, placement)) in enumerate(zip(some, prepared, strict=True)):
            yield _View(
                frame,
                placement,
                calibration.log_odds(float(reading.malignancy[k])),
                sigmoid(float(reading.presence[k])),
                abs(calibration.scale) * float(reading.spread[k]),
                float(distances[k]),
                _inside(reading, k, placement),
                placement.crop(reading.heat[k]).copy(),
            )


def _inside(reading: Reading, k: int, placement: pixels.Placement) -> NDArray[np.float32]:
    """The mask, with nothing in the letter-box's bars."""
    mask: NDArray[np.float32] = reading.mask[k, 0].copy()
    step = placement.size / mask.shape[-1]
    mask[round(placement.rows / step) :] = 0
    mask[:, : round(placement.left / step)] = 0
    mask[:, round((placement.left + placement.columns) / step) :] = 0
    return mask


def _lesions(views: Sequence[_View], manifest: Manifest) -> list[_Lesion]:
    lesions: list[_Lesion] = []
    for clip in _clips(views).values():
        pieces = [(_turn(view.frame), _pieces(view, manifest)) for view in clip]
        lesions += _lasting(pieces, min(NEIGHBOURS, clip[0].frame.source.frame_count))
    return lesions


def _turn(frame: Frame) -> int:
    """Which of the frames that were looked at: what was left out of a clip leaves its gap."""
    return round((frame.source.frame_number - 1) / frame.step)


def _clips(views: Iterable[_View]) -> Mapping[tuple[str, int, int], list[_View]]:
    """The views of one instance and region, in the order of time."""
    clips: dict[tuple[str, int, int], list[_View]] = {}
    for view in views:
        source, region = view.frame.source, view.frame.region
        clips.setdefault((source.sop_instance_uid, region.left, region.top), []).append(view)
    for clip in clips.values():
        clip.sort(key=lambda view: view.frame.source.frame_number)
    return clips


def _pieces(view: _View, manifest: Manifest) -> list[_Piece]:
    """The lesions of one frame; none where the network sees none."""
    thresholds = manifest.thresholds
    if view.presence < thresholds.presence:
        return []
    level = thresholds.mask
    if view.mask.max() <= level:
        level = max(FAINT_MASK, float(view.mask.max()) / 2)
    cells = MIN_CELLS * view.mask.size / 112**2
    pieces = [piece for piece in geometry.pieces(view.mask > level) if piece.sum() >= cells][:PIECES]
    return [_Piece(view, piece, level) for piece in pieces if piece.sum() >= SMALL_PIECE * pieces[0].sum()]


def _lasting(frames: Sequence[tuple[int, Sequence[_Piece]]], needed: int) -> list[_Lesion]:
    """Follow each lesion from frame to frame, and keep those that last."""
    followed: list[tuple[_Lesion, int]] = []  # with the frame that showed it last
    for now, pieces in frames:
        for piece in pieces:
            for i, (lesion, last) in enumerate(followed):
                if last < now <= last + 1 + GAP and _overlap(lesion.pieces[-1].cells, piece.cells) >= SAME_LESION:
                    lesion.pieces.append(piece)
                    followed[i] = (lesion, now)
                    break
            else:
                followed.append((_Lesion([piece]), now))
    return [lesion for lesion, _ in followed if len(lesion.pieces) >= needed]


def _overlap(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))


def _finding(lesion: _Lesion, scale: _Scale) -> Finding:
    view = lesion.key.view
    contour = _contour(lesion.key)
    spacing = view.frame.spacing
    sizes = geometry.measure(contour, *spacing) if spacing else None
    return Finding(
        source=view.frame.source,
        probability=scale.probability(view.log_odds),
        birads=scale.category(view.log_odds),
        uncertainty=scale.uncertainty(view.log_odds, view.spread),
        contour=contour,
        laterality=view.frame.laterality,
        long_axis_mm=round(sizes.long_axis, 2) if sizes else None,
        short_axis_mm=round(sizes.short_axis, 2) if sizes else None,
        area_mm2=round(sizes.area, 2) if sizes else None,
        orientation=_orientation(sizes) if sizes else None,
        frames_seen=len(lesion.pieces),
        heat=_heat(view),
    )


def _orientation(sizes: geometry.Measures) -> Orientation:
    """BI-RADS: parallel to the skin is wider than tall; a round mass is not parallel."""
    return "parallel" if sizes.width > sizes.height else "not parallel"


def _contour(piece: _Piece) -> geometry.Outline:
    """The lesion's outline in pixels of the full frame, within its region."""
    view = piece.view
    own = np.where(geometry.dilate(piece.cells, 1), view.mask, 0)  # its neighbours' cells shape the line's cuts
    step = view.placement.size / view.mask.shape[-1]
    points = (
        view.placement.to_region((x + 0.5) * step - 0.5, (y + 0.5) * step - 0.5)
        for x, y in geometry.outline(own, piece.level)
    )
    line = tuple(_placed(x, y, view.frame.region) for x, y in points)
    return geometry.simplify(line, tolerance=0.2 * step / view.placement.scale)


def _placed(x: float, y: float, region: Region) -> geometry.Point:
    left, top, right, bottom = region
    return round(min(max(x + left, left), right - 1), 2), round(min(max(y + top, top), bottom - 1), 2)


def _heat(view: _View) -> HeatMap:
    return HeatMap(view.heat, view.frame.region)
