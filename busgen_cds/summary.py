"""A study's answer as one plain document: what `results.json`, the API and the pages show.

Rules:
- One object per study, also for a refusal; `outcome` says which it is, `reason` why not.
- Probabilities are 0 to 1; x, y are 0-based pixels of the full source frame; frames count from 1; unknown is null.
- `prevalence.stated` is what somebody stated; null where nobody did, and then `used` is what was assumed.
- No name and no patient id is in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from busgen_cds.result import Assessed, Finding, Result
from busgen_cds.study import NotAnalysed, NotForUs, Source


def of_result(result: Result, objects: Iterable[str] = (), *, prevalence_stated: bool = True) -> dict[str, Any]:
    assessed = result if isinstance(result, Assessed) else None
    return {
        "study_instance_uid": result.study_uid,
        "outcome": "assessed" if assessed else "declined",
        "reason": None if isinstance(result, Assessed) else result.reason,
        "revision": result.revision,
        "bundle": {"name": result.bundle.name, "version": result.bundle.version, "digest": result.bundle.digest},
        "provider": result.provider,
        "prevalence": assessed and _prevalence(assessed, stated=prevalence_stated),
        "study": {
            "probability_of_malignancy": assessed.probability if assessed else None,
            "birads": assessed.birads if assessed else None,
        },
        "findings": [_finding(each) for each in assessed.findings] if assessed else [],
        "images_read": result.images_read,
        "images_not_analysed": [_left_out(each) for each in result.not_analysed],
        "objects": list(objects),
        "seconds": round(result.seconds, 3),
    }


def of_not_for_us(answer: NotForUs, seconds: float) -> dict[str, Any]:
    return {
        "study_instance_uid": answer.study_uid,
        "outcome": "not-for-us",
        "reason": answer.reason,
        "revision": None,
        "bundle": None,
        "provider": None,
        "prevalence": None,
        "study": {"probability_of_malignancy": None, "birads": None},
        "findings": [],
        "images_read": 0,
        "images_not_analysed": [_left_out(each) for each in answer.not_analysed],
        "objects": [],
        "seconds": round(seconds, 3),
    }


def _prevalence(result: Assessed, *, stated: bool) -> dict[str, float | None]:
    return {
        "stated": result.prevalence if stated else None,
        "used": result.prevalence,
        "calibrated_at": result.calibrated_at,
    }


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "probability_of_malignancy": finding.probability,
        "birads": finding.birads,
        "uncertainty": finding.uncertainty,
        "laterality": finding.laterality,
        "frame": _frame(finding.source),
        "contour": [[round(x, 1), round(y, 1)] for x, y in finding.contour],
        "long_axis_mm": finding.long_axis_mm,
        "short_axis_mm": finding.short_axis_mm,
        "orientation": finding.orientation,
    }


def _left_out(left: NotAnalysed) -> dict[str, Any]:
    return {**_frame(left.source), "reason": left.reason}


def _frame(source: Source) -> dict[str, Any]:
    return {"sop_instance_uid": source.sop_instance_uid, "frame_number": source.frame_number}
