"""Real programs that tests drive: a missing one is said aloud and skips, or fails where the build promised it.

`BUSGEN_REQUIRE_PROGRAMS=1` (set by .ci/run) turns each such skip into a failure.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def need(*programs: str) -> None:
    """Programs by name on the PATH, or files by absolute path."""
    missing = [name for name in programs if not (Path(name).exists() if "/" in name else shutil.which(name))]
    if missing:
        absent(f"not installed: {', '.join(missing)}; .ci/run lists the packages")


def absent(what: str) -> None:
    """Skip this test, or fail it where every program was promised."""
    if os.environ.get("BUSGEN_REQUIRE_PROGRAMS") == "1":
        pytest.fail(what)
    pytest.skip(what)


def free_port() -> int:
    """A port nobody listens on now, below those given to outgoing connections: none of them takes it meanwhile."""
    while True:
        port = 10_000 + secrets.randbelow(22_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_for(true: Callable[[], Any], seconds: float, otherwise: str) -> Any:
    """The first true answer within so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answer := true():
            return answer
        time.sleep(0.1)
    raise AssertionError(otherwise)
