"""The laboratory's questions, each a verb that writes a page of results; what is done is not done again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from busgen_cds.cli.laboratory import (
    CACHE,
    RESULTS,
    Cache,
    Data,
    ImageNet,
    Most,
    Queue,
    ReaderRun,
    Results,
    Weights,
    console,
    data_root,
    open_generator,
)

if TYPE_CHECKING:
    from busgen_cds.learning.generator import Generator

app = typer.Typer()


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
    cache: Cache = CACHE,
) -> None:
    """How real the images are: distances with floors, a judge with its control, masks, speed, a picture."""
    from busgen_cds.errors import Misconfigured
    from busgen_cds.learning import embed, release
    from busgen_cds.learning import fidelity as fidelity_
    from busgen_cds.learning.generator import SHIPPED
    from busgen_cds.learning.recipes import fidelity_report as recipe

    makes = open_generator(generator)
    if (gate := release.of(generator or SHIPPED)) is None:
        raise Misconfigured(
            "This generator has no release filter, without which no image of it is shown: build it with"
            " `busgen-cds privacy --filter-only`."
        )
    embeddings = embed.for_fidelity(init, reader, inception)
    settings = recipe.Settings(images=most, judging=fidelity_.Judging(steps=judge_steps))
    read = recipe.reader(reader) if reader else None
    found = recipe.measure(makes, data_root(data), images, embeddings, settings, init, read, cache, console.print)
    page = recipe.write(found, out)
    console.print(f"Written: {page}, {recipe.picture(makes, out, gate, settings.pairs)}")


def _maker_of(images: Path, generator: Path | None) -> Generator:
    """The generator, if it made these images."""
    from busgen_cds.learning.recipes import synthesise

    makes = open_generator(generator)
    synthesise.check_maker(images, makes)
    return makes


def _numbers(text: str) -> list[int]:
    """Whole numbers, comma-separated."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise typer.BadParameter(f"counts are numbers from 1 on, as 300,1000; got {text!r}")
    return found


@app.command()
def value(
    out: Queue,
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
    counts: Annotated[str, typer.Option(help="Generated images of the arms of growing size.")] = "300,1000,3000,10000",
    most: Most = None,
    results: Results = RESULTS,
    cache: Cache = CACHE,
) -> None:
    """What generated images are worth to a reader: every arm, seed by seed; stop and call again at will."""
    from busgen_cds.learning import data as data_
    from busgen_cds.learning.recipes import value as recipe

    root, settings = data_root(data), recipe.Settings(tuple(sources.split(",")), steps, seeds=seeds)
    real = sum(r.source in settings.sources and r.split == "train" for r in data_.read_manifest(root))
    runs = recipe.queue(recipe.scaling(_numbers(counts)) if scaling else recipe.arms(real), seeds)
    makes = _maker_of(images, generator) if images is not None else None
    if makes is None:
        runs = [run for run in runs if not run.arm.generated]
    card = makes.card if makes else None
    left = recipe.work(runs, root, images, card, out, settings, init, cache, most, console.print)
    if found := recipe.results(runs, out):
        table, page = recipe.compared(found, root, settings, cache), recipe.SCALING if scaling else recipe.NAME
        digest = makes.digest if makes else ""
        console.print(f"Written: {recipe.write(table, left, digest, settings, results, page)}")
    console.print(f"{left} runs left")


@app.command()
def shots(
    task: Annotated[Path, typer.Option(help="Task file whose shots are of an unseen device or site.")],
    start: Annotated[Path, typer.Option(help="The member of the reader that every arm begins from.")],
    out: Queue,
    generator: Weights = None,
    data: Data = None,
    seeds: int = 3,
    most: Most = None,
    results: Results = RESULTS,
    cache: Cache = CACHE,
) -> None:
    """What few shots are worth on an unseen device or site: AUC against 8, 16, 32 and 64 shots; a resumable queue."""
    from busgen_cds.learning.recipes import fewshot as fewshot_
    from busgen_cds.learning.recipes import shots as recipe

    root, source, settings = data_root(data), fewshot_.read_task(task), recipe.Settings(seeds=seeds)

    def load(adapter: Path | None) -> Generator:
        return open_generator(generator, adapter)

    left = recipe.work(load, root, source, start, out, settings, cache, most, console.print)
    found = recipe.compare(root, source, out, settings, cache)
    page = recipe.write(found, recipe.tests(root, source, cache), out, left, results, source.task.name)
    console.print(f"Written: {page}; {left} runs left", soft_wrap=True)


@app.command()
def segmentation(
    out: Annotated[Path, typer.Option(help="Folder of the runs; what is done is not repeated.")],
    images: Annotated[Path, typer.Option(help="Healthy → lesion images (`generate --in-healthy`).")],
    generator: Weights = None,
    data: Data = None,
    steps: int = 600,
    seeds: int = 3,
    results: Results = RESULTS,
    cache: Cache = CACHE,
) -> None:
    """What healthy → lesion images are worth to a U-Net on BUSI."""
    from busgen_cds.learning.recipes import segmentation as recipe

    settings = recipe.Settings(steps=steps, seeds=seeds)
    _maker_of(images, generator)
    found = recipe.measure(data_root(data), images, out, settings, cache, console.print)
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


@app.command("site-adaptation")
def site_adaptation(
    start: Annotated[Path, typer.Option(help="The member of the reader that every arm begins from.")],
    runs: Queue,
    replay: Annotated[Path | None, typer.Option(help="The release's generated images (`generate`).")] = None,
    data: Data = None,
    draws: int = 10,
    steps: Annotated[int, typer.Option(help="Of every fine-tuning.")] = 48,
    most: Most = None,
    results: Results = RESULTS,
    cache: Cache = CACHE,
) -> None:
    """What 16, 32 and 64 cases of a new site are worth to its reader; a resumable queue."""
    from busgen_cds.learning.recipes import adapt_reader
    from busgen_cds.learning.recipes import site_adaptation as recipe

    settings = recipe.Settings(draws=draws, adapt=adapt_reader.Settings(steps=steps))
    root = data_root(data)
    left = recipe.work(root, start, runs, settings, replay, cache, most, console.print)
    found = recipe.compare(root, runs, settings, cache)
    page = recipe.write(found, root, runs, settings, left, results, cache)
    console.print(f"Written: {page}; {left} runs left", soft_wrap=True)


@app.command("site-recipe")
def site_recipe(
    start: Annotated[Path, typer.Option(help="The member of the reader that every recipe begins from.")],
    runs: Queue,
    data: Data = None,
    rounds: Annotated[int, typer.Option(help="Times that the patients are dealt into folds.")] = 2,
    cases: Annotated[int, typer.Option(help="That teach in every run.")] = 64,
    most: Most = None,
    results: Results = RESULTS,
    cache: Cache = CACHE,
) -> None:
    """Compare ways to adapt on the patients of `site-adapt` alone; a resumable queue."""
    from busgen_cds.learning.recipes import site_recipe as recipe

    root = data_root(data)
    left = recipe.work(root, start, runs, rounds, cases, cache, most, console.print)
    page = recipe.write(recipe.compare(runs, rounds), cases, left, results)
    console.print(f"Written: {page}; {left} runs left", soft_wrap=True)
