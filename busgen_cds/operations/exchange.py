"""What leaves a site for another, and what comes from one: bundles, adapters and synthetic sets, as signed parcels.

Rules:
- Whatever leaves is signed with the promoter's key, so a person decided it; whatever comes must be signed by a site
  whose public key lies in the folder of those that are trusted.
- A bundle that came is put onto this site's shelf and no further. Its digest stays what it was where it was made.
- Both are acts of a named person.
"""

from __future__ import annotations

import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from busgen_cds import parcel, signing
from busgen_cds.app import Site, night_signer, site_verifier
from busgen_cds.bundle import Bundle, Candidate, Manifest
from busgen_cds.errors import Misconfigured, Untrusted
from busgen_cds.parcel import Contents, Tell, What
from busgen_cds.settings import Settings
from busgen_cds.store import audit, site_keys

MANIFEST = "manifest.json"
_PARCEL = frozenset({parcel.KIND})


def nothing(done: int, total: int) -> None:
    """Tells nobody how far it is."""


def believed(chosen: Settings) -> signing.Verifier:
    """Other sites that a person here trusts, and this one."""
    keys = list(site_keys.trusted(chosen.path(chosen.models.trusted)).values())
    if (own := chosen.path(chosen.models.promoter_key)).exists():
        keys.append(site_keys.promoter_public(own))
    return signing.Verifier.of(*((key, _PARCEL) for key in keys))


def send_bundle(site: Site, digest: str, to: Path, *, person: str, passphrase: str) -> Contents:
    """A bundle of the shelf as a parcel: its manifest, its files, and the report that judged it."""
    entry = site.shelf.get(digest)
    opened = site.shelf.open(entry.digest)
    with tempfile.TemporaryDirectory(dir=site.shelf.folder) as made:
        folder = Path(made)
        for name, data in opened.files.items():
            (folder / name).write_bytes(data)
        (folder / MANIFEST).write_bytes(opened.manifest.to_bytes())
        (folder / "report.json").write_bytes(signing.canonical(dict(entry.report)))
        return _send(site, folder, to, "bundle", entry.name, entry.version, person, passphrase, nothing)


def send_folder(
    site: Site,
    folder: Path,
    to: Path,
    *,
    what: What,
    name: str,
    version: str,
    person: str,
    passphrase: str,
    tell: Tell = nothing,
) -> Contents:
    """An adapter's or a synthetic set's folder as a parcel."""
    if what == "bundle":
        raise Misconfigured("A bundle is sent from the shelf: name its digest.")
    return _send(site, folder, to, what, name, version, person, passphrase, tell)


def receive(site: Site, file: Path, *, person: str, tell: Tell = nothing) -> tuple[Contents, str]:
    """Verify a parcel and keep it; says where: a digest on the shelf, or a folder."""
    said = parcel.contents(file, believed(site.settings))
    if said.what == "bundle":
        where = _receive_bundle(site, file, person, tell)
    else:
        home = site.settings.path(site.settings.storage.folder) / "received" / said.what.replace(" ", "-")
        folder = home / signing.digest(said.to_bytes())[:16]
        home.mkdir(parents=True, exist_ok=True)
        if not folder.exists():
            parcel.unpack(file, folder, believed(site.settings), tell)
        where = str(folder)
    _note(site, "parcel received", person, said)
    return said, where


def receive_release(site: Site, folder: Path, *, person: str) -> str:
    """A bundle folder that a release key, or this site, has signed; its digest on the shelf."""
    Bundle.open(folder, site_verifier(site.settings))
    return site.shelf.adopt(folder, person=person).digest


def _receive_bundle(site: Site, file: Path, person: str, tell: Tell) -> str:
    site.shelf.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=site.shelf.folder) as made:
        folder = Path(made) / "bundle"
        said = parcel.unpack(file, folder, believed(site.settings), tell)
        data = (folder / MANIFEST).read_bytes() if MANIFEST in said.files else b""
        try:
            manifest = Manifest.from_bytes(data)
            files = {name: (folder / name).read_bytes() for name in manifest.files if Path(name).name == name}
            report = json.loads((folder / "report.json").read_bytes())
        except (ValueError, KeyError, TypeError, OSError) as broken:
            raise Untrusted(f"{file} does not hold a bundle that this version understands: {broken}") from broken
        if {name: signing.digest(each) for name, each in files.items()} != dict(manifest.files):
            raise Untrusted(f"{file} holds files that its bundle's manifest does not name.")
    came = {"from": said.sender, "sent": said.created}
    candidate, signer = Candidate(manifest, files), night_signer(site.settings)
    return site.shelf.put(candidate, report={**report, "came": came}, signer=signer, who=person).digest


def _send(
    site: Site, folder: Path, to: Path, what: What, name: str, version: str, person: str, passphrase: str, tell: Tell
) -> Contents:
    if not to.parent.is_dir():
        raise Misconfigured(f"{to.parent} is no folder: make it first.")
    said = parcel.pack(
        folder,
        to,
        what=what,
        name=name,
        version=version,
        sender=site.settings.site.name,
        created=datetime.now(UTC).date().isoformat(),
        signer=site_keys.promoter(site.settings.path(site.settings.models.promoter_key), passphrase),
        tell=tell,
    )
    _note(site, "parcel made", person, said)
    return said


def _note(site: Site, kind: str, person: str, said: Contents) -> None:
    detail = {"name": said.name, "version": said.version, "sender": said.sender, "files": len(said.files)}
    detail["digest"] = signing.digest(said.to_bytes())
    with site.database.transaction() as session:
        audit.record(session, audit.Act(kind, person, said.what, detail=detail))
