"""The laboratory's verbs for the generator: train it, adapt it, make images, audit them, share and ship them."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from busgen_cds.cli.laboratory import (
    CACHE,
    Adapter,
    Cache,
    Data,
    ImageNet,
    ReaderRun,
    Run,
    Sources,
    Weights,
    compute_with,
    console,
    data_root,
    key_used_once,
    open_generator,
    trust_in,
)

if TYPE_CHECKING:
    from busgen_cds.learning.release import Filter

app = typer.Typer()


@app.command()
def pretrain(
    out: Run,
    data: Data = None,
    sources: Sources = "busbra,busi",
    preset: Annotated[str, typer.Option(help="cpu (128 px) or gpu (256 px).")] = "cpu",
    init: Annotated[Path | None, typer.Option(help="ImageNet encoder (npz) for the perceptual loss.")] = None,
    network: Annotated[str, typer.Option(help="unet or transformer.")] = "unet",
    seed: int = 0,
    coder_steps: Annotated[int | None, typer.Option(help="Steps of the autoencoder.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the flow.")] = None,
    coder: Annotated[Path | None, typer.Option(help="A finished autoencoder, instead of training one.")] = None,
    shards: Annotated[Path | None, typer.Option(help="Shards encoded before, instead of encoding.")] = None,
    start: Annotated[
        Path | None, typer.Option(help="Folder of a generator to go on from; its autoencoder stays as it is.")
    ] = None,
    threads: int = 0,
    cache: Cache = CACHE,
) -> None:
    """Train the generator: autoencoder, shards of latents, flow; each part resumes where it was stopped.

    `torchrun --nproc-per-node N -m busgen_cds pretrain …` spreads it over N devices.
    """
    from busgen_cds.learning import networks, processes
    from busgen_cds.learning.generator import AUTOENCODER
    from busgen_cds.learning.recipes import autoencode, encode
    from busgen_cds.learning.recipes import pretrain as recipe

    compute_with(threads)
    named = {"sources": tuple(sources.split(",")), "seed": seed}
    codes, learns = (autoencode.preset(each.PRESETS, preset) for each in (autoencode, recipe))
    coding = autoencode.Settings(**codes | named | ({"steps": coder_steps} if coder_steps else {}))
    learning = recipe.Settings(**learns | {"seed": seed} | ({"steps": steps} if steps else {}))
    if network not in networks.KINDS:
        raise typer.BadParameter(f"network is one of {', '.join(networks.KINDS)}")
    learning = dataclasses.replace(learning, shape=dataclasses.replace(learning.shape, kind=network))  # type: ignore[arg-type]
    if coder is None and start is not None:
        coder = start / AUTOENCODER
    with processes.team():
        if coder is None:
            coder = autoencode.train(data_root(data), out, coding, init, cache, _steps("autoencoder", coding.steps))
        if shards is None:
            shards = out / "shards"
            parts = encode.Settings(sources=coding.sources, size=coding.size, seed=seed)
            encode.encode(data_root(data), coder, shards, parts, tell=_parts("shards"), say=console.print)
        made = recipe.train(shards, coder, out, learning, _steps("flow", learning.steps), start)
    console.print(f"Trained: {made}")


@app.command()
def finish(
    generator: Annotated[Path, typer.Option(help="A finished generator.")],
    out: Run,
    init: Annotated[Path, typer.Option(help="ImageNet encoder (npz), the critic's eye.")],
    data: Data = None,
    seed: int = 0,
    steps: int = 2500,
    threads: int = 0,
    cache: Cache = CACHE,
) -> None:
    """Teach a generator's decoder to draw speckle; its encoder and its flow stay as they are."""
    from busgen_cds.learning.recipes import finish as recipe

    compute_with(threads)
    settings = recipe.Settings(seed=seed, steps=steps)
    made = recipe.train(generator, data_root(data), out, settings, init, cache, _steps("finish", steps))
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


def _gate(folder: Path | None, adapter: Path | None = None) -> Filter | None:
    from busgen_cds.learning import generator, release

    return release.of(folder or generator.SHIPPED, adapter)


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
        float | None, typer.Option(help="How firmly an image is held to what was asked; 1: not at all; 6 without it.")
    ] = None,
    between: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Times between which it is held so, from 0 (image) to 1 (noise); 0.6 1 without it."),
    ] = None,
    unfiltered: Annotated[bool, typer.Option(help="For measurements only: nothing is dropped.")] = False,
) -> None:
    """Make images with masks and labels; each passes the release filter."""
    from rich.progress import Progress

    from busgen_cds.learning.generator import Sampling
    from busgen_cds.learning.recipes import synthesise

    low, high = between or (None, None)
    named = {"steps": steps, "guidance": guidance, "low": low, "high": high}
    asked = {name: value for name, value in named.items() if value is not None}
    settings = synthesise.Settings(
        count=count,
        seed=seed,
        mix=_shares(mix),
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
            open_generator(generator, adapter),
            out,
            settings,
            None if unfiltered else _gate(generator, adapter),
            lambda done, total: progress.update(bar, completed=done, total=total),
        )
    console.print(
        f"{made.released} images in {out}; of {made.made} made, {made.dropped} were too near to a training image, and"
        f" {made.empty} did not show the lesion that was asked for."
    )


def _shares(mix: str) -> dict[str, float]:
    try:
        return {name: float(share) for name, share in _pairs(mix.split(","))}
    except ValueError as wrong:
        raise typer.BadParameter(f"a share is a number, as in benign=0.7,malignant=0.3; got {mix}") from wrong


def _pairs(texts: list[str]) -> list[tuple[str, str]]:
    parts = (text.partition("=") for text in texts)
    pairs = [(name.strip(), value.strip()) for name, is_there, value in parts if is_there]
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
    cache: Cache = CACHE,
) -> None:
    """Adapt the generator to a task from a few images; the backbone stays as it is."""
    from busgen_cds.learning.recipes import fewshot as recipe

    settings = recipe.Settings(shots=shots, rank=rank, seed=seed, steps=steps)
    source = recipe.read_task(task)
    path = recipe.adapt(
        open_generator(generator),
        data_root(data),
        source,
        out,
        settings,
        cache,
        _steps("adapter", steps),
        _gate(generator),
    )
    console.print(f"Adapter: {path} ({path.stat().st_size / 1e6:.1f} MB); its card: {path.with_name(recipe.CARD)}")


@app.command()
def privacy(
    images: Annotated[Path | None, typer.Option(help="Generated images to audit.")] = None,
    generator: Weights = None,
    adapter: Adapter = None,
    task: Annotated[
        Path | None, typer.Option(help="The adapter's task file: the shots that taught it are the members.")
    ] = None,
    data: Data = None,
    init: ImageNet = None,
    reader: ReaderRun = None,
    out: Annotated[Path, typer.Option(help="Where privacy.json and privacy.md go.")] = Path("docs/results"),
    filter_only: Annotated[bool, typer.Option(help="Build the release filter beside the generator, and stop.")] = False,
    members: Annotated[int, typer.Option(help="Most training images, and held-out ones, that are looked at.")] = 10_000,
    control_steps: Annotated[int, typer.Option(help="Steps of the over-trained control; 0: none is made.")] = 400,
    control_members: Annotated[int, typer.Option(help="Images that the control learns by heart.")] = 48,
    seed: int = 0,
    cache: Cache = CACHE,
) -> None:
    """Attack the generator and report; or build the release filter from its training images."""
    from busgen_cds.learning import data as data_
    from busgen_cds.learning import embed, release
    from busgen_cds.learning import generator as generator_
    from busgen_cds.learning.recipes import audit
    from busgen_cds.learning.recipes import fewshot as fewshot_

    makes, root = open_generator(generator, adapter), data_root(data)
    if filter_only:
        path = (generator or generator_.SHIPPED) / release.FILE
        audit.build_filter(makes, root, cache).save(path)
        console.print(f"Release filter: {path}")
        return
    if images is None or (adapter is None) != (task is None):
        raise typer.BadParameter("name --images to audit; an --adapter is audited with its --task, and a task with it")
    learnt = None
    if adapter is not None and task is not None:
        learnt = fewshot_.learnt_from(adapter, data_.read_manifest(root), fewshot_.read_task(task))
    settings = audit.Settings(members, control_members=control_members, control_steps=control_steps, seed=seed)
    name = "the backbone" if task is None else f"the adapter {task.stem}"
    embeddings = embed.for_copies(makes.coder, init, reader)
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

    try:
        secret = load_pem_private_key(key.read_bytes(), None)
    except (OSError, ValueError, TypeError) as wrong:
        raise Misconfigured(f"{key} is no private key without a passphrase (PEM): {wrong}.") from wrong
    if not isinstance(secret, Ed25519PrivateKey):
        raise Misconfigured(
            f"{key} is no Ed25519 private key: `openssl genpkey -algorithm ed25519 -out key.pem` makes one."
        )
    now = datetime.datetime.now(datetime.UTC)
    terms = recipe.Terms(name, version, creator, now.date().isoformat())

    def named(number: int) -> str:
        return f"{name}-{version}-{number:07d}"

    def write(made: recipe.Made) -> bytes:
        return synthetic.study([made.image], name=named(made.number), at=now, manufacturer=made.device or "unknown")[0]

    if dicom:
        synthetic.check_name(named(0))
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


@app.command("verify-package")
def verify_package(
    package: Annotated[Path, typer.Argument(help="Folder of a package that `share` made.")],
    key: Annotated[Path, typer.Option(help="Public key (PEM) of who made it; it came on another way.")],
) -> None:
    """Check a shared package: its maker's signature, and that every file, and no other, is what was signed."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    from busgen_cds import signing
    from busgen_cds.errors import Misconfigured
    from busgen_cds.learning.recipes import share as recipe

    try:
        public = load_pem_public_key(key.read_bytes())
    except (OSError, ValueError) as wrong:
        raise Misconfigured(f"{key} is no public key (PEM): {wrong}.") from wrong
    if not isinstance(public, Ed25519PublicKey):
        raise Misconfigured(f"{key} is no Ed25519 public key: `openssl pkey -in key.pem -pubout` writes that of a key.")
    said = recipe.verify(package, signing.Verifier.of((public, frozenset({recipe.KIND}))))
    console.print(f"{said['name']} {said['version']} of {said['date']}: signature and {len(said['files'])} files hold.")


@app.command()
def ship(
    run: Annotated[Path, typer.Option(help="Folder of a finished generator, with its release filter.")],
    out: Annotated[Path, typer.Option(help="Where the package keeps it.")] = Path("busgen_cds/weights"),
    results: Annotated[Path, typer.Option(help="Where its figures lie, for the card.")] = Path("docs/results"),
) -> None:
    """Put a finished generator into the package, with its model card."""
    from busgen_cds.learning.recipes import ship as recipe

    console.print(f"Shipped: {recipe.ship(run, results, out)}")


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
    seed: int = 0,
) -> None:
    """Make the images that every site's judge can read, and put them into the package, signed."""
    from busgen_cds import app as house
    from busgen_cds import bundle
    from busgen_cds.learning import export
    from busgen_cds.learning.recipes import release_set as recipe
    from busgen_cds.learning.recipes import share, synthesise

    makes = open_generator(generator)
    asked = recipe.typical(makes.card.vocabulary, count, seed)
    synthesise.generate(makes, images, asked, _gate(generator))
    shipped = house.open_bundle()
    reader = (f"{shipped.name.name} {shipped.name.version}", export.open_graph(shipped.files[bundle.NETWORK], 1))
    report = share.report_on(images, privacy) if privacy else None
    terms, signer = recipe.Terms(version, datetime.date.today().isoformat(), makes.digest), key_used_once()
    said = recipe.make(images, out, terms, signer, reader, report)
    for old in keys.glob(f"release-{recipe.NAME}-*.pem"):  # the set it vouched for is replaced
        old.unlink()
    trust_in(signer, keys / f"release-{recipe.NAME}-{version}.pem")
    console.print(f"{out / recipe.FILE}: {len(said.files)} files. Its card: {out / recipe.CARD}")
