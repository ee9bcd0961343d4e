"""A program that runs beside a test until it is told to stop, killed, or found to have ended by itself."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.programs import wait_for


class Daemon:
    """Started when its port answers; it alone is told to stop, as by a service manager; a kill is for all of it."""

    def __init__(self, name: str, log: Path, port: int, *, starts_within: float, stops_within: float) -> None:
        self.log = log
        self._name, self._port = name, port
        self._starts_within, self._stops_within = starts_within, stops_within
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def command(self) -> Sequence[str]:
        raise NotImplementedError

    @property
    def runs(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        with self.log.open("ab") as log:
            environment = os.environ | {"TCP_NODELAY": "1"}
            self._process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        wait_for(self._answers, self._starts_within, f"{self._name} did not start; see {self.log}")

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._ended()

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._ended()

    def _ended(self) -> None:
        assert self._process is not None
        try:
            self._process.wait(self._stops_within)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)
            raise AssertionError(f"{self._name} did not stop within {self._stops_within} s; see {self.log}") from None
        finally:
            self._process = None

    def _answers(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise AssertionError(f"{self._name} ended: {self.log.read_text(errors='replace')[-2000:]}")
        try:
            with socket.create_connection(("127.0.0.1", self._port), timeout=1):
                return True
        except OSError:
            return False
