"""The commands as their users run them: what they print, what they leave, how they end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from busgen_cds import cli, web
from busgen_cds.dicom import outbox
from busgen_cds.errors import Misconfigured
from tests import images
from tests.pacs import Pacs

RUN = CliRunner()
KEYS = {
    "study_instance_uid", "outcome", "reason", "revision", "bundle", "provider", "prevalence", "study", "findings",
    "images_read", "images_not_analysed", "objects", "seconds",
}  # fmt: skip


def busgen_cds(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "busgen_cds", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def scanned(folder: Path, **study: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(images.breast_study(**study)):  # type: ignore[arg-type]
        (folder / f"{number}.dcm").write_bytes(data)
    return folder


def test_read_answers_every_study_and_every_refusal(tmp_path: Path) -> None:
    """`read` writes one object for each study and each unreadable file, and ends with 0 also for refusals."""
    scanned(tmp_path / "in" / "a", n=2, seed=1)
    scanned(tmp_path / "in" / "b", n=1, seed=2, doppler="all")
    (tmp_path / "in" / "notes.txt").write_text("no DICOM")
    done = busgen_cds("read", tmp_path / "in", "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    documents = json.loads((tmp_path / "out" / "results.json").read_text())
    assert json.loads(done.stdout) == documents
    assert all(set(each) == KEYS for each in documents)
    outcomes = {each["study_instance_uid"]: each["outcome"] for each in documents}
    assert outcomes[images.uid("study", 1)] in {"assessed", "declined"}
    assert outcomes[images.uid("study", 2)] == "not-for-us"
    assert "notes.txt" in next(each["reason"] for each in documents if not each["study_instance_uid"])
    for each in documents:
        assert all((tmp_path / "out" / name).is_file() for name in each["objects"])


def test_read_names_every_file_that_it_left_out(tmp_path: Path) -> None:
    """A cut file, one SOP Instance UID with two contents, a copy: each is named in the document and on the terminal."""
    first, second, third = images.breast_study(3, seed=11)
    folder = tmp_path / "in"
    folder.mkdir()
    half = len(first) // 2
    files = {"1": first, "2": second, "cut": third[:half], "cut-too": first[:half], "copy": second, "head": third[:700]}
    for name, data in files.items():
        (folder / f"{name}.dcm").write_bytes(data)
    done = busgen_cds("read", folder, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    documents = json.loads((tmp_path / "out" / "results.json").read_text())
    assert all(set(each) == KEYS for each in documents)
    lines = done.stdout.splitlines()
    (read,) = (each for each in documents if each["study_instance_uid"])
    said = [each["reason"] for each in read["images_not_analysed"]]
    assert read["outcome"] in {"assessed", "declined"}
    assert [each for each in said if each.startswith(f"{folder / 'cut.dcm'}: the pixel data end")]
    assert [each for each in said if "cut-too.dcm" in each and "same SOP Instance UID" in each]
    assert [each for each in said if "copy.dcm" in each and "byte for byte" in each]
    for name in ("cut.dcm", "cut-too.dcm", "head.dcm"):
        assert [line for line in lines if line.startswith("needs attention: ") and name in line]
    assert [line for line in lines if line.startswith("not read: ") and "byte for byte" in line]
    assert read["outcome"] == "declined" or "not stated: assumed" in " ".join(done.stdout.split())


def test_read_says_that_two_patients_need_attention(tmp_path: Path) -> None:
    """Two patients under one study: nothing of it is read, every file is named, and the terminal says it plainly."""
    for number, patient in enumerate(("ONE", "TWO")):
        data = images.breast_image(seed=12, number=number, patient_id=patient, study_uid="1.2.3")
        (tmp_path / f"{number}.dcm").write_bytes(data)
    done = busgen_cds("read", tmp_path, "--out", tmp_path / "out")
    (document,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (done.returncode, document["outcome"], document["objects"]) == (0, "not-for-us", [])
    for name in ("0.dcm", "1.dcm"):
        assert [each for each in document["images_not_analysed"] if name in each["reason"]]
        assert f"needs attention: {tmp_path / name}: Two " in done.stdout


def test_read_states_the_prevalence_it_used(tmp_path: Path) -> None:
    """`read --prevalence` moves the probability and states it; without it nothing is called stated."""
    scanned(tmp_path / "in", seed=3)
    said = []
    for more in ([], ["--prevalence", "0.01"]):
        done = busgen_cds("read", tmp_path / "in", "--out", tmp_path / "out", "--json", *more)
        said.append(json.loads(done.stdout)[0])
    if said[0]["outcome"] == "assessed":
        assert said[0]["prevalence"]["stated"] is None
        assert said[0]["prevalence"]["used"] == said[0]["prevalence"]["calibrated_at"]
        assert said[1]["prevalence"]["stated"] == 0.01
        before, after = (each["study"]["probability_of_malignancy"] for each in said)
        assert after < before


def test_a_site_is_made_once_and_checked(tmp_path: Path) -> None:
    """`init` makes a site that `check` finds good, and never overwrites one."""
    pacs = Pacs().comes_up()
    site = tmp_path / "site"
    make = ["init", site, "--prevalence", "0.05", "--allow", "US1@127.0.0.1", "--pacs"]
    try:
        assert busgen_cds(*make, f"{pacs.ae_title}@{pacs.host}:{pacs.port}").returncode == 0
        assert (site / "keys" / "site.key").stat().st_mode & 0o077 == 0
        done = busgen_cds("check", "-c", site, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        assert {"settings", "database and keys", "bundle", "engine", "echo to pacs"} <= {
            each["what"] for each in json.loads(done.stdout)
        }
        again = busgen_cds(*make, f"{pacs.ae_title}@{pacs.host}:{pacs.port}")
        assert again.returncode == 2
        assert "already" in again.stderr
    finally:
        pacs.goes_down()
    done = busgen_cds("check", "-c", site, "--json")
    assert done.returncode == 1
    assert any("cannot be reached" in each["found"] for each in json.loads(done.stdout) if not each["good"])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--allow", "US ROOM LONG TITLE TOO LONG@10.0.0.1"], "at most 16 characters"),
        (["--allow", "SCAN@notanip"], "is not an address or network"),
        (["--allow", "SCAN@10.0.0.1/8"], "write 10.0.0.0/8"),
        (["--allow", "SCAN", "--pacs", "PACS@10.0.0.2:99999"], "less than or equal to 65535"),
    ],
)
def test_a_site_that_cannot_be_leaves_nothing_behind(tmp_path: Path, wrong: list[str], said: str) -> None:
    """`init` says what is wrong before it writes anything, so that the corrected command is not refused."""
    site = tmp_path / "site"
    with pytest.raises(Misconfigured, match=said):
        RUN.invoke(cli.app, ["init", str(site), "--prevalence", "0.05", *wrong], catch_exceptions=False)
    assert not site.exists()


def test_a_port_that_cannot_be(tmp_path: Path) -> None:
    """`init` refuses a port beyond 65535 as wrong usage, and writes nothing."""
    arguments = ["init", str(tmp_path / "site"), "--prevalence", "0.05", "--allow", "SCAN", "--port", "99999"]
    assert RUN.invoke(cli.app, arguments).exit_code == 2
    assert not (tmp_path / "site").exists()


def test_a_sender_without_an_address(tmp_path: Path) -> None:
    """`init` says of a sender without an address from where it may connect, and how to name one."""
    done = RUN.invoke(cli.app, ["init", str(tmp_path / "site"), "--prevalence", "0.05", "--allow", "SCAN"])
    assert done.exit_code == 0 and (tmp_path / "site" / "busgen-cds.toml").exists()
    assert "only from 127.0.0.0/8, ::1/128" in done.output and "--allow SCAN@ADDRESS" in done.output


def test_pages_name_commands_that_there_are() -> None:
    """Every command that a page names is one that there is, with the options that it takes."""
    pages = [page.read_text() for page in (Path(web.__file__).parent / "templates").glob("*.html")]
    named = {line for page in pages for line in re.findall(r"busgen-cds ([a-z][^<\"{\n]*)", page)}
    assert len(named) > 3
    for line in named:
        verb = typer.main.get_command(cli.app)
        words = line.split()
        while words and hasattr(verb, "commands"):
            verb = verb.commands[words.pop(0)]
        taken = {option for each in verb.params for option in each.opts}
        assert {word for word in words if word.startswith("--")} <= taken, line


def test_no_site_without_a_prevalence(tmp_path: Path) -> None:
    """`init` without a prevalence is refused as wrong usage."""
    done = busgen_cds("init", tmp_path / "site", "--allow", "US1")
    assert done.returncode == 2
    assert "prevalence" in done.stderr


def test_a_wrong_folder_says_what_to_do(tmp_path: Path) -> None:
    """A verb that needs a site and finds none names the command that makes one."""
    done = busgen_cds("queue", "-c", tmp_path)
    assert done.returncode == 2
    assert "busgen-cds init" in done.stderr


def test_a_name_in_brackets_is_said_whole(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A path with brackets is no markup: the message names the folder as it is."""
    monkeypatch.setattr(sys, "argv", ["busgen-cds", "queue", "-c", "/[none]"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "/[none]" in capsys.readouterr().err


def test_send_sends_what_is_dicom_and_names_what_is_not(tmp_path: Path) -> None:
    """`send` stores every DICOM file at the node, and names every file that it leaves out."""
    scanned(tmp_path / "in", n=3, seed=4)
    (tmp_path / "in" / "readme.txt").write_text("no DICOM")
    pacs = Pacs().comes_up()
    try:
        done = busgen_cds("send", tmp_path / "in", "--to", f"{pacs.ae_title}@{pacs.host}:{pacs.port}")
    finally:
        pacs.goes_down()
    assert len(pacs.objects) == 3
    assert done.returncode == 1
    assert "readme.txt" in done.stderr


@pytest.mark.parametrize("verb", ["read", "send", "check", "queue", "results", "demo", "bundle", "train", "evaluate"])
def test_every_verb_explains_itself(verb: str) -> None:
    """Every verb has help that says what it does."""
    done = busgen_cds(verb, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout


def test_the_shipped_bundle_verifies() -> None:
    """The bundle that ships is signed by a release key that ships, and says so."""
    done = busgen_cds("bundle", "verify")
    assert done.returncode == 0, done.stderr
    assert "signature and files hold" in done.stdout


def test_the_demonstration_ends_with_the_answer_in_the_pacs(tmp_path: Path) -> None:
    """`demo --once` ends by itself: assessed by the shipped bundle, the objects stored in the PACS and named whole."""
    done = busgen_cds("demo", "--once", "--folder", tmp_path / "demo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "assessed" in done.stdout
    kept = list((tmp_path / "demo" / "pacs").glob("*.dcm"))
    assert len(kept) >= 4 and all(each.name in done.stdout for each in kept)


def test_outbox_is_told_by_the_node_it_is() -> None:
    """A node shows its name and address to an operator."""
    assert str(outbox.Node("pacs", "PACS", "10.0.0.1", 104)) == "pacs (PACS@10.0.0.1:104)"
