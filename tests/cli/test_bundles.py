"""The shelf by command line, and what two sites send each other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner, Result

from busgen_cds import app, bundle, settings
from busgen_cds.app import Site
from busgen_cds.bundle import Candidate
from busgen_cds.cli import bundles
from busgen_cds.cli.console import person
from busgen_cds.errors import Misconfigured, Untrusted
from busgen_cds.operations import exchange
from busgen_cds.result import BundleName, Declined
from busgen_cds.store import site_keys
from tests.store.test_shelf import REPORT, a_candidate
from tests.test_settings import MINIMAL
from tests.vision import readers

PASSPHRASE = "a passphrase for tests"


class House:
    """A site and somebody at its terminal."""

    def __init__(self, folder: Path, name: str) -> None:
        self.file = app.found(folder, MINIMAL.replace('name = "A"', f'name = "{name}"'), PASSPHRASE)
        self.site: Site = app.open_site(settings.read(self.file))

    def says(self, *words: object, passphrase: str = PASSPHRASE) -> Result:
        arguments = [*map(str, words), "-c", str(self.file)]
        return CliRunner().invoke(bundles.app, arguments, env={"BUSGEN_CDS_PASSPHRASE": passphrase})

    def shelves(self, candidate: Candidate) -> str:
        return self.site.shelf.put(candidate, report=REPORT, signer=app.night_signer(self.site.settings)).digest

    def reads_beside(self, digest: str, *, why_not: str = "") -> None:
        """A study that the bundle in shadow read beside the live one; or could not, and why."""
        said = Declined("1.2", "", BundleName("live", "1", "0" * 64), "CPU", 1, 0, (), 0.1, "no image")
        self.site.shadow.keep(digest, uuid4().hex, uuid4().hex, said, why_not or said, 0.1)

    def listed(self) -> dict[str, str]:
        return {each["version"]: each["state"] for each in json.loads(self.says("list", "--json").stdout)}

    def believes(self, other: House) -> None:
        key = site_keys.pem(site_keys.promoter_public(other.file.parent / "keys" / site_keys.PROMOTER))
        (self.file.parent / "keys" / site_keys.TRUSTED / "other.pem").write_text(key)

    def acts(self, kind: str) -> list[str]:
        with self.site.database.reading() as session:
            return list(session.execute(sa.text("SELECT who FROM act WHERE kind = :k"), {"k": kind}).scalars())


@pytest.fixture(scope="module")
def houses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[House, House]]:
    folder = tmp_path_factory.mktemp("houses")
    north, south = House(folder / "north", "North"), House(folder / "south", "South")
    yield north, south
    north.site.close()
    south.site.close()


def refusal(result: Result) -> Any:
    assert result.exception is not None and result.exit_code != 0, result.output
    return result.exception


def test_from_the_shelf_to_live_and_back(houses: tuple[House, House]) -> None:
    """list, shadow, promote, rollback, withdraw: each names a person, and a wrong passphrase changes nothing."""
    north, _ = houses
    shipped = app.open_bundle()
    assert north.listed() == {shipped.name.version: "live"}
    assert shipped.digest in north.says("verify", shipped.digest[:12]).stdout  # though nobody put it onto the shelf
    assert "# " in north.says("show", shipped.digest[:12]).stdout
    digest = north.shelves(a_candidate("2"))
    assert isinstance(refusal(north.says("promote", digest[:10], "--who", "phil")), Misconfigured)
    assert north.says("shadow", digest[:10], "--who", "phil").exit_code == 0
    north.reads_beside(digest, why_not="the network cannot be used")
    assert "has read no study in shadow yet" in str(refusal(north.says("promote", digest[:10], "--who", "phil")))
    assert north.listed()["2"] == "shadow"
    north.reads_beside(digest)
    wrong = refusal(north.says("promote", digest[:10], "--who", "phil", passphrase="no, not this one"))
    assert "does not open" in str(wrong) and north.listed()["2"] == "shadow"
    done = north.says("promote", digest[:10], "--who", "phil")
    assert done.exit_code == 0 and "statement 1" in done.stdout
    assert north.listed() == {"2": "live", shipped.name.version: "retired"}
    assert digest in north.says("verify", "live").stdout
    assert north.says("rollback", "--who", "ada").exit_code == 0
    assert north.listed()["2"] == "retired" and shipped.digest in north.says("verify", "live").stdout
    other = north.shelves(a_candidate("3"))
    assert north.says("withdraw", other, "--who", "phil", "--reason", "too many 4A").exit_code == 0
    assert north.acts("bundle promoted") == [person("phil")] and north.acts("bundle rolled back to") == [person("ada")]


def test_nobody_says_nothing(houses: tuple[House, House], tmp_path: Path) -> None:
    """What changes the shelf, or leaves the site, takes a name: a blank one is refused, and nothing changes."""
    north, _ = houses
    digest = north.shelves(a_candidate("nameless"))
    for words in (("shadow", digest), ("withdraw", digest, "--reason", "no"), ("export", digest, tmp_path / "n")):
        assert "Name the person" in str(refusal(north.says(*words, "--who", "  ")))
    assert north.listed()["nameless"] == "shelved" and not (tmp_path / "n").exists()


def test_what_no_engine_opens_is_not_promoted(houses: tuple[House, House]) -> None:
    """A bundle whose network cannot be used here is refused before anything is said."""
    north, _ = houses
    files = {**readers.files(readers.network(without="spread")), bundle.CARD: b"# broken\n"}
    digest = north.shelves(Candidate(replace(readers.manifest(files), version="broken"), files))
    north.says("shadow", digest, "--who", "phil")
    north.reads_beside(digest)
    before = north.site.shelf.standing()
    assert "cannot use" in str(refusal(north.says("promote", digest, "--who", "phil")))
    assert north.site.shelf.standing() == before
    north.says("shadow", digest, "--end", "--who", "phil")


def test_a_bundle_goes_to_another_site(houses: tuple[House, House], tmp_path: Path) -> None:
    """A bundle sent by one site stands on the other's shelf with the same digest, and no further; both note it."""
    north, south = houses
    digest, parcel = north.shelves(a_candidate("5")), tmp_path / "five.parcel"
    assert north.says("export", digest, parcel, "--who", "phil").exit_code == 0
    assert isinstance(refusal(south.says("import", parcel, "--who", "saskia")), Untrusted)  # nobody said to believe it
    nowhere = refusal(north.says("export", digest, tmp_path / "nowhere" / "five.parcel", "--who", "phil"))
    assert isinstance(nowhere, Misconfigured) and "is no folder" in str(nowhere)
    south.believes(north)
    done = south.says("import", parcel, "--who", "saskia")
    assert done.exit_code == 0 and "from North" in done.stdout
    entry = south.site.shelf.get(digest)
    assert (entry.state, entry.who, entry.report["came"]["from"]) == ("shelved", person("saskia"), "North")
    assert south.site.shelf.open(digest).manifest.version == "5"
    assert south.says("import", parcel, "--who", "saskia").exit_code == 0  # twice is once
    assert north.acts("parcel made") == [person("phil")] and south.acts("bundle shelved") == [person("saskia")]


def test_an_adapter_goes_to_another_site(houses: tuple[House, House], tmp_path: Path) -> None:
    """Adapters and synthetic sets travel in the same parcels, and lie whole in the folder of what was received."""
    north, south = houses
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter.safetensors").write_bytes(bytes(1000))
    assert isinstance(
        refusal(north.says("export", tmp_path / "adapter", tmp_path / "a", "--who", "phil")), Misconfigured
    )
    sent = north.says("export", tmp_path / "adapter", tmp_path / "a", "--who", "phil", "--kind", "adapter")
    assert sent.exit_code == 0, sent.output
    south.believes(north)
    said, where = exchange.receive(south.site, tmp_path / "a", person="saskia")
    assert (Path(where) / "adapter.safetensors").read_bytes() == bytes(1000) and said.what == "adapter"
    assert exchange.receive(south.site, tmp_path / "a", person="saskia")[1] == where


def test_an_altered_parcel(houses: tuple[House, House], tmp_path: Path) -> None:
    """A parcel that was altered on its way is refused, and nothing of it is kept."""
    north, south = houses
    south.believes(north)
    digest, parcel = north.shelves(a_candidate("6")), tmp_path / "six.parcel"
    assert north.says("export", digest, parcel, "--who", "phil").exit_code == 0
    data = bytearray(parcel.read_bytes())
    data[data.find(b"# Reader 6")] ^= 1
    parcel.write_bytes(data)
    assert isinstance(refusal(south.says("import", parcel, "--who", "saskia")), Untrusted)
    assert south.site.shelf.find(digest) is None
    assert not [path for path in south.site.shelf.folder.rglob("*") if digest in path.name]


def test_the_sites_public_key(houses: tuple[House, House]) -> None:
    """`bundle keys` prints what another site needs to believe this one, and never a private key."""
    shown = houses[0].says("keys").stdout
    assert shown.startswith("-----BEGIN PUBLIC KEY-----") and "PRIVATE" not in shown


def test_a_lost_promoter_key(tmp_path: Path) -> None:
    """With another promoter's key, a person keeps live what was live: the passphrase that was lost opens nothing."""
    house = House(tmp_path / "site", "West")
    digest = house.shelves(a_candidate("2"))
    house.says("shadow", digest, "--who", "phil")
    house.reads_beside(digest)
    assert house.says("promote", digest, "--who", "phil").exit_code == 0
    (tmp_path / "site/keys/promoter.key").rename(tmp_path / "promoter.lost")
    made = house.says("keys", "--make")
    new = made.stderr.partition("this once: ")[2].split()[0]
    house.site.close()
    house.site = app.open_site(settings.read(house.file))
    assert isinstance(refusal(house.says("verify", "live")), Untrusted)
    assert "does not open" in str(refusal(house.says("promote", digest, "--who", "phil")))
    again = house.says("promote", digest, "--who", "phil", passphrase=new)
    assert again.exit_code == 0 and "statement 2" in again.stdout
    assert digest in house.says("verify", "live").stdout and len(house.acts("signing keys made")) == 1
    house.site.close()
