"""Builds the stations from settings, and nothing else: tests build the same from other parts.

Rules:
- What is asked for and cannot be had is Misconfigured, by name; nothing falls back in silence.
- The engine opens only a bundle whose signature holds.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from importlib import resources
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from busgen_cds import bundle, drift, parcel, settings, signing
from busgen_cds.bundle import Bundle
from busgen_cds.dicom import files, intake, objects, outbox
from busgen_cds.dicom.association import CommitmentReport, CommitmentRequest, Noted, Peer, Rules
from busgen_cds.dicom.association import Desk as ReceivingDesk
from busgen_cds.dicom.commitment import Speaker
from busgen_cds.dicom.listener import Listener, ListenerConfig, Tls
from busgen_cds.dicom.objects import EVERYWHERE, KINDS, Profile
from busgen_cds.dicom.reporting import Reporter
from busgen_cds.dicom.upper_layer import Limits
from busgen_cds.errors import Misconfigured
from busgen_cds.flows import desk, read_files, services
from busgen_cds.flows.desk import Desk
from busgen_cds.flows.services import Services, Waits
from busgen_cds.flows.shadow import Companion
from busgen_cds.flows.watch import Watch
from busgen_cds.flows.worker import Worker
from busgen_cds.result import Kind, Rendered, Result
from busgen_cds.settings import Settings
from busgen_cds.store import audit, database, shelf, site_keys, vault
from busgen_cds.store.database import Database
from busgen_cds.store.drift import Drift
from busgen_cds.store.inbox import Inbox
from busgen_cds.store.jobs import Jobs
from busgen_cds.store.results import Previous, Results
from busgen_cds.store.shadow import Shadow
from busgen_cds.store.shelf import Shelf, Standing
from busgen_cds.store.vault import Vault
from busgen_cds.study import Study
from busgen_cds.triage import Rule
from busgen_cds.vision import assess, engine
from busgen_cds.vision.engine import Device, Engine, Reading
from busgen_cds.vision.live import Live

RELEASE_KINDS = frozenset({bundle.KIND, parcel.KIND})


def local_now() -> datetime:
    """The site's local time: what objects show."""
    return datetime.now().astimezone()


# ---- Bundles


@cache
def release_verifier() -> signing.Verifier:
    """Trusts the product's release keys, one public key for each release."""
    folder = resources.files("busgen_cds") / "trust"
    keys = [load_pem_public_key(each.read_bytes()) for each in folder.iterdir() if each.name.endswith(".pem")]
    return signing.Verifier.of(*((key, RELEASE_KINDS) for key in keys if isinstance(key, Ed25519PublicKey)))


def shipped_bundles() -> list[Path]:
    """The bundles that came with the product, oldest first."""
    folder = Path(str(resources.files("busgen_cds") / "bundles"))
    return sorted(each.parent for each in folder.glob(f"*/{bundle.ENVELOPE}"))


def shipped_bundle() -> Path:
    """The newest bundle that came with the product."""
    if not shipped_bundles():
        raise Misconfigured("No bundle was installed with the product: install it again.")
    return shipped_bundles()[-1]


def open_bundle(folder: Path | None = None) -> Bundle:
    return Bundle.open(folder or shipped_bundle(), release_verifier())


def open_engine(folder: Path | None = None, device: Device = "auto") -> Engine:
    return engine.open(open_bundle(folder), device)


# ---- The shelf


def site_verifier(chosen: Settings) -> signing.Verifier:
    """Trusts release keys and this site's own, each for what it may sign."""
    trusted = dict(release_verifier().keys)
    for said, public, kinds in (
        (chosen.models.night_key, site_keys.night_public, frozenset({bundle.KIND})),
        (chosen.models.promoter_key, site_keys.promoter_public, frozenset({shelf.KIND})),
    ):
        file = chosen.path(said)
        if file.exists():
            key = public(file)
            trusted[signing.key_id(key)] = (key, kinds)
    return signing.Verifier(trusted)


def open_shelf(chosen: Settings, opened: Database) -> Shelf:
    """The site's shelf. Before its first statement, `reader.bundle` or the shipped bundle is live."""

    def home() -> Path:
        return chosen.path(chosen.reader.bundle) if chosen.reader.bundle else shipped_bundle()

    folder = chosen.path(chosen.storage.folder) / "shelf"
    return Shelf(folder, opened, site_verifier(chosen), home=home, release=release_verifier())


def open_drift(chosen: Settings, opened: Database) -> Drift:
    said = chosen.drift
    limits = drift.Limits(said.least_studies, said.scores, said.categories, said.declines, said.images)
    return Drift(opened, limits, said.reference_studies, asks=said.asks)


def night_signer(chosen: Settings) -> signing.KeySigner:
    """Who puts bundles onto the shelf."""
    return site_keys.night(chosen.path(chosen.models.night_key))


def promote(site: Site, digest: str, *, person: str, passphrase: str, heard: int | None = None) -> Standing:
    """Make a bundle of the shelf live, if it read along in shadow, an engine opens it here, and the passphrase opens
    the promoter's key."""
    signer = site_keys.promoter(site.settings.path(site.settings.models.promoter_key), passphrase)
    entry = site.shelf.get(digest)
    if entry.state == "shadow" and not site.shadow.comparison(entry.digest).read:
        raise Misconfigured(
            f"{entry.name} {entry.version} has read no study in shadow yet, so nothing says how it does with this "
            "site's studies: let it read along first. `busgen-cds bundle shadow` shows what it has read."
        )
    engine.open(site.shelf.open(entry.digest), site.settings.reader.device).close()
    return site.shelf.promote(entry.digest, person=person, signer=signer, heard=heard)


def roll_back(site: Site, *, person: str, passphrase: str, heard: int | None = None) -> Standing:
    """Make live again what was live before."""
    signer = site_keys.promoter(site.settings.path(site.settings.models.promoter_key), passphrase)
    return site.shelf.roll_back(person=person, signer=signer, heard=heard)


@contextmanager
def live_engine(site: Site) -> Iterator[Live]:
    """The engine of the live bundle, which follows when another becomes live."""
    device = site.settings.reader.device
    live = Live(site.shelf.standing, lambda: engine.open(site.shelf.live(), device))
    try:
        yield live
    finally:
        live.close()


# ---- Reading files


def file_stations(reader: Engine, prevalence: float | None) -> read_files.Stations:
    """What `read` needs; without a prevalence the bundle's own is assumed."""

    def read(study: Study) -> Result:
        stated = reader.manifest.calibration.prevalence if prevalence is None else prevalence
        return assess.assess(study, reader, prevalence=stated, revision=1, clock=time.monotonic)

    def render(study: Study, result: Result) -> tuple[Rendered, ...]:
        return objects.render(study, result, rendered_at=local_now())

    return read_files.Stations(files.study_uid, intake.study, read, render)


# ---- A site


@dataclass(frozen=True)
class Site:
    """One site, opened: its settings and everything of it that survives a power cut."""

    settings: Settings
    database: Database
    vault: Vault
    inbox: Inbox
    results: Results
    jobs: Jobs
    desk: Desk
    shelf: Shelf
    shadow: Shadow
    drift: Drift

    @property
    def triage(self) -> Rule:
        """Who is looked at first, by this site's settings."""
        return Rule(self.settings.triage.order, self.settings.triage.declined_above)

    def close(self) -> None:
        self.desk.close()
        self.database.close()


def found(folder: Path, text: str, passphrase: str) -> Path:
    """Make a site: its settings file, its keys and its database. An existing one is never overwritten.

    The passphrase is the promoter's: without it nothing but the shipped bundle ever becomes live.
    """
    file = folder / settings.FILE
    if file.exists():
        raise Misconfigured(f"{file} is there already: choose another folder, or change that site's settings.")
    chosen = settings.parse(text, file)  # whatever is wrong with it is said before anything is written
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    (folder / "keys").mkdir(mode=0o700, exist_ok=True)
    vault.write_key_file(folder / "keys" / "site.key")
    site_keys.make(folder / "keys", passphrase)
    open_site(chosen).close()
    file.write_text(text)
    return file


@contextmanager
def opened_site(chosen: Settings) -> Iterator[Site]:
    site = open_site(chosen)
    try:
        yield site
    finally:
        site.close()


def open_site(chosen: Settings) -> Site:
    folder = chosen.path(chosen.storage.folder)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    opened = database.open(_database_url(chosen.storage.database, folder / "busgen-cds.sqlite"))
    keys = vault.unlock(vault.key_source(anchored(chosen, chosen.storage.key)))
    inbox = Inbox(folder / "inbox", opened, keys, least_free_bytes=chosen.listener.free_bytes)
    results, jobs = Results(opened, keys), Jobs(opened)
    workflows = workflows_url(chosen)
    desk.prepare(workflows)
    return Site(
        chosen,
        opened,
        keys,
        inbox,
        results,
        jobs,
        Desk(workflows, results, jobs, waits(chosen)),
        open_shelf(chosen, opened),
        Shadow(opened),
        open_drift(chosen, opened),
    )


def workflows_url(chosen: Settings) -> str:
    return _database_url(chosen.storage.workflows, chosen.path(chosen.storage.folder) / "workflows.sqlite")


def waits(chosen: Settings) -> Waits:
    return Waits(silence=chosen.study.silence_seconds, count=chosen.study.count_wait_seconds)


def listener(chosen: Settings) -> Listener:
    return Listener(_listener_config(chosen), partial(receiving_desk, chosen), partial(keep_books, chosen))


def keep_books(chosen: Settings) -> None:
    """The inbox's clerk: one process that writes the rows for all that receive."""
    open_site(chosen).inbox.keep_books()


def receiving_desk(chosen: Settings) -> ReceivingDesk:
    """What one receiving process hands its instances to; each process opens the site for itself."""
    site = open_site(chosen)

    def noted(what: Noted) -> None:
        with site.database.transaction() as session:
            detail = {"address": what.address, "called": what.called}
            audit.record(session, audit.Act(what.kind, what.who, what.what, detail=detail))

    return ReceivingDesk(
        receive=site.inbox.receive,
        arrived=site.desk.arrived,
        association_closed=site.desk.association_closed,
        committed=lambda word, speaker: site.desk.committed(word, partial(_is_node, chosen, speaker)),
        commitment=partial(_answer_for, site),
        report_later=Reporter(partial(_reports_to, chosen), noted).later,
        noted=noted,
    )


def _is_node(chosen: Settings, speaker: Speaker, name: str) -> bool:
    """Whether who speaks to our listener is the node of this name: by its title, from where the site says that the
    title comes from (else it was not let in), or from the node's own host where the site says nothing of that."""
    if (name, speaker.ae_title) not in ((each.name, each.ae_title) for each in chosen.nodes):
        return False
    rules = [each for each in chosen.listener.allow if each.ae_title == speaker.ae_title]
    bound = bool(rules) and all(each.addresses or each.certificate_sha256 for each in rules)
    return bound or node(chosen, name).lies_at(speaker.address)


def _reports_to(chosen: Settings, calling_ae: str) -> outbox.Node | None:
    """Where a sender hears of storage commitment when it has hung up."""
    named = [each.report_to for each in chosen.listener.allow if each.ae_title == calling_ae and each.report_to]
    return node(chosen, named[0]) if named else None


def _answer_for(site: Site, request: CommitmentRequest) -> CommitmentReport:
    kept, failed = site.inbox.answer_for(request.instances)
    return CommitmentReport(request, kept, failed)


def _listener_config(chosen: Settings) -> ListenerConfig:
    said = chosen.listener
    peers = tuple(Peer(p.ae_title, p.addresses, p.certificate_sha256.lower()) for p in said.allow)
    rules = Rules(
        ae_title=said.ae_title,
        check_called_ae=said.check_called_ae,
        peers=peers,
        plain_from=said.plain_from,
        most_data_set_bytes=said.instance_bytes,
        limits=Limits(idle_seconds=said.idle_seconds, most_pdu_bytes=said.pdu_bytes),
    )
    return ListenerConfig(
        rules=rules,
        host=said.host,
        port=said.port,
        tls=_listener_tls(chosen, said.tls) if said.tls else None,
        processes=said.processes,
        most_associations=said.associations,
        most_per_peer=said.associations_per_peer,
    )


def _listener_tls(chosen: Settings, tls: settings.Tls) -> Tls:
    certificate, key, authority = (str(chosen.path(path)) for path in (tls.certificate, tls.key, tls.authority))
    return Tls(certificate, key, authority, tls.port)


class _InShadow:
    """An engine of a bundle in shadow: one thread, and nothing but answers."""

    def __init__(self, site: Site, digest: str) -> None:
        self._prevalence = site.settings.site.prevalence
        self._engine = engine.open(site.shelf.open(digest), site.settings.reader.device, threads=1)

    def read(self, study: Study) -> Result:
        return assess.assess(study, self._engine, prevalence=self._prevalence, clock=time.monotonic)

    def close(self) -> None:
        self._engine.close()


def companion(site: Site) -> Companion:
    return Companion(site.shelf, site.shadow, partial(_InShadow, site))


def worker(site: Site, reader: Live, *, name: str = "") -> Worker:
    return Worker(
        stations(site, reader),
        workflows_url=workflows_url(site.settings),
        name=name or f"{socket.gethostname()}-worker",
        readings=site.settings.reader.jobs,
        companion=companion(site),
    )


def stations(site: Site, reader: Live) -> Services:
    chosen = site.settings

    watch = Watch(site.drift, lambda: reader.engine.bundle.digest)

    def read(study: Study, revision: int) -> Result:
        heard: list[Reading] = []
        with reader.for_a_study() as used:
            result = assess.assess(
                study,
                used,
                prevalence=chosen.site.prevalence,
                revision=revision,
                clock=time.monotonic,
                heard=heard.append,
            )
            watch.saw(result, [used.gate.whitened(reading.embedding) for reading in heard])
        return result

    profile = _profile(chosen)

    def render(study: Study, result: Result, replaced: Previous | None) -> tuple[Rendered, ...]:
        old = replaced.objects if replaced else ()
        return objects.render(study, result, profile=profile, rendered_at=local_now(), replaces=old)

    return Services(
        inbox=site.inbox,
        results=site.results,
        jobs=site.jobs,
        intake=intake.study,
        assess=read,
        render=render,
        follow=reader.follow,
        watch=watch,
        destinations=tuple(_destination(chosen, each) for each in chosen.destinations),
        query_node=node(chosen, chosen.study.query_node) if chosen.study.query_node else None,
        waits=waits(chosen),
    )


def node(chosen: Settings, name: str) -> outbox.Node:
    """Another system, by the name it has in the settings."""
    for each in chosen.nodes:
        if each.name == name:
            return outbox.Node(
                name=each.name,
                ae_title=each.ae_title,
                host=each.host,
                port=each.port,
                calling_ae=chosen.listener.ae_title,
                url=each.url,
                tls=_tls(chosen, each.tls) if each.tls else None,
            )
    raise Misconfigured(f"No [[nodes]] entry is named {name!r}; there are: {[n.name for n in chosen.nodes] or 'none'}.")


def _profile(chosen: Settings) -> Profile:
    """Objects are rendered once: every kind that some destination gets."""
    wanted: set[Kind] = {kind for each in chosen.destinations for kind in each.kinds} or {*EVERYWHERE.kinds}
    notes: set[Kind] = {"ko"} if any(each.rejection_notes for each in chosen.destinations) else set()
    return Profile(
        kinds=tuple(kind for kind in KINDS if kind in wanted | notes), nominal_geometry=chosen.objects.nominal_geometry
    )


def _destination(chosen: Settings, each: settings.Destination) -> services.Destination:
    return services.Destination(
        node(chosen, each.node), each.kinds, each.commitment, each.rejection_notes, each.deliver_declined
    )


def _tls(chosen: Settings, tls: settings.NodeTls) -> outbox.Tls:
    certificate, key = (str(chosen.path(p)) if p else "" for p in (tls.certificate, tls.key))
    return outbox.Tls(str(chosen.path(tls.authority)), certificate, key, tls.check_host)


def _database_url(said: str, file: Path) -> str:
    return f"sqlite:///{file}" if said == "sqlite" else said


def anchored(chosen: Settings, reference: str) -> str:
    """A key file's relative path starts at the site's folder."""
    kind, _, rest = reference.partition(":")
    return f"file:{chosen.path(Path(rest))}" if kind == "file" else reference
