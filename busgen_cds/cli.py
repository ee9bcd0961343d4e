"""busgen-cds: the clinic's verbs; the laboratory's are mounted beside them.

Rules:
- Exit code 0: done, also when the answer is a refusal. 2: the command or the site's settings are wrong. 1: our failure.
- `--json` prints for machines and nothing else on standard output. No name of a patient is printed.
- Heavy packages are imported where a verb needs them: `busgen-cds --help` is quick.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Collection, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import busgen_cds
from busgen_cds import custody, laboratory, settings, shelf_verbs, site_verbs
from busgen_cds.errors import Misconfigured, Shredded, Transient, Untrusted

if TYPE_CHECKING:
    from busgen_cds.app import Site
    from busgen_cds.dicom.outbox import Node

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Decision support for breast ultrasound, between scanner and PACS. Research software, not a diagnosis.",
)
results_app = typer.Typer(no_args_is_help=True, help="What was said, and what became of it.")
app.add_typer(results_app, name="results")
app.add_typer(custody.audit_app, name="audit")
app.add_typer(custody.keys_app, name="keys")
app.add_typer(site_verbs.cases_app, name="cases")
app.add_typer(shelf_verbs.app, name="bundle")

console = Console(stderr=True)
out = Console()

Config = Annotated[
    Path, typer.Option("--config", "-c", envvar="BUSGEN_CDS_CONFIG", help="The site's settings file, or its folder.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
HERE = Path(settings.FILE)
WIDE = 100  # characters; from here on a table has room for a whole reference


def main() -> None:
    """Run a verb; say what went wrong in a sentence, and exit as the rules above say."""
    app.registered_commands += laboratory.app.registered_commands + site_verbs.app.registered_commands
    app.registered_commands += custody.app.registered_commands
    try:
        app()
    except Misconfigured as wrong:
        _fail("Not set up for this", wrong, 2)
    except Transient as later:
        _fail("Not now", later, 1)
    except Untrusted as refused:
        _fail("Refused", refused, 1)
    except Shredded as gone:
        _fail("Gone", gone, 1)
    except BrokenPipeError:
        sys.exit(0)


def _fail(what: str, error: Exception, code: int) -> None:
    console.print(f"[bold red]{what}.[/] {error}", highlight=False, markup=True)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def _begin(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens to standard error.")] = False,
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("busgen_cds").setLevel(logging.INFO if verbose else logging.WARNING)
    if version:
        out.print(f"busgen-cds {busgen_cds.__version__}")
        raise typer.Exit


# ---- A site


@app.command()
def demo(
    once: Annotated[bool, typer.Option("--once", help="End when the answer has arrived.")] = False,
    folder: Annotated[Path, typer.Option(help="Where the demonstration's site is made.")] = Path("demo-site"),
) -> None:
    """The whole product on this machine: a scanner sends a synthetic study, a PACS gets the answer."""
    from busgen_cds import demo as demonstration

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
    file = house.found(folder, _settings_text(name, prevalence, allow, pacs, port), passphrase)
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


def _settings_text(name: str, prevalence: float, allow: Iterable[str], pacs: str, port: int) -> str:
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
        ae, host, at = _address(pacs)
        lines += ["", "[[nodes]]", 'name = "pacs"', f"ae_title = {json.dumps(ae)}", f"host = {json.dumps(host)}"]
        lines += [f"port = {at}", "", "[[destinations]]", 'node = "pacs"']
    return "\n".join(lines) + "\n"


def _address(text: str) -> tuple[str, str, int]:
    title, _, rest = text.partition("@")
    host, _, port = rest.rpartition(":")
    if not (title and host and port.isdigit()):
        raise Misconfigured(f"{text!r} is not an address: write AE_TITLE@HOST:PORT.")
    return title, host, int(port)


def _open(config: Path) -> Site:
    from busgen_cds import app as house

    return house.open_site(settings.read(config / settings.FILE if config.is_dir() else config))


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
    from busgen_cds import checks

    if security:
        return custody.rate(config, as_json)

    tell = lambda line: console.print(line, soft_wrap=True, markup=False, highlight=False)  # noqa: E731
    found = checks.everything(config / settings.FILE if config.is_dir() else config, tell)
    if as_json:
        _print_json([each._asdict() for each in found])
    else:
        _table(("", "what", "found"), [("✓" if each.good else "✗", each.what, each.found) for each in found])
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
    from busgen_cds import supply

    opened = [house.open_bundle(folder).name for folder in house.shipped_bundles()]
    names = [{"name": each.name, "version": each.version, "digest": each.digest} for each in opened]
    text = supply.bill(names, extras=extra or ())
    if to:
        to.write_text(text)
    else:
        sys.stdout.write(text)


# ---- Serving


@app.command()
def serve(config: Config = HERE) -> None:
    """Receive, read, deliver and show pages, all in one go."""
    from busgen_cds import serving

    serving.everything(_served(config))


@app.command()
def listen(config: Config = HERE) -> None:
    """Receive studies (C-STORE, C-ECHO, storage commitment)."""
    from busgen_cds import serving

    serving.listener(_served(config))


@app.command()
def work(
    config: Config = HERE,
    name: Annotated[str, typer.Option(help="This worker's stable name; give each worker its own.")] = "",
) -> None:
    """Read studies and deliver results."""
    from busgen_cds import serving

    serving.worker(_served(config), name)


@app.command()
def web(config: Config = HERE) -> None:
    """Show the pages and answer the API."""
    from busgen_cds import serving

    serving.pages(_served(config))


def _served(config: Path) -> settings.Settings:
    """A service says in its log what it does."""
    logging.getLogger("busgen_cds").setLevel(logging.INFO)
    return _settings(config)


def _settings(config: Path) -> settings.Settings:
    return settings.read(config / settings.FILE if config.is_dir() else config)


# ---- Files


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
    with _progress("Reading", quiet=as_json) as bar:
        for study_files in bar(found.studies.values()):
            answers.append(read_files.read(study_files, stations))
            documents.append(read_files.write(answers[-1], to, prevalence_stated=prevalence is not None))
    (to / "results.json").write_text(json.dumps(documents, indent=1) + "\n")
    if as_json:
        return _print_json(documents)
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
    _table(("study …", "outcome", "category or reason", "malignant", "at a prevalence", "findings"), rows)


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
    for path in (p for each in paths for p in (sorted(each.rglob("*")) if each.is_dir() else [each]) if p.is_file()):
        try:
            chosen.append(files.open_file(path.read_bytes()))
        except ValueError as reason:
            console.print(f"{path}: {reason}", soft_wrap=True)
            refused += 1
    with _progress("Sending") as bar:
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
        return house.node(_settings(config), to)
    title, host, port = _address(to)
    return Node(name=to, ae_title=title, host=host, port=port, calling_ae=calling)


# ---- Operating


@results_app.command("list")
def results_list(config: Config = HERE, limit: int = 50, triage: bool = False, as_json: Json = False) -> None:
    """The latest results; `--triage` puts the most pressing first."""
    entries = _open(config).results.listing(limit=limit, order="triage" if triage else "newest")
    if as_json:
        return _print_json([vars(each) for each in entries])
    rows = [
        (
            each.ref[:8],
            f"{each.made_at.astimezone():%Y-%m-%d %H:%M}",
            each.outcome,
            each.birads or each.reason,
            "" if each.probability is None else f"{100 * each.probability:.1f} %",
            each.revision,
        )
        for each in entries
    ]
    return _table(("result", "made", "outcome", "category or reason", "malignant", "rev"), rows)


@results_app.command("show")
def results_show(ref: str, config: Config = HERE) -> None:
    """One result with its objects and their deliveries, as JSON."""
    from busgen_cds import operating

    site = _open(config)
    _print_json(operating.document(site, _full(site, ref)))


@results_app.command("resend")
def results_resend(
    ref: str,
    config: Config = HERE,
    to: Annotated[str | None, typer.Option(help="Only to this destination.")] = None,
    who: Annotated[str, typer.Option(help="Who asks; it is recorded.")] = "operator",
) -> None:
    """Send a result's objects again, byte for byte."""
    site = _open(config)
    asked = site.desk.resend(_full(site, ref), who=who, destination=to)
    out.print(f"Sent again: {', '.join(asked) or 'nothing; it has no destination'}.")


def _full(site: Site, ref: str) -> str:
    matches = [each.ref for each in site.results.listing(limit=10_000, superseded=True) if each.ref.startswith(ref)]
    if len(matches) != 1:
        raise Misconfigured(f"{len(matches)} results begin with {ref!r}: see `busgen-cds results list`.")
    return matches[0]


@app.command()
def queue(
    config: Config = HERE,
    retry: Annotated[
        str | None, typer.Option(help="Try a study's stuck work again, by its reference or how that begins.")
    ] = None,
    release: Annotated[
        str | None, typer.Option(help="Let a held study go on, by its reference or how that begins.")
    ] = None,
    patient: Annotated[str, typer.Option(help="With --release: the patient id whose study it is.")] = "",
    issuer: Annotated[str, typer.Option(help="With --patient: the issuer of that id.")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Let a stopped engine be used again.")] = False,
    who: Annotated[str, typer.Option(help="Who asks; it is recorded.")] = "operator",
    as_json: Json = False,
) -> None:
    """What waits, what is stuck and why, what was refused at the door."""
    from busgen_cds import operating

    site = _open(config)
    if retry:
        taken = site.desk.retry(operating.waiting_study(site, retry), who=who)
        return out.print(f"Taken up again: {', '.join(taken) or 'nothing; it is not stuck'}.")
    if release:
        from busgen_cds.study import Patient

        stated = Patient(id=patient, issuer=issuer) if patient else None
        site.desk.release(site.inbox, operating.waiting_study(site, release), who=who, patient=stated)
        return out.print("The study goes on.")
    if resume:
        return out.print("The engine is used again." if site.desk.resume(who=who) else "It was not stopped.")
    waiting = operating.queue(site)
    if as_json:
        return _print_json(waiting)
    if not waiting:
        return out.print("Nothing waits.")
    columns = ("what", "ref", "state", "destination", "reason", "verb")
    rows = [[*(each[name] for name in columns), _until(each["next_try_at"])] for each in waiting]
    return _table((*columns, "next try"), rows, whole=("ref",) if out.width >= WIDE else ())


def _until(moment: datetime | None) -> str:
    if moment is None:
        return ""
    seconds = (moment - datetime.now(UTC)).total_seconds()
    left = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    return f"{moment.astimezone():%H:%M:%S}, in {left}" if seconds > 0 else "now"


# ---- Printing


def _print_json(document: Any) -> None:
    sys.stdout.write(json.dumps(document, indent=1, default=str) + "\n")


def _table(heads: Iterable[str], rows: Iterable[Iterable[Any]], *, whole: Collection[str] = ()) -> None:
    """What is too long is wrapped, never cut; the columns `whole` are not even wrapped."""
    table = Table(box=None, header_style="bold")
    for head in heads:
        table.add_column(head, overflow="fold", no_wrap=head in whole)
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    out.print(table)


class _progress:
    """A progress bar over an iterable, on standard error."""

    def __init__(self, what: str, *, quiet: bool = False) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._what, self._bar = what, Progress(*columns, console=console, disable=quiet, transient=True)

    def __enter__(self) -> Callable[..., Iterable[Any]]:
        self._bar.start()
        return self._track

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _track(self, items: Iterable[Any], total: int | None = None) -> Iterable[Any]:
        length = total if total is not None else len(items)  # type: ignore[arg-type]
        return self._bar.track(items, total=length, description=self._what)
