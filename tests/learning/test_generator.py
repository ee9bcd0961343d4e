"""What can be asked of the generator, and what it keeps to."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm

from busgen_cds.errors import Misconfigured
from busgen_cds.learning import checkpoint, conditions, generator, networks
from busgen_cds.learning.conditions import Box, Vocabulary
from busgen_cds.learning.generator import Generator, Sampling
from busgen_cds.pixels import Placement
from tests.learning.generators import VOCABULARY, some_boxes, tiny

QUICK = Sampling(steps=3, propose_steps=2, refine_steps=2)


def disc(rows: int, columns: int, y: float, x: float, radius: float) -> np.ndarray:
    grid = np.mgrid[:rows, :columns]
    return (((grid[0] - y) ** 2 + (grid[1] - x) ** 2) < radius**2).astype(np.uint8) * 255


# Asking


def test_an_image_does_not_depend_on_its_company() -> None:
    """Image i of a seed is the same image alone, in a batch, and in another batch."""
    makes = tiny()
    together = makes.sample(3, pathology="benign", device="A", seed=7, sampling=QUICK)
    alone = makes.sample(1, pathology="benign", device="A", seed=7, first=2, sampling=QUICK)
    difference = np.abs(together[2].image.astype(int) - alone[0].image.astype(int))
    assert difference.max() <= 1  # bfloat16 sums in another order
    assert together[2].box == alone[0].box and together[2].image.shape == alone[0].image.shape


@pytest.mark.parametrize("kind", ["unet", "transformer"])
def test_image_and_outline_come_together(kind: str) -> None:
    """A sample has an image and an outline of one shape, the shape of its device's images."""
    one = tiny(kind).sample(pathology="malignant", device="A", sampling=QUICK)[0]
    assert one.image.dtype == np.uint8 and one.mask.dtype == np.bool_
    assert one.image.shape == one.mask.shape and max(one.image.shape) == 64
    assert 1.2 < one.image.shape[0] / one.image.shape[1] < 1.5


def test_a_normal_image_has_no_lesion() -> None:
    """A normal image has no box and an empty outline; asking for a lesion in it is refused."""
    one = tiny().sample(pathology="normal", sampling=QUICK)[0]
    assert one.box is None and not one.mask.any()
    with pytest.raises(Misconfigured, match="normal"):
        tiny().sample(pathology="normal", box=(0.1, 0.1, 0.4, 0.4))


def test_a_given_outline_comes_out() -> None:
    """A mask that was given is the mask of the sample, up to the grid it travels on."""
    given = disc(96, 80, 50, 40, 20)
    one = tiny().sample(pathology="benign", mask=given, sampling=QUICK)[0]
    assert one.image.shape == (64, 53)
    rows = np.linspace(0, 95, 64).round().astype(int)
    columns = np.linspace(0, 79, 53).round().astype(int)
    wanted = given[np.ix_(rows, columns)] > 0
    assert 2 * (wanted & one.mask).sum() / (wanted.sum() + one.mask.sum()) > 0.93


def test_a_lesion_grows_in_a_healthy_breast() -> None:
    """Healthy → lesion gives an image of the healthy image's shape, with its outline in the box's room."""
    healthy = (np.random.default_rng(0).random((90, 70)) * 200).astype(np.uint8)
    told: list[tuple[int, int]] = []
    one = tiny().sample(
        pathology="malignant",
        healthy=healthy,
        box=(0.2, 0.2, 0.6, 0.6),
        sampling=QUICK,
        tell=lambda done, steps: told.append((done, steps)),
    )[0]
    assert one.image.shape == (64, 50)
    rows, _columns = np.nonzero(one.mask)
    if len(rows):  # within the box and the cells around it
        assert rows.min() >= 0.2 * 64 - 16 and rows.max() <= 0.6 * 64 + 16
    assert told[-1] == (7, 7)


def test_the_healthy_surroundings_are_kept_until_the_seam_is_smoothed() -> None:
    """Without the last stage, the latent far from the lesion is that of the healthy image."""
    makes = tiny()
    healthy = (np.random.default_rng(0).random((64, 64)) * 200).astype(np.uint8)
    wish = makes.wish(0, 0, "benign", box=(0.3, 0.3, 0.5, 0.5), healthy=healthy)
    kept = makes.given([wish])
    latent = makes.coder.encode(torch.from_numpy(wish.healthy)[None, None].float() / 127.5 - 1)
    where = torch.cat([1 - generator.grown(kept.box, 1), torch.ones_like(kept.box)], 1)
    given = kept._replace(data=torch.cat([latent, kept.data[:, 8:]], 1), where=where)
    end = makes._solve(given, torch.randn(1, 12, 8, 8), QUICK, 3, 1.0, lambda done, steps: None)
    far = where[0, 0] == 1
    assert torch.equal(end[0, :8][:, far], latent[0][:, far])
    assert not torch.equal(end[0, :8][:, ~far], latent[0][:, ~far])


@pytest.mark.parametrize(
    "wrong",
    [
        {"pathology": "tumour"},
        {"pathology": "benign", "device": "Nokia"},
        {"pathology": "benign", "birads": "9"},
        {"pathology": "benign", "box": (0.5, 0.5, 0.4, 0.9)},
        {"pathology": "benign", "box": (0.5, 0.5, 1.4, 0.9)},
        {"pathology": "benign", "mask": np.ones((4, 4)), "healthy": np.ones((5, 5), np.uint8)},
        {"pathology": None},
        {"pathology": "benign", "birads": 4},
        {"pathology": "benign", "box": (0.5, 0.5, 0.9)},
        {"pathology": "benign", "box": "the middle"},
        {"pathology": "benign", "box": (0.1, 0.1, 0.3, 0.3), "mask": np.ones((9, 9))},
        {"pathology": "malignant", "mask": np.zeros((96, 80), bool)},
        {"pathology": "malignant", "mask": disc(960, 800, 400, 400, 1)},
        {"pathology": "benign", "mask": np.ones((9, 9, 3))},
        {"pathology": "benign", "mask": [[1, 1], [1, 1]]},
        {"pathology": "benign", "healthy": "breast.png"},
        {"pathology": "benign", "healthy": np.ones((9, 9, 3), np.uint8)},
        {"pathology": "benign", "healthy": np.full((9, 9), np.nan)},
        {"pathology": "benign", "labels": {"pathology": "malignant"}},
        {"pathology": "benign", "count": -1},
        {"pathology": "benign", "seed": -1},
    ],
)
def test_a_wrong_question_is_refused(wrong: dict[str, object]) -> None:
    """An unknown label, an impossible box, an empty outline or a colour image are refused, with what would do."""
    with pytest.raises(Misconfigured):
        tiny().sample(**wrong)  # type: ignore[arg-type]


def test_a_generator_is_what_it_was_when_saved(tmp_path: Path) -> None:
    """Saved and loaded, a generator makes the same images, up to its half precision."""
    makes = tiny()
    makes.save(tmp_path)
    again = Generator.load(tmp_path, device="cpu")
    assert again.card.vocabulary == makes.card.vocabulary and again.card.network == makes.card.network
    one = makes.sample(pathology="benign", seed=3, sampling=QUICK)[0]
    other = again.sample(pathology="benign", seed=3, sampling=QUICK)[0]
    assert np.abs(one.image.astype(int) - other.image.astype(int)).mean() < 3
    assert one.image.shape == other.image.shape


@pytest.mark.parametrize(
    "wrong",
    [
        *({"steps": 0}, {"refine_steps": 0}, {"guidance": float("nan")}, {"guidance": -1.0}),
        *({"low": 0.7, "high": 0.4}, {"high": 1.2}),
    ],
)
def test_a_sampler_that_would_draw_noise_is_refused(wrong: dict[str, float]) -> None:
    """No step at all, or a guidance that is no number from 0 on, is refused before anything is made."""
    with pytest.raises(Misconfigured):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_what_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    """A device that is not there, and a file that is no adapter of this generator, are said in a sentence."""
    makes = tiny()
    makes.save(tmp_path)
    with pytest.raises(Misconfigured, match="gpu"):
        Generator.load(str(tmp_path), device="gpu")
    with pytest.raises(Misconfigured, match="no adapter"):
        Generator.load(tmp_path, adapter=tmp_path / generator.FLOW)
    notes = {"rank": 8, "vocabulary": [[n, list(w)] for n, w in VOCABULARY.names.items()]}
    checkpoint.write(tmp_path / "other.safetensors", {"a": torch.zeros(1)}, notes)
    with pytest.raises(Misconfigured, match="generator"):
        Generator.load(tmp_path, adapter=tmp_path / "other.safetensors")


def test_a_folder_without_a_card_is_no_generator(tmp_path: Path) -> None:
    """A missing generator is said with its folder."""
    with pytest.raises(Misconfigured, match=str(tmp_path)):
        Generator.load(tmp_path)


# Networks and adapters


@pytest.mark.parametrize("kind", ["unet", "transformer"])
def test_a_network_starts_as_the_zero_field(kind: str) -> None:
    """Before training the velocity is zero everywhere."""
    makes = tiny(kind, awake=False)
    given = makes.given([makes.wish(0, 0, "benign")])
    assert not makes.network(torch.randn(1, 12, 8, 8), torch.tensor([0.5]), given).any()


@pytest.mark.parametrize("kind", ["unet", "transformer"])
def test_a_fresh_adapter_changes_nothing(kind: str) -> None:
    """A zero-initialised adapter changes nothing, bit for bit, and frees a small part of the network."""
    makes = tiny(kind)
    given = makes.given([makes.wish(0, 0, "benign")])
    x, t = torch.randn(1, 12, 8, 8), torch.tensor([0.5])
    before = makes.network(x, t, given)
    networks.adapt(makes.network, 4)
    makes.network.eval()
    assert torch.equal(makes.network(x, t, given), before)
    free = sum(p.numel() for p in networks.adapter_weights(makes.network).values())
    assert 0 < free < 0.5 * sum(p.numel() for p in makes.network.parameters())


def test_an_adapter_of_another_generator_is_refused() -> None:
    """An adapter whose parts or sizes are not this network's is refused, and the network stays as it was."""
    mine, other = (networks.adapt(tiny().network, rank) for rank in (2, 3))
    before = {name: p.clone() for name, p in networks.adapter_weights(mine).items()}
    for wrong in (networks.adapter_weights(other), dict(list(before.items())[1:])):
        with pytest.raises(Misconfigured, match="Not an adapter of this generator"):
            networks.load_adapter_weights(mine, wrong)
    assert all(torch.equal(p, before[name]) for name, p in networks.adapter_weights(mine).items())


def test_a_new_label_leaves_the_old_ones() -> None:
    """Room for a new device and a new condition changes no answer that was possible before."""
    makes = tiny()
    wider = VOCABULARY.with_label("device", "C").with_label("histology", "cyst")
    x, t = torch.randn(1, 12, 8, 8), torch.tensor([0.5])
    given = makes.given([makes.wish(0, 0, "benign", device="B")])
    before = makes.network(x, t, given)
    makes.network.conditions.grow(wider)
    said = given._replace(labels=torch.cat([given.labels, torch.tensor([[1]])], 1))
    assert torch.equal(makes.network(x, t, said), before)


# Conditions


def test_an_outline_survives_its_planes() -> None:
    """Mask → planes → mask keeps a lesion's outline (Dice above 0.95) at an eighth of the resolution."""
    mask = disc(128, 128, 60, 70, 22)
    back = conditions.outline_mask(conditions.outline_planes(mask)[None])[0].numpy()
    assert 2 * ((mask > 0) & back).sum() / ((mask > 0).sum() + back.sum()) > 0.95
    assert not conditions.outline_mask(conditions.outline_planes(np.zeros((128, 128), np.uint8))[None]).any()


def test_a_box_covers_its_share_of_each_cell() -> None:
    """The box's plane sums to its area, also when an edge lies within a cell."""
    plane = conditions.cover(1.25, 2.0, 3.5, 4.75, 8)
    assert torch.isclose(plane.sum(), torch.tensor(2.25 * 2.75))
    assert float(plane[2, 1]) == 0.75 and float(plane[0, 0]) == 0


def test_a_mask_s_box_is_found_where_the_region_lies() -> None:
    """Boxes are fractions of the region, whatever the letter-box adds."""
    place = Placement(100, 50, 64)
    mask = np.zeros((64, 64), np.uint8)
    mask[16:32, 16 + 8 : 16 + 16] = 255
    assert conditions.box_of(mask, place) == Box(0.25, 0.25, 0.5, 0.5)


def test_boxes_that_are_all_alike_are_said() -> None:
    """From one box, again and again, none can be drawn that is nobody's: a sentence, not a search without end."""
    prior = conditions.fit_boxes({"benign": [Box(0.2, 0.2, 0.5, 0.5)] * 20}, {})
    with pytest.raises(Misconfigured, match="'benign' are all alike"):
        prior.draw("benign", np.random.default_rng(0))


def test_the_box_prior_is_nobody_s_box() -> None:
    """No drawn box lies on a training box, every one lies in the image, and they scatter as the training boxes do."""
    known = some_boxes(200)
    prior = conditions.fit_boxes({"benign": known}, {"benign": some_boxes(60, seed=5)})
    drawn = np.array([prior.draw("benign", np.random.default_rng(i)) for i in range(300)])
    assert not any(conditions.is_copy(box, np.array(known, np.float32)) for box in drawn.astype(np.float32))
    assert drawn.min() >= 0 and drawn.max() <= 1 and bool((drawn[:, :2] < drawn[:, 2:]).all())
    assert np.allclose(drawn.mean(0), np.array(known).mean(0), atol=0.05)


def test_the_bandwidth_is_the_one_that_explains_others_boxes() -> None:
    """Cross-validation chooses a bandwidth in the middle: neither a replay of the boxes nor a blur."""
    prior = conditions.fit_boxes({"benign": some_boxes(200)}, {"benign": some_boxes(60, seed=5)})
    assert conditions.BANDWIDTHS[0] < prior.bandwidth["benign"] < conditions.BANDWIDTHS[-1]
    known, other = (np.array(some_boxes(200, s), np.float32) for s in (0, 5))
    best = conditions.log_likelihood(known, other, prior.bandwidth["benign"])
    assert best > conditions.log_likelihood(known, other, 0.001)  # the replay that must not be


def test_the_likelihood_is_that_of_a_kernel_density() -> None:
    """One box under one known box is a normal density of each log-odds; a thousand more need no more at once."""
    known, far = np.array(some_boxes(3), np.float32), np.array(some_boxes(1200, seed=7), np.float32)
    points, others = conditions._open(known), conditions._open(far)
    width = 0.5 * points.std(0)
    each = [[norm.pdf(o, p, width).prod() for p in points] for o in others]
    assert conditions.log_likelihood(known, far, 0.5) == pytest.approx(np.log(np.mean(each, 1)).mean())


def test_without_held_out_boxes_the_prior_is_wide() -> None:
    """Training boxes are not asked how well they explain themselves: that would choose the narrowest, a replay."""
    prior = conditions.fit_boxes({"benign": some_boxes(40)}, {})
    assert prior.bandwidth["benign"] == conditions.UNTOLD > conditions.BANDWIDTHS[2]


def test_an_image_s_shape_is_drawn_between_its_device_s() -> None:
    """A region's shape comes from its device's, or from all where the device is not known."""
    regions = conditions.fit_regions({"A": [1.3, 1.4], "B": [0.7, 0.8]})
    rng = np.random.default_rng(0)
    assert all(1.3 <= regions.draw("A", rng) <= 1.4 for _ in range(20))
    assert all(0.7 <= regions.draw(None, rng) <= 1.4 for _ in range(20))


def test_labels_keep_their_numbers() -> None:
    """A grown vocabulary gives every old label its old number, and 0 to what is not said."""
    words = Vocabulary({"device": ("A", "B")})
    assert words.index({}) == [0] and words.index({"device": "B"}) == [2]
    assert words.with_label("device", "C").index({"device": "B"}) == [2]
    with pytest.raises(Misconfigured, match="colour"):
        words.index({"colour": "red"})
