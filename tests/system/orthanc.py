"""Debian's Orthanc as a test's PACS, on free ports and in a folder of its own.

    with orthanc.running(tmp_path) as pacs:
        pacs.knows("busgen", "BUSGEN_CDS", port)   # a node it may send to, and commit storage to
        pacs.upload(part10_bytes)                  # or by DICOM: pacs.ae_title, pacs.dicom_port
        pacs.files(study_uid, Modality="SR")       # what it keeps, byte for byte

`stop()`, `kill()` and `start()` let a test take it away and bring it back with what it kept.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.programs import free_port, need
from tests.system.daemon import Daemon

PLUGINS = Path("/usr/share/orthanc/plugins")
PYTHON = PLUGINS / "libOrthancPython.so"
DICOMWEB = PLUGINS / "libOrthancDicomWeb.so"


PLUGIN = Path(__file__).parents[2] / "orthanc_plugin" / "busgen_cds_routing.py"


class Orthanc(Daemon):
    """One Orthanc process and its REST API."""

    def __init__(self, folder: Path, *, ae_title: str = "PACS", script: Path | None = None, **settings: Any) -> None:
        need("Orthanc", str(DICOMWEB), *([str(PYTHON)] if script else []))
        self.folder = folder
        self.ae_title = ae_title
        self.dicom_port = free_port()
        self.http_port = free_port()
        self.url = f"http://127.0.0.1:{self.http_port}"
        super().__init__("Orthanc", folder / "orthanc.log", self.http_port, starts_within=30, stops_within=30)
        self._account: dict[str, str] = {}
        self.settings = _settings(folder, ae_title, self.dicom_port, self.http_port, script) | settings

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        Path(self.command[-1]).write_text(json.dumps(self.settings, indent=1))
        super().start()

    @property
    def command(self) -> list[str]:
        return ["Orthanc", str(self.folder / "orthanc.json")]

    def log_in(self, user: str, password: str) -> None:
        self._account = {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}

    def get(self, path: str, **query: str) -> Any:
        return json.loads(self.request("GET", path + ("?" + urllib.parse.urlencode(query) if query else "")))

    def post(self, path: str, body: Any = None) -> Any:
        answer = self.request("POST", path, json.dumps(body or {}).encode())
        return json.loads(answer) if answer else None

    def put(self, path: str, body: Any) -> None:
        self.request("PUT", path, json.dumps(body).encode())

    def delete(self, path: str) -> None:
        self.request("DELETE", path)

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> bytes:
        asked = urllib.request.Request(self.url + path, data=body, method=method, headers=self._account | headers)
        try:
            with urllib.request.urlopen(asked, timeout=60) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as refused:
            raise AssertionError(f"{method} {path}: {refused.code} {refused.read()[:500]!r}") from refused

    def knows(self, name: str, ae_title: str, port: int, host: str = "127.0.0.1") -> None:
        """A node that Orthanc may send to; kept over a restart."""
        self.settings.setdefault("DicomModalities", {})[name] = [ae_title, host, port]
        if self.runs:
            self.put(f"/modalities/{name}", {"AET": ae_title, "Host": host, "Port": port})

    def upload(self, *files: bytes) -> list[str]:
        """Files in over REST; Orthanc's ids of the instances."""
        return [
            str(json.loads(self.request("POST", "/instances", data, **{"Content-Type": "application/dicom"}))["ID"])
            for data in files
        ]

    def study(self, study_uid: str) -> str | None:
        """Orthanc's id of a study."""
        found = self.post("/tools/find", {"Level": "Study", "Query": {"StudyInstanceUID": study_uid}})
        return str(found[0]) if found else None

    def instances(self, study_uid: str, **tags: str) -> list[str]:
        """Orthanc's ids of a study's instances; narrowed by tags, for instance Modality="SR"."""
        return [
            str(found)
            for found in self.post(
                "/tools/find", {"Level": "Instance", "Query": {"StudyInstanceUID": study_uid, **tags}}
            )
        ]

    def files(self, study_uid: str, **tags: str) -> list[bytes]:
        """A study's instances as Part 10 files, byte for byte as Orthanc keeps them."""
        return [self.request("GET", f"/instances/{found}/file") for found in self.instances(study_uid, **tags)]


@contextmanager
def running(folder: Path, **arguments: Any) -> Iterator[Orthanc]:
    """A started Orthanc that is gone at the end, whatever the test did with it in between."""
    pacs = Orthanc(folder, **arguments)
    try:
        pacs.start()
        yield pacs
    finally:
        pacs.kill()


def store(files: Sequence[Path], to: Orthanc, ae_title: str = "US_ROOM_1") -> subprocess.CompletedProcess[str]:
    """DCMTK's storescu as the scanner."""
    need("storescu")
    return subprocess.run(
        ["storescu", "-R", "-aet", ae_title, "-aec", to.ae_title, "127.0.0.1", str(to.dicom_port), *map(str, files)],
        env=os.environ | {"TCP_NODELAY": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def _settings(folder: Path, ae_title: str, dicom_port: int, http_port: int, script: Path | None) -> dict[str, Any]:
    settings: Mapping[str, Any] = {
        "Name": "test",
        "DicomAet": ae_title,
        "DicomPort": dicom_port,
        "HttpPort": http_port,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "StorageDirectory": str(folder / "files"),
        "IndexDirectory": str(folder / "index"),
        "DicomCheckCalledAet": False,
        "DicomAlwaysAllowEcho": True,
        "DicomAlwaysAllowStore": True,
        "DicomAlwaysAllowFind": True,
        "DicomAlwaysAllowGet": True,
        "DicomAlwaysAllowMove": True,
        "DicomModalities": {},
        "OverwriteInstances": False,
        "StableAge": 1,
        "DicomScuTimeout": 5,
        "Plugins": [str(DICOMWEB), *([str(PYTHON)] if script else [])],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "EnableWado": True, "WadoRoot": "/wado"},
    }
    return {**settings, **({"PythonScript": str(script), "PythonVerbose": False} if script else {})}
