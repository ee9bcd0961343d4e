"""Study, Result → every object that a destination gets, checked and as bytes that never change again.

Rules:
- The same arguments give the same bytes. Keep what comes back and resend it: SOP Instance UIDs hold for the
  Result's revision, so rendering once more at another time would give one UID two contents.
- A profile chooses among the kinds; what an object says is the template's and the Result's affair.
- Declined is said by report and secondary capture; a profile that would say it by neither is refused.
- What was not for us has no Study and gets no objects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import get_args

from pydicom.dataset import Dataset

from busgen_cds.dicom import checks, headers, overlay, report, templates
from busgen_cds.dicom.saying import Replaced, Saying
from busgen_cds.errors import Misconfigured
from busgen_cds.result import Declined, Kind, Rendered, Result
from busgen_cds.study import Study

KINDS: tuple[Kind, ...] = get_args(Kind)
SAYS_DECLINED: tuple[Kind, ...] = ("sr", "sc")


@dataclass(frozen=True)
class Profile:
    """Which kinds of objects a destination gets, and how they are made."""

    kinds: tuple[Kind, ...] = ("sr", "sc", "seg", "pr")  # "ko", the rejection note, only where the PACS takes it
    nominal_geometry: bool = True  # segmentations carry an invented plane, without which OHIF does not load them
    template: str = templates.DEFAULT  # of dicom_sr_templates/

    def __post_init__(self) -> None:
        strangers = sorted(set(self.kinds) - set(KINDS))
        if strangers:
            raise Misconfigured(f"A profile names unknown kinds {strangers}; known: {', '.join(KINDS)}.")
        if not set(self.kinds) & set(SAYS_DECLINED):
            raise Misconfigured(
                "A profile needs 'sr' or 'sc': without them nobody learns that a study was not analysed."
            )

    def takes(self, it: Rendered) -> bool:
        return it.kind in self.kinds


EVERYWHERE = Profile()


def render(
    study: Study,
    result: Result,
    *,
    profile: Profile = EVERYWHERE,
    rendered_at: datetime,
    replaces: Sequence[Replaced] = (),
) -> tuple[Rendered, ...]:
    """All objects for the profile; `rendered_at` is the site's local time, as the objects will show it."""
    saying = Saying(
        study, result, templates.load(profile.template), rendered_at, tuple(replaces), profile.nominal_geometry
    )
    checks.result(saying)
    objects = tuple(headers.finish(ds, kind) for kind in _MAKERS if kind in profile.kinds for ds in _make(kind, saying))
    checks.rendered(objects, saying)
    return objects


def _make(kind: Kind, saying: Saying) -> Sequence[Dataset]:
    if isinstance(saying.result, Declined) and kind in ("seg", "pr"):
        return ()
    return _MAKERS[kind](saying)


def _rejection_notes(saying: Saying) -> tuple[Dataset, ...]:
    return (report.rejection_note(saying),) if saying.predecessors("sr", "sc", "seg", "pr") else ()


_MAKERS: Mapping[Kind, Callable[[Saying], Sequence[Dataset]]] = {
    "sr": lambda saying: (report.structured_report(saying),),
    "sc": overlay.secondary_captures,
    "seg": overlay.segmentations,
    "pr": overlay.presentation_states,
    "ko": _rejection_notes,
}
