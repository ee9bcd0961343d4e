"""What is said of a study, on a reader whose answers can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from busgen_cds import birads, pixels
from busgen_cds.birads import Pooling, at_prevalence, sigmoid
from busgen_cds.errors import Misconfigured
from busgen_cds.result import Answer, Assessed, Declined, Result
from busgen_cds.study import Frame, NotAnalysed, Source
from busgen_cds.vision import assess, engine
from busgen_cds.vision.engine import Engine
from tests.vision import readers
from tests.vision.readers import EVEN, REGION, frame, lesion, study

Opener = Callable[..., Engine]


@pytest.fixture
def opener(tmp_path: Path) -> Iterator[Opener]:
    opened: list[Engine] = []

    def open_engine(**manifest: Any) -> Engine:
        opened.append(engine.open(readers.bundle(tmp_path / f"bundle-{len(opened)}", **manifest), "cpu"))
        return opened[-1]

    yield open_engine
    for one in opened:
        one.close()


@pytest.fixture
def reader(opener: Opener) -> Engine:
    return opener()


def say(reader: Engine, *frames: Frame, prevalence: float = 0.3, **more: Any) -> Result:
    return assess.assess(study(*frames), reader, prevalence=prevalence, **more)


def assessed(reader: Engine, *frames: Frame, prevalence: float = 0.3) -> Assessed:
    result = say(reader, *frames, prevalence=prevalence)
    assert isinstance(result, Assessed), result
    return result


def clip(*greys: int | None, instance: str = "1.2.3") -> list[Frame]:
    """A clip whose frames show a lesion of a grey each, or none."""
    return [
        frame(*([] if grey is None else [lesion(grey)]), number=i, count=len(greys), instance=instance)
        for i, grey in enumerate(greys, 1)
    ]


def log_odds(grey: float) -> float:
    return 40 * (grey / 255 - 0.68)


def test_a_lesion_is_found_where_it_is(reader: Engine) -> None:
    """A finding's contour, axes, area and orientation are those of the lesion, in the full frame and in mm."""
    result = assessed(reader, frame(lesion(x=400, y=200, rx=60, ry=40)))
    (found,) = result.findings
    points = np.asarray(found.contour)
    np.testing.assert_allclose(points.min(0), [340, 160], atol=2)
    np.testing.assert_allclose(points.max(0), [460, 240], atol=3)
    assert found.contour[0] == found.contour[-1]
    assert found.long_axis_mm == pytest.approx(12, abs=0.25)
    assert found.short_axis_mm == pytest.approx(8, abs=0.25)
    assert found.area_mm2 == pytest.approx(np.pi * 6 * 4, rel=0.04)
    assert found.orientation == "parallel"


def test_a_tall_lesion_is_not_parallel(reader: Engine) -> None:
    """A lesion taller than wide is not parallel to the skin."""
    (found,) = assessed(reader, frame(lesion(rx=30, ry=60))).findings
    assert found.orientation == "not parallel"


def test_pixels_need_not_be_square(reader: Engine) -> None:
    """Axes and orientation use each direction's own spacing."""
    tall = replace(frame(lesion(rx=60, ry=40)), spacing=readers.Spacing(row=0.2, column=0.1))
    (found,) = assessed(reader, tall).findings
    assert found.long_axis_mm == pytest.approx(16, abs=0.35)
    assert found.orientation == "not parallel"


def test_no_millimetres_without_spacing(reader: Engine) -> None:
    """What the source does not state is unknown: no size, no orientation."""
    (found,) = assessed(reader, frame(lesion(), spacing=None)).findings
    assert (found.long_axis_mm, found.short_axis_mm, found.area_mm2, found.orientation) == (None, None, None, None)


def test_probability_is_the_calibrated_one(reader: Engine) -> None:
    """At the calibration's own prevalence the probability is Platt's, and the category its band."""
    result = assessed(reader, frame(lesion(EVEN)))
    assert result.probability == pytest.approx(sigmoid(log_odds(EVEN)), abs=0.01)
    assert result.birads == result.findings[0].birads == birads.category(result.probability, score=0.5, rule_out=0.05)
    assert result.findings[0].probability == result.probability


def test_rule_1_prevalence_moves_the_probability(reader: Engine) -> None:
    """Safety rule 1: the same score means less where cancer is rare, by the shift of the log-odds."""
    here = assessed(reader, frame(lesion(EVEN)))
    screening = assessed(reader, frame(lesion(EVEN)), prevalence=0.006)
    assert screening.probability == pytest.approx(at_prevalence(here.probability, 0.3, 0.006), abs=1e-5)
    assert (screening.prevalence, screening.calibrated_at) == (0.006, 0.3)


def test_rule_1_no_default_prevalence(reader: Engine) -> None:
    """Safety rule 1: nothing is said without a prevalence, nor with an impossible one."""
    with pytest.raises(TypeError):
        assess.assess(study(frame()), reader)  # type: ignore[call-arg]
    for impossible in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(Misconfigured, match="prevalence"):
            say(reader, frame(), prevalence=impossible)


def test_rule_1_three_also_needs_a_score_below_rule_out(reader: Engine) -> None:
    """Safety rule 1: however rare cancer is, a score at or above the rule-out score is never 3."""
    rare = assessed(reader, frame(lesion(EVEN)), prevalence=0.001)
    assert rare.probability < 0.02
    assert rare.birads == "4A"
    assert assessed(reader, frame(lesion(150)), prevalence=0.001).birads == "3"


def test_rule_2_only_what_we_can_say(reader: Engine) -> None:
    """Safety rule 2: whatever the score and the prevalence, categories 0, 1, 2 and 6 are never said."""
    for grey in range(140, 220, 8):
        for prevalence in (0.001, 0.05, 0.3, 0.9):
            result = say(reader, frame(lesion(grey)), prevalence=prevalence)
            if isinstance(result, Assessed):
                assert {result.birads, *(f.birads for f in result.findings)} <= {"3", "4A", "4B", "4C", "5"}


def test_rule_2_nothing_found_is_no_category(reader: Engine) -> None:
    """Safety rule 2: no lesion found is an answer without a category, with a probability and a place to look."""
    result = assessed(reader, frame(), frame(instance="1.2.4"))
    assert (result.birads, result.findings, result.images_read) == (None, (), 2)
    assert 0 < result.probability < 0.01
    assert result.key_image is not None
    assert result.key_heat is not None


def _study_probability(reader: Engine, log_odds: np.ndarray) -> float:
    """Of a study without a lesion whose frames got these scores."""
    still = frame()
    placement = pixels.Placement(REGION.height, REGION.width)
    nothing = np.zeros((112, 112), np.float32)
    views = [assess._View(still, placement, float(x), 0.0, 0.0, 0.0, nothing, nothing) for x in log_odds]
    answer = Answer("1.9", "ab", reader.bundle, reader.provider, 1, len(views), (), 0.0)
    result = assess._judge(answer, views, assess._Scale(reader.manifest, 0.3, len(views)))
    assert isinstance(result, Assessed)
    return result.probability


def _specificity(reader: Engine, frames: int, threshold: float) -> float:
    """Over 2000 benign studies whose frames scatter as a reader's scores do."""
    rng = np.random.default_rng(frames)
    studies = rng.normal(-4, 0.8, (2000, frames))
    return float(np.mean([_study_probability(reader, scores) < threshold for scores in studies]))


def test_rule_3_more_frames_do_not_mean_more_suspicion(opener: Opener) -> None:
    """Safety rule 3: specificity at 1, 5, 20 and 300 frames stays within 0.05 once pooling is fitted."""
    counts, threshold, wanted = (1, 5, 20, 300), sigmoid(-3.2), 0.84
    highest = [np.random.default_rng(0).normal(-4, 0.8, (20000, n)).max(1) for n in counts]
    shifts = [float(np.quantile(scores, wanted)) + 3.2 for scores in highest]
    reader, plain = opener(pooling=Pooling(counts, tuple(shifts))), opener()
    specificity = [_specificity(reader, n, threshold) for n in counts]
    assert max(specificity) - min(specificity) <= 0.05
    assert _specificity(plain, 20, threshold) < 0.1  # what the correction is for


def test_rule_3_a_lesion_lasts_in_a_clip(reader: Engine) -> None:
    """Safety rule 3: a flash in one or two frames of a clip is no finding; three neighbours are."""
    flash = assessed(reader, *clip(None, None, 165, 165, None, None, None))
    assert flash.findings == ()
    lasting = assessed(reader, *clip(None, None, 165, 168, 165, None, None))
    (found,) = lasting.findings
    assert found.frames_seen == 3
    assert found.source.frame_number == 4


def test_rule_3_a_lesion_may_blink(reader: Engine) -> None:
    """One frame without it does not end a lesion; two do."""
    assert len(assessed(reader, *clip(165, None, 165, 165)).findings) == 1
    assert assessed(reader, *clip(165, None, None, 165, None, None, 165)).findings == ()


def test_rule_3_frames_far_apart_are_no_neighbours(reader: Engine) -> None:
    """Safety rule 3: what was left out of a clip leaves its gap: a lesion in frames far apart, or in the only frame
    that could be read, is no finding."""
    far = [frame(lesion(165), number=number, count=300) for number in (1, 100, 200)]
    assert assessed(reader, *far).findings == ()
    assert assessed(reader, frame(lesion(165), number=150, count=300)).findings == ()
    between = [frame(tissue=120, number=number, count=9) for number in (2, 3)]
    flashes = [frame(lesion(165), number=number, count=9) for number in (1, 4, 7)]
    assert assessed(reader, *flashes, *between).findings == ()


def test_rule_3_sampled_frames_are_neighbours(reader: Engine) -> None:
    """Safety rule 3: of a long clip some frames are looked at; one of these is the neighbour of the next."""
    sampled = [replace(frame(lesion(165), number=number, count=300), step=1.5) for number in (1, 3, 4, 7)]
    (found,) = assessed(reader, *sampled).findings
    assert found.frames_seen == 4
    apart = [replace(frame(lesion(165), number=number, count=300), step=1.5) for number in (1, 5, 10)]
    assert assessed(reader, *apart).findings == ()


def test_rule_3_two_places_are_two_lesions(reader: Engine) -> None:
    """A lesion that jumps across the picture is not one that lasts."""
    frames = [frame(lesion(165, x=200 + 90 * i, rx=30, ry=30), number=i + 1, count=4) for i in range(4)]
    assert assessed(reader, *frames).findings == ()


def test_rule_5_evidence_is_absolute(reader: Engine) -> None:
    """Safety rule 5: evidence is in the network's own logits, whatever else the image shows."""
    faint = assessed(reader, frame(lesion(150))).findings[0].heat
    strong = assessed(reader, frame(lesion(180))).findings[0].heat
    assert faint is not None and strong is not None
    assert float(faint.evidence.max()) == pytest.approx((150 / 255 - 0.2) / 100, rel=0.01)
    assert float(strong.evidence.max()) == pytest.approx((180 / 255 - 0.2) / 100, rel=0.01)
    assert strong.region == REGION


def test_rule_5_evidence_covers_the_region_alone(reader: Engine) -> None:
    """The letter-box's bars are cut off the map: a wide region has a wide map."""
    whole = frame(lesion())
    wide = replace(whole, region=REGION._replace(bottom=REGION.top + REGION.height // 2 + 60))
    heat = assessed(reader, wide).findings[0].heat
    assert heat is not None
    rows, columns = heat.evidence.shape
    assert rows / columns == pytest.approx(heat.region.height / heat.region.width, rel=0.05)


def test_rule_6_side_only_as_stated(reader: Engine) -> None:
    """Safety rule 6: a finding has the side its frame states, and none otherwise."""
    assert assessed(reader, frame(lesion(), laterality="L")).findings[0].laterality == "L"
    assert assessed(reader, frame(lesion())).findings[0].laterality is None


def test_the_most_suspicious_finding_speaks_for_the_study(reader: Engine) -> None:
    """Findings come most suspicious first; the study has the first one's category and probability."""
    result = assessed(reader, frame(lesion(150)), frame(lesion(185), instance="1.2.4"), frame(instance="1.2.5"))
    assert [f.source.sop_instance_uid for f in result.findings] == ["1.2.4", "1.2.3"]
    assert (result.probability, result.birads) == (result.findings[0].probability, result.findings[0].birads)
    assert result.images_read == 3


def test_two_lesions_of_one_frame_are_two_findings(reader: Engine) -> None:
    """Each connected piece of the mask is a finding; a speck beside a lesion is not."""
    result = assessed(reader, frame(lesion(x=200), lesion(x=420, rx=40, ry=40), lesion(x=310, y=450, rx=6, ry=6)))
    assert len(result.findings) == 2


def test_uncertainty_widens_with_spread(reader: Engine) -> None:
    """Uncertainty is half of the 95 % interval, from the network's spread and the calibration's residual."""
    sure = assessed(reader, frame(lesion(EVEN))).findings[0].uncertainty
    unsure = assessed(reader, frame(lesion(EVEN), corner=12)).findings[0].uncertainty
    interval = [sigmoid(log_odds(EVEN) + sign * 1.96 * 0.2) for sign in (-1, 1)]
    assert sure == pytest.approx((interval[1] - interval[0]) / 2, abs=0.005)
    assert unsure > 1.5 * sure


def test_too_uncertain_is_declined(reader: Engine) -> None:
    """An interval wider than the bundle allows is declined, at every prevalence."""
    for prevalence in (0.3, 0.001):
        result = say(reader, frame(lesion(EVEN), corner=60), prevalence=prevalence)
        assert isinstance(result, Declined)
        assert "uncertain" in result.reason


def test_suspicious_without_an_outline_is_declined(opener: Opener) -> None:
    """A high score that no outlined lesion explains is not passed off as nothing found."""
    never_present = replace(readers.THRESHOLDS, presence=1.1)
    result = say(opener(thresholds=never_present), frame(lesion(200)))
    assert isinstance(result, Declined)
    assert "outlined" in result.reason


def test_strange_images_are_declined(reader: Engine) -> None:
    """When most images are unlike anything seen in training, nothing is said but that."""
    result = say(reader, frame(tissue=120), frame(tissue=110, instance="1.2.4"), frame(instance="1.2.5"))
    assert isinstance(result, Declined)
    assert "2 of 3 images" in result.reason
    assert result.images_read == 1
    assert [left.source.sop_instance_uid for left in result.not_analysed] == ["1.2.3", "1.2.4"]


def test_one_strange_image_is_left_out(reader: Engine) -> None:
    """A strange image among others is listed with its reason, and has no say."""
    result = assessed(reader, frame(), frame(instance="1.2.4"), frame(lesion(200), tissue=110, instance="1.2.5"))
    assert [(left.source.sop_instance_uid, left.reason) for left in result.not_analysed] == [("1.2.5", assess.STRANGE)]
    assert (result.images_read, result.findings) == (2, ())


def test_what_intake_left_out_stays_listed(reader: Engine) -> None:
    """Images that intake left out are in the result, before those left out here."""
    left = NotAnalysed(Source("1", "1.2.9", "1", 0, 0), "colour Doppler: not B-mode")
    result = assess.assess(study(frame(), not_analysed=(left,)), reader, prevalence=0.3)
    assert result.not_analysed == (left,)


def test_the_result_says_who_said_it(reader: Engine) -> None:
    """A Result names its study, its evidence, the bundle, the provider, its revision and how long it took."""
    ticks = iter((10.0, 12.5))
    result = say(reader, frame(lesion()), revision=3, clock=lambda: next(ticks))
    assert (result.study_uid, result.revision, result.seconds) == ("1.9", 3, 2.5)
    assert result.bundle.digest == reader.bundle.digest
    assert result.provider == reader.provider
    assert result.evidence_digest == study(frame()).evidence_digest


def test_the_same_study_gets_the_same_answer(reader: Engine) -> None:
    """Read twice, a study has the same findings to the last digit."""
    frames = [frame(lesion(160 + i, x=300 + i), instance=f"1.2.{i}") for i in range(5)]
    again = [say(reader, *frames, clock=lambda: 0.0) for _ in range(2)]
    assert again[0].findings == again[1].findings  # type: ignore[union-attr]
