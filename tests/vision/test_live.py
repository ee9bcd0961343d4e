"""The engine is switched while it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from busgen_cds import bundle
from busgen_cds.errors import Untrusted
from busgen_cds.vision import engine
from busgen_cds.vision.engine import Engine
from busgen_cds.vision.live import Live
from tests.vision import readers

FRAMES = np.zeros((1, 1, 224, 224), np.float32)


class Word:
    """What is said to be live, and how often an engine was opened for it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number, self.opened = folder, 0, 0
        self.fails: Exception | None = None

    def open(self) -> Engine:
        self.opened += 1
        if self.fails:
            raise self.fails
        other = bundle.Thresholds(**{**vars(readers.THRESHOLDS), "domain": 3.0 + self.number})
        return engine.open(readers.bundle(self.folder / str(self.number), thresholds=other), "cpu", threads=1)

    def said(self) -> int:
        return self.number


@pytest.fixture
def word(tmp_path: Path) -> Word:
    return Word(tmp_path)


@pytest.fixture
def live(word: Word) -> Iterator[Live]:
    opened = Live(word.said, word.open)
    yield opened
    opened.close()


def test_a_study_keeps_its_engine(word: Word, live: Live) -> None:
    """A study under way ends with the bundle it began with; the next one gets the new one, without a restart."""
    with live.for_a_study() as old:
        word.number = 1
        assert live.follow()
        with live.for_a_study() as new:
            assert new.bundle.digest != old.bundle.digest
            new.read(FRAMES)
        old.read(FRAMES)  # still open
    assert closed(old) and not closed(new)


def test_nothing_new(word: Word, live: Live) -> None:
    """Looking again costs nothing while nobody says anything, and the same bundle said again changes nothing."""
    assert not live.follow() and word.opened == 1
    same = word.open
    word.open = lambda: _as_before(word, same)  # type: ignore[method-assign]
    first = live.engine
    live._open = word.open
    word.number = 1
    assert not live.follow() and live.engine is first and not closed(first)


def _as_before(word: Word, open: Callable[[], Engine]) -> Engine:
    number, word.number = word.number, 0
    try:
        return open()
    finally:
        word.number = number


def test_what_cannot_be_used(word: Word, live: Live) -> None:
    """A bundle that cannot be verified is never read with: whoever follows is told, and asked again later."""
    before = live.engine
    word.number, word.fails = 1, Untrusted("altered")
    with pytest.raises(Untrusted):
        live.follow()
    assert live.engine is before and not closed(before)
    word.fails = None
    assert live.follow() and closed(before)


def closed(opened: Engine) -> bool:
    try:
        opened.read(FRAMES)
    except RuntimeError:
        return True
    return False
