"""`check --security`: what is wrong with a site is named, with what to do."""

from __future__ import annotations

import socket
import sqlite3
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa

from busgen_cds import app, settings
from busgen_cds.operations import safety
from busgen_cds.operations.safety import Rated
from busgen_cds.store import audit, forwarding, site_keys, vault
from busgen_cds.store.people import People
from tests.certificates import Authority

SETTINGS = """
[site]
name = "Example"
prevalence = 0.1
[listener]
port = 1
allow = [{ ae_title = "US1", addresses = ["10.0.0.1"] }]
[web]
port = 1
secure = true
[retention]
declined_days = 90
[record]
checkpoints = "points"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return app.found(tmp_path / "site", SETTINGS, site_keys.new_passphrase())


def changed(file: Path, *replaced: tuple[str, str]) -> None:
    text = file.read_text()
    for old, new in replaced:
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)


def rated(file: Path, control: str, rating: str = "") -> list[Rated]:
    found = [each for each in safety.everything(file) if each.control == control]
    assert found and all(each.do for each in found if each.rating != "ok"), "each that is not ok says what to do"
    return [each for each in found if each.rating == rating] if rating else found


def test_a_site_as_it_is_made(file: Path) -> None:
    """A site as `init` makes it fails nothing but the checkpoint that no worker wrote yet."""
    found = safety.everything(file)
    assert [each.control for each in found if each.rating == "fail"] == ["checkpoints"]
    assert {each.control for each in found} >= {
        "files", "site key", "who may send", "plain DICOM", "DICOM port", "DICOM over TLS", "other systems", "pages",
        "people", "record of acts", "audit repository", "retention", "bundle", "account of the service",
    }  # fmt: skip


def test_open_files_and_keys(file: Path) -> None:
    """Keys that others may read, a key beside its data and an older key still in use are named."""
    key = file.parent / "keys" / "site.key"
    assert "the disk that it protects" in rated(file, "site key", "warn")[0].found
    vault.KeyFile(str(key)).put_first(vault.new_key())
    assert any("keys retire" in each.do for each in rated(file, "site key", "warn"))
    (file.parent / "keys" / site_keys.NIGHT).chmod(0o644)
    assert "chmod" in rated(file, "files", "fail")[0].do
    key.chmod(0o644)
    assert [(each.control, each.rating) for each in safety.everything(file)] == [("site", "fail")]


def test_secrets_elsewhere(file: Path, tmp_path: Path) -> None:
    """A key that settings name outside of the site's folder, and settings with a password, are looked at too."""
    assert file.parent.stat().st_mode & 0o077 == 0, "a new site's folder is its owner's"
    certificate, key, _ = Authority(tmp_path / "ca").issues("us")
    key.chmod(0o644)
    node = f'[[nodes]]\nname = "pacs"\nae_title = "P"\nhost = "h"\n[nodes.tls]\nauthority = "{certificate}"\n'
    changed(file, ("[web]", f'{node}certificate = "{certificate}"\nkey = "{key}"\n[web]'))
    (said,) = rated(file, "files", "fail")
    assert str(key) in said.found and str(file) not in said.found
    key.chmod(0o600)
    assert rated(file, "files", "ok")
    password = "p4ssw0rd"
    workflows = f'workflows = "postgresql+psycopg://busgen:{password}@db.example/workflows"'
    chosen = settings.parse(f"{file.read_text()}\n[storage]\n{workflows}\n", file)
    file.chmod(0o644)
    (said,) = safety._files(chosen, file)
    assert said.rating == "fail" and str(file) in said.found and password not in said.found


def test_something_else_on_the_port_for_tls(tmp_path: Path) -> None:
    """A port on which no TLS is spoken is not taken for one that turns strangers away."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=lambda: listening.accept()[0].sendall(b"220 welcome\r\n"), daemon=True).start()
        said = safety._without_certificate("DICOM over TLS", "127.0.0.1", listening.getsockname()[1])
    assert said.rating == "fail" and "speaks no TLS" in said.found


def test_open_doors(file: Path) -> None:
    """Senders from anywhere, plain DICOM from a network, readable passwords and readable results are named."""
    changed(
        file,
        (', addresses = ["10.0.0.1"]', ""),
        ("port = 1\nallow", 'port = 1\nplain_from = ["10.0.0.0/8"]\ncheck_called_ae = false\nallow'),
        ("[web]\nport = 1\nsecure = true", '[web]\nport = 1\nhost = "0.0.0.0"'),
        ("[retention]", '[[nodes]]\nname = "pacs"\nae_title = "P"\nhost = "10.0.0.9"\n[retention]'),
    )
    assert len(rated(file, "who may send", "warn")) == 2
    assert "10.0.0.0/8" in rated(file, "plain DICOM", "warn")[0].found
    assert rated(file, "DICOM over TLS", "warn") and rated(file, "other systems", "warn")
    assert "passwords travel readable" in rated(file, "pages", "fail")[0].found


def test_certificates(file: Path, tmp_path: Path) -> None:
    """A certificate that ends soon, and a title that no certificate speaks for, are named."""
    certificate, key, _ = Authority(tmp_path / "ca").issues("listener")
    key.chmod(0o600)
    tls = f'[listener.tls]\nport = 1\ncertificate = "{certificate}"\nkey = "{key}"\nauthority = "{certificate}"\n'
    changed(file, ("[web]", tls + "[web]"))
    found = rated(file, "DICOM over TLS", "warn")
    assert any("holds for 0 days" in each.found for each in found) and any("US1" in each.found for each in found)


def test_people(file: Path) -> None:
    """Administrators without a second factor, and a site without an auditor, are named."""
    assert "no account" in rated(file, "people")[0].found
    with app.opened_site(settings.read(file)) as site:
        People(site.database, site.vault).add("ann.smith", "correct horse battery", ["admin"], "system")
    found = rated(file, "people", "warn")
    assert "ann.smith" in found[0].found and "auditor" in found[1].found


def test_the_record(file: Path) -> None:
    """An altered record fails; so does one whose checkpoint names what is gone."""
    from busgen_cds.store import checkpoints

    with app.opened_site(settings.read(file)) as site:
        People(site.database, site.vault).add("ann.smith", "correct horse battery", ["auditor"], "system")
        key = checkpoints.signer(file.parent / "keys" / "record.key")
        checkpoints.export(site.database, file.parent / "points", key)
    assert not rated(file, "record of acts", "fail")
    assert "on the disk of the record" in rated(file, "checkpoints", "warn")[0].found
    with sqlite3.connect(file.parent / "data" / "busgen-cds.sqlite") as connection:
        connection.execute("DELETE FROM act")
    assert "checkpoint names entry" in rated(file, "record of acts", "fail")[0].found


def test_a_repository_that_knows_more_than_the_record(file: Path) -> None:
    """A record that is shorter than what the audit repository was given was cut, and is said to be."""
    changed(file, ("[record]", '[record.syslog]\nhost = "logs.example"\nauthority = "ca.pem"\n[record]'))
    site = app.open_site(settings.read(file))
    with site.database.transaction() as session:
        audit.record(session, *(audit.Act("log-in", f"p{n}") for n in range(9)))
    forwarding.forward(site.database, "logs.example:6514", lambda _batch: None, lambda: datetime.now(UTC))
    assert not rated(file, "audit repository", "fail")
    with site.database.transaction() as session:
        session.execute(sa.text("DELETE FROM act WHERE number > 4"))
    site.close()
    (said,) = rated(file, "audit repository", "fail")
    assert "its tail was cut" in said.found
