"""The locked release set: signed, small, and the one that the package holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from busgen_cds import app, parcel, settings, signing
from busgen_cds.cli.site import settings_text
from busgen_cds.errors import Untrusted
from busgen_cds.learning import data
from busgen_cds.learning.recipes import adapt_site, release_set
from busgen_cds.operations import learning_loop
from tests.learning import toys

SIGNER = signing.KeySigner(Ed25519PrivateKey.from_private_bytes(bytes([9]) * 32))
TRUST = signing.Verifier.of((SIGNER.key.public_key(), frozenset({parcel.KIND})))
TERMS = release_set.Terms("1", "2026-01-01", "ab" * 32)


@pytest.fixture
def generated(tmp_path: Path) -> Path:
    rows = [r | {"source": "synthetic", "split": "train"} for r in toys.records(18) if r["pathology"] != "normal"]
    folder = toys.write(tmp_path / "generated", rows)
    (folder / "generated.json").write_text(json.dumps({"made": 13, "released": 12, "dropped": 1}))
    return folder


def test_a_set_is_packed_signed_and_described(generated: Path, tmp_path: Path) -> None:
    """The set holds what was generated, to the byte; its card counts, and says that nobody audited the generator."""
    said = release_set.make(generated, tmp_path / "out", TERMS, SIGNER)
    assert (said.what, said.version) == ("synthetic set", "1")
    parcel.unpack(tmp_path / "out" / release_set.FILE, tmp_path / "got", TRUST)
    rows, before = data.read_manifest(tmp_path / "got"), data.read_manifest(generated)
    assert [(r.pathology, (tmp_path / "got" / r.image).read_bytes()) for r in rows] == [
        (r.pathology, (generated / r.image).read_bytes()) for r in before
    ]
    card = (tmp_path / "out/card.md").read_text()
    assert "12 generated" in card and "13 were made, 1 dropped" in card and "not carried out" in card
    assert signing.digest((tmp_path / "out" / release_set.FILE).read_bytes()) in card
    assert {path.name for path in (tmp_path / "out").iterdir()} == {release_set.FILE, "card.md"}


def test_an_altered_set_judges_nobody(generated: Path, tmp_path: Path) -> None:
    """What was unpacked and then changed is made anew; a set that nobody signed is refused."""
    release_set.make(generated, tmp_path / "out", TERMS, SIGNER)
    file, folder = tmp_path / "out" / release_set.FILE, tmp_path / "got"
    parcel.unpacked(file, folder, TRUST)
    whole, changed = (folder / "0000.png").read_bytes(), (folder / "0001.png").stat().st_mtime_ns
    parcel.unpacked(file, folder, TRUST)
    assert (folder / "0001.png").stat().st_mtime_ns == changed  # it was just what was signed: left alone
    (folder / "0000.png").write_bytes(whole[:-1])
    (folder / "more.png").write_bytes(b"x")
    parcel.unpacked(file, folder, TRUST)
    assert (folder / "0000.png").read_bytes() == whole and not (folder / "more.png").exists()
    with pytest.raises(Untrusted):
        parcel.unpacked(file, folder, app.release_verifier())


def test_the_package_holds_a_set_that_can_judge(tmp_path: Path) -> None:
    """Without any data of its own, a site has a locked release set: signed, at most 5 MB, both answers, named."""
    config = app.found(tmp_path / "s", settings_text("Here", 0.1, ["ANY"], "", 0), "a passphrase of some length")
    with app.opened_site(settings.read(config)) as site:
        folder, named = learning_loop.release_set(site)
    shipped = Path(app.__file__).parent / "release_set"
    file = shipped / learning_loop.RELEASE_SET
    digest = signing.digest(file.read_bytes())
    assert file.name == release_set.FILE and file.stat().st_size <= release_set.MOST_BYTES
    assert digest[:16] in named and digest in (shipped / "card.md").read_text()
    rows = data.read_manifest(folder)
    assert {row.source for row in rows} == {data.GENERATED} and all(row.mask for row in rows)
    for judging in (True, False):
        mine = [row.malignant for row in rows if adapt_site.judges(row) == judging]
        assert min(sum(mine), len(mine) - sum(mine)) >= 30
