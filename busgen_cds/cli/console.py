"""What the verbs share: how a site is named and opened, and how they print.

Rules:
- `--json` prints for machines and nothing else on standard output; what is only for people goes to standard error.
- What is too long for a table is wrapped, never cut.
"""

from __future__ import annotations

import json
import os
import pwd
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from busgen_cds import settings
from busgen_cds.errors import Misconfigured
from busgen_cds.settings import Settings

if TYPE_CHECKING:
    from busgen_cds.app import Site

out, console = Console(), Console(stderr=True)

Config = Annotated[
    Path, typer.Option("--config", "-c", envvar="BUSGEN_CDS_CONFIG", help="The site's settings file, or its folder.")
]

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
HERE = Path(settings.FILE)
LONGEST_NAME = 64  # with its account it fits where it is recorded


def account() -> str:
    """Who runs this program, as it is recorded."""
    return f"{_account()} (command line)"


def person(name: str) -> str:
    """Whom somebody at the command line says to be, as it is recorded: never without the account."""
    if len(name.strip()) > LONGEST_NAME:
        raise typer.BadParameter(f"a name has at most {LONGEST_NAME} characters")
    return f"{name.strip()} ({_account()}, command line)" if name.strip() else account()


def _account() -> str:
    """As the system knows it: no variable of a shell changes that."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container's user without a name
        return f"user {os.getuid()}"


Who = Annotated[str, typer.Option("--who", callback=person, help="Who asks, if not this account; both are recorded.")]


def settings_file(config: Path) -> Path:
    return config / settings.FILE if config.is_dir() else config


def read_settings(config: Path) -> Settings:
    return settings.read(settings_file(config))


@contextmanager
def opened(config: Path) -> Iterator[Site]:
    """The site, for as long as a verb works on it."""
    from busgen_cds import app as house

    with house.opened_site(read_settings(config)) as site:
        yield site


def address(text: str) -> tuple[str, str, int]:
    """AE title, host and port."""
    title, _, rest = text.partition("@")
    host, _, port = rest.rpartition(":")
    if not (title and host and port.isdigit()):
        raise Misconfigured(f"{text!r} is not an address: write AE_TITLE@HOST:PORT.")
    return title, host, int(port)


def every_file(paths: Iterable[Path]) -> list[Path]:
    """The files named, and those in the folders named, in order."""
    found = (p for each in paths for p in (sorted(each.rglob("*")) if each.is_dir() else [each]))
    return [path for path in found if path.is_file()]


def print_json(document: Any) -> None:
    sys.stdout.write(json.dumps(document, indent=1, default=str) + "\n")


def table(heads: Iterable[str], rows: Iterable[Iterable[Any]], *, whole: Collection[str] = ()) -> None:
    """What is too long is wrapped, never cut; the columns `whole` are not even wrapped."""
    table = Table(box=None, header_style="bold")
    for head in heads:
        table.add_column(head, overflow="fold", no_wrap=head in whole)
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    out.print(table)


class progress:
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
