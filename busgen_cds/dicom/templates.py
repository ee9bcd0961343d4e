"""Report templates: the data files that say what is said of a Result, in which words, codes and order.

Rules:
- The files of `dicom_sr_templates/` are read at run time: what they say is what is sent.
- A key, a code or a word that is missing is Misconfigured and names the file and the key; nothing is assumed.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from busgen_cds.birads import Code
from busgen_cds.errors import Misconfigured

FOLDER = "dicom_sr_templates"
DEFAULT = "breast_ultrasound"

Words = Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Template:
    """One template file; every question is a dotted path into it."""

    name: str
    version: str
    document: Mapping[str, Any] = field(repr=False)

    def at(self, path: str) -> Any:
        value: Any = self.document
        for key in path.split("."):
            if not isinstance(value, Mapping) or key not in value:
                raise Misconfigured(f"Report template {self.name}: there is no {path!r}; put it back into its file.")
            value = value[key]
        return value

    def code(self, path: str) -> Code:
        return as_code(self.at(path), f"report template {self.name}, {path}")

    def number(self, path: str) -> float:
        return float(self.at(path))

    def text(self, path: str, words: Words) -> str:
        return self.fill(str(self.at(path)), words)

    def lines(self, path: str, words: Words) -> tuple[str, ...]:
        """The lines of a list, filled in; those that come out empty are left out."""
        filled = (self.fill(str(line), words).strip() for line in self.at(path))
        return tuple(line for line in filled if line)

    def fill(self, text: str, words: Words) -> str:
        try:
            return text.format_map(words)
        except (KeyError, ValueError, IndexError) as unknown:
            raise Misconfigured(
                f"Report template {self.name}: {text!r} cannot be filled in ({unknown!r}); known: {sorted(words)}."
            ) from unknown


def as_code(values: Any, where: str) -> Code:
    if not isinstance(values, list) or len(values) not in (3, 4) or not all(isinstance(v, str) for v in values):
        raise Misconfigured(f"In {where}: a code is [value, scheme, meaning] or [value, scheme, meaning, version].")
    return Code(*values)


@cache
def load(name: str = DEFAULT) -> Template:
    try:
        document = tomllib.loads((folder() / f"{name}.toml").read_text("utf-8"))
    except OSError as missing:
        raise Misconfigured(f"There is no report template {name!r}; known: {', '.join(names())}.") from missing
    except tomllib.TOMLDecodeError as broken:
        raise Misconfigured(f"Report template {name} is not valid TOML: {broken}") from broken
    return Template(str(document.get("name", name)), str(document.get("version", "")), document)


def names() -> list[str]:
    return sorted(entry.name.removesuffix(".toml") for entry in folder().iterdir() if entry.name.endswith(".toml"))


def folder() -> Traversable:
    """Inside the installed package; in a checkout, at the root of the repository."""
    packaged = files("busgen_cds") / FOLDER
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / FOLDER
