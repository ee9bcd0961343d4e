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


def test_security_md_is_whole() -> None:
    """SECURITY.md has every part a security officer asks for, each letter of STRIDE, and each standard of the map."""
    text = (ROOT / "SECURITY.md").read_text()
    parts = set(re.findall(r"(?m)^## (.+)$", text))
    assert parts >= {
        "Report a weakness", "Assets", "Actors", "Data flow", "Threats, controls, tests", "Hardening", "Residual risks",
        "Standards map",
    }  # fmt: skip
    assert {row[2] for row in ROW.findall(text)} == set("STRIDE")
    for standard in ("IEC 81001-5-1", "HIPAA security rule", "GDPR", "NIST SSDF"):
        assert f"| {standard}" in text
    for named in re.findall(r"`((?:deploy|docs|tests|busgen_cds|store)/[\w./-]+)`|\]\(((?:docs)/[\w.-]+)\)", text):
        path = next(each for each in named if each)
        assert (ROOT / path).exists() or (ROOT / "busgen_cds" / path).exists(), path


def _tests(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}
