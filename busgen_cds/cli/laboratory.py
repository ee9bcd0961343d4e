"""The laboratory's verbs: what trains, measures and seals a reader, and what makes images and shares them.

Rules: torch is imported inside the verbs, so that a clinic's program starts without it.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from busgen_cds.bundle import Bundle, Candidate
    from busgen_cds.learning.evaluate import ForeignFile
    from busgen_cds.learning.generator import Generator
    from busgen_cds.learning.recipes.train_reader import Report
    from busgen_cds.learning.release import Filter
    from busgen_cds.signing import KeySigner

app = typer.Typer(no_args_is_help=True, help="Train, measure and seal models.")
console = Console()

Data = Annotated[Path | None, typer.Option("--data", help="Folder with manifest.csv; BUSGEN_DATA without it.")]
Cache = Annotated[Path, typer.Option(help="Where prepared images are kept.")]


def _root(given: Path | None) -> Path:
    from busgen_cds.learning import data

    return given or data.default_root()


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder of the run; an unfinished run there goes on.")],
    data: Data = None,
    sources: Annotated[str, typer.Option(help="Comma-separated sources of the manifest.")] = "busbra,busi",
    preset: Annotated[str, typer.Option(help="cpu or gpu.")] = "cpu",
    seed: int = 0,
    steps: int | None = None,
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
    cache: Cache = Path("runs/cache"),
) -> None:
    """Train one member of a reader; resumes where it was stopped."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from busgen_cds.learning import tasks
    from busgen_cds.learning.reader import Shape
    from busgen_cds.learning.recipes import train_reader

    settings = train_reader.Settings(
        **train_reader.PRESETS[preset]
        | {"sources": tuple(sources.split(",")), "seed": seed, "threads": threads, "fold": _fold(fold)}
        | {"tasks": tuple(tasks.read(path) for path in task or ()), "generated": share if generated else 0.0}
        | ({"steps": steps} if steps else {})
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

        path = train_reader.train(_root(data), out, settings, init, start, cache, tell, generated)
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


def _settings(pairs: list[str]) -> dict[str, Any]:
    from busgen_cds.learning.recipes import train_reader

    defaults = dataclasses.asdict(train_reader.Settings())
    kinds = {name: type(value) for name, value in defaults.items()}
    chosen: dict[str, Any] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if kinds.get(name) not in (int, float, bool):
            raise typer.BadParameter(f"no such setting: {name}")
        chosen[name] = value.lower() == "true" if kinds[name] is bool else kinds[name](value)
    return chosen


@app.command()
def blend(
    checkpoints: Annotated[list[Path], typer.Argument(help="Runs of which the last started from the others.")],
    shares: Annotated[str, typer.Option(help="Comma-separated shares that sum to one, in the same order.")],
    out: Annotated[Path, typer.Option(help="The checkpoint to write.")],
) -> None:
    """Average the weights of related runs into one member: no cost when it reads, steadier on other scanners."""
    from busgen_cds.learning import checkpoint

    checkpoint.write(out, *checkpoint.blend(checkpoints, [float(share) for share in shares.split(",")]))
    console.print(f"Blended: {out}")


@app.command()
def seal(
    checkpoints: Annotated[list[Path], typer.Argument(help="Checkpoints of one arm; they are averaged in one graph.")],
    out: Annotated[Path, typer.Option(help="Folder of the bundle.")],
    version: str,
    trust: Annotated[Path, typer.Option(help="Folder where the one-shot key's public half is kept.")],
    name: str = "busgen-reader",
    data: Data = None,
    mirrored: Annotated[bool, typer.Option(help="Average the mirrored view as well.")] = True,
    drawing: Annotated[int, typer.Option(help="The outline is drawn by the first members only; 0: by all.")] = 0,
    figures: Annotated[Path | None, typer.Option(help="reader.json of an evaluation, for the card.")] = None,
    sweeps: Annotated[str, typer.Option(help="Simulated studies for the pooling: patients x frames.")] = "40x120",
    cache: Cache = Path("runs/cache"),
) -> None:
    """Calibrate, export, check parity and sign with a key that is used once and thrown away."""
    from busgen_cds.learning.recipes import make_bundle

    measured = json.loads(figures.read_text())["summary"] if figures else None
    patients, _, frames = sweeps.partition("x")
    today = datetime.datetime.now(datetime.UTC).date()
    choice = make_bundle.Choice(name, version, today, mirrored, drawing, sweeps=int(patients), sweep_frames=int(frames))
    candidate = make_bundle.make(_root(data), checkpoints, choice, cache, measured, tell=console.print)
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
    cache: Cache = Path("runs/cache"),
) -> None:
    """Every figure of the report, with intervals, tables and plots."""
    from busgen_cds.learning import calibrate, evaluate, export, report
    from busgen_cds.learning import data as data_

    root = _root(data)
    rows = data_.read_manifest(root)
    images = data_.load(root, rows, cache)
    foreign = _foreign(root / "dicom_us")
    patients, _, frames = sweeps.partition("x")
    document: dict[str, Any] = {"arms": {}}
    for name, folder in (("shipped", shipped), ("external", external)):
        if folder is None:
            continue
        opened = _open(folder, trust)
        arm = evaluate.Arm(name, opened.manifest, opened.files)
        run = export.open_graph(arm.files["reader.onnx"])
        mine = evaluate.unseen(images, arm.sources)
        with console.status(f"{name}: reading {len(mine)} images"):
            read = calibrate.cached(run, mine.image, cache / f"readings-{arm.manifest.files['reader.onnx'][:16]}.npz")
        studies = (int(patients), int(frames)) if name == "shipped" else (0, 0)
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
    cache: Cache = Path("runs/cache"),
) -> None:
    """The reader against the radiologists on all of BUS-BRA, every patient scored by a fold that never saw them."""
    from busgen_cds.learning import evaluate
    from busgen_cds.learning.recipes import crossvalidate

    found = evaluate.rounded(crossvalidate.compare(_root(data), checkpoints, cache, console.print))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    console.print_json(json.dumps(found))


@app.command()
def publish(
    bundle: Annotated[Path, typer.Argument(help="A sealed bundle.")],
    figures: Annotated[Path, typer.Option(help="reader.json of its evaluation.")],
    trust: Annotated[list[Path], typer.Option(help="Folders with the public keys (PEM) of those who may sign.")],
    out: Annotated[Path, typer.Option(help="Folder of the published bundle.")],
    keys: Annotated[Path, typer.Option(help="Folder where the one-shot key's public half is kept.")],
    data: Data = None,
    cache: Cache = Path("runs/cache"),
) -> None:
    """The same bundle with what its evaluation found in card and manifest, signed anew."""
    from busgen_cds.learning.recipes import make_bundle

    sealed = _open(bundle, trust)
    document = json.loads(figures.read_text(encoding="utf-8"))
    if document["arms"]["shipped"]["digest"] != sealed.digest:
        raise typer.BadParameter(f"{figures} holds the figures of another bundle: evaluate {bundle} first")
    _sign(make_bundle.with_figures(_root(data), sealed, document["summary"], cache), out, keys)


def _sign(candidate: Candidate, out: Path, keys: Path) -> None:
    manifest = candidate.manifest
    signer = _key_used_once(keys / f"release-{manifest.name}-{manifest.version}.pem")
    candidate.seal(out, signer)
    console.print(
        f"Sealed {manifest.name} {manifest.version} in {out}, digest {candidate.digest[:16]}, key {signer.key_id}"
    )


def _key_used_once(public: Path) -> KeySigner:
    """A key that is gone when this program ends; its public half is what a product trusts."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    from busgen_cds import signing

    signer = signing.KeySigner(Ed25519PrivateKey.generate())
    public.parent.mkdir(parents=True, exist_ok=True)
    public.write_bytes(signer.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return signer


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


# The generator


@app.command()
def pretrain(
    out: Annotated[Path, typer.Option(help="Folder of the run; an unfinished run there goes on.")],
    data: Data = None,
    sources: Annotated[str, typer.Option(help="Comma-separated sources of the manifest.")] = "busbra,busi",
    preset: Annotated[str, typer.Option(help="cpu (128 px) or gpu (256 px).")] = "cpu",
    init: Annotated[Path | None, typer.Option(help="ImageNet encoder (npz) for the perceptual loss.")] = None,
    network: Annotated[str, typer.Option(help="unet or transformer.")] = "unet",
    seed: int = 0,
    coder_steps: Annotated[int | None, typer.Option(help="Steps of the autoencoder.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the flow.")] = None,
    coder: Annotated[Path | None, typer.Option(help="A finished autoencoder, instead of training one.")] = None,
    shards: Annotated[Path | None, typer.Option(help="Shards encoded before, instead of encoding.")] = None,
    start: Annotated[
        Path | None, typer.Option(help="A generator to go on from; with its autoencoder as --coder.")
    ] = None,
    threads: int = 0,
    cache: Cache = Path("runs/cache"),
) -> None:
    """Train the generator: autoencoder, shards of latents, flow; each part resumes where it was stopped.

    `torchrun --nproc-per-node N -m busgen_cds pretrain …` spreads it over N devices.
    """
    import torch

    from busgen_cds.learning import networks
    from busgen_cds.learning.recipes import autoencode, encode
    from busgen_cds.learning.recipes import pretrain as recipe

    if threads:
        torch.set_num_threads(threads)
    named = {"sources": tuple(sources.split(",")), "seed": seed}
    coding = autoencode.Settings(**autoencode.PRESETS[preset] | named | ({"steps": coder_steps} if coder_steps else {}))
    learning = recipe.Settings(**recipe.PRESETS[preset] | {"seed": seed} | ({"steps": steps} if steps else {}))
    if network not in networks.KINDS:
        raise typer.BadParameter(f"network is one of {', '.join(networks.KINDS)}")
    learning = dataclasses.replace(learning, shape=dataclasses.replace(learning.shape, kind=network))  # type: ignore[arg-type]
    if coder is None:
        coder = autoencode.train(_root(data), out, coding, init, cache, _steps("autoencoder", coding.steps))
    if shards is None:
        shards = out / "shards"
        if not (shards / encode.INDEX).exists():
            parts = encode.Settings(sources=coding.sources, size=coding.size, seed=seed)
            encode.encode(_root(data), coder, shards, parts, tell=_parts("shards"))
    made = recipe.train(shards, coder, out, learning, _steps("flow", learning.steps), start)
    console.print(f"Trained: {made}")


@app.command()
def finish(
    generator: Annotated[Path, typer.Option(help="A finished generator.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; an unfinished run there goes on.")],
    init: Annotated[Path, typer.Option(help="ImageNet encoder (npz), the critic's eye.")],
    data: Data = None,
    seed: int = 0,
    steps: int = 2500,
    threads: int = 0,
    cache: Cache = Path("runs/cache"),
) -> None:
    """Teach a generator's decoder to draw speckle; its encoder and its flow stay as they are."""
    import torch

    from busgen_cds.learning.recipes import finish as recipe

    if threads:
        torch.set_num_threads(threads)
    settings = recipe.Settings(seed=seed, steps=steps)
    made = recipe.train(generator, _root(data), out, settings, init, cache, _steps("finish", steps))
    console.print(f"Finished: {made}")


def _steps(what: str, total: int) -> Callable[[Any], None]:
    """A line per report: where it stands, its figures, and when it will be done."""

    def tell(report: Any) -> None:
        figures = {k: v for k, v in vars(report).items() if k not in ("step", "images_per_second")}
        said = "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in figures.items())
        console.print(f"{what} {report.step}/{total}  {said}  {report.images_per_second:.0f} images/s")

    return tell


def _parts(what: str) -> Callable[[int, int], None]:
    return lambda done, total: console.print(f"{what} {done}/{total}")


Weights = Annotated[Path | None, typer.Option("--generator", help="Folder of the generator; the package's without it.")]
Adapter = Annotated[Path | None, typer.Option(help="A few-shot adapter of that generator.")]
ImageNet = Annotated[Path | None, typer.Option("--init", help="ImageNet encoder (npz).")]
ReaderRun = Annotated[Path | None, typer.Option("--reader", help="Checkpoint of a reader trained on real images only.")]


def _generator(folder: Path | None, adapter: Path | None = None) -> Generator:
    from busgen_cds.learning import generator

    return generator.Generator.load(folder or generator.SHIPPED, adapter=adapter)


def _gate(folder: Path | None) -> Filter | None:
    from busgen_cds.learning import generator, release

    path = (folder or generator.SHIPPED) / release.FILE
    return release.load(path) if path.exists() else None


@app.command()
def generate(
    out: Annotated[Path, typer.Option(help="Folder of the images; an unfinished one goes on.")],
    count: int = 100,
    mix: Annotated[str, typer.Option(help="Pathologies and their shares.")] = "benign=0.5,malignant=0.5",
    device: Annotated[
        list[str] | None, typer.Option(help="Devices to draw from; all that are known without it.")
    ] = None,
    label: Annotated[list[str] | None, typer.Option(help="A task's own label, as condition=value.")] = None,
    generator: Weights = None,
    adapter: Adapter = None,
    seed: int = 0,
    shard: int = 256,
    in_healthy: Annotated[
        bool, typer.Option(help="Grow each lesion in a healthy image that is generated first.")
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler; 16 without it.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="1: as various as the training images, in half the time; 1.5 without it.")
    ] = None,
    unfiltered: Annotated[bool, typer.Option(help="For measurements only: nothing is dropped.")] = False,
) -> None:
    """Make images with masks and labels; each passes the release filter."""
    from rich.progress import Progress

    from busgen_cds.learning.generator import Sampling
    from busgen_cds.learning.recipes import synthesise

    asked = {name: value for name, value in (("steps", steps), ("guidance", guidance)) if value is not None}
    settings = synthesise.Settings(
        count=count,
        seed=seed,
        mix={name: float(share) for name, share in _pairs(mix.split(","))},
        devices=tuple(device or ()),
        labels=dict(_pairs(label or [])),
        shard=shard,
        filtered=not unfiltered,
        in_healthy=in_healthy,
        sampling=Sampling(**asked),  # type: ignore[arg-type]
    )
    with Progress(console=console) as progress:
        bar = progress.add_task("images", total=count)
        made = synthesise.generate(
            _generator(generator, adapter),
            out,
            settings,
            _gate(generator),
            lambda done, total: progress.update(bar, completed=done, total=total),
        )
    console.print(f"{made.released} images in {out}; {made.dropped} of {made.made} were too near to a training image.")


def _pairs(texts: list[str]) -> list[tuple[str, str]]:
    pairs = [(name, value) for name, is_there, value in (text.partition("=") for text in texts) if is_there]
    if len(pairs) != len(texts):
        raise typer.BadParameter(f"expected name=value, got {', '.join(texts)}")
    return pairs


@app.command()
def fewshot(
    task: Annotated[Path, typer.Option(help="Task file.")],
    out: Annotated[Path, typer.Option(help="Folder of the adapter and its card.")],
    shots: Annotated[int, typer.Option(help="Images to learn from, 8 to 64.")] = 32,
    generator: Weights = None,
    data: Data = None,
    rank: int = 8,
    seed: int = 0,
    steps: int = 600,
    cache: Cache = Path("runs/cache"),
) -> None:
    """Adapt the generator to a task from a few images; the backbone stays as it is."""
    from busgen_cds.learning.recipes import fewshot as recipe

    settings = recipe.Settings(shots=shots, rank=rank, seed=seed, steps=steps)
    source = recipe.read_task(task)
    path = recipe.adapt(_generator(generator), _root(data), source, out, settings, cache, _steps("adapter", steps))
    console.print(f"Adapter: {path} ({path.stat().st_size / 1e6:.1f} MB); its card: {path.with_name(recipe.CARD)}")


@app.command()
def privacy(
    images: Annotated[Path | None, typer.Option(help="Generated images to audit.")] = None,
    generator: Weights = None,
    adapter: Adapter = None,
    task: Annotated[Path | None, typer.Option(help="The adapter's task file: its shots are the members.")] = None,
    shots: int = 32,
    data: Data = None,
    init: ImageNet = None,
    reader: ReaderRun = None,
    out: Annotated[Path, typer.Option(help="Where privacy.json and privacy.md go.")] = Path("docs/results"),
    filter_only: Annotated[bool, typer.Option(help="Build the release filter beside the generator, and stop.")] = False,
    members: Annotated[int, typer.Option(help="Most training images, and held-out ones, that are looked at.")] = 600,
    control_steps: Annotated[int, typer.Option(help="Steps of the over-trained control; 0: none is made.")] = 400,
    control_members: Annotated[int, typer.Option(help="Images that the control learns by heart.")] = 48,
    seed: int = 0,
    cache: Cache = Path("runs/cache"),
) -> None:
    """Attack the generator and report; or build the release filter from its training images."""
    from busgen_cds.learning import data as data_
    from busgen_cds.learning import embed, release
    from busgen_cds.learning import generator as generator_
    from busgen_cds.learning.recipes import audit
    from busgen_cds.learning.recipes import fewshot as fewshot_

    makes, root = _generator(generator, adapter), _root(data)
    if filter_only:
        path = (generator or generator_.SHIPPED) / release.FILE
        audit.build_filter(makes, root, cache).save(path)
        console.print(f"Release filter: {path}")
        return
    if images is None or (adapter is None) != (task is None):
        raise typer.BadParameter("name --images to audit; an --adapter is audited with its --task, and a task with it")
    learnt = None if task is None else fewshot_.choose(data_.read_manifest(root), fewshot_.read_task(task), shots, seed)
    settings = audit.Settings(members, control_members=control_members, control_steps=control_steps, seed=seed)
    name = "the backbone" if task is None else f"the adapter {task.stem}"
    embeddings = embed.at_hand(makes.coder, init, reader)
    report = audit.audit(makes, name, root, images, embeddings, settings, cache, learnt, console.print)
    out.mkdir(parents=True, exist_ok=True)
    stem = "privacy" if task is None else f"privacy-{task.stem}"
    (out / f"{stem}.json").write_text(report.to_json() + "\n", encoding="utf-8")
    (out / f"{stem}.md").write_text(report.to_markdown(), encoding="utf-8")
    for finding in report.findings:
        console.print(f"{finding.verdict:>17}  {finding.attack}: {finding.value} (control {finding.control})")
    console.print(f"{'Every bar holds' if report.holds else 'Not every bar holds'}: {out / f'{stem}.md'}")


@app.command()
def share(
    images: Annotated[Path, typer.Option(help="Generated images.")],
    report: Annotated[Path, typer.Option(help="Their privacy report (JSON).")],
    out: Annotated[Path, typer.Option(help="Folder of the package; must be empty.")],
    name: Annotated[str, typer.Option(help="What the package is called.")],
    creator: Annotated[str, typer.Option(help="Who answers for the package.")],
    key: Annotated[Path, typer.Option(help="Ed25519 private key (PEM) that signs it.")],
    version: str = "1",
    dicom: Annotated[bool, typer.Option(help="Add each image as an ultrasound object, Synthetic Data = YES.")] = True,
) -> None:
    """Pack generated images for another site: labels, metadata, card, privacy report, signature."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from rich.progress import Progress

    from busgen_cds import signing
    from busgen_cds.dicom import synthetic
    from busgen_cds.errors import Misconfigured
    from busgen_cds.learning.recipes import share as recipe

    secret = load_pem_private_key(key.read_bytes(), None)
    if not isinstance(secret, Ed25519PrivateKey):
        raise Misconfigured(f"{key} is no Ed25519 private key.")
    now = datetime.datetime.now(datetime.UTC)
    terms = recipe.Terms(name, version, creator, now.date().isoformat())

    def write(made: recipe.Made) -> bytes:
        one = f"{name}-{version}-{made.number:07d}"
        return synthetic.study([made.image], name=one, at=now, manufacturer=made.device or "unknown")[0]

    with Progress(console=console) as progress:
        bar = progress.add_task("images")
        recipe.package(
            images,
            report,
            out,
            terms,
            signing.KeySigner(secret),
            write if dicom else None,
            lambda done, total: progress.update(bar, completed=done, total=total),
        )
    console.print(f"Package: {out}, signed by key {signing.key_id(secret.public_key())}")


@app.command()
def fidelity(
    images: Annotated[Path, typer.Option(help="Generated images.")],
    generator: Weights = None,
    data: Data = None,
    init: ImageNet = None,
    reader: ReaderRun = None,
    inception: Annotated[
        Path | None, typer.Option(help="Inception as TorchScript, called with return_features=True, for the usual FID.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the page, the figures and the picture go.")] = Path("docs/results"),
    most: Annotated[int, typer.Option(help="Images of each side at most.")] = 600,
    judge_steps: int = 150,
    cache: Cache = Path("runs/cache"),
) -> None:
    """How real the images are: distances with floors, a judge with its control, masks, speed, a picture."""
    from busgen_cds.learning import embed
    from busgen_cds.learning import fidelity as fidelity_
    from busgen_cds.learning.recipes import fidelity_report as recipe

    makes = _generator(generator)
    known = embed.at_hand(makes.coder, init, reader, inception)
    embeddings = {name: known[name] for name in known if name not in ("latent", "pixels")}
    settings = recipe.Settings(images=most, judging=fidelity_.Judging(steps=judge_steps, size=makes.card.size))
    segment = recipe.segmenter(reader) if reader else None
    found = recipe.measure(makes, _root(data), images, embeddings, settings, init, segment, cache, console.print)
    page = recipe.write(found, out)
    console.print(f"Written: {page}, {recipe.picture(makes, out, settings.pairs)}")


@app.command()
def value(
    out: Annotated[Path, typer.Option(help="Folder of the queue's runs.")],
    images: Annotated[Path | None, typer.Option(help="Generated images, in the real images' class mix.")] = None,
    generator: Weights = None,
    data: Data = None,
    init: ImageNet = None,
    sources: Annotated[
        str, typer.Option(help="What every part of an arm learns from; all else is external.")
    ] = "busbra",
    steps: int = 1200,
    seeds: int = 3,
    scaling: Annotated[bool, typer.Option(help="The arms of growing size instead of the comparison.")] = False,
    most: Annotated[int | None, typer.Option(help="Runs to do now; all without it.")] = None,
    results: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("docs/results"),
    cache: Cache = Path("runs/cache"),
) -> None:
    """What generated images are worth to a reader: every arm, seed by seed; stop and call again at will."""
    from busgen_cds.learning import data as data_
    from busgen_cds.learning.recipes import value as recipe

    root, settings = _root(data), recipe.Settings(tuple(sources.split(",")), steps, seeds=seeds)
    real = sum(r.source in settings.sources and r.split == "train" for r in data_.read_manifest(root))
    runs = recipe.queue(recipe.scaling() if scaling else recipe.arms(real), seeds)
    card = _generator(generator).card if images is not None else None
    if card is None:
        runs = [run for run in runs if not run.arm.generated]
    left = recipe.work(runs, root, images, card, out, settings, init, cache, most, console.print)
    found = recipe.results(out)
    if found:
        console.print(f"Written: {recipe.write(recipe.compared(found, root, settings, cache), left, results)}")
    console.print(f"{left} runs left")


@app.command()
def shots(
    task: Annotated[Path, typer.Option(help="Task file whose shots are of an unseen device or site.")],
    out: Annotated[Path, typer.Option(help="Folder of the queue's runs.")],
    generator: Weights = None,
    data: Data = None,
    init: ImageNet = None,
    seeds: int = 3,
    steps: Annotated[int, typer.Option(help="Steps of each reader.")] = 1200,
    most: Annotated[int | None, typer.Option(help="Runs to do now; all without it.")] = None,
    results: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("docs/results"),
    cache: Cache = Path("runs/cache"),
) -> None:
    """What few shots are worth on an unseen device or site: AUC against 8, 16, 32 and 64 shots; a resumable queue."""
    from busgen_cds.learning.recipes import fewshot as fewshot_
    from busgen_cds.learning.recipes import shots as recipe
    from busgen_cds.learning.recipes import value as value_

    settings = recipe.Settings(seeds=seeds, reader=value_.Settings(steps=steps))
    source = fewshot_.read_task(task)
    left = recipe.work(
        lambda adapter: _generator(generator, adapter),
        _root(data),
        source,
        out,
        settings,
        init,
        cache,
        most,
        console.print,
    )
    console.print(f"Written: {recipe.write(out, settings, left, results, source.task.name)}; {left} runs left")


@app.command()
def segmentation(
    out: Annotated[Path, typer.Option(help="Folder of the runs; what is done is not repeated.")],
    images: Annotated[Path, typer.Option(help="Healthy → lesion images (`generate --in-healthy`).")],
    generator: Weights = None,
    data: Data = None,
    steps: int = 800,
    seeds: int = 3,
    results: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("docs/results"),
    cache: Cache = Path("runs/cache"),
) -> None:
    """What healthy → lesion images are worth to a U-Net on BUSI."""
    from busgen_cds.learning.recipes import segmentation as recipe

    settings = recipe.Settings(steps=steps, seeds=seeds)
    card = _generator(generator).card
    found = recipe.measure(_root(data), images, card, out, settings, cache, console.print)
    console.print(f"Written: {recipe.write(found, results)}")


@app.command()
def cost(
    preset: Annotated[list[str] | None, typer.Option(help="cpu, gpu or both.")] = None,
    seconds: Annotated[float, typer.Option(help="How long each part is measured.")] = 20.0,
    images: int = 3_518_495,
    epochs: float = 100.0,
    devices: int = 8,
    price: Annotated[float, typer.Option(help="Of one device for an hour.")] = 2.5,
    out: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("docs"),
) -> None:
    """What pre-training on millions of images takes, from speeds measured on this machine."""
    from busgen_cds.learning.recipes import cost as recipe

    assumed = recipe.Assumed(images=images, epochs=epochs, devices=devices, price=price)
    measured = [recipe.measure(name, seconds, console.print) for name in preset or ["cpu"]]
    console.print(f"Written: {recipe.write(measured, assumed, out)}")


@app.command()
def ship(
    run: Annotated[Path, typer.Option(help="Folder of a finished generator, with its release filter.")],
    out: Annotated[Path, typer.Option(help="Where the package keeps it.")] = Path("busgen_cds/weights"),
    results: Annotated[Path, typer.Option(help="Where its figures lie, for the card.")] = Path("docs/results"),
) -> None:
    """Put a finished generator into the package, with its model card."""
    from busgen_cds.learning.recipes import ship as recipe

    console.print(f"Shipped: {recipe.ship(run, results, out)}")


@app.command("site-adaptation")
def site_adaptation(
    start: Annotated[Path, typer.Option(help="The member of the reader that every arm begins from.")],
    runs: Annotated[Path, typer.Option("--out", help="Folder of the queue's runs.")],
    replay: Annotated[Path | None, typer.Option(help="The release's generated images (`generate`).")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder with manifest.csv; BUSGEN_DATA without it.")
    ] = None,
    draws: int = 10,
    steps: Annotated[int, typer.Option(help="Of every fine-tuning.")] = 48,
    most: Annotated[int | None, typer.Option(help="Runs to do now; all without it.")] = None,
    results: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("docs/results"),
    cache: Annotated[Path, typer.Option(help="Where prepared images are kept.")] = Path("runs/cache"),
) -> None:
    """What 16, 32 and 64 cases of a new site are worth to its reader; a resumable queue."""
    from busgen_cds.learning import data as data_
    from busgen_cds.learning.recipes import adapt_reader
    from busgen_cds.learning.recipes import site_adaptation as recipe

    settings = recipe.Settings(draws=draws, adapt=adapt_reader.Settings(steps=steps))
    root = data or data_.default_root()
    left = recipe.work(root, start, runs, settings, replay, cache, most, console.print)
    found = recipe.compare(root, runs, settings, cache)
    page = recipe.write(found, root, runs, settings, left, results, cache)
    console.print(f"Written: {page}; {left} runs left", soft_wrap=True)


@app.command("site-recipe")
def site_recipe(
    start: Annotated[Path, typer.Option(help="The member of the reader that every recipe begins from.")],
    runs: Annotated[Path, typer.Option("--out", help="Folder of the queue's runs.")],
    data: Data = None,
    rounds: Annotated[int, typer.Option(help="Times that the patients are dealt into folds.")] = 2,
    cases: Annotated[int, typer.Option(help="That teach in every run.")] = 64,
    most: Annotated[int | None, typer.Option(help="Runs to do now; all without it.")] = None,
    results: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("docs/results"),
    cache: Cache = Path("runs/cache"),
) -> None:
    """Compare ways to adapt on the patients of `site-adapt` alone; a resumable queue."""
    from busgen_cds.learning.recipes import site_recipe as recipe

    root = _root(data)
    left = recipe.work(root, start, runs, rounds, cases, cache, most, console.print)
    page = recipe.write(recipe.compare(runs, rounds), cases, left, results)
    console.print(f"Written: {page}; {left} runs left", soft_wrap=True)


@app.command("release-set")
def release_set(
    version: Annotated[str, typer.Option(help="Of the set: a new one for every set that is released.")],
    generator: Weights = None,
    count: Annotated[int, typer.Option(help="Images.")] = 360,
    privacy: Annotated[
        Path | None, typer.Option(help="privacy.json of this generator; without it, not audited.")
    ] = None,
    images: Annotated[Path, typer.Option(help="Where they are made; an unfinished folder goes on.")] = Path(
        "runs/release-set"
    ),
    out: Annotated[Path, typer.Option(help="Where the package keeps it.")] = Path("busgen_cds/release_set"),
    keys: Annotated[Path, typer.Option(help="Where the one-shot key's public half goes.")] = Path("busgen_cds/trust"),
    guidance: Annotated[float, typer.Option(help="How firmly an image is held to its label.")] = 2.0,
    seed: int = 0,
) -> None:
    """Make the images that every site's judge can read, and put them into the package, signed."""
    from busgen_cds import app as house
    from busgen_cds import bundle, signing
    from busgen_cds.learning import export
    from busgen_cds.learning import generator as generator_
    from busgen_cds.learning.recipes import release_set as recipe
    from busgen_cds.learning.recipes import synthesise

    makes = _generator(generator)
    asked = recipe.typical(makes.card.vocabulary, count, seed, guidance)
    synthesise.generate(makes, images, asked, _gate(generator))
    weights = signing.digest(((generator or generator_.SHIPPED) / generator_.FLOW).read_bytes())
    shipped = house.open_bundle()
    reader = (f"{shipped.name.name} {shipped.name.version}", export.open_graph(shipped.files[bundle.NETWORK], 1))
    report = json.loads(privacy.read_text(encoding="utf-8")) if privacy else None
    for old in keys.glob(f"release-{recipe.NAME}-*.pem"):  # the set it vouched for is replaced
        old.unlink()
    terms = recipe.Terms(version, datetime.date.today().isoformat(), weights)
    signer = _key_used_once(keys / f"release-{recipe.NAME}-{version}.pem")
    said = recipe.make(images, out, terms, signer, reader, report)
    console.print(f"{out / recipe.FILE}: {len(said.files)} files. Its card: {out / recipe.CARD}")
