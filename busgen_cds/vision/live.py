"""The Engine that reads now: when another bundle is said to be live, the next study is read by that one.

Rules:
- A study is read from its first frame to its last by the engine it began with.
- The new engine is open and warm before the first study is given to it; studies go on meanwhile.
- The old engine is closed when its last study is done, and not before.
- What cannot be verified or opened is raised to whoever follows; the engine in use stays as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from busgen_cds.vision.engine import Engine


@dataclass
class _InUse:
    engine: Engine
    studies: int = 0
    replaced: bool = False


class Live:
    """`said` tells cheaply which word is the last; `open` verifies it and opens its engine."""

    def __init__(self, said: Callable[[], Hashable], open: Callable[[], Engine]) -> None:
        self._said, self._open = said, open
        self._lock, self._following = threading.Lock(), threading.Lock()
        self._word = said()
        self._now = _InUse(open())

    @property
    def engine(self) -> Engine:
        """The one that the next study would get."""
        return self._now.engine

    @contextmanager
    def for_a_study(self) -> Iterator[Engine]:
        with self._lock:
            mine = self._now
            mine.studies += 1
        try:
            yield mine.engine
        finally:
            self._done(mine)

    def follow(self) -> bool:
        """Use what is live now; True when that is another bundle than before."""
        with self._following:
            word = self._said()
            if word == self._word:
                return False
            engine = self._open()
            self._word = word
            if engine.bundle == self._now.engine.bundle:
                engine.close()
                return False
            with self._lock:
                old, self._now = self._now, _InUse(engine)
                old.replaced = True
                idle = old.studies == 0
        if idle:
            old.engine.close()
        return True

    def close(self) -> None:
        self._now.engine.close()

    def _done(self, mine: _InUse) -> None:
        with self._lock:
            mine.studies -= 1
            last = mine.replaced and mine.studies == 0
        if last:
            mine.engine.close()
