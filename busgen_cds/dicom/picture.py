"""A Result as one picture: the image, the evidence over it, the contours, and the words beside it.

Rules (clinical safety 5 and 6):
- Evidence is drawn on one fixed absolute scale, the template's; below its threshold nothing is drawn.
- The picture says of itself that it is evidence and no extent, an AI result and no diagnosis, and who made it.
- A scale bar stands only where the source has a scale; a side only where the source states one.
- Everything written is also handed back as text, so that it can be checked without reading pixels.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from busgen_cds.dicom.saying import Saying
from busgen_cds.result import Finding, HeatMap
from busgen_cds.study import Frame

WIDTH, HEIGHT = 1280, 880
IMAGE = (24, 84, 880, 772)  # left, top, right, bottom of where the image may go
PANEL = (908, 84, 1256, 772)
ABOVE_BAR = PANEL[3] - 60
BACKGROUND, BAND, RULE = (13, 17, 23), (22, 28, 38), (52, 62, 78)
WHITE, SOFT, FAINT = (240, 244, 250), (190, 200, 214), (132, 144, 162)
WARNING, CONTOUR = (255, 193, 77), (64, 224, 255)
FOR = ((255, 236, 120), (255, 170, 50), (240, 70, 50), (200, 20, 90))  # evidence of malignancy, up to full scale
AGAINST = ((190, 225, 255), (110, 170, 255), (60, 110, 235), (50, 60, 190))  # evidence against it
OPACITY = (0.28, 0.62)  # at the threshold and at full scale
IN_FULL, MOST_LESIONS = 2, 4  # lesions of one image: so many with all their lines, so many with one
BAR_LENGTHS_MM = (50, 20, 10, 5, 2, 1)
_SPELLED = {"–": "-", "—": "-", "≥": ">=", "≤": "<=", "²": "2", "→": "->", "×": "x", "’": "'", "“": '"', "”": '"'}

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Picture:
    pixels: Pixels = field(repr=False)  # (HEIGHT, WIDTH, 3)
    texts: tuple[str, ...]


@dataclass
class Page:
    """A sheet to draw on that remembers what was written."""

    image: Image.Image = field(default_factory=lambda: Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND))
    texts: list[str] = field(default_factory=list)

    @property
    def draw(self) -> ImageDraw.ImageDraw:
        return ImageDraw.Draw(self.image)

    def write(
        self,
        at: tuple[float, float],
        text: str,
        size: int,
        colour: Colour = WHITE,
        *,
        width: int = 0,
        anchor: str = "la",
        bottom: int = 2 * HEIGHT,
    ) -> float:
        """Write, wrapped to the width and ending above the bottom; answers where the next line goes."""
        if not text:
            return at[1]
        self.texts.append(text)
        x, y = at
        step = round(size * 1.32)
        for line in wrap(drawable(text), size, width) if width else [drawable(text)]:
            if y + 2 * step > bottom:
                self.draw.text((x, y), "...", fill=colour, font=font(size), anchor=anchor)
                return bottom
            self.draw.text((x, y), line, fill=colour, font=font(size), anchor=anchor)
            y += step
        return y

    def done(self) -> Picture:
        return Picture(np.array(self.image), tuple(self.texts))


def of_frame(saying: Saying, frame: Frame, findings: Sequence[int], heats: Sequence[HeatMap]) -> Picture:
    """One key image with the findings (by number) seen on it."""
    page = _sheet(saying)
    shown = _show(page, saying, frame, heats)
    for number in findings:
        _outline(page, saying.findings[number - 1], number, frame, shown)
    if frame.spacing is not None:
        _scale_bar(page, shown, (shown[2] - shown[0]) / frame.source.columns / frame.spacing.column)
    y = _finding_words(page, saying, findings) if findings else _nothing_found(page, saying)
    _study_words(page, saying, y)
    if heats:
        _colour_bar(page, saying)
    return page.done()


def of_declined(saying: Saying) -> Picture:
    """No image: nothing was read from it."""
    page, template = _sheet(saying), saying.template
    left, top, width, bottom = IMAGE[0] + 40, 190, PANEL[2] - IMAGE[0] - 80, PANEL[3]
    y = page.write((left, top), template.text("picture.declined", saying.words), 44, WARNING, width=width, bottom=600)
    for line in template.lines("picture.declined_lines", saying.words):
        y = page.write((left, y + 14), line, 24, SOFT, width=width, bottom=bottom)
    page.draw.rectangle((IMAGE[0], top - 40, PANEL[2], y + 40), outline=WARNING, width=3)
    return page.done()


def without_image(saying: Saying) -> Picture:
    """Nothing found, and no key image to show."""
    page = _sheet(saying)
    _study_words(page, saying, _nothing_found(page, saying))
    return page.done()


def evidence(heat: HeatMap) -> NDArray[np.float32]:
    """Logits per 1 % of the region: the same figure for the same evidence, however fine the grid is."""
    return np.asarray(heat.evidence * (heat.evidence.size / 100), np.float32)


def colours(strength: NDArray[np.float32], threshold: float, full_scale: float) -> tuple[Pixels, NDArray[np.float32]]:
    """Signed evidence → colour and opacity; nothing between the thresholds."""
    along = np.clip((abs(strength) - threshold) / (full_scale - threshold), 0, 1)
    knots = np.linspace(0, 1, len(FOR))
    ramps = [
        np.stack([np.interp(along, knots, [stop[i] for stop in ramp]) for i in range(3)], -1) for ramp in (FOR, AGAINST)
    ]
    colour = np.where((strength > 0)[..., None], *ramps)
    opacity = np.where(abs(strength) >= threshold, OPACITY[0] + (OPACITY[1] - OPACITY[0]) * along, 0)
    return colour.astype(np.uint8), opacity.astype(np.float32)


def _sheet(saying: Saying) -> Page:
    page, template, words = Page(), saying.template, saying.words
    page.draw.rectangle((0, 0, WIDTH, 64), fill=BAND)
    page.draw.rectangle((0, HEIGHT - 56, WIDTH, HEIGHT), fill=BAND)
    # Viewers write date and series into the upper left corner: the heading stays clear of it.
    page.write((24, 46), template.text("picture.heading", words), 26, WARNING, anchor="lm")
    page.write((WIDTH - 24, 32), words["revision_note"], 22, WARNING, anchor="rm")
    page.write((24, HEIGHT - 28), template.text("picture.footer", words), 18, SOFT, anchor="lm")
    page.write((WIDTH - 24, HEIGHT - 28), template.text("picture.research", words), 18, SOFT, anchor="rm")
    return page


def _show(page: Page, saying: Saying, frame: Frame, heats: Sequence[HeatMap]) -> Box:
    """The frame, as large as fits with square millimetres, with the evidence over it; answers where it stands."""
    stretch = frame.spacing.row / frame.spacing.column if frame.spacing else 1.0
    rows, columns = frame.source.rows * stretch, frame.source.columns
    scale = min((IMAGE[2] - IMAGE[0]) / columns, (IMAGE[3] - IMAGE[1]) / rows)
    width, height = max(1, round(columns * scale)), max(1, round(rows * scale))
    left, top = IMAGE[0] + (IMAGE[2] - IMAGE[0] - width) // 2, IMAGE[1] + (IMAGE[3] - IMAGE[1] - height) // 2
    picture = Image.fromarray(frame.grey).resize((width, height), Image.Resampling.BICUBIC).convert("RGB")
    for heat in heats:
        picture = _with_evidence(picture, saying, frame, heat)
    page.image.paste(picture, (left, top))
    page.draw.rectangle((left - 1, top - 1, left + width, top + height), outline=RULE)
    caption = saying.template.text("picture.caption" if heats else "picture.no_caption", saying.words)
    page.write((IMAGE[0], IMAGE[3] + 14), caption, 22, WHITE)
    return left, top, left + width, top + height


def _with_evidence(picture: Image.Image, saying: Saying, frame: Frame, heat: HeatMap) -> Image.Image:
    across, down = picture.width / frame.source.columns, picture.height / frame.source.rows
    left, top, right, bottom = heat.region
    box = (round(left * across), round(top * down), round(right * across), round(bottom * down))
    size = (max(1, box[2] - box[0]), max(1, box[3] - box[1]))
    smooth = np.asarray(Image.fromarray(evidence(heat)).resize(size, Image.Resampling.BILINEAR))
    scale = saying.template
    colour, opacity = colours(smooth, scale.number("picture.heat.threshold"), scale.number("picture.heat.full_scale"))
    shaded = picture.copy()
    shaded.paste(Image.fromarray(colour), box[:2], Image.fromarray((opacity * 255).astype(np.uint8)))
    return shaded


def _outline(page: Page, finding: Finding, number: int, frame: Frame, shown: Box) -> None:
    """The contour with a dark rim, smooth because it is drawn twice as large; its number beside it."""
    across = (shown[2] - shown[0]) / frame.source.columns
    down = (shown[3] - shown[1]) / frame.source.rows
    points = [((x + 0.5) * across, (y + 0.5) * down) for x, y in finding.contour]
    ring = [(2 * x, 2 * y) for x, y in (*points, points[0], points[1])]
    size = (shown[2] - shown[0], shown[3] - shown[1])
    for width, colour in ((11, (0, 0, 0)), (5, CONTOUR)):
        stencil = Image.new("L", (2 * size[0], 2 * size[1]))
        ImageDraw.Draw(stencil).line(ring, fill=255, width=width, joint="curve")
        page.image.paste(Image.new("RGB", size, colour), shown[:2], stencil.reduce(2))
    right, top = max(points, key=lambda point: point[0] - point[1])
    x = min(shown[0] + right + 16, shown[2] - 14)
    y = max(shown[1] + top - 16, shown[1] + 14)
    page.draw.ellipse((x - 13, y - 13, x + 13, y + 13), fill=(0, 0, 0), outline=CONTOUR, width=2)
    page.write((x, y), str(number), 18, CONTOUR, anchor="mm")


def _scale_bar(page: Page, shown: Box, pixels_per_mm: float) -> None:
    room = 0.3 * (shown[2] - shown[0])
    length = next((mm for mm in BAR_LENGTHS_MM if mm * pixels_per_mm <= room), BAR_LENGTHS_MM[-1])
    x, y, wide = shown[0] + 18, shown[3] - 20, round(length * pixels_per_mm)
    for colour, width in (((0, 0, 0), 6), (WHITE, 2)):
        page.draw.line((x, y, x + wide, y), fill=colour, width=width)
        for end in (x, x + wide):
            page.draw.line((end, y - 7, end, y + 7), fill=colour, width=width)
    page.draw.rectangle((x + 4, y - 34, x + 16 + font(18).getlength(f"{length} mm"), y - 11), fill=(0, 0, 0))
    page.write((x + 10, y - 23), f"{length} mm", 18, WHITE, anchor="lm")


def _finding_words(page: Page, saying: Saying, findings: Sequence[int]) -> float:
    """Large: the most suspicious finding of this image; below it, each finding's lines."""
    template, words = saying.template, saying.finding_words(findings[0])
    left, y = PANEL[0], float(PANEL[1])
    width = PANEL[2] - PANEL[0]
    y = page.write((left, y), template.text("picture.category", words), 46, WHITE, width=width)
    y = page.write((left, y - 6), template.text("picture.category_note", words), 18, FAINT)
    y = page.write((left, y + 10), template.text("picture.probability", words), 46, WHITE)
    y = page.write((left, y - 6), template.text("picture.probability_note", words), 18, FAINT)
    for number in findings[:MOST_LESIONS]:
        words = saying.finding_words(number)
        y = page.write((left, y + 12), template.text("picture.lesion", words), 20, CONTOUR)
        for line in template.lines("picture.lesion_lines", words)[: None if len(findings) <= IN_FULL else 1]:
            y = page.write((left, y), line, 20, SOFT, width=width)
    if len(findings) > MOST_LESIONS:
        y = page.write((left, y + 12), template.text("picture.more_lesions", saying.words), 20, WARNING, width=width)
    return y


def _nothing_found(page: Page, saying: Saying) -> float:
    template, left, width = saying.template, PANEL[0], PANEL[2] - PANEL[0]
    y = page.write((left, PANEL[1]), template.text("picture.nothing_found", saying.words), 40, WHITE, width=width)
    return page.write((left, y), template.text("picture.nothing_found_note", saying.words), 20, SOFT, width=width)


def _study_words(page: Page, saying: Saying, y: float) -> None:
    page.draw.line((PANEL[0], y + 14, PANEL[2], y + 14), fill=RULE)
    y += 24
    for line in saying.template.lines("picture.study_lines", saying.words):
        if y < ABOVE_BAR:
            y = page.write((PANEL[0], y), line, 18, SOFT, width=PANEL[2] - PANEL[0], bottom=ABOVE_BAR)


def _colour_bar(page: Page, saying: Saying) -> None:
    """What the colours mean, over mid grey as over tissue."""
    template = saying.template
    threshold, full = template.number("picture.heat.threshold"), template.number("picture.heat.full_scale")
    left, top, wide, high = PANEL[0], PANEL[3] - 26, PANEL[2] - PANEL[0], 26
    values = np.tile(np.linspace(-full, full, wide, dtype=np.float32), (high, 1))
    colour, opacity = colours(values, threshold, full)
    bar = Image.new("RGB", (wide, high), (70, 70, 70))
    bar.paste(Image.fromarray(colour), (0, 0), Image.fromarray((opacity * 255).astype(np.uint8)))
    page.image.paste(bar, (left, top))
    page.draw.rectangle((left - 1, top - 1, left + wide, top + high), outline=RULE)
    below = top + high + 6
    page.write((left, below), f"-{full:g}", 16, SOFT)
    page.write((left + wide / 2, below), f"±{threshold:g}", 16, SOFT, anchor="ma")
    page.write((left + wide, below), f"+{full:g}", 16, SOFT, anchor="ra")
    page.write((left, top - 26), template.text("picture.scale_against", saying.words), 16, SOFT)
    page.write((left + wide, top - 26), template.text("picture.scale_for", saying.words), 16, SOFT, anchor="ra")
    page.write((left, below + 20), template.text("picture.scale_unit", saying.words), 16, FAINT)


def wrap(text: str, size: int, width: int) -> list[str]:
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and font(size).getlength(longer) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    return [*lines, line]


def drawable(text: str) -> str:
    """Only what the shipped font can draw: other signs are spelled, and accents it lacks are dropped."""
    for sign, spelled in _SPELLED.items():
        text = text.replace(sign, spelled)
    return "".join(c if ord(c) < 256 else _plain(c) for c in text)


def _plain(character: str) -> str:
    base = unicodedata.normalize("NFKD", character)[0]
    return base if ord(base) < 128 else "?"


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    loaded = ImageFont.load_default(size)
    assert isinstance(loaded, ImageFont.FreeTypeFont), "Pillow is built without FreeType"
    return loaded
