"""How safe is this site as it is set up and runs? Each control gets a rating, what was found, and what to do.

Rules:
- `ok`: the control holds. `warn`: it could be better, and somebody should have decided so. `fail`: it does not hold.
- What can be tried is tried from outside, at the running listener and pages; what does not run is said to be untried.
- Nothing is changed, and no name of a patient is looked at.
"""

from __future__ import annotations

import os
import socket
import ssl
import stat
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Literal, NamedTuple

import sqlalchemy as sa
from cryptography import x509

from busgen_cds import app, settings
from busgen_cds.app import Site
from busgen_cds.errors import Misconfigured, Transient, Untrusted
from busgen_cds.operations import housekeeping
from busgen_cds.settings import Settings
from busgen_cds.store import audit, checkpoints, forwarding, rotation, vault
from busgen_cds.store.people import People

Rating = Literal["ok", "warn", "fail"]
SOON = timedelta(days=30)
LATE = 1000  # acts that may wait for the audit repository
HEADERS = ("content-security-policy", "x-content-type-options", "referrer-policy")
_SECONDS = 5.0


class Rated(NamedTuple):
    control: str
    rating: Rating
    found: str
    do: str = ""


Look = Callable[[], Iterator[Rated]]


def everything(file: Path) -> list[Rated]:
    try:
        chosen = settings.read(file)
        site = app.open_site(chosen)
    except (Misconfigured, Untrusted) as wrong:
        return [Rated("site", "fail", str(wrong), "busgen-cds check says more")]
    try:
        looks: dict[str, Look] = {
            "account of the service": _account,
            "files": lambda: _files(chosen, file),
            "site key": lambda: _site_key(site),
            "who may send": lambda: _senders(chosen),
            "DICOM port": lambda: _dicom_port(chosen),
            "DICOM over TLS": lambda: _tls(chosen),
            "other systems": lambda: _nodes(chosen),
            "pages": lambda: _pages(chosen),
            "people": lambda: _people(site),
            "record of acts": lambda: _record(site),
            "audit repository": lambda: _repository(site),
            "retention": lambda: _retention(site),
            "bundle": lambda: _bundle(site),
        }
        return [rated for name, look in looks.items() for rated in _tried(name, look)]
    finally:
        site.close()


def _tried(name: str, look: Look) -> Iterator[Rated]:
    try:
        yield from look()
    except (Misconfigured, Transient, Untrusted, OSError, ValueError) as wrong:
        yield Rated(name, "fail", str(wrong), "set this right, then look again")


# ---- What holds the data


def _account() -> Iterator[Rated]:
    name = "account of the service"
    if os.geteuid() == 0:
        yield Rated(name, "warn", "this program runs as root", "run it as a user of its own (deploy/ shows how)")
    else:
        yield Rated(name, "ok", f"user {os.geteuid()}, not root")


def _files(chosen: Settings, file: Path) -> Iterator[Rated]:
    folder = chosen.path(chosen.storage.folder)
    private = [path for path in (folder, *_secrets(chosen, file)) if path.exists()]
    open_ones = [path for path in private if stat.S_IMODE(path.stat().st_mode) & 0o077]
    if open_ones:
        what = ", ".join(map(str, open_ones))
        yield Rated("files", "fail", f"others may look into {what}", f"chmod go= {what}")
    else:
        yield Rated("files", "ok", f"{folder} and {len(private) - 1} files with secrets are for this service alone")


def _secrets(chosen: Settings, file: Path) -> list[Path]:
    """Every file that settings name for a key of ours, and the settings themselves when a password stands in them."""
    tls = [chosen.listener.tls, chosen.record.syslog, *(each.tls for each in chosen.nodes)]
    named = [each.key for each in tls if each and each.key]
    named += [chosen.record.key, chosen.models.night_key, chosen.models.promoter_key]
    found = {*map(chosen.path, named), *(file.parent / "keys").glob("*.key")}
    databases = (chosen.storage.database, chosen.storage.workflows)
    if any(url != "sqlite" and sa.make_url(url).password for url in databases):
        found.add(file)
    return sorted(found)


def _site_key(site: Site) -> Iterator[Rated]:
    chosen = site.settings
    kind, _, rest = chosen.storage.key.partition(":")
    if kind == "file":
        key, folder = chosen.path(Path(rest)), chosen.path(chosen.storage.folder)
        if key.stat().st_dev == folder.stat().st_dev:
            yield Rated(
                "site key", "warn", "it lies on the disk that it protects: who steals the disk has both",
                'put it elsewhere: storage.key = "command:…" asks a key manager',
            )  # fmt: skip
        else:
            yield Rated("site key", "ok", f"{key} lies on another disk than the data")
    else:
        yield Rated("site key", "ok", f"it comes from {kind}")
    keys = vault.key_source(app.anchored(chosen, chosen.storage.key)).keys()
    if len(keys) > 1:
        left = rotation.left(site.database, site.vault)
        do = "busgen-cds keys rotate --no-new" if left else "busgen-cds keys retire"
        yield Rated("site key", "warn", f"{len(keys) - 1} older keys are still in use", do)


# ---- The network


def _senders(chosen: Settings) -> Iterator[Rated]:
    said = chosen.listener
    anywhere = [peer.ae_title for peer in said.allow if not peer.addresses]
    if anywhere:
        do = "give each [listener] allow entry its addresses"
        yield Rated("who may send", "warn", f"from any address: {', '.join(anywhere)}", do)
    else:
        yield Rated("who may send", "ok", f"{len(said.allow)} titles, each from its addresses")
    if not said.check_called_ae:
        yield Rated("who may send", "warn", "senders may call us by any title", "set listener.check_called_ae = true")
    wide = [network for network in said.plain_from if not ip_network(network).is_loopback]
    if wide:
        do = "set [listener.tls], then empty plain_from"
        yield Rated("plain DICOM", "warn", f"names and images travel readable from {', '.join(wide)}", do)
    else:
        yield Rated("plain DICOM", "ok", "from this machine alone")


def _dicom_port(chosen: Settings) -> Iterator[Rated]:
    """A stranger asks for an association."""
    name, port = "DICOM port", chosen.listener.port
    try:
        answer = _stranger(_reach(chosen.listener.host), port)
    except OSError:
        yield Rated(name, "warn", f"nothing listens on port {port}: not tried", "start the site, then look again")
        return
    if answer in (b"\x03", b""):
        yield Rated(name, "ok", "a stranger's request for an association was turned away")
    else:
        yield Rated(name, "fail", "a title that is not on the list was let in", "look at [listener] allow")


def _stranger(host: str, port: int) -> bytes:
    """PS3.8 9.3.2: a request by a title that nobody has; the type of the answer's PDU."""
    items = b"\x10\0\0\x151.2.840.10008.3.1.1.1" + b"\x20\0\0\x2e\x01\0\0\0"
    items += b"\x30\0\0\x111.2.840.10008.1.1" + b"\x40\0\0\x111.2.840.10008.1.2" + b"\x50\0\0\x08\x51\0\0\x04\0\0\x40\0"
    body = b"\0\1\0\0" + b"ANY".ljust(16) + os.urandom(6).hex().upper().encode().ljust(16) + bytes(32) + items
    with socket.create_connection((host, port), timeout=_SECONDS) as connection:
        connection.sendall(b"\1\0" + len(body).to_bytes(4, "big") + body)
        return connection.recv(1)


def _tls(chosen: Settings) -> Iterator[Rated]:
    tls, name = chosen.listener.tls, "DICOM over TLS"
    if tls is None:
        only_here = all(ip_network(network).is_loopback for network in chosen.listener.plain_from)
        rating: Rating = "ok" if only_here else "warn"
        yield Rated(name, rating, "not set up", "" if only_here else "set [listener.tls], and a certificate per peer")
        return
    yield _certificate(name, chosen.path(tls.certificate))
    unbound = [peer.ae_title for peer in chosen.listener.allow if not peer.certificate_sha256]
    if unbound:
        do = "set certificate_sha256 for each"
        yield Rated(name, "warn", f"no certificate speaks for {', '.join(unbound)}: they cannot use TLS", do)
    yield _without_certificate(name, _reach(chosen.listener.host), tls.port)


def _certificate(name: str, file: Path) -> Rated:
    left = x509.load_pem_x509_certificate(file.read_bytes()).not_valid_after_utc - datetime.now(UTC)
    if left < timedelta():
        return Rated(name, "fail", f"the certificate {file} has expired", "put a new one in its place and restart")
    rating: Rating = "warn" if left < SOON else "ok"
    return Rated(name, rating, f"the certificate holds for {left.days} days", "renew it" if rating == "warn" else "")


def _without_certificate(name: str, host: str, port: int) -> Rated:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # in 1.3 the client is done before it is refused
    try:
        with socket.create_connection((host, port), timeout=_SECONDS) as plain:
            context.wrap_socket(plain).close()
    except (ssl.SSLError, ConnectionResetError) as refused:
        if isinstance(refused, ssl.SSLError) and "ALERT" not in (refused.reason or ""):
            return Rated(
                name, "fail", f"what listens on port {port} speaks no TLS", "look at what listens on that port"
            )
        return Rated(name, "ok", "who shows no certificate is turned away")
    except OSError:
        return Rated(name, "warn", f"nothing listens on port {port}: not tried", "start the site, then look again")
    return Rated(name, "fail", "a peer without a certificate was let in", "look at what listens on that port")


def _nodes(chosen: Settings) -> Iterator[Rated]:
    plain = [
        each.name
        for each in chosen.nodes
        if not each.tls and not each.url.startswith("https:") and not _here(each.host)
    ]
    if plain:
        do = "set [nodes.tls], where they can speak it"
        yield Rated("other systems", "warn", f"results travel readable to {', '.join(plain)}", do)
    else:
        yield Rated("other systems", "ok", f"{len(chosen.nodes)} nodes by TLS or on this machine")


# ---- Pages and people


def _pages(chosen: Settings) -> Iterator[Rated]:
    said = chosen.web
    if not _here(said.host) and not said.secure:
        do = "listen on 127.0.0.1 behind a proxy that speaks https, and set web.secure = true"
        yield Rated("pages", "fail", f"passwords travel readable to {said.host}:{said.port}", do)
    elif not said.secure:
        do = "behind a proxy that speaks https: set web.secure = true"
        yield Rated("pages", "warn", "cookies may travel without https; right only for this machine alone", do)
    else:
        yield Rated("pages", "ok", "cookies travel by https alone")
    yield _headers(f"http://{_reach(said.host)}:{said.port}/login")


def _headers(address: str) -> Rated:
    try:
        with urllib.request.urlopen(address, timeout=_SECONDS) as answer:
            missing = [name for name in HEADERS if name not in {key.lower() for key in answer.headers}]
    except OSError:
        return Rated("pages", "warn", f"{address} does not answer: not tried", "start the site, then look again")
    if missing:
        return Rated(
            "pages", "fail", f"headers are missing: {', '.join(missing)}", "see whether a proxy takes them out"
        )
    return Rated("pages", "ok", "they come with their protecting headers")


def _people(site: Site) -> Iterator[Rated]:
    accounts = [each for each in People(site.database, site.vault).accounts() if not each.disabled]
    if not accounts:
        yield Rated(
            "people", "warn", "there is no account yet", "make the first one: /first, with the code from the log"
        )
        return
    weak = [each.name for each in accounts if "admin" in each.roles and not each.second_factor]
    if weak:
        yield Rated(
            "people", "warn", f"administrators without a second factor: {', '.join(weak)}", "Account → set one up"
        )
    else:
        yield Rated("people", "ok", f"{len(accounts)} accounts; every administrator has a second factor")
    if not any("auditor" in each.roles for each in accounts):
        yield Rated(
            "people", "warn", "nobody has the role auditor", "let somebody else than an administrator read along"
        )


# ---- The record, and what is kept


def _record(site: Site) -> Iterator[Rated]:
    name, where = "record of acts", site.settings.checkpoints
    verdict = audit.verify(site.database, checkpoints.kept(where))
    if not verdict.sound:
        yield Rated(
            name, "fail", verdict.reason, "the record was altered: keep everything as it is, and ask who did it"
        )
    else:
        yield Rated(name, "ok", f"{verdict.entries} acts, each follows from the one before")
    if where is None:
        yield Rated(name, "warn", "no checkpoints: a cut tail would not show", "set record.checkpoints")
        return
    yield _checkpoints(site, where)


def _checkpoints(site: Site, where: Path) -> Rated:
    name, last = "checkpoints", checkpoints.newest(where)
    if last is None:
        return Rated(name, "fail", f"there is none in {where}", "start a worker, or: busgen-cds audit checkpoint")
    age = datetime.now(UTC) - last
    if age > 2 * timedelta(hours=site.settings.record.checkpoint_hours):
        return Rated(name, "fail", f"the last one is {age.days} days old", "see in the worker's log why")
    if where.stat().st_dev == site.settings.path(site.settings.storage.folder).stat().st_dev:
        do = "let the folder be a mount that this machine cannot rewrite"
        return Rated(name, "warn", "they lie on the disk of the record: who rewrites one rewrites both", do)
    return Rated(name, "ok", f"the last one is {age.total_seconds() / 3600:.0f} hours old, on another disk")


def _repository(site: Site) -> Iterator[Rated]:
    said, name = site.settings.record.syslog, "audit repository"
    if said is None:
        yield Rated(name, "warn", "acts are kept here alone", "set [record.syslog] where the hospital has a repository")
        return
    progress = forwarding.progress(site.database, f"{said.host}:{said.port}")
    if progress.behind < 0:
        found = f"{said.host} was given {-progress.behind} acts more than the record has: its tail was cut"
        yield Rated(name, "fail", found, "keep everything as it is, and compare it with what the repository has")
        return
    rating: Rating = "fail" if progress.behind > LATE else "ok"
    do = "see in the worker's log why, and whether a worker runs" if progress.behind > LATE else ""
    yield Rated(name, rating, f"{said.host} has all but {progress.behind} acts", do)


def _retention(site: Site) -> Iterator[Rated]:
    rules = housekeeping.kept_for(site.settings)
    if rules:
        said = ", ".join(f"{kind} {age.days} days" for kind, age in rules.items())
        yield Rated("retention", "ok", said)
    else:
        yield Rated(
            "retention", "warn", "everything is kept for ever", "set [retention]: say how long each kind is needed"
        )


def _bundle(site: Site) -> Iterator[Rated]:
    live = site.shelf.live()
    yield Rated("bundle", "ok", f"{live.name.name} {live.name.version}: its signature, files and statement hold")


def _here(host: str) -> bool:
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost"


def _reach(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
