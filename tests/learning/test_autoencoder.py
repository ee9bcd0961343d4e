"""Image ⇄ latent."""

import dataclasses

import pytest
import torch

from busgen_cds.learning import autoencoder
from busgen_cds.learning.autoencoder import Autoencoder, Shape
from tests.learning.generators import CODER


def coder() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(CODER).eval()


def test_a_latent_is_eight_times_smaller_each_way() -> None:
    """(N, 1, S, S) becomes (N, latent, S/8, S/8) and comes back at its own size, within -1..1."""
    image = torch.rand(2, 1, 64, 96) * 2 - 1
    latent = coder().encode(image)
    assert latent.shape == (2, 8, 8, 12)
    back = coder().decode(latent * 100)
    assert back.shape == image.shape and float(back.abs().max()) <= 1


def test_measured_latents_are_standard() -> None:
    """After `measure`, latents have mean 0 and spread 1 per channel, and the images decode as before."""
    network, image = coder(), torch.rand(8, 1, 64, 64) * 2 - 1
    before = network.decode(network.encode(image))
    for _ in range(2):  # measuring again moves nothing
        network.measure(network.encode(image))
        latent = network.encode(image).transpose(0, 1).flatten(1)
        assert torch.allclose(latent.mean(1), torch.zeros(8), atol=1e-4)
        assert torch.allclose(latent.std(1), torch.ones(8), atol=1e-4)
    assert torch.allclose(network.decode(network.encode(image)), before, atol=1e-4)


def test_it_begins_as_the_principal_components() -> None:
    """Untrained, it codes images of few components exactly, and its latents are white."""
    network = coder()
    blocks = torch.randn(6, 64)
    parts = torch.randn(10, 6, 8, 8)
    image = torch.nn.functional.pixel_shuffle(torch.einsum("nkhw,kc->nchw", parts, blocks) / 20, 8)
    network.begin_linear(image)
    back, _ = network(image, torch.zeros(10, 8, 8, 8))
    assert float((back - image).abs().mean()) < 0.1 * float(image.abs().mean())
    latent = network.encode(image).transpose(0, 1).flatten(1)[:6]
    assert torch.allclose(torch.cov(latent), torch.eye(6), atol=0.05)


def test_images_of_a_batch_stay_apart() -> None:
    """An image's latent is the same alone and in company."""
    image = torch.rand(3, 1, 64, 64) * 2 - 1
    assert torch.allclose(coder().encode(image)[:1], coder().encode(image[:1]), atol=1e-5)


def test_the_shuffle_leaves_no_checkerboard() -> None:
    """A constant image trained for a moment comes back without the shuffle's grid: its columns are alike."""
    network = coder().train()
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    image = torch.full((4, 1, 64, 64), 0.2)
    for _ in range(40):
        back, _ = network(image, torch.zeros(4, 8, 8, 8))
        loss = (back - image).abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    inner = network.eval()(image, torch.zeros(4, 8, 8, 8))[0][0, 0, 16:-16, 16:-16]
    by_phase = torch.stack([inner[:, i::4].mean() for i in range(4)])
    assert float(by_phase.max() - by_phase.min()) < 0.02


def test_a_shape_that_does_not_shrink_by_eight_is_refused() -> None:
    """Stem and levels must make a factor of eight together."""
    with pytest.raises(ValueError, match="do not shrink by 8"):
        Shape(stem=2, channels=(32, 32))


def test_the_hinge_is_zero_when_all_is_told_apart() -> None:
    """The discriminator's loss is zero beyond its margins and two at chance."""
    assert autoencoder.hinge(torch.full((2, 1), 1.5), torch.full((2, 1), -1.5)) == 0
    assert autoencoder.hinge(torch.zeros(2, 1), torch.zeros(2, 1)) == 2


def finished() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(dataclasses.replace(CODER, finish=8)).eval()


def test_the_last_touch_begins_as_nothing() -> None:
    """A last touch that was just added changes no pixel, whatever its noise."""
    plain, touched = coder(), finished()
    touched.load_state_dict(plain.state_dict(), strict=False)
    latent, grain = torch.randn(2, 8, 8, 8), torch.randn(2, 1, 64, 64)
    assert torch.equal(touched.decode(latent, grain), plain.decode(latent))


def test_the_grain_is_the_speckle() -> None:
    """The same latent and noise are the same picture, alone and in company; another noise is another speckle."""
    network = finished()
    assert network.finish is not None
    torch.nn.init.normal_(network.finish.outward.weight)
    latent, grain = torch.randn(2, 8, 8, 8), torch.randn(2, 1, 64, 64)
    once = network.decode(latent, grain)
    assert torch.allclose(network.decode(latent[:1], grain[:1]), once[:1], atol=1e-5)
    assert not torch.allclose(network.decode(latent, grain.flip(-1)), once, atol=1e-2)


def test_the_letter_box_holds_no_picture() -> None:
    """What a decoder draws outside the image's region is cut off."""
    image = torch.full((1, 1, 8, 8), -1.0)
    image[..., :4, 2:6] = 0.5
    drawn = autoencoder.within(image, torch.full((1, 1, 8, 8), 2.0))
    assert torch.equal(drawn[..., :4, 2:6], torch.ones(1, 1, 4, 4)) and int((drawn > -1).sum()) == 16
