"""Mutated objects through everything that reads them: peek, the inbox, intake and the decoders.

Each object is looked at as the listener does (in pieces of any size); every object is read by intake and its frames
are decoded even when intake declines it; one in `KEPT_EVERY` also goes through the inbox and is read from there.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from busgen_cds.arrival import Arrival, Peek
from busgen_cds.dicom import association, decode, files, intake, peek
from busgen_cds.dicom.decode import Frames, Unreadable
from busgen_cds.study import NotForUs
from tests import reception
from tests.fuzz import mutate, seeds, watch
from tests.fuzz.mutate import Mutated
from tests.fuzz.watch import PATIENCE, Bar, Report

KEPT_EVERY = 20
_POLL = 0.2
_STEP = 1 << 20
_STUCK = 120.0  # seconds on the clock: waiting for something that does not come


def made(seed: int, number: int) -> Mutated:
    dice = random.Random(f"object {seed} {number}")
    every = seeds.all_of_them()
    return mutate.mutated(dice.choice(every), every, dice)


def run(count: int, seed: int, findings: Path | None = None, first: int = 0) -> Report:
    """All of them, in processes one after the other: a new one only after a crash or a hang.

    Interrupted, it reports what was done by then; `first` goes on from there.
    """
    report, began = Report("objects", seed, count - first), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="busgen-fuzz-") as base:
        store, bar, at = Path(base) / "store", Bar(count - first), first
        with suppress(KeyboardInterrupt):
            while at < count:
                at = _Watched(store, seed, at, count, report, bar, findings).run()
        report.outside += [f"left in the base folder: {each}" for each in watch.files_here(Path(base)) - {"store"}]
        shutil.rmtree(store, ignore_errors=True)
    report.seconds = round(time.monotonic() - began, 1)
    return report


class _Watched:
    """One process at work from a number on, seen from outside."""

    def __init__(
        self, store: Path, seed: int, first: int, count: int, report: Report, bar: Bar, findings: Path | None
    ) -> None:
        self._report, self._seed, self._count, self._bar, self._findings = report, seed, count, bar, findings
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self._at: Any = context.Value("q", first, lock=False)
        self._process = context.Process(target=_work, args=(theirs, self._at, store, seed, first, count), daemon=True)
        self._process.start()
        theirs.close()
        self._warm = False

    def run(self) -> int:
        """The number to go on from."""
        number, since, spent = -1, time.monotonic(), 0.0
        while True:
            self._hear(_POLL)
            if not self._process.is_alive():
                self._hear(0)
                return self._ended()
            if self._at.value != number:
                number, since, spent = self._at.value, time.monotonic(), self._spent()
            self._bar.at(self._report.done)
            # by the processor's time: a machine that does other things is slow without anything hanging
            if self._warm and (self._spent() - spent > PATIENCE or time.monotonic() - since > _STUCK):
                self._kill()
                return self._judge(number)

    def _spent(self) -> float:
        return watch.cpu_seconds(self._process.pid or 0)

    def _hear(self, seconds: float) -> None:
        try:
            while self._line.poll(seconds):
                kind, what = self._line.recv()
                seconds = 0
                self._take(kind, what)
        except (EOFError, OSError):
            time.sleep(seconds)

    def _take(self, kind: str, what: Any) -> None:
        if kind == "done":
            outcomes, slowest = what
            self._report.done += sum(outcomes.values())
            self._report.slowest = max(self._report.slowest, round(slowest, 2))
            for name, count in outcomes.items():
                self._report.outcomes[name] = self._report.outcomes.get(name, 0) + count
        elif kind == "warm":
            self._warm = True
        elif kind == "grown":
            number, grown = what
            if grown > self._report.growth_mb:
                self._report.growth_mb, self._report.largest = grown, f"{number}: {made(self._seed, number).seed}"
        elif kind == "outside":
            self._report.outside.append(what)
        elif kind == "raised":
            number, error = what
            self._found(self._report.crashes, number, error)

    def _ended(self) -> int:
        number = self._at.value
        if self._process.exitcode == 0:
            return self._count
        code = self._process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit {code}"
        self._found(self._report.crashes, number, how)
        return number + 1

    def _judge(self, number: int) -> int:
        """Alone, and by the processor's time: does it hang, or was the machine elsewhere?"""
        context = multiprocessing.get_context("spawn")
        alone = context.Process(target=_alone, args=(self._seed, number), daemon=True)
        alone.start()
        alone.join(_STUCK)
        if alone.exitcode is None:
            alone.kill()
        if alone.exitcode != 0:
            self._found(self._report.hangs, number, "more than 5 s of the processor's time")
        else:
            self._report.count("slow once, not again")
        return number + 1

    def _kill(self) -> None:
        self._process.kill()
        self._process.join()

    def _found(self, where: list[str], number: int, what: str) -> None:
        object_ = made(self._seed, number)
        where.append(f"{number}: {what}; {object_.seed}; {', '.join(object_.what)}")
        if self._findings:
            self._findings.mkdir(parents=True, exist_ok=True)
            (self._findings / f"{self._seed}-{number}.dcm").write_bytes(object_.file)


def _work(line: Connection, at: Any, store: Path, seed: int, first: int, count: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who watches decides when it is over
    seeds.all_of_them()
    database, inbox = reception.open_store(store)
    watch.only_writes_in(store, lambda what: line.send(("outside", what)))
    outcomes: dict[str, int] = {}
    for each in seeds.all_of_them():  # what is imported and cached for a good object is no growth
        attack(mutate.unaltered(each), random.Random(0), None)
    slowest, warm = 0.0, watch.memory(peak=True)
    highest = warm
    line.send(("warm", None))
    for number in range(first, count):
        at.value = number
        began = time.process_time()
        try:
            outcome = attack(made(seed, number), random.Random(number), inbox if number % KEPT_EVERY == 0 else None)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
        except BaseException as error:
            line.send(("raised", (number, f"{type(error).__name__}: {str(error)[:200]}")))
            outcomes["raised"] = outcomes.get("raised", 0) + 1
        slowest = max(slowest, time.process_time() - began)
        if (now := watch.memory(peak=True)) > highest + _STEP:
            highest = now
            line.send(("grown", (number, round((now - warm) / (1 << 20), 1))))
        if number % 50 == 49:
            line.send(("done", (outcomes, slowest)))
            outcomes = {}
    line.send(("done", (outcomes, slowest)))
    database.close()


def _alone(seed: int, number: int) -> None:
    seeds.all_of_them()
    attack(made(seed, 0), random.Random(0), None)  # what is imported is imported
    object_ = made(seed, number)
    began = time.process_time()
    signal.setitimer(signal.ITIMER_VIRTUAL, PATIENCE)  # its signal ends the process, within a codec too
    attack(object_, random.Random(number), None)
    os._exit(0 if time.process_time() - began < PATIENCE else 1)


def attack(object_: Mutated, dice: random.Random, inbox: Any) -> str:
    """Everything that may read an object reads it; any exception but a reasoned refusal is a finding."""
    seen = _peeked(object_, dice)
    if inbox is not None:
        seen += " " + _kept(object_, inbox)
    said = intake.study([(object_.file, hashlib.sha256(object_.file).hexdigest())])
    _decoded(object_.file)
    _named(object_.file)
    return f"{seen}, {'not for us' if isinstance(said, NotForUs) else 'read'}"


def _peeked(object_: Mutated, dice: random.Random) -> str:
    reader = peek.Reader(object_.syntax, most_inflated=64 << 20)
    piece = dice.choice((1 << 18, 16384, 1000, 97))
    try:
        for start in range(0, len(object_.data_set), piece):
            reader.feed(memoryview(object_.data_set)[start : start + piece])
        reader.finish()
    except peek.Corrupt:
        return "corrupt"
    return "whole"


def _decoded(file: bytes) -> None:
    try:
        opened = decode.open_file(file)
        frames = Frames(opened, decode.shape(opened))
        for index in {0, frames.available - 1} if frames.available else ():
            frames.decode(index)
    except Unreadable:
        return
    except Exception:  # intake answers "damaged" for whatever a codec raises
        return


def _named(file: bytes) -> None:
    try:
        files.study_uid(file)
    except ValueError:
        return


def _kept(object_: Mutated, inbox: Any) -> str:
    """As the association does it: kept when it holds together, set aside when not; then read back."""
    reader = peek.Reader(object_.syntax, most_inflated=64 << 20)
    arrival = Arrival("FUZZ", "127.0.0.1", seeds.IMAGE, "2.25.1", object_.syntax)
    incoming = inbox.receive(arrival)
    incoming.write(association.part10_prefix(arrival))
    incoming.write(object_.data_set)
    try:
        reader.feed(object_.data_set)
        header: Peek = reader.finish()
    except peek.Corrupt as corrupt:
        ref = incoming.quarantine(str(corrupt))
        assert inbox.open_quarantined(ref).endswith(object_.data_set)
        return "set aside"
    kept = incoming.keep(header)
    (instance,) = [each for each in inbox.instances(kept.study_ref) if each.ref == kept.instance_ref] or [None]
    if instance is not None:
        assert inbox.open(instance).endswith(object_.data_set)
    return "kept"
