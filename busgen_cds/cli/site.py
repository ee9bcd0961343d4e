"""A site's verbs: try it, make it, check it, say what it is made of, run it."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from busgen_cds import settings
from busgen_cds.cli import custody
from busgen_cds.cli.console import (
    HERE,
    Config,
    Json,
    address,
    console,
    out,
    print_json,
    read_settings,
    settings_file,
    table,
)
from busgen_cds.settings import Settings

app = typer.Typer()


@app.command()
def demo(
    once: Annotated[bool, typer.Option("--once", help="End when the answer has arrived.")] = False,
    folder: Annotated[Path, typer.Option(help="Where the demonstration's site is made.")] = Path("demo-site"),
) -> None:
    """The whole product on this machine: a scanner sends a synthetic study, a PACS gets the answer."""
    from busgen_cds.operations import demo as demonstration

    sys.exit(demonstration.run(folder, once=once, tell=out))


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="The new site's folder.")],
    prevalence: Annotated[
        float, typer.Option(min=0.0001, max=0.9999, help="Share of cancers among the studies you send, 0 to 1.")
    ],
    allow: Annotated[
        list[str], typer.Option(help="Who may send: AE_TITLE or AE_TITLE@ADDRESS. Repeat for each scanner and PACS.")
    ],
    pacs: Annotated[str, typer.Option(help="Where results go: AE_TITLE@HOST:PORT.")] = "",
    name: Annotated[str, typer.Option(help="The site's name.")] = "My site",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 11112,
) -> None:
    """Make a site: settings, keys and database."""
    from busgen_cds import app as house
    from busgen_cds.store import site_keys

    passphrase = site_keys.new_passphrase()
    file = house.found(folder, settings_text(name, prevalence, allow, pacs, port), passphrase)
    out.print(f"Made {file}. Read it, then: busgen-cds check -c {file}", soft_wrap=True)
    for title in (each for each in allow if "@" not in each):
        plain = ", ".join(settings.read(file).listener.plain_from)
        console.print(
            f"{title}: no address was named; without TLS it may connect only from {plain}. Where it comes from "
            f"elsewhere, write --allow {title}@ADDRESS, or add its address to plain_from in {file}.",
            soft_wrap=True,
            markup=False,
        )
    console.print(
        f"The promoter's passphrase, shown this once: [bold]{passphrase}[/]\nWhoever makes another bundle live is "
        "asked for it. Keep it away from this machine; `busgen-cds bundle keys --passphrase` changes it.",
        soft_wrap=True,
    )


def settings_text(name: str, prevalence: float, allow: Iterable[str], pacs: str, port: int) -> str:
    peers = [(title, [at] if at else []) for title, _, at in (each.partition("@") for each in allow)]
    plain = sorted({at for _, addresses in peers for at in addresses})
    lines = [
        "# This site's settings. Every setting there is: deploy/busgen-cds.example.toml",
        "[site]",
        f"name = {json.dumps(name)}",
        f"prevalence = {prevalence}",
        "",
        "[listener]",
        f"port = {port}",
        f"plain_from = {json.dumps(plain or ['127.0.0.0/8', '::1/128'])}  # who may speak DICOM without TLS",
        "allow = [",
        *(f"  {{ ae_title = {json.dumps(title)}, addresses = {json.dumps(at)} }}," for title, at in peers),
        "]",
    ]
    if pacs:
        ae, host, at = address(pacs)
        lines += ["", "[[nodes]]", 'name = "pacs"', f"ae_title = {json.dumps(ae)}", f"host = {json.dumps(host)}"]
        lines += [f"port = {at}", "", "[[destinations]]", 'node = "pacs"']
    return "\n".join(lines) + "\n"


@app.command()
def check(
    config: Config = HERE,
    security: Annotated[
        bool,
        typer.Option("--security", help="Rate each control of this site instead: ok, warn or fail, and what to do."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Is everything in place? Settings, database, disk, keys, bundle, engine, and an echo to every node."""
    from busgen_cds.operations import checks

    if security:
        return custody.rate(config, as_json)

    tell = lambda line: console.print(line, soft_wrap=True, markup=False, highlight=False)  # noqa: E731
    found = checks.everything(settings_file(config), tell)
    if as_json:
        print_json([each._asdict() for each in found])
    else:
        table(("", "what", "found"), [("✓" if each.good else "✗", each.what, each.found) for each in found])
    if not all(each.good for each in found):
        raise typer.Exit(1)
    return None


@app.command()
def sbom(
    to: Annotated[Path | None, typer.Option("--out", help="File to write; unset: standard output.")] = None,
    extra: Annotated[list[str] | None, typer.Option(help="Also what this extra needs: train, test or gpu.")] = None,
) -> None:
    """What this installation is made of: a software bill of materials (CycloneDX JSON)."""
    from busgen_cds import app as house
    from busgen_cds.operations import supply

    opened = [house.open_bundle(folder).name for folder in house.shipped_bundles()]
    names = [{"name": each.name, "version": each.version, "digest": each.digest} for each in opened]
    text = supply.bill(names, extras=extra or ())
    if to:
        to.write_text(text)
    else:
        sys.stdout.write(text)


@app.command()
def serve(config: Config = HERE) -> None:
    """Receive, read, deliver and show pages, all in one go."""
    from busgen_cds.operations import serving

    serving.everything(_served(config))


@app.command()
def listen(config: Config = HERE) -> None:
    """Receive studies (C-STORE, C-ECHO, storage commitment)."""
    from busgen_cds.operations import serving

    serving.listener(_served(config))


@app.command()
def work(
    config: Config = HERE,
    name: Annotated[str, typer.Option(help="This worker's stable name; give each worker its own.")] = "",
) -> None:
    """Read studies and deliver results."""
    from busgen_cds.operations import serving

    serving.worker(_served(config), name)


@app.command()
def web(config: Config = HERE) -> None:
    """Show the pages and answer the API."""
    from busgen_cds.operations import serving

    serving.pages(_served(config))


def _served(config: Path) -> Settings:
    """A service says in its log what it does."""
    logging.getLogger("busgen_cds").setLevel(logging.INFO)
    return read_settings(config)
