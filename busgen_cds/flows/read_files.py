"""Files in, answers out: the road of a study without any server, for `read` and for whoever tries the product.

Rules:
- Every file is accounted for by name: it was read, or it stands in `images_not_analysed` or among the unreadable with
  its reason.
- A study that is not for us is an answer like any other.
- A file that is damaged or contradicts another needs attention, and so do two patients under one study: that is said.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from busgen_cds import summary
from busgen_cds.result import Rendered, Result
from busgen_cds.study import Held, NotAnalysed, NotForUs, Source, Study

OURS = "one of this product's own objects; they are never read"
ATTENTION = re.compile(
    r"damaged|pixel data|compressed picture|contradicts itself|not a number|does not say|same SOP Instance UID|^Two "
)


@dataclass(frozen=True)
class Stations:
    """What reading needs of the others."""

    study_uid: Callable[[bytes], str]  # of a Part 10 file; raises ValueError when it is none
    intake: Callable[[Iterable[tuple[bytes, str]]], Study | NotForUs | Held]
    assess: Callable[[Study], Result]
    render: Callable[[Study, Result], tuple[Rendered, ...]]


@dataclass(frozen=True)
class Unreadable:
    path: Path
    reason: str


@dataclass(frozen=True)
class Answered:
    """One study's answer and the objects that say it."""

    answer: Result | NotForUs  # what was left out says its file's name
    objects: tuple[Rendered, ...] = field(repr=False)
    seconds: float

    @property
    def attention(self) -> tuple[str, ...]:
        """What a person should look into."""
        return tuple(line for line in self.left_out if ATTENTION.search(line.partition(": ")[2]))

    @property
    def left_out(self) -> tuple[str, ...]:
        """Each reason for which a file was left out, once, with the number of its frames."""
        counts = Counter(each.reason for each in self.answer.not_analysed)
        return tuple(reason if n == 1 else f"{reason} ({n} frames)" for reason, n in counts.items())


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
    digests: dict[Path, str] = {}
    study = stations.intake(_opened(files, digests))
    if isinstance(study, Held):
        study = NotForUs(study.study_uid, study.reason, (), study.received)
    if isinstance(study, NotForUs):
        refused = dataclasses.replace(study, not_analysed=_left_out(study, study.received, digests))
        return Answered(refused, (), time.monotonic() - began)
    result = stations.assess(study)
    objects = stations.render(study, result)
    named = dataclasses.replace(result, not_analysed=_left_out(result, study.received, digests))
    return Answered(named, objects, time.monotonic() - began)


def _opened(files: Iterable[Path], digests: dict[Path, str]) -> Iterator[tuple[bytes, str]]:
    """Each file's bytes with their SHA-256, which is noted under its name."""
    for path in files:
        data = path.read_bytes()
        digests[path] = hashlib.sha256(data).hexdigest()
        yield data, digests[path]


def _left_out(
    answer: Result | NotForUs, received: Iterable[tuple[str, str]], digests: Mapping[Path, str]
) -> tuple[NotAnalysed, ...]:
    """What was left out, each reason with the name of its file; also the files that intake passes over."""
    uids = {digest: uid for uid, digest in received}
    first: dict[str, Path] = {}
    names: dict[str, list[str]] = {}
    passed: list[NotAnalysed] = []
    for path, digest in digests.items():
        uid = uids.get(digest, "")
        if digest in first:
            passed.append(_passed(path, uid, f"byte for byte the same file as {first[digest]}"))
            continue
        first[digest] = path
        names.setdefault(uid, []).append(str(path))
        if digest not in uids:
            passed.append(_passed(path, uid, OURS))
        elif isinstance(answer, NotForUs) and not answer.not_analysed:
            passed.append(_passed(path, uid, answer.reason))
    said = (
        dataclasses.replace(each, reason=f"{' or '.join(names[each.source.sop_instance_uid])}: {each.reason}")
        for each in answer.not_analysed
    )
    return (*said, *passed)


def _passed(path: Path, uid: str, reason: str) -> NotAnalysed:
    return NotAnalysed(Source("", uid, "", 0, 0), f"{path}: {reason}")


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(each for each in path.rglob("*") if each.is_file())
        else:
            yield path


def write(answered: Answered, folder: Path, *, prevalence_stated: bool = True) -> dict[str, Any]:
    """Put a study's objects into the folder; the document that describes its answer."""
    if isinstance(answered.answer, NotForUs):
        return summary.of_not_for_us(answered.answer, answered.seconds)
    names = [f"{each.kind}-{each.sop_instance_uid}.dcm" for each in answered.objects]
    for name, each in zip(names, answered.objects, strict=True):
        (folder / name).write_bytes(each.data)
    answer = dataclasses.replace(answered.answer, seconds=answered.seconds)
    return summary.of_result(answer, names, prevalence_stated=prevalence_stated)


def refusal(unreadable: Unreadable) -> dict[str, Any]:
    return summary.of_not_for_us(NotForUs("", f"{unreadable.path}: {unreadable.reason}"), 0.0)


def left_out(found: Sorted, answers: Iterable[Answered]) -> list[str]:
    """A line for whatever was not read; what a person should look into comes first, and says so."""
    known = list(answers)
    urgent = [f"{each.path}: {each.reason}" for each in found.unreadable]
    urgent += [line for each in known for line in each.attention]
    others = [line for each in known for line in each.left_out if line not in each.attention]
    return [f"needs attention: {line}" for line in urgent] + [f"not read: {line}" for line in others]
