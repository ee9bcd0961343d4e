"""Asks a vulnerability service about every package of the lock files, by pip-audit.

    python deploy/scan_dependencies.py [--osv-url URL]

Exit code 0: every package was asked about, and nothing is known. 1: something is known; it is shown, with the version
that mends it. 3: the service could not be reached, so that nothing was checked: that is said, and is no success.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

LOCKS = Path(__file__).parent / "locks"
SERVICE = "https://api.osv.dev/v1/query"
NOT_CHECKED = 3
TIMEOUT = 900  # seconds, for all packages


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--osv-url", default=SERVICE, help="the service (OSV's interface)")
    parser.add_argument("locks", nargs="*", type=Path, default=sorted(LOCKS.glob("*.txt")))
    chosen = parser.parse_args(arguments)
    return max(scan(lock, chosen.osv_url) for lock in chosen.locks)


def scan(lock: Path, service: str) -> int:
    found = _ask(lock, service)
    if isinstance(found, str):
        _say(f"{lock.name}: NOT CHECKED: {service} gave no answer ({found}).")
        _say("Run this where the service can be reached; it needs the names and versions of packages, nothing else.")
        return NOT_CHECKED
    known = [(each["name"], each["version"], hole) for each in found for hole in each.get("vulns", ())]
    for name, version, hole in known:
        _say(
            f"{lock.name}: {name} {version}: {hole['id']}, mended in {', '.join(hole['fix_versions']) or 'no version'}"
        )
    locked = len(re.findall(r"^[\w.-]+==", lock.read_text(), re.MULTILINE))
    if locked != len(found):
        _say(f"{lock.name}: NOT CHECKED: {locked} packages are locked, {len(found)} were asked about.")
        return NOT_CHECKED
    _say(f"{lock.name}: {len(found)} packages asked about, {len(known)} known weaknesses.")
    return 1 if known else 0


def _ask(lock: Path, service: str) -> list[dict[str, object]] | str:
    """The packages with what is known of each, or why there is no answer."""
    command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--require-hashes", "--progress-spinner", "off"]
    command += ["-r", str(lock), "-s", "osv", "--osv-url", service, "-f", "json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        return json.loads(done.stdout)["dependencies"]  # type: ignore[no-any-return]
    except subprocess.TimeoutExpired:
        return "too slow"
    except (ValueError, KeyError):
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())
