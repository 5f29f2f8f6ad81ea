"""Schedules, their early end, and averages, against numbers worked out by hand."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import pytest
import torch
from torch import nn

from paretune.objectives.optimization import Average, Pace, Positions, make_optimizer, pace, set_pace
from paretune.objectives.training import TrainOptions

OPTIONS = TrainOptions(warmup=0.0)
ONE_CYCLE = replace(OPTIONS, schedule="one-cycle")


def test_cosine_rises_straight_and_falls_as_a_cosine() -> None:
    rates = [pace(step, 12, replace(OPTIONS, warmup=1 / 3)).rate for step in range(12)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[8] == pytest.approx(0.5)
    assert rates[11] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert {pace(step, 12, OPTIONS).momentum for step in range(12)} == {0.9}


def test_one_cycle_moves_rate_and_momentum_against_each_other() -> None:
    steps = [pace(step, 100, ONE_CYCLE) for step in range(100)]
    assert steps[0] == pytest.approx((1 / 25, 0.95))
    assert steps[15] == pytest.approx((0.52, 0.90)), "half way up"
    assert steps[30] == pytest.approx((1.0, 0.85)), "the peak"
    assert steps[65] == pytest.approx((0.5, 0.90)), "half way down"
    assert steps[99].rate < 0.001
    assert steps[99].momentum == pytest.approx(0.95, abs=1e-3)
    assert all((a.rate < b.rate) == (position < 30) for position, (a, b) in enumerate(pairwise(steps)))
    assert all((a.momentum > b.momentum) == (position < 30) for position, (a, b) in enumerate(pairwise(steps)))


def test_one_cycle_has_a_rise_of_its_own() -> None:
    assert pace(3, 10, ONE_CYCLE) == pace(3, 10, replace(ONE_CYCLE, warmup=0.9)) == Pace(1.0, 0.85)


@pytest.mark.parametrize(("total", "options"), [(1, OPTIONS), (1, ONE_CYCLE), (2, ONE_CYCLE), (1, TrainOptions())])
def test_the_shortest_schedules(total: int, options: TrainOptions) -> None:
    for step in range(total):
        assert 0 < pace(step, total, options).rate <= 1


def test_the_pace_reaches_either_optimizer() -> None:
    weights = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2), requires_grad=False)]
    sgd, adamw = (make_optimizer(weights, replace(OPTIONS, optimizer=name)) for name in ("sgd", "adamw"))
    for optimizer in (sgd, adamw):
        set_pace(optimizer, 0.2, Pace(0.5, 0.87))
        assert len(optimizer.param_groups[0]["params"]) == 1, "frozen weights stay out"
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    assert sgd.param_groups[0]["momentum"] == 0.87
    assert adamw.param_groups[0]["betas"] == (0.87, 0.999)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_what_is_tied_stays_equal_bit_for_bit(name: Literal["sgd", "adamw"]) -> None:
    """Also where a tensor doesn't fill vector registers, whatever the order in memory, and in the average."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3 * 3 * 16 * 7 + 5,), (79,), (6, 5, 3, 3)] * 100
    weights = [nn.Parameter(torch.randn((), generator=generator).expand(shape).clone()) for shape in shapes]
    for weight in weights[2::3]:
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    model = nn.ParameterList(weights)
    optimizer = make_optimizer(weights, replace(OPTIONS, optimizer=name, weight_decay=1e-2), tied=True)
    average = Average(model, 0.9)
    for step in range(50):
        set_pace(optimizer, 1e-2, pace(step, 50, ONE_CYCLE))
        for weight in weights:
            weight.grad = torch.randn((), generator=generator).expand(weight.shape).clone()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        average.update()
    torn = [len(weight.unique()) for weight in weights]
    average.put()
    torn += [len(weight.unique()) for weight in weights]
    assert set(torn) == {1}


def run(
    losses: list[float], options: TrainOptions, *, schedule: range | None = None, ahead: int = 1
) -> tuple[list[int], Positions]:
    """The positions that are trained when the loss at each is as given; they are looked at so many at a time."""
    positions = Positions(range(len(losses)) if schedule is None else schedule, len(losses), options)
    seen: list[int] = []
    new: dict[int, float] = {}
    for position in positions:
        seen.append(position)
        new[position] = losses[position]
        if len(new) == ahead or positions.ended:
            positions.note(new)
            new.clear()
    return seen, positions


PATIENT = replace(OPTIONS, plateau=0.1)


def test_without_a_plateau_every_position_is_trained() -> None:
    seen, positions = run([1.0] * 100, OPTIONS)
    assert seen == list(range(100))
    assert (positions.steps, positions.cut) == (100, False)


def test_a_flat_loss_ends_the_training_early() -> None:
    seen, positions = run([1.0] * 100, PATIENT)
    # The running loss is known after 10 steps, and 10 more bring nothing; then come 10 of the 80 positions left.
    assert seen == [*range(20), 27, 35, 43, 51, 59, 67, 75, 83, 91, 99]
    assert (positions.steps, positions.cut) == (30, True)


def test_a_loss_that_stops_falling_ends_the_training_early() -> None:
    losses = [max(0.5, 1 - position / 80) for position in range(100)]
    seen, positions = run(losses, PATIENT)
    assert positions.cut
    assert 50 <= next(a for a, b in pairwise(seen) if b > a + 1) <= 65
    assert seen[-1] == 99


def test_negative_losses_are_judged_alike() -> None:
    assert not run([-1 - position / 100 for position in range(100)], PATIENT)[1].cut
    assert run([-1.0] * 100, PATIENT)[1].cut


def test_a_noisy_loss_that_falls_is_left_alone() -> None:
    rng = random.Random(0)
    losses = [math.exp(-2.3 * position / 400) * (1 + rng.gauss(0, 0.05)) for position in range(400)]
    assert not run(losses, PATIENT)[1].cut


def test_steps_in_which_the_rate_rises_dont_count() -> None:
    seen, _ = run([1.0] * 100, replace(PATIENT, warmup=0.5))
    assert seen[:70] == list(range(70))
    assert len(seen) == 80


def test_each_part_is_judged_by_itself() -> None:
    seen, positions = run([1.0] * 100, PATIENT, schedule=range(70, 100))
    assert seen == list(range(70, 100)), "no more than 10 steps are left when 20 brought nothing"
    assert not positions.cut
    seen, positions = run([1.0] * 100, PATIENT, schedule=range(60))
    assert positions.cut
    assert (len(seen), seen[-1]) == (30, 59), "the next part begins where this one should have ended"
    assert run([1.0] * 100, PATIENT, schedule=range(69, 100))[1].cut, "31 steps are more than three times 10"


def test_a_gpu_sees_a_plateau_some_steps_later() -> None:
    seen, positions = run([1.0] * 100, PATIENT, ahead=20)
    assert seen[:20] == list(range(20))
    assert (positions.steps, seen[-1]) == (30, 99)
    assert run([1.0] * 100, PATIENT, ahead=15)[1].steps == 40


class Small(nn.Module):
    """A weight, a floating-point buffer and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 0.0, 5.0, 5.0]))
        self.register_buffer("mean", torch.tensor([2.0]))
        self.register_buffer("count", torch.tensor(3))


def test_the_average_is_the_one_by_hand() -> None:
    model = Small()
    average = Average(model, 0.2)
    expected = model.weight.detach().clone()
    for update, decay in enumerate((1 / 10, 2 / 11, 0.2, 0.2)):
        with torch.no_grad():
            model.weight.mul_(1.5)
            model.get_buffer("mean").add_(1)
            model.get_buffer("count").add_(1)
        average.update()
        expected = decay * expected + (1 - decay) * model.weight.detach()
        assert float(model.weight[0].detach()) == 1.5 ** (update + 1), "the model itself goes its own way"
    average.put()
    torch.testing.assert_close(model.weight.detach(), expected)
    assert float(model.get_buffer("mean")) < 6
    assert int(model.get_buffer("count")) == 7, "counters can't be averaged"
    assert model.weight.tolist()[1] == 0
    assert model.weight.tolist()[2] == model.weight.tolist()[3]


def test_what_stands_still_averages_to_itself() -> None:
    model = nn.BatchNorm2d(7)
    with torch.no_grad():
        model.weight.normal_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    average = Average(model, 0.99)
    for _ in range(50):
        average.update()
    average.put()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
