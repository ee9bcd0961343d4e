"""Results delivered to a real PACS: Orthanc, by C-STORE and by STOW-RS, asked and committed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest

from busgen_cds.dicom import outbox
from busgen_cds.dicom.outbox import Node
from busgen_cds.flows.services import Destination
from tests import hospital
from tests.hospital import a_lesion
from tests.system import orthanc
from tests.system.orthanc import Orthanc

pytestmark = pytest.mark.program


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Orthanc]:
    with orthanc.running(tmp_path / "orthanc") as running:
        yield running


def _node(pacs: Orthanc) -> Node:
    return Node("orthanc", pacs.ae_title, "127.0.0.1", pacs.dicom_port)


def test_stored_and_committed(tmp_path: Path, pacs: Orthanc) -> None:
    """Orthanc stores every object by C-STORE and commits to them, on an association of its own; it is asked how many
    images it holds and whose they are."""

    def prepare(it: hospital.Hospital) -> None:
        it.destinations = [Destination(_node(pacs), commitment=True)]
        it.query_node = _node(pacs)

    with hospital.opened(tmp_path / "site", prepare=prepare) as it:
        assert it.listener is not None
        pacs.knows("busgen", "BUSGEN_CDS", it.listener.port)
        lesion = a_lesion(2, patient_id="P-7")
        pacs.upload(*lesion)
        study = it.scanner.sends(lesion)
        it.settles()
        assert outbox.patient_ids(study, _node(pacs)) == ("P-7",)
        assert outbox.count_images(study, _node(pacs)) == 2
        assert {(each.kind, each.state) for each in it.result(study).delivered} == {
            (kind, "confirmed") for kind in ("sr", "sc", "seg", "pr")
        }
        for each in it.result(study).objects:
            assert _same(each.data, pacs.files(study, SOPInstanceUID=each.sop_instance_uid)[0])


def test_stored_over_the_web(tmp_path: Path, pacs: Orthanc) -> None:
    """Orthanc stores every object by STOW-RS."""

    def prepare(it: hospital.Hospital) -> None:
        it.destinations = [Destination(Node("orthanc", url=f"{pacs.url}/dicom-web"))]

    with hospital.opened(tmp_path / "site", prepare=prepare) as it:
        study = it.scanner.sends(a_lesion(1))
        it.settles()
        assert {each.state for each in it.result(study).delivered} == {"sent"}
        for each in it.result(study).objects:
            assert _same(each.data, pacs.files(study, SOPInstanceUID=each.sop_instance_uid)[0])


def test_it_dies_and_comes_back(tmp_path: Path, pacs: Orthanc) -> None:
    """Orthanc is killed while results wait for it, and comes back: all arrive, nothing is read again."""

    def prepare(it: hospital.Hospital) -> None:
        it.destinations = [Destination(_node(pacs))]

    with hospital.opened(tmp_path / "site", prepare=prepare) as it:
        pacs.kill()
        study = it.scanner.sends(a_lesion(1))
        it.waits_until(lambda: [each for each in it.site.results.deliveries.under_way() if each.tries > 0])
        pacs.start()
        it.settles()
        assert len(pacs.files(study, Modality="SR")) == 1
        assert it.reader.reads == [study]


def _same(ours: bytes, theirs: bytes) -> bool:
    return pydicom.dcmread(io.BytesIO(ours)) == pydicom.dcmread(io.BytesIO(theirs))
