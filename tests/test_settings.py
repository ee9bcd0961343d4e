"""What a site's settings accept, and what they say when they do not."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from busgen_cds import settings
from busgen_cds.errors import Misconfigured

EXAMPLE = Path(__file__).parent.parent / "deploy" / "busgen-cds.example.toml"
MINIMAL = """
[site]
name = "A"
prevalence = 0.1
[listener]
allow = [{ ae_title = "US1" }]
"""


def written(folder: Path, text: str) -> Path:
    file = folder / settings.FILE
    file.write_text(text)
    return file


def test_the_example_is_valid_and_shows_every_setting() -> None:
    """The example settings file is valid and shows every setting there is."""
    text = EXAMPLE.read_text()
    read = settings.read(EXAMPLE)
    assert read.listener.tls is not None
    missing = [name for name in _fields(settings.Settings) if f"{name} =" not in text and f"{name}=" not in text]
    assert missing == []
    assert tomllib.loads(text)["site"]["prevalence"]


def test_no_prevalence_no_start(tmp_path: Path) -> None:
    """A site that has not stated its prevalence cannot start."""
    with pytest.raises(Misconfigured, match=r"site\.prevalence"):
        settings.read(written(tmp_path, MINIMAL.replace("prevalence = 0.1", "")))


def test_nobody_may_send_unless_stated(tmp_path: Path) -> None:
    """Who may send has no default."""
    with pytest.raises(Misconfigured, match=r"listener\.allow"):
        settings.read(written(tmp_path, MINIMAL.replace('allow = [{ ae_title = "US1" }]', "")))


def test_a_misspelt_setting_is_named(tmp_path: Path) -> None:
    """A setting that does not exist is refused by name instead of being ignored."""
    with pytest.raises(Misconfigured, match="prevalance"):
        settings.read(written(tmp_path, MINIMAL.replace("prevalence", "prevalance")))


def test_a_destination_needs_its_node(tmp_path: Path) -> None:
    """A destination that names no known node is refused with the names there are."""
    with pytest.raises(Misconfigured, match="'archive'"):
        settings.read(written(tmp_path, MINIMAL + '[[destinations]]\nnode = "archive"\n'))


@pytest.mark.parametrize(
    "link", ["http://pacs.example", "http://pacs.example?study={uid}", "http://pacs.example/{study_uid"]
)
def test_a_viewers_link_leads_to_the_study(tmp_path: Path, link: str) -> None:
    """A link to the viewer that would open no study, or break the reading page, is refused with what it must hold."""
    with pytest.raises(Misconfigured, match=r"web\.viewer"):
        settings.read(written(tmp_path, f'{MINIMAL}\n[web]\nviewer = "{link}"\n'))


LOOSER: dict[str, float] = {
    "not_worse": 0.06, "release_drop": 0.02, "calibration_error": 0.16, "sensitivity": 0.89, "group_drop": 0.06,
    "outline_drop": 0.11, "declined": 0.11,
    "test_patients": 7, "doubtful": 0.74, "teachers": 7,
}  # fmt: skip


@pytest.mark.parametrize("rule", settings.Rules.model_fields)
def test_an_acceptance_rule_is_tightened_and_never_loosened(tmp_path: Path, rule: str) -> None:
    """What was fixed before anybody looked at a candidate cannot be given up for one."""
    with pytest.raises(Misconfigured, match=rule):
        settings.read(written(tmp_path, f"{MINIMAL}\n[adaptation.rules]\n{rule} = {LOOSER[rule]}\n"))


def test_the_environment_overrides_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value in the environment overrides the one in the file."""
    monkeypatch.setenv("BUSGEN_CDS_READER__DEVICE", "cpu")
    assert settings.read(written(tmp_path, MINIMAL)).reader.device == "cpu"


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    """Without a settings file the message names the command that makes one."""
    with pytest.raises(Misconfigured, match="init"):
        settings.read(tmp_path / "none.toml")


def _fields(model: type[BaseModel]) -> set[str]:
    names: set[str] = set()
    for name, field in model.model_fields.items():
        nested = [t for t in _types(field.annotation) if isinstance(t, type) and issubclass(t, BaseModel)]
        names |= {sub for each in nested for sub in _fields(each)} or {name}
    return names - {"home"}


def _types(annotation: object) -> list[object]:
    inner = getattr(annotation, "__args__", ())
    return [annotation, *(t for each in inner for t in _types(each))]
