"""Prints the verification matrix: each requirement (the first line of a test's docstring) and its outcome.

`pytest --matrix FILE` writes it as a Markdown table.
"""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", metavar="FILE", help="write the verification matrix to FILE")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--matrix") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Matrix(Path(config.getoption("--matrix"))))


class Matrix:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.requirements: dict[str, str] = {}
        self.outcomes: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            words = (getattr(item.obj, "__doc__", None) or "").strip()  # type: ignore[attr-defined]
            self.requirements[item.nodeid] = words.splitlines()[0] if words else ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self) -> None:
        rows = [
            f"| {self.requirements.get(node, '')} | `{node}` | {outcome} |"
            for node, outcome in sorted(self.outcomes.items())
        ]
        head = ["| requirement | test | outcome |", "|---|---|---|"]
        self.path.write_text("\n".join(["# Verification matrix", "", *head, *rows, ""]))
