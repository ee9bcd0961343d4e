"""A process under a watchdog: what it is at, how long it has been at it, how much memory it holds, what it opened."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

PATIENCE = 5.0  # seconds that one input may take
GROWTH = 200 << 20  # bytes that a process may grow by
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass
class Report:
    """What a run found; empty lists are what it hopes for."""

    what: str
    seed: int
    asked: int
    done: int = 0
    seconds: float = 0.0
    outcomes: dict[str, int] = field(default_factory=dict)
    crashes: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)  # what was written that is not in the store
    growth_mb: float = 0.0  # at its highest, over what the process held when it was warm
    largest: str = ""  # the input at which that was
    slowest: float = 0.0

    @property
    def held(self) -> bool:
        return not (self.crashes or self.hangs or self.outside) and self.growth_mb * (1 << 20) < GROWTH

    def count(self, outcome: str) -> None:
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1


def memory(pid: int | str = "self", *, peak: bool = False) -> int:
    """Bytes that a process holds of its own, now or at its highest; 0 when it is gone."""
    name = "VmHWM:" if peak else "VmRSS:"
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(name)), 0)


def cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def only_writes_in(store: Path, tell: Callable[[str], None]) -> None:
    """From now on, whatever this process opens for writing, makes, renames or removes elsewhere is told."""
    inside = os.path.realpath(store)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        for path in _written(event, arguments):
            where = os.path.realpath(path)
            if where != inside and not where.startswith((inside + os.sep, "/dev/null", "/proc/self/fd")):
                tell(f"{event} {where}")

    sys.addaudithook(hook)


def _written(event: str, arguments: tuple[object, ...]) -> list[str]:
    if event == "open":
        path, _, flags = (*arguments, None, None, None)[:3]
        named = isinstance(path, str | bytes | os.PathLike) and isinstance(flags, int) and flags & _WRITING
        return [os.fsdecode(path)] if named else []  # type: ignore[arg-type]
    if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.symlink", "os.link"):
        paths = arguments[:2] if event in ("os.rename", "os.symlink", "os.link") else arguments[:1]
        return [os.fsdecode(path) for path in paths if isinstance(path, str | bytes | os.PathLike)]
    return []


def files_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def files_here(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class Bar:
    """A line now and then on standard error; quiet when nobody looks."""

    def __init__(self, total: int, every: float = 30.0) -> None:
        self._total, self._every, self._next, self._began = total, every, time.monotonic() + every, time.monotonic()

    def at(self, done: int) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._every
            rate = done / (now - self._began)
            sys.stderr.write(f"{done} of {self._total}, {rate:.0f}/s\n")
            sys.stderr.flush()
