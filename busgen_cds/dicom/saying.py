"""A Result on its way into objects: who says it, when, as which revision, in whose words.

Rules:
- The same Saying gives the same bytes: time is an argument, UIDs are derived, nothing is drawn by lot.
- A UID comes from (study, evidence digest, bundle digest, kind, index, revision) and nothing else; the study is named
  by its UID and the site's reference, so that one received anew after it was shredded gets new UIDs. Whoever renders
  keeps the bytes: rendering again at another time would give the same UIDs another content.
- A number is spelled in one way, so that every object says the same.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Protocol

import busgen_cds
from busgen_cds.dicom.identity import PRODUCT
from busgen_cds.dicom.templates import Template
from busgen_cds.result import Assessed, Declined, Finding, Kind, Result
from busgen_cds.study import Side, Source, Study


class Replaced(Protocol):
    """An object of an earlier revision: a `Rendered`, or what is kept of one."""

    @property
    def kind(self) -> Kind: ...
    @property
    def sop_class_uid(self) -> str: ...
    @property
    def sop_instance_uid(self) -> str: ...
    @property
    def series_instance_uid(self) -> str: ...


@dataclass(frozen=True, eq=False)
class Saying:
    study: Study
    result: Result
    template: Template
    at: datetime  # when it was said, as the site's clock shows it
    replaces: Sequence[Replaced] = ()
    nominal_geometry: bool = True

    def uid(self, *what: object) -> str:
        study, result = self.study, self.result
        named = (study.uid, study.ref) if study.ref else (study.uid,)
        return derived_uid(*named, result.evidence_digest, result.bundle.digest, *what, result.revision)

    def series_number(self, kind: Kind) -> int:
        first, step = self.template.at(f"series.{kind}.number"), self.template.at("series.step")
        return int(first + step * (self.result.revision - 1))

    def series_description(self, kind: Kind) -> str:
        description = str(self.template.at(f"series.{kind}.description"))
        if self.result.revision > 1:
            description = self.template.text("series.revised", {**self.words, "description": description})
        return description[:64]  # PS3.5 6.2: LO

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        return self.result.findings if isinstance(self.result, Assessed) else ()

    @cached_property
    def words(self) -> dict[str, str]:
        """Everything that a template may say of the Result as a whole."""
        result, template = self.result, self.template
        bundle = result.bundle
        said = {
            "product": PRODUCT,
            "version": busgen_cds.__version__,
            "template": template.name,
            "template_version": template.version,
            "bundle": bundle.name,
            "bundle_version": bundle.version,
            "bundle_digest": bundle.digest,
            "bundle_short": bundle.digest[:12],
            "provider": result.provider,
            "revision": str(result.revision),
            "read": str(result.images_read),
            "total": str(result.images_read + len(result.not_analysed)),
            "findings": str(len(self.findings)),
        }
        revised = result.revision > 1
        said["revision_note"] = template.text("words.revision", said) if revised else ""
        said["revision_suffix"] = f" (REV {result.revision})" if revised else ""
        said["left_out"] = "; ".join(self._left_out()) or str(template.at("words.none_left_out"))
        return said | self._answer()

    def finding_words(self, number: int) -> dict[str, str]:
        """Everything that a template may say of one finding; findings count from 1."""
        finding = self.findings[number - 1]
        said = {
            **self.words,
            "number": str(number),
            "birads": finding.birads,
            "probability": percent(finding.probability),
            "uncertainty": percent(finding.uncertainty),
            "long_axis": millimetres(finding.long_axis_mm),
            "short_axis": millimetres(finding.short_axis_mm),
            "orientation": finding.orientation or "",
            "side": self.side(finding.laterality),
            "frame": str(finding.source.frame_number),
            "frames": str(finding.source.frame_count),
            "frames_seen": str(finding.frames_seen),
        }
        sized = finding.long_axis_mm is not None and finding.short_axis_mm is not None
        said["orientation_note"] = self.template.text("picture.orientation", said) if finding.orientation else ""
        said["axes"] = self.template.text("picture.axes" if sized else "picture.axes_unknown", said)
        said["cine"] = self.template.text("picture.cine", said) if finding.source.frame_count > 1 else ""
        return said

    def side(self, laterality: Side | None) -> str:
        key = {"L": "side_left", "R": "side_right", None: "side_unknown"}[laterality]
        return str(self.template.at(f"words.{key}"))

    def tracking_uid(self, number: int) -> str:
        return self.uid("finding", number)

    def tracking_identifier(self, number: int) -> str:
        return self.template.text("finding.tracking_identifier", self.finding_words(number))

    def predecessors(self, *kinds: Kind) -> tuple[Replaced, ...]:
        return tuple(old for old in self.replaces if old.kind in kinds)

    def _answer(self) -> dict[str, str]:
        result = self.result
        if isinstance(result, Declined):
            return {"reason": result.reason}
        return {
            "probability": percent(result.probability),
            "prevalence": percent(result.prevalence),
            "calibrated_at": percent(result.calibrated_at),
            "birads": result.birads or str(self.template.at("words.category_none")),
        }

    def _left_out(self) -> list[str]:
        reasons = Counter(left.reason for left in self.result.not_analysed)
        form = str(self.template.at("words.not_analysed"))
        return [self.template.fill(form, {"count": str(n), "reason": reason}) for reason, n in reasons.items()]


def derived_uid(*what: object) -> str:
    """PS3.5 B.2: a UID below 2.25 is a whole number of at most 128 bits; ours is cut from a SHA-256."""
    named = "\n".join(str(part) for part in (PRODUCT, *what))
    return f"2.25.{int.from_bytes(hashlib.sha256(named.encode()).digest()[:15])}"


def percentage(share: float) -> float:
    """As a number of per cent with the digits that matter: two decimals near the ends, one between."""
    value = 100 * share
    return round(value, 1 if 1 <= value <= 99 else 2)


def percent(share: float) -> str:
    return f"{percentage(share):g} %"


def millimetres(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def instances(sources: Sequence[Source]) -> tuple[Source, ...]:
    """One Source for each instance, in order."""
    return tuple({source.sop_instance_uid: source for source in reversed(sources)}.values())[::-1]
