"""Methods that must coincide for a setting: the same gradient of the same networks on the same draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from distribution_cases import batch64, gradient_of
from torch import Tensor, nn
from torch.nn.functional import softplus

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.noising import add_noise
from fewstep.algebra.process import Flow
from fewstep.algebra.rollout import rollout
from fewstep.algebra.times import LogitNormal, Uniform
from fewstep.config import REGISTRY
from fewstep.data.toy import Ring
from fewstep.methods.critic import Critic
from fewstep.methods.decoupled_dmd import DecoupledDMD
from fewstep.methods.denoise import Denoise
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.emd import EMD
from fewstep.methods.f_distill import FDistill, RatioBins
from fewstep.methods.gan import Gan
from fewstep.methods.gdd import GDD
from fewstep.methods.joint import Joint, Share
from fewstep.methods.ladd import LADD
from fewstep.methods.phased_dmd import PhasedDMD
from fewstep.methods.vsd import VSD
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.heads import Discriminator
from fewstep.networks.mlp import MLP
from fewstep.networks.roles import Roles
from fewstep.networks.routed import ByClass, ByTime, Routed
from fewstep.objectives import inverse_matching
from fewstep.objectives.regression import per_sample

B, CLASSES = 13, 5


def net(seed: int) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(MLP(2, 12, 3, CLASSES), Flow(), "velocity", "angle")


def cast(**extra: nn.Module) -> Roles:
    """Four different small networks, with heads on the critic."""
    critic = net(3)
    example = (torch.zeros(1, 2), torch.full((1,), 0.5), torch.zeros(1, dtype=torch.long))
    torch.manual_seed(4)
    heads = Discriminator(critic, ("mid",), example, 7)
    modules: dict[str, nn.Module] = {
        "teacher": net(1),
        "student": net(2),
        "critic": critic,
        "discriminator": heads,
    }
    return Roles(**{**modules, **extra})


def batch(key: int = 11) -> Batch:
    cond = torch.arange(B) % CLASSES
    x0 = Draws(fold("data"), torch.arange(B)).normal(2)
    null = torch.full((B,), CLASSES)
    return Batch(Draws(fold(key), torch.arange(B)), (2,), x0, cond, null)


def cast64() -> Roles:
    """`cast` in float64."""
    roles = cast()
    for module in roles.values():
        module.double()
    return roles


def double(key: int) -> Batch:
    """A batch whose noise is float64."""
    return batch64(B, key, (2,), cond=torch.arange(B) % CLASSES, null_cond=torch.full((B,), CLASSES))


def same(
    a: Any,
    b: Any,
    roles: Roles,
    other: Roles | None = None,
    role: str = "student",
    make: Callable[[int], Batch] = batch,
    **tol: float,
) -> None:
    """Equal gradients, bit for bit unless a tolerance is given, on several steps' draws."""
    for key in (1, 2, 3):
        left = gradient_of(a, roles, make(key), role)
        right = gradient_of(b, other or roles, make(key), role)
        assert left.abs().max() > 1e-6
        if tol:
            torch.testing.assert_close(left, right, **tol)
        else:
            assert torch.equal(left, right)


def test_phased_dmd_of_one_phase_is_dmd2_without_gan():
    dmd2 = DMD2(gan=None, guidance=2.5, critic=Critic(times=Uniform(low=0.02, high=1.0), weight="psi"))
    phased = PhasedDMD(steps=(1.0,), boundaries=(), guidance=2.5)
    same(phased, dmd2, cast())
    same(phased, dmd2, cast(), role="critic")
    # And a second phase is something else.
    other = PhasedDMD(steps=(1.0, 0.5), boundaries=(0.5,), guidance=2.5)
    roles = cast()
    assert not torch.allclose(gradient_of(other, roles, batch(), "student"), gradient_of(dmd2, roles, batch(), "student"))


@pytest.mark.parametrize("steps", [(1.0,), (1.0, 0.6, 0.3)])
def test_f_distill_of_the_reverse_kl_is_dmd2(steps: tuple[float, ...]):
    dmd2 = DMD2(steps=steps, guidance=1.75, gan=Gan(r1_weight=0.5))
    f = FDistill(steps=steps, guidance=1.75, divergence="rkl", gan=Gan(r1_weight=0.5))
    roles = cast().with_state(RatioBins(10))
    same(f, dmd2, roles)
    same(f, dmd2, roles, role="critic")
    same(f, dmd2, roles, role="discriminator")


def test_a_divergence_with_a_ratio_differs_from_dmd2_and_keeps_its_mean_weight():
    roles = cast().with_state(RatioBins(10))
    a = gradient_of(FDistill(divergence="fkl"), roles, batch(), "student")
    assert not torch.allclose(a, gradient_of(DMD2(), roles, batch(), "student"))
    x, t = torch.randn(B, 2), torch.linspace(0.1, 0.9, B, dtype=torch.float64)
    h = FDistill(divergence="fkl", bins=3).weight(roles.with_state(RatioBins(3)), x, t, None)
    assert torch.isclose(h.mean(), torch.tensor(1.0), atol=1e-6)
    assert h.std() > 1e-3


def test_ratio_bins_average_by_noise_level_and_leave_unseen_bins_alone():
    bins = RatioBins(4)
    ratio = torch.tensor([2.0, 4.0, 10.0])
    place = torch.tensor([1, 1, 3])
    out = bins.normalize(ratio, place, decay=0.5)
    # Bin 1: 0.5 * 1 + 0.5 * 3 = 2; bin 3: 0.5 + 5 = 5.5.
    assert torch.equal(bins.mean, torch.tensor([1.0, 2.0, 1.0, 5.5], dtype=torch.float64))
    torch.testing.assert_close(out, torch.tensor([1.0, 2.0, 10 / 5.5]))


def test_decoupled_dmd_with_everything_shared_is_guided_dmd2():
    dmd2 = DMD2(gan=None, guidance=4.0)
    both = DecoupledDMD(guidance=4.0, schedule="coupled", normalizer="cfg")
    same(both, dmd2, cast(), rtol=2e-5, atol=1e-7)
    same(both, dmd2, cast(), role="critic")
    apart = DecoupledDMD(guidance=4.0, schedule="hybrid")
    roles = cast()
    difference = gradient_of(apart, roles, batch(), "student") - gradient_of(dmd2, roles, batch(), "student")
    assert difference.abs().max() > 1e-4


def test_hybrid_and_full_coincide_for_a_one_step_student():
    # The student's input is pure noise, so no level is cleaner than a constraint.
    same(DecoupledDMD(schedule="hybrid"), DecoupledDMD(schedule="full"), cast())
    same(DecoupledDMD(schedule="constrained"), DecoupledDMD(schedule="full"), cast())
    steps = (1.0, 0.4)
    roles = cast()
    full, hybrid = (DecoupledDMD(schedule=s, steps=steps) for s in ("full", "hybrid"))
    differ = [
        not torch.equal(gradient_of(full, roles, batch(k), "student"), gradient_of(hybrid, roles, batch(k), "student"))
        for k in range(6)
    ]
    assert any(differ)
    assert not all(differ)


def test_augmentation_alone_does_not_see_the_critic():
    method = DecoupledDMD(regularizer="moments")
    assert "critic" not in method.needs().roles
    roles = cast()
    before = gradient_of(method, roles, batch(), "student")
    for p in roles.critic.parameters():
        p.data.add_(1.0)
    assert torch.equal(before, gradient_of(method, roles, batch(), "student"))


def test_the_discriminator_as_regulariser_adds_its_gradient_to_the_augmentations():
    whole = DecoupledDMD(regularizer="gan", guidance=3.0, gan=Gan(weight=40.0))
    engine = DecoupledDMD(regularizer="moments", moments_weight=0.0, guidance=3.0)
    assert whole.needs().data
    assert whole.needs().trained == {"student", "discriminator"}
    roles = cast64()
    for key in (1, 2, 3):
        augmentation = gradient_of(engine, roles, double(key), "student")
        roles.student.zero_grad()
        b = double(key)
        x = rollout(roles.student, b.draws, b.shape, (1.0,), b.cond).x
        b.draws.uniform(), b.noise()  # the augmentation's level and noise come first
        tau = b.draws.uniform()
        logits = roles.discriminator(add_noise(Flow(), x, b.noise(), tau)[0], tau, b.cond)
        (40 * softplus(-logits).mean()).backward()
        alone = [p.grad for p in roles.parameters("student")]
        adversarial = torch.cat([g.flatten() for g in alone if g is not None])
        both = gradient_of(whole, roles, double(key), "student")
        assert min(augmentation.abs().max(), adversarial.abs().max()) > 1e-2
        torch.testing.assert_close(both, augmentation + adversarial, rtol=1e-9, atol=1e-12)
    # The discriminator's turn is its loss on real data and detached samples, and leaves everyone else alone.
    assert gradient_of(whole, cast(), batch(), "discriminator").abs().max() > 1e-4
    held = cast()
    gradient_of(whole, held, batch(), "discriminator")
    assert all(p.grad is None for name in ("teacher", "student") for p in held[name].parameters())


def predictions(seed: int) -> tuple[Any, Any, Tensor]:
    roles = cast()
    torch.manual_seed(seed)
    x = torch.randn(B, 2, requires_grad=True)
    t = torch.linspace(0.1, 0.9, B, dtype=torch.float64)
    x_t = (1 - t.float()[:, None]) * x + t.float()[:, None] * torch.randn(B, 2)
    return roles.teacher(x_t, t), roles.critic(x_t, t), x


def test_sid_with_alpha_one_is_sim_and_half_is_inverse_matching():
    real, fake, x = predictions(5)
    gap = real.x0 - fake.x0
    sim = per_sample(2 * gap * (fake.x0 - x))
    torch.testing.assert_close(2 * inverse_matching(real, fake, x, alpha=1.0), sim)
    c = 0.03
    huber = per_sample(gap * (fake.x0 - x)) / torch.sqrt(per_sample(gap**2) + c**2)
    torch.testing.assert_close(inverse_matching(real, fake, x, alpha=1.0, huber=c), huber)
    matching = per_sample((real.x0 - x) ** 2) - per_sample((fake.x0 - x) ** 2)
    torch.testing.assert_close(2 * inverse_matching(real, fake, x, alpha=0.5), matching)
    # The equality holds for gradients through x and x_t as well.
    a = torch.autograd.grad(2 * inverse_matching(real, fake, x, alpha=0.5).sum(), x, retain_graph=True)[0]
    b = torch.autograd.grad(matching.sum(), x)[0]
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_alpha_and_ratio_may_be_tensors_per_sample():
    real, fake, x = predictions(6)
    alpha, ratio = torch.linspace(0, 1.2, B), torch.linspace(0.5, 2, B)
    whole = inverse_matching(real, fake, x, alpha=alpha, ratio=ratio)
    for i in range(B):
        one = inverse_matching(real, fake, x, alpha=float(alpha[i]), ratio=float(ratio[i]))
        torch.testing.assert_close(whole[i], one[i])


@pytest.mark.parametrize("weight", ["dmd", "kl", "sigma2", "one"])
def test_em_distillation_of_one_step_without_z_is_vsd(weight: str):
    emd = EMD(langevin=1, step_z=0.0, weight=weight, guidance=3.0)
    vsd = VSD(weight=weight, guide_critic=False, guidance=3.0)
    # The chain adds the drift to the noise and takes the noise out again: rounding is all that may differ.
    same(emd, vsd, cast64(), make=double, rtol=1e-9, atol=1e-12)
    same(emd, vsd, cast(), role="critic")
    assert not torch.allclose(
        gradient_of(EMD(langevin=3, weight=weight), cast(), batch(), "student"),
        gradient_of(VSD(weight=weight, guide_critic=False), cast(), batch(), "student"),
    )


def test_multi_student_of_one_is_dmd2():
    alone, single = cast(), Routed([net(2)], ByClass(CLASSES, 1))
    same(DMD2(gan=None), DMD2(gan=None), alone, cast(student=single))


def test_students_of_a_partition_learn_only_from_their_classes():
    pair = Routed([net(2), net(6)], ByClass(CLASSES, 2))
    critics = Routed([net(3), net(7)], ByClass(CLASSES, 2))
    roles = cast(student=pair, critic=critics)
    both = gradient_of(DMD2(gan=None), roles, batch(), "student")
    # Classes 0..2 of five go to the first, 3 and 4 to the second.
    first = batch()
    keep = first.cond < 3
    assert ByClass(CLASSES, 2)(torch.zeros(6), torch.arange(6)).tolist() == [0, 0, 0, 1, 1, 1]
    rows = keep.nonzero()[:, 0]
    part = Batch(Draws(first.draws.key, rows), (2,), first.x0[rows], first.cond[rows], first.null_cond[rows])
    lone = gradient_of(DMD2(gan=None), cast(), part, "student")
    n = lone.numel()
    torch.testing.assert_close(both[:n], lone * len(rows) / B, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("steps", [(1.0,), (1.0, 0.6)])
def test_disback_without_checkpoints_is_dmd2(steps: tuple[float, ...]):
    # DisBack is VSD's turns towards a recorded checkpoint; with none recorded the teacher is the only target.
    dmd2 = DMD2(gan=None, steps=steps, guidance=2.0)
    plain = VSD(weight="dmd", guide_critic=False, critic=Critic(steps=5), steps=steps, guidance=2.0)
    assert plain.needs().roles == dmd2.needs().roles
    same(plain, dmd2, cast())
    same(plain, dmd2, cast(), role="critic")
    roles = cast()
    assert [(t.updates, t.times) for t in plain.turns(roles, 0)] == [(t.updates, t.times) for t in dmd2.turns(roles, 0)]


def test_a_checkpoint_equal_to_the_teacher_changes_nothing_and_another_does():
    twin = cast(degraded=net(1))
    same(VSD(real="degraded"), VSD(), twin)
    assert VSD(real="degraded").needs().trained == {"student", "critic"}
    moved = cast(degraded=net(9))
    assert not torch.equal(
        gradient_of(VSD(real="degraded"), moved, batch(), "student"),
        gradient_of(VSD(), moved, batch(), "student"),
    )


@pytest.mark.parametrize("loss", ["hinge", "logistic"])
@pytest.mark.parametrize("steps", [(1.0,), (1.0, 0.5)])
def test_gdd_on_noised_samples_is_ladd(loss: str, steps: tuple[float, ...]):
    times = LogitNormal(mean=1.0, std=1.0)
    gan = replace(LADD().gan, times=times, loss=loss)
    gdd = GDD(gan=gan, steps=steps)
    ladd = LADD(gan=gan, steps=steps, source="rollout")
    roles = cast()
    same(gdd, ladd, roles)
    same(gdd, ladd, roles, role="discriminator")


def test_frozen_layers_of_gdd_i_are_bit_equal_after_optimiser_steps_and_the_rest_moves():
    roles = cast()
    method = GDD(freeze=("layers", "first"), gan=replace(GDD().gan, r1_weight=0.0))
    before = {n: p.detach().clone() for n, p in roles.student.named_parameters()}
    # Decay and momentum would move a frozen weight whose gradient were zero instead of none.
    adam = {
        role: torch.optim.AdamW(roles.parameters(role), lr=1e-2, weight_decay=0.1)
        for role in ("student", "discriminator")
    }
    for step in range(3):
        for turn in method.turns(roles, step):
            (role,) = turn.updates
            roles.train_only(role)
            adam[role].zero_grad()
            for losses in turn.losses(batch(step)):
                losses.total().backward()
            adam[role].step()
    held = {n for n, p in roles.student.named_parameters() if torch.equal(p, before[n])}
    assert held == {n for n in before if "layers" in n or "first" in n}


def test_joint_training_of_one_is_that_method_and_of_two_is_their_sum():
    a, b = DMD2(gan=None), Denoise(times=Uniform(), weight="x0")
    roles = cast()
    same(Joint(methods=(Share(method=a),)), a, roles)
    same(Joint(methods=(Share(method=a),)), a, roles, role="critic")
    joint = Joint(methods=(Share(method=a), Share(method=b, weight=0.25)))
    whole = batch(4)
    own = batch(4)
    own.draws = Draws(fold(whole.draws.key, "joint", 1), whole.draws.index)
    expected = gradient_of(a, roles, batch(4), "student") + 0.25 * gradient_of(b, roles, own, "student")
    torch.testing.assert_close(gradient_of(joint, roles, whole, "student"), expected, rtol=1e-4, atol=1e-6)
    turns = list(joint.turns(roles, 0))
    assert [t.updates for t in turns] == [("student",), ("critic",)]
    assert [t.times for t in turns] == [1, 5]
    assert joint.needs().data
    assert joint.needs().roles == {"teacher", "student", "critic"}


def test_joint_hands_each_method_its_own_state():
    f = FDistill(divergence="fkl")
    joint = Joint(methods=(Share(method=DMD2()), Share(method=f, weight=0.5)))
    state = joint.needs().state
    assert state is not None
    roles = cast().with_state(state(Ring().open()))
    gradient_of(joint, roles, batch(), "student")
    assert set(roles.state.state_dict()) == {"1.mean"}
    assert (roles.state["1"].mean != 1).any()  # type: ignore[index]


def test_experts_answer_by_time_and_only_the_called_one_learns():
    members = [net(2), net(6)]
    student = Routed(members, ByTime(Flow(), (0.5,)))
    x = torch.randn(6, 2)
    t = torch.tensor([0.9, 0.5, 0.2, 0.51, 0.49, 1.0], dtype=torch.float64)
    cond = torch.arange(6) % CLASSES
    out = student(x, t, cond)
    for i, k in enumerate([0, 1, 1, 0, 1, 0]):
        one = members[k](x[i : i + 1], t[i : i + 1], cond[i : i + 1])
        torch.testing.assert_close(out.x0[i : i + 1], one.x0)
        torch.testing.assert_close(out.eps[i : i + 1], one.eps)
    tapped = student.features(x, t, cond, ("mid",))["mid"]
    torch.testing.assert_close(tapped[2:3], members[1].features(x[2:3], t[2:3], cond[2:3], ("mid",))["mid"])
    for phase, learns in ((1, 0), (2, 1)):
        roles = cast(student=student)
        gradient_of(PhasedDMD(phase=phase), roles, batch(), "student")
        moved = [any(p.grad is not None for p in m.parameters()) for m in members]
        assert moved == [k == learns for k in (0, 1)]


def test_a_level_of_a_float32_list_is_on_the_boundary():
    route = ByTime(Flow(), (0.7, 0.3))
    t = torch.tensor([0.7, 0.3, 0.71, 0.1, 1.0], dtype=torch.float32).double()
    assert route(t, None).tolist() == [1, 2, 0, 2, 0]


def test_random_guidance_is_one_number_per_update_within_its_range():
    method = VSD(guidance=(0.5, 4.0))
    scales = [method.scale(batch(k)) for k in range(300)]
    assert min(scales) >= 0.5
    assert max(scales) <= 4.0
    # Mean 2.25, sd 1.01: four standard errors of 300 draws.
    assert abs(sum(scales) / 300 - 2.25) < 4 * 1.0104 / 300**0.5
    split = Batch(Draws(fold(3), torch.arange(4, 9)), (2,))
    assert method.scale(split) == method.scale(batch(3))


def test_guidance_cancels_in_vsd_where_critic_and_teacher_agree():
    roles = cast(critic=net(1))
    grad = gradient_of(VSD(guidance=6.0), roles, batch(), "student")
    assert grad.abs().max() < 1e-9
    assert gradient_of(VSD(guidance=6.0, guide_critic=False), roles, batch(), "student").abs().max() > 1e-4


def test_every_method_names_its_papers():
    for name, cls in REGISTRY["method"].items():
        assert all(len(i) == 10 and i[4] == "." for i in cls.cites), name
