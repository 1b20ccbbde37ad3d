"""CDM: with fixed steps and no weight it is DMD2; random levels in order; the point off the trajectory, by hand."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from listening import F64, Listening, batch_of
from torch import Tensor
from turning import turned

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.noising import add_noise
from fewstep.algebra.process import EDM, Flow
from fewstep.algebra.rollout import RandomSteps, Rollout, rollout
from fewstep.algebra.times import Levels, Uniform
from fewstep.methods.critic import Critic
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.off_trajectory import OffTrajectory
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.mlp import MLP
from fewstep.networks.roles import Roles
from fewstep.recipe.cards import cite

FLOW = Flow()
PLAIN = {name: Listening(FLOW, gain, offset) for name, gain, offset in (
    ("teacher", 0.5, 0.2), ("student", 0.3, -0.1), ("critic", 0.4, 0.6))}  # fmt: skip


def net(seed: int) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(MLP(2, 12, 3), FLOW, "velocity", "angle")


def updated(method: Any) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Losses and weights of three steps."""
    roles = Roles(teacher=net(1), student=net(2), critic=net(3))

    def batch(step: int, number: int, repeat: int) -> Batch:
        assert repeat == 0
        return Batch(Draws(fold("off", step, number), torch.arange(9)), (2,))

    return turned(method, roles, 3, batch)


def test_fixed_steps_without_a_weight_are_dmd2_bit_for_bit() -> None:
    common: dict[str, Any] = {"steps": (1.0, 0.6, 0.3), "gan": None, "critic": Critic(steps=1)}
    plain, off = updated(DMD2(**common)), updated(DMD2(**common, off_trajectory=OffTrajectory(weight=0.0)))
    assert plain[0] == off[0]
    assert all(torch.equal(v, off[1][k]) for k, v in plain[1].items())
    some = updated(DMD2(**common, off_trajectory=OffTrajectory()))
    # It adds to the student's first update and changes nothing before it: the match itself has the same draws.
    assert some[0][0]["match"] == plain[0][0]["match"]
    assert "off_trajectory" in some[0][0]
    assert any(not torch.equal(v, some[1][k]) for k, v in plain[1].items() if k.startswith("student."))


@pytest.mark.parametrize("level", [0.2, 0.9])
def test_the_point_lies_on_the_line_of_the_students_velocity(level: float) -> None:
    student = Listening(FLOW, 0.3, -0.1)
    x, t = batch_of(4).noise(), torch.full((4,), 0.6, dtype=F64)
    made = Rollout(student(x, t).x0, x, t)
    got = OffTrajectory(times=Levels(at=(level,))).sample(Roles(student=student), batch_of(4), made)
    velocity = (x - (0.3 * x - 0.1)) / 0.6
    off = x + (level - 0.6) * velocity
    torch.testing.assert_close(got, 0.3 * off - 0.1, rtol=1e-12, atol=1e-12)
    assert float(student.times[-1][0]) == level
    # The point itself carries no gradient: only the call there does.
    (slope,) = torch.autograd.grad(got.sum(), student.gain)
    assert float(slope) == pytest.approx(float(off.detach().sum()), rel=1e-12)


def test_its_loss_is_the_weighted_match_at_that_point_with_its_floor() -> None:
    roles = Roles(**PLAIN)
    off = OffTrajectory(weight=0.7, times=Levels(at=(0.3,)), floor=50.0, warmup=3)
    method = DMD2(gan=None, times=Levels(at=(0.4,)), off_trajectory=off)
    (losses,) = method.student_losses(roles, batch_of(4), None, 1)
    again = batch_of(4)
    made = rollout(roles.student, again.draws, (2,), (1.0,))
    method.gradient(roles, again, made.x.detach())
    x = off.sample(roles, again, made)
    method.times.sample(again.draws, FLOW)
    x_tau, _ = add_noise(FLOW, x.detach(), again.noise(), torch.full((4,), 0.4, dtype=F64))
    gradient = ((0.4 * x_tau + 0.6) - (0.5 * x_tau + 0.2)) / 50.0
    # The second of four updates on the way up to the weight.
    wanted = 0.7 * 2 / 4 * float((gradient**2).mean().detach()) / 2
    assert float(losses["off_trajectory"].detach()) == pytest.approx(wanted, rel=1e-12)
    assert [off.scale(k) for k in (0, 3, 9)] == [0.7 / 4, 0.7, 0.7]
    assert OffTrajectory().scale(0) == 1.0


@pytest.mark.parametrize("process", [Flow(), EDM()])
def test_levels_in_order_and_any_of_the_steps_is_trained(process: Any) -> None:
    law = RandomSteps(least=2, most=5, order="sorted", times=Uniform(low=0.25, high=0.95))
    lengths, used = torch.zeros(6), set()
    for k in range(300):
        draws = Draws(fold("sorted", k), torch.arange(6))
        times = law.draw(draws, process)
        used.add(draws._calls)
        lengths[len(times)] += 1
        assert torch.equal(times[0], process.grid(torch.ones(6, dtype=F64)))
        assert all(bool((b <= a).all()) for a, b in pairwise(times))
        levels = [process.level(t) for t in times[1:]]
        assert all(bool(((u > 0.2499) & (u < 0.9501)).all()) for u in levels)
    # The trained step is uniform among N, N uniform in 2..5: P(k-th) = mean over N >= k of 1 / N, within 5 errors.
    wanted = torch.tensor([sum(1 / n for n in range(max(k, 2), 6)) / 4 for k in range(1, 6)])
    assert bool(((lengths[1:] / 300 - wanted).abs() < 5 * (wanted * (1 - wanted) / 300).sqrt()).all())
    assert len(used) == 1
    with pytest.raises(ValueError, match="least must be at most 4"):
        RandomSteps(least=5)


def test_a_student_of_random_levels_takes_any_of_their_numbers_and_cites_the_paper() -> None:
    method = DMD2(gan=None, steps=(1.0, 0.5), simulate=RandomSteps(least=3, most=5, order="sorted"))
    assert method.sampler().counts == (2, 3, 4, 5)
    assert DMD2(gan=None).sampler().counts is None
    assert "2605.06376" in cite("toy/cdm")
