"""The critic and the discriminator as parts: what a turn trains, where the discriminator looks, its R1."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fewstep import objectives as obj
from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.process import EDM, Flow
from fewstep.algebra.times import Levels, Uniform
from fewstep.methods.critic import Critic
from fewstep.methods.ctm import CTM
from fewstep.methods.decoupled_dmd import DecoupledDMD
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.f_distill import FDistill, RatioBins
from fewstep.methods.gan import Gan, accuracy
from fewstep.methods.gdd import GDD
from fewstep.methods.imagine_flash import ImagineFlash
from fewstep.methods.segments import Segments
from fewstep.methods.sid import SiD
from fewstep.methods.trunk import with_trunk
from fewstep.methods.uni_instruct import UniInstruct
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.heads import Discriminator
from fewstep.networks.mlp import MLP
from fewstep.networks.roles import Roles

B, CLASSES = 7, 5


def net(seed: int) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(MLP(2, 12, 3, CLASSES), Flow(), "velocity", "angle")


def cast() -> Roles:
    critic = net(3)
    example = (torch.zeros(1, 2), torch.full((1,), 0.5), torch.zeros(1, dtype=torch.long))
    torch.manual_seed(4)
    heads = Discriminator(critic, ("mid",), example, 7)
    return Roles(teacher=net(1), student=net(2), critic=critic, discriminator=heads).with_state(RatioBins(10))


def batch(key: int = 11) -> Batch:
    x0 = Draws(fold("data"), torch.arange(B)).normal(2)
    cond, null = torch.arange(B) % CLASSES, torch.full((B,), CLASSES)
    return Batch(Draws(fold(key), torch.arange(B)), (2,), x0, cond, null)


def passes(module: Any, call: Any) -> int:
    """How often a denoiser's network runs in call(), whole or up to a feature."""
    seen: list[int] = []
    handle = module.net.register_forward_hook(lambda *_: seen.append(1))
    call()
    handle.remove()
    return len(seen)


def critic_turn(method: Any, roles: Roles) -> dict[str, torch.Tensor]:
    turn = next(t for t in method.turns(roles, 0) if "critic" in t.updates)
    assert turn.updates == ("critic", "discriminator")
    (losses,) = list(turn.losses(batch()))
    return losses


WITH_CRITIC = {
    "dmd2": DMD2(), "sid": SiD(gan=Gan()), "f_distill": FDistill(), "uni_instruct": UniInstruct(),
    "ctm": CTM(gan=Gan(), target_decay=None), "segments": Segments(gan=Gan(), knots=8), "imagine_flash": ImagineFlash(),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(WITH_CRITIC))
def test_sharing_the_noise_spares_a_pass_of_the_critic_and_keeps_the_terms(name: str):
    method, roles = WITH_CRITIC[name], cast()
    method, shared = (replace(method, gan=replace(method.gan, shares_noise=on)) for on in (False, True))
    apart = passes(roles.critic, lambda: critic_turn(method, roles))
    assert (apart, passes(roles.critic, lambda: critic_turn(shared, roles))) == (3, 2)
    assert "discriminator" in critic_turn(shared, roles)
    assert len(critic_turn(shared, roles)) == len(critic_turn(method, roles)) == 2


def test_shared_noise_judges_fakes_and_data_at_the_critic_s_levels():
    roles, seen = cast(), []
    gan = Gan(shares_noise=True, times=Levels(at=(0.9,)))
    handle = roles.discriminator.register_forward_pre_hook(lambda _m, args: seen.append(args[1]))
    Critic(times=Levels(at=(0.25,))).losses(roles, batch(), torch.randn(B, 2), gan)
    handle.remove()
    assert len(seen) == 1  # the fakes' logits come from the critic's own call
    assert (seen[0] == 0.25).all()
    seen.clear()
    handle = roles.discriminator.register_forward_pre_hook(lambda _m, args: seen.append(args[1]))
    Critic(times=Levels(at=(0.25,))).losses(roles, batch(), torch.randn(B, 2), replace(gan, shares_noise=False))
    handle.remove()
    assert [float(t.unique()) for t in seen] == [0.9, 0.9]


def test_the_critic_s_term_is_denoising_score_matching_and_no_gradient_reaches_the_samples():
    roles = cast()
    x = torch.randn(B, 2, requires_grad=True)
    part = Critic(times=Uniform(low=0.1, high=0.8), weight="eps")
    got = part.losses(roles, batch(), x)
    same = batch()
    t, eps = part.times.sample(same.draws, Flow()), same.noise()
    wanted = obj.dsm(roles.critic, x.detach(), t, eps, same.cond, weight="eps")
    assert list(got) == ["dsm"]
    assert torch.equal(got["dsm"], wanted)
    got.total().backward()
    assert x.grad is None


def test_conditions_are_dropped_and_samples_keep_the_conditions_that_they_were_made_under():
    roles, seen = cast(), []
    roles.critic.register_forward_pre_hook(lambda _m, args: seen.append(args[2]))
    x, mine = torch.randn(B, 2), batch()
    made = replace(mine, cond=(mine.cond + 2) % CLASSES)
    Critic().losses(roles, mine, x, fakes=made)
    Critic().losses(roles, mine, x, drop_cond=1.0)
    assert torch.equal(seen[0], made.cond)
    assert (seen[1] == CLASSES).all()
    looked: list[torch.Tensor] = []
    roles.discriminator.register_forward_pre_hook(lambda _m, args: looked.append(args[2]))
    Critic().losses(roles, mine, x, Gan(), fakes=made)
    assert torch.equal(looked[0], made.cond)
    assert torch.equal(looked[1], mine.cond)


def test_without_levels_the_discriminator_sees_clean_samples_at_the_lowest_level():
    roles, x = cast(), torch.randn(B, 2)
    seen, tau = Gan(times=None).shown(roles, batch(), x)
    assert seen is x
    assert (tau == 1e-3).all()
    edm = Roles(student=Denoiser(nn.Identity(), EDM(), "edm", "angle"))
    assert float(Gan(times=None).shown(edm, batch(), x)[1].max()) < 0.003
    # The trunk still denoises, at all levels.
    terms = with_trunk(Gan(times=None), roles, batch(), x)
    assert set(terms) == {"discriminator", "denoise"}


class Quadratic(nn.Module):
    """One logit |x|^2 / 2, whose squared gradient is |x|^2."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Any = None) -> torch.Tensor:
        return 0.5 * (x**2).sum(1, keepdim=True)


@pytest.mark.parametrize("factor", [0.0, 1.0, 16.0])
def test_exact_r1_is_the_weighted_squared_gradient(factor: float):
    roles, seen = Roles(discriminator=Quadratic()), torch.randn(B, 2)
    gan = Gan(discriminator_weight=1.0, r1="exact", r1_weight=0.005)
    losses = gan.judge(roles, batch(), torch.zeros(B, 1), seen, torch.zeros(B), factor)
    if not factor:
        assert set(losses) == {"discriminator"}
        return
    # GDD's lazy R1: gamma / 2 = 0.005 of |grad|^2, as many times as large as it is rare.
    torch.testing.assert_close(losses["r1"], factor * 0.005 * (seen**2).sum(1).mean())


def test_gdd_takes_r1_every_so_many_steps():
    roles = cast()
    method = GDD(r1_every=3)
    for step in range(7):
        turn = list(method.turns(roles, step))[1]
        (losses,) = list(turn.losses(batch()))
        assert ("r1" in losses) == (step % 3 == 0)


def test_accuracy_counts_signs():
    real, fake = torch.tensor([[1.0], [-1.0], [2.0], [3.0]]), torch.tensor([[-1.0], [1.0], [1.0], [1.0]])
    assert float(accuracy(real, fake)) == (0.75 + 0.25) / 2


def test_decoupled_dmd_of_a_gan_trains_the_discriminator_alone_as_often_as_the_critics_steps_say():
    method = DecoupledDMD(regularizer="gan", critic=Critic(steps=4))
    turn = list(method.turns(cast(), 0))[1]
    assert (turn.updates, turn.times) == (("discriminator",), 4)
