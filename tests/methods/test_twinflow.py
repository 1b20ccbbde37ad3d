"""TwinFlow: image_free is anchored by its teacher, and both losses are Barron's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trajectory_helpers import F64, MEAN, STD, Batch64, ExactMap, draws

from fewstep.algebra.batch import Batch
from fewstep.algebra.noising import add_noise
from fewstep.algebra.prediction import Prediction, from_raw, from_x0
from fewstep.algebra.process import Flow, bc
from fewstep.config import UserError
from fewstep.methods.twinflow import TwinFlow, robust
from fewstep.networks.analytic import flow_map
from fewstep.networks.roles import Roles
from fewstep.recipe.store import load


class Map(nn.Module):
    """The flow map of N(mean, STD^2) with a trainable mean; the mirrored side of time answers with more velocity."""

    takes_s, inputs, process = True, ("s", "mirror"), Flow()

    def __init__(self, shift: float = 0.0, mirrored: float = 0.0) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(MEAN + shift, dtype=F64))
        self.mirrored = mirrored

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Any = None,
        *,
        s: Tensor | None = None,
        mirror: Tensor | None = None,
    ) -> Prediction:
        near = t - 1e-4
        to = near if s is None else torch.minimum(s, near)
        v = (x - flow_map(self.process, self.mean, STD, x, t, to)) / bc(t - to, x)
        if mirror is not None:
            v = v + self.mirrored * bc(mirror, x) * torch.cos(3 * x)
        return from_raw(self.process, "velocity", x, t, v)


class Told(nn.Module):
    """Velocity x (1 + label), so that guidance has a closed form."""

    takes_s, inputs, process = True, ("s", "mirror"), Flow()

    def __init__(self, slope: float = 1.0) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        return from_raw(self.process, "velocity", x, t, self.slope * x * (1 + bc(cond.to(F64), x)))


def test_only_image_free_needs_a_teacher_and_never_trains_it() -> None:
    plain, free = TwinFlow().needs(), TwinFlow(image_free=True).needs()
    assert plain.roles == {"student", "target"}
    assert plain.data
    assert free.roles == {"student", "target", "teacher"}
    assert free.trained == {"student"}
    assert not free.data
    assert load("toy/twinflow", ["method.image_free=true"]).method.needs().roles == free.roles  # type: ignore[attr-defined]


def test_image_free_velocity_is_the_teachers_off_the_mirrored_rows() -> None:
    shape = (2, 3, 5)
    d = draws(8, "velocity")
    batch = Batch(d, shape)
    x, pair = d.normal(*shape, dtype=F64), d.normal(*shape, dtype=F64)
    t, group = d.uniform(), torch.arange(8) % 4
    who = Roles(student=Map(0.4), target=Map(0.4), teacher=Map())
    v = TwinFlow(image_free=True).velocity(who, batch, x, t, group, pair)
    assert torch.equal(v[group == 3], pair[group == 3])
    want = who.teacher(x, t).velocity()
    assert torch.allclose(v[group != 3], want[group != 3], atol=1e-14, rtol=0)
    assert float((v - pair).abs().flatten(1).amax(1)[group != 3].min()) > 0.1
    assert not v.requires_grad
    assert torch.equal(TwinFlow().velocity(who, batch, x, t, group, pair), pair)


def test_image_free_is_guided_by_the_teacher_and_data_mode_by_the_target() -> None:
    d = draws(8, "guided")
    x, pair, t, group = d.normal(3, 5, dtype=F64), d.normal(3, 5, dtype=F64), d.uniform(), torch.arange(8) % 4
    label, null = torch.arange(8) % 3 + 1, torch.zeros(8, dtype=torch.int64)
    batch = Batch(d, (3, 5), None, label, null)
    who = Roles(student=Told(9.0), target=Told(7.0), teacher=Told())
    share = 0.5 * bc(((group == 1) | (group == 2)).to(F64), x)
    gap = bc(label.to(F64), x) * x
    own = bc((group == 3).to(F64), x)
    # Image free the ratio is the teacher's scale: 1.5 goes half a gap past the condition, 1 nowhere past it.
    free = TwinFlow(image_free=True, guidance_share=1.5).velocity(who, batch, x, t, group, pair)
    assert torch.allclose(free, own * pair + (1 - own) * (x + gap) + share * gap, atol=1e-13)
    one, none = (TwinFlow(image_free=True, guidance_share=enr).velocity(who, batch, x, t, group, pair) for enr in (1, 0))
    assert torch.equal(one, none)
    plain = TwinFlow(guidance_share=0.5).velocity(who, batch, x, t, group, pair)
    assert torch.allclose(plain, pair + 7 * share * gap, atol=1e-13)


def residuals(method: TwinFlow, shift: float = 0.0) -> Tensor:
    """|F - target| (b,) on own samples at long jumps."""
    who = Roles(student=Map(shift), target=Map(shift), teacher=Map())
    batch = Batch64.of(64, 1, "rest")
    group, t, _ = method.groups(batch)
    t = t.clamp_min(0.4)
    s = t - 0.3
    own, eps = method.generate(who.student, batch), batch.noise()
    x, _ = add_noise(Flow(), own, eps, t)
    v = method.velocity(who, batch, x, t, group, eps - own)
    here = who.student(x, t, s=s).velocity().detach()
    return (here - method.target(who, batch, x, t, s, v, here)).abs().flatten(1).amax(1)[group != 3]


def test_image_free_rests_at_the_teachers_flow_alone() -> None:
    coarse, fine = (residuals(TwinFlow(image_free=True, step=h, order=1)).max() for h in (0.01, 0.005))
    assert float(coarse) < 0.1
    assert 1.6 < float(coarse / fine) < 2.5
    assert float(residuals(TwinFlow(image_free=True), shift=0.4).median()) > 0.2


@pytest.mark.parametrize("shift", [-0.3, 0.3])
def test_image_free_pulls_a_wrong_mean_back(shift: float) -> None:
    method = TwinFlow(image_free=True, rectify=0.0)

    def slope(shift: float) -> float:
        who = Roles(student=Map(shift), target=Map(shift), teacher=Map())
        batch = Batch64.of(2048, 1, "pull")
        (losses,) = method.losses(who, batch)
        losses.total().backward()
        return float(who.student.mean.grad)

    pull, rest = slope(shift), slope(0.0)
    assert pull * shift > 0
    assert abs(pull) > 5 * abs(rest)


class Off(nn.Module):
    """The exact map with errors in its x0 that differ on the mirrored side of time."""

    takes_s, inputs, process = True, ("s", "mirror"), Flow()

    def __init__(self) -> None:
        super().__init__()
        self.exact = ExactMap(Flow())

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Any = None,
        *,
        s: Tensor | None = None,
        mirror: Tensor | None = None,
    ) -> Prediction:
        wrong = 0.05 * torch.cos(3 * x)
        if mirror is not None:
            wrong = wrong + 0.2 * bc(mirror, x) * torch.sin(2 * x)
        return from_x0(self.process, x, t, self.exact(x, t, s=s).x0 + wrong)


def test_data_mode_is_what_it_was() -> None:
    (losses,) = TwinFlow().losses(Roles(student=Off(), target=Off()), Batch64.of(12, 3, "gold"))
    # From the code before image_free had a teacher.
    assert abs(float(losses["any_step"]) - 1.0391801002199286) < 1e-12


def test_robust_gradient_by_hand() -> None:
    d = draws(5, "robust")
    error = (d.normal(2, 3, 7, dtype=F64) * bc(10.0 ** -torch.arange(5, dtype=F64), torch.ones(5, 2, 3, 7))).detach()
    error.requires_grad_(True)
    weight = torch.arange(1, 6, dtype=F64)
    loss = robust(error, weight, 1e-3)
    (got,) = torch.autograd.grad(loss, error)
    m = (error.detach() ** 2).flatten(1).mean(1)
    size = torch.sqrt(m + 1e-6)
    assert torch.allclose(got, bc(weight / size, error) * 2 * error.detach() / 42 / 5, rtol=1e-12, atol=0)
    assert torch.allclose(loss, (weight * m / size).mean(), rtol=1e-12)


def test_rectifier_gradient_by_hand() -> None:
    method = TwinFlow(clamp=0.25)
    who = Roles(student=Map(0.2, mirrored=0.3), target=Map())
    batch, again = Batch64.of(12, 3, "rectify"), Batch64.of(12, 3, "rectify")
    group = torch.arange(12) % 4
    x = draws(12, "x").normal(3, dtype=F64)
    here = draws(12, "F").normal(3, dtype=F64).requires_grad_(True)
    (got,) = torch.autograd.grad(method.rectifier(who, batch, x, here, group), here)
    tau, eps = again.draws.uniform(), again.noise()
    x_tau = bc(1 - tau, x) * (x - here.detach()) + bc(tau, x) * eps
    gap = (0.3 * torch.cos(3 * x_tau)).clamp(-0.25, 0.25)
    assert bool((gap.abs() == 0.25).any())
    assert bool((gap.abs() < 0.25).any())
    m = (gap**2).mean(1)
    want = 2 * gap / 3 / torch.sqrt(m + 1e-6)[:, None] / 3
    assert torch.allclose(got[group == 0], want[group == 0], rtol=1e-6, atol=1e-9)
    assert bool((got[group != 0] == 0).all())


def test_a_batch_without_four_groups_is_refused() -> None:
    who = Roles(student=Map(), target=Map())
    with pytest.raises(UserError, match="at least 4, not 3"):
        list(TwinFlow().losses(who, Batch64.of(3, 1)))
