"""A further task of the reader: one more head, described by a small file.

A task file names a manifest column, the values that make up each class, and the threshold at which each is reported:

    name = "carcinoma-type"
    column = "histology"
    [[classes]]
    name = "invasive"
    values = ["invasive ductal carcinoma"]
    threshold = 0.5
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from busgen_cds.errors import Misconfigured
from busgen_cds.learning.data import UNKNOWN, Row


@dataclass(frozen=True)
class TaskClass:
    name: str
    values: tuple[str, ...]
    threshold: float = 0.5


@dataclass(frozen=True)
class Task:
    name: str
    column: str
    classes: tuple[TaskClass, ...]

    def targets(self, rows: Iterable[Row]) -> list[int]:
        """The class of each row; -1 where the column holds none of them."""
        known = {value: i for i, c in enumerate(self.classes) for value in c.values}
        return [known.get(row.labels.get(self.column, ""), UNKNOWN) for row in rows]


def read(path: Path) -> Task:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        classes = tuple(
            TaskClass(c["name"], words(path, "values", c["values"]), float(c.get("threshold", 0.5)))
            for c in document["classes"]
        )
        task = Task(document["name"], document["column"], classes)
    except UnicodeDecodeError as error:
        raise Misconfigured(f"The task file {path} is no text in UTF-8.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Misconfigured(f"The task file {path} cannot be used: {error!r}") from error
    if len(task.classes) < 2:
        raise Misconfigured(f"The task file {path} needs two classes at least.")
    return task


def words(path: Path, name: str, given: Any) -> tuple[str, ...]:
    """A list of words; a word alone would be taken letter by letter."""
    if not isinstance(given, list | tuple) or not all(isinstance(each, str) for each in given):
        raise Misconfigured(f'{path}: {name} is a list of words, as in {name} = ["one"]; got {given!r}.')
    return tuple(given)
