"""A worker: it runs the workflows on DBOS, sweeps up what nobody asked for, and takes over from the dead.

Rules:
- A worker has a stable name, so that what it began is found again when it comes back, and the shape of the workflows
  is pinned, so that they are recovered into the steps they know.
- At start, and every half minute, whatever was received and not read is put to work, and whatever is due and not on
  its way is sent. Half minutes look at the last days; each hour, and when a stopped engine goes on, at everything.
- Each worker looks every second which bundle is live, and reads the next study with that one.
- A bundle in shadow reads along here, when nothing else is to be read.
- Each worker says in our own database that it is alive. A living one takes over the workflows of one that fell silent.
- DBOS keeps its own database, apart from ours, and tells nobody about us: no telemetry, no console, no admin server.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import timedelta

from dbos import DBOS, DBOSConfig

from busgen_cds.errors import Misconfigured, Untrusted
from busgen_cds.flows import deliver, desk, read_study, services
from busgen_cds.flows.desk import APPLICATION, COMPLETE, DELIVER, READ, SHAPE, Desk
from busgen_cds.flows.services import Services, log
from busgen_cds.flows.shadow import Companion

_FLOWS = (read_study.complete_study, read_study.read_study, deliver.deliver_result)  # registered by being imported
_LATELY = timedelta(days=2)
_KEPT = timedelta(days=30)  # ended workflows, longer than any delivery is tried
_HOUSEKEEPING_SECONDS = _THOROUGH_SECONDS = 3600.0


class Worker:
    """One at a time in a process: DBOS knows no more."""

    def __init__(
        self,
        stations: Services,
        *,
        workflows_url: str,
        name: str,
        readings: int = 1,
        deliveries: int = 4,
        companion: Companion | None = None,
    ) -> None:
        self.stations, self.name, self.companion = stations, name, companion
        self._url, self._readings, self._deliveries = workflows_url, readings, deliveries
        self.desk = Desk(workflows_url, stations.results, stations.jobs, stations.waits)
        self._ending = threading.Event()
        self._swept = stations.clock()  # when the last sweep of readings began that came to its end
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        desk.prepare(self._url)
        services.use(self.stations)
        read_study.use(self.desk)
        self.stations.jobs.beat(self.name)  # before it takes any work: whoever dies with some is missed
        self._launch()
        self._repeat("heartbeat", self.stations.waits.heartbeat, self._beat)
        self.sweep(thorough=True)
        self._repeat("live bundle", self.stations.waits.follow, self._follow)
        self._repeat("sweep", self.stations.waits.sweep, self.sweep)
        self._repeat("thorough sweep", _THOROUGH_SECONDS, lambda: self.sweep(thorough=True))
        self._repeat("housekeeping", _HOUSEKEEPING_SECONDS, self._forget)
        if self.companion is not None:
            self._repeat("shadow", self.stations.waits.shadow, self._read_along)
        if self.stations.watch is not None:
            self._repeat("drift", self.stations.waits.drift, self.stations.watch.look)

    def stop(self) -> None:
        """End cleanly: what is under way is taken up again at the next start, or by another worker."""
        self._ending.set()
        for thread in self._threads:
            thread.join(timeout=10)
        DBOS.destroy()
        if self.companion is not None:
            self.companion.close()
        if not self.desk.has_work(self.name):
            self.stations.jobs.leave(self.name)
        self.desk.close()
        services.use(None)
        read_study.use(None)

    def sweep(self, *, thorough: bool = False) -> int:
        """Ask again for everything that is not done and not on its way; how much that was."""
        asked = self._sweep_readings(thorough) + self._sweep_deliveries()
        if asked:
            log.info("Sweep: %d studies or deliveries put to work.", asked)
        return asked

    # -- inside ------------------------------------------------------------------------------------------------------

    def _launch(self) -> None:
        logging.getLogger("dbos").setLevel(logging.WARNING)
        config: DBOSConfig = {
            "name": APPLICATION,
            "system_database_url": self._url,
            "executor_id": self.name,
            "application_version": SHAPE,
            "log_level": "WARNING",  # below it stands the advertisement
            "enable_otlp": False,
            "run_migrations": False,
            "serializer": desk.Words(),
        }
        DBOS(config=config)
        DBOS.launch()
        poll = self.stations.waits.poll
        for queue, at_once in ((COMPLETE, 32), (READ, self._readings), (DELIVER, self._deliveries)):
            DBOS.register_queue(
                queue, worker_concurrency=at_once, polling_interval_sec=poll, on_conflict="always_update"
            )

    def _sweep_readings(self, thorough: bool) -> int:
        if self.stations.jobs.engine_stopped() is not None:
            return 0
        now, waits = self.stations.clock(), self.stations.waits
        thorough = thorough or self.stations.jobs.resumed_since(self._swept)
        patience = waits.silence + waits.sweep / 3 + (waits.count if self.stations.query_node else 0.0)
        settled = now if thorough else now - timedelta(seconds=patience)
        unread = self.stations.results.unread(
            settled_before=settled, received_after=None if thorough else now - _LATELY
        )
        parked = {job.study_ref for job in self.stations.jobs.all("parked")}
        waiting = self.stations.jobs.all("waiting")
        under_way = self.desk.under_way(waiting)
        asked = [ref for ref in unread if ref not in under_way and (ref not in parked or self._grew(ref))]
        for study_ref in asked:
            self.desk.arrived(study_ref)
        # Jobs that nobody does, of studies with no image unread: held as they were asked for once more, or released.
        left = [job for job in waiting if job.study_ref not in under_way and job.study_ref not in unread]
        for job in left:
            self.desk.read(job.study_ref, job.evidence_digest)
        self._swept = now
        return len(asked) + len(left)

    def _grew(self, study_ref: str) -> bool:
        """A parked study that got more images is another job."""
        job = self.stations.jobs.of(study_ref)
        instances = self.stations.inbox.instances(study_ref)
        return job is None or job.evidence_digest != read_study.digest_of(
            instances, self.stations.results, self.stations.inbox.stated(study_ref)
        )

    def _sweep_deliveries(self) -> int:
        overdue = self.stations.clock() - timedelta(seconds=self.stations.waits.sweep / 3)
        due = self.stations.deliveries.under_way(due_before=overdue)
        self.desk.hasten(due)  # one that still waits for its hour was to go before it, and nobody said so
        return sum(self.desk.deliver(delivery) == "asked" for delivery in due)

    def _follow(self) -> None:
        """Read with what is live. A word or a bundle that cannot be used stops the engine until a person resumes it."""
        if self.stations.jobs.engine_stopped() is not None:
            return
        try:
            self.stations.follow()
        except (Untrusted, Misconfigured) as error:
            log.error("The live bundle cannot be used: %s", error)
            self.stations.jobs.stop_engine(str(error))

    def _read_along(self) -> None:
        if self.companion is not None and self.stations.jobs.engine_stopped() is None:
            self.companion.turn(self.stations, self._ending.is_set)

    def _forget(self) -> None:
        while self.desk.forget(self.stations.clock() - _KEPT):
            pass

    def _beat(self) -> None:
        jobs, silent_for = self.stations.jobs, timedelta(seconds=self.stations.waits.silent)
        jobs.beat(self.name)
        for silent in jobs.silent(since=silent_for, but=self.name):
            # DBOS's own recovery: it takes only what is still marked as the dead one's, so that two of us may do it.
            taken = DBOS._recover_pending_workflows([silent])
            log.warning("Worker %s fell silent: %d workflows taken over.", silent, len(taken))
            jobs.taken_over(silent, self.name)

    def _repeat(self, name: str, every: float, do: Callable[[], object]) -> None:
        def run() -> None:
            while not self._ending.wait(every):
                try:
                    do()
                except Exception as error:  # noqa: BLE001 - it is done again soon; the next turn may succeed
                    log.warning("The %s failed: %s", name, services.failed(error).reason)

        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)
