"""What is shipped, and what its card says."""

import json
from pathlib import Path

import pytest

from busgen_cds.errors import Misconfigured
from busgen_cds.learning import release
from busgen_cds.learning.generator import Generator
from busgen_cds.learning.recipes import ship
from tests.learning.generators import tiny


def test_an_unfinished_generator_is_not_shipped(tmp_path: Path) -> None:
    """Without its release filter a generator does not go into the package."""
    tiny().save(tmp_path / "run")
    with pytest.raises(Misconfigured, match=release.FILE):
        ship.ship(tmp_path / "run", tmp_path, tmp_path / "out")


def test_a_card_tells_nothing_of_another_generator(tmp_path: Path) -> None:
    """Figures that were found of other weights are not this generator's, and its card does not say them."""
    tiny().save(tmp_path / "run")
    (tmp_path / "run" / release.FILE).write_bytes(b"0")
    said = {}
    for name, digest in (("other", "ab" * 32), ("own", Generator.load(tmp_path / "run", device="cpu").digest)):
        arms = {name: {"ensemble": {"value": value}} for name, value in (("real", 0.9), ("generated only", 0.7))}
        found = {"generator": digest, "left": 0, "table": {"BUS-BRA test": arms}}
        (tmp_path / "generator-value.json").write_text(json.dumps(found))
        ship.ship(tmp_path / "run", tmp_path, tmp_path / name)
        said[name] = (tmp_path / name / ship.MODEL_CARD).read_text()
    assert "Worth to a reader: **not measured**" in said["other"]
    assert "taught by generated images alone, and by real ones: 0.700 and 0.900 on BUS-BRA test." in said["own"]


def test_a_shipped_generator_answers_and_its_card_is_honest(tmp_path: Path) -> None:
    """The shipped folder loads; a card without figures says that nothing was measured; too much weight is refused."""
    tiny().save(tmp_path / "run")
    (tmp_path / "run" / release.FILE).write_bytes(b"0")
    ship.ship(tmp_path / "run", tmp_path, tmp_path / "out")
    assert Generator.load(tmp_path / "out", device="cpu").card.size == 64
    words = (tmp_path / "out" / ship.MODEL_CARD).read_text()
    assert words.count("**not measured**") == 3
    (tmp_path / "run" / release.FILE).write_bytes(bytes(ship.LIMIT))
    with pytest.raises(Misconfigured, match="MB"):
        ship.ship(tmp_path / "run", tmp_path, tmp_path / "out")
