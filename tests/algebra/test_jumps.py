"""AnyFlow's rollouts: those of existing samplers at their limits, the exact map's end whatever the steps, gradients."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from listening import F64, Listening, batch_of
from torch import Tensor
from trajectory_helpers import MEAN, STD, TIGHT, ExactMap
from turning import turned

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.jumps import Jumps, jumped
from fewstep.algebra.process import EDM, Flow, Trig
from fewstep.algebra.rollout import RandomSteps, rollout, unrolled
from fewstep.config import RecipeError
from fewstep.methods.critic import Critic
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.first_step import FirstStep
from fewstep.methods.joint import Joint, Share
from fewstep.methods.meanflow import MeanFlow
from fewstep.networks.analytic import flow_map, gaussian
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.mlp import MLP
from fewstep.networks.roles import Roles
from fewstep.recipe.cards import cite
from fewstep.recipe.store import load

FLOW = Flow()


def net(seed: int, *inputs: str) -> Denoiser:
    torch.manual_seed(seed)
    made = Denoiser(MLP(2, 12, 3, 0, inputs), FLOW, "velocity", "angle")
    for name in inputs:
        made.net.extras[name].linear.weight.data.normal_(0, 0.2)
    return made


def draws(key: int, rows: int = 6) -> Draws:
    return Draws(fold("jumps", key), torch.arange(rows))


def updated(method: Any, steps: int = 3) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Losses and weights of some steps."""
    roles = Roles(teacher=net(1), student=net(2, "s"), critic=net(3))

    def batch(step: int, number: int, repeat: int) -> Batch:
        d = Draws(fold("jumps", step, number, repeat), torch.arange(9))
        return Batch(d, (2,), Draws(fold("data", step), torch.arange(9)).normal(2))

    return turned(method, roles, steps, batch)


def test_one_step_is_dmd2_of_one_step_bit_for_bit() -> None:
    common: dict[str, Any] = {"path": "map", "gan": None, "critic": Critic(steps=1)}
    plain, same = updated(DMD2(**common)), updated(DMD2(**common, jumps=Jumps(counts=(1,))))
    assert plain[0] == same[0]
    assert all(torch.equal(v, same[1][k]) for k, v in plain[1].items())
    assert updated(DMD2(**common, jumps=Jumps(counts=(2,))))[0] != plain[0]


@pytest.mark.parametrize("grad", ["all", "step"])
def test_two_steps_are_all_of_a_two_step_rollout(grad: Any) -> None:
    student, seen = net(2, "s"), set()
    weights = list(student.parameters())
    for key in range(8):
        jumps = Jumps(counts=(2,), grad=grad)
        step = jumps.draw(draws(key))[1]
        seen.add(step)
        made = jumped(student, draws(key), (2,), jumps)
        # The same noise: a draw of the step stands before it.
        again = draws(key)
        again.shared_integer(2)
        if grad == "all" or step == 0:
            wanted = unrolled(student, again, (2,), (1.0, 0.5))
        else:
            wanted = rollout(student, again, (2,), (1.0, 0.5), exit=1, path="map").x
        assert torch.equal(made.x, wanted)
        for ours, theirs in zip(
            torch.autograd.grad(made.x.sum(), weights), torch.autograd.grad(wanted.sum(), weights), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    assert seen == {0, 1}


def test_many_steps_take_three_calls_at_the_levels_around_one_of_them() -> None:
    student, found = Listening(FLOW, 0.3, -0.1, takes_s=True), Counter()
    for key in range(400):
        student.times.clear()
        student.ends.clear()
        jumped(student, batch_of(3, key=key).draws, (2,), Jumps(counts=(50,)), grad=False)
        ways = [(float(t[0]), float(s[0])) for t, s in zip(student.times, student.ends, strict=True)]  # type: ignore[index]
        assert ways[0][0] == 1.0
        assert ways[-1][1] == 0.0
        assert all(a[1] == b[0] for a, b in pairwise(ways))
        assert len(ways) in (2, 3)
        step = next((w for w in ways if abs(w[0] - w[1] - 0.02) < 1e-12), None)
        assert step is not None
        found[round(50 * (1 - step[0]))] += 1
    assert set(found) <= set(range(50))
    # Each of 50 as likely: within five standard errors of 400 / 50.
    assert max(abs(found[k] - 8) for k in range(50)) < 5 * (8 * 0.98) ** 0.5
    assert len({Jumps(counts=(2, 7)).draw(draws(k))[0][-1] for k in range(40)}) > 4


@pytest.mark.parametrize("process", [Flow(), Trig(), TIGHT], ids=["flow", "trig", "edm"])
def test_the_exact_map_ends_where_it_must_whatever_the_steps(process: Any) -> None:
    top = process.grid(torch.ones(6, dtype=F64))
    ends = []
    for key in range(12):
        d = batch_of(6, 1, key=5).draws
        d.shared_integer = lambda high, key=key: (7 * key + 3) % high  # type: ignore[method-assign]
        ends.append(jumped(ExactMap(process), d, (1,), Jumps(), grad=False).x)
    noise = batch_of(6, 1, key=5).draws.normal(1)
    wanted = flow_map(process, MEAN, STD, process.prior(noise, top), top, process.grid(0 * top))
    for x in ends:
        torch.testing.assert_close(x, wanted, rtol=0, atol=1e-6 if isinstance(process, EDM) else 1e-10)
    # A denoiser that knows of no destination is no flow map: its samples depend on the steps.
    plain = [
        jumped(gaussian(process, MEAN, STD), batch_of(6, 1, key=5).draws, (1,), Jumps(counts=(n,)), grad=False).x
        for n in (1, 2)
    ]
    assert float((plain[0] - plain[1]).abs().max()) > 1e-2


def test_matching_rests_at_the_exact_map_and_the_joint_adds_the_flow_maps_loss() -> None:
    method = DMD2(path="map", gan=None, jumps=Jumps(), critic=Critic())
    map_ = MeanFlow(source="teacher", apart=0.5, to_clean=0.25, power=0.0)
    both = Joint(methods=(Share(method=method), Share(method=map_, weight=0.5)))
    assert both.needs().inputs == {"s"}
    assert both.sampler().counts == (1, 2, 4, 8, 16, 50)
    for critic, rests in ((MEAN, True), (MEAN + 0.2, False)):
        roles = Roles(teacher=gaussian(FLOW, MEAN, STD), student=ExactMap(FLOW), critic=gaussian(FLOW, critic, STD))
        (losses,) = method.student_losses(roles, batch_of(6, 1))
        assert (float(losses.total()) < 1e-20) is rests
    together, alone = updated(both), updated(method)
    assert together[0][0]["dmd2/match"] == alone[0][0]["match"]
    assert "meanflow/meanflow" in together[0][1]


def test_a_share_of_the_rows_jumps_to_the_clean_end() -> None:
    n = 8000
    batch = Batch(Draws(fold("clean"), torch.arange(n)), (1,), torch.zeros(n, 1))
    t, s = MeanFlow(apart=0.5, to_clean=0.25).pair(batch, FLOW)
    for share, rows in ((0.25, s == 0), (0.5, s == t)):
        assert abs(float(rows.double().mean()) - share) < 5 * (share * (1 - share) / n) ** 0.5
    again = Batch(Draws(fold("clean"), torch.arange(n)), (1,), torch.zeros(n, 1))
    before = MeanFlow(apart=0.5).pair(again, FLOW)
    assert torch.equal(before[0], t)
    assert torch.equal(before[1][s > 0], s[s > 0])
    with pytest.raises(ValueError, match=r"to_clean: must lie in \[0, apart\], \[0, 0.25\], not 0.5"):
        MeanFlow(to_clean=0.5)


def test_what_is_no_flow_maps_rollout_is_refused() -> None:
    for change in ({"path": "renoise"}, {"simulate": RandomSteps()}, {"first_step": FirstStep(), "steps": (1.0, 0.5)}):
        with pytest.raises(ValueError, match="jumps: a flow map's need path: map"):
            DMD2(**{"path": "map", "gan": None, "jumps": Jumps(), **change})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="counts is empty"):
        Jumps(counts=())
    with pytest.raises(RecipeError, match=r"student.inputs: .*needs \[s\], not \[\]"):
        load("toy/anyflow", ["student.inputs=[]"])
    assert "2605.13724" in cite("toy/anyflow")
    assert "2605.13724" not in cite("toy/dmd2")
