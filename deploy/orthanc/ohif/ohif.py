"""Fetches OHIF and serves it at / before an Orthanc, so that viewer and images have one origin.

    python3 ohif.py fetch FOLDER
    python3 ohif.py serve FOLDER --orthanc http://127.0.0.1:8042 --port 3000

Rules:
- The version and its SHA-512 stand here; anything else that npm hands over is thrown away.
- Only reading goes through: GET below /dicom-web and /wado. Who may read is Orthanc's affair: its question for a
  password and the browser's answer pass unchanged.
- Standard library only. In front of others than this machine belongs a web server with TLS.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import http.client
import mimetypes
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

PACKAGE = "@ohif/app@3.13.2"
INTEGRITY = "sha512-WZdxmpmG7rqFgW9ZJLcbgr3XCtLi1KDNPoMaeY5PPe6j4G4fjEjjkycZM6C6Zk2F87BKxFfpq+jd5xXZB9E8EA=="
CONFIGURATION = Path(__file__).with_name("app-config.js")

HASHED = re.compile(r"(^|\.)[0-9a-f]{16}\.")  # such a name changes with its content
PROXIED = ("/dicom-web/", "/wado")
TO_ORTHANC = ("Accept", "Authorization", "Range", "If-None-Match")
TO_BROWSER = ("Content-Type", "Content-Length", "WWW-Authenticate", "ETag", "Last-Modified", "Content-Range")
# Cornerstone decodes in workers that share memory; browsers allow that to isolated pages only.
ISOLATED = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}


def fetch(folder: Path) -> Path:
    """OHIF's prebuilt files in the folder; fetched by npm the first time."""
    if (folder / "index.html").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        packed = _packed(Path(made))
        if f"sha512-{base64.b64encode(hashlib.sha512(packed.read_bytes()).digest()).decode()}" != INTEGRITY:
            raise SystemExit(f"{PACKAGE} is not the file that was pinned; nothing was installed.")
        with tarfile.open(packed) as archive:
            archive.extractall(made, filter="data")
        try:
            (Path(made) / "package" / "dist").rename(folder)
        except OSError:
            if not (folder / "index.html").exists():  # put there meanwhile by another
                raise
    return folder


def _packed(into: Path) -> Path:
    subprocess.run(["npm", "pack", PACKAGE, "--silent", "--pack-destination", str(into)], check=True)
    return next(into.glob("*.tgz"))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path
    orthanc: str

    def do_GET(self) -> None:
        if self.path.startswith(PROXIED):
            self._pass_on()
        else:
            self._file(urlsplit(self.path).path)

    def _pass_on(self) -> None:
        address = urlsplit(self.orthanc)
        upstream = http.client.HTTPConnection(address.hostname or "", address.port or 80, timeout=120)
        try:
            upstream.request("GET", self.path, headers={n: self.headers[n] for n in TO_ORTHANC if n in self.headers})
            answer = upstream.getresponse()
            self._head(answer.status, {n: answer.headers[n] for n in TO_BROWSER if n in answer.headers})
            shutil.copyfileobj(answer, self.wfile)
        except ConnectionRefusedError:
            self._head(502, {"Content-Length": "0"})
        finally:
            upstream.close()

    def _file(self, path: str) -> None:
        """A file of OHIF's; any other path is a page of the viewer's own."""
        wanted = (self.folder / path.lstrip("/")).resolve()
        if not wanted.is_relative_to(self.folder) or not wanted.is_file():
            wanted = self.folder / "index.html"
        content = (CONFIGURATION if path == "/app-config.js" else wanted).read_bytes()
        kind = mimetypes.guess_type(wanted.name)[0] or "application/octet-stream"
        kept = "public, max-age=31536000, immutable" if HASHED.search(wanted.name) else "no-cache"
        self._head(200, {"Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": kept})
        self.wfile.write(content)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, **ISOLATED}.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Addresses hold identifiers of studies: they belong in no log."""


def serve(folder: Path, orthanc: str, host: str, port: int) -> None:
    mimetypes.add_type("application/wasm", ".wasm")
    mimetypes.add_type("text/javascript", ".js")
    handler = type("OhifHandler", (Handler,), {"folder": folder.resolve(), "orthanc": orthanc})
    with ThreadingHTTPServer((host, port), handler) as server:
        print(f"OHIF is at http://{host}:{server.server_port}/", flush=True)  # noqa: T201
        server.serve_forever()


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("verb", choices=["fetch", "serve"])
    words.add_argument("folder", type=Path)
    words.add_argument("--orthanc", default="http://127.0.0.1:8042")
    words.add_argument("--host", default="127.0.0.1")
    words.add_argument("--port", type=int, default=3000)
    said = words.parse_args()
    folder = fetch(said.folder)
    if said.verb == "serve":
        serve(folder, said.orthanc, said.host, said.port)


if __name__ == "__main__":
    sys.exit(main())
