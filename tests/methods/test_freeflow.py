"""Rows of a batch: FreeFlow's corrected ones, MeanFlow's guided rows, and differences that stay inside the times."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from listening import Listening, batch_of
from torch import Tensor, nn
from trajectory_helpers import F64, MEAN, STD, Batch64, ExactMap, draws

from fewstep.algebra.batch import Batch
from fewstep.algebra.prediction import Prediction, from_raw, from_x0
from fewstep.algebra.process import Flow, bc
from fewstep.algebra.times import Levels
from fewstep.methods.freeflow import FreeFlow, first
from fewstep.methods.meanflow import MeanFlow
from fewstep.networks.analytic import gaussian
from fewstep.networks.roles import Roles
from fewstep.objectives import trajectory as tr


class Seen(nn.Module):
    """A network with an error of .05 cos 3x in its x0 that remembers the rows and times of its calls."""

    process = Flow()

    def __init__(self, inner: nn.Module, off: float = 0.05) -> None:
        super().__init__()
        self.inner, self.off = inner, off
        self.takes_s = isinstance(inner, ExactMap)
        self.rows: list[int] = []
        self.ends: list[float] = []
        self.lengths: list[float] = []

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        self.rows.append(len(x))
        if "s" in call:
            self.ends.append(float(call["s"].detach().min()))
            self.lengths.append(float((t - call["s"]).detach().min()))
        return from_x0(self.process, x, t, self.inner(x, t, **call).x0 + self.off * torch.cos(3 * x))


def cast() -> Roles:
    """Student, teacher and critic that disagree."""
    teacher, critic = gaussian(Flow(), MEAN, STD), gaussian(Flow(), MEAN + 0.2, STD)
    return Roles(student=Seen(ExactMap(Flow())), teacher=Seen(teacher, 0.0), critic=Seen(critic, 0.0))


@pytest.mark.parametrize("count", [1, 3, 6])
def test_first_rows_draw_what_they_draw_in_the_whole_batch(count: int) -> None:
    shape = (2, 3, 5)
    cond = {"text": torch.arange(42.0).reshape(7, 3, 2), "label": torch.arange(7)}
    null = {key: 0 * value for key, value in cond.items()}
    x0 = draws(7, "x0").normal(*shape)

    def whole() -> Batch:
        batch = Batch(draws(7, "split"), shape, x0, cond, null)
        batch.draws.uniform()
        return batch

    batch = whole()
    noise, u, w = batch.noise(), batch.draws.uniform(), batch.draws.uniform(4)
    part = first(whole(), count)
    assert len(part) == count
    assert torch.equal(part.noise(), noise[:count])
    assert torch.equal(part.draws.uniform(), u[:count])
    assert torch.equal(part.draws.uniform(4), w[:count])
    assert torch.equal(part.data(), x0[:count])
    for key in cond:
        assert torch.equal(part.cond[key], cond[key][:count])
        assert torch.equal(part.null_cond[key], null[key][:count])


def test_freeflow_networks_see_no_row_that_is_not_used() -> None:
    who = cast()
    list(FreeFlow(fraction=0.25).losses(who, Batch64.of(12, 3)))
    # The value and the tangent of the prediction, then the sample of the correction.
    assert who.student.rows == [12, 12, 3]
    assert who.teacher.rows == [12, 3]
    assert who.critic.rows == [3]
    few = cast()
    list(FreeFlow().losses(few, Batch64.of(3, 3)))
    assert few.critic.rows == [1]


def test_freeflow_losses_are_those_of_their_rows() -> None:
    method, who = FreeFlow(fraction=0.25, correction=0.7), cast()
    (got,) = method.losses(who, Batch64.of(12, 3))
    batch = Batch64.of(12, 3)
    x = batch.noise()
    s = method.times.sample(batch.draws, Flow())
    residual, error = method.residual(who, batch, x, s)
    e = (error**2).mean(1)
    assert torch.allclose(got["predict"], (e / (e + 1e-3)).mean(), rtol=1e-12)
    # The whole batch corrected, and cut afterwards.
    _, gradient = method.correct(who, batch)
    gradient = gradient[:3]
    push = 0.7 * gradient * residual.norm(dim=1).mean() / (gradient.norm(dim=1).mean() + 1e-6)
    assert torch.allclose(got["correct"], (push**2).mean() / 2, rtol=1e-9)
    assert float(got["correct"]) > 1e-6


@pytest.mark.parametrize("mode", ["central", "semi"])
def test_differences_look_ahead_where_the_floor_is_near(mode: tr.Tangent) -> None:
    d = draws(5, "floor")
    x, dx = d.normal(2, 3, dtype=F64), d.normal(2, 3, dtype=F64)
    t = torch.tensor([0.9, 0.5, 0.304, 0.3, 0.001], dtype=F64)
    s = torch.tensor([0.1, 0.4951, 0.3, 0.3, 0.0], dtype=F64)
    seen: list[Tensor] = []

    def raw(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        seen.append(t.detach())
        return torch.sin(2 * x) * bc(torch.exp(t), x) + bc(s, x)

    h = 5e-3
    got = tr.tangent(raw, (x, t, s), (dx, torch.ones_like(t), None), mode, h, floor=s)
    assert all(bool((u >= s).all()) for u in seen)
    assert torch.equal(torch.stack(seen).amin(0) < t, torch.tensor([True, False, False, False, False]))

    def at(k: float) -> Tensor:
        moved = x + k * dx if mode == "central" else x
        return torch.sin(2 * moved) * bc(torch.exp(t + k), x)

    side = (at(h) - at(0)) / h
    back = (at(h) - at(-h)) / (2 * h) if mode == "central" else (at(0) - at(-h)) / h
    along_x = 0 if mode == "central" else 2 * torch.cos(2 * x) * dx * bc(torch.exp(t), x)
    near = torch.tensor([0, 1, 1, 1, 1], dtype=F64)
    want = torch.where(bc(near, x) > 0, side, back) + along_x
    assert torch.allclose(got, want, atol=1e-11, rtol=0)
    exact = 2 * torch.cos(2 * x) * dx * bc(torch.exp(t), x) + torch.sin(2 * x) * bc(torch.exp(t), x)
    assert float((got - exact).abs().max()) < 0.2


def test_without_a_floor_the_difference_is_central_everywhere() -> None:
    t = torch.tensor([0.5, 0.001], dtype=F64)
    x = torch.ones(2, 3, dtype=F64)
    seen: list[Tensor] = []

    def raw(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        seen.append(t)
        return x * bc(t**2, x)

    got = tr.tangent(raw, (x, t, 0 * t), (None, torch.ones_like(t), None), "central", 1e-2)
    assert torch.allclose(got, x * bc(2 * t, x), atol=1e-14)
    assert float(torch.stack(seen).min()) == pytest.approx(-0.009)


@pytest.mark.parametrize("mode", ["central", "semi"])
def test_meanflow_asks_for_no_jump_that_ends_after_its_start(mode: tr.Tangent) -> None:
    who = Roles(student=Seen(ExactMap(Flow())), teacher=gaussian(Flow(), MEAN, STD))
    list(MeanFlow(source="teacher", apart=0.5, tangent=mode).losses(who, Batch64.of(64, 1, "inside"), 1))
    assert min(who.student.ends) >= 0
    assert min(who.student.lengths) == 0


def test_freeflow_asks_for_no_negative_time() -> None:
    batch, again = Batch64.of(1024, 1, "inside"), Batch64.of(1024, 1, "inside")
    again.noise()
    assert float(FreeFlow().times.sample(again.draws, Flow()).min()) < 5e-3
    who = Roles(student=Seen(ExactMap(Flow())), teacher=gaussian(Flow(), MEAN, STD))
    list(FreeFlow(correction=0.0, tangent="central").losses(who, batch))
    assert len(who.student.ends) == 3
    assert min(who.student.ends) > 0


class Told(nn.Module):
    """Velocity of (1 + label) in every element."""

    process, takes_s = Flow(), True

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        label = cond if isinstance(cond, Tensor) else cond["label"]
        return from_raw(self.process, "velocity", x, t, torch.ones_like(x) * bc(1 + label.to(F64), x))


@pytest.mark.parametrize("mapping", [False, True])
def test_meanflow_guides_the_told_rows_below_its_last_time(mapping: bool) -> None:
    d = draws(6, "guided")
    x, pair = d.normal(2, 3, 5, dtype=F64), d.normal(2, 3, 5, dtype=F64)
    t = torch.tensor([0.1, 0.75, 0.76, 1.0, 0.3, 0.5], dtype=F64)
    label = torch.tensor([2, 1, 3, 1, 0, 2])
    size = torch.full((6, 2), 64.0)
    cond: Any = {"label": label, "resolution": size} if mapping else label
    null: Any = {"label": 0 * label, "resolution": size} if mapping else 0 * label
    batch, who = Batch(d, (2, 3, 5), None, cond, null), Roles(student=Told())
    got = MeanFlow(guidance=0.2, kappa=0.6).velocity(who, batch, cond, x, t, pair, 0.2, None)
    want = 0.2 * pair + 0.2 + 0.6 * (1 + bc(label.to(F64), x))
    # Rows 2 and 3 lie above .75, row 4 has no condition.
    for row in range(6):
        assert torch.allclose(got[row], pair[row] if row in (2, 3, 4) else want[row], atol=1e-14)
    later = MeanFlow(guidance=0.2, kappa=0.6, guided_until=1.0).velocity(who, batch, cond, x, t, pair, 0.2, None)
    assert torch.allclose(later[3], want[3], atol=1e-14)


def test_meanflow_guided_until_is_a_time() -> None:
    with pytest.raises(ValueError, match="guided_until: must lie in"):
        MeanFlow(guided_until=1.5)


@pytest.mark.parametrize("r", [0.25, 0.8])
def test_the_correction_is_a_difference_of_velocities(r: float) -> None:
    flow = Flow()
    roles = Roles(
        student=Listening(flow, 0.3, takes_s=True), teacher=Listening(flow, 0.0, 0.7), critic=Listening(flow, 0.0, 0.2)
    )
    x, gradient = FreeFlow(correction_times=Levels(at=(r,))).correct(roles, batch_of(4))
    torch.testing.assert_close(x, 0.3 * batch_of(4).noise())
    # Toward the data u = (x - D) / r.
    torch.testing.assert_close(gradient, torch.full_like(x, (0.2 - 0.7) / r), rtol=1e-12, atol=0)


def test_the_critic_learns_the_samples_velocity_with_one_weight_at_all_levels() -> None:
    """A weight on x0 would be r^2 on the velocity, and leave the critic untaught where noise is low."""
    flow = Flow()
    seen: list[Tensor] = []

    class Seeing(Listening):
        def answer(self, x: Tensor, cond: Any = None) -> Tensor:
            seen.append(x)
            return super().answer(x, cond)

    roles = Roles(student=Listening(flow, 0.3, takes_s=True), critic=Seeing(flow, 0.0, 0.2))
    method = FreeFlow(critic=replace(FreeFlow().critic, times=Levels(at=(0.1,))))
    (losses,) = method.critic_losses(roles, batch_of(200))
    x, y = seen[-1], 0.3 * batch_of(200).noise()
    noise = (x - 0.9 * y) / 0.1
    velocity = (x - 0.2) / 0.1
    torch.testing.assert_close(losses.total(), ((velocity - (noise - y)) ** 2).mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("r", "scale"), [(0.6, 3.0), (0.8, 1.0)])
def test_the_corrections_guidance_ends_at_a_time(r: float, scale: float) -> None:
    class Told(nn.Module):
        process = Flow()

        def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
            return from_x0(self.process, x, t, bc(cond.to(x.dtype), x).expand_as(x))

    roles = Roles(student=Listening(Flow(), 0.3, takes_s=True), teacher=Told(), critic=Listening(Flow(), 0.0, 0.0))
    batch = replace(batch_of(4), cond=torch.full((4,), 2.0), null_cond=torch.full((4,), 0.5))
    _, gradient = FreeFlow(correction_times=Levels(at=(r,)), correction_guidance=3.0).correct(roles, batch)
    want = 0.5 + scale * (2.0 - 0.5)
    # The critic answers its label, 2.
    torch.testing.assert_close(gradient, torch.full_like(gradient, (2.0 - want) / r))
    with pytest.raises(ValueError, match=r"correction_until must lie in \(0, 1\]"):
        FreeFlow(correction_until=0.0)
