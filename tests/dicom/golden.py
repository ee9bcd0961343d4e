"""The golden reports: what the template says of known Results, as text beside it.

`python -m tests.dicom.golden` makes them again and shows the difference; look at it before it is committed.
"""

from __future__ import annotations

import difflib
import io
import sys
from pathlib import Path

from pydicom import Dataset, dcmread

import busgen_cds
from busgen_cds.dicom import objects
from busgen_cds.result import Rendered, Result
from busgen_cds.study import Study
from tests.dicom import answers

FOLDER = Path(__file__).parents[2] / "dicom_sr_templates"


def known() -> dict[str, str]:
    """Name → text of every golden report."""
    return {name: text(*what) for name, what in _results().items()}


def _results() -> dict[str, tuple[Study, Result]]:
    sided, cine = answers.breast(2, laterality="L", left_out=("colour Doppler",)), answers.breast(1, cine=5)
    empty = answers.breast(2, tissue="normal", spacing=None)
    return {
        "found": (sided, answers.assessed(sided, answers.finding(sided.frames[0]))),
        "found_in_cine_rev2": (
            cine,
            answers.revised(answers.assessed(cine, answers.finding(cine.frames[2], "4C", probability=0.71))),
        ),
        "nothing_found": (empty, answers.assessed(empty)),
        "declined": (empty, answers.declined(empty)),
    }


def text(study: Study, result: Result) -> str:
    """The report's tree, one content item a line."""
    (report,) = objects.render(study, result, profile=objects.Profile(("sr",)), rendered_at=answers.AT)
    return tree(report)


def tree(report: Rendered) -> str:
    ds = dcmread(io.BytesIO(report.data))
    head = [
        f"series {ds.SeriesNumber}: {ds.SeriesDescription}",
        f"{ds.CompletionFlag} {ds.VerificationFlag} {ds.PreliminaryFlag}",
    ]
    # the product's version is not the template's business
    return "\n".join([*head, *_lines(ds, 0), ""]).replace(f"{busgen_cds.__version__}", "VERSION")


def _lines(item: Dataset, depth: int) -> list[str]:
    name = item.ConceptNameCodeSequence[0] if "ConceptNameCodeSequence" in item else None
    called = f"({name.CodeValue}, {name.CodingSchemeDesignator}, {name.CodeMeaning})" if name else "-"
    said = f"{'  ' * depth}{item.get('RelationshipType', 'ROOT')} {item.ValueType} {called}{_value(item)}"
    return [said, *(line for child in item.get("ContentSequence", ()) for line in _lines(child, depth + 1))]


def _value(item: Dataset) -> str:
    if item.ValueType == "TEXT":
        return f" = {item.TextValue}"
    if item.ValueType == "CODE":
        code = item.ConceptCodeSequence[0]
        return f" = ({code.CodeValue}, {code.CodingSchemeDesignator}, {code.CodeMeaning})"
    if item.ValueType == "NUM":
        measured = item.MeasuredValueSequence[0]
        return f" = {measured.NumericValue} {measured.MeasurementUnitsCodeSequence[0].CodeValue}"
    if item.ValueType == "SCOORD":
        return f" = {item.GraphicType} of {len(item.GraphicData) // 2} points from {list(item.GraphicData[:2])}"
    if item.ValueType in ("IMAGE", "COMPOSITE"):
        frame = item.ReferencedSOPSequence[0].get("ReferencedFrameNumber")
        return f" = {item.ReferencedSOPSequence[0].ReferencedSOPClassUID.name}{f', frame {frame}' if frame else ''}"
    if item.ValueType == "UIDREF":
        return " = (a UID)"
    return ""


def main() -> int:
    for name, made in known().items():
        path = FOLDER / f"breast_ultrasound.{name}.golden.txt"
        before = path.read_text("utf-8") if path.exists() else ""
        difference = difflib.unified_diff(before.splitlines(True), made.splitlines(True), str(path), "made now")
        sys.stdout.writelines(difference)
        path.write_text(made, "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
