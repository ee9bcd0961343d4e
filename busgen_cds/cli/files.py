"""The verbs for files: read them without any server, or send them as they are."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from busgen_cds.cli.console import (
    HERE,
    Config,
    Json,
    address,
    console,
    every_file,
    out,
    print_json,
    progress,
    read_settings,
    table,
)
from busgen_cds.errors import Misconfigured

if TYPE_CHECKING:
    from busgen_cds.dicom.outbox import Node

app = typer.Typer()


@app.command()
def read(
    paths: Annotated[list[Path], typer.Argument(exists=True, help="DICOM files, or folders of them.")],
    to: Annotated[Path, typer.Option("--out", help="Folder for results.json and the objects.")],
    prevalence: Annotated[
        float | None,
        typer.Option(min=0.0001, max=0.9999, help="Share of cancers; unset: the calibration's."),
    ] = None,
    bundle: Annotated[Path | None, typer.Option(help="Folder of a bundle; unset: the one shipped.")] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    as_json: Json = False,
) -> None:
    """Read DICOM files without any server: SR, captures, segmentation, presentation state and results.json."""
    from busgen_cds import app as house
    from busgen_cds.flows import read_files

    stations = house.file_stations(house.open_engine(bundle, _device(device)), prevalence)
    found = read_files.sort(paths, stations)
    to.mkdir(parents=True, exist_ok=True)
    documents = [read_files.refusal(each) for each in found.unreadable]
    answers = []
    with progress("Reading", quiet=as_json) as bar:
        for study_files in bar(found.studies.values()):
            answers.append(read_files.read(study_files, stations))
            documents.append(read_files.write(answers[-1], to, prevalence_stated=prevalence is not None))
    (to / "results.json").write_text(json.dumps(documents, indent=1) + "\n")
    if as_json:
        return print_json(documents)
    _show(documents)
    for line in read_files.left_out(found, answers):
        out.print(line, soft_wrap=True, markup=False, highlight=False)
    return out.print(f"{len(documents)} answers in {to / 'results.json'}", soft_wrap=True)


def _device(text: str) -> Any:
    if text not in ("auto", "cuda", "cpu"):
        raise Misconfigured(f"There is no device {text!r}: auto, cuda or cpu.")
    return text


def _show(documents: Iterable[dict[str, Any]]) -> None:
    rows = []
    for each in documents:
        p = each["study"]["probability_of_malignancy"]
        uid = each["study_instance_uid"] or "–"
        says = each["study"]["birads"] or ("no lesion found" if each["outcome"] == "assessed" else each["reason"])
        malignant = "" if p is None else f"{100 * p:.1f} %"
        rows.append((uid[-16:], each["outcome"], says, malignant, _prevalence(each), len(each["findings"])))
    table(("study …", "outcome", "category or reason", "malignant", "at a prevalence", "findings"), rows)


def _prevalence(document: dict[str, Any]) -> str:
    said = document["prevalence"]
    if not said:
        return ""
    used = f"{100 * said['used']:.1f} %"
    return used if said["stated"] is not None else f"not stated: assumed {used}, the calibration's"


@app.command()
def send(
    paths: Annotated[list[Path], typer.Argument(exists=True, help="DICOM files, or folders of them.")],
    to: Annotated[str, typer.Option(help="A node of the site's settings, or AE_TITLE@HOST:PORT.")],
    calling: Annotated[str, typer.Option(help="Our AE title, for an address given here.")] = "BUSGEN_CDS",
    config: Config = HERE,
) -> None:
    """Send DICOM files to a node, as they are."""
    from busgen_cds.dicom import files, outbox

    chosen, refused = [], 0
    for path in every_file(paths):
        try:
            chosen.append(files.open_file(path.read_bytes()))
        except ValueError as reason:
            console.print(f"{path}: {reason}", soft_wrap=True)
            refused += 1
    with progress("Sending") as bar:
        for answer in bar(outbox.send(chosen, _node(to, calling, config)), total=len(chosen)):
            refused += not answer.stored
            if not answer.stored:
                console.print(f"{answer.sop_instance_uid}: {answer.reason}", soft_wrap=True)
    out.print(f"{len(chosen)} sent, {refused} refused or left out.")
    if refused:
        raise typer.Exit(1)


def _node(to: str, calling: str, config: Path) -> Node:
    from busgen_cds import app as house
    from busgen_cds.dicom.outbox import Node

    if "@" not in to:
        return house.node(read_settings(config), to)
    title, host, port = address(to)
    return Node(name=to, ae_title=title, host=host, port=port, calling_ae=calling)
