"""The site's signing keys."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from busgen_cds.errors import Misconfigured
from busgen_cds.store import site_keys

PASSPHRASE = "a passphrase for tests"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    site_keys.make(tmp_path / "keys", PASSPHRASE)
    return tmp_path / "keys"


def test_made_once(keys: Path) -> None:
    """A site's keys are two, readable by their owner alone, and never overwritten."""
    night, promoter = keys / site_keys.NIGHT, keys / site_keys.PROMOTER
    assert {stat.S_IMODE(file.stat().st_mode) for file in (night, promoter)} == {0o600}
    assert site_keys.night(night).key_id != site_keys.promoter(promoter, PASSPHRASE).key_id
    with pytest.raises(Misconfigured, match="already: a site keeps its keys"):
        site_keys.make(keys, PASSPHRASE)


def test_a_lost_promoter_key_is_made_anew(keys: Path) -> None:
    """Where the promoter's key was taken away, another is made, and the night's key stays what it was."""
    night = site_keys.night(keys / site_keys.NIGHT).key_id
    lost = site_keys.promoter(keys / site_keys.PROMOTER, PASSPHRASE).key_id
    (keys / site_keys.PROMOTER).rename(keys / "promoter.lost")
    site_keys.make(keys, "another one, just as long")
    assert site_keys.night(keys / site_keys.NIGHT).key_id == night
    assert site_keys.promoter(keys / site_keys.PROMOTER, "another one, just as long").key_id != lost


def test_the_passphrase(keys: Path) -> None:
    """The promoter's key opens with its passphrase alone, which can be changed and is never short."""
    file = keys / site_keys.PROMOTER
    name = site_keys.promoter(file, PASSPHRASE).key_id
    with pytest.raises(site_keys.WrongPassphrase):
        site_keys.promoter(file, PASSPHRASE + "!")
    with pytest.raises(Misconfigured, match="16 characters"):
        site_keys.change_passphrase(file, PASSPHRASE, "short")
    site_keys.change_passphrase(file, PASSPHRASE, "another one, just as long")
    assert site_keys.promoter(file, "another one, just as long").key_id == name
    with pytest.raises(site_keys.WrongPassphrase):
        site_keys.promoter(file, PASSPHRASE)
    assert len(site_keys.new_passphrase()) == 29


def test_the_public_half_is_bound(keys: Path) -> None:
    """Another public half in the promoter's file does not open: nobody is made to trust a stranger by it."""
    file = keys / site_keys.PROMOTER
    stranger = Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex()
    file.write_text(json.dumps({**json.loads(file.read_text()), "public": stranger}))
    with pytest.raises(site_keys.WrongPassphrase):
        site_keys.promoter(file, PASSPHRASE)


def test_what_is_no_key(tmp_path: Path) -> None:
    """A missing or foreign file says what to do."""
    for read in (site_keys.night, lambda file: site_keys.promoter(file, PASSPHRASE)):
        with pytest.raises(Misconfigured, match="bundle keys"):
            read(tmp_path / "none.key")
        (tmp_path / "a.key").write_text("[]")
        with pytest.raises(Misconfigured, match="not a"):
            read(tmp_path / "a.key")


def test_other_sites(keys: Path) -> None:
    """Other sites are believed by their public keys in a folder."""
    other = Ed25519PrivateKey.generate().public_key()
    (keys / site_keys.TRUSTED / "north-clinic.pem").write_text(site_keys.pem(other))
    assert site_keys.trusted(keys / site_keys.TRUSTED) == {"north-clinic": other}
    assert site_keys.trusted(keys / "nowhere") == {}
    (keys / site_keys.TRUSTED / "a-letter.pem").write_text("Dear colleagues")
    with pytest.raises(Misconfigured, match=r"a-letter\.pem holds no public key"):
        site_keys.trusted(keys / site_keys.TRUSTED)
