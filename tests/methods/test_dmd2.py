"""DMD2's own terms in closed form: the guided gradient, the adversarial losses, whose condition a shared sample has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distribution_cases import LogRatio, players
from listening import F64, Listening, batch_of
from torch import Tensor

from fewstep.algebra.noising import add_noise
from fewstep.algebra.process import Flow
from fewstep.algebra.times import Fading, FadingBeta, Levels
from fewstep.config import RecipeError
from fewstep.methods.critic import Critic
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.gan import Gan
from fewstep.networks.roles import Roles
from fewstep.recipe.store import load

FLOW = Flow()


class Watched(LogRatio):
    """Remembers the conditions that it was given."""

    def __init__(self, student: Any) -> None:
        super().__init__(student)
        self.conds: list[Any] = []

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        self.conds.append(cond)
        return super().forward(x, t, cond)


def cast() -> Roles:
    return Roles(
        teacher=Listening(FLOW, 0.5, 0.2),
        student=Listening(FLOW, 0.3, -0.1),
        critic=Listening(FLOW, 0.4, 0.6),
        discriminator=Watched(players(mean=-0.5, std=0.9).student),
    )


def labels(*values: int) -> dict[str, Tensor]:
    return {"cond": torch.tensor(values), "null_cond": torch.zeros(len(values), dtype=torch.long)}


def test_a_shared_sample_keeps_the_condition_that_it_was_made_under():
    roles = cast()
    method = DMD2(share_rollout=True, gan=Gan(), critic=Critic(steps=2))
    first, second = labels(1, 2, 3), labels(4, 5, 6)
    turns = method.turns(roles, 0)
    list(next(turns).losses(batch_of(3, key=1, **first)))
    turn = next(turns)
    for role in (roles.critic, roles.student, roles.discriminator):
        role.conds.clear()
    list(turn.losses(batch_of(3, key=2, **second)))
    assert roles.student.conds == []
    assert [c.tolist() for c in roles.critic.conds] == [[1, 2, 3]]
    # The fake look, then the real one.
    assert [c.tolist() for c in roles.discriminator.conds] == [[1, 2, 3], [4, 5, 6]]
    list(turn.losses(batch_of(3, key=2, **second)))
    assert [c.tolist() for c in roles.student.conds] == [[4, 5, 6]]
    assert roles.critic.conds[1].tolist() == roles.discriminator.conds[2].tolist() == [4, 5, 6]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_gradient_is_the_guided_difference_over_the_teachers_distance(guidance: float):
    roles, x = cast(), torch.linspace(-2, 3, 6, dtype=F64).reshape(3, 2) * torch.tensor([[1.0], [5.0], [0.2]])
    method = DMD2(guidance=guidance, gan=None)
    found = method.gradient(roles, batch_of(3, **labels(1, 2, 3)), x)
    again = batch_of(3)
    tau = method.times.sample(again.draws, FLOW)
    x_tau, _ = add_noise(FLOW, x, again.noise(), tau)
    label = torch.tensor([[1.0], [2.0], [3.0]])
    # Null is label 0: guidance multiplies the label's part of the teacher's answer, never the critic's.
    real, fake = 0.5 * x_tau + 0.2 + guidance * label, 0.4 * x_tau + 0.6 + label
    wanted = (fake - real) / (x - real).abs().mean(1, keepdim=True)
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-12, atol=0)


def test_the_students_turn_is_the_surrogate_of_its_gradient_and_the_weighted_adversarial_loss():
    roles, method = cast(), DMD2(gan=Gan(weight=0.3, discriminator_weight=0.7))
    (losses,) = method.student_losses(roles, batch_of(4))
    assert set(losses) == {"match", "gan"}
    again = batch_of(4)
    x = 0.3 * again.noise() - 0.1  # one step from the prior
    gradient = method.gradient(roles, again, x)
    assert float(losses["match"].detach()) == pytest.approx(float((gradient**2).mean() / 2), rel=1e-12)
    t = method.gan.times.sample(again.draws, FLOW)  # type: ignore[union-attr]
    logit = roles.discriminator(add_noise(FLOW, x, again.noise(), t)[0], t)
    assert float(losses["gan"].detach()) == pytest.approx(0.3 * float(F.softplus(-logit).mean()), rel=1e-12)
    # Down the gradient, and up the logit.
    (slope,) = torch.autograd.grad(losses["match"], roles.student.offset, retain_graph=True)
    assert float(slope) == pytest.approx(float(gradient.mean()), rel=1e-12)
    assert float(torch.autograd.grad(losses["gan"], roles.student.offset)[0].abs()) > 1e-6


def test_the_critics_turn_denoises_and_judges_with_its_weight():
    at = Levels(at=(0.4,))
    roles, method = cast(), DMD2(gan=Gan(weight=0.3, discriminator_weight=0.7, times=at), critic=Critic(times=at))
    (losses,) = method.critic_losses(roles, batch_of(4))
    assert set(losses) == {"dsm", "discriminator"}
    again = batch_of(4)
    x, t = 0.3 * again.noise() - 0.1, torch.full((4,), 0.4, dtype=F64)

    def seen(clean: Tensor) -> Tensor:
        method.critic.times.sample(again.draws, FLOW)
        return add_noise(FLOW, clean, again.noise(), t)[0]

    error = 0.4 * seen(x) + 0.6 - x
    assert float(losses["dsm"].detach()) == pytest.approx(float((error**2).mean()), rel=1e-12)
    fake, real = roles.discriminator(seen(x), t), roles.discriminator(seen(again.data()), t)
    wanted = 0.7 * float(F.softplus(fake).mean() + F.softplus(-real).mean())
    assert float(losses["discriminator"].detach()) == pytest.approx(wanted, rel=1e-12)


class Leaning(Listening):
    """A critic whose adapter adds its scale to the answer."""

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, *, adapter_scale: float = 1.0, **call: Any) -> Any:
        found = super().forward(x, t, cond, **call)
        return replace(found, x0=found.x0 + adapter_scale)


@pytest.mark.parametrize(("step", "share"), [(0, 0.75), (5, 0.375), (10, 0.0), (99, 0.0)])
def test_the_real_score_leans_on_the_critics_adapter_until_it_is_the_teachers(step: int, share: float):
    roles, x = cast(), torch.linspace(-2, 3, 6, dtype=F64).reshape(3, 2)
    roles = Roles(teacher=Listening(FLOW, 0.4, 0.6), student=roles.student, critic=Leaning(FLOW, 0.4, 0.6))
    method = DMD2(gan=None, lean=Fading(start=0.75, over=10), times=Levels(at=(0.5,)))
    batch = replace(batch_of(3), step=step)
    found = method.gradient(roles, batch, x)
    again = batch_of(3)
    method.times.sample(again.draws, FLOW)  # type: ignore[attr-defined]
    x_tau = 0.5 * x + 0.5 * again.noise()
    real = 0.4 * x_tau + 0.6 + share
    wanted = (0.4 * x_tau + 0.6 + 1 - real) / (x - real).abs().mean(1, keepdim=True)
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-12, atol=0)
    assert len(roles.teacher.conds) == (share == 0)


def test_the_curriculum_follows_the_steps_of_the_stage():
    roles, x = cast(), torch.zeros(400, 2, dtype=F64)
    method = DMD2(gan=None, times=FadingBeta(start=(8.0, 1.0), over=10))
    for step, mean in ((0, 8 / 9), (10, 0.5)):
        roles.teacher.times.clear()
        method.gradient(roles, replace(batch_of(400), step=step), x)
        assert float(roles.teacher.times[0].mean()) == pytest.approx(mean, abs=0.03)


def test_leaning_needs_an_adapter_of_the_teacher():
    with pytest.raises(
        RecipeError, match=r"method\.lean: .* so the critic must be one: critic: \{name: lora, of: teacher\}"
    ):
        load("digits-dmd2", ["method.lean={over: 100}"])
    load("digits-dmd2", ["method.lean={over: 100}", "critic={name: lora, of: teacher}"])
