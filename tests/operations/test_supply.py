"""What the product is made of and how it is given away: bill of materials, scans, release notes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cyclonedx.schema
import jsonschema_rs
import pytest

from busgen_cds import app
from busgen_cds.errors import Misconfigured
from busgen_cds.operations import supply

ROOT = Path(__file__).parents[2]
SECRETS, DEPENDENCIES, NOTES = (
    ROOT / "deploy" / f"{name}.py" for name in ("scan_secrets", "scan_dependencies", "release_notes")
)
BUNDLE = {"name": "reader", "version": "1.2", "digest": "9f" * 32}


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(
        words, capture_output=True, text=True, check=False, timeout=280, env={**os.environ, **environment}
    )


# -- bill of materials


def test_the_bill_is_cyclonedx() -> None:
    """The bill of materials is valid by CycloneDX's own schema, and every reference in it leads somewhere."""
    folder = Path(cyclonedx.schema.__file__).parent / "_res"

    def schema(address: str) -> Any:
        name = address.rpartition("/")[2].split("#")[0].replace(".SNAPSHOT", "")
        return json.loads((folder / name.replace(".schema.json", ".SNAPSHOT.schema.json")).read_text())

    bill = json.loads(supply.bill([BUNDLE], at=datetime(2027, 1, 2, tzinfo=UTC)))
    rules = jsonschema_rs.validator_for(schema("bom-1.6.schema.json"), retriever=schema, validate_formats=True)
    assert [str(error)[:200] for error in rules.iter_errors(bill)] == []
    refs = {each["bom-ref"] for each in (*bill["components"], bill["metadata"]["component"])}
    assert len(refs) == len(bill["components"]) + 1
    for each in bill["dependencies"]:
        assert {each["ref"], *each["dependsOn"]} <= refs
    assert bill["metadata"]["timestamp"] == "2027-01-02T00:00:00Z"


def test_the_bill_names_what_runs() -> None:
    """The bill names what a clinic runs, as installed, the pages' program and the bundle; torch is not in it."""
    bill = json.loads(supply.bill([BUNDLE]))
    found = {each["name"]: each for each in bill["components"]}
    import pydicom

    assert found["pydicom"]["version"] == pydicom.__version__
    assert {"fastapi", "starlette", "cryptography", "cffi", "numpy", "htmx.org", "psycopg-binary"} <= set(found)
    assert found["htmx.org"]["version"] != "unknown"
    assert found["reader"]["hashes"] == [{"alg": "SHA-256", "content": BUNDLE["digest"]}]
    assert not {"torch", "pytest", "monai"} & set(found)
    assert "torch" in supply.bill([BUNDLE], extras=["train"])
    licensed = [each for each in bill["components"] if each.get("licenses")]
    assert len(licensed) > 0.9 * (len(bill["components"]) - 1)


def test_the_bill_is_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same installation gives the same bill; a package that is needed and missing is an error that names it."""
    assert supply.bill([BUNDLE]) == supply.bill([BUNDLE])
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert '"timestamp": "2023-11-14T22:13:20Z"' in supply.bill([BUNDLE])
    monkeypatch.setattr(supply, "_requirements", lambda *_: [supply.Requirement("not-installed-here")])
    with pytest.raises(Misconfigured, match="not-installed-here"):
        supply.bill([])


def test_the_bill_by_command(tmp_path: Path) -> None:
    """`busgen-cds sbom` writes the bill with the digest of the bundle that is really shipped."""
    file = tmp_path / "bom.json"
    done = run(sys.executable, "-m", "busgen_cds", "sbom", "--out", file)
    assert done.returncode == 0, done.stderr
    models = [each for each in json.loads(file.read_text())["components"] if each["type"] == "machine-learning-model"]
    assert models[-1]["hashes"][0]["content"] == app.open_bundle().digest


# -- secrets


def test_no_secret_in_the_repository() -> None:
    """No file that would be published holds a key, a token or a password."""
    done = run(sys.executable, SECRETS, ROOT)
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.split()[3]) > 200, "all of them were looked at"


PLANTED = {
    "a private key": "-----BEGIN " + "PRIVATE KEY-----\nMC4CAQ\n",
    "a token of this product": "Authorization: Bearer busgen_" + "a1B2" * 10 + "xyz",
    "a site key": "0123456789abcdef" * 4 + "\n",
    "a cloud access key": "aws = AKIA" + "ABCDEFGHIJ234567",
    "a token of a code host": "ghp_" + "a1B2c3D4e5F6" * 3,
    "a token of a package registry": "pypi-AgEI" + "cHlwaS5vcmc" * 6,
    "a token of a chat": "xoxb-" + "1234567890-abcdef",
    "a signed token": "eyJhbGciOiJIUzI1" + ".eyJzdWIiOiIxMjM0" + ".c2lnbmF0dXJlLXNpZ25hdHVyZQ",
    "a password in an address": "postgresql://busgen:" + "hunter2@db.example/busgen",
    "a secret in a setting": 'client_secret = "' + "Zm9vYmFyYmF6" * 3 + '7"',
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_secret_is_found(tmp_path: Path, kind: str) -> None:
    """Each kind of secret is found where it was planted, named by file and line, and not repeated aloud."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "notes.txt").write_text(f"first line\n{PLANTED[kind]}\nlast line\n")
    (tmp_path / "good.txt").write_text('key = "file:keys/site.key"\nurl = "postgresql+psycopg://user@host/busgen"\n')
    done = run(sys.executable, SECRETS, tmp_path)
    assert done.returncode == 1
    assert f"deep/notes.txt:2: looks like {kind}" in done.stdout
    assert "good.txt" not in done.stdout
    assert PLANTED[kind].strip()[-12:] not in done.stdout


def test_a_real_key_is_found(tmp_path: Path) -> None:
    """The site key that `init` makes is found if it ever comes among published files; a marked line is passed over."""
    from busgen_cds.store import vault

    vault.write_key_file(tmp_path / "site.key")
    assert run(sys.executable, SECRETS, tmp_path).returncode == 1
    (tmp_path / "site.key").unlink()
    (tmp_path / "a.py").write_text(f"{PLANTED['a cloud access key']}  # not-a-secret: an example\n")
    assert run(sys.executable, SECRETS, tmp_path).returncode == 0


# -- dependencies


class _Osv(BaseHTTPRequestHandler):
    """OSV's query: one package has a known weakness."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        holes = [_HOLE] if asked["package"]["name"] == self.server.weak else []  # type: ignore[attr-defined]
        body = json.dumps({"vulns": holes} if holes else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


_RANGE = {"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "9.9"}]}
_HOLE = {
    "id": "PYSEC-2027-1",
    "published": "2027-01-01T00:00:00Z",
    "summary": "It lets everybody in.",
    "affected": [{"package": {"name": "weak", "ecosystem": "PyPI"}, "ranges": [_RANGE]}],
}


@contextmanager
def service(weak: str) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Osv)
    server.weak = weak  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
    finally:
        server.shutdown()


def locked(folder: Path) -> Path:
    file = folder / "clinic.txt"
    file.write_text("".join(f"{name}==1.0 \\\n    --hash=sha256:{'0' * 64}\n" for name in ("good", "weak")))
    return file


@pytest.mark.parametrize(("weak", "code", "said"), [("weak", 1, "PYSEC-2027-1"), ("nobody", 0, "0 known weaknesses")])
def test_dependencies_are_asked_about(tmp_path: Path, weak: str, code: int, said: str) -> None:
    """Each locked package is asked about; a known weakness fails and is named with the version that mends it."""
    with service(weak) as address:
        done = run(sys.executable, DEPENDENCIES, "--osv-url", address, locked(tmp_path))
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stdout
    assert "2 packages asked about" in done.stdout
    assert ("9.9" in done.stdout) is bool(code)


def test_not_checked_is_not_good(tmp_path: Path) -> None:
    """Where the service cannot be reached, the scan says that nothing was checked, and does not succeed."""
    done = run(sys.executable, DEPENDENCIES, "--osv-url", "http://127.0.0.1:1/v1/query", locked(tmp_path))
    assert done.returncode == 3
    assert "NOT CHECKED" in done.stdout
    assert "0 known" not in done.stdout


def test_every_locked_package_has_its_hash() -> None:
    """Each package of the lock files has its version and hashes, and comes from no place that a lock file names."""
    for lock in (ROOT / "deploy" / "locks").glob("*.txt"):
        entries = lock.read_text().replace("\\\n", " ").splitlines()
        packages = [entry for entry in entries if entry.strip() and not entry.strip().startswith("#")]
        assert len(packages) > 50
        for entry in packages:
            assert "==" in entry.split()[0], entry
            assert "--hash=sha256:" in entry, entry


# -- release


@pytest.mark.slow
def test_release_notes(tmp_path: Path) -> None:
    """The same sources give the same wheel and archive wherever they lie; the notes name the digest of each file."""
    here, sums = tmp_path / "here", []
    here.mkdir()
    for name in ("busgen_cds", "dicom_sr_templates", "orthanc_plugin"):
        shutil.copytree(ROOT / name, here / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "SECURITY.md"):
        shutil.copy(ROOT / name, here / name)
    for heavy in ("bundles", "weights"):  # megabytes that show nothing here
        shutil.rmtree(here / "busgen_cds" / heavy, ignore_errors=True)
    shutil.copytree(here, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    for place in ("here", "elsewhere"):
        root, out = tmp_path / place, tmp_path / f"{place}-out"
        done = run(sys.executable, NOTES, "--root", root, "--out", out)
        assert done.returncode == 0, done.stderr
        sums.append((out / "SHA256SUMS").read_text().splitlines())
    assert [line for line in sums[0] if "cdx" not in line] == [line for line in sums[1] if "cdx" not in line]
    assert len(sums[0]) == 3
    notes = (tmp_path / "here-out" / "RELEASE.md").read_text()
    for line in sums[0]:
        digest, name = line.split()
        assert f"| {name} | `{digest}` |" in notes
    assert run("sh", "-c", f"cd {tmp_path / 'here-out'} && sha256sum -c SHA256SUMS").returncode == 0
    with tarfile.open(next((tmp_path / "here-out").glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path / "given", filter="data")
    assert run(sys.executable, SECRETS, tmp_path / "given").returncode == 0, "nothing secret is given away"


def test_what_changed_is_the_changelog(tmp_path: Path) -> None:
    """The notes tell of the version that is released, or of what is unreleased where it has no part of its own."""
    sys.path.insert(0, str(NOTES.parent))
    try:
        from release_notes import changes  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    (tmp_path / "CHANGELOG.md").write_text("# C\n\n## Unreleased\n\n- New.\n\n## 1.2.0 (2027-01-02)\n\n- Old.\n")
    assert changes(tmp_path, "1.2.0") == "- Old."
    assert changes(tmp_path, "1.3.0") == "- New."
