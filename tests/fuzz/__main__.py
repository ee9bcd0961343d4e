"""`python -m tests.fuzz [objects|associations|all] [--count N] [--first N] [--seed N] [--findings DIR] [--json FILE]`

Without a count: 100,000 objects, 20,000 associations. Interrupted by Ctrl-C or `kill`, it says how far it came;
`--first` goes on from there. Real files are among the seeds where BUSGEN_DATA names them.
Exits with 1 when a bar was not held.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tests.fuzz import associations, objects
from tests.fuzz.watch import Report

RUNS: dict[str, tuple[Callable[..., Report], int]] = {
    "objects": (objects.run, 100_000),
    "associations": (associations.run, 20_000),
}


def main() -> int:
    arguments = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("what", nargs="?", default="all", choices=("all", *RUNS))
    arguments.add_argument("--count", type=int)
    arguments.add_argument("--first", type=int, default=0, help="The number to begin with.")
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--findings", type=Path, help="Folder for the inputs that broke something.")
    arguments.add_argument("--json", type=Path)
    chosen = arguments.parse_args()
    logging.disable(logging.WARNING)
    for each in (signal.SIGINT, signal.SIGTERM):  # in the background a shell has SIGINT ignored
        signal.signal(each, signal.default_int_handler)
    reports = [
        attack(chosen.count or most, chosen.seed, chosen.findings, chosen.first)
        for name, (attack, most) in RUNS.items()
        if chosen.what in ("all", name)
    ]
    text = json.dumps([{**dataclasses.asdict(each), "held": each.held} for each in reports], indent=1)
    sys.stdout.write(text + "\n")
    if chosen.json:
        chosen.json.write_text(text + "\n")
    return 0 if all(each.held and each.done == each.asked for each in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
