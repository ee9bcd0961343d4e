"""The plugin file itself: its licence, its imports, and its typed protocol of Orthanc's embedded module."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system import orthanc

FOLDER = orthanc.PLUGIN.parent
PROTOCOL = FOLDER / "orthanc.pyi"

PROBE = """
import json
import orthanc

def names(output, uri, **request):
    found = {name: sorted(vars(value)) if isinstance(value, type) else callable(value)
             for name, value in vars(orthanc).items()}
    output.AnswerBuffer(json.dumps(found), "application/json")

orthanc.RegisterRestCallback("/names", names)
"""


def test_plugin_is_alone() -> None:
    """The plugin is one file that imports nothing but the standard library and Orthanc's own module."""
    assert [file.name for file in FOLDER.glob("*.py")] == [orthanc.PLUGIN.name]
    tree = ast.parse(orthanc.PLUGIN.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names) == {"orthanc"}


def test_plugin_has_its_own_licence() -> None:
    """The plugin alone is AGPL-3.0-or-later: its header says so and the licence stands beside it."""
    head = orthanc.PLUGIN.read_text()[:1000]
    assert "Affero" in head and "or (at\n# your option) any later version" in head
    assert (FOLDER / "LICENSE").read_text().startswith("GNU AFFERO GENERAL PUBLIC LICENSE\nVersion 3")


def test_callbacks_wait_for_nothing_of_orthancs() -> None:
    """No call that keeps Python's lock while it waits for Orthanc (orthanc.RestApi…) is in the plugin."""
    used = {
        node.attr
        for node in ast.walk(ast.parse(orthanc.PLUGIN.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "orthanc"
    }
    assert used <= set(declared())
    assert not [name for name in used if name.startswith("RestApi")]


def test_plugin_fits_its_protocol() -> None:
    """The plugin type-checks strictly against the typed protocol."""
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", str(orthanc.PLUGIN)],
        env=os.environ | {"MYPYPATH": str(FOLDER)},
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.program
def test_protocol_fits_the_running_orthanc(tmp_path: Path) -> None:
    """Every name in the typed protocol exists in the module of the Orthanc that runs."""
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    with orthanc.running(tmp_path, script=script) as pacs:
        real = pacs.get("/names")
    for name, members in declared().items():
        assert name in real, f"the running Orthanc has no orthanc.{name}"
        assert set(members) <= set(real[name] if isinstance(real[name], list) else []), f"orthanc.{name}"


def declared() -> dict[str, list[str]]:
    """Each name of the protocol, with its members where it is a class."""
    found: dict[str, list[str]] = {}
    for node in ast.parse(PROTOCOL.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = []
        if isinstance(node, ast.ClassDef):
            found[node.name] = [
                member.name if isinstance(member, ast.FunctionDef) else member.target.id  # type: ignore[union-attr]
                for member in node.body
                if isinstance(member, ast.FunctionDef | ast.AnnAssign)
            ]
    return found
