"""Builds a release and writes its notes: what changed, and the digest of each file that is given away.

    python deploy/release_notes.py [--out dist]

The folder gets wheel, source archive, bill of materials, `SHA256SUMS` and `RELEASE.md`. The same commit gives the same
wheel and archive, byte by byte (times are the commit's), so that anybody can build them again and compare. The bill of
materials is of the installation that built them.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--root", type=Path, default=ROOT, help="the sources")
    chosen = parser.parse_args(arguments)
    made = make(chosen.root.resolve(), chosen.out.resolve())
    sys.stdout.write(f"Made {made}\n")
    return 0


def make(root: Path, out: Path) -> Path:
    moment = _git(root, "log", "-1", "--format=%ct") or "315532800"  # no repository: the first time a zip can hold
    environment = {**os.environ, "SOURCE_DATE_EPOCH": moment}
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("busgen_cds-*"), *out.glob("*.cdx.json")):
        old.unlink()
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(root)]
    subprocess.run(build, env=environment, check=True, stdout=subprocess.DEVNULL)
    wheel = next(out.glob("*.whl"))
    version = wheel.name.split("-")[1]
    bill = out / f"busgen-cds-{version}.cdx.json"
    subprocess.run([sys.executable, "-m", "busgen_cds", "sbom", "--out", str(bill)], env=environment, check=True)
    files = sorted([wheel, next(out.glob("*.tar.gz")), bill])
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (out / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    notes = out / "RELEASE.md"
    notes.write_text(_notes(root, version, sums))
    return notes


def _notes(root: Path, version: str, sums: dict[str, str]) -> str:
    commit = _git(root, "rev-parse", "HEAD") or "not from a repository"
    altered = _git(root, "status", "--porcelain", "--untracked-files=no")
    lines = [
        f"# BUSGen-CDS {version}",
        "",
        "Research software, not a medical device.",
        "",
        f"Source: `{commit}`{' WITH CHANGES THAT ARE IN NO COMMIT: not for release' if altered else ''}",
        "",
        "## What changed",
        "",
        changes(root, version),
        "",
        "## Files",
        "",
        "| file | SHA-256 |",
        "|---|---|",
        *(f"| {name} | `{digest}` |" for name, digest in sums.items()),
        *(f"| bundle {folder} (its digest) | `{digest}` |" for folder, digest in bundles(root).items()),
        "",
        "## Check it",
        "",
        "    sha256sum -c SHA256SUMS",
        "    git checkout COMMIT && make release-notes   # the same wheel and archive",
        "    busgen-cds bundle verify                    # signature and files of the reader that is shipped",
        "",
    ]
    return "\n".join(lines)


def changes(root: Path, version: str) -> str:
    """The part of the changelog about this version; of what is not released yet, while it has none."""
    parts = re.split(r"(?m)^## ", (root / "CHANGELOG.md").read_text())
    titled = {part.splitlines()[0].strip(): "\n".join(part.splitlines()[1:]).strip() for part in parts[1:]}
    named = next((text for title, text in titled.items() if title.lstrip("[v").startswith(version)), None)
    return named or titled.get("Unreleased", "Nothing is written about this version.")


def bundles(root: Path) -> dict[str, str]:
    """What each shipped bundle's signature is over, as its envelope says."""
    found = {}
    for envelope in sorted((root / "busgen_cds" / "bundles").glob("*/bundle.dsse.json")):
        done = subprocess.run(
            [sys.executable, "-m", "busgen_cds", "bundle", "verify", str(envelope.parent)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        found[envelope.parent.name] = done.stdout.split()[-1]
    return found


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    sys.exit(main())
