"""The verbs of the site's own loop: what a site's cases are, what is learnt from them, and what that is worth.

Rules: torch is imported inside the verbs, so that a clinic's program starts without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, help="The site's own loop.")
console = Console(stderr=True)
out = Console()


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
    out.print(f"Written: {page}; {left} runs left", soft_wrap=True)
