"""The road of a study, in the hospital's language."""

from __future__ import annotations

from pathlib import Path

from tests import hospital
from tests.hospital import a_lesion


def test_a_study_comes_in_a_result_goes_out(tmp_path: Path) -> None:
    """A study sent by DICOM is read once, and the PACS receives a report, a capture, a segmentation and a state."""
    with hospital.opened(tmp_path) as it:
        study = it.scanner.sends(a_lesion(2))
        it.settles()
        assert it.reader.reads == [study]
        assert {each.Modality for each in it.pacs.of(study)} == {"SR", "OT", "SEG", "PR"}
        assert it.result(study).entry.birads == "4C"
