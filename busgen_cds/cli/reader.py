"""The laboratory's verbs for a reader: train it, measure it, seal it into a bundle."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from busgen_cds.cli.laboratory import CACHE, Cache, Data, Run, Sources, console, data_root, key_used_once, trust_in
from busgen_cds.errors import Misconfigured

if TYPE_CHECKING:
    from busgen_cds.bundle import Bundle, Candidate
    from busgen_cds.learning.evaluate import ForeignFile
    from busgen_cds.learning.recipes.train_reader import Report

app = typer.Typer()


@app.command()
def train(
    out: Run,
    data: Data = None,
    sources: Sources = "busbra,busi",
    preset: Annotated[str, typer.Option(help="cpu or gpu.")] = "cpu",
    seed: int = 0,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    encoder: Annotated[str, typer.Option(help="mobilenet or lite0; the starting weights must be its own.")] = "lite0",
    blind: Annotated[float, typer.Option(help="Share of steps whose attention is even over the image.")] = 0.15,
    init: Annotated[Path | None, typer.Option(help="Starting weights: MobileNetV2 (npz), EfficientNet (pth).")] = None,
    start: Annotated[Path | None, typer.Option(help="A finished run's checkpoint to go on from.")] = None,
    task: Annotated[list[Path] | None, typer.Option(help="Task files: one more head each.")] = None,
    fold: Annotated[str | None, typer.Option(help="k/n: leave fold k of n patients out (cross-validation).")] = None,
    generated: Annotated[Path | None, typer.Option(help="Folder of generated images (`generate`).")] = None,
    share: Annotated[float, typer.Option(help="Of every batch, how much is generated.")] = 0.33,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Another setting, as name=value.")] = None,
    threads: int = 0,
    cache: Cache = CACHE,
) -> None:
    """Train one member of a reader; resumes where it was stopped."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from busgen_cds.learning import tasks
    from busgen_cds.learning.reader import Shape
    from busgen_cds.learning.recipes import train_reader

    settings = train_reader.Settings(
        **_preset(preset)
        | {"sources": tuple(sources.split(",")), "seed": seed, "threads": threads, "fold": _fold(fold)}
        | {"tasks": tuple(tasks.read(path) for path in task or ()), "generated": share if generated else 0.0}
        | ({} if steps is None else {"steps": steps})
        | {"shape": Shape(encoder=_known_encoder(encoder), blind=blind)}
        | _settings(set_ or [])
    )
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("train", total=settings.steps, now="")

        def tell(report: Report) -> None:
            now = "  ".join(f"{name} {value:.3f}" for name, value in report.figures.items())
            progress.update(bar, completed=report.step, now=f"loss {report.loss:.3f}  {report.images_per_second:.0f}/s")
            progress.console.print(f"step {report.step}: {now}")

        path = train_reader.train(data_root(data), out, settings, init, start, cache, tell, generated)
    console.print(f"Trained: {path}")


def _known_encoder(name: str) -> str:
    from busgen_cds.learning.encoders import PLANS

    if name not in PLANS:
        raise typer.BadParameter(f"known encoders are {' and '.join(PLANS)}")
    return name


def _fold(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    k, _, n = text.partition("/")
    if not (k.isdigit() and n.isdigit() and int(k) < int(n)):
        raise typer.BadParameter("a fold is written k/n, with k from 0 to n-1")
    return int(k), int(n)


def _sweeps(text: str) -> tuple[int, int]:
    patients, _, frames = text.partition("x")
    if not (patients.isdigit() and frames.isdigit()):
        raise typer.BadParameter("simulated studies are written patients x frames, for instance 40x120")
    return int(patients), int(frames)


def _shares(text: str) -> list[float]:
    try:
        return [float(share) for share in text.split(",")]
    except ValueError:
        raise typer.BadParameter("shares are numbers with commas between, for instance 0.3,0.7") from None


def _settings(pairs: list[str]) -> dict[str, Any]:
    from busgen_cds.learning.recipes import train_reader

    defaults = dataclasses.asdict(train_reader.Settings())
    kinds = {name: type(value) for name, value in defaults.items()}
    chosen: dict[str, Any] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if kinds.get(name) not in (int, float, bool):
            raise typer.BadParameter(f"no such setting: {name}")
        chosen[name] = _value(name, kinds[name], value)
    return chosen


def _value(name: str, kind: type, text: str) -> Any:
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise typer.BadParameter(f"{name} is {wanted}, not {text!r}") from None


def _preset(name: str) -> dict[str, Any]:
    from busgen_cds.learning.recipes import train_reader

    if name not in train_reader.PRESETS:
        raise typer.BadParameter(f"known presets are {' and '.join(train_reader.PRESETS)}")
    return train_reader.PRESETS[name]


@app.command()
def blend(
    checkpoints: Annotated[list[Path], typer.Argument(help="Runs of which the last started from the others.")],
    shares: Annotated[str, typer.Option(help="Comma-separated shares that sum to one, in the same order.")],
    out: Annotated[Path, typer.Option(help="The checkpoint to write.")],
) -> None:
    """Average the weights of related runs into one member: no cost when it reads, steadier on other scanners."""
    from busgen_cds.learning import checkpoint

    checkpoint.write(out, *checkpoint.blend(checkpoints, _shares(shares)))
    console.print(f"Blended: {out}")


@app.command()
def seal(
    checkpoints: Annotated[list[Path], typer.Argument(help="Checkpoints of one arm; they are averaged in one graph.")],
    out: Annotated[Path, typer.Option(help="Folder of the bundle.")],
    version: Annotated[str, typer.Option(help="Of the bundle: major.minor.patch.")],
    trust: Annotated[Path, typer.Option(help="Folder where the one-shot key's public half is kept.")],
    name: str = "busgen-reader",
    data: Data = None,
    mirrored: Annotated[bool, typer.Option(help="Average the mirrored view as well.")] = True,
    drawing: Annotated[int, typer.Option(help="The outline is drawn by the first members only; 0: by all.")] = 0,
    figures: Annotated[
        Path | None, typer.Option(exists=True, help="reader.json of an evaluation, for the card.")
    ] = None,
    sweeps: Annotated[str, typer.Option(help="Simulated studies for the pooling: patients x frames.")] = "40x120",
    cache: Cache = CACHE,
) -> None:
    """Calibrate, export, check parity and sign with a key that is used once and thrown away."""
    from busgen_cds.learning.recipes import make_bundle

    _vacant(out)
    if (public := _public(trust, name, version)).exists():
        raise typer.BadParameter(f"{public} vouches for another bundle of that version: choose another version")
    measured = json.loads(figures.read_text())["summary"] if figures else None
    patients, frames = _sweeps(sweeps)
    today = datetime.datetime.now(datetime.UTC).date()
    choice = make_bundle.Choice(name, version, today, mirrored, drawing, sweeps=patients, sweep_frames=frames)
    candidate = make_bundle.make(data_root(data), checkpoints, choice, cache, measured, tell=console.print)
    _sign(candidate, out, trust)
    console.print_json(json.dumps(dict(candidate.manifest.figures)))


@app.command()
def evaluate(
    shipped: Annotated[Path, typer.Option(help="Bundle of the arm that is shipped.")],
    trust: Annotated[list[Path], typer.Option(help="Folders with the public keys (PEM) of those who may sign.")],
    external: Annotated[Path | None, typer.Option(help="Bundle of the arm that saw BUS-BRA alone.")] = None,
    data: Data = None,
    out: Annotated[Path, typer.Option(help="Where reader.md, reader.json and the plots go.")] = Path("docs/results"),
    sweeps: Annotated[str, typer.Option(help="Simulated studies: patients x frames; 0x0 leaves them out.")] = "25x300",
    cache: Cache = CACHE,
) -> None:
    """Every figure of the report, with intervals, tables and plots."""
    from busgen_cds.learning import calibrate, evaluate, export, report
    from busgen_cds.learning import data as data_

    root = data_root(data)
    rows = data_.read_manifest(root)
    images = data_.load(root, rows, cache)
    foreign = _foreign(root / "dicom_us")
    simulated = _sweeps(sweeps)
    document: dict[str, Any] = {"arms": {}}
    for name, folder in (("shipped", shipped), ("external", external)):
        if folder is None:
            continue
        opened = _open(folder, trust)
        arm = evaluate.Arm(name, opened.manifest, opened.files)
        run = export.open_graph(arm.files["reader.onnx"])
        mine = evaluate.unseen(images, arm.sources)
        with console.status(f"{name}: reading {len(mine)} images"):
            read = calibrate.cached(run, mine.image, cache, arm.manifest.files["reader.onnx"])
        studies = simulated if name == "shipped" else (0, 0)
        found = evaluate.measure(arm, mine, read, run, foreign, console.print, studies)
        found |= evaluate.cost(arm)
        document["arms"][name] = found | {"digest": opened.digest}
    document = evaluate.rounded(document)
    document["bars"] = report.bars(document)
    document["summary"] = {"test": {b["bar"]: b["reached"] for b in document["bars"] if b["reached"] is not None}}
    out.mkdir(parents=True, exist_ok=True)
    (out / "reader.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    console.print(f"Written: {report.write(document, out)}")
    for bar in document["bars"]:
        console.print(f"{bar['verdict']:>12}  {bar['bar']}: {bar['reached']} ({bar['wanted']})")


@app.command()
def crossval(
    checkpoints: Annotated[list[Path], typer.Argument(help="One checkpoint per fold, trained with --fold k/n.")],
    data: Data = None,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("docs/results/reader-crossval.json"),
    cache: Cache = CACHE,
) -> None:
    """The reader against the radiologists on all of BUS-BRA, every patient scored by a fold that never saw them."""
    from busgen_cds.learning import evaluate
    from busgen_cds.learning.recipes import crossvalidate

    found = evaluate.rounded(crossvalidate.compare(data_root(data), checkpoints, cache, console.print))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    console.print_json(json.dumps(found))


@app.command()
def publish(
    bundle: Annotated[Path, typer.Argument(help="A sealed bundle.")],
    figures: Annotated[Path, typer.Option(exists=True, help="reader.json of its evaluation.")],
    trust: Annotated[list[Path], typer.Option(help="Folders with the public keys (PEM) of those who may sign.")],
    out: Annotated[Path, typer.Option(help="Folder of the published bundle.")],
    keys: Annotated[Path, typer.Option(help="Folder where the one-shot key's public half is kept.")],
    data: Data = None,
    cache: Cache = CACHE,
) -> None:
    """The same bundle with what its evaluation found in card and manifest, signed anew."""
    from busgen_cds.learning.recipes import make_bundle

    _vacant(out)
    sealed = _open(bundle, trust)
    document = json.loads(figures.read_text(encoding="utf-8"))
    if document["arms"]["shipped"]["digest"] != sealed.digest:
        raise typer.BadParameter(f"{figures} holds the figures of another bundle: evaluate {bundle} first")
    _sign(make_bundle.with_figures(data_root(data), sealed, document["summary"], cache), out, keys)


def _vacant(out: Path) -> Path:
    """A sealed bundle is never written over."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise typer.BadParameter(f"{out} is not empty: a bundle needs a folder of its own")
    return out


def _public(keys: Path, name: str, version: str) -> Path:
    return keys / f"release-{name}-{version}.pem"


def _sign(candidate: Candidate, out: Path, keys: Path) -> None:
    manifest = candidate.manifest
    signer = key_used_once()
    try:
        candidate.seal(out, signer)
    except OSError as error:
        raise Misconfigured(f"{out} could not be written ({error.strerror}): what lies there is no bundle.") from error
    trust_in(signer, _public(keys, manifest.name, manifest.version))
    console.print(
        f"Sealed {manifest.name} {manifest.version} in {out}, digest {candidate.digest[:16]}, key {signer.key_id}"
    )


def _open(folder: Path, trust: list[Path]) -> Bundle:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    from busgen_cds import bundle, signing

    keys = [load_pem_public_key(path.read_bytes()) for place in trust for path in sorted(place.glob("*.pem"))]
    pairs = [(key, frozenset({bundle.KIND})) for key in keys if isinstance(key, Ed25519PublicKey)]
    return bundle.Bundle.open(folder, signing.Verifier.of(*pairs))


def _foreign(folder: Path) -> dict[str, ForeignFile]:
    """DICOM files of other organs: whether intake refuses them, and their pictures as the gate alone would see them."""
    import numpy as np

    from busgen_cds import pixels
    from busgen_cds.dicom import decode, intake
    from busgen_cds.learning.evaluate import ForeignFile
    from busgen_cds.study import Study

    found: dict[str, ForeignFile] = {}
    for path in sorted(folder.rglob("*.dcm")) if folder.is_dir() else ():
        refused = not isinstance(intake.study([(path.read_bytes(), path.name)]), Study)
        pictures = []
        try:
            opened = decode.open_file(path.read_bytes())
            frames = decode.Frames(opened, decode.shape(opened))
            for index in range(min(frames.available, 12)):
                prepared, _ = pixels.prepare(frames.decode(index).grey)
                pictures.append(np.rint(prepared[0] * 255).astype(np.uint8))
        except decode.Unreadable as reason:
            console.print(f"{path.name}: {reason}")
        found[str(path.relative_to(folder))] = ForeignFile(
            refused, np.array(pictures, np.uint8).reshape(-1, pixels.SIZE, pixels.SIZE)
        )
    return found
