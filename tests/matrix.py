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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        words = (getattr(item.obj, "__doc__", None) or "").strip()  # type: ignore[attr-defined]
        item.user_properties.append(("requirement", words.splitlines()[0] if words else ""))


class Matrix:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, tuple[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.rows[report.nodeid] = (str(dict(report.user_properties)["requirement"]), report.outcome)

    def pytest_sessionfinish(self) -> None:
        rows = [f"| {words} | `{node}` | {outcome} |" for node, (words, outcome) in sorted(self.rows.items())]
        head = ["| requirement | test | outcome |", "|---|---|---|"]
        self.path.write_text("\n".join(["# Verification matrix", "", *head, *rows, ""]))
