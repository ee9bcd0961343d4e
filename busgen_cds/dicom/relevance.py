"""What an instance's header says about itself: is it an ultrasound image, in B-mode, of a breast?

Rules:
- Only what is stated counts. An organ that is not named is no reason: the picture itself decides then.
- What names the organ of this image outweighs what names the study.
- Our own objects are never read, and never change what a study is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pydicom import Dataset
from pydicom.uid import UID

from busgen_cds.study import Side

OURS = "BUSGen"  # what our own Manufacturer begins with

READ = {
    "1.2.840.10008.5.1.4.1.1.6.1": "Ultrasound Image",
    "1.2.840.10008.5.1.4.1.1.3.1": "Ultrasound Multi-frame Image",
    "1.2.840.10008.5.1.4.1.1.6": "Ultrasound Image (retired)",
    "1.2.840.10008.5.1.4.1.1.3": "Ultrasound Multi-frame Image (retired)",
}

ENHANCED_VOLUME = "1.2.840.10008.5.1.4.1.1.6.2"

BREAST = re.compile(
    r"\b(breasts?|mamma\w*|mammo\w*|mama|mamas|brust|sein|seins|seno|senos|bröst|borst|piers\w*)\b|乳|유방"
)
ORGANS = {
    "heart": r"heart|cardi\w*|card|echocardio\w*|echo|tte|tee|intracardiac|epicardial|ventric\w*|aort\w*|stress echo",
    "obstetric": r"ob|obs|obstetric\w*|fet(al|us)|foet\w+|pregnan\w*|gestation\w*|nuchal|biophysical",
    "pelvis": r"pelvi[cs]|pelvis|gyn|gyna?eco\w*|uter\w*|ovar\w*|endovaginal|transvaginal|endocavitary|endorectal",
    "abdomen": r"abdom\w*|liver|hepat\w*|gallbladder|biliary|pancrea\w*|spleen|splenic|bowel|append\w*|retroperiton\w*",
    "kidney and bladder": r"kidneys?|renal|bladder|urolog\w*|urinary|prostat\w*",
    "testis": r"testi\w*|scrot\w*",
    "thyroid and neck": r"thyroid\w*|parathyroid\w*|neck|salivary|parotid",
    "vessels": r"vascular|intravascular|carotid\w*|veins?|venous|arter\w+|dvt|duplex|vertebral|transcranial|tcd",
    "joints and muscles": r"musculoskeletal|msk|shoulder|knee|hip|ankle|wrist|elbow|tendon\w*|muscle|achilles",
    "eye": r"eyes?|ophthalm\w*|ocular|orbit\w*",
    "head": r"neonatal head|brain|cranial|head|skull",
    "lung": r"lungs?|pleura\w*|pulmon\w*",
    "axilla": r"axill\w*",
}
_ORGANS = {organ: re.compile(rf"\b({words})\b") for organ, words in ORGANS.items()}
_IMAGE_MODES = {0x0002: "M-mode", 0x0004: "spectral Doppler", 0x0008: "spectral Doppler", 0x0020: "colour M-mode"}
_TWO_DIMENSIONAL = 0x0001
_STIFFNESS = re.compile(r"\b(elasto\w*|shear.?wave|strain imaging|swe)\b")


def is_ours(header: Dataset) -> bool:
    return text(header, "Manufacturer").lower().startswith(OURS.lower())


def refusal(header: Dataset) -> str | None:
    """Why this instance is not breast B-mode ultrasound, from its header alone; nothing when it may be."""
    sop_class = text(header, "SOPClassUID")
    if sop_class not in READ:
        return _other_kind(sop_class)
    organ = other_organ(header)
    if organ:
        return f"not a breast: the header says {organ}"
    if text(header, "TransducerType").upper().endswith("PHASED"):
        return "not a breast: taken with a phased sector probe"
    return _mode(header)


def other_organ(header: Dataset) -> str | None:
    """The organ that is stated, if it is another one."""
    for words in (_of_image(header), _of_study(header)):
        said = [_plain(word) for word in words if word]
        if any(BREAST.search(word) for word in said):
            return None
        for word in said:
            for organ, pattern in _ORGANS.items():
                if pattern.search(word):
                    return organ
    return None


def laterality(header: Dataset) -> Side | None:
    """The side, only where the source states it and does not contradict itself."""
    said = {text(header, "Laterality"), text(header, "ImageLaterality"), *_frame_laterality(header)} - {""}
    if said == {"L"}:
        return "L"
    return "R" if said == {"R"} else None


def text(header: Dataset, name: str) -> str:
    """An element as words; empty when it is absent or cannot be read."""
    try:
        value = header.get(name)
    except (ValueError, TypeError, LookupError, AttributeError, NotImplementedError, OverflowError):
        return ""  # a value that contradicts its own type says nothing
    return "" if value is None else str(value).replace("\0", "").strip()


def values(header: Dataset, name: str) -> tuple[str, ...]:
    value = header.get(name)
    if value is None or isinstance(value, str):
        return (text(header, name),)
    try:
        return tuple(str(part) for part in value)
    except TypeError:
        return (str(value),)


def _other_kind(sop_class: str) -> str:
    uid = UID(sop_class)
    if not sop_class:
        return "it does not say what kind of object it is"
    if uid.startswith("1.2.840.10008.5.1.4.1.1.7"):
        return "secondary capture: not an original ultrasound image"
    if uid.startswith("1.2.840.10008.5.1.4.1.1.88"):
        return "structured report: not an image"
    if uid == ENHANCED_VOLUME:
        return "3D ultrasound volume: not a 2D picture"
    name = uid.name if uid.name != sop_class else "an unknown or private kind of object"
    return f"not an ultrasound image: {name}"


def _mode(header: Dataset) -> str | None:
    words = " ".join(_plain(text(header, name)) for name in ("SeriesDescription", "ImageComments", "ProtocolName"))
    if _STIFFNESS.search(words):
        return "elastography: not B-mode"
    kinds = values(header, "ImageType")
    try:
        bits = int(kinds[3], 16)  # PS3.3 C.8.5.6.1.1: the modes that made the picture, as a bit mask
    except (IndexError, ValueError):
        return None
    modes = [mode for bit, mode in _IMAGE_MODES.items() if bits & bit]
    return f"{modes[0]}: not B-mode" if modes and not bits & _TWO_DIMENSIONAL else None


def _of_image(header: Dataset) -> Iterator[str]:
    for item in header.get("AnatomicRegionSequence") or ():
        yield text(item, "CodeMeaning")
    yield text(header, "BodyPartExamined")
    yield "".join(values(header, "ImageType")[2:3])  # PS3.3 C.8.5.6.1.1: the kind of exam
    yield text(header, "ProcessingFunction")


def _of_study(header: Dataset) -> Iterator[str]:
    for name in (
        "SeriesDescription",
        "ProtocolName",
        "PerformedProcedureStepDescription",
        "RequestedProcedureDescription",
        "StudyDescription",
    ):
        yield text(header, name)
    for item in header.get("ProcedureCodeSequence") or ():
        yield text(item, "CodeMeaning")


def _frame_laterality(header: Dataset) -> Iterator[str]:
    for group in header.get("SharedFunctionalGroupsSequence") or ():
        for anatomy in group.get("FrameAnatomySequence") or ():
            yield text(anatomy, "FrameLaterality")


def _plain(words: str) -> str:
    return re.sub(r"[_\W]+", " ", words.lower())
