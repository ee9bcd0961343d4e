"""Attacks on the generator, and whether they would notice."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from busgen_cds.errors import Misconfigured
from busgen_cds.learning import data, embed, figures, privacy
from busgen_cds.learning.figures import Interval
from busgen_cds.learning.privacy import Seen, Suspect
from busgen_cds.learning.recipes import audit, synthesise
from tests.learning.generators import SIZE, data_folder, tiny

TWO = synthesise.Sampling(steps=2)


def noise(count: int, seed: int) -> embed.Squares:
    """Smooth random images, each unlike all others."""
    coarse = np.random.default_rng(seed).integers(0, 255, (count, 8, 8)).astype(np.uint8)
    return np.kron(coarse, np.ones((SIZE // 8, SIZE // 8), np.uint8))


def suspect(generated: embed.Squares) -> Suspect:
    names = [np.array([f"{who}{i}" for i in range(60)]) for who in "ms"]
    return Suspect("tiny", tiny(), Seen(noise(60, 0), names[0]), Seen(noise(60, 1), names[1]), generated)


def leaking(share: float) -> Suspect:
    """A generator whose images are training images, mirrored, to a known share."""
    fresh = noise(100, 2)
    count = round(share * 100)
    fresh[:count] = embed.mirrored(noise(60, 0))[np.arange(count) % 60]
    return suspect(fresh)


def test_no_set_of_images_is_embedded_twice() -> None:
    """An audit asks an embedding once for each set of images, and finds what it would find without that."""
    asked: list[bytes] = []

    def counting(images: embed.Squares) -> embed.Vectors:
        asked.append(images.tobytes())
        return embed.raw(images)

    found = privacy.audit(leaking(0.1), None, {"pixels": counting}, 100, 0, {}, {"copies": privacy.copies})
    assert len(asked) == len(set(asked))
    assert [f.value for f in found.findings] == [
        f.value for f in privacy.copies(leaking(0.1), None, {"pixels": embed.raw})
    ]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_a_known_share_of_copies_gives_a_known_figure(share: float) -> None:
    """The copy rate finds the share of copies that was planted, though they are mirrored, and its interval holds it."""
    some = leaking(share)
    rate = privacy.copy_rate(some, embed.raw, privacy.copy_threshold(some, embed.raw))
    assert abs(rate.value - share) <= 0.03 and rate.low <= share <= rate.high


def test_copies_are_found_both_ways() -> None:
    """A training image that was copied is counted too."""
    leaks, holds = (privacy.copied(leaking(n), leaking(0.5), "pixels", embed.raw, True) for n in (0.3, 0.0))
    assert leaks.value.value == pytest.approx(0.5, abs=0.05) and leaks.verdict == "fails"
    assert holds.value.value <= 0.02 and holds.verdict == "passes"


def test_what_happens_to_strangers_too_is_no_copying() -> None:
    """Generated images that come as near to patients never seen as to training images have copied nobody."""
    both = leaking(0.3)
    both.generated[30:60] = embed.mirrored(noise(60, 1))[:30]  # half of the strangers are met as well
    assert privacy.copied(both, leaking(0.5), "pixels", embed.raw, True).verdict != "fails"


def test_a_share_that_chance_explains_passes_where_it_is_surely_no_leak() -> None:
    """Of a few images three are near by chance: that passes only where the control's share lies far above."""
    chance, leak = Interval(0.08, -0.04, 0.2), Interval(0.08, 0.03, 0.2)
    assert privacy._copied_verdict(chance, Interval(0.8, 0.6, 0.9)) == "passes"
    assert privacy._copied_verdict(chance, Interval(0.3, 0.15, 0.5)) == "concludes nothing"
    assert privacy._copied_verdict(leak, Interval(0.8, 0.6, 0.9)) == "fails"
    assert privacy._copied_verdict(leak, Interval(0.0, -0.1, 0.1)) == "concludes nothing"


def test_a_control_of_few_members_is_held_to_the_suspect_s_measure() -> None:
    """To few members every image is far, and a control with a limit of its own would be caught too easily."""
    few = dataclasses.replace(suspect(noise(40, 3)), members=Seen(noise(3, 4), np.array(list("abc"))))
    held = leaking(0.0)
    limit = np.percentile(privacy.distances(held.strangers.drawn, held.generated, embed.raw), privacy.COPY_PERCENTILE)
    near = int((privacy.distances(few.members.drawn, few.generated, embed.raw) < limit).sum())
    found = privacy.copies(held, few, {"pixels": embed.raw})[1]
    assert found.control == figures.difference((near, 3), (1, 60))


def test_a_cropped_copy_is_a_copy() -> None:
    """A copy that was cropped is found."""
    cropped = suspect(embed.closer(noise(60, 0)))
    assert privacy.copy_rate(cropped, embed.raw, privacy.copy_threshold(cropped, embed.raw)).value > 0.9


def test_an_attack_that_misses_an_over_trained_generator_concludes_nothing() -> None:
    """Only an attack that finds what the control has learnt by heart says how many training images were copied."""
    verdict = lambda control: privacy.copies(leaking(0.0), control, {"pixels": embed.raw})[1].verdict  # noqa: E731
    assert verdict(leaking(0.5)) == "passes"
    assert verdict(leaking(0.0)) == verdict(None) == "concludes nothing"


REAL = Path(os.environ.get("BUSGEN_DATA", "nowhere"))
WEIGHTS = REAL / "weights/derived_mobilenet_v2_1.0_224_dequant_fp32.npz"


@pytest.mark.skipif(not WEIGHTS.is_file(), reason="BUSGEN_DATA with ImageNet weights is not set: no breast to copy")
def test_the_imagenet_attack_finds_planted_copies() -> None:
    """Mirrored, brightened and noisy copies of breast images are found; mean features lost half."""
    rows = data.read_manifest(REAL)
    sides = (data.load(REAL, [r for r in rows if r.split == split][:24], None, 128) for split in ("train", "val"))
    known, unknown = (Seen(side.image, side.patients) for side in sides)
    few = Suspect("copies", tiny(), known, unknown, known.drawn[:0])
    eye = embed.remembered(embed.imagenet_layout(WEIGHTS))
    assert privacy.planted_rate(few, eye, privacy.copy_threshold(few, eye), 20).value >= privacy.FOUND


def test_a_blind_attack_concludes_nothing() -> None:
    """An embedding that sees nothing does not find planted copies, and its verdict says so."""
    blind = lambda images: np.random.default_rng(0).normal(size=(len(images), 8)).astype(np.float32)  # noqa: E731
    findings = privacy.copies(leaking(0.5), None, {"blind": blind, "pixels": embed.raw})
    verdicts = {finding.attack: finding.verdict for finding in findings}
    assert verdicts["copies (blind)"] == "concludes nothing" and verdicts["copies (pixels)"] == "fails"


def test_few_images_conclude_nothing() -> None:
    """No copy among four images is no evidence that there are none."""
    assert privacy.copies(suspect(noise(4, 2)), None, {"pixels": embed.raw})[0].verdict == "concludes nothing"


def test_membership_without_a_control_concludes_nothing(tmp_path: Path) -> None:
    """An AUC near a half proves nothing where no over-trained generator was caught by the same attack."""
    found = membership(tmp_path)
    assert {finding.verdict for finding in privacy.membership(found, None, {})} == {"concludes nothing"}


def test_a_few_patients_conclude_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An AUC that may be that of a leak passes for none, whatever its point value is."""
    measured = {
        "few": Interval(0.52, 0.30, 0.78),
        "enough": Interval(0.52, 0.40, 0.64),
        "leak": Interval(0.7, 0.5, 0.9),
    }
    sure = Interval(1.0, 1.0, 1.0)
    monkeypatch.setattr(
        privacy, "_membership", lambda who: (sure, sure) if who == "control" else (measured[who], Interval(0, 0, 0))
    )
    told = {name: privacy.membership(name, "control", {})[0].verdict for name in measured}  # type: ignore[arg-type]
    assert told == {"few": "concludes nothing", "enough": "passes", "leak": "fails"}


def test_nobody_whom_the_generator_learnt_from_is_a_stranger(tmp_path: Path) -> None:
    """Shots of the generator's own training split are compared with held-out patients, not with their neighbours."""
    rows = data.read_manifest(data_folder(tmp_path / "data", patients=24))
    train = [row for row in rows if row.split == "train"]
    assert {row.split for row in audit.others(rows, train[:4], ("painted",))} == {"val"}
    beside = audit.others(rows, train[:4], ("elsewhere",))  # a generator that never saw this source
    assert {row.split for row in beside} == {"train"} and len(beside) == len(train) - 4


def test_data_that_lack_a_part_of_what_was_learnt_are_refused(tmp_path: Path) -> None:
    """A filter or a report from half of the training images would call copies of the other half clean."""
    root, makes = data_folder(tmp_path / "data", patients=24), tiny()
    makes.card = dataclasses.replace(makes.card, trained_on=("painted", "busi"))
    with pytest.raises(Misconfigured, match=r"no training image of busi.*Name the data"):
        audit.build_filter(makes, root)


def membership(folder: Path) -> Suspect:
    makes = tiny()
    root = data_folder(folder / "data", patients=36)
    rows = data.read_manifest(root)
    known, unknown = (
        audit.seen(makes, root, [r for r in rows if r.split == split], None) for split in ("train", "val")
    )
    return Suspect("tiny", makes, known, unknown, known.drawn)


def test_what_a_poor_decoder_draws_of_a_training_image_is_its_copy(tmp_path: Path) -> None:
    """A perfect memory is found though the decoder's trace moves its images further than strangers lie apart."""
    root, makes = data_folder(tmp_path / "data", patients=24), tiny()
    makes.card = dataclasses.replace(makes.card, trained_on=("painted",))
    synthesise.generate(makes, tmp_path / "made", synthesise.Settings(count=16, filtered=False, sampling=TWO), None)
    train = data.load(root, [row for row in data.read_manifest(root) if row.split == "train"], None, SIZE)
    for path, image in zip(sorted(tmp_path.glob("made/*/images/*.png")), makes.redrawn(train.image), strict=True):
        Image.fromarray(image).save(path)
    how = audit.Settings(control_steps=0)
    copies, *_ = audit.audit(makes, "tiny", root, tmp_path / "made", {"pixels": embed.raw}, how).findings
    assert copies.attack == "copies (pixels)" and copies.value.value == 1


def test_a_class_that_is_easy_to_draw_is_not_taken_for_membership() -> None:
    """Shots are half malignant and their strangers a third: within a class members score as strangers do."""

    malignant = np.r_[np.ones(200), np.zeros(200), np.ones(300), np.zeros(600)] > 0
    stranger = np.arange(1300) >= 400
    scores = np.random.default_rng(0).normal(size=1300) + 5 * malignant
    names = ["malignant" if one else "benign" for one in malignant]
    examples: Any = [SimpleNamespace(labels={"pathology": name, "device": str(i)}) for i, name in enumerate(names)]
    before = figures.auc(scores, (~stranger).astype(int))
    after = figures.auc(privacy.within_class(scores, examples, stranger), (~stranger).astype(int))
    assert before > 0.55 and abs(after - 0.5) < 0.05
    known = privacy.within_class(scores + 3 * ~stranger, examples, stranger)
    assert figures.auc(known, (~stranger).astype(int)) > 0.95, "what was learnt by heart is still found"


def test_a_class_that_no_stranger_shows_is_compared_with_all_of_them() -> None:
    """A rare label's members are scored all the same."""
    examples: Any = [SimpleNamespace(labels={"pathology": name}) for name in ("rare", "benign", "benign")]
    counted = privacy.within_class(np.array([4.0, 1.0, 3.0]), examples, np.array([False, True, True]))
    assert counted.tolist() == [2, -1, 1]


@pytest.mark.slow
def test_the_attack_catches_an_over_trained_generator(tmp_path: Path) -> None:
    """The positive control is caught: an over-trained generator's members are told from strangers."""
    found = membership(tmp_path)
    settings = audit.Settings(control_members=6, control_steps=60, control_rate=3e-3, control_images=4, batch=12)
    control = audit.overtrained(found, settings)
    area, _ = privacy._membership(control)
    before, _ = privacy._membership(found)
    assert area.value > 0.75 and area.value > before.value
    assert len(control.generated) == 4 and "alone" in control.name
    assert found.makes.network is not control.makes.network


def test_a_report_holds_only_when_every_attack_concluded() -> None:
    """One attack that concluded nothing, or none at all, and the report does not hold; NaN becomes "not measured"."""
    good = privacy.copies(leaking(0.0), None, {"pixels": embed.raw})[0]
    mute = dataclasses.replace(good, verdict="concludes nothing", control=privacy._nothing())
    base = privacy.PrivacyReport("tiny", 60, 60, 100, 110, 10, (good,), "none", "a digest", {})
    assert base.holds
    assert not dataclasses.replace(base, findings=(good, mute)).holds
    assert not dataclasses.replace(base, findings=()).holds
    told = json.loads(dataclasses.replace(base, findings=(mute,)).to_json())
    assert told["findings"][0]["control"]["value"] is None and told["drop_rate"] == pytest.approx(10 / 110)
    assert "not measured" in dataclasses.replace(base, findings=(mute,)).to_markdown()


def test_an_audit_reads_what_was_generated(tmp_path: Path) -> None:
    """From a data folder and generated shards to a report: members and strangers share no patient."""
    root = data_folder(tmp_path / "data", patients=24)
    card = dataclasses.replace(tiny().card, trained_on=("painted",))
    makes = tiny()
    makes.card = card
    how = synthesise.Settings(count=4, filtered=False, sampling=TWO)
    synthesise.generate(makes, tmp_path / "made", how, None)
    settings = audit.Settings(control_steps=0)
    report = audit.audit(makes, "tiny", root, tmp_path / "made", {"pixels": embed.raw}, settings)
    assert (report.members, report.strangers, report.generated, report.made) == (16, 8, 4, 4)
    assert json.loads(report.to_json())["generator"] == synthesise.maker(tmp_path / "made")
    gate = audit.build_filter(makes, root)
    assert gate.points.shape[0] == 2 * (10 * 4 + 6 * 12) and gate.threshold > 0  # every view, both ways
