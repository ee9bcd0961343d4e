"""What a finding truly is, from what a reader, a final report and pathology said of it: decided, open, or in conflict.

Rules:
- Pathology outweighs an opinion, but where the two disagree nobody is believed: the conflict is shown.
- A category of 2 or 3 says benign, 4C or 5 malignant; 4A and 4B say neither, and wait for pathology.
- "Malignant" for a study with several findings does not say which: readers reject those that it does not mean.
- A reader's word and a report's category are opinions: they are recorded and shown as opinions, never as pathology.
- A rejected finding makes a normal frame, unless the frame was of no use or shows another finding that stands.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from busgen_cds.case import Origin, Pathology, Word

OPINIONS: dict[str, Pathology] = {"2": "benign", "3": "benign", "4C": "malignant", "5": "malignant"}
NO_LESION = frozenset({"no lesion here", "normal structure", "artefact"})

_LOOKS: dict[str, str] = {"benign": "benign-looking", "malignant": "suspicious", "normal": "no lesion seen"}
_SOURCES: dict[str, str] = {"reader": "a reader's opinion", "report": "a final report's opinion"}


def source(origin: str) -> str:
    """What a case was made from."""
    return _SOURCES.get(origin, "pathology")


def in_words(pathology: str, origin: str) -> str:
    """What a case says: a finding of pathology by its name, an opinion by what was seen."""
    return _LOOKS[pathology] if origin in _SOURCES else pathology


@dataclass(frozen=True)
class Opinion:
    """A reader's word on a finding, with the category that it leaves standing."""

    word: Word
    birads: str | None
    reason: str = ""


@dataclass(frozen=True)
class Known:
    pathology: Pathology
    origin: Origin


@dataclass(frozen=True)
class Open:
    """Not known yet; it may be later."""

    reason: str


@dataclass(frozen=True)
class Conflict:
    """Said in two ways: a person has to look."""

    reason: str


def of_finding(
    opinion: Opinion | None, final: str | None, pathology: Collection[Pathology], *, standing: int
) -> Known | Open | Conflict:
    """`final`: the category of a verified report; `standing`: findings of the study that nobody rejected."""
    found = set(pathology)
    if len(found) > 1:
        return Conflict(f"pathology reports say {' and '.join(sorted(found))}")
    rejected = opinion is not None and opinion.word == "reject"
    if opinion is not None and rejected:
        return _rejected(opinion, found, standing)
    said = OPINIONS.get(opinion.birads or "") if opinion else None
    reported = OPINIONS.get(final or "") if standing == 1 else None
    if found:
        return _proven(found.pop(), said, reported, standing)
    if said and reported and said != reported:
        return Conflict(f"the reader's category says {said}, the final report {reported}")
    if said:
        return Known(said, "reader")
    if reported:
        return Known(reported, "report")
    return Open("nobody has said a word yet" if opinion is None else "4A and 4B say neither: it waits for pathology")


def of_study(opinion: Opinion | None, pathology: Collection[Pathology]) -> Known | Open | Conflict:
    """Of a study in which nothing was found."""
    if set(pathology) - {"normal"}:
        return Conflict(
            f"pathology says {' and '.join(sorted(set(pathology)))}, and nothing was found: draw what it means"
        )
    if opinion is None or opinion.word != "agree":
        return Open("no reader has agreed that there is nothing")
    return Known("normal", "reader")


def _rejected(opinion: Opinion, found: set[Pathology], standing: int) -> Known | Open | Conflict:
    if opinion.reason not in NO_LESION:
        return Open(f"rejected: {opinion.reason or 'no reason given'}")
    if found - {"normal"} and standing == 0:
        return Conflict(f"pathology says {found.pop()}, and every finding was rejected")
    return Known("normal", "reader")


def _proven(
    proven: Pathology, said: Pathology | None, reported: Pathology | None, standing: int
) -> Known | Open | Conflict:
    if proven == "malignant" and standing != 1:
        return Conflict(f"pathology says malignant, and {standing} findings stand: reject those that it does not mean")
    for who, what in (("the reader", said), ("the final report", reported)):
        if what is not None and what != proven:
            return Conflict(f"pathology says {proven}, {who} says {what}")
    return Known(proven, "pathology")
