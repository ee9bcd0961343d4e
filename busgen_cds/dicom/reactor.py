"""pynetdicom's thread that listens for the peer's own requests, made to stand still while we wait for an answer.

While a request of ours is under way, pynetdicom pauses that thread: it would take the answer for a request and drop
it, and the sender waits for ever. But it looks at a flag that stays true for a moment after the thread has woken up;
on a busy machine an answer is lost in that moment now and then.

Rules:
- `Checkpoint.clear`, which pynetdicom calls before each request, returns only when the thread stands in `wait`, has
  ended, or is the caller itself.
"""

from __future__ import annotations

import threading

from pynetdicom import evt
from pynetdicom.association import Association

_LOOK_AGAIN_SECONDS = 0.05


class Checkpoint(threading.Event):
    """The place where the thread waits while it is paused."""

    def __init__(self, reactor: threading.Thread) -> None:
        super().__init__()
        self._reactor = reactor
        self._changed = threading.Condition()
        self._open, self._standing = True, False

    def is_set(self) -> bool:
        return self._open

    def set(self) -> None:
        with self._changed:
            self._open, self._standing = True, False
            self._changed.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        with self._changed:
            return self._changed.wait_for(self._stand, timeout)

    def clear(self) -> None:
        with self._changed:
            self._open = False
            while self._may_move():
                self._changed.wait(_LOOK_AGAIN_SECONDS)

    def _stand(self) -> bool:
        """In `wait`: may it go on? If it was let go and stopped again before it moved, it stands."""
        self._standing = not self._open
        if self._standing:
            self._changed.notify_all()
        return self._open

    def _may_move(self) -> bool:
        itself = threading.current_thread() is self._reactor
        return not self._open and not self._standing and self._reactor.is_alive() and not itself


def stands_still(event: evt.Event) -> None:
    """A handler for `evt.EVT_CONN_OPEN`: before the thread begins."""
    association: Association = event.assoc
    association._reactor_checkpoint = Checkpoint(association)
