"""busgen-cds: one module for each group of verbs, and how every one of them ends.

Rules:
- Exit code 0: done, also when the answer is a refusal. 2: the command or the site's settings are wrong. 1: our failure.
- No name of a patient is printed.
- Heavy packages are imported where a verb needs them: `busgen-cds --help` is quick.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer
from rich.markup import escape

import busgen_cds
from busgen_cds.cli import bundles, cases, custody, experiments, files, generator, reader, results, site
from busgen_cds.cli.console import console, out
from busgen_cds.errors import Misconfigured, Shredded, Transient, Untrusted

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Decision support for breast ultrasound, between scanner and PACS. Research software, not a diagnosis.",
)
for verbs in (site, files, results, cases, custody, reader, generator, experiments):
    app.registered_commands += verbs.app.registered_commands
app.add_typer(results.results_app, name="results")
app.add_typer(custody.audit_app, name="audit")
app.add_typer(custody.keys_app, name="keys")
app.add_typer(cases.cases_app, name="cases")
app.add_typer(bundles.app, name="bundle")


def main() -> None:
    """Run a verb; say what went wrong in a sentence, and exit as the rules above say."""
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
    console.print(f"[bold red]{what}.[/] {escape(str(error))}", highlight=False, markup=True)
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
