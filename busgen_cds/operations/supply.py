"""What this installation is made of: a software bill of materials in CycloneDX's JSON.

Rules:
- It lists what is installed and runs: Python packages that the product needs here, programs of the pages, and the
  bundles that read. A package that a requirement's marker leaves out is not there; one that is missing is said.
- The same installation gives the same document, byte by byte: sorted, its serial number made of its content, its time
  stated by whoever asks (or SOURCE_DATE_EPOCH), else left out.

CycloneDX 1.6 (ECMA-424); package URLs after the purl specification.
"""

from __future__ import annotations

import hashlib
import importlib.metadata as installed
import json
import os
import platform
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from busgen_cds import __version__
from busgen_cds.errors import Misconfigured

PRODUCT = "busgen-cds"
_NAMESPACE = uuid.UUID("6f2f4f0e-7f0a-5d0c-9d0c-2f4f1f7c6a11")
_STATIC = Path(str(resources.files("busgen_cds"))) / "web" / "static"
_HTMX_VERSION = re.compile(r'version:"([0-9.]+)"')


def bill(bundles: Iterable[Mapping[str, str]], *, extras: Iterable[str] = (), at: datetime | None = None) -> str:
    """The document. `bundles`: name, version and digest of each; `extras`: train, test, gpu, as installed."""
    packages = _needed(extras)
    others = [_package(each.distribution) for name, each in packages.items() if name != PRODUCT]
    document: dict[str, Any] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {**_package(packages[PRODUCT].distribution), "type": "application"},
            "tools": {"components": [{"type": "application", "name": f"{PRODUCT} sbom", "version": __version__}]},
            "properties": [
                {"name": "python", "value": platform.python_version()},
                {"name": "platform", "value": f"{platform.system().lower()}-{platform.machine()}"},
            ],
        },
        "components": [*others, _htmx(), *map(_model, bundles)],
        "dependencies": list(_dependencies(packages)),
    }
    if moment := at or _stated_moment():
        document["metadata"]["timestamp"] = moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    content = json.dumps(document, sort_keys=True)
    document["serialNumber"] = f"urn:uuid:{uuid.uuid5(_NAMESPACE, content)}"
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


def _stated_moment() -> datetime | None:
    said = os.environ.get("SOURCE_DATE_EPOCH", "")
    return datetime.fromtimestamp(int(said), UTC) if said.isdigit() else None


# -- packages


@dataclass
class _Needed:
    """One package, and the extras that somebody asked of it."""

    distribution: installed.Distribution
    extras: set[str] = field(default_factory=set)

    @property
    def requirements(self) -> list[Requirement]:
        return list(_requirements(self.distribution, tuple(sorted(self.extras))))


def _needed(extras: Iterable[str]) -> dict[str, _Needed]:
    """Everything that the product's requirements lead to, by normalised name."""
    found: dict[str, _Needed] = {}
    waiting = [(PRODUCT, set(extras))]
    while waiting:
        name, wanted = waiting.pop()
        known = name in found
        each = found.setdefault(name, found[name] if known else _Needed(_distribution(name)))
        if known and wanted <= each.extras:
            continue
        each.extras |= wanted
        waiting += [(_normal(needed.name), set(needed.extras)) for needed in each.requirements]
    return dict(sorted(found.items()))


def _distribution(name: str) -> installed.Distribution:
    try:
        return installed.distribution(name)
    except installed.PackageNotFoundError:
        raise Misconfigured(
            f"The package {name} is needed and not installed: install the product by its lock file again."
        ) from None


def _requirements(distribution: installed.Distribution, extras: tuple[str, ...]) -> Iterator[Requirement]:
    """What it needs here; a requirement of an extra only where that extra was asked for."""
    for text in distribution.requires or ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in (*extras, "")):
            yield requirement


def _package(distribution: installed.Distribution) -> dict[str, Any]:
    name = _normal(distribution.metadata["Name"])
    made: dict[str, Any] = {
        "type": "library",
        "bom-ref": _ref(distribution),
        "name": name,
        "version": distribution.version,
        "purl": _ref(distribution),
        "scope": "required",
    }
    if summary := _said(distribution, "Summary"):
        made["description"] = summary
    if licence := _licence(distribution):
        made["licenses"] = [licence]
    return made


def _said(distribution: installed.Distribution, name: str) -> str:
    return next(iter(distribution.metadata.get_all(name) or ()), "")


def _licence(distribution: installed.Distribution) -> dict[str, Any] | None:
    """An SPDX expression where the package states one, else its own words, shortly."""
    if expression := _said(distribution, "License-Expression"):
        return {"expression": expression}
    classifiers = distribution.metadata.get_all("Classifier") or ()
    classified = [each.rpartition(" :: ")[2] for each in classifiers if "License ::" in each]
    words = _said(distribution, "License").strip().splitlines()
    name = "; ".join(sorted(classified)) or (words[0][:100] if words else "")
    return {"license": {"name": name}} if name else None


def _dependencies(packages: Mapping[str, _Needed]) -> Iterator[dict[str, Any]]:
    for each in packages.values():
        needed = {_ref(packages[_normal(requirement.name)].distribution) for requirement in each.requirements}
        yield {"ref": _ref(each.distribution), "dependsOn": sorted(needed)}


def _ref(distribution: installed.Distribution) -> str:
    return f"pkg:pypi/{_normal(distribution.metadata['Name'])}@{distribution.version}"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# -- what is no package


def _htmx() -> dict[str, Any]:
    """The one foreign program that the pages load."""
    data = (_STATIC / "htmx.min.js").read_bytes()
    found = _HTMX_VERSION.search(data.decode())
    version = found[1] if found else "unknown"
    return {
        "type": "library",
        "bom-ref": f"pkg:npm/htmx.org@{version}",
        "name": "htmx.org",
        "version": version,
        "purl": f"pkg:npm/htmx.org@{version}",
        "licenses": [{"license": {"id": "0BSD"}}],
        "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(data).hexdigest()}],
    }


def _model(bundle: Mapping[str, str]) -> dict[str, Any]:
    return {
        "type": "machine-learning-model",
        "bom-ref": f"bundle:{bundle['digest']}",
        "name": bundle["name"],
        "version": bundle["version"],
        "hashes": [{"alg": "SHA-256", "content": bundle["digest"]}],
    }
