"""The verbs of the shelf: what stands on it, what reads along, what is live, and what other sites send or get.

Rules:
- What changes what patients get, or leaves the site, asks for a person's name and the promoter's passphrase.
- The passphrase is asked for without being shown; a program gives it by BUSGEN_CDS_PASSPHRASE, never as an argument.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from busgen_cds.cli.console import (
    HERE,
    Config,
    Json,
    account,
    console,
    opened,
    out,
    person,
    print_json,
    read_settings,
    table,
)
from busgen_cds.errors import Misconfigured

if TYPE_CHECKING:
    from busgen_cds.app import Site

app = typer.Typer(no_args_is_help=True, help="The site's bundles: what each may do, and which one is live.")


def _named(who: str) -> str:
    from busgen_cds.store.shelf import NAMELESS

    if not who.strip():
        raise Misconfigured(NAMELESS)
    return person(who)


Says = Annotated[str, typer.Option("--who", prompt="Your name", callback=_named, help="Who says so; it is recorded.")]
Passphrase = Annotated[
    str,
    typer.Option(
        envvar="BUSGEN_CDS_PASSPHRASE",
        prompt="The promoter's passphrase",
        hide_input=True,
        help="Better left out: it is asked for.",
    ),
]
Which = Annotated[str, typer.Argument(help="A digest of the shelf, or how it begins.")]


@app.command("list")
def list_(config: Config = HERE, as_json: Json = False) -> None:
    """What is on the shelf, live first; without a site, the bundles that came with the product."""
    from busgen_cds import app as house

    rows: list[dict[str, Any]] = []
    if config.exists():
        with opened(config) as site:
            rows = [
                {"state": s.state, "name": s.name, "version": s.version, "digest": s.digest}
                | {"since": s.since.isoformat(), "who": s.who, "reasons": list(s.reasons)}
                for s in site.shelf.listing()
            ]
    known = {row["digest"] for row in rows}
    nobody_said = not any(row["state"] == "live" for row in rows)
    for folder in house.shipped_bundles():
        b = house.open_bundle(folder)
        if b.digest not in known:
            state = "live" if nobody_said and folder == house.shipped_bundle() else "shipped"
            row = {"state": state, "name": b.name.name, "version": b.name.version, "digest": b.digest}
            rows.append({**row, "since": b.manifest.created, "who": "the product", "reasons": []})
    if as_json:
        return print_json(rows)
    heads = ("state", "name", "version", "digest", "since", "who", "reasons")
    shown = [{**row, "digest": row["digest"][:12], "since": row["since"][:10]} for row in rows]
    return table(heads, [[*(row[h] for h in heads[:-1]), "; ".join(row["reasons"])] for row in shown])


@app.command()
def show(
    which: Annotated[str, typer.Argument(help="A digest of the shelf, or a folder; unset: the one shipped.")] = "",
    config: Config = HERE,
) -> None:
    """A bundle's model card."""
    out.print(_bundle(which, config).files["card.md"].decode(), markup=False, highlight=False)


@app.command()
def verify(
    which: Annotated[
        str, typer.Argument(help="A digest of the shelf, a folder, or “live”; unset: the one shipped.")
    ] = "",
    config: Config = HERE,
) -> None:
    """Check signature, files, versions, and for “live” the statement too."""
    opened = _bundle(which, config)
    out.print(f"{opened.name.name} {opened.name.version}: signature and files hold. {opened.digest}", soft_wrap=True)


def _bundle(which: str, config: Path) -> Any:
    """What `list` shows: of the shelf, or come with the product."""
    from busgen_cds import app as house

    if not which or Path(which).is_dir():
        return house.open_bundle(Path(which) if which else None)
    with opened(config) as site:
        known = {each.digest for each in site.shelf.listing()}
        for shipped in map(house.open_bundle, house.shipped_bundles()):
            if shipped.digest.startswith(which) and shipped.digest not in known:
                return shipped
        return site.shelf.live() if which == "live" else site.shelf.open(site.shelf.get(which).digest)


@app.command()
def promote(which: Which, who: Says, passphrase: Passphrase, config: Config = HERE) -> None:
    """Make a bundle that read along live, by a signed and numbered statement."""
    from busgen_cds import app as house

    with opened(config) as site:
        standing = house.promote(site, which, person=who, passphrase=passphrase)
    out.print(f"Live: {standing.digest} (statement {standing.number}). Workers follow within seconds.", soft_wrap=True)


@app.command()
def rollback(who: Says, passphrase: Passphrase, config: Config = HERE) -> None:
    """Make live again what was live before the present one."""
    from busgen_cds import app as house

    with opened(config) as site:
        standing = house.roll_back(site, person=who, passphrase=passphrase)
    out.print(f"Live: {standing.digest} (statement {standing.number}). Workers follow within seconds.", soft_wrap=True)


@app.command()
def withdraw(
    which: Which,
    who: Says,
    reason: Annotated[str, typer.Option(prompt="Why", help="Kept with it.")],
    config: Config = HERE,
) -> None:
    """Refuse a bundle that stands on the shelf or reads along, for good."""
    with opened(config) as site:
        site.shelf.withdraw(site.shelf.get(which).digest, person=who, reason=reason)
    out.print("Withdrawn: it never becomes live.")


@app.command()
def export(
    what: Annotated[str, typer.Argument(help="A digest of the shelf; or the folder of an adapter or a synthetic set.")],
    to: Annotated[Path, typer.Argument(help="The parcel to be written.")],
    who: Says,
    passphrase: Passphrase,
    kind: Annotated[str, typer.Option(help="Of a folder: “adapter” or “synthetic set”.")] = "",
    name: Annotated[str, typer.Option(help="Of a folder: what it is called.")] = "",
    version: Annotated[str, typer.Option(help="Of a folder.")] = "1",
    config: Config = HERE,
) -> None:
    """Write a signed parcel for another site."""
    from busgen_cds.operations import exchange

    with opened(config) as site:
        if Path(what).is_dir():
            if kind not in ("adapter", "synthetic set"):
                raise Misconfigured("Say what the folder is: --kind adapter, or --kind 'synthetic set'.")
            said = exchange.send_folder(
                site, Path(what), to, what=kind, name=name or Path(what).name, version=version, person=who,  # type: ignore[arg-type]
                passphrase=passphrase,
            )  # fmt: skip
        else:
            said = exchange.send_bundle(site, what, to, person=who, passphrase=passphrase)
        out.print(f"{to}: {said.what} {said.name} {said.version}, {len(said.files)} files, signed.", soft_wrap=True)


@app.command("import")
def import_(
    parcel: Annotated[Path, typer.Argument(exists=True, help="A parcel, or a release's bundle folder.")],
    who: Says,
    config: Config = HERE,
) -> None:
    """Verify what another site, or a release, sent, and keep it; a bundle goes onto the shelf and no further."""
    from busgen_cds.operations import exchange

    with opened(config) as site:
        if parcel.is_dir():
            digest = exchange.receive_release(site, parcel, person=who)
            return out.print(f"On the shelf: {digest}", soft_wrap=True)
        said, where = exchange.receive(site, parcel, person=who)
        return out.print(f"{said.what} {said.name} {said.version} from {said.sender}: {where}", soft_wrap=True)


@app.command()
def keys(
    config: Config = HERE,
    make: Annotated[bool, typer.Option("--make", help="Make the keys that the site lacks.")] = False,
    passphrase: Annotated[bool, typer.Option("--passphrase", help="Change the promoter's passphrase.")] = False,
) -> None:
    """This site's public key, for sites that are to believe it; theirs go into its folder keys/trusted."""
    from busgen_cds.store import site_keys

    chosen = read_settings(config)
    file = chosen.path(chosen.models.promoter_key)
    if make:
        new = site_keys.new_passphrase()
        site_keys.make(file.parent, new)
        with opened(config) as site:
            _note_keys(site, file)
        console.print(f"The promoter's passphrase, shown this once: [bold]{new}[/]")
    if passphrase:
        old = typer.prompt("The passphrase now", hide_input=True)
        new = typer.prompt("The new one", hide_input=True, confirmation_prompt=True)
        site_keys.change_passphrase(file, old, new)
        console.print("Changed.")
    out.print(site_keys.pem(site_keys.promoter_public(file)), end="", markup=False)


def _note_keys(site: Site, promoter: Path) -> None:
    """A new promoter says from now on what is live: whose key it is stands in the record."""
    from busgen_cds import signing
    from busgen_cds.store import audit, site_keys

    key = signing.key_id(site_keys.promoter_public(promoter))
    with site.database.transaction() as session:
        audit.record(session, audit.Act("signing keys made", account(), "", detail={"promoter": key}))


@app.command()
def shadow(
    which: Annotated[str, typer.Argument(help="Put it into shadow; unset: show how the one in shadow compares.")] = "",
    end: Annotated[bool, typer.Option("--end", help="It no longer reads along.")] = False,
    who: Annotated[str, typer.Option(help="Who says so; it is recorded.")] = "",
    config: Config = HERE,
    as_json: Json = False,
) -> None:
    """A bundle in shadow reads the same studies after the live one; nobody is told what it says."""
    with opened(config) as site:
        if which:
            digest = site.shelf.get(which).digest
            says = _named(who or typer.prompt("Your name"))
            (site.shelf.end_shadow if end else site.shelf.to_shadow)(digest, person=says)
            return out.print(f"{digest[:12]} {'is out of' if end else 'is in'} shadow.")
        return _compared(site, as_json)


def _compared(site: Site, as_json: bool) -> None:
    digest = site.shelf.in_shadow()
    if not digest:
        raise Misconfigured("No bundle is in shadow: put one there with `busgen-cds bundle shadow DIGEST`.")
    entry, found = site.shelf.get(digest), site.shadow.comparison(digest)
    if as_json:
        changes = [{"live": a, "shadow": b, "studies": n} for (a, b), n in found.changes.items()]
        figures = {k: v for k, v in vars(found).items() if k not in ("changes", "largest")}
        return print_json({"digest": digest, "since": entry.since.isoformat(), **figures, "changes": changes})
    if not found.studies:
        return out.print(
            f"{entry.name} {entry.version} is in shadow since {entry.since:%Y-%m-%d} and read nothing yet."
        )
    rows = [
        ("studies", found.studies),
        ("same category", f"{found.same} ({found.agreement:.1%})"),
        ("more suspicious", found.up),
        ("less suspicious", found.down),
        ("failed", found.failed),
        ("mean difference of probability", "" if found.difference is None else f"{found.difference:.3f}"),
        ("seconds in shadow, live (median)", f"{found.seconds:.2f}, {found.live_seconds:.2f}"),
    ]
    table(("what", f"{entry.name} {entry.version}"), rows)
    moved = sorted(found.changes.items(), key=lambda item: -item[1])
    return table(("live", "in shadow", "studies"), [(a, b, n) for (a, b), n in moved if a != b])
