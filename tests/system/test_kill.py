"""kill -9 of listener and worker at random moments: nothing acknowledged is lost, nothing is there twice.

`BUSGEN_KILL_ROUNDS=30 pytest -s tests/system/test_kill.py` runs the whole proof; without it the tests run a short one.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import pytest

from busgen_cds.flows.read_study import RECOVERIES
from tests import hospital
from tests.hospital import Scanner, Site
from tests.pacs import Pacs
from tests.programs import free_port
from tests.system.processes import WAITS, Process

ROUNDS = int(os.environ.get("BUSGEN_KILL_ROUNDS", "3"))
STUDIES, IMAGES, ASSOCIATIONS = 20, 10, 4
KILLS_OF_LISTENER, KILLS_OF_WORKER = 2, 3  # in each round
KILLS = KILLS_OF_LISTENER + KILLS_OF_WORKER


class Victim:
    """A process that is killed at random moments and started again at once."""

    def __init__(self, process: Process, chance: random.Random, kills: int, within: float) -> None:
        self.process = process
        self.moments = sorted(chance.uniform(0.2, within) for _ in range(kills))
        self.killed = 0

    def suffers(self) -> None:
        began = time.monotonic()
        for moment in self.moments:
            time.sleep(max(0.0, began + moment - time.monotonic()))
            self.process.kill()
            self.killed += 1
            self.process.start().is_ready()


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Bar 2: whatever is killed and when, every acknowledged image is kept, and every study ends with exactly one
    current set of results in the PACS, which covers every image; no object is there with two contents."""
    chance = random.Random(20261120)
    pacs = Pacs().comes_up()
    port = free_port()
    site = Site(tmp_path / "site")
    listener = Process(["listen", str(site.folder), str(port)], tmp_path / "listener.log").start()
    worker = Process(["work", str(site.folder), "worker-1", str(pacs.port), "0.05"], tmp_path / "worker.log").start()
    kills = 0
    try:
        listener.is_ready()
        worker.is_ready()
        for number in range(ROUNDS):
            began = time.monotonic()
            victims = [
                Victim(listener, chance, KILLS_OF_LISTENER, 4.0),
                Victim(worker, chance, KILLS_OF_WORKER, 14.0),
            ]
            studies = _one_round(site, pacs, port, number, victims)
            kills += sum(victim.killed for victim in victims)
            print(  # noqa: T201
                f"round {number + 1}: {len(studies)} studies in {time.monotonic() - began:.1f} s, {kills} kills"
            )
    finally:
        listener.kill()
        worker.kill()
        pacs.goes_down()
    assert kills == KILLS * ROUNDS


def _one_round(site: Site, pacs: Pacs, port: int, number: int, victims: Sequence[Victim]) -> list[str]:
    studies = [hospital.a_lesion(IMAGES, seed=1000 * number + 20 * n) for n in range(STUDIES)]
    images = [study[i] for i in range(IMAGES) for study in studies]  # every association carries some of every study
    scanners = [Scanner(port, f"US_{n}") for n in range(ASSOCIATIONS)]
    threads = [
        threading.Thread(target=_sends_until_acknowledged, args=(scanner, images[n::ASSOCIATIONS]))
        for n, scanner in enumerate(scanners)
    ]
    threads += [threading.Thread(target=victim.suffers) for victim in victims]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    acknowledged = [uid for scanner in scanners for uid in scanner.acknowledged]
    assert len(set(acknowledged)) == STUDIES * IMAGES
    uids = [hospital.study_uid(study) for study in studies]
    _waits_for_all(site, pacs, uids)
    _acknowledged_are_found(site, studies)
    for uid in uids:
        _one_current_set(site, pacs, uid)
    assert pacs.twice() == []
    return uids


def _sends_until_acknowledged(scanner: Scanner, files: Sequence[bytes]) -> None:
    left = list(files)
    end = time.monotonic() + 300
    while left and time.monotonic() < end:
        with contextlib.suppress(ConnectionError, RuntimeError), scanner.association(left) as association:
            while left:
                scanner.sends_one(association, left[0])
                left.pop(0)
                time.sleep(0.01)
        if left:
            time.sleep(0.2)


def _waits_for_all(site: Site, pacs: Pacs, uids: Sequence[str]) -> None:
    end = time.monotonic() + 900
    while time.monotonic() < end:
        if all(_is_delivered(site, uid) for uid in uids):
            return
        time.sleep(0.3)
    raise AssertionError(f"not delivered: {[uid for uid in uids if not _is_delivered(site, uid)]}")


def _is_delivered(site: Site, uid: str) -> bool:
    ref = site.inbox.find_study(uid)
    entry = site.results.current(ref) if ref else None
    if entry is None or entry.instances < IMAGES:
        return False
    return all(delivery.state == "done" for delivery in site.results.deliveries.of(entry.ref))


def _acknowledged_are_found(site: Site, studies: Sequence[Sequence[bytes]]) -> None:
    for files in studies:
        kept = site.inbox.instances(site.inbox.find_study(hospital.study_uid(files)) or "")
        sent = {str(hospital.opened_file(data).SOPInstanceUID): data for data in files}
        assert Counter(each.sop_instance_uid for each in kept) == Counter(list(sent))
        for each in kept:
            assert _pixels(site.inbox.open(each)) == _pixels(sent[each.sop_instance_uid])


def _pixels(data: bytes) -> bytes:
    return data[-400_000:]


def _one_current_set(site: Site, pacs: Pacs, uid: str) -> None:
    entry = site.results.current(site.inbox.find_study(uid) or "")
    assert entry is not None and entry.images_read == IMAGES
    objects = site.results.objects(entry.ref)
    there = [each for each in pacs.of(uid) if str(each.SOPInstanceUID) in {o.sop_instance_uid for o in objects}]
    assert Counter(each.Modality for each in there) == {"SR": 1, "OT": 1, "SEG": 1, "PR": 1}
    newest = max(pacs.of(uid, modality="SR"), key=lambda report: int(report.SeriesNumber))
    assert str(newest.SOPInstanceUID) in {each.sop_instance_uid for each in objects}
    assert f"{IMAGES} of {IMAGES} images" in hospital.words(newest)
    series = Counter(int(report.SeriesNumber) for report in pacs.of(uid, modality="SR"))
    assert set(series.values()) == {1}, "two reports with one revision"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_living_worker_takes_over_from_a_dead_one(tmp_path: Path) -> None:
    """A worker that never comes back: a living one takes over what it had begun, and each study has one result."""
    pacs = Pacs().comes_up()
    site = Site(tmp_path / "site")
    first = Process(["work", str(site.folder), "first", str(pacs.port), "30"], tmp_path / "first.log").start()
    first.is_ready()
    second = None
    try:
        studies = [hospital.a_lesion(1, seed=20 * n) for n in range(2)]
        for study in studies:
            hospital.keep(site, study)
        _until(lambda: _reads(site) >= 2, "the first worker began to read")
        second = Process(["work", str(site.folder), "second", str(pacs.port), "0.1"], tmp_path / "second.log").start()
        first.kill()
        second.is_ready()
        _until(lambda: all(len(pacs.of(hospital.study_uid(s), modality="SR")) == 1 for s in studies), "they are read")
        _until(
            lambda: site.jobs.alive(within=timedelta(seconds=WAITS.silent)) == ["second"], "it says that it is alive"
        )
        assert _reads(site) == 4
        assert pacs.twice() == []
    finally:
        first.kill()
        if second is not None:
            second.kill()
        pacs.goes_down()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_that_ends_every_worker(tmp_path: Path) -> None:
    """A study whose reading ends the worker again and again is parked in the end, and no longer in the others' way."""
    site = Site(tmp_path / "site")
    hospital.keep(site, hospital.a_lesion(1))
    worker = Process(["work", str(site.folder), "worker", "1", "-1"], tmp_path / "worker.log")
    starts = 0
    while not site.jobs.all("parked") and starts < 20:
        worker.start()
        starts += 1
        _until(lambda: worker.ended or bool(site.jobs.all("parked")), "it ends")
    worker.kill()
    assert "ended the worker again and again" in site.jobs.all("parked")[0].reason
    assert _reads(site) <= RECOVERIES + 1


def _reads(site: Site) -> int:
    file = site.folder / "reads"
    return len(file.read_text().splitlines()) if file.exists() else 0


def _until(true: Callable[[], bool], what: str, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return
        time.sleep(0.1)
    raise AssertionError(f"never: {what}")
