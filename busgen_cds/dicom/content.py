"""The content items of a structured report (PS3.3 C.17.3): what a report's tree is built from.

highdicom's report classes cannot say "nothing found" or "not analysed" (they demand a measurement group) and take
the time and the equipment from elsewhere; the tree is therefore built here, and read back with highdicom in tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from pydicom.dataset import Dataset

from busgen_cds.birads import Code
from busgen_cds.dicom.headers import code, put, reference
from busgen_cds.study import Source

Point = tuple[float, float]

CONTAINS = "CONTAINS"
MODIFIES = "HAS CONCEPT MOD"
OBSERVED = "HAS OBS CONTEXT"
ACQUIRED = "HAS ACQ CONTEXT"
INFERRED = "INFERRED FROM"
SELECTED = "SELECTED FROM"


def container(
    name: Code, children: Iterable[Dataset], *, relation: str | None = CONTAINS, template: str | None = None
) -> Dataset:
    item = _item("CONTAINER", name, relation)
    put(item, "ContinuityOfContent", "CONTINUOUS" if template == "1500" else "SEPARATE")
    if template is not None:
        identified = Dataset()
        put(identified, "MappingResource", "DCMR")
        put(identified, "TemplateIdentifier", template)
        put(item, "ContentTemplateSequence", [identified])
    return _with(item, children)


def coded(name: Code, value: Code, relation: str = CONTAINS, children: Iterable[Dataset] = ()) -> Dataset:
    item = _item("CODE", name, relation)
    put(item, "ConceptCodeSequence", [code(value)])
    return _with(item, children)


def text(name: Code, value: str, relation: str = CONTAINS) -> Dataset:
    item = _item("TEXT", name, relation)
    put(item, "TextValue", value)
    return item


def uid(name: Code, value: str, relation: str = OBSERVED) -> Dataset:
    item = _item("UIDREF", name, relation)
    put(item, "UID", value)
    return item


def number(name: Code, value: float, unit: Code, children: Iterable[Dataset] = (), relation: str = CONTAINS) -> Dataset:
    item, measured = _item("NUM", name, relation), Dataset()
    put(measured, "NumericValue", f"{value:g}")
    put(measured, "MeasurementUnitsCodeSequence", [code(unit)])
    put(item, "MeasuredValueSequence", [measured])
    return _with(item, children)


def image(
    name: Code, source: Source, relation: str, *, frame: int | None = None, about: Iterable[Dataset] = ()
) -> Dataset:
    item = _item("IMAGE", name, relation)
    put(item, "ReferencedSOPSequence", [reference(source, frames=() if frame is None else (frame,))])
    return _with(item, about)


def composite(source: Source, relation: str = CONTAINS, name: Code | None = None) -> Dataset:
    item = _item("COMPOSITE", name, relation)
    put(item, "ReferencedSOPSequence", [reference(source)])
    return item


def outline(name: Code, points: Sequence[Point], source: Source) -> Dataset:
    """A closed line on one frame. PS3.3 C.18.6.1.1: 0\\0 is the outer corner of the first pixel."""
    item = _item("SCOORD", name, INFERRED)
    put(item, "GraphicData", [float(value) for point in points for value in point])
    put(item, "GraphicType", "POLYLINE")
    return _with(item, [image(name, source, SELECTED, frame=source.frame_number)])


def walk(item: Dataset) -> Iterator[Dataset]:
    """The item and everything below it, in order."""
    yield item
    for child in item.get("ContentSequence", ()):
        yield from walk(child)


def name_of(item: Dataset) -> tuple[str, str]:
    names = item.get("ConceptNameCodeSequence")
    return (str(names[0].CodeValue), str(names[0].CodingSchemeDesignator)) if names else ("", "")


def _item(value_type: str, name: Code | None, relation: str | None) -> Dataset:
    item = Dataset()
    if relation is not None:
        put(item, "RelationshipType", relation)
    put(item, "ValueType", value_type)
    if name is not None:
        put(item, "ConceptNameCodeSequence", [code(name)])
    return item


def _with(item: Dataset, children: Iterable[Dataset]) -> Dataset:
    below = list(children)
    if below:
        put(item, "ContentSequence", below)
    return item
