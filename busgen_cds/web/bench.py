"""Where images are made for the laboratory's page: one run at a time, the last ones of each person kept in memory.

Rules: what one person had made, another does not see; a run that fails says so, and lets the next one begin.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from fastapi import HTTPException

from busgen_cds.errors import Misconfigured

KEPT_RUNS = 8

log = logging.getLogger("busgen_cds.web")


class Picture(Protocol):
    @property
    def image(self) -> bytes: ...
    @property
    def mask(self) -> bytes: ...
    @property
    def facts(self) -> Mapping[str, Any]: ...


class Studio(Protocol):
    """What makes the images."""

    def problem(self) -> str: ...
    def choices(self) -> Mapping[str, tuple[str, ...]]: ...
    def healthy(self) -> tuple[str, ...]: ...
    def healthy_png(self, name: str) -> bytes: ...
    def make(
        self, count: int, asked: Mapping[str, Any], seed: int, tell: Callable[[int, int], None]
    ) -> Iterator[Picture | None]: ...


@dataclass
class Run:
    """One wish, and what has come of it so far."""

    owner: str
    count: int
    asked: Mapping[str, Any]
    seed: int
    ref: str = field(default_factory=lambda: secrets.token_hex(16))
    pictures: list[Picture] = field(default_factory=list)
    dropped: int = 0
    step: int = 0
    steps: int = 0
    problem: str = ""
    over: bool = False

    def state(self) -> dict[str, Any]:
        return {
            "pictures": [dict(each.facts) for each in self.pictures],
            "count": self.count,
            "dropped": self.dropped,
            "step": self.step,
            "steps": self.steps,
            "problem": self.problem,
            "over": self.over,
        }


class Bench:
    """The runs of all persons: one is made at a time, the last ones are kept."""

    def __init__(self, open_studio: Callable[[], Studio]) -> None:
        self._open = open_studio
        self._runs: OrderedDict[str, Run] = OrderedDict()
        self._busy = threading.Lock()

    @cached_property
    def studio(self) -> Studio:
        """Opened when the page is first asked for: it brings the training packages with it."""
        return self._open()

    def begin(self, run: Run) -> None:
        if not self._busy.acquire(blocking=False):
            raise HTTPException(409, "Images are being made for somebody: try again when they are done.")
        self._runs[run.ref] = run
        mine = [ref for ref, each in self._runs.items() if each.owner == run.owner]
        for ref in mine[:-KEPT_RUNS]:
            del self._runs[ref]
        threading.Thread(target=self._make, args=(run,), name="laboratory", daemon=True).start()

    def run(self, ref: str, owner: str) -> Run:
        run = self._runs.get(ref)
        if run is None or run.owner != owner:
            raise HTTPException(404, "These images are not kept any more: have them made again, with the same seed.")
        return run

    def _make(self, run: Run) -> None:
        def tell(step: int, steps: int) -> None:
            run.step, run.steps = step, steps

        try:
            for picture in self.studio.make(run.count, run.asked, run.seed, tell):
                if picture is None:
                    run.dropped += 1
                else:
                    run.pictures.append(picture)
        except Misconfigured as wrong:
            run.problem = str(wrong)
        except Exception:
            number = secrets.token_hex(4)
            log.exception("Failure %s while images were made", number)
            run.problem = f"Something failed here; tell your administrator number {number}."
        finally:
            self._busy.release()
            run.over = True
