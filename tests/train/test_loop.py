"""The trainer's step: which noise, which gradients, who moves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws
from fewstep.algebra.times import Uniform
from fewstep.config import UserError
from fewstep.data.toy import Ring
from fewstep.methods.critic import Critic
from fewstep.methods.denoise import Denoise
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.gan import Gan
from fewstep.methods.method import Turn
from fewstep.methods.sfd import SFD
from fewstep.networks.roles import Roles
from fewstep.networks.specs import DiscriminatorSpec, MLPSpec
from fewstep.networks.teachers import RingTeacher
from fewstep.recipe.schema import AdamW, Recipe, Stage
from fewstep.recipe.store import load
from fewstep.recipe.training import Train
from fewstep.train.ema import EMA
from fewstep.train.optim import TurnOptimizer
from fewstep.train.trainer import Trainer, gradients


def recipe(method: Any = None, *, gan: bool = True, lr: float = 1e-3, **train: Any) -> Recipe:
    settings = {"batch": 12, "steps": 3, "clip": 1e9, "ema": (0.9,), **train}
    return Recipe(
        about="test",
        data=Ring(modes=4, conditional=True),
        teacher=RingTeacher(modes=4),
        student=MLPSpec(width=12, depth=4),
        critic=MLPSpec(width=10, depth=4),
        discriminator=DiscriminatorSpec(width=6) if gan else None,
        method=method or DMD2(steps=(1.0, 0.6, 0.3), gan=Gan(weight=0.5, discriminator_weight=0.5) if gan else None),
        optim={"default": AdamW(lr=lr)},
        train=Train(**settings),
        evaluate=None,
    )


def trainer_of(r: Recipe) -> tuple[Trainer, Stage]:
    t = Trainer(r, None, cpu=True)
    return t, r.stages()[-1]


def test_every_update_of_a_step_sees_its_own_noise_and_data(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs: list[torch.Tensor] = []
    keys: list[int] = []
    reals: list[torch.Tensor] = []
    original = DMD2.critic_losses

    def watch(self: DMD2, roles: Roles, batch: Batch, made: Any) -> Any:
        keys.append(batch.draws.key)
        reals.append(batch.data())
        return original(self, roles, batch, made)

    monkeypatch.setattr(DMD2, "critic_losses", watch)
    trainer, stage = trainer_of(recipe(lr=1e-12))
    hook = trainer.roles.student.register_forward_hook(lambda m, args, out: inputs.append(args[0].clone()))
    trainer.loop.step(stage)
    first_step = list(keys)
    trainer.progress.step += 1
    trainer.loop.step(stage)
    hook.remove()
    assert len(first_step) == 5
    assert len(set(keys)) == 10
    for i, a in enumerate(reals):
        assert all(not torch.equal(a, b) for b in reals[i + 1 :])
    # The students' start noises differ between all twelve updates (first rollout call of each is at level 1).
    starts = {tuple(x.flatten()[:6].tolist()) for x in inputs}
    assert len(starts) == len(inputs)
    assert len(inputs) >= 12


def test_a_step_repeats_itself_exactly() -> None:
    states = []
    for _ in range(2):
        trainer, stage = trainer_of(recipe())
        trainer.loop.step(stage)
        states.append({f"{n}.{k}": v.clone() for n in trainer.roles for k, v in trainer.roles[n].state_dict().items()})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def collected(r: Recipe, monkeypatch: pytest.MonkeyPatch, *, micro: int | None = None) -> list[torch.Tensor]:
    """The gradients of every update of one step, in float64 and without moving any weight."""
    found: list[torch.Tensor] = []
    normal = Draws.normal

    def record(self: TurnOptimizer) -> None:
        found.append(gradients(self.parameters).clone())
        self.updates += 1

    with monkeypatch.context() as m:
        m.setattr(TurnOptimizer, "step", record)
        m.setattr(Draws, "normal", lambda self, *shape, dtype=None: normal(self, *shape, dtype=torch.float64))
        trainer, stage = trainer_of(r)
        for module in trainer.roles.values():
            module.double()
        trainer.session.ema.clear()  # made in float32 before
        trainer.loop.step(stage)
    return found


@pytest.mark.parametrize("gan", [False, True])
def test_accumulation_leaves_the_gradient_of_every_role_unchanged(gan: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = collected(recipe(gan=gan), monkeypatch)
    assert len(whole) == 6
    assert all(float(g.abs().max()) > 0 for g in whole)
    # Logits and the time input pass through float32.
    tolerance = 2e-6 if gan else 1e-11
    for count in (2, 3, 4):
        parts = collected(recipe(gan=gan, accumulate=count), monkeypatch)
        assert len(parts) == 6
        for a, b in zip(parts, whole, strict=True):
            assert float((a - b).norm()) <= tolerance * float(b.norm())


def test_critic_and_head_step_together_with_the_weighted_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    # The head's gradient scales with its weight, and the trunk gets the sum of both losses.
    def run(weight: float) -> list[torch.Tensor]:
        method = DMD2(gan=Gan(weight=0.5, discriminator_weight=weight))
        return collected(recipe(method), monkeypatch)[1:]

    for low, middle, high in zip(run(0.25), run(0.5), run(1.0), strict=True):
        assert float(((2 * low + high) / 3 - middle).norm()) < 2e-6 * float(high.norm())
        assert float((high - low).norm()) > 1e-3 * float(high.norm())


def test_each_turn_moves_its_roles_alone() -> None:
    trainer, stage = trainer_of(recipe())
    watched = {n: [p.detach().clone() for p in trainer.roles[n].parameters()] for n in trainer.roles}

    def moved() -> set[str]:
        out = set()
        for n, before in watched.items():
            now = [p.detach() for p in trainer.roles[n].parameters()]
            if any(not torch.equal(a, b) for a, b in zip(before, now, strict=True)):
                out.add(n)
            watched[n] = [p.clone() for p in now]
        return out

    turns = iter(stage.method.turns(trainer.roles, 0))  # type: ignore[attr-defined]
    expected = [{"student"}, {"critic", "discriminator"}]
    for number, want in enumerate(expected):
        turn = next(turns)
        trainer.roles.train_only(*turn.updates)
        optimizer = trainer.loop.optimizer(turn, stage)
        assert trainer.loop.update(turn, optimizer, stage, (number, 0))
        assert moved() == want
        # Nothing is left over for the other role's next step.
        assert all(p.grad is None for n in trainer.roles for p in trainer.roles[n].parameters())


def test_two_time_scales_are_counted() -> None:
    trainer, stage = trainer_of(recipe(DMD2(critic=Critic(steps=4), gan=Gan(weight=0.1))))
    for _ in range(3):
        trainer.loop.step(stage)
        trainer.progress.step += 1
    assert {k: o.updates for k, o in trainer.loop.optim.items()} == {"student": 3, "critic+discriminator": 12}
    assert [e.updates for e in trainer.session.ema] == [3]


def test_gradient_clipping_is_by_the_norm_of_the_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    free = collected(recipe(), monkeypatch)
    limit = 0.5 * min(float(g.norm()) for g in free)
    clipped = collected(recipe(clip=limit), monkeypatch)
    for a, b in zip(clipped, free, strict=True):
        assert float(a.norm()) == pytest.approx(limit, rel=1e-4)
        assert float((a / a.norm() - b / b.norm()).norm()) < 1e-9


def test_non_finite_updates_are_refused_counted_and_finally_stop_the_run() -> None:
    trainer, stage = trainer_of(recipe(max_skips=3, gan=False))
    with torch.no_grad():
        trainer.roles.critic.net.last.weight[0, 0] = float("nan")  # type: ignore[union-attr,index]
    before = {k: v.clone() for k, v in trainer.roles.critic.state_dict().items()}
    student = {k: v.clone() for k, v in trainer.roles.student.state_dict().items()}
    with pytest.raises(UserError, match="3 updates of critic in a row had non-finite gradients"):
        trainer.loop.step(stage)
    after = trainer.roles.critic.state_dict()
    assert all(torch.equal(torch.nan_to_num(before[k]), torch.nan_to_num(after[k])) for k in before)
    # The student's update, which the NaN critic spoiled, was refused too, and left no trace.
    assert all(torch.equal(v, student[k]) for k, v in trainer.roles.student.state_dict().items())
    assert trainer.session.ema[0].updates == 0
    assert trainer.progress.skipped == 4


def test_a_refused_student_step_leaves_its_average_alone() -> None:
    trainer, stage = trainer_of(recipe(Denoise(times=Uniform(low=0.1, high=0.9), weight="x0"), max_skips=9))
    with torch.no_grad():
        trainer.roles.student.net.last.weight[0, 0] = float("inf")  # type: ignore[union-attr,index]
    trainer.loop.step(stage)
    assert trainer.session.ema[0].updates == 0
    assert trainer.progress.skipped == 1


def test_split_of_a_batch_over_micro_batches_keeps_rows() -> None:
    whole_trainer, stage = trainer_of(recipe())
    whole = whole_trainer.loop.batch(stage, (1, 2), 0)
    parts_trainer, stage = trainer_of(recipe(accumulate=3))
    parts = [parts_trainer.loop.batch(stage, (1, 2), i) for i in range(3)]
    assert torch.equal(torch.cat([p.data() for p in parts]), whole.data())
    assert torch.equal(torch.cat([p.cond for p in parts]), whole.cond)
    assert torch.equal(torch.cat([p.noise() for p in parts]), whole.noise())
    assert torch.equal(whole.null_cond, torch.full((12,), 4))


@pytest.mark.parametrize("warmup", [10.0, 2.5])
def test_ema_closed_form(warmup: float) -> None:
    net = nn.Linear(3, 2).double()
    average = EMA(net, 0.97, warmup)
    start = net.weight.detach().clone()
    history = []
    for n in range(60):
        with torch.no_grad():
            net.weight.copy_(torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n)))
        history.append(net.weight.detach().clone())
        average.update(net)
    # shadow_N = prod d_i w_init + sum_k (1 - d_k) prod_{i > k} d_i w_k, d_n = min(d, (1 + n) / (w + n)).
    decays = torch.tensor([min(0.97, (1 + n) / (warmup + n)) for n in range(60)], dtype=torch.float64)
    tail = torch.flip(torch.cumprod(torch.flip(torch.cat((decays[1:], torch.ones(1))), (0,)), 0), (0,))
    want = decays.prod() * start + sum((1 - d) * c * w for d, c, w in zip(decays, tail, history, strict=True))
    assert torch.allclose(average.module.weight, want, rtol=1e-12, atol=1e-13)
    assert average.updates == 60
    assert not average.module.weight.requires_grad
    average.reset(net)
    assert torch.equal(average.module.weight, net.weight)
    assert average.updates == 0


def test_ema_with_constant_decay_after_warm_up() -> None:
    # A constant weight is approached as decay^n once the warm-up is over.
    net = nn.Linear(1, 1, bias=False).double()
    average = EMA(net, 0.5)
    average.updates = 1000
    with torch.no_grad():
        average.module.weight.fill_(1.0)
        net.weight.fill_(0.0)
    for _ in range(20):
        average.update(net)
    assert float(average.module.weight) == pytest.approx(0.5**20, rel=1e-12)


def test_ema_with_a_short_warm_up_is_a_power_average() -> None:
    # With w = gamma + 2 the weight of update k grows as (k / N)^gamma; a ramp's average is N (gamma+1)/(gamma+2).
    net = nn.Linear(1, 1, bias=False).double()
    average = EMA(net, 1 - 1e-9, 4.0)
    for n in range(20_000):
        with torch.no_grad():
            net.weight.fill_(n / 20_000)
        average.update(net)
    assert float(average.module.weight) == pytest.approx(3 / 4, rel=1e-3)


def test_ema_copies_buffers() -> None:
    net = nn.BatchNorm1d(2)
    average = EMA(net, 0.9)
    net(torch.randn(8, 2) + 3)
    average.update(net)
    assert torch.equal(average.module.running_mean, net.running_mean)


def test_learning_rate_schedules() -> None:
    roles = Roles(student=nn.Linear(1, 1), critic=nn.Linear(1, 1))
    specs = {
        "student": AdamW(lr=1.0, warmup=4, decay="linear"),
        "critic": AdamW(lr=2.0, decay="cosine", betas=(0.0, 0.9), eps=1e-6, weight_decay=0.1),
    }
    o = TurnOptimizer(roles, ("student", "critic"), specs, total=8)
    linear, cosine = [], []
    for n in range(8):
        o.updates = n
        linear.append(o.rate(specs["student"]))
        cosine.append(o.rate(specs["critic"]))
    assert linear == pytest.approx([0.25, 0.5 * 7 / 8, 0.75 * 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert cosine[0] == pytest.approx(2.0)
    assert cosine[4] == pytest.approx(1.0)
    assert cosine == sorted(cosine, reverse=True)
    group = o.adam.param_groups[1]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.0, 0.9), 1e-6, 0.1)
    assert [p.shape for g in o.adam.param_groups for p in g["params"]] == [
        p.shape for p in roles.parameters("student", "critic")
    ]


def test_a_rate_falls_over_all_updates_of_a_stage_also_where_a_step_has_several(tmp_path: Path) -> None:
    student = {"optim": {"default": AdamW(lr=1e-3, decay="linear")}, "discriminator": None, "critic": None}
    several = replace(recipe(SFD(counts=(4,), between=0), gan=False, steps=3), **student)
    trainer = Trainer(several, tmp_path, cpu=True)
    stage = several.stages()[0]
    for step in range(2):
        trainer.loop.step(stage)
        trainer.progress.step = trainer.progress.done = step + 1
    held = trainer.loop.optim["student"]
    assert (held.updates, held.total, held.rate(held.specs[0])) == (8, 12, pytest.approx(1e-3 * 4 / 12))
    trainer.save(0)
    again = Trainer(several, tmp_path, cpu=True)
    assert again.resume()
    other = again.loop.optim["student"]
    assert (other.updates, other.total) == (8, 12)
    trainer, stage = trainer_of(recipe(DMD2(critic=Critic(steps=4), gan=Gan(weight=0.1))))
    trainer.loop.step(stage)
    assert {k: o.total for k, o in trainer.loop.optim.items()} == {"student": 3, "critic+discriminator": 12}


def test_one_role_in_two_optimisers_is_refused() -> None:
    trainer, stage = trainer_of(recipe())
    trainer.loop.optimizer(Turn(("critic",), lambda _: []), stage)
    with pytest.raises(ValueError, match="two optimisers"):
        trainer.loop.optimizer(Turn(("critic", "discriminator"), lambda _: []), stage)


def test_batch_that_does_not_split_is_refused() -> None:
    with pytest.raises(ValueError, match="accumulate 5 must divide batch 12"):
        Train(batch=12, accumulate=5)


def test_the_average_takes_the_weights_after_the_step() -> None:
    trainer, stage = trainer_of(recipe(ema=(0.5,), ema_warmup=2.0, lr=1e-2))
    start = [p.detach().clone() for p in trainer.roles.student.parameters()]
    trainer.loop.step(stage)
    after = [p.detach() for p in trainer.roles.student.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(start, after, strict=True))
    for shadow, a, b in zip(trainer.session.ema[0].module.parameters(), start, after, strict=True):
        torch.testing.assert_close(shadow, 0.5 * a + 0.5 * b)


def test_a_new_stage_starts_its_averages_again_from_the_student() -> None:
    trainer, stage = trainer_of(recipe(lr=1e-2))
    (average,) = trainer.session.ema
    trainer.loop.begin(stage)
    for _ in range(3):
        trainer.loop.step(stage)
        trainer.progress.step += 1
    weights = trainer.roles.student.state_dict()
    assert average.updates == 3
    assert any(not torch.equal(v, weights[k]) for k, v in average.module.state_dict().items())
    trainer.progress.stage, trainer.progress.step = 1, 0
    trainer.loop.begin(stage)
    assert average.updates == 0
    assert all(torch.equal(v, weights[k]) for k, v in average.module.state_dict().items())


def test_a_stage_has_rates_of_its_own(tmp_path: Path) -> None:
    """It trains as under that rate for all, bit for bit, and the stages after it know nothing of it."""
    two = "before=[{method: {name: kd, teacher_steps: 2}, steps: 3%s}, {method: {name: kd, teacher_steps: 2}, steps: 3}]"
    short = [
        "optim.student.decay=constant",
        "train.steps=3",
        "train.batch=8",
        "train.log_every=1",
        "train.sample_every=0",
        "train.checkpoint_every=3",
    ]

    def trained(name: str, rates: str, *settings: str) -> tuple[Path, list[float]]:
        run = tmp_path / name
        Trainer(load("toy/dmd2", [two % rates, *short, "train.keep=9", *settings]), run).fit()
        lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
        return run, [r["lr/student"] for r in lines if "lr/student" in r]

    own, rates = trained("own", ", rates: {student: 0.02}")
    assert rates == [0.02] * 3 + [1e-3] * 6
    whole, _ = trained("whole", "", "optim.student.lr=0.02")
    plain, _ = trained("plain", "")
    first = [load_file(run / "checkpoints/step-00000003/student.safetensors") for run in (own, whole, plain)]
    assert all(torch.equal(first[0][k], first[1][k]) for k in first[0])
    assert any(not torch.equal(first[0][k], first[2][k]) for k in first[0])
