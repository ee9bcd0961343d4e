"""Reports on storage commitment, for scanners that hung up before they heard ours (PS3.4 J.3.3).

Rules:
- A report goes to the address that the site's settings give for its calling AE title, and to no other.
- It is tried again with a growing delay. What is lost with this process is asked for again by the scanner: it keeps
  its images until it has heard from us.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from busgen_cds.dicom import outbox
from busgen_cds.dicom.association import CommitmentReport, Noted
from busgen_cds.dicom.outbox import Node
from busgen_cds.errors import Misconfigured, Transient

log = logging.getLogger(__name__)

DELAYS = (0.5, 5.0, 30.0, 120.0, 600.0, 3600.0)  # seconds before each try
_MOST = 64  # reports under way: a scanner that asks and hangs up for ever fills nothing


class Reporter:
    def __init__(
        self,
        node_of: Callable[[str], Node | None],
        noted: Callable[[Noted], None] = lambda _noted: None,
        delays: Sequence[float] = DELAYS,
    ) -> None:
        self._node_of, self._noted, self._delays = node_of, noted, delays
        self._free = threading.Semaphore(_MOST)

    def later(self, report: CommitmentReport) -> bool:
        """Whether it will be sent: not without an address."""
        node = self._node_of(report.request.calling_ae)
        if node is None or not self._free.acquire(blocking=False):
            return False
        threading.Thread(target=self._send, args=(report, node), name="commitment", daemon=True).start()
        return True

    def _send(self, report: CommitmentReport, node: Node) -> None:
        reason = ""
        try:
            for delay in self._delays:
                threading.Event().wait(delay)
                try:
                    outbox.report_commitment(report, node)
                except Transient as failed:
                    reason = str(failed)
                    continue
                self._note(report, "commitment reported", "")
                return
            self._note(report, "commitment not reported", reason)
        except Misconfigured as wrong:
            self._note(report, "commitment not reported", str(wrong))
        finally:
            self._free.release()

    def _note(self, report: CommitmentReport, kind: str, what: str) -> None:
        if what:
            log.warning("%s could not be told what is kept: %s", report.request.calling_ae, what)
        self._noted(Noted(kind, report.request.calling_ae, what, report.request.address))
