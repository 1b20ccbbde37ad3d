"""DP-DMD: without a weight it is DMD2; its target is the teacher's state; matching leaves the first step alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distribution_cases import batch64, players
from listening import F64, Listening, batch_of
from torch import Tensor, nn
from turning import turned

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.noising import add_noise
from fewstep.algebra.prediction import from_x0
from fewstep.algebra.process import EDM, Flow
from fewstep.algebra.rollout import RandomSteps, rollout
from fewstep.methods.critic import Critic
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.first_step import FirstStep
from fewstep.methods.gan import Gan
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.heads import Discriminator
from fewstep.networks.mlp import MLP
from fewstep.networks.roles import Roles
from fewstep.networks.routed import ByTime, Routed
from fewstep.objectives.legs import Teacher
from fewstep.objectives.trajectory import chord_x0
from fewstep.recipe.cards import cite

STEPS = (1.0, 0.75, 0.5, 0.25)
FLOW = Flow()


def net(seed: int) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(MLP(2, 12, 3), FLOW, "velocity", "angle")


def cast(student: nn.Module | None = None) -> Roles:
    critic = net(3)
    torch.manual_seed(4)
    heads = Discriminator(critic, ("mid",), (torch.zeros(1, 2), torch.full((1,), 0.5), None), 7)
    return Roles(teacher=net(1), student=student or net(2), critic=critic, discriminator=heads)


def batch(key: int) -> Batch:
    x0 = Draws(fold("data"), torch.arange(9)).normal(2)
    return Batch(Draws(fold("first", key), torch.arange(9)), (2,), x0)


def trained(method: Any, updates: int = 4) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Losses and readings of every update, and the weights of all roles after them."""
    return turned(method, cast(), updates, lambda step, number, repeat: batch(1000 * step + 10 * number + repeat))


def test_without_a_weight_it_is_dmd2_bit_for_bit() -> None:
    common: dict[str, Any] = {"steps": STEPS, "gan": Gan(), "critic": Critic(steps=2), "share_rollout": True}
    plain, anchored = trained(DMD2(**common)), trained(DMD2(**common, first_step=FirstStep(weight=0.0)))
    assert plain[0] == anchored[0]
    assert all(torch.equal(v, anchored[1][k]) for k, v in plain[1].items())
    assert trained(DMD2(**common, first_step=FirstStep()))[0] != plain[0]


def test_the_target_is_the_velocity_to_the_teachers_state() -> None:
    # x0 = gain x + offset: each Euler step is affine, and so are the state and the velocity of the paper's loss.
    roles = Roles(teacher=Listening(FLOW, 0.5, 0.2), student=Listening(FLOW, 0.3, -0.1))
    part = FirstStep(weight=0.7, level=0.4, teacher_steps=3)
    loss = part.loss(roles, batch_of(4), 1.0, 1.0)
    e = batch_of(4).noise()
    z, t = e, 1.0
    for s in (0.8, 0.6, 0.4):
        z, t = z + (s - t) * (z - (0.5 * z + 0.2)) / t, s
    velocity, wanted = e - (0.3 * e - 0.1), (e - z) / (1 - 0.4)
    assert float(loss.detach()) == pytest.approx(0.7 * float(((velocity - wanted) ** 2).mean().detach()), rel=1e-12)
    assert len(roles.teacher.times) == 3
    assert not any(roles.teacher.graphs)
    # Twice the guidance asks twice: the label's part of the teacher's answer is doubled, null being label 0.
    labels = {"cond": torch.tensor([1, 2, 3, 4]), "null_cond": torch.zeros(4, dtype=torch.long)}
    one, two = (float(part.loss(roles, batch_of(4, **labels), 1.0, w).detach()) for w in (1.0, 2.0))
    assert abs(one - two) > 1e-3


@pytest.mark.parametrize("process", [Flow(), EDM()])
def test_the_loss_is_zero_where_the_first_step_ends_in_the_teachers_state(process: Any) -> None:
    roles = players(process, mean=0.0, std=1.0)
    part = FirstStep(weight=1.0, level=0.6, teacher_steps=7)

    class Perfect(nn.Module):
        """The chord to the teacher's state, from whatever noise."""

        inputs: tuple[str, ...] = ()
        takes_s = False

        def __init__(self) -> None:
            super().__init__()
            self.process = process

        def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Any:
            s = process.grid(torch.full_like(t, 0.6))
            z = Teacher(roles.teacher, batch64(6)).walk(7)(x, t, s)
            made = from_x0(process, x, t, chord_x0(process, x, t, z, s))
            torch.testing.assert_close(made.at(s), z, rtol=1e-9, atol=1e-9)
            return made

    there = Roles(teacher=roles.teacher, student=Perfect())
    assert float(part.loss(there, batch64(6), 1.0, 1.0)) < 1e-20
    assert float(part.loss(roles, batch64(6), 1.0, 1.0).detach()) > 1e-3


def test_matching_leaves_the_first_step_alone_and_the_regression_the_others() -> None:
    for key in range(6):
        student = Routed([net(2), net(6)], ByTime(FLOW, (0.75,)))
        roles = cast(student)
        method = DMD2(steps=STEPS, gan=None, path="map", first_step=FirstStep())
        (losses,) = next(method.turns(roles, 0)).losses(batch(key))
        first, later = (list(m.parameters()) for m in student.members)
        match = torch.autograd.grad(losses["match"], first + later, retain_graph=True, allow_unused=True)
        anchor = torch.autograd.grad(losses["first_step"], first + later, allow_unused=True)
        assert all(g is None or not g.any() for g in match[: len(first)])
        assert any(g is not None and g.any() for g in match[len(first) :])
        assert any(g is not None and g.any() for g in anchor[: len(first)])
        assert all(g is None or not g.any() for g in anchor[len(first) :])


def test_the_critic_sees_the_samples_that_are_matched() -> None:
    method = DMD2(steps=(1.0, 0.4), gan=None, first_step=FirstStep(level=0.6))
    roles = Roles(**{n: Listening(FLOW, 0.3, -0.1) for n in ("teacher", "student", "critic")})
    turns = list(method.turns(roles, 0))
    for key in range(5):
        roles.student.times.clear()
        list(turns[1].losses(batch_of(3, key=key)))
        assert [float(t[0]) for t in roles.student.times] == [1.0, 0.4]


def test_a_path_without_fresh_noise_goes_on_with_the_noise_that_was_predicted() -> None:
    student, draws = Listening(FLOW, 0.3, -0.1), batch_of(4).draws
    made = rollout(student, draws, (2,), (1.0, 0.5), exit=1, path="map")
    e = batch_of(4).noise()
    x0 = 0.3 * e - 0.1
    torch.testing.assert_close(made.x_in, (0.5 * x0 + 0.5 * e).detach(), rtol=1e-12, atol=0)
    assert draws._calls == 1
    again = batch_of(4).draws
    renoised = rollout(student, again, (2,), (1.0, 0.5), exit=1).x_in
    other = batch_of(4)
    other.noise()
    torch.testing.assert_close(renoised, add_noise(FLOW, x0, other.noise(), torch.full((4,), 0.5, dtype=F64))[0].detach())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": (1.0,)}, "no second one to match"),
        ({"steps": (0.8, 0.4), "first_step": FirstStep(level=0.9)}, "must lie below the first step 0.8"),
        ({"simulate": RandomSteps()}, "needs fixed levels of steps"),
    ],
)
def test_levels_that_leave_nothing_to_match_are_refused(change: dict[str, Any], message: str) -> None:
    given = {"steps": STEPS, "first_step": FirstStep(), **change}
    with pytest.raises(ValueError, match=message):
        DMD2(gan=None, **given)
    DMD2(gan=None, **{**given, "first_step": FirstStep(weight=0.0)})


def test_the_paper_is_cited() -> None:
    assert "2602.03139" in cite("toy/dp-dmd")
    assert "2602.03139" not in cite("toy/dmd2")
