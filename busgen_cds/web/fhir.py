"""Results as FHIR R4, to be read: ImagingStudy, DiagnosticReport and Observation.

Rules (clinical safety 2):
- A report is `preliminary`, its author a Device; nothing found is said as what was looked at, never as "negative".
- A declined study is a report too: it says NOT ANALYSED and why.
- A resource is named by our own references; the patient stands there by the identifier that came with the images.
- What is not known is left out: FHIR's JSON has no null and no empty list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, HTTPException, Query, Request
from starlette.responses import JSONResponse

from busgen_cds.birads import CODES
from busgen_cds.result import Answer, Assessed, Declined, Finding
from busgen_cds.store.people import Person
from busgen_cds.store.worklist import Row
from busgen_cds.study import NotForUs
from busgen_cds.web import auth
from busgen_cds.web.front import Front
from busgen_cds.web.site import NOT_A_DIAGNOSIS, Slide

MEDIA = "application/fhir+json"
_SYSTEMS = {
    "SCT": "http://snomed.info/sct",
    "DCM": "http://dicom.nema.org/resources/ontology/DCM",
    "BI": "http://www.radlex.org",
}
_DICOM_UID = "urn:dicom:uid"
_UCUM = "http://unitsofmeasure.org"
_SIDES = {"L": ("80248007", "Left breast structure"), "R": ("73056007", "Right breast structure")}
_ISSUES = {
    400: "not-supported",
    401: "login",
    403: "forbidden",
    404: "not-found",
    409: "conflict",
    422: "invalid",
    429: "throttled",
}
_STATES = ("ImagingStudy", "DiagnosticReport", "Observation")


class _Json(JSONResponse):
    media_type = MEDIA


def _described(description: str, resource: str = "") -> dict[str, Any]:
    kind = {"const": resource} if resource else {"type": "string"}
    schema = {"type": "object", "required": ["resourceType"], "properties": {"resourceType": kind}}
    return {"description": description, "content": {MEDIA: {"schema": schema}}}


_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: _described("Why not, as an OperationOutcome.", "OperationOutcome")
    for status in (400, 401, 403, 404, 405, 409, 413, 422, 429, 502, 503)
}
router = APIRouter(tags=["fhir"], default_response_class=_Json, responses=_PROBLEMS)


def outcome(status: int, message: str) -> dict[str, Any]:
    issue = {"severity": "error", "code": _ISSUES.get(status, "exception"), "diagnostics": message}
    return {"resourceType": "OperationOutcome", "issue": [issue]}


@router.get("/metadata", summary="CapabilityStatement", responses={200: _described("It.", "CapabilityStatement")})
def metadata(request: Request) -> dict[str, Any]:
    site = auth.front_of(request).site
    interactions = [{"code": "read"}, {"code": "search-type"}]
    resources = [{"type": kind, "interaction": interactions, "searchParam": _PARAMETERS} for kind in _STATES]
    return {
        "resourceType": "CapabilityStatement",
        "status": "active",
        "date": site.clock().date().isoformat(),
        "kind": "instance",
        "software": {"name": "BUSGen-CDS", "version": site.version},
        "implementation": {"description": f"{site.name}. {NOT_A_DIAGNOSIS}."},
        "fhirVersion": "4.0.1",
        "format": ["json"],
        "rest": [{"mode": "server", "security": {"description": "Bearer token"}, "resource": resources}],
    }


_PARAMETERS = [
    {"name": "identifier", "type": "token", "documentation": "Study Instance UID, or accession number"},
    {"name": "patient.identifier", "type": "token", "documentation": "Patient id, whole"},
    {"name": "_count", "type": "number"},
]


def _understood(request: Request) -> None:
    """A parameter that is passed over would hand out the results of other patients than the one meant."""
    if unknown := set(request.query_params) - {each["name"] for each in _PARAMETERS} - {"_offset", "_format"}:
        known = ", ".join(each["name"] for each in _PARAMETERS)
        raise HTTPException(400, f"This search does not know {', '.join(sorted(unknown))}; it knows {known}.")


@router.get("/{kind}", summary="Search (studies.read)", responses={200: _described("What was found.", "Bundle")})
def search(
    request: Request,
    kind: str,
    identifier: Annotated[str, Query(max_length=128)] = "",
    patient: Annotated[str, Query(alias="patient.identifier", max_length=128)] = "",
    count: Annotated[int, Query(alias="_count", ge=1, le=100)] = 20,
    offset: Annotated[int, Query(alias="_offset", ge=0, le=1_000_000)] = 0,
    person: Person = auth.caller("studies.read"),
) -> dict[str, Any]:
    front = auth.front_of(request)
    _known(kind)
    _understood(request)
    named, whose = _value(identifier), _value(patient)
    rows = front.caught_up().rows("all", search=named or whose, limit=count + 1, offset=offset)
    found = _of_patient(front, rows[:count], whose) if whose else rows[:count]
    entries = [
        {"fullUrl": f"{_base(request)}/{kind}/{each['id']}", "resource": each}
        for row in found
        for each in _of_kind(front, kind, row)
    ]
    for row in found:
        front.looked(person, row.study_ref, row.revision)

    def link(relation: str, at: int) -> dict[str, str]:
        asked = {"identifier": identifier, "patient.identifier": patient, "_count": count, "_offset": at}
        query = urlencode({name: value for name, value in asked.items() if value != ""})
        return {"relation": relation, "url": f"{_base(request)}/{kind}?{query}"}

    links = [link("self", offset), *([link("next", offset + count)] if len(rows) > count else [])]
    return _said({"resourceType": "Bundle", "type": "searchset", "link": links, "entry": entries})


@router.get("/{kind}/{ref}", summary="Read (studies.read)", responses={200: _described("It.")})
def read(request: Request, kind: str, ref: str, person: Person = auth.caller("studies.read")) -> dict[str, Any]:
    front = auth.front_of(request)
    _known(kind)
    row = front.caught_up().row(ref.partition("-")[0])
    found = next((each for each in _of_kind(front, kind, row) if each["id"] == ref), None) if row else None
    if row is None or found is None:
        raise HTTPException(404, f"There is no {kind} with this id.")
    front.looked(person, row.study_ref, row.revision)
    return found


def _value(token: str) -> str:
    """Of a search by system|value; a UID may stand there as a URI."""
    return token.rpartition("|")[2].removeprefix("urn:oid:")


def _of_patient(front: Front, rows: Sequence[Row], patient: str) -> list[Row]:
    """Without those that were found by another identifier which reads the same."""
    patients = front.worklist.patients([row.study_ref for row in rows])
    return [row for row in rows if patients.get(row.study_ref) == patient]


def _said(resource: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in resource.items() if value is not None and value != []}


def _known(kind: str) -> None:
    if kind not in _STATES:
        raise HTTPException(404, f"{kind[:40]} is not among {', '.join(_STATES)}.")


def _base(request: Request) -> str:
    return f"{request.base_url}fhir/r4"


def _of_kind(front: Front, kind: str, row: Row) -> list[dict[str, Any]]:
    if kind == "ImagingStudy":
        return [_imaging_study(front, row)]
    shown = front.results.show(row.result_ref) if row.result_ref else None
    if shown is None:
        return []
    answer, patient = shown.answer, shown.patient_id
    observations = _observations(row, answer, patient)
    return [_report(row, answer, patient, observations)] if kind == "DiagnosticReport" else observations


def _imaging_study(front: Front, row: Row) -> dict[str, Any]:
    uid, patient = front.results.identity(row.study_ref)
    slides = front.site.slides(row.study_ref)
    series: dict[str, list[Slide]] = {}
    for slide in slides:
        series.setdefault(slide.source.series_instance_uid, []).append(slide)
    found = {
        "resourceType": "ImagingStudy",
        "id": row.study_ref,
        "identifier": [{"system": _DICOM_UID, "value": f"urn:oid:{uid}"}],
        "status": "available",
        "modality": [_coding("US", "DCM", "Ultrasound")],
        "subject": _subject(patient),
        "numberOfSeries": len(series),
        "numberOfInstances": len(slides),
        "series": [_series(uid, each) for uid, each in series.items()],
    }
    return _said(found)


def _series(uid: str, slides: list[Slide]) -> dict[str, Any]:
    instances = [
        {
            "uid": each.source.sop_instance_uid,
            "sopClass": {"system": "urn:ietf:rfc:3986", "code": f"urn:oid:{each.source.sop_class_uid}"},
        }
        for each in slides
    ]
    return {
        "uid": uid,
        "modality": _coding("US", "DCM", "Ultrasound"),
        "numberOfInstances": len(slides),
        "instance": instances,
    }


def _report(row: Row, answer: Any, patient: str, observations: list[dict[str, Any]]) -> dict[str, Any]:
    report = {
        "resourceType": "DiagnosticReport",
        "id": f"{row.study_ref}-{row.revision}",
        "status": "preliminary",
        "category": [{"coding": [{"system": "http://terminology.hl7.org/CodeSystem/v2-0074", "code": "RUS"}]}],
        "code": {"coding": [_coding("47079000", "SCT", "Ultrasonography of breast")]},
        "subject": _subject(patient),
        "issued": row.answered_at.isoformat() if row.answered_at else None,
        "performer": [{"type": "Device", "display": _device(answer)}],
        "imagingStudy": [{"reference": f"ImagingStudy/{row.study_ref}"}],
        "result": [{"reference": f"Observation/{each['id']}"} for each in observations],
        "conclusion": _conclusion(answer),
        "conclusionCode": _conclusion_code(answer),
    }
    return _said(report)


def _observations(row: Row, answer: Any, patient: str) -> list[dict[str, Any]]:
    if not isinstance(answer, Assessed):
        return []
    return [_observation(row, answer, patient, n, finding) for n, finding in enumerate(answer.findings, 1)]


def _observation(row: Row, answer: Assessed, patient: str, number: int, finding: Finding) -> dict[str, Any]:
    sizes = (("103339001", "Long axis", finding.long_axis_mm), ("103340004", "Short axis", finding.short_axis_mm))
    components = [
        _component(_coding("111047", "DCM", "Probability of cancer"), round(100 * finding.probability, 2), "%")
    ]
    components += [
        _component(_coding(code, "SCT", words), round(mm, 1), "mm") for code, words, mm in sizes if mm is not None
    ]
    source = finding.source
    observation = {
        "resourceType": "Observation",
        "id": f"{row.study_ref}-{row.revision}-{number}",
        "status": "preliminary",
        "category": [
            {"coding": [{"system": "http://terminology.hl7.org/CodeSystem/observation-category", "code": "imaging"}]}
        ],
        "code": {"coding": [_coding("111005", "DCM", "Assessment Category")]},
        "subject": _subject(patient),
        "effectiveDateTime": row.answered_at.isoformat() if row.answered_at else None,
        "valueCodeableConcept": {"coding": [_category(finding)], "text": f"BI-RADS-style category {finding.birads}"},
        "bodySite": _site(finding),
        "method": {"text": f"AI, prevalence stated {100 * answer.prevalence:g} %. {NOT_A_DIAGNOSIS}."},
        "device": {"display": _device(answer)},
        "derivedFrom": [{"reference": f"ImagingStudy/{row.study_ref}"}],
        "note": [
            {"text": f"Image {source.sop_instance_uid}, frame {source.frame_number}"},
            {"text": f"Uncertainty of the probability: ± {100 * finding.uncertainty:.1f} %"},
        ],
        "component": components,
    }
    return _said(observation)


def _site(finding: Finding) -> dict[str, Any]:
    """Side only as the source states it (clinical safety 6)."""
    code, words = _SIDES[finding.laterality] if finding.laterality else ("76752008", "Breast")
    text = words if finding.laterality else "Breast, side not stated"
    return {"coding": [_coding(code, "SCT", words)], "text": text}


def _category(finding: Finding) -> dict[str, Any]:
    code = CODES[finding.birads]
    coding = _coding(code.value, code.scheme, code.meaning)
    return {**coding, "version": code.version} if code.version else coding


def _conclusion(answer: Any) -> str:
    left = len(answer.not_analysed)
    if isinstance(answer, Assessed):
        images = f"{answer.images_read} of {answer.images_read + left} images analysed"
        if answer.birads is None:
            return f"No lesion found in {images}. {NOT_A_DIAGNOSIS}."
        said = f"BI-RADS-style category {answer.birads}, probability of malignancy {100 * answer.probability:.1f} %"
        return f"{said}; {images}. {NOT_A_DIAGNOSIS}."
    return f"NOT ANALYSED: {answer.reason}. {NOT_A_DIAGNOSIS}."


def _conclusion_code(answer: Any) -> list[dict[str, Any]]:
    if not isinstance(answer, Assessed) or answer.birads is None:
        return []
    code = CODES[answer.birads]
    return [{"coding": [_coding(code.value, code.scheme, code.meaning)]}]


def _device(answer: Answer | NotForUs) -> str:
    if isinstance(answer, Assessed | Declined):
        return f"BUSGen-CDS, bundle {answer.bundle.name} {answer.bundle.version} ({answer.bundle.digest[:12]})"
    return "BUSGen-CDS"


def _subject(patient: str) -> dict[str, Any]:
    return {"identifier": {"value": patient}} if patient else {"display": "not stated"}


def _component(code: dict[str, Any], value: float, unit: str) -> dict[str, Any]:
    return {"code": {"coding": [code]}, "valueQuantity": {"value": value, "unit": unit, "system": _UCUM, "code": unit}}


def _coding(code: str, scheme: str, words: str) -> dict[str, Any]:
    return {"system": _SYSTEMS[scheme], "code": code, "display": words}
