"""The configuration in deploy/orthanc is complete and works as it stands; only folders and ports are the test's."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests import images
from tests.pacs import Pacs
from tests.programs import wait_for
from tests.system import ohif, orthanc

pytestmark = pytest.mark.program

DEPLOYED = ohif.ROOT / "deploy" / "orthanc" / "orthanc.json"
CHANGED_HERE = {"StorageDirectory", "IndexDirectory", "DicomPort", "HttpPort", "PythonScript", "DicomModalities"}


def test_deployed_orthanc_routes_and_shows(tmp_path: Path) -> None:
    """deploy/orthanc starts as it is written, routes a breast study, and shows it to OHIF's server and no other."""
    settings = json.loads(re.sub(r"^\s*//.*$", "", DEPLOYED.read_text(), flags=re.MULTILINE))
    kept = {name: value for name, value in settings.items() if name not in CHANGED_HERE}
    product = Pacs("busgen_cds").comes_up()
    node = settings["DicomModalities"]["busgen-cds"] | {"Port": product.port}
    faster = {"StableAge": 1, "DicomModalities": {"busgen-cds": node}}
    with orthanc.running(tmp_path, ae_title="ORTHANC", script=orthanc.PLUGIN, **(kept | faster)) as pacs:
        [first, *_] = pacs.upload(*images.breast_study(2))
        wait_for(lambda: len(product.objects) == 2, 15, "not routed")
        wait_for(lambda: "BusgenCdsSent" in pacs.get(f"/instances/{first}/metadata"), 10, "not marked by name")
        with ohif.served(pacs) as url:
            with urllib.request.urlopen(f"{url}/dicom-web/studies") as answer:
                assert len(json.load(answer)) == 1
                assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
            page = urllib.request.urlopen(f"{url}/viewer?StudyInstanceUIDs=1.2").read()
            assert b"<title>OHIF Viewer</title>" in page
            assert b"qidoRoot: '/dicom-web'" in urllib.request.urlopen(f"{url}/app-config.js").read()
            outside = urllib.request.urlopen(f"{url}/..%2f..%2f..%2fetc/passwd").read()
            assert outside == page
            with pytest.raises(urllib.error.HTTPError, match="501"):
                urllib.request.urlopen(f"{url}/dicom-web/studies", data=b"x")
    product.goes_down()
