"""The mathematics of rectified flow."""

import torch

from busgen_cds.learning import flow


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_constant_field_is_integrated_exactly_in_one_step() -> None:
    """A constant velocity is integrated exactly in one step, by either sampler."""
    x, v = torch.randn(2, 3, 4, 4, generator=rng()), torch.randn(2, 3, 4, 4, generator=rng(1))
    for method in ("euler", "heun"):
        end = flow.sample(lambda x, t: v, x, flow.schedule(1), method=method)  # type: ignore[arg-type]
        assert torch.equal(end, x - v)


def test_a_point_is_reached_from_any_noise() -> None:
    """When the data are one point, the true velocity leads every noise to it in one step."""
    point, noise = torch.full((4, 1, 2, 2), 0.7), torch.randn(4, 1, 2, 2, generator=rng())
    end = flow.sample(lambda x, t: (x - point) / t.reshape(-1, 1, 1, 1), noise, flow.schedule(1))
    assert torch.allclose(end, point, atol=1e-6)


def test_heun_is_of_second_order() -> None:
    """Halving Heun's steps divides the error by about four; Euler's by about two."""
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    exact = torch.exp(torch.tensor(-1.0, dtype=torch.float64))

    def error(method: flow.Method, steps: int) -> float:
        return float((flow.sample(lambda x, t: x, x, flow.schedule(steps).double(), method=method) - exact).abs())

    assert 1.8 < error("euler", 20) / error("euler", 40) < 2.2
    assert 3.6 < error("heun", 20) / error("heun", 40) < 4.4


def test_the_true_velocity_has_no_loss() -> None:
    """The loss is zero exactly at the velocity noise - data, and the path against it leads to the data."""
    data, noise = torch.randn(3, 2, 4, 4, generator=rng()), torch.randn(3, 2, 4, 4, generator=rng(1))
    t = flow.draw_times(3, rng(2))
    assert torch.equal(flow.loss(lambda x, t: noise - data, data, noise, t), torch.zeros(3))
    back = flow.between(data, noise, t) - t[:, None, None, None] * (noise - data)
    assert torch.allclose(back, data, atol=1e-5)


def test_the_loss_looks_only_where_the_weight_is() -> None:
    """What has no weight does not count: an error outside the weight changes nothing."""
    data, noise = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    wrong = torch.tensor([[[[2.0, 0.0], [0.0, 0.0]]]])
    weight = torch.ones(1, 1, 2, 2)
    t = torch.tensor([0.5])
    assert flow.loss(lambda x, t: wrong, data, noise, t, weight) == 1.0
    weight[0, 0, 0, 0] = 0
    assert flow.loss(lambda x, t: wrong, data, noise, t, weight) == 0.0


def test_what_is_known_comes_out_as_it_went_in() -> None:
    """The known part of a sample equals what was given, to the bit."""
    data, noise = torch.randn(1, 1, 4, 4, generator=rng()), torch.randn(1, 1, 4, 4, generator=rng(1))
    where = (torch.arange(16).reshape(1, 1, 4, 4) % 2).float()
    end = flow.sample(lambda x, t: x, noise, flow.schedule(5), flow.Known(data, noise, where))
    assert torch.equal(end[where > 0], data[where > 0])
    assert not torch.equal(end[where == 0], data[where == 0])


def test_times_are_logit_normal() -> None:
    """The drawn times have the logit's mean and spread asked for, and lie inside the path."""
    t = flow.draw_times(20_000, rng(), mean=0.5, spread=0.8).double()
    logit = torch.log(t / (1 - t))
    assert abs(float(logit.mean()) - 0.5) < 0.03 and abs(float(logit.std()) - 0.8) < 0.03
    assert float(t.min()) > 0 and float(t.max()) < 1


def test_a_schedule_goes_from_its_start_to_zero() -> None:
    """A schedule falls from its start to zero; a shift keeps the whole path's ends."""
    assert flow.schedule(25).tolist()[0] == 1 and flow.schedule(25, shift=3).tolist()[-1] == 0
    assert flow.schedule(4, start=0.3).tolist()[0] == torch.tensor(0.3)
    assert flow.schedule(4, start=0.25, shift=3).tolist()[0] == 0.25  # where the noise that was mixed in begins
    assert bool((flow.schedule(25, shift=3).diff() < 0).all())


def test_guidance_works_in_its_interval_only() -> None:
    """Outside the interval the unconditional velocity is not even asked for."""
    asked: list[float] = []

    def unconditional(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        asked.append(float(t[0]))
        return torch.zeros_like(x)

    velocity = flow.guided(lambda x, t: torch.ones_like(x), unconditional, 2.0, 0.2, 0.8)
    x = torch.zeros(1, 1, 1, 1)
    assert [float(velocity(x, torch.tensor([t]))) for t in (0.1, 0.5, 0.9)] == [1.0, 2.0, 1.0]
    assert asked == [0.5]
