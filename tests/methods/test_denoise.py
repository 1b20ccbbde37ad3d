"""Denoising onto a guided teacher: golden numbers, one call in place of two, trajectories of the teacher itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from listening import F64, Listening, batch_of
from torch import Tensor

from fewstep.algebra.process import Flow
from fewstep.algebra.times import Levels, Uniform
from fewstep.algebra.views import Negative
from fewstep.methods.denoise import Denoise
from fewstep.networks.adapters import Adapted
from fewstep.networks.analytic import Mixture
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.mlp import MLP
from fewstep.networks.roles import Roles

FLOW = Flow()
LABELS = {"cond": torch.tensor([1, 2, 1, 3, 2]), "null_cond": torch.zeros(5, dtype=torch.long)}


def cast(gain: float = 0.3) -> Roles:
    return Roles(teacher=Listening(FLOW, 0.5, 0.2), student=Listening(FLOW, gain, -0.1))


def test_the_guided_target_is_the_golden_one():
    """Two components, the second asked for at scale 3: flow, t = .5, x = .1."""
    teacher = Mixture(FLOW, [0.3, 0.7], [[-1.2], [0.8]], [0.25, 0.35], labels=[0, 1])
    roles = Roles(teacher=teacher, student=Listening(FLOW))
    batch: Any = batch_of(1, 1, cond=torch.tensor([1]), null_cond=torch.tensor([2]))
    x, t = torch.tensor([[0.1]], dtype=F64), torch.tensor([0.5], dtype=F64)
    for scale, wanted in ((0.0, 0.4186583067), (1.0, 0.7345211581), (3.0, 1.3662468610)):
        method = Denoise(target="teacher", guidance=scale, weight="x0")
        error, target = method.follow(roles, batch, x, t, batch.cond, scale)
        assert float(target.x0) == pytest.approx(wanted, abs=1e-9)
        assert float(error.detach()) == pytest.approx((1 - wanted) ** 2)  # the student answers its label, 1


def test_the_student_answers_in_one_call_what_takes_the_teacher_two():
    roles = cast()
    method = Denoise(target="teacher", guidance=4.0, weight="x0", times=Levels(at=(0.5,)), drop_cond=0.0)
    (losses,) = method.losses(roles, batch_of(5, **LABELS))
    assert [len(c) for c in roles.teacher.conds] == [10]
    assert [len(c) for c in roles.student.conds] == [5]
    again: Any = batch_of(5)
    method.times.sample(again.draws, FLOW)
    x = 0.5 * again.data() + 0.5 * again.noise()
    label = LABELS["cond"][:, None]
    # Null is label 0: guidance multiplies the label's part of the teacher's answer.
    gap = (0.3 * x - 0.1 + label) - (0.5 * x + 0.2 + 4.0 * label)
    assert float(losses["regress"].detach()) == pytest.approx(float((gap**2).mean().detach()), rel=1e-12)


def test_an_adapter_that_is_nothing_yet_answers_as_its_teacher_and_loses_nothing_at_scale_1():
    torch.manual_seed(0)
    base = Denoiser(MLP(2, 8, 2, 3), FLOW, "velocity", "angle").requires_grad_(False)
    roles = Roles(teacher=base, student=Adapted(base, "lora0", rank=2))
    fields: Any = {"cond": torch.arange(6) % 3, "null_cond": torch.full((6,), 3)}

    def loss(scale: float) -> float:
        from fewstep.algebra.batch import Batch
        from fewstep.algebra.draws import Draws

        draws = Draws(5, torch.arange(6))
        batch = Batch(draws, (2,), Draws(6, torch.arange(6)).normal(2), **fields)
        (losses,) = Denoise(target="teacher", guidance=scale).losses(roles, batch)
        return float(losses["regress"].detach())

    assert loss(1.0) == 0
    assert loss(3.0) > 0


def test_a_drawn_scale_is_told_to_a_student_that_takes_it():
    class Told(Listening):
        scales: list[Tensor] = []

        def forward(self, x: Tensor, t: Tensor, cond: Any = None, *, w: Tensor | None = None, **call: Any) -> Any:
            assert w is not None
            self.scales.append(w)
            return super().forward(x, t, cond, **call)

    roles = Roles(teacher=Listening(FLOW, 0.5, 0.2), student=Told(FLOW))
    method = Denoise(target="teacher", guidance=(2.0, 6.0), embed_guidance=True, weight="x0", drop_cond=0.0)
    (losses,) = method.losses(roles, batch_of(5, **LABELS))
    (scale,) = roles.student.scales
    assert ((scale > 2) & (scale < 6)).all()
    assert len(scale.unique()) == 5
    assert method.needs().inputs == {"w"}
    assert method.sampler().guidance == 4.0
    assert Denoise(target="teacher", guidance=(2.0, 6.0)).sampler().guidance is None
    assert float(losses["regress"].detach()) > 0


def test_a_trajectory_is_the_guided_teachers_own_and_every_state_has_its_share():
    roles = cast()
    method = Denoise(target="teacher", guidance=2.0, source="trajectory", trajectory_steps=4, weight="x0", drop_cond=0.0)
    assert not method.needs().data
    batch: Any = batch_of(5, **LABELS)
    found = list(method.trajectory_losses(roles, batch))
    assert len(found) == 4
    assert [float(t[0]) for t in roles.student.times] == [1.0, 0.75, 0.5, 0.25]
    x, label = batch_of(5).noise(), LABELS["cond"][:, None]
    for losses, (t, s) in zip(found, ((1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)), strict=True):
        real = 0.5 * x + 0.2 + 2 * label
        gap = (0.3 * x - 0.1 + label) - real
        assert float(losses["regress"].detach()) == pytest.approx(float((gap**2).mean().detach()) / 4, rel=1e-9)
        x = (1 - s) * real + s / t * (x - (1 - t) * real)  # DDIM


def test_what_only_data_is_noised_and_seen_by_is_refused_of_a_trajectory():
    for key, value in (("times", Uniform()), ("view", Negative())):
        assert Denoise(target="teacher", **{key: value}).needs().data
        with pytest.raises(ValueError, match=f"{key}: source trajectory trains at states of the teacher's own"):
            Denoise(target="teacher", source="trajectory", **{key: value})


def test_guidance_of_data_is_refused():
    for key, value in (("guidance", 2.0), ("embed_guidance", True), ("source", "trajectory")):
        with pytest.raises(ValueError, match="are of target teacher"):
            Denoise(**{key: value})
    assert Denoise(target="teacher").needs().data
