"""Pathology as other systems write it: a table (CSV), FHIR JSON, or HL7 version 2 ORU messages.

Rules:
- A report is used only with an accession number, a patient id and a code known here; nothing is read out of prose.
- What cannot be used is `Unusable`, with its file and row (or message, or resource); the rest is used, of the file and
  of the files beside it.
- Only final, corrected or amended reports count, and of a report only results that are such.
- A code belongs to the patient and the accession number that it stands under, never to those of a neighbour.
- In situ carcinoma counts as malignant, as it does in the data that the reader learnt from.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from busgen_cds.case import Pathology

COLUMNS = ("accession_number", "patient_id", "pathology", "reported_on")
WORDS: Mapping[str, Pathology] = {"benign": "benign", "malignant": "malignant", "normal": "normal"}
SNOMED: Mapping[str, Pathology] = {
    "363346000": "malignant",  # malignant neoplastic disease
    "254837009": "malignant",  # malignant neoplasm of breast
    "86049000": "malignant",  # malignant neoplasm, primary (morphology)
    "20376005": "benign",  # benign neoplastic disease
    "3898006": "benign",  # benign neoplasm (morphology)
}
FINAL = {"final", "corrected", "amended", "appended"}  # FHIR DiagnosticReport.status
FINAL_HL7 = {"F", "C"}  # HL7 table 0085: final, corrected
_MLLP = "\x0b\x1c"


@dataclass(frozen=True)
class Report:
    accession_number: str = field(repr=False)
    patient_id: str = field(repr=False)
    pathology: Pathology
    reported_on: str  # ISO date
    where: str = field(default="", compare=False)  # it stood


@dataclass(frozen=True)
class Unusable:
    """Where, and what to put right; it names nobody."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


Found = Iterator[Report | Unusable]


def text_of(data: bytes) -> str:
    """UTF-8, or UTF-16 where the file's first bytes say so; an id in any other writing is refused with its row."""
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if wide else "utf-8-sig", "replace")


def read(name: str, text: str, latest: date = date.max) -> list[Report | Unusable]:
    """Every report of a file, dated `latest` at the latest; its kind is seen from its name and its first characters."""
    kind = _kind(name, text)
    if kind is None:
        return [Unusable(name, "neither a table (.csv), FHIR (.json) nor HL7 version 2 (MSH|…)")]
    return [_not_after(latest, one) for one in READERS[kind](name, text)]


def _not_after(latest: date, one: Report | Unusable) -> Report | Unusable:
    if isinstance(one, Report) and date.fromisoformat(one.reported_on) > latest:
        return Unusable(one.where, f"it is dated {one.reported_on}, which is still to come")
    return one


def _kind(name: str, text: str) -> str | None:
    begins = text.lstrip(_MLLP + " \r\n\ufeff")[:4]
    if begins.startswith(("MSH", "BHS", "FHS")):  # a message; a batch or a file of them
        return "hl7"
    if begins.startswith(("{", "[")):
        return "fhir"
    return "csv" if name.lower().endswith(".csv") else None


def meaning(code: str, system: str) -> Pathology | None:
    """A code as benign or malignant: SNOMED CT as listed, ICD-O behaviour, ICD-10 chapters of the breast."""
    code, system = code.strip(), system.strip().lower()
    if "snomed" in system or system in ("sct", "snm"):
        return SNOMED.get(code)
    if "icd-o" in system or system in ("icdo", "icdo3", "i9o"):
        behaviour = re.fullmatch(r"(?:M?-?)\d{4}/(\d)", code)
        return {"0": "benign", "2": "malignant", "3": "malignant"}.get(behaviour[1]) if behaviour else None  # type: ignore[return-value]
    if "icd-10" in system or system in ("i10", "i10p", "icd10"):
        chapter = code.upper().replace(".", "")[:3]
        return {"C50": "malignant", "D05": "malignant", "D24": "benign", "N60": "benign"}.get(chapter)  # type: ignore[return-value]
    return None


def _checked(
    where: str, accession: str, patient: str, found: Pathology | None, said: str, day: str
) -> Report | Unusable:
    if "\ufffd" in accession + patient:
        return Unusable(where, "its accession number or patient id is not written in UTF-8: save the file as UTF-8")
    if not accession.strip():
        return Unusable(where, "no accession number")
    if not patient.strip():
        return Unusable(where, "no patient id")
    if found is None:
        return Unusable(where, said)
    try:
        when = date.fromisoformat(day.strip()[:10])
    except ValueError:
        return Unusable(where, "the date is not written YYYY-MM-DD")
    return Report(accession.strip(), patient.strip(), found, when.isoformat(), where)


# CSV


def _read_csv(name: str, text: str) -> Found:
    """Separated by commas, or by what a spreadsheet of the country puts in their place."""
    heads = text.lstrip("\ufeff").partition("\n")[0]
    table = csv.DictReader(io.StringIO(text.lstrip("\ufeff")), delimiter=max(",;\t", key=heads.count))
    missing = [column for column in COLUMNS if column not in (table.fieldnames or ())]
    if missing:
        yield Unusable(f"{name}, row 1", f"no column {', '.join(missing)}; needed are {', '.join(COLUMNS)}")
        return
    try:
        for row in table:
            yield _of_row(f"{name}, row {table.line_num}", {column: row[column] or "" for column in COLUMNS})
    except csv.Error as broken:
        yield Unusable(f"{name}, row {table.line_num}", f"the table breaks off here: {broken}")


def _of_row(where: str, cells: Mapping[str, str]) -> Report | Unusable:
    found = WORDS.get(cells["pathology"].strip().lower())
    said = f"the pathology is not one of {', '.join(WORDS)}"
    return _checked(where, cells["accession_number"], cells["patient_id"], found, said, cells["reported_on"])


# FHIR R4


def _read_fhir(name: str, text: str) -> Found:
    try:
        document = json.loads(text)
    except ValueError as broken:
        yield Unusable(name, f"no JSON: {broken}")
        return
    resources = _resources(document)
    observations = [r for r in resources if r.get("resourceType") == "Observation"]
    reports = [r for r in resources if r.get("resourceType") == "DiagnosticReport"]
    used = {_last(each.get("reference")) for r in reports for each in _list(r.get("result")) if isinstance(each, dict)}
    alone = [o for o in observations if not o.get("id") or o.get("id") not in used]
    if not reports and not alone:
        yield Unusable(name, "no DiagnosticReport and no Observation in it")
    for resource in (*reports, *alone):
        where = f"{name}, {resource['resourceType']} {resource.get('id') or 'without id'}"
        try:
            yield _of_fhir(where, resource, observations)
        except (AttributeError, TypeError, KeyError, IndexError):
            yield Unusable(where, "it is not shaped as FHIR R4 says")


def _of_fhir(where: str, resource: Mapping[str, Any], observations: list[dict[str, Any]]) -> Report | Unusable:
    if resource.get("status") not in FINAL:
        return Unusable(where, f"its status is {resource.get('status')!r}: only final ones count")
    results = _results(resource, observations)
    if results is None:
        return Unusable(where, "it names a result that is in the file more than once")
    codings = [c for concept in _list(resource.get("conclusionCode")) for c in _list(concept.get("coding"))]
    for each in (resource, *(result for result in results if result.get("status") in FINAL)):
        codings += _list((each.get("valueCodeableConcept") or {}).get("coding"))
    found = {m for c in codings if (m := meaning(str(c.get("code", "")), str(c.get("system", ""))))}
    accession = next((_value(each) for each in _list(resource.get("identifier")) if _is_accession(each)), "")
    for order in _list(resource.get("basedOn")):
        accession = accession or _value(order.get("identifier") or {})
    patient = _value((resource.get("subject") or {}).get("identifier") or {})
    day = str(resource.get("issued") or resource.get("effectiveDateTime") or "")
    return _checked(where, accession, patient, _only(found), _why(found), day)


def _results(report: Mapping[str, Any], observations: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """What a report names and the file holds: `#o1` is in the report itself, whatever else in the file is called o1."""
    own = [each for each in _list(report.get("contained")) if isinstance(each, dict)]
    found: list[dict[str, Any]] = []
    for each in _list(report.get("result")):
        reference = str(each.get("reference") or "")
        among = own if reference.startswith("#") else observations
        named = [one for one in among if one.get("id") == _last(reference)]
        if len(named) > 1:
            return None
        found += named
    return found


def _resources(document: Any) -> list[dict[str, Any]]:
    every = [r for r in (document if isinstance(document, list) else [document]) if isinstance(r, dict)]
    inside = [entry.get("resource") for r in every for entry in _list(r.get("entry")) if isinstance(entry, dict)]
    return [r for r in (*every, *inside) if isinstance(r, dict)]


def _is_accession(identifier: Mapping[str, Any]) -> bool:
    """HL7 table 0203: ACSN."""
    return any(c.get("code") == "ACSN" for c in _list((identifier.get("type") or {}).get("coding")))


def _value(identifier: Mapping[str, Any]) -> str:
    return str(identifier.get("value") or "")


def _last(reference: Any) -> str:
    return str(reference or "").rpartition("/")[2].lstrip("#")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


# HL7 version 2


def _read_hl7(name: str, text: str) -> Found:
    lines = re.split(r"[\r\n]+", text.translate({ord(c): None for c in _MLLP}))
    messages: list[list[str]] = []
    for line in filter(None, (line.strip() for line in lines)):
        if line.startswith("MSH"):
            messages.append([])
        if messages:
            messages[-1].append(line)
    for number, message in enumerate(messages, start=1):
        yield from _of_hl7(f"{name}, message {number}", message)


Segment = list[str]


def _of_hl7(where: str, lines: list[str]) -> Found:
    """PID-3 patient id; OBR-18 accession number (IHE RAD TF-2), OBR-3 without it; OBX-5 codes, OBX-11 status."""
    separators = lines[0][3:8]
    if len(separators) < 5:
        yield Unusable(where, "its MSH segment names no separators")
        return
    component, repeat = separators[1], separators[2]
    segments = [line.split(separators[0]) for line in lines]
    if not _field(segments[0], 8).startswith("ORU"):  # MSH-1 is the separator itself
        yield Unusable(where, "it is no ORU message")
        return
    reports: dict[tuple[str, str], tuple[str, list[Segment]]] = {}
    for pid, obr, results in _orders(segments):
        patient = _field(pid, 3).split(repeat)[0].split(component)[0]
        accession = (_field(obr, 18) or _field(obr, 3)).split(component)[0]
        day = _field(obr, 22) or _field(obr, 7) or _field(segments[0], 6)
        reports.setdefault((accession, patient), (day, []))[1].extend(results)
    for number, ((accession, patient), (day, results)) in enumerate(reports.items(), start=1):
        place = where if len(reports) == 1 else f"{where}, report {number}"
        found, final = _coded(results, component, repeat)
        said = _why(found) if final else "no OBX in it is final (OBX-11 F or C)"
        yield _checked(place, accession, patient, _only(found), said, f"{day[:4]}-{day[4:6]}-{day[6:8]}")


def _orders(segments: list[Segment]) -> Iterator[tuple[Segment, Segment, list[Segment]]]:
    """Each OBR with the PID it stands under and the OBX that stand under it."""
    pid, obr, results = [""], [""], list[Segment]()
    for segment in segments:
        if segment[0] in ("PID", "OBR"):
            if obr != [""]:
                yield pid, obr, results
            pid, obr = (segment, [""]) if segment[0] == "PID" else (pid, segment)
            results = []
        elif segment[0] == "OBX":
            results.append(segment)
    yield pid, obr, results


def _coded(results: list[Segment], component: str, repeat: str) -> tuple[set[Pathology], bool]:
    """What the final ones say, and whether any is final."""
    final = [segment for segment in results if _field(segment, 11) in FINAL_HL7]
    found: set[Pathology] = set()
    for segment in final:
        for value in _field(segment, 5).split(repeat):
            parts = [*value.split(component), "", "", "", "", "", ""]
            found |= {m for m in (meaning(parts[0], parts[2]), meaning(parts[3], parts[5])) if m}
    return found, bool(final)


def _field(segment: list[str], number: int) -> str:
    return segment[number] if len(segment) > number else ""


def _only(found: set[Pathology]) -> Pathology | None:
    return next(iter(found)) if len(found) == 1 else None


def _why(found: set[Pathology]) -> str:
    return (
        "its codes say both benign and malignant"
        if found
        else "no code in it that is known here (SNOMED CT, ICD-O, ICD-10)"
    )


READERS: Mapping[str, Callable[[str, str], Found]] = {"csv": _read_csv, "fhir": _read_fhir, "hl7": _read_hl7}
