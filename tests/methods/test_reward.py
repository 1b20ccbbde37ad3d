"""A reward beside a method's losses: its own terms, the published fixed points, and which methods have it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from distribution_cases import F64, Affine, Scripted, batch64, midpoints, players, student_gradient
from listening import batch_of
from torch import Tensor, nn

from fewstep.algebra.batch import Batch
from fewstep.algebra.process import Flow
from fewstep.algebra.times import Levels
from fewstep.config import REGISTRY, RecipeError
from fewstep.methods.denoise import Denoise
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.first_step import FirstStep
from fewstep.methods.joint import Joint, Share
from fewstep.methods.pso import PSO
from fewstep.methods.reward import Reward, follows_reward
from fewstep.methods.segments import Segments
from fewstep.methods.vsd import VSD
from fewstep.recipe.store import load
from fewstep.train.trainer import Trainer

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


class Told(nn.Module):
    """A reward by a function of (x, cond), with a weight of its own that nothing should train."""

    def __init__(self, value: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.value, self.scale = value, nn.Parameter(torch.ones((), dtype=F64))

    def forward(self, x: Tensor, cond: Any = None) -> Tensor:
        return self.scale * self.value(x)


class Conditional(nn.Module):
    """A network of x that is shown a condition too."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, cond: Any = None) -> Tensor:
        return self.net(x)


def linear(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1)


def expected(mean: float, std: float, value: Callable[[Tensor], Tensor], weight: float) -> Tensor:
    """The student's mean gradient (d mean, d std) over the five levels with an exact critic and the weight kl."""
    found = []
    for level in LEVELS:
        method = VSD(times=Levels(at=(level,)), weight="kl", reward=Reward(weight=weight))
        roles = players(Flow(), mean, std, reward=Told(value))
        z, eps = midpoints(40)
        found.append(student_gradient(method, roles, Batch(Scripted([z, eps]), (1,))))
    return torch.stack(found).mean(0)


@pytest.mark.parametrize(("weight", "mean"), [(0.2, 0.8024081155), (1.0, 1.2120405776)])
def test_a_linear_reward_shifts_the_mean_by_its_weight_over_the_anchor_and_keeps_the_spread(weight: float, mean: float):
    assert expected(mean, 0.4, linear, weight).tolist() == pytest.approx([0.0, 0.0], abs=1e-8)
    assert float(expected(mean - 0.01, 0.4, linear, weight)[0]) == pytest.approx(-0.01 * 1.9529702209, rel=1e-6)


@pytest.mark.parametrize(("kappa", "mean", "std"), [(1.0, 0.8015926263, 0.2965559650), (5.0, 0.9157351394, 0.1498297684)])
def test_a_quadratic_reward_narrows_the_student_too(kappa: float, mean: float, std: float):
    def value(x: Tensor) -> Tensor:
        return -kappa / 2 * ((x - 1) ** 2).sum(1)

    assert expected(mean, std, value, 1.0).tolist() == pytest.approx([0.0, 0.0], abs=1e-8)
    # Where the student stood without it the reward pulls the mean up and the spread together.
    slope = expected(0.7, 0.4, value, 1.0)
    assert (slope[0] < 0) & (slope[1] > 0)


def losses_of(reward: Reward, x: Tensor, step: int = 0) -> Any:
    roles = players(reward=Told(linear))
    return reward.losses(roles, replace(batch64(len(x)), step=step), x)


def test_a_hinge_leaves_samples_above_the_threshold_alone():
    x = torch.tensor([[0.5], [2.0], [-1.0]], dtype=F64, requires_grad=True)
    hinge = losses_of(Reward(weight=3.0, kind="hinge", threshold=0.7), x)
    assert float(hinge["reward_loss"].detach()) == pytest.approx(3 * (0.2 + 0 + 1.7) / 3)
    assert torch.autograd.grad(hinge.total(), x)[0].flatten().tolist() == [-1.0, 0.0, -1.0]
    plain = losses_of(Reward(weight=3.0), x)
    assert float(plain["reward_loss"].detach()) == pytest.approx(-3 * 0.5)
    assert float(plain.log["reward"]) == float(hinge.log["reward"]) == 0.5


def test_it_begins_after_so_many_student_updates_and_is_read_before():
    x = torch.ones(3, 1, dtype=F64, requires_grad=True)
    early, late = (losses_of(Reward(weight=1.0, after=7), x, step) for step in (6, 7))
    assert set(early) == set()
    assert set(late) == {"reward_loss"}
    assert float(early.log["reward"]) == float(late.log["reward"]) == 1.0


def test_the_reward_itself_is_not_trained():
    roles, method = players(reward=Told(linear)), VSD(reward=Reward(weight=1.0))
    assert method.needs().trained == {"student", "critic"}
    student_gradient(method, roles, batch64())
    assert roles.reward.scale.grad is None


WITH_REWARD = sorted(
    name for name, kind in REGISTRY["method"].items() if "reward" in getattr(kind, "__dataclass_fields__", {})
)


def test_every_score_method_and_segments_have_the_term():
    assert WITH_REWARD == [
        "class_ratio", "decoupled_dmd", "dmd", "dmd2", "emd", "f_distill", "phased_dmd", "segments", "sid",
        "uni_instruct", "vsd",
    ]  # fmt: skip


@pytest.mark.parametrize("name", WITH_REWARD)
def test_weight_0_changes_no_bit_and_weight_1_adds_the_rewards_gradient(name: str):
    """In every method the student's samples x are a linear function of its mean: d <-x> / d mean is -1."""
    kind: Any = REGISTRY["method"][name]
    extra = {"decoupled_dmd": {"guidance": 1.0}, "dmd": {"regression_weight": 0}, "segments": {"knots": 8}}.get(name, {})
    extra |= {"phased_dmd": {"loss_on": "x0", "steps": (1.0,), "boundaries": ()}}.get(name, {})
    extra |= {"f_distill": {"bins": 0}, "emd": {"step_z": 0.0}}.get(name, {})
    bare = kind(**extra)
    found = []
    for method in (bare, replace(bare, reward=Reward(weight=0.0)), replace(bare, reward=Reward(weight=1.0))):
        assert ("reward" in method.needs().roles) == (method.reward is not None)
        assert method.needs().reward == ("" if method.reward is None else "gradient")
        roles = players(reward=Told(linear))
        data = torch.linspace(-1, 2, 16, dtype=F64).reshape(-1, 1)
        found.append(student_gradient(method, roles, batch64(16, x0=data)))
    assert torch.equal(found[0], found[1])
    assert float(found[2][0] - found[0][0]) == pytest.approx(-1.0, abs=1e-9)


def test_joint_asks_for_what_its_methods_ask_for():
    rewarded = DMD2(gan=None, reward=Reward(weight=1.0))
    both = Joint(methods=(Share(method=Segments()), Share(method=rewarded)))
    assert both.needs().reward == "gradient"
    assert "reward" in both.needs().roles
    assert "reward" not in both.needs().trained


def test_recipes_without_the_role_or_with_one_that_has_no_gradient_are_refused():
    with pytest.raises(RecipeError, match="method dmd2 needs the role reward"):
        load("toy/dmd2", ["method.reward={weight: 1.0}"])
    with pytest.raises(RecipeError, match=r"roles\.reward: ink has no gradient with these settings.*method pso"):
        load("toy/dmd2-ink", ["roles.reward.above=0.0"])
    with pytest.raises(RecipeError, match="after must not be negative"):
        load("toy/dmd2-ink", ["method.reward.after=-1"])


def test_segments_rewards_the_end_of_the_jump():
    """Hyper-SD's feedback stage looks at x0, wherever the segment ends."""
    roles = players(reward=Told(linear))
    seen: list[Tensor] = []
    roles.reward.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    method = Segments(segments=4, knots=8, to="edge", reward=Reward(weight=1.0))
    batch = batch_of(5, 1)
    list(method.losses(roles, batch))
    student: Affine = roles.student  # type: ignore[assignment]
    again = batch_of(5, 1)
    t = Flow().grid(method.levels(again.draws)[0])
    noised = (1 - t)[:, None] * again.data() + t[:, None] * again.noise()
    torch.testing.assert_close(seen[0].detach(), (student.mean + student.std * noised / t[:, None]).detach())


@pytest.mark.parametrize(
    ("above", "slope", "intercept"), [(1.0, 0.7528435804, -0.3003631539), (0.5, 0.8801633169, 0.0753481394)]
)
def test_the_best_linear_reward_model_has_the_slope_of_the_expected_reward(above: float, slope: float, intercept: float):
    """Stein: of r = 1[x > c], which has no gradient, the fitted line's slope is d E[r] / d mean."""

    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (
                nn.Parameter(torch.tensor(slope, dtype=F64)),
                nn.Parameter(torch.tensor(intercept, dtype=F64)),
            )

        def forward(self, x: Tensor, cond: Any = None) -> Tensor:
            return self.a * x[:, 0] + self.b

    q = torch.special.ndtri((torch.arange(200_000, dtype=F64) + 0.5) / 200_000)
    roles = players(reward=Told(lambda x: (x[:, 0] > above).to(F64)), latent_reward=Line())
    reward = Reward(weight=1.0, by="latent_reward")
    losses = reward.fit(roles, batch64(1), (0.7 + 0.4 * q).reshape(-1, 1))
    found = torch.autograd.grad(losses["reward_fit"], list(roles.latent_reward.parameters()))
    assert [float(g) for g in found] == pytest.approx([0.0, 0.0], abs=2e-5)
    # What the student follows is the line.
    x = torch.zeros(3, 1, dtype=F64, requires_grad=True)
    term = reward.losses(roles, batch64(3), x)
    assert float(torch.autograd.grad(term["reward_loss"], x)[0][0]) == pytest.approx(-slope / 3)
    assert set(term.log) == {"reward_predicted"}


def test_the_reward_model_has_a_turn_of_its_own_and_the_reward_needs_no_gradient():
    told = DMD2(gan=None, reward=Reward(weight=1.0, by="latent_reward", model_steps=3))
    assert told.needs().reward == "value"
    assert told.needs().trained == {"student", "critic", "latent_reward"}
    roles = players(reward=Told(lambda x: (x[:, 0] > 0).to(F64)), latent_reward=Told(linear))
    turn = list(told.turns(roles, 0))[-1]
    assert (turn.updates, turn.times) == (("latent_reward",), 3)
    (losses,) = turn.losses(batch64(8))
    assert set(losses) == {"reward_fit"}
    losses.total().backward()
    assert roles.student.mean.grad is None
    assert roles.reward.scale.grad is None
    assert roles.latent_reward.scale.grad is not None
    with pytest.raises(RecipeError, match=r"this method trains none; dmd2, sid, f_distill, uni_instruct, vsd do"):
        load("toy/emd", ["method.reward={weight: 1.0, by: latent_reward}"])
    recipe = load(
        "toy/dollar", ["train.steps=2", "train.batch=8", "before=[]", "copy={}", "evaluate=null", "method.reward.after=0"]
    )
    trainer = Trainer(recipe, None, cpu=True)
    trainer.fit()
    assert {"reward", "reward_predicted", "reward_fit", "reward_loss"} <= set(trainer.last_record)


def test_the_reward_model_learns_from_the_samples_that_it_is_asked_about():
    """Those of dmd2's first step, when that has a loss of its own, are none of them."""
    method = DMD2(
        gan=None, steps=(1.0, 0.5), first_step=FirstStep(level=0.6), reward=Reward(weight=1.0, by="latent_reward")
    )
    roles = players(reward=Told(linear), latent_reward=Told(linear))
    seen: list[Tensor] = []
    roles.reward.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    turn = list(method.turns(roles, 0))[-1]
    for key in range(6):
        list(turn.losses(batch64(8, key=key)))
        assert torch.equal(seen.pop(), method.rolled(roles, batch64(8, key=key), grad=False).x)


def test_the_reward_model_is_trained_in_the_precision_in_which_it_is_followed():
    model = nn.Sequential(nn.Linear(1, 8), nn.Linear(8, 1), nn.Flatten(0))
    roles = players(reward=Told(lambda x: x[:, 0]), latent_reward=Conditional(model))
    x = batch64(16).draws.normal(1).float()
    reward = Reward(weight=1.0, by="latent_reward")
    plain = reward.fit(roles, batch64(16), x)["reward_fit"]
    with torch.autocast("cpu", torch.bfloat16):
        cast = reward.fit(roles, batch64(16), x)["reward_fit"]
    assert float(plain.detach()) == float(cast.detach()) > 0


def test_from_which_update_on_a_reward_is_followed():
    late = DMD2(gan=None, reward=Reward(weight=1.0, after=5))
    assert [follows_reward(late, n) for n in (0, 4, 5, 9)] == [False, False, True, True]
    assert not follows_reward(DMD2(gan=None), 9)
    assert not follows_reward(DMD2(gan=None, reward=Reward(weight=0.0)), 9)
    assert follows_reward(PSO(reference="teacher"), 0)
    joint = Joint(methods=(Share(method=Denoise()), Share(method=late, start=7)))
    assert [follows_reward(joint, n) for n in (5, 6, 7)] == [False, False, True]
