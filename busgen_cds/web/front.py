"""The one thing every route stands on: the site, its stores opened for the pages, limits, and news of changes.

Rules:
- The record of acts is the clock of changes: whoever follows the worklist is told when it moved, never what moved.
- Seeing a study is an act; the same person opening it again within minutes is the same act.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import sqlalchemy as sa

from busgen_cds.store import audit
from busgen_cds.store.audit import Act
from busgen_cds.store.cases import Cases, Unfit
from busgen_cds.store.jobs import Jobs
from busgen_cds.store.people import People, Person
from busgen_cds.store.results import Results
from busgen_cds.store.worklist import Row, Worklist
from busgen_cds.study import Patient
from busgen_cds.web.bench import Bench
from busgen_cds.web.site import LiveBundle, Site

LOG_INS_PER_MINUTE = 30
CALLS_PER_MINUTE = 1200
PASSPHRASES_PER_MINUTE = 5
SAME_LOOK = timedelta(minutes=10)
_PICTURES = -1  # in the place of a revision


@dataclass
class Limit:
    """So many a minute for each caller, refilled steadily."""

    per_minute: int
    _left: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, caller: str) -> bool:
        now = time.monotonic()
        with self._lock:
            left, at = self._left.pop(caller, (float(self.per_minute), now))
            left = min(self.per_minute, left + (now - at) * self.per_minute / 60)
            self._left[caller] = (max(0.0, left - 1), now)
            while len(self._left) > 10_000:
                self._left.popitem(last=False)
        return left >= 1


class Front:
    def __init__(self, site: Site) -> None:
        self.site = site
        self.people = People(site.database, site.vault, site.clock)
        self.cases = Cases(site.database, site.vault, site.clock)
        self.results = Results(site.database, site.vault, site.clock)
        self.jobs = Jobs(site.database, site.clock)
        self.worklist = Worklist(site.database, site.vault, site.triage)
        self.log_ins, self.calls = Limit(LOG_INS_PER_MINUTE), Limit(CALLS_PER_MINUTE)
        self.passphrases = Limit(PASSPHRASES_PER_MINUTE)
        self.bench = Bench(site.studio) if site.studio else None
        self._looks: OrderedDict[tuple[str, str, int], float] = OrderedDict()
        self._lock = threading.Lock()

    def bundle(self) -> LiveBundle | None:
        return self.site.bundle()

    def caught_up(self) -> Worklist:
        """The worklist as it is now."""
        self.worklist.catch_up()
        return self.worklist

    def take_up(self, row: Row, person: Person, patient: str = "", issuer: str = "") -> Sequence[str]:
        """What is stuck for a study goes on; what is not is left alone. With the images of two patients under it, as
        the study of the one who is stated."""
        if row.stuck == "held":
            whose = self._one_of(row.study_ref, patient, issuer) if patient else None
            self.site.release(row.study_ref, person.name, whose)
            taken: Sequence[str] = ["released"]
        else:
            taken = self.site.retry(row.study_ref, person.name) if row.stuck else []
        self.worklist.refresh(row.study_ref)
        return taken

    def patients_in(self, study_ref: str) -> dict[Patient, int]:
        """Whose the images of a study say they are, and how many pictures and clips each has."""
        return dict(Counter(slide.patient for slide in self.site.slides(study_ref) if slide.patient.id))

    def _one_of(self, study_ref: str, patient: str, issuer: str) -> Patient:
        stated = Patient(patient, issuer=issuer)
        if stated not in self.patients_in(study_ref):
            raise Unfit("No image of this study carries that patient id: state one that stands in its images.")
        return stated

    def last_act(self) -> int:
        with self.site.database.reading() as session:
            return session.execute(sa.select(sa.func.max(audit.ActRow.number))).scalar() or 0

    def looked(self, person: Person, study_ref: str, revision: int) -> None:
        act = Act("result viewed", person.name, "", study_ref, {"revision": revision})
        self._look(person, study_ref, revision, act)
        self._first_look(person, study_ref, _PICTURES)

    def pictured(self, person: Person, study_ref: str) -> None:
        """A picture, or a list with answers in it, is a look as well, if the study does not lie open already."""
        self._look(person, study_ref, _PICTURES, Act("images viewed", person.name, "", study_ref))

    def refused(self, person: Person, right: str, route: str) -> None:
        self.note(Act("refused", person.name, f"needs {right}", None, {"path": route}))

    def _look(self, person: Person, study_ref: str, what: int, act: Act) -> None:
        if not self._first_look(person, study_ref, what):
            return
        try:
            self.note(act)
        except Exception:
            with self._lock:
                self._looks.pop((person.name, study_ref, what), None)  # it was not recorded: the next one is
            raise

    def _first_look(self, person: Person, study_ref: str, what: int) -> bool:
        """The first within minutes."""
        now, key = time.monotonic(), (person.name, study_ref, what)
        with self._lock:
            before = self._looks.get(key)
            if before is not None and now - before < SAME_LOOK.total_seconds():
                return False
            self._looks[key] = now
            while len(self._looks) > 10_000:
                self._looks.popitem(last=False)
        return True

    def note(self, act: Act) -> None:
        with self.site.database.transaction() as session:
            audit.record(session, act, at=self.site.clock())
