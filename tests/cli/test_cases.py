"""The verbs of the site's own loop, as an operator types them."""

from __future__ import annotations

import json
import os
import pwd
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from busgen_cds import app, cli, settings
from busgen_cds.case import Case, Pathology
from busgen_cds.cli.cases import cases_app
from busgen_cds.cli.custody import audit_app
from busgen_cds.cli.site import settings_text
from busgen_cds.errors import Misconfigured
from busgen_cds.operations import learning_loop

RUN = CliRunner()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    return app.found(folder / "s", settings_text("Here", 0.1, ["ANY"], "", 0), "a passphrase of some length")


def test_a_bad_row_is_named_and_the_rest_is_taken_in(config: Path, tmp_path: Path) -> None:
    """`cases import` says the file and row of what it cannot use, keeps the rest, and takes nothing in twice; reports
    of a study that is not here are counted, so that a wrong kind of number is seen."""
    (tmp_path / "a note.txt").write_text("not a report")  # it stops nothing
    head = "accession_number,patient_id,pathology,reported_on\n"
    (tmp_path / "lab.csv").write_text(f"{head}A1,P1,malignant,2026-03-04\nA2,,benign,2026-03-04\n")
    first = RUN.invoke(cases_app, ["import", str(tmp_path), "-c", str(config)])
    assert first.exit_code == 1 and "lab.csv, row 3: no patient id" in first.output
    assert "a note.txt: neither a table" in first.output
    assert "1 reports taken in, 0 known already, 2 not usable" in first.output
    assert "1 pathology reports name an accession number of no study answered here" in first.output
    again = RUN.invoke(cases_app, ["import", str(tmp_path), "-c", str(config)])
    assert "0 reports taken in, 1 known already" in again.output


def test_a_name_is_recorded_with_the_account(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever somebody says to be: the record names the account too, whatever the shell says; `--who` finds both."""
    monkeypatch.setenv("LOGNAME", "somebody-else")
    here = pwd.getpwuid(os.getuid()).pw_name
    head = "accession_number,patient_id,pathology,reported_on\n"
    for number, who in (("B1", ("--who", "maria")), ("B2", ())):
        (tmp_path / f"{number}.csv").write_text(f"{head}{number},P1,benign,2026-03-04\n")
        RUN.invoke(cases_app, ["import", str(tmp_path / f"{number}.csv"), *who, "-c", str(config)])

    def acts(of: str) -> list[str]:
        found = RUN.invoke(audit_app, ["show", "--who", of, "--kind", "pathology", "--json", "-c", str(config)])
        return [act["who"] for act in json.loads(found.stdout)]

    assert acts("maria") == [f"maria ({here}, command line)"] and f"{here} (command line)" in acts(here)
    assert acts("mar") == []


def test_cases_are_listed_for_machines(config: Path) -> None:
    """`cases list --json` is JSON with the cases and the doubts."""
    found = RUN.invoke(cases_app, ["list", "--json", "-c", str(config)])
    assert json.loads(found.stdout) == {"cases": [], "doubts": []}


def test_what_a_night_would_lack_is_said_before_it(tmp_path: Path) -> None:
    """`cases list` counts the patients that a judge, and a generator's privacy audit, will ask for."""
    text = settings_text("Here", 0.1, ["ANY"], "", 0) + '\n[adaptation]\ngenerator = "generator"\nreplay = 0.3\n'
    config = app.found(tmp_path / "s", text, "a passphrase of some length")
    with app.opened_site(settings.read(config)) as site:
        book = learning_loop.casebook(site)
        for number in range(12):
            tissue = np.full((8, 8), number, np.uint8)
            truth: Pathology = ("benign", "malignant")[number % 2]
            one = Case(f"{number:016x}", tissue, tissue > 9, truth, None, "reader", "agree", "2026-03-01", None)
            book.keep(one, study_ref=f"{number:032x}", revision=1, finding=1, who="ruth", grounds="")
        teach, test = (len(book.listing(part)) for part in ("teach", "test"))
    said = " ".join(RUN.invoke(cases_app, ["list", "-c", str(config)]).stdout.split())
    assert f"{teach} new cases teach; a night begins from 64 on" in said
    assert "test patients have a cancer" in said and "the judge takes 8 of each" in said and test < 16
    assert f"{teach} teaching patients have a lesion; the generator is adapted from 40 on" in said


def test_an_export_needs_an_empty_folder(config: Path, tmp_path: Path) -> None:
    """`cases export` never mixes with what is there."""
    assert RUN.invoke(cases_app, ["export", str(tmp_path / "out"), "-c", str(config)]).exit_code == 0
    assert (tmp_path / "out" / "manifest.csv").exists()
    refused = RUN.invoke(cases_app, ["export", str(tmp_path / "out"), "-c", str(config)])
    assert isinstance(refused.exception, Misconfigured)
    mistyped = RUN.invoke(cases_app, ["export", str(tmp_path / "more"), "--part", "tech", "-c", str(config)])
    assert mistyped.exit_code == 2 and not (tmp_path / "more").exists()


def test_a_report_that_is_not_there_is_not_withdrawn(config: Path) -> None:
    """A reference that names no report, or several, ends with an error: a script would believe otherwise."""
    for ref in ("nothing", ""):
        refused = RUN.invoke(cases_app, ["withdraw-report", ref, "-c", str(config)])
        assert isinstance(refused.exception, Misconfigured) and "see `cases list`" in str(refused.exception)


def test_adapting_names_the_setting_that_is_missing(config: Path) -> None:
    """`adapt` without the release's checkpoints says which setting to give."""
    refused = RUN.invoke(cli.app, ["adapt", "-c", str(config)])
    assert isinstance(refused.exception, Misconfigured) and "adaptation.start" in str(refused.exception)


WEIGHTS = Path(__file__).parents[2] / "docs/results/weights"
FLOW = Path(__file__).parents[2] / "busgen_cds/weights/flow.safetensors"
START = 'start = ["{one}", "{two}"]\n'


@pytest.mark.parametrize(
    ("two", "more", "said"),
    [
        ("nowhere.safetensors", "", "nowhere.safetensors cannot be read"),
        (str(FLOW), "", "flow.safetensors is no reader's checkpoint"),
        (str(WEIGHTS / "README.md"), "", "README.md is not a checkpoint of ours"),
        (
            str(WEIGHTS / "shipped-1.safetensors"),
            'encoder = "nowhere.npz"\n',
            "nowhere.npz is not there",
        ),
    ],
)
def test_what_a_night_cannot_begin_from_is_said_before_it(tmp_path: Path, two: str, more: str, said: str) -> None:
    """A checkpoint that is missing, or another program's, is named when `adapt` starts, not after hours of work."""
    start = START.format(one=WEIGHTS / "shipped-0.safetensors", two=two)
    text = f"{settings_text('Here', 0.1, ['ANY'], '', 0)}\n[adaptation]\n{start}{more}"
    config = app.found(tmp_path / "s", text, "a passphrase of some length")
    with app.opened_site(settings.read(config)) as site, pytest.raises(Misconfigured, match=said):
        learning_loop.night_stations(site)


def test_a_clinic_without_the_training_packages_is_told_so(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch, `adapt` says what to install; cases are made and listed all the same."""
    import sys

    for name in [n for n in sys.modules if n.startswith("busgen_cds.learning.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    with (
        app.opened_site(settings.read(config)) as site,
        pytest.raises(Misconfigured, match=r"install busgen-cds\[train\]"),
    ):
        learning_loop.night_stations(site)
