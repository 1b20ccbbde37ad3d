"""Methods on one student at once: turns with roles in common merge, and SANA-Sprint's two losses are such a pair."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trajectory_helpers import F64, Batch64

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.prediction import Prediction, from_x0
from fewstep.algebra.process import DiscreteVP, Flow
from fewstep.algebra.rollout import RandomSteps, rollout
from fewstep.algebra.times import Uniform
from fewstep.config import REGISTRY, RecipeError
from fewstep.methods.consistency import Consistency
from fewstep.methods.critic import Critic
from fewstep.methods.denoise import Denoise
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.joint import Joint, Share
from fewstep.methods.ladd import LADD
from fewstep.methods.pso import PSO
from fewstep.methods.scm import SCM
from fewstep.methods.sfd import SFD
from fewstep.methods.shortcut import Shortcut
from fewstep.methods.turns import turns_of, updates_a_step
from fewstep.networks.roles import Roles
from fewstep.objectives.legs import Scales
from fewstep.recipe.store import load
from fewstep.train.trainer import Trainer, gradients

SPRINT = """
about: sCM with its learned weighting and LADD on the ring
data: {name: ring}
teacher: {name: ring, process: {name: trig}}
student: {name: mlp, width: 16, depth: 3, frequencies: 4, process: {name: trig}, prediction: trig}
critic: {name: copy, of: student}
discriminator: {trunk: critic, taps: [mid], width: 8}
roles: {weighting: {name: logvar}}
method:
  name: joint
  methods:
    - {weight: 1.0, method: {name: scm, warmup: 10}}
    - weight: 0.5
      method: {name: ladd, steps: [1.0], prior_share: 0.5, misaligned: true, student_times: {name: uniform}}
optim: {default: {lr: 1e-3}}
train: {steps: 3, batch: 8, sample_every: 0, ema: []}
evaluate: null
"""


def joint(*methods: Any) -> Joint:
    return Joint(methods=tuple(Share(method=m) for m in methods))


def test_every_methods_turns_can_be_listed_without_its_networks() -> None:
    for name, kind in REGISTRY["method"].items():
        if name != "joint":
            assert turns_of(kind()), name
    assert turns_of(SCM())[0] == ("student", "weighting")


def test_updates_of_a_step_are_those_of_all_its_turns() -> None:
    assert updates_a_step(PSO(steps=(1.0, 0.75, 0.5, 0.25), reference="old"), 9) == {("student",): 3}
    assert updates_a_step(SFD(counts=(2, 4)), 9) == {("student",): 4}
    assert updates_a_step(DMD2(critic=Critic(steps=4)), 9) == {("student",): 1, ("critic", "discriminator"): 4}
    late = Joint(methods=(Share(method=Denoise()), Share(method=SFD(counts=(3,)), start=5)))
    assert [updates_a_step(late, n) for n in (5, 6)] == [{("student",): 1}, {("student",): 3}]


def test_roles_that_one_method_steps_together_are_stepped_together_by_all() -> None:
    assert joint(SCM(), LADD()).companies == [("student", "weighting"), ("discriminator",)]
    # A critic and its heads belong together as soon as one method says so, and so does what a chain connects.
    found = joint(Denoise(), DMD2(gan=None), DMD2(), LADD(train_trunk=True)).companies
    assert [set(c) for c in found] == [{"student"}, {"critic", "discriminator"}]


def test_two_averages_in_one_role_are_refused_when_the_recipe_is_read() -> None:
    with pytest.raises(ValueError, match="shortcut and consistency both move the role target"):
        joint(Shortcut(), Consistency(target_decay=0.9))
    joint(Shortcut(), Consistency())


def test_a_learned_weighting_and_an_adversary_train_one_student(tmp_path: Path) -> None:
    path = tmp_path / "sprint.yaml"
    path.write_text(SPRINT)
    trainer = Trainer(load(str(path)), cpu=True)
    before = {r: gradients_free(trainer.roles, r) for r in ("student", "weighting", "discriminator", "critic")}
    trainer.fit()
    assert trainer.progress.skipped == 0
    assert sorted(trainer.loop.optim) == ["discriminator", "student+weighting"]
    after = {r: gradients_free(trainer.roles, r) for r in before}
    assert {r for r in before if not torch.equal(before[r], after[r])} == {
        "student",
        "weighting",
        "discriminator",
    }
    # The student's gradient is the weighted sum of both losses' on the draws that each has.
    roles, method = trainer.roles, trainer.recipe.method
    batch = trainer.loop.batch(trainer.recipe.stages()[-1], (0, 0), 0)

    def gradient(one: Any, draws: Draws) -> Tensor:
        roles.train_only("student", "weighting")
        for p in roles.parameters("student"):
            p.grad = None
        batch.draws = draws
        for losses in next(iter(one.turns(roles, 1))).losses(batch):
            losses.total().backward()
        return gradients(roles.parameters("student")).clone()

    key, index = batch.draws.key, batch.draws.index
    scm, ladd = (share.method for share in method.methods)  # type: ignore[attr-defined]
    parts = gradient(scm, Draws(key, index)) + 0.5 * gradient(ladd, Draws(fold(key, "joint", 1), index))
    torch.testing.assert_close(gradient(method, Draws(key, index)), parts, rtol=1e-4, atol=1e-6)


def gradients_free(roles: Roles, name: str) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in roles.parameters(name)])


def test_a_bad_sum_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "sum.yaml"
    both = "[{method: {name: consistency, target_decay: 0.9}}, {method: {name: shortcut}}]"
    path.write_text(f"about: x\ndata: {{name: ring}}\nstudent: {{name: mlp}}\nmethod: {{name: joint, methods: {both}}}\n")
    with pytest.raises(RecipeError, match=r"sum\.yaml:4: method.*both move the role target"):
        load(str(path))


def test_a_method_may_begin_late(tmp_path: Path) -> None:
    path = tmp_path / "late.yaml"
    late = SPRINT.replace("- weight: 0.5\n", "- weight: 0.5\n      start: 2\n")
    path.write_text(late)
    trainer = Trainer(load(str(path)), cpu=True)
    before = gradients_free(trainer.roles, "discriminator")
    turns = {k: [t.updates for t in trainer.recipe.method.turns(trainer.roles, k)] for k in (1, 2)}  # type: ignore[attr-defined]
    assert turns == {1: [("student", "weighting")], 2: [("student", "weighting"), ("discriminator",)]}
    trainer.fit()
    assert not torch.equal(before, gradients_free(trainer.roles, "discriminator"))
    with pytest.raises(ValueError, match="let one start at 0"):
        Joint(methods=(Share(method=SCM(), start=1),))


def test_rcms_backward_simulation_walks_random_levels() -> None:
    process, law = Flow(), RandomSteps(most=4, times=Uniform(low=0.0, high=1.0, shift=5.0))
    counts = torch.zeros(5)
    for k in range(400):
        times = law.draw(Draws(fold("random steps", k), torch.arange(6)), process)
        counts[len(times)] += 1
        assert torch.equal(times[0], torch.ones(6, dtype=F64))
        assert all(bool((b <= a).all()) for a, b in pairwise(times))
        assert all(len(set(b.tolist())) > 1 for b in times[1:])
    # One to four steps, each as likely: five standard errors of a share of a quarter.
    assert bool(((counts[1:] / 400 - 0.25).abs() < 5 * (0.1875 / 400) ** 0.5).all())
    # Later draws do not depend on how many steps there were, and the last call alone has a graph.
    student = Told()
    ahead = set()
    for k in range(20):
        d = Draws(fold("rollout", k), torch.arange(6))
        made = rollout(student, d, (2,), law, None)
        ahead.add(d._calls)
        assert made.x.requires_grad
        assert not made.x_in.requires_grad
        assert bool((made.t <= 1).all())
    assert len(ahead) == 1


def test_dmd2_trains_both_turns_on_simulated_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    walked: list[Any] = []

    def listen(student: Any, draws: Draws, shape: Any, steps: Any, *rest: Any, **call: Any) -> Any:
        walked.append(steps)
        return rollout(student, draws, shape, steps, *rest, **call)

    monkeypatch.setattr("fewstep.methods.dmd2.rollout", listen)
    law = RandomSteps(times=Uniform(low=0.0, high=1.0))
    roles = Roles(student=Told(), critic=Told(), teacher=Told())
    for method in (DMD2(gan=None, simulate=law), DMD2(gan=None, steps=(1.0, 0.5))):
        for turn in method.turns(roles, 0):
            list(turn.losses(Batch(Draws(fold("dmd2"), torch.arange(4)), (2,))))
    assert walked == [law, law, (1.0, 0.5), (1.0, 0.5)]
    # A student is sampled at its own levels all the same.
    assert DMD2(gan=None, simulate=law).sampler().steps == (1.0,)


class Told(nn.Module):
    """x0 = slope x."""

    takes_s, inputs, process = False, (), Flow()

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.4))

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        return from_x0(self.process, x, t, self.slope * x)


class Mean(nn.Module):
    """A student whose x0 is its input plus the scale that it is told; it writes down its times."""

    takes_s, inputs = False, ("w",)

    def __init__(self, process: Any) -> None:
        super().__init__()
        self.process = process
        self.at: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, *, w: Any = None, **call: Any) -> Prediction:
        self.at.append((x, t, w))
        return from_x0(self.process, x, t, x)


class Judge(nn.Module):
    """Logits that see whether the sample's first element has the sign of its class."""

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return 0.3 * x[:, :1] * (2 * cond.double()[:, None] - 1)


def labelled(n: int, *name: int | str) -> Batch64:
    batch = Batch64.of(n, 2, *name)
    batch.cond, batch.null_cond = (torch.arange(n) % 2), torch.full((n,), 2)
    return batch


def test_misaligned_pairs_are_further_fakes() -> None:
    n = 6
    roles = Roles(student=Mean(Flow()), discriminator=Judge())
    gan = replace(LADD().gan, times=Uniform(low=0.0, high=1e-9))
    values = {}
    for misaligned in (False, True):
        method = LADD(steps=(1.0,), misaligned=misaligned, gan=gan)
        (losses,) = method.discriminator_losses(roles, labelled(n))
        values[misaligned] = float(losses["discriminator"])
    batch = labelled(n)
    x0, x = batch.data(), batch.noise()

    def logits(sample: Tensor) -> Tensor:
        return Judge()(sample, x[:, 0], batch.cond)

    real = torch.relu(1 - logits(x0)).mean()
    fake, rolled = torch.relu(1 + logits(x)), torch.relu(1 + logits(x0.roll(1, 0)))
    # Half of the sum of both means; the mean of the fakes is over generated and misaligned samples alike.
    assert abs(values[False] - 0.5 * float(real + fake.mean())) < 1e-6
    assert abs(values[True] - 0.5 * float(real + torch.cat((fake, rolled)).mean())) < 1e-6
    assert abs(values[True] - values[False]) > 1e-3


def test_sprints_student_starts_at_levels_of_its_law_or_at_the_prior() -> None:
    n = 4000
    for process in (Flow(), DiscreteVP()):
        student, scales = Mean(process), Scales(of=(4.0, 5.0))
        method = LADD(steps=(1.0,), student_times=Uniform(low=0.2, high=0.4), prior_share=0.5, guidance=scales)
        method.produce(Roles(student=student), labelled(n), grad=False)
        x, t, w = student.at[0]
        level = process.level(t)
        prior = level == 1
        assert abs(float(prior.double().mean()) - 0.5) < 5 * (0.25 / n) ** 0.5
        assert bool(((level[~prior] > 0.2) & (level[~prior] < 0.4)).all())
        assert set(w.tolist()) == {4.0, 5.0}
        # Where sampling starts there is noise alone, although a DDPM table leaves a trace of the data there.
        assert abs(float(x[prior].mean())) < 5 / (n * float(prior.double().mean())) ** 0.5
        assert method.sampler().guidance == 4.5
    with pytest.raises(ValueError, match="student_times noises data"):
        LADD(source="rollout", student_times=Uniform())
    assert torch.tensor(0.0, dtype=F64).dtype == F64
