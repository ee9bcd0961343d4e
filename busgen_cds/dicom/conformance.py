"""The DICOM conformance statement, written from the tables that the program really uses.

`python -m busgen_cds.dicom.conformance > docs/conformance.md` makes it again; a test says when it is out of date.
`--words` lists the words that a report template may use.

Rules:
- What can be read from a table of the code is read from it; only what no table holds is a sentence here.
- The attributes of each object are those of an object really made, of a made-up study.
"""

from __future__ import annotations

import io
import math
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from datetime import datetime
from typing import Any

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.datadict import dictionary_description, keyword_for_tag
from pydicom.tag import BaseTag
from pydicom.uid import UID, ExplicitVRLittleEndian

import busgen_cds
from busgen_cds import birads
from busgen_cds.birads import Code
from busgen_cds.dicom import (
    association,
    checks,
    decode,
    listener,
    objects,
    outbox,
    overlay,
    picture,
    relevance,
    report,
    templates,
    tls,
    upper_layer,
)
from busgen_cds.dicom.identity import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION, PRODUCT
from busgen_cds.dicom.saying import Saying
from busgen_cds.result import Assessed, BundleName, Declined, Finding, HeatMap
from busgen_cds.study import Frame, Header, NotAnalysed, Patient, Region, Scanner, Source, Spacing, Study

KINDS = {
    "sr": ("Structured report", (report.COMPREHENSIVE_SR,)),
    "sc": ("Secondary capture", (overlay.SECONDARY_CAPTURE,)),
    "seg": ("Segmentation", (overlay.SEGMENTATION,)),
    "pr": ("Presentation state", (overlay.GREY_STATE, overlay.COLOUR_STATE)),
    "ko": ("Rejection note", (report.KEY_OBJECT_SELECTION,)),
}
FROM_SOURCE = (
    *("PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID"),
    *("StudyDate", "StudyTime", "AccessionNumber", "StudyID", "StudyDescription", "ReferringPhysicianName"),
    *("ContributingEquipmentSequence", "Laterality"),
)


def statement() -> str:
    """The whole document, in Markdown."""
    parts = (_opening, _services, _received, _associations, _read, _made, _report, _overlays, _identity, _attributes)
    return "\n".join(line.rstrip() for part in parts for line in (*part(), "")).rstrip() + "\n"


def words() -> list[str]:
    """What a template may say: of a Result, of one that declines, of a finding."""
    study = _example()
    saying, declined = _saying(study, _assessed(study)), _saying(study, _declined(study))
    return sorted({*saying.finding_words(1), *saying.words, *declined.words})


def _opening() -> Iterator[str]:
    yield f"# DICOM conformance statement of {PRODUCT} {busgen_cds.__version__}"
    yield ""
    yield from _prose(
        "Made from the code's own tables by `python -m busgen_cds.dicom.conformance`; do not edit it by hand."
    )
    yield ""
    yield from _prose(
        f"{PRODUCT} receives breast ultrasound studies and answers each with objects that say one result: "
        "research software whose reports are preliminary and unverified, and no diagnosis."
    )


def _services() -> Iterator[str]:
    yield "## Services"
    yield ""
    yield from _table(
        ("service", "role", "transport"),
        [
            ("Verification (C-ECHO)", "SCP and SCU", "DIMSE"),
            ("Storage (C-STORE)", "SCP for what scanners send, SCU for results", "DIMSE"),
            ("Storage commitment (N-ACTION, N-EVENT-REPORT)", "SCP for scanners, SCU towards the PACS", "DIMSE"),
            ("Query (C-FIND, study root)", "SCU: how many images the PACS has, and whose", "DIMSE"),
            ("STOW-RS", "user agent, for results", "HTTP"),
        ],
    )
    yield ""
    yield from _prose(
        "A report on storage commitment goes out on the association that asked for it. Who has hung up by then hears "
        "it at the node that the site names for that sender (`report_to`); where none is named, the scanner asks again."
        " What a PACS reports on an association of its own is believed under the AE title of the node that was asked, "
        "from the addresses that the site lists for that title, or else from the node's own."
    )


def _received() -> Iterator[str]:
    yield "## What is received"
    yield ""
    yield from _prose(
        "Every transfer syntax that is proposed is accepted, in the peer's order of preference (big endian "
        "last), and stored as it came. Success is answered when the file, its directory and its database "
        "row are on disk."
    )
    yield ""
    yield from _table(
        ("SOP class", "UID", "used"),
        [(name, f"`{uid}`", "read" if uid in relevance.READ else "kept") for uid, name in association.STORED.items()],
    )
    yield ""
    yield from _prose("Answers to C-STORE:")
    yield ""
    yield from _table(
        ("outcome", "status"), [(outcome, f"`{status:#06x}`") for outcome, status in association.STATUSES.items()]
    )


def _associations() -> Iterator[str]:
    yield "## Associations"
    yield ""
    yield from _prose(
        "Plain DICOM is taken only from the networks a site names, TLS with client certificates from those "
        "it lists; an AE title can be bound to addresses and to one certificate. Port, processes, associations, "
        "data set, idle time and PDU are settings, with these defaults; the others are fixed:"
    )
    yield ""
    limits = (listener.ListenerConfig, association.Rules, upper_layer.Limits)
    yield from _table(("limit", "default"), [row for kind in limits for row in _numbers(kind)])
    yield ""
    yield from _prose(
        f"TLS 1.2 and 1.3, cipher suites `{tls.CIPHERS}` (BCP 195). Implementation class UID "
        f"`{IMPLEMENTATION_CLASS_UID}`, version name of this release `{IMPLEMENTATION_VERSION}`. TCP_NODELAY "
        "is set on every socket."
    )


def _read() -> Iterator[str]:
    yield "## What is read"
    yield ""
    yield from _prose(
        "The B-mode region and its millimetres come from the Sequence of Ultrasound Regions; where it is "
        "absent the region is found in the picture and no length is stated. Beyond these limits an image is "
        "not analysed, and the reason is reported:"
    )
    yield ""
    yield from _table(
        ("limit", "value"),
        [
            ("bytes of an instance", f"{decode.MAX_BYTES:,}"),
            ("rows, columns", f"{decode.MIN_SIDE} to {decode.MAX_SIDE:,}"),
            ("pixels of a frame", f"{decode.MAX_PIXELS:,}"),
            ("frames of an instance", f"{decode.MAX_FRAMES:,}"),
        ],
    )
    yield ""
    yield from _prose(f"Objects whose Manufacturer begins with `{relevance.OURS}` are our own, and are never read.")


def _made() -> Iterator[str]:
    template = templates.load()
    step = int(template.number("series.step"))
    yield "## What is made"
    yield ""
    yield from _prose(
        "A site's profile names the kinds that each destination gets; the rejection note only where it is "
        f"asked for. All are {ExplicitVRLittleEndian.name}, in UTF-8 (ISO_IR 192). "
        f"Every kind has one series; each revision of a study's result raises its number by {step}."
    )
    yield ""
    rows = [
        (name, UID(uid).name, f"`{uid}`", template.at(f"series.{kind}.modality"), template.at(f"series.{kind}.number"))
        for kind, (name, uids) in KINDS.items()
        for uid in uids
    ]
    yield from _table(("kind", "SOP class", "UID", "modality", "series"), rows)
    yield ""
    yield from _prose(
        f"No answer, `0xa7xx` (out of resources) and `{outbox.PROCESSING_FAILURE:#06x}` (processing failure) are tried "
        f"again with growing delay; `{outbox.KNOWN_ALREADY:#06x}` (duplicate instance) is taken as stored. Refused for "
        "good:"
    )
    yield ""
    yield from _table(
        ("status", "meaning"), [(f"`{s:#06x}`", meaning) for s, meaning in sorted(outbox.REFUSALS.items())]
    )


def _report() -> Iterator[str]:
    template = templates.load()
    yield "## The structured report"
    yield ""
    yield from _prose(
        f"Root {_code(template.code('report.title'))}, or {_code(template.code('report.title_without_measurements'))} "
        f"where there is no finding to measure, TID {template.at('report.template')}; one group of "
        f"TID {template.at('finding.template')} for each finding, so that viewers draw it: each number is "
        "inferred from its own closed POLYLINE on the source image and frame, in this order, left out where "
        "it is not known:"
    )
    yield ""
    yield from _table(
        ("number", "unit"),
        [
            (_code(templates.as_code(entry["name"], "")), _code(templates.as_code(entry["unit"], "")))
            for entry in template.at("finding.measurements")
        ],
    )
    yield ""
    yield from _prose(f"{_code(template.code('finding.category'))} takes these values only:")
    yield ""
    yield from _table(("category", "code"), [(name, _code(code)) for name, code in birads.CODES.items()])
    yield ""
    never = ", ".join(f"`{value}` ({scheme})" for value, scheme in sorted(checks.NEVER))
    yield from _prose(
        f"Never sent: {never}; these are BI-RADS 0, 1, 2, 6 and an undivided 4. Nothing found has no "
        "category and is never called negative; a study that is declined says NOT ANALYSED and the reason, "
        f"without any number. The observer is {_code(report.DEVICE)}; the report is UNVERIFIED and "
        "PRELIMINARY. Laterality is written only where the source states it."
    )


def _overlays() -> Iterator[str]:
    template = templates.load()
    threshold, full = template.number("picture.heat.threshold"), template.number("picture.heat.full_scale")
    yield "## Pictures, segmentations, presentation states"
    yield ""
    yield from _prose(
        f"- Secondary capture: {picture.WIDTH} x {picture.HEIGHT} RGB, one for each key image. Evidence is "
        f"drawn on one scale for all studies, for and against malignancy, from {threshold:g} to {full:g} "
        "logits per 1 % of the region, and not at all below it."
    )
    yield from _prose(
        "- Segmentation: BINARY, a segment for each finding, a frame for the source frame it was found on. "
        "Ultrasound has no frame of reference: **Plane Orientation and Plane Position are nominal** "
        "(identity, origin), because some viewers load nothing without them; a site can switch them off. "
        "Without a known spacing neither they nor Pixel Measures are written."
    )
    yield from _prose(
        "- Presentation state: grayscale or colour as the referenced image is stored; colour with an sRGB "
        "ICC profile of class `scnr`. Laterality is empty where the source does not state it."
    )
    yield (
        "- Rejection note (IHE IOCM): "
        + _code(template.code("rejection.title"))
        + ", listing every object that is replaced."
    )


def _identity() -> Iterator[str]:
    yield "## Identity and revisions"
    yield ""
    yield from _prose(
        "UIDs are below `2.25` and derived from study, digest of the images received, digest of the bundle, "
        "kind, index and revision: the same study read by the same bundle gives the same objects. A newer "
        "revision names the report it replaces (Predecessor Documents Sequence) and says `REV n` in the "
        "series description and text of each object. An object is made once and resent byte for byte."
    )


def _attributes() -> Iterator[str]:
    study = _example()
    profile = objects.Profile(("sr", "sc", "seg", "pr", "ko"))
    at = datetime(2026, 1, 2, 3, 4, 5)
    first = objects.render(study, _assessed(study), profile=profile, rendered_at=at)
    second = objects.render(study, _assessed(study, 2), profile=profile, rendered_at=at, replaces=first)
    headers_of = {it.kind: dcmread(io.BytesIO(it.data)) for it in second}
    known = sorted({element.tag for ds in headers_of.values() for element in ds})
    yield "## Attributes"
    yield ""
    yield from _prose(
        "Of a revised result with a finding on a grey image. `S`: from the source, as received, or empty "
        f"where it was no valid value; `x`: from {PRODUCT}."
    )
    yield ""
    rows = [
        (f"`{tag}`", dictionary_description(tag), *(_origin(ds, tag) for ds in headers_of.values())) for tag in known
    ]
    yield from _table(("tag", "attribute", *(KINDS[kind][0].lower() for kind in headers_of)), rows)


def _origin(ds: Dataset, tag: BaseTag) -> str:
    if tag not in ds:
        return ""
    return "S" if keyword_for_tag(tag) in FROM_SOURCE else "x"


def _prose(text: str) -> list[str]:
    """A paragraph or a point of a list, in lines of readable length."""
    return textwrap.wrap(text, 116, subsequent_indent="  " if text.startswith("- ") else "", break_long_words=False)


def _numbers(kind: type[Any]) -> Iterator[tuple[str, str]]:
    """The settings of a dataclass that are numbers, with their defaults."""
    for each in fields(kind):
        if isinstance(each.default, int | float) and not isinstance(each.default, bool):
            yield each.name.replace("_", " "), f"{each.default:,}" if each.name != "port" else str(each.default)


def _code(code: Code) -> str:
    return f"({code.value}, {code.scheme}, {code.meaning})"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |"


def _example() -> Study:
    sop_class = next(iter(relevance.READ))
    source = Source(sop_class, "2.25.1", "2.25.2", rows=96, columns=128)
    grey = np.zeros((96, 128), np.uint8)
    return Study(
        "2.25.3",
        Patient("ID", "NAME", "19700101", "F", "ISSUER"),
        Header("20260102", "030405", "ACCESSION", "STUDY", "DESCRIPTION", "PHYSICIAN"),
        Scanner("MANUFACTURER", "MODEL", "STATION"),
        (Frame(source, grey, Region(0, 0, 128, 96), Spacing(0.1, 0.1), "L"),),
        (NotAnalysed(Source(sop_class, "2.25.4", "2.25.2", rows=96, columns=128), "colour Doppler"),),
        (("2.25.1", "00"), ("2.25.4", "01")),
    )


def _assessed(study: Study, revision: int = 1) -> Assessed:
    frame = study.frames[0]
    turns = [math.tau * i / 16 for i in range(16)]
    contour = tuple((64 + 20 * math.cos(t), 48 + 12 * math.sin(t)) for t in turns)
    heat = HeatMap(np.zeros((12, 16), np.float32), frame.region)
    finding = Finding(frame.source, 0.3, "4B", 0.05, contour, "L", 4.0, 2.4, 7.5, "parallel", 1, heat)
    return Assessed(
        **_answer(study, revision),
        probability=0.3,
        birads="4B",
        prevalence=0.01,
        calibrated_at=0.3,
        findings=(finding,),
    )


def _declined(study: Study) -> Declined:
    return Declined(**_answer(study, 1), reason="REASON")


def _answer(study: Study, revision: int) -> dict[str, Any]:
    return {
        "study_uid": study.uid,
        "evidence_digest": study.evidence_digest,
        "bundle": BundleName("BUNDLE", "VERSION", "0" * 64),
        "provider": "PROVIDER",
        "revision": revision,
        "images_read": len(study.frames),
        "not_analysed": study.not_analysed,
        "seconds": 0.0,
    }


def _saying(study: Study, result: Assessed | Declined) -> Saying:
    return Saying(study, result, templates.load(), datetime(2026, 1, 2, 3, 4, 5))


if __name__ == "__main__":
    sys.stdout.write("\n".join(words()) + "\n" if "--words" in sys.argv[1:] else statement())
