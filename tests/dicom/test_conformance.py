"""The conformance statement is what the code does."""

from __future__ import annotations

from pathlib import Path

from busgen_cds.dicom import association, conformance, objects

KEPT = Path(__file__).parents[2] / "docs" / "conformance.md"


def test_the_conformance_statement_is_up_to_date() -> None:
    """docs/conformance.md is what the code's tables say (`python -m busgen_cds.dicom.conformance` writes it)."""
    assert KEPT.read_text("utf-8") == conformance.statement()


def test_the_conformance_statement_names_every_kind_and_class() -> None:
    """Every kind of object and every SOP class that is received stands in the statement."""
    said = conformance.statement()
    assert set(conformance.KINDS) == set(objects.KINDS)
    for uid in (*association.STORED, *(uid for _, uids in conformance.KINDS.values() for uid in uids)):
        assert f"`{uid}`" in said


def test_the_words_of_a_template_are_listed() -> None:
    """The words that a template may use are listed, for a Result, a refusal and a finding."""
    assert {"birads", "probability", "prevalence", "reason", "side", "revision", "left_out"} <= set(conformance.words())
