"""`check` does not make its operator wait for systems that do not answer."""

from __future__ import annotations

import time
from pathlib import Path

from busgen_cds import settings
from busgen_cds.operations import checks

NODE = """
[[nodes]]
name = "{name}"
ae_title = "NOBODY"
host = "{host}"
port = 104
"""


def test_nodes_that_do_not_answer(tmp_path: Path) -> None:
    """Nodes are asked at once and for a few seconds; it is said for whom it waits, and what to check."""
    text = '[site]\nname = "Here"\nprevalence = 0.1\n[listener]\nallow = []\n'
    silent = {f"silent{number}": f"192.0.2.{number}" for number in range(1, 5)}  # RFC 5737: nobody is there
    chosen = settings.parse(text + "".join(NODE.format(name=n, host=h) for n, h in silent.items()), tmp_path / "s.toml")
    told: list[str] = []
    began = time.monotonic()
    found = checks._echoes(chosen, told.append)
    assert time.monotonic() - began < 4 * checks.ECHO_SECONDS
    assert len(told) == 1 and all(name in told[0] for name in silent)
    assert [each.good for each in found] == [False] * 4
    assert all("check host, port, firewall, and that our title 'BUSGEN_CDS' is known there" in e.found for e in found)
