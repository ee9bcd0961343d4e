"""Result ⇄ document, as results are kept. Evidence is kept as it was, to the bit: the pages lay it over the frame."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from busgen_cds.result import Assessed, BundleName, Declined, Finding, HeatMap, Result
from busgen_cds.store.result_tables import Outcome
from busgen_cds.study import NotAnalysed, NotForUs, Region, Source


def outcome_of(answer: Result | NotForUs) -> Outcome:
    if isinstance(answer, Assessed):
        return "assessed"
    return "declined" if isinstance(answer, Declined) else "not-for-us"


def to_document(answer: Result | NotForUs) -> dict[str, Any]:
    bare: Any = answer
    if isinstance(answer, Assessed):
        findings = tuple(dataclasses.replace(finding, heat=None) for finding in answer.findings)
        bare = dataclasses.replace(answer, findings=findings, key_heat=None)
    document = {"outcome": outcome_of(answer), **dataclasses.asdict(bare)}
    if isinstance(answer, Assessed):
        document["key_heat"] = _heat_to_document(answer.key_heat)
        for values, finding in zip(document["findings"], answer.findings, strict=True):
            values["heat"] = _heat_to_document(finding.heat)
    return document


def from_document(document: Mapping[str, Any]) -> Result | NotForUs:
    values = dict(document)
    outcome = values.pop("outcome")
    left_out = tuple(NotAnalysed(Source(**each["source"]), each["reason"]) for each in values["not_analysed"])
    values["not_analysed"] = left_out
    if outcome == "not-for-us":
        return NotForUs(**{**values, "received": tuple(map(tuple, values["received"]))})
    values["bundle"] = BundleName(**values["bundle"])
    if outcome == "declined":
        return Declined(**values)
    values["findings"] = tuple(_finding(each) for each in values["findings"])
    values["key_image"] = Source(**values["key_image"]) if values["key_image"] else None
    values["key_heat"] = _heat(values["key_heat"])
    return Assessed(**values)


def _finding(values: Mapping[str, Any]) -> Finding:
    contour = tuple((float(x), float(y)) for x, y in values["contour"])
    source, heat = Source(**values["source"]), _heat(values["heat"])
    return Finding(**{**values, "source": source, "contour": contour, "heat": heat})


def _heat_to_document(heat: HeatMap | None) -> dict[str, Any] | None:
    if heat is None:
        return None
    evidence = np.ascontiguousarray(heat.evidence, "<f4")
    return {"region": heat.region, "shape": evidence.shape, "evidence": base64.b64encode(evidence.tobytes()).decode()}


def _heat(values: Mapping[str, Any] | None) -> HeatMap | None:
    if values is None:
        return None
    evidence = np.frombuffer(base64.b64decode(values["evidence"]), "<f4").reshape(values["shape"])
    return HeatMap(evidence.astype(np.float32), Region(*values["region"]))
