"""SiD's guided critic (LSG) and the adversarial loss of SiDA and Uni-Instruct, in the released units."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws
from fewstep.algebra.noising import add_noise
from fewstep.algebra.prediction import Prediction, from_x0
from fewstep.algebra.process import EDM
from fewstep.algebra.times import LogNormal
from fewstep.config import Source, validate
from fewstep.methods.critic import Critic
from fewstep.methods.gan import Gan
from fewstep.methods.sid import SiD
from fewstep.methods.uni_instruct import UniInstruct
from fewstep.networks.roles import Roles

F64 = torch.float64
ROWS, SHAPE = 6, (3, 2, 4)


class Told(nn.Module):
    """x0 = gain x + offset label: linear, so that every guided answer is known."""

    inputs, takes_s, taps = (), False, ()

    def __init__(self, gain: float, offset: float) -> None:
        super().__init__()
        self.process = EDM()
        self.gain = nn.Parameter(torch.tensor(gain, dtype=F64))
        self.offset = nn.Parameter(torch.tensor(offset, dtype=F64))
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        self.calls += 1
        label = cond.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
        return from_x0(self.process, x, t, self.gain * x / (1 + t.reshape(label.shape)) + self.offset * label)


class Logit(nn.Module):
    """One logit, a mean of x, so large in some rows that the released clamp bites."""

    taps = ("x",)

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return 40 * x.flatten(1).mean(1, keepdim=True)

    def logits(self, features: Any) -> Tensor:
        raise AssertionError("the student's turn has no features of the critic's turn")


def players() -> Roles:
    return Roles(student=Told(0.3, 0.2), teacher=Told(0.5, 0.7), critic=Told(0.4, -0.3), discriminator=Logit())


def batch_of(key: int = 5) -> Batch:
    label = torch.arange(ROWS) % 3 + 1
    x0 = torch.randn(ROWS, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=F64)
    return Batch(Draws(key, torch.arange(ROWS)), SHAPE, x0, label, torch.zeros_like(label))


def test_a_guided_critic_is_guided_in_the_loss_and_through_both_halves():
    roles, batch = players(), batch_of()
    x = torch.randn(ROWS, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=F64)
    method = SiD(alpha=1.0, guidance=2.0, guide_critic=(1.5, 3.0), normalize=False)
    found = method.loss(roles, batch, x)["match"]
    again = batch_of()
    tau = method.times.sample(again.draws, EDM())
    x_tau, _ = add_noise(EDM(), x, again.noise(), tau)
    # Null is label 0, so a guided answer has `scale` times the offset.
    label = batch.cond.to(F64).reshape(-1, 1, 1, 1)
    level = 1 + tau.reshape(-1, 1, 1, 1)
    real, fake = 0.5 * x_tau / level + 2 * 0.7 * label, 0.4 * x_tau / level - 3 * 0.3 * label
    # alpha = 1: (D_real - D_fake)(D_fake - x), as SiD-LSG's script has it.
    assert float(found.detach()) == pytest.approx(float(((real - fake) * (fake - x)).mean().detach()), rel=1e-12)
    unguided = SiD(alpha=1.0, guidance=2.0, normalize=False).loss(roles, batch_of(), x)["match"]
    assert float(unguided.detach()) != pytest.approx(float(found.detach()), rel=1e-3)


def test_a_guided_critic_trains_at_its_own_scale_and_loses_one_condition_in_ten():
    roles = players()
    method = SiD(guide_critic=(1.5, 3.0), critic=Critic(weight="x0"))
    (losses,) = method.critic_losses(roles, batch_of())
    (slope,) = torch.autograd.grad(losses["dsm"], roles.critic.offset)
    # Guided by 1.5 the answer holds 1.5 times the offset, and so does its derivative; a dropped row holds none.
    twin = players()
    twin.critic.offset.data *= 1.5
    (plain,) = SiD(guide_critic=(1.0, 3.0), critic=Critic(weight="x0")).critic_losses(twin, batch_of())
    (slope_of_twin,) = torch.autograd.grad(plain["dsm"], twin.critic.offset)
    assert float(losses["dsm"]) == pytest.approx(float(plain["dsm"]), rel=1e-12)
    assert float(slope) == pytest.approx(1.5 * float(slope_of_twin), rel=1e-12)
    # Unguided, the critic makes one call of the batch and draws no dropping.
    alone = players()
    list(SiD().critic_losses(alone, batch_of()))
    assert alone.critic.calls == 1


@pytest.mark.parametrize(
    "method",
    [
        SiD(gan=Gan(weight=1e-4, discriminator_weight=0.033, times=LogNormal(), shares_noise=True)),
        UniInstruct(),
    ],
    ids=["sida", "uni-instruct"],
)
def test_the_adversarial_loss_stands_at_the_score_terms_sample_over_its_omega(method: Any):
    roles, batch = players(), batch_of()
    x = torch.randn(ROWS, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=F64).requires_grad_(True)
    found = method.loss(roles, batch, x)["gan"]
    again = batch_of()
    tau = method.times.sample(again.draws, EDM())
    x_tau, _ = add_noise(EDM(), x, again.noise(), tau)
    omega = (x - roles.teacher(x_tau, tau, batch.cond).x0).abs().flatten(1).mean(1).detach()
    # sida_loss.py: BCE with ones of logits within +-10, a mean, over omega; .01 of 100 on means instead of sums.
    logit = roles.discriminator(x_tau, tau)
    assert float(logit.detach().abs().max()) > 10
    bce = F.binary_cross_entropy_with_logits(logit.clamp(-10, 10), torch.ones_like(logit))
    want = 1e-4 * bce * (1 / omega).mean()
    assert float(found.detach()) == pytest.approx(float(want.detach()), rel=1e-12)
    (ours,), (theirs,) = torch.autograd.grad(found, x, retain_graph=True), torch.autograd.grad(want, x)
    assert torch.allclose(ours, theirs, rtol=1e-10, atol=0)
    assert float(theirs.abs().max()) > 0


def test_released_weights_are_those_of_sums_on_means():
    # E[edm weight] = exp(2.4 + 2.88) + 4 under ln sigma ~ N(-1.2, 1.2^2); halved and divided by d.
    t = torch.exp(-1.2 + 1.2 * torch.randn(4_000_000, generator=torch.Generator().manual_seed(0), dtype=F64))
    expected = 2.718281828**5.28 + 4
    assert float((1 / t**2 + 4).median()) < expected  # heavy-tailed: its mean is no typical value
    gan = UniInstruct().gan
    assert gan.discriminator_weight == pytest.approx(expected / (2 * 3 * 32 * 32), rel=0.02)
    assert gan.weight == 0.01 / 100
    assert (gan.times, gan.shares_noise) == (LogNormal(mean=-1.2, std=1.2), True)


def test_a_fresh_look_is_undivided_and_a_key_keeps_the_methods_other_ones():
    method = validate(UniInstruct, Source({"adversary_at": "fresh", "gan": {"weight": 1e-2}}, {}))
    assert (method.gan.weight, method.gan.discriminator_weight, method.gan.shares_noise) == (
        1e-2,
        0.033,
        True,
    )
    roles, x = players(), torch.full((ROWS, *SHAPE), 0.1, dtype=F64)
    found = method.loss(roles, batch_of(), x)["gan"]
    again = batch_of()
    method.times.sample(again.draws, EDM()), again.noise()
    t = method.gan.times.sample(again.draws, EDM())
    logit = roles.discriminator(add_noise(EDM(), x, again.noise(), t)[0], t)
    assert float(found) == pytest.approx(1e-2 * float(F.softplus(-logit).mean()), rel=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_gradient_flows_through_the_noised_sample(normalize: bool):
    roles, batch = players(), batch_of()
    spread = torch.tensor([1.0, 30.0, 0.1, 1.0, 1.0, 5.0], dtype=F64).reshape(-1, 1, 1, 1)
    x = spread * torch.randn(ROWS, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=F64)
    x.requires_grad_()
    method = SiD(alpha=1.2, normalize=normalize, loss_scale=2.0)
    found = method.loss(roles, batch, x)["match"]
    again = batch_of()
    tau = method.times.sample(again.draws, EDM()).reshape(-1, 1, 1, 1)
    label = batch.cond.to(F64).reshape(-1, 1, 1, 1)
    x_tau = x + tau * again.noise()
    real, fake = 0.5 * x_tau / (1 + tau) + 0.7 * label, 0.4 * x_tau / (1 + tau) - 0.3 * label
    value = ((real - fake) * (real - x) - 1.2 * (real - fake) ** 2).flatten(1).mean(1)
    # Each sample over its own distance from the teacher's answer, which is held fixed.
    omega = (x - real).abs().flatten(1).mean(1).detach() if normalize else torch.ones(ROWS, dtype=F64)
    wanted = 2 * (value / omega).mean()
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-10)
    (ours,), (theirs,) = torch.autograd.grad(found, x), torch.autograd.grad(wanted, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)
