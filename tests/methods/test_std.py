"""STD's asymmetric adversarial term: what the discriminator is shown, and at which level."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.noising import add_noise
from fewstep.algebra.process import Flow
from fewstep.methods import std
from fewstep.methods.bank import Bank
from fewstep.methods.gan import Gan
from fewstep.methods.std import STD
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.mlp import MLP
from fewstep.networks.roles import Roles
from fewstep.recipe.store import load

B, KNOTS = 64, 20


class Judge(nn.Module):
    """One logit, the mean of x times a weight; it remembers what it saw."""

    taps = ()

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        self.seen.append((x, t))
        return self.weight * x.mean(1, keepdim=True)


def net(seed: int, inputs: tuple[str, ...] = ()) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(MLP(2, 12, 3, inputs=inputs), Flow(), "velocity", "angle")


def cast() -> Roles:
    roles = Roles(teacher=net(1), student=net(2, ("s",)), discriminator=Judge())
    return roles.with_state(Bank(B, (2,)))


def batch() -> Batch:
    x0 = 5 + Draws(fold("std data"), torch.arange(B)).normal(2)
    return Batch(Draws(fold("std"), torch.arange(B)), (2,), x0)


GAN = Gan(weight=0.1, discriminator_weight=1.0, loss="hinge")


def test_real_data_are_at_a_level_below_that_of_the_jump_and_told_to_be_at_its(monkeypatch: pytest.MonkeyPatch) -> None:
    roles, levels = cast(), []

    def seen(process: Any, x: Tensor, noise: Tensor, t: Tensor) -> Any:
        levels.append(t)
        return add_noise(process, x, noise, t)

    monkeypatch.setattr(std, "add_noise", seen)
    turn = list(STD(knots=KNOTS, gan=GAN).turns(roles, 0))[1]
    assert turn.updates == ("discriminator",)
    (losses,) = list(turn.losses(batch()))
    losses.total().backward()
    (jump, s), (real, told) = roles.discriminator.seen
    r = levels[-1]
    assert torch.equal(told, s)
    assert (s.double() * KNOTS).round().max() < STD(knots=KNOTS).first
    assert (r <= s).all()
    assert (r < s).double().mean() > 0.6  # equal only at the clean end
    # Data at level r are (1 - r) 5 on average.
    assert ((real.mean(1) - 5 * (1 - r)).abs() < 4 * (1 + r)).all()
    assert all(p.grad is None for p in roles.student.parameters())
    assert roles.discriminator.weight.grad is not None
    assert not jump.requires_grad


def test_the_student_is_judged_by_the_jump_that_it_is_trained_on() -> None:
    method, roles = STD(knots=KNOTS, gan=GAN), cast()
    (losses,) = list(next(method.turns(roles, 0)).losses(batch()))
    ((jump, s),) = roles.discriminator.seen
    assert losses["gan"].item() == pytest.approx(-0.1 * (0.7 * jump.mean(1)).mean().item(), rel=1e-5)
    assert (s >= 1e-3).all()
    plain = cast()
    (alone,) = list(next(STD(knots=KNOTS).turns(plain, 0)).losses(batch()))
    assert torch.equal(alone["consistency"], losses["consistency"])
    assert set(alone) == {"consistency"}
    losses["gan"].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in roles.student.parameters())


def test_what_it_asks_for() -> None:
    assert STD(gan=GAN).needs().roles == {"teacher", "student", "discriminator"}
    assert STD(gan=GAN).needs().teacher_grad
    assert STD().needs().roles == {"teacher", "student"}
    assert not STD().needs().teacher_grad
    with pytest.raises(ValueError, match="no critic trains beside the discriminator"):
        STD(gan=Gan(shares_noise=True))
    with pytest.raises(ValueError, match=r"gan\.times: the levels of this method"):
        STD(gan=Gan(times=None))
    recipe = load("digits-std-i2i")
    assert recipe.discriminator is not None
    assert recipe.discriminator.trunk == "teacher"
    assert recipe.sampler().steps == (0.75, 0.5, 0.25)
