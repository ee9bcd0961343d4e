"""Files in, answers out: the road of a study without any server, for `read` and for whoever tries the product.

Rules:
- Every file is accounted for: it belongs to a study, or stands among the unreadable with its reason.
- A study that is not for us is an answer like any other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from busgen_cds import summary
from busgen_cds.result import Rendered, Result
from busgen_cds.study import NotForUs, Study


@dataclass(frozen=True)
class Stations:
    """What reading needs of the others."""

    study_uid: Callable[[bytes], str]  # of a Part 10 file; raises ValueError when it is none
    intake: Callable[[Iterable[tuple[bytes, str]]], Study | NotForUs]
    assess: Callable[[Study], Result]
    render: Callable[[Study, Result], tuple[Rendered, ...]]


@dataclass(frozen=True)
class Unreadable:
    path: Path
    reason: str


@dataclass(frozen=True)
class Answered:
    """One study's answer and the objects that say it."""

    answer: Result | NotForUs
    objects: tuple[Rendered, ...] = field(repr=False)
    seconds: float


@dataclass(frozen=True)
class Sorted:
    studies: dict[str, tuple[Path, ...]] = field(repr=False)  # by Study Instance UID
    unreadable: tuple[Unreadable, ...]


def sort(paths: Iterable[Path], stations: Stations) -> Sorted:
    """Files and folders → the files of each study."""
    studies: dict[str, list[Path]] = {}
    unreadable = []
    for path in _files(paths):
        try:
            studies.setdefault(stations.study_uid(path.read_bytes()), []).append(path)
        except (OSError, ValueError) as reason:
            unreadable.append(Unreadable(path, str(reason)))
    return Sorted({uid: tuple(files) for uid, files in studies.items()}, tuple(unreadable))


def read(files: Iterable[Path], stations: Stations) -> Answered:
    began = time.monotonic()
    study = stations.intake((data, hashlib.sha256(data).hexdigest()) for data in (path.read_bytes() for path in files))
    if isinstance(study, NotForUs):
        return Answered(study, (), time.monotonic() - began)
    result = stations.assess(study)
    return Answered(result, stations.render(study, result), time.monotonic() - began)


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(each for each in path.rglob("*") if each.is_file())
        else:
            yield path


def write(answered: Answered, folder: Path) -> dict[str, Any]:
    """Put a study's objects into the folder; the document that describes its answer."""
    if isinstance(answered.answer, NotForUs):
        return summary.of_not_for_us(answered.answer, answered.seconds)
    names = [f"{each.kind}-{each.sop_instance_uid}.dcm" for each in answered.objects]
    for name, each in zip(names, answered.objects, strict=True):
        (folder / name).write_bytes(each.data)
    answer = dataclasses.replace(answered.answer, seconds=answered.seconds)
    return summary.of_result(answer, names)


def refusal(unreadable: Unreadable) -> dict[str, Any]:
    return summary.of_not_for_us(NotForUs("", f"{unreadable.path}: {unreadable.reason}"), 0.0)
