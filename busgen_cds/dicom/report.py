"""Study, Result → the structured report, worded by a template; and the note that rejects replaced objects.

Rules:
- The form that viewers draw: TID 1500, one TID 1501 group for each finding, every number with its own closed
  outline on the source image and frame, the area first, a comment in the group.
- The observer is a device, the report is preliminary and unverified.
- Nothing found is no category and never "negative"; declined is "NOT ANALYSED" with no number at all.
- A side is written only where the source states it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydicom.dataset import Dataset

import busgen_cds
from busgen_cds import birads
from busgen_cds.birads import Code
from busgen_cds.dicom import content, headers
from busgen_cds.dicom.content import ACQUIRED, MODIFIES, OBSERVED
from busgen_cds.dicom.contours import closed
from busgen_cds.dicom.headers import put
from busgen_cds.dicom.identity import PRODUCT
from busgen_cds.dicom.saying import Replaced, Saying, derived_uid, instances, percentage
from busgen_cds.dicom.templates import as_code
from busgen_cds.result import Assessed, Declined, Finding
from busgen_cds.study import Source

COMPREHENSIVE_SR = "1.2.840.10008.5.1.4.1.1.88.33"
KEY_OBJECT_SELECTION = "1.2.840.10008.5.1.4.1.1.88.59"

# The concepts that the templates of PS3.16 themselves fix.
LANGUAGE = Code("121049", "DCM", "Language of Content Item and Descendants")
OBSERVER_TYPE = Code("121005", "DCM", "Observer Type")
DEVICE = Code("121007", "DCM", "Device")
DEVICE_UID = Code("121012", "DCM", "Device Observer UID")
DEVICE_NAME = Code("121013", "DCM", "Device Observer Name")
DEVICE_MANUFACTURER = Code("121014", "DCM", "Device Observer Manufacturer")
DEVICE_MODEL = Code("121015", "DCM", "Device Observer Model Name")
DEVICE_SERIAL = Code("121016", "DCM", "Device Observer Serial Number")
PROCEDURE = Code("121058", "DCM", "Procedure reported")
LIBRARY = Code("111028", "DCM", "Image Library")
LIBRARY_GROUP = Code("126200", "DCM", "Image Library Group")
MODALITY = Code("121139", "DCM", "Modality")
ROWS = Code("110910", "DCM", "Pixel Data Rows")
COLUMNS = Code("110911", "DCM", "Pixel Data Columns")
PIXELS = Code("{pixels}", "UCUM", "Pixels")
SOURCE = Code("260753009", "SCT", "Source")
MEASUREMENTS = Code("126010", "DCM", "Imaging Measurements")
GROUP = Code("125007", "DCM", "Measurement Group")
TRACKING_IDENTIFIER = Code("112039", "DCM", "Tracking Identifier")
TRACKING_UID = Code("112040", "DCM", "Tracking Unique Identifier")
FINDING = Code("121071", "DCM", "Finding")
FINDING_SITE = Code("363698007", "SCT", "Finding Site")
LATERALITY = Code("272741003", "SCT", "Laterality")
COMMENT = Code("121106", "DCM", "Comment")
EVALUATIONS = Code("C0034375", "UMLS", "Qualitative Evaluations")
OUTCOME = Code("111017", "DCM", "CAD Processing and Findings Summary")
PROBABILITY = Code("111047", "DCM", "Probability of cancer")
PERCENT = Code("%", "UCUM", "Percent")
ALGORITHM_NAME = Code("111001", "DCM", "Algorithm Name")
ALGORITHM_VERSION = Code("111003", "DCM", "Algorithm Version")
ALGORITHM_PARAMETERS = Code("111002", "DCM", "Algorithm Parameters")
ALGORITHM_FAMILY = Code("111000", "DCM", "Algorithm Family")
REPLACED_REPORT = Code("121360", "DCM", "Replaced report")
REJECTION_DESCRIPTION = Code("113012", "DCM", "Key Object Description")

_BY_TENTHS = 1  # lengths and areas are written to a tenth


def structured_report(saying: Saying) -> Dataset:
    """The whole report, whatever the answer is."""
    ds = headers.begin(saying, "sr", COMPREHENSIVE_SR)
    put(ds, "CompletionFlag", "COMPLETE")
    put(ds, "VerificationFlag", "UNVERIFIED")
    put(ds, "PreliminaryFlag", "PRELIMINARY")
    put(ds, "ReferencedPerformedProcedureStepSequence", [])
    put(ds, "PerformedProcedureCodeSequence", [])
    referenced, others = _evidence(saying)
    _add_evidence(ds, saying, "CurrentRequestedProcedureEvidenceSequence", referenced)
    _add_evidence(ds, saying, "PertinentOtherEvidenceSequence", others)
    _add_predecessors(ds, saying)
    ds.update(_root(saying))
    return ds


def rejection_note(saying: Saying) -> Dataset:
    """PS3.16 TID 2010, as IHE's IOCM asks: the objects of earlier revisions are not to be shown any more."""
    replaced = [_as_source(old) for old in saying.predecessors("sr", "sc", "seg", "pr")]
    ds = headers.begin(saying, "ko", KEY_OBJECT_SELECTION)
    put(ds, "ReferencedPerformedProcedureStepSequence", [])
    _add_evidence(ds, saying, "CurrentRequestedProcedureEvidenceSequence", replaced)
    template = saying.template
    description = template.text("rejection.description", saying.words)
    children = [
        *_observer(saying),
        content.text(REJECTION_DESCRIPTION, description),
        *(content.composite(old) for old in replaced),
    ]
    ds.update(
        content.container(
            template.code("rejection.title"), children, relation=None, template=template.at("rejection.template")
        )
    )
    return ds


def _root(saying: Saying) -> Dataset:
    template = saying.template
    children = [
        content.coded(LANGUAGE, template.code("report.language"), MODIFIES),
        *_observer(saying),
        content.coded(PROCEDURE, template.code("report.procedure"), MODIFIES),
        _library(saying),
    ]
    if saying.findings:
        groups = [_group(saying, number) for number in range(1, len(saying.findings) + 1)]
        children.append(content.container(MEASUREMENTS, groups))
    children.append(content.container(EVALUATIONS, _evaluations(saying)))
    return content.container(title(saying), children, relation=None, template=template.at("report.template"))


def title(saying: Saying) -> Code:
    return saying.template.code("report.title" if saying.findings else "report.title_without_measurements")


def _observer(saying: Saying) -> Iterator[Dataset]:
    """PS3.16 TID 1004: the product with one bundle is the device that observed."""
    bundle = saying.result.bundle
    device = derived_uid("device", busgen_cds.__version__, bundle.digest)
    yield content.coded(OBSERVER_TYPE, DEVICE, OBSERVED)
    yield content.uid(DEVICE_UID, device)
    yield content.text(DEVICE_NAME, f"{PRODUCT} {busgen_cds.__version__}", OBSERVED)
    yield content.text(DEVICE_MANUFACTURER, PRODUCT, OBSERVED)
    yield content.text(DEVICE_MODEL, f"{bundle.name} {bundle.version}", OBSERVED)
    yield content.text(DEVICE_SERIAL, bundle.digest[:16], OBSERVED)


def _evidence(saying: Saying) -> tuple[tuple[Source, ...], tuple[Source, ...]]:
    """The instances that the report's tree refers to, and those left out that say who they are."""
    read = instances([frame.source for frame in saying.study.frames])
    known = {source.sop_instance_uid for source in read}
    left_out = instances([left.source for left in saying.study.not_analysed])
    return read, tuple(
        source
        for source in left_out
        if source.sop_instance_uid not in known
        and source.sop_class_uid
        and source.sop_instance_uid
        and source.series_instance_uid
    )


def _library(saying: Saying) -> Dataset:
    """PS3.16 TID 1600: every image that was looked at."""
    modality = saying.template.code("report.modality")
    entries = [
        content.image(
            SOURCE,
            source,
            content.CONTAINS,
            about=[
                content.coded(MODALITY, modality, ACQUIRED),
                content.number(ROWS, source.rows, PIXELS, relation=ACQUIRED),
                content.number(COLUMNS, source.columns, PIXELS, relation=ACQUIRED),
            ],
        )
        for source in _evidence(saying)[0]
    ]
    return content.container(LIBRARY, [content.container(LIBRARY_GROUP, entries)])


def _group(saying: Saying, number: int) -> Dataset:
    """PS3.16 TID 1501: one finding."""
    template, finding, words = saying.template, saying.findings[number - 1], saying.finding_words(number)
    children = [
        content.text(TRACKING_IDENTIFIER, saying.tracking_identifier(number), OBSERVED),
        content.uid(TRACKING_UID, saying.tracking_uid(number)),
        content.coded(FINDING, template.code("finding.type")),
        content.coded(FINDING_SITE, template.code("finding.site"), MODIFIES, _side(saying, finding)),
        *_algorithm(saying, MODIFIES),
        *_measurements(saying, finding),
        content.coded(template.code("finding.category"), birads.CODES[finding.birads]),
    ]
    if finding.orientation is not None:
        orientation = as_code(template.at("finding.orientations")[finding.orientation], "finding.orientations")
        children.append(content.coded(template.code("finding.orientation"), orientation))
    children.append(content.text(COMMENT, template.text("finding.comment", words)))
    return content.container(GROUP, children, template=template.at("finding.template"))


def _side(saying: Saying, finding: Finding) -> list[Dataset]:
    if finding.laterality is None:
        return []
    side = saying.template.code("finding.left" if finding.laterality == "L" else "finding.right")
    return [content.coded(LATERALITY, side, MODIFIES)]


def _measurements(saying: Saying, finding: Finding) -> Iterator[Dataset]:
    """PS3.16 TID 300, in the template's order; what the finding does not have is left out."""
    where = f"report template {saying.template.name}, finding.measurements"
    for entry in saying.template.at("finding.measurements"):
        value = measured(finding, entry)
        if value is None:
            continue
        unit = as_code(entry["unit"], where)
        children = [content.outline(SOURCE, closed(finding), finding.source)]
        if entry.get("algorithm"):
            children.extend(_algorithm(saying, MODIFIES))
        yield content.number(as_code(entry["name"], where), value, unit, children)


def measured(finding: Finding, entry: Mapping[str, Any]) -> float | None:
    """The value of one of the template's measurements, as it is written."""
    value: float | None = getattr(finding, entry["of"])
    if value is None:
        return None
    return percentage(value) if entry["of"] == "probability" else round(value, _BY_TENTHS)


def _algorithm(saying: Saying, relation: str) -> Iterator[Dataset]:
    """PS3.16 TID 4019."""
    words = {"prevalence": "not used", "calibrated_at": "not used", **saying.words}
    yield content.text(ALGORITHM_NAME, PRODUCT, relation)
    yield content.text(ALGORITHM_VERSION, busgen_cds.__version__, relation)
    for line in saying.template.lines("report.algorithm_parameters", words):
        yield content.text(ALGORITHM_PARAMETERS, line, relation)
    yield content.coded(ALGORITHM_FAMILY, saying.template.code("report.algorithm_family"), relation)


def _evaluations(saying: Saying) -> Iterator[Dataset]:
    """What holds for the study as a whole."""
    result, template, answer = saying.result, saying.template, f"report.{kind_of_answer(saying)}"
    outcome = "outcome_partly" if result.not_analysed else "outcome"
    yield content.coded(OUTCOME, template.code(f"{answer}.{outcome}"))
    if isinstance(result, Assessed):
        if result.birads is not None:
            yield content.coded(template.code("finding.category"), birads.CODES[result.birads])
        if template.at(f"{answer}.probability"):
            yield content.number(PROBABILITY, percentage(result.probability), PERCENT)
    for line in template.lines(f"{answer}.lines", saying.words):
        yield content.text(COMMENT, line)
    yield from _algorithm(saying, content.CONTAINS)


def kind_of_answer(saying: Saying) -> str:
    if isinstance(saying.result, Declined):
        return "declined"
    return "found" if saying.findings else "nothing_found"


def _add_evidence(ds: Dataset, saying: Saying, keyword: str, sources: Sequence[Source]) -> None:
    if not sources:
        return
    study = Dataset()
    put(study, "StudyInstanceUID", saying.study.uid)
    put(study, "ReferencedSeriesSequence", headers.by_series(sources, "ReferencedSOPSequence"))
    put(ds, keyword, [study])


def _add_predecessors(ds: Dataset, saying: Saying) -> None:
    """PS3.3 C.17.2: the reports that this one replaces."""
    reports = [_as_source(old) for old in saying.predecessors("sr")]
    if not reports:
        return
    series = headers.by_series(reports, "ReferencedSOPSequence")
    for item in series:
        for report in item.ReferencedSOPSequence:
            put(report, "PurposeOfReferenceCodeSequence", [headers.code(REPLACED_REPORT)])
    study = Dataset()
    put(study, "StudyInstanceUID", saying.study.uid)
    put(study, "ReferencedSeriesSequence", series)
    put(ds, "PredecessorDocumentsSequence", [study])


def _as_source(old: Replaced) -> Source:
    return Source(old.sop_class_uid, old.sop_instance_uid, old.series_instance_uid, rows=0, columns=0)
