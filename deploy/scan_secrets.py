"""Looks for secrets in files that would be published: private keys, tokens, passwords in addresses.

    python deploy/scan_secrets.py [FOLDER]

Exit code 1 and one line for each find: the file, the line and what it looks like, never the secret itself. A line that
must look like one (in a test) says so by the word in `ALLOWED` and why.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ALLOWED = "not-a-secret:"
LARGEST = 5_000_000  # bytes: larger files are weights

RULES = {
    "a private key": r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----",
    "a token of this product": r"busgen_[A-Za-z0-9_-]{43}(?![A-Za-z0-9_-])",
    "a site key": r"(?m)^\s*[0-9a-f]{64}\s*$",
    "a cloud access key": r"(?<![A-Z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])",
    "a token of a code host": r"(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{60,}|glpat-[A-Za-z0-9_-]{20})",
    "a token of a package registry": r"pypi-AgEI[A-Za-z0-9_-]{50,}",
    "a token of a chat": r"xox[abprs]-[A-Za-z0-9-]{10,}",
    "a signed token": r"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{16,}",
    "a password in an address": r"[a-z][a-z0-9+.-]*://[^\s/:@\"'{}<>]+:[^\s/:@\"'{}<>]{3,}@[A-Za-z0-9]",
    "a secret in a setting": r"(?i)(?:secret|password|passwd|api_?key|token)[\"']?\s*[:=]\s*[\"']"
    r"(?=[^\"']*\d)(?=[^\"']*[A-Za-z])[A-Za-z0-9+/_=-]{24,}[\"']",
}
_COMPILED = {name: re.compile(rule) for name, rule in RULES.items()}


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0] if arguments else ".")
    finds = [f"{file.relative_to(folder)}:{line}: looks like {what}" for file, line, what in scan(folder)]
    sys.stdout.write("".join(f"{find}\n" for find in finds))
    sys.stdout.write(f"{len(finds)} finds in {sum(1 for _ in files(folder))} files\n")
    return 1 if finds else 0


def scan(folder: Path) -> Iterator[tuple[Path, int, str]]:
    for file in files(folder):
        if file.stat().st_size > LARGEST:
            continue
        text = file.read_bytes().decode("utf-8", errors="replace")
        lines = text.splitlines()
        for what, rule in _COMPILED.items():
            for found in rule.finditer(text):
                number = text.count("\n", 0, found.end()) + (0 if found[0].endswith("\n") else 1)
                if ALLOWED not in lines[number - 1]:
                    yield file, number, what


def files(folder: Path) -> Iterator[Path]:
    """What git would publish, tracked or about to be; every file where there is no repository."""
    command = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        found = [path for path in folder.rglob("*") if ".git" not in path.parts]
    else:
        found = [folder / name for name in done.stdout.decode().split("\0") if name]
    yield from sorted(path for path in found if path.is_file() and not path.is_symlink())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
