"""Pairwise sample optimisation: which steps get a gradient, whose chains they are, and what stands still."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from distribution_cases import F64, Affine, batch64, players
from torch import Tensor, nn

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws
from fewstep.algebra.process import EDM, Flow, Process
from fewstep.algebra.rollout import renoise, renoise_std, rollout
from fewstep.config import RecipeError
from fewstep.methods.pso import PSO
from fewstep.networks.adapters import Adapted
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.mlp import MLP
from fewstep.networks.roles import Roles
from fewstep.recipe.store import load
from fewstep.train.trainer import Hooks, Trainer

STEPS = (1.0, 0.6, 0.3)


class ByStep(nn.Module):
    """x0 = mean_i + std_i z, with a mean and a deviation for each level of STEPS: z is the state over sigma."""

    def __init__(self, process: Process, mean: float = 0.7, std: float = 0.4) -> None:
        super().__init__()
        self.process = process
        self.means = nn.Parameter(torch.full((len(STEPS),), mean, dtype=F64))
        self.std = std

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Any:
        from fewstep.algebra.prediction import from_x0

        levels = self.process.grid(torch.tensor(STEPS, dtype=F64))
        i = (t[:, None] - levels).abs().argmin(1)
        return from_x0(self.process, x, t, self.means[i][:, None] + self.std * x / self.process.sigma(t)[:, None])


class Near(nn.Module):
    """-|x - 3|, which no gradient is asked of."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, cond: Any = None) -> Tensor:
        self.seen.append(x)
        return -(x - 3).abs().sum(1)


def cast(process: Process | None = None, mean: float = 0.7) -> Roles:
    process = process or Flow()
    return Roles(student=ByStep(process, mean), reference=ByStep(process), reward=Near())


def steps_of(method: PSO, roles: Roles, batch: Any) -> list[Any]:
    """The losses of every turn of a step, the later ones on what the turn says."""
    out = []
    for turn in method.turns(roles, 0):
        (losses,) = turn.losses(turn.batch(0) or batch)
        out.append(losses)
    return out


def test_a_recorded_rollout_is_the_rollout_with_its_steps():
    roles = cast()
    made = rollout(roles.student, batch64(6).draws, (1,), STEPS, exit=2, record=True)
    plain = rollout(roles.student, batch64(6).draws, (1,), STEPS, exit=2)
    assert torch.equal(made.x, plain.x)
    assert plain.way == ()
    assert [(float(p.t[0]), float(p.s[0])) for p in made.way] == [(1.0, 0.6), (0.6, 0.3)]
    assert torch.equal(made.way[0].x_out, made.way[1].x_in)
    assert torch.equal(made.way[1].x_out, made.x_in)
    noise = [batch64(6).draws]
    drawn = [noise[0].normal(1) for _ in STEPS]
    x0 = roles.student(made.way[0].x_in, made.way[0].t).x0
    torch.testing.assert_close(made.way[0].x_out, renoise(Flow(), x0, drawn[1], made.way[0].s))


@pytest.mark.parametrize("process", [Flow(), EDM(sigma_min=0.5)])
def test_the_ratio_is_that_of_the_noise_that_was_added(process: Process):
    t = process.grid(torch.tensor([0.4, 0.7], dtype=F64))
    x0, eps = torch.randn(2, 3, dtype=F64), torch.randn(2, 3, dtype=F64)
    added = (renoise(process, x0, eps, t) - process.alpha(t)[:, None] * x0) / eps
    torch.testing.assert_close(added, renoise_std(process, t)[:, None].expand(2, 3))


def test_at_the_reference_the_loss_is_log_2_and_each_step_moves_its_own_level_alone():
    roles = cast()
    method = PSO(steps=STEPS, reference="reference")
    found = steps_of(method, roles, batch64(200))
    assert len(found) == 2
    for i, losses in enumerate(found):
        assert float(losses["prefer"].detach()) == pytest.approx(math.log(2), rel=1e-12)
        (slope,) = torch.autograd.grad(losses["prefer"], roles.student.means, retain_graph=True)
        assert float(slope[i]) < 0  # 3 lies above all that the student makes
        assert [k for k in range(3) if float(slope[k])] == [i]
    assert roles.reward.seen[0].shape == (200, 1)
    assert not torch.equal(roles.reward.seen[0], roles.reward.seen[1])
    assert float(found[0].log["reward"]) == pytest.approx(
        float(torch.cat([-(x - 3).abs() for x in roles.reward.seen]).mean())
    )


def test_later_steps_go_on_with_the_first_ones_chains():
    roles, method, batch = cast(), PSO(steps=STEPS, reference="reference"), batch64(5)
    turns = method.turns(roles, 0)
    first = next(turns)
    assert first.batches == ()
    list(first.losses(batch))
    second = next(turns)
    assert second.batches == (batch,)
    list(second.losses(batch))
    assert len(roles.reward.seen) == 2  # no further sample was drawn
    assert next(turns, None) is None


def test_a_tie_changes_nothing():
    roles = cast(mean=0.9)
    roles.reward.forward = lambda x, cond=None: torch.zeros(len(x), dtype=F64)
    for losses in steps_of(PSO(steps=STEPS, reference="reference"), roles, batch64(20)):
        assert torch.autograd.grad(losses["prefer"], roles.student.means)[0].tolist() == [0.0, 0.0, 0.0]


def test_far_from_the_reference_the_clip_stops_it():
    roles = cast(mean=4.0)
    free, held = (PSO(steps=STEPS, reference="reference", beta=1.0, clip=c) for c in (None, 0.1))
    assert "clipped" not in steps_of(free, roles, batch64(50))[0].log
    losses = steps_of(held, roles, batch64(50))[0]
    assert float(losses.log["clipped"]) > 0.9
    slopes = [
        float(torch.autograd.grad(steps_of(m, roles, batch64(50))[0]["prefer"], roles.student.means)[0].abs().max())
        for m in (free, held)
    ]
    assert slopes[1] < 0.2 * slopes[0]


def test_without_a_role_the_adapters_base_stands_still():
    torch.manual_seed(1)
    base = Denoiser(MLP(1, 8, 2, 0), Flow(), "x0", "angle").requires_grad_(False)
    roles = Roles(teacher=base, student=Adapted(base, "lora0", rank=2), reward=Near())
    still = PSO(steps=STEPS).still(roles)
    assert (still.base, still.names) == (base, ())
    assert len(roles.parameters("student"))
    for _ in range(2):
        losses = steps_of(PSO(steps=STEPS), roles, Batch(Draws(7, torch.arange(6)), (1,)))[0]
        assert float(losses["prefer"].detach()) == pytest.approx(math.log(2), abs=1e-6)
        losses.total().backward()  # the first time the adapter is nothing yet, and its gradient is not
        assert any(float(p.grad.abs().max()) > 0 for p in roles.parameters("student") if p.grad is not None)
        assert all(p.grad is None for p in base.parameters() if not p.requires_grad)
    assert PSO(steps=STEPS).needs().roles == {"student", "reward"}
    told = PSO(steps=STEPS, reference="teacher").needs()
    assert (told.roles, told.trained, told.reward) == ({"student", "teacher", "reward"}, {"student"}, "value")
    with pytest.raises(RecipeError, match=r"method\.reference: the student is no adapter.*copy: \{reference: student\}"):
        load("toy/pso", ["method.reference=null"])


def test_adapters_beside_the_students_own_belong_to_the_reference():
    torch.manual_seed(1)
    base = Denoiser(MLP(1, 8, 2, 0), Flow(), "x0", "angle").requires_grad_(False)
    other = Adapted(base, "lora0", rank=2)
    roles = Roles(teacher=base, other=other, student=Adapted(base, "lora1", rank=2, beside=("lora0",)), reward=Near())
    with torch.no_grad():
        for p in roles.parameters("other"):
            p.normal_()
    x, t = torch.randn(4, 1), torch.full((4,), 0.5)
    assert torch.equal(PSO(steps=STEPS).still(roles)(x, t).x0, other(x, t).x0)
    assert not torch.allclose(other(x, t).x0, base(x, t).x0)
    # The student's own set is nothing yet: it is its reference.
    losses = steps_of(PSO(steps=STEPS), roles, Batch(Draws(7, torch.arange(6)), (1,)))[0]
    assert float(losses["prefer"].detach()) == pytest.approx(math.log(2), abs=1e-6)


def test_the_student_is_no_reference():
    with pytest.raises(ValueError, match="reference: the student is what is trained"):
        PSO(steps=STEPS, reference="student")


def test_a_student_of_one_step_is_refused():
    with pytest.raises(
        ValueError, match=r"steps \[1\.0\]: one step draws nothing .* PSO's gradient of it is exactly zero"
    ):
        PSO(steps=(1.0,), reference="reference")
    with pytest.raises(RecipeError, match="one step draws nothing"):
        load("toy/pso", ["method.steps=[1.0]"])
    assert PSO(steps=(1.0,), pairs="offline").needs().data
    with pytest.raises(ValueError, match="loss pso_db: is for pairs offline"):
        PSO(steps=STEPS, loss="pso_db")


def test_offline_prefers_the_data_under_one_noise_and_keeps_the_others_known():
    roles = players(reference=Affine(Flow(), 0.1, 0.3))
    data = torch.linspace(-1, 1, 400, dtype=F64).reshape(-1, 1)
    method = PSO(steps=(1.0, 0.5), pairs="offline", reference="reference", beta=5.0, lose_factor=1.0, prior_weight=0.0)
    (losses,) = method.offline_losses(roles, batch64(400, x0=data))
    again = batch64(400, x0=data)
    lost = rollout(roles.reference, again.draws, (1,), (1.0, 0.5), exit=1, grad=False).x
    t = torch.tensor([1.0, 0.5], dtype=F64)[again.draws.integers(2)][:, None]
    eps = again.noise()

    def error(net: Any, x0: Tensor) -> Tensor:
        z = ((1 - t) * x0 + t * eps) / t
        return ((net.mean + net.std * z - x0) / t)[:, 0] ** 2

    student, still = ([error(n, x) for x in (data, lost)] for n in (roles.student, roles.reference))
    gap = (still[0] - still[1]) - (student[0] - student[1])
    wanted = -torch.nn.functional.logsigmoid(5 * gap).mean()
    assert float(losses["prefer"].detach()) == pytest.approx(float(wanted.detach()), rel=1e-9)
    assert set(losses) == {"prefer"}
    # Where data and the other samples are the same, g = 1 leaves nothing to prefer.
    twins = replace(batch64(400), x0=lost.detach())
    (equal,) = method.offline_losses(roles, twins)
    assert float(torch.autograd.grad(equal["prefer"], roles.student.mean)[0]) == 0
    hinge = replace(method, loss="pso_db", prior_weight=0.5)
    (losses,) = hinge.offline_losses(roles, batch64(400, x0=data))
    assert float(losses["prefer"].detach()) == pytest.approx(
        float(torch.relu(1 + 5 * (student[0] - student[1])).mean().detach())
    )
    assert float(losses["prior"].detach()) == pytest.approx(0.5 * float(student[1].mean().detach()))


def test_it_raises_the_reward_of_a_student_and_spares_its_last_step():
    """As the prototype's one-dimensional run without a clip, in fewer and larger updates."""
    torch.manual_seed(0)
    roles = Roles(student=ByStep(Flow()), reference=ByStep(Flow()), reward=Near())
    method = PSO(steps=STEPS, reference="reference", beta=5.0, clip=None)
    optimizer = torch.optim.Adam(roles.parameters("student"), 5e-2)

    def reward() -> float:
        return float(roles.reward(rollout(roles.student, batch64(2000, key=9).draws, (1,), STEPS, exit=2).x).mean())

    before = reward()
    for i in range(60):
        batch = batch64(128, key=100 + i)
        for turn in method.turns(roles, i):
            (losses,) = turn.losses(turn.batch(0) or batch)
            optimizer.zero_grad(set_to_none=True)
            losses.total().backward()
            optimizer.step()
    assert reward() > before + 0.05
    assert float(roles.student.means[2]) == 0.7


def test_the_toy_recipe_runs_its_stages_and_starts_from_its_student():
    cut = ["before.0.steps=2", "before.1.steps=2", "train.steps=2", "train.batch=16", "train.log_every=1"]
    small = [
        "student.width=16",
        "roles.reference.width=16",
        "evaluate=null",
        "train.sample_every=0",
        "train.readings_every=1",
    ]
    rates: list[float] = []
    hooks = Hooks(on_step=lambda t: rates.append(t.last_record["lr/student"]))
    trainer = Trainer(load("toy/pso", [*cut, *small]), None, hooks=hooks, cpu=True)
    trainer.fit()
    assert rates[-2:] == pytest.approx([1.5e-4, 0.0], abs=1e-12)  # three updates a step: of six, three are left after one
    told = trainer.last_record
    assert {"prefer", "reward", "clipped", "samples/reward", "samples/fd"} <= set(told)
    still = dict(trainer.roles.reference.named_parameters())
    moved = [not torch.equal(p, still[n]) for n, p in trainer.roles.student.named_parameters()]
    assert any(moved)
    gap = max(float((p - still[n]).abs().max()) for n, p in trainer.roles.student.named_parameters())
    assert gap < 0.02  # two updates away from the student that the stage began with
