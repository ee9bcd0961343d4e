"""The threat table of SECURITY.md against the tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROW = re.compile(r"^\| [STRIDE]: .* \|$", re.MULTILINE)


def test_every_threat_names_a_test_that_exists() -> None:
    """Each row of the threat table names at least one test, and each named test exists."""
    rows = ROW.findall((ROOT / "SECURITY.md").read_text())
    assert len(rows) >= 10
    for row in rows:
        named = re.findall(r"`(tests/[^:`]+)::(\w+)`", row)
        assert named, f"no test is named: {row}"
        for file, name in named:
            assert name in _tests(ROOT / file), f"{file}::{name} does not exist"


def _tests(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}
