"""Pathology is read from what other systems write, and what cannot be used names its place."""

from __future__ import annotations

import json
from datetime import date

import pytest

from busgen_cds import pathology, truth
from busgen_cds.pathology import Report, Unusable
from busgen_cds.truth import Conflict, Known, Open, Opinion

REPORT = Report("A1", "P1", "malignant", "2026-03-04")


def test_a_table_is_read_and_a_bad_row_is_named() -> None:
    """A row that cannot be used is refused with its file and row, and the others are used."""
    rows = ("A1,P1,Malignant,2026-03-04", "A2,P2,perhaps,2026-03-04", ",P3,benign,2026-03-04", "A4,P4,benign,4.3.26")
    text = "\n".join(("accession_number,patient_id,pathology,reported_on", *rows))
    first, *bad = pathology.read("lab.csv", text)
    assert first == REPORT
    assert [str(each).split(":")[0] for each in bad] == ["lab.csv, row 3", "lab.csv, row 4", "lab.csv, row 5"]
    assert "pathology is not one of" in str(bad[0])


def test_a_report_from_the_future_is_refused() -> None:
    """A year typed wrong is said with its row; a report of the last day that counts is used."""
    rows = (
        "accession_number,patient_id,pathology,reported_on",
        "A1,P1,malignant,2026-03-04",
        "A2,P2,benign,2062-03-04",
    )
    known, wrong = pathology.read("lab.csv", "\n".join(rows), date(2026, 3, 4))
    assert known == REPORT
    assert str(wrong) == "lab.csv, row 3: it is dated 2062-03-04, which is still to come"


def test_a_table_without_a_column_is_refused_whole() -> None:
    """A missing column is said with its name."""
    (refused,) = pathology.read("lab.csv", "accession_number,pathology,reported_on\nA1,benign,2026-01-01\n")
    assert str(refused).startswith("lab.csv, row 1: no column patient_id")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_table_is_read_as_a_spreadsheet_writes_it(separator: str, encoding: str) -> None:
    """A spreadsheet's separator and encoding differ by country: ids and rows are read all the same."""
    rows = (pathology.COLUMNS, ("A1", "MÜL-1", "malignant", "2026-03-04"))
    data = "\r\n".join(separator.join(row) for row in rows).encode(encoding)
    assert pathology.read("lab.csv", pathology.text_of(data)) == [Report("A1", "MÜL-1", "malignant", "2026-03-04")]


def fhir(**changed: object) -> str:
    code = {"coding": [{"system": "http://snomed.info/sct", "code": "363346000"}]}
    report = {
        "resourceType": "DiagnosticReport", "id": "r1", "status": "final", "issued": "2026-03-04T10:00:00Z",
        "identifier": [{"type": {"coding": [{"code": "ACSN"}]}, "value": "A1"}],
        "subject": {"identifier": {"value": "P1"}}, "result": [{"reference": "Observation/o1"}],
    }  # fmt: skip
    seen = {"resourceType": "Observation", "id": "o1", "status": "final", "valueCodeableConcept": code}
    entries = [{"resource": report | changed}, {"resource": seen}]
    return json.dumps({"resourceType": "Bundle", "entry": entries})


def test_a_fhir_report_is_read_with_its_observations() -> None:
    """A DiagnosticReport takes its codes from the Observations that it names."""
    assert pathology.read("r.json", fhir()) == [REPORT]


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"status": "preliminary"}, "only final"),
        ({"identifier": []}, "no accession number"),
        ({"subject": {}}, "no patient id"),
        ({"result": []}, "no code in it that is known"),
        ({"conclusionCode": [{"coding": [{"system": "ICD-10", "code": "D24"}]}]}, "both benign and malignant"),
        ({"subject": "P1"}, "not shaped as FHIR"),
    ],
)
def test_a_fhir_report_that_says_too_little_is_refused_with_its_resource(changed: dict[str, object], why: str) -> None:
    """A report without identity, finality or a known code is refused by name."""
    found = [each for each in pathology.read("r.json", fhir(**changed)) if "DiagnosticReport" in str(each)]
    assert isinstance(found[0], Unusable) and why in found[0].reason
    assert str(found[0]).startswith("r.json, DiagnosticReport r1")


def told(number: str, snomed: str, status: str = "final") -> dict[str, object]:
    """A report that carries its result within itself, as most laboratories send it: each calls it o1."""
    code = {"coding": [{"system": "http://snomed.info/sct", "code": snomed}]}
    inside = {"resourceType": "Observation", "id": "o1", "status": status, "valueCodeableConcept": code}
    return {
        "resourceType": "DiagnosticReport", "id": f"r{number}", "status": "final", "issued": "2026-03-04",
        "identifier": [{"type": {"coding": [{"code": "ACSN"}]}, "value": f"A{number}"}], "contained": [inside],
        "subject": {"identifier": {"value": f"P{number}"}}, "result": [{"reference": "#o1"}],
    }  # fmt: skip


def test_a_report_has_its_own_results_and_not_its_neighbours() -> None:
    """Two patients' reports in one file, each with a result of the same name: each keeps its own."""
    one, other = told("1", "3898006"), told("2", "363346000")
    wrapped = {"resourceType": "Bundle", "entry": [{"resource": one}, {"resource": other}]}
    for document in ([one, other], wrapped):
        assert [(r.patient_id, r.pathology) for r in pathology.read("r.json", json.dumps(document))] == [  # type: ignore[union-attr]
            ("P1", "benign"),
            ("P2", "malignant"),
        ]


def test_a_result_that_was_entered_in_error_says_nothing() -> None:
    """A final report may name a result that was taken back."""
    (found,) = pathology.read("r.json", json.dumps(told("1", "363346000", "entered-in-error")))
    assert isinstance(found, Unusable) and "no code" in found.reason


def test_two_results_of_one_name_are_not_guessed() -> None:
    """Where a file holds the result that a report names twice, nobody chooses one."""
    document = json.loads(fhir())
    document["entry"].append(document["entry"][1])
    found = [each for each in pathology.read("r.json", json.dumps(document)) if "DiagnosticReport" in str(each)]
    assert [each.reason for each in found] == ["it names a result that is in the file more than once"]  # type: ignore[union-attr]


def test_what_is_not_written_in_utf_8_is_said() -> None:
    """An id whose letters were lost would match nobody, without a word."""
    text = "accession_number,patient_id,pathology,reported_on\nA1,M\u00dcLLER-1,benign,2026-01-01\n"
    (found,) = pathology.read("lab.csv", pathology.text_of(text.encode("latin-1")))
    assert isinstance(found, Unusable) and "UTF-8" in found.reason
    (broken,) = pathology.read("lab.csv", text.replace("A1", "A" * 200_000))
    assert isinstance(broken, Unusable) and "breaks off" in broken.reason


def oru(code: str = "8500/3^Infiltrating duct carcinoma^ICDO3", status: str = "F", accession: str = "A1") -> str:
    obr = ["OBR", "1", "", "", "88305", *[""] * 13, accession, "", "", "", "20260304"]
    obx = ["OBX", "1", "CE", "22637-3", "", code, *[""] * 5, status]
    lines = [
        "MSH|^~\\&|LAB|H|X|Y|20260304101010||ORU^R01|1|P|2.5",
        "PID|1||P1^^^H^MR~OTHER",
        "|".join(obr),
        "|".join(obx),
    ]
    return "\x0b" + "\r".join(lines) + "\x1c\r"


def test_an_oru_message_is_read() -> None:
    """HL7 version 2: the patient id, the accession number and an ICD-O morphology."""
    assert pathology.read("m.hl7", oru()) == [REPORT]
    assert pathology.read("m.hl7", oru("9010/0^Fibroadenoma^ICDO3") + oru()) == [
        Report("A1", "P1", "benign", "2026-03-04"),
        REPORT,
    ]
    assert pathology.read("day.hl7", f"FHS|^~\\&|LAB\rBHS|^~\\&|LAB\r{oru()}BTS|1\rFTS|1\r") == [REPORT]


def test_a_message_of_several_orders_or_patients_is_not_mixed() -> None:
    """A code belongs to the order and the patient it stands under; orders of one accession number are one report."""

    def order(accession: str, code: str) -> list[str]:
        return oru(code, accession=accession).strip("\x0b\x1c\r").split("\r")[2:]

    cancer, remark = "8500/3^Infiltrating duct carcinoma^ICDO3", "see text^x^L"
    head, first, second = oru().strip("\x0b\x1c\r").split("\r")[0], "PID|1||P1^^^H^MR", "PID|2||P2"
    noted, proven = pathology.read("m.hl7", "\r".join([head, first, *order("A1", remark), *order("A2", cancer)]))
    assert isinstance(noted, Unusable) and noted.where == "m.hl7, message 1, report 1"
    assert proven == Report("A2", "P1", "malignant", "2026-03-04")
    two = "\r".join([head, first, order("A1", "")[0], second, *order("A2", cancer)])
    assert pathology.read("m.hl7", two)[1] == Report("A2", "P2", "malignant", "2026-03-04")
    assert pathology.read("m.hl7", "\r".join([head, first, *order("A1", remark), *order("A1", cancer)])) == [REPORT]


@pytest.mark.parametrize(
    ("message", "why"),
    [(oru(status="P"), "no OBX in it is final"), (oru("unclear^x^L"), "no code"), (oru(accession=""), "accession")],
)
def test_an_oru_message_that_cannot_be_used_is_numbered(message: str, why: str) -> None:
    """A message that is not final or has no known code is refused with its number."""
    (found,) = pathology.read("m.hl7", message)
    assert isinstance(found, Unusable) and why in found.reason and found.where == "m.hl7, message 1"


def test_another_kind_of_file_is_refused() -> None:
    """A file of no known kind, and one that breaks off, is refused by name."""
    (refused,) = pathology.read("notes.txt", "malignant, I think")
    (broken,) = pathology.read("lab.json", '{"resourceType": ')
    assert isinstance(refused, Unusable) and refused.where == "notes.txt"
    assert isinstance(broken, Unusable) and str(broken).startswith("lab.json: no JSON")


AGREE, EDIT = Opinion("agree", "3"), Opinion("edit", "5")


@pytest.mark.parametrize(
    ("opinion", "final", "proven", "standing", "expected"),
    [
        (AGREE, None, (), 1, Known("benign", "reader")),
        (EDIT, None, (), 1, Known("malignant", "reader")),
        (Opinion("agree", "4A"), None, (), 1, Open),
        (Opinion("agree", "4A"), None, ("malignant",), 1, Known("malignant", "pathology")),
        (AGREE, None, ("malignant",), 1, Conflict),
        (EDIT, None, ("benign",), 1, Conflict),
        (None, None, ("benign",), 3, Known("benign", "pathology")),
        (None, None, ("malignant",), 2, Conflict),
        (None, None, ("benign", "malignant"), 1, Conflict),
        (None, "5", (), 1, Known("malignant", "report")),
        (None, "5", (), 2, Open),
        (AGREE, "5", (), 1, Conflict),
        (Opinion("reject", "3", "artefact"), None, (), 0, Known("normal", "reader")),
        (Opinion("reject", "3", "image not usable"), None, (), 0, Open),
        (Opinion("reject", "5", "artefact"), None, ("malignant",), 0, Conflict),
        (Opinion("reject", "3", "artefact"), None, ("malignant",), 1, Known("normal", "reader")),
        (None, None, (), 1, Open),
    ],
)
def test_truth_is_decided_or_shown_never_guessed(
    opinion: Opinion | None, final: str | None, proven: tuple[truth.Pathology, ...], standing: int, expected: object
) -> None:
    """What was said in two ways is a conflict; what says neither stays open."""
    found = truth.of_finding(opinion, final, proven, standing=standing)
    assert found == expected or (isinstance(expected, type) and isinstance(found, expected))
