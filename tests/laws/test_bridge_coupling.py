"""IBMD, sid with alpha 1/2 on bridges, recovers the coupling of Gaussians from corrupted inputs alone."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from distribution_cases import F64, Scripted
from torch import nn

from fewstep.algebra.batch import Batch
from fewstep.algebra.bridge import Brownian
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.prediction import from_x0
from fewstep.algebra.times import Levels
from fewstep.methods.critic import Critic
from fewstep.methods.sid import SiD
from fewstep.networks.bridged import Bridged
from fewstep.networks.roles import Roles

MEAN, STD, GAIN, SHIFT, NOISE, EPS = 0.7, 0.4, 0.8, -0.3, 0.5, 0.5
END, AT_END = GAIN**2 * STD**2 + NOISE**2, GAIN * MEAN + SHIFT
SLOPE, LEFT = GAIN * STD**2 / END, STD**2 * NOISE**2 / END
TIMES = Levels(at=(0.1, 0.3, 0.5, 0.7, 0.9))
LEVELS = torch.tensor(TIMES.at, dtype=F64)
FIRST = 0.9
"""Level at which the student starts: the noise of its state is its z."""


class Of(nn.Module):
    """A denoiser of x_t whose x0 is a function of (x_t, t, x_T)."""

    process = Brownian(eps=EPS)

    def forward(self, x: Any, t: Any, cond: Any = None, **call: Any) -> Any:
        return from_x0(self.process, x, t, self.x0(x, t[:, None], None if cond is None else cond["image"]))


class Exact(Of):
    def x0(self, x: Any, t: Any, source: Any) -> Any:
        a, noise = 1 - t, EPS * t * (1 - t)
        if source is not None:
            prior = MEAN + SLOPE * (source - AT_END)
            return prior + a * LEFT / (a * a * LEFT + noise) * (x - a * prior - t * source)
        cov = a * STD**2 + t * GAIN * STD**2
        var = a * a * STD**2 + 2 * t * a * GAIN * STD**2 + t * t * END + noise
        return MEAN + cov / var * (x - a * MEAN - t * AT_END)


class Affine(Of):
    """The critic: affine at each level, so that its optimum is exact."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(len(LEVELS), 3, dtype=F64))

    def x0(self, x: Any, t: Any, source: Any) -> Any:
        w = self.w[torch.bucketize(t[:, 0], LEVELS - 1e-6) - 1]
        out = w[:, :1] + w[:, 1:2] * x
        return out if source is None else out + w[:, 2:] * source


class Student(Of):
    """x0 = a + b x_T + d z, z the noise of its state."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([0.2, 0.2, 0.6], dtype=F64))

    def x0(self, x: Any, t: Any, source: Any) -> Any:
        z = (x - t * source) / torch.sqrt(EPS * t * (1 - t))
        return self.p[0] + self.p[1] * source + self.p[2] * z


def trained(sees: bool, updates: int = 500, b: int = 512) -> list[float]:
    """(a, b, |d|) of the average student of the last updates, from x_T alone."""
    student: Any = Student()
    roles = Roles(
        teacher=Bridged(Exact(), sees),
        student=Bridged(student, True),
        critic=Bridged(Affine(), sees),
    )
    critic = Critic(times=TIMES, weight="x0", steps=5)
    method = SiD(steps=(FIRST,), alpha=0.5, normalize=False, times=TIMES, critic=critic)
    adam = {name: torch.optim.Adam(roles.parameters(name), 2e-2) for name in ("student", "critic")}
    kept = []
    for step in range(updates):
        for optimizer in adam.values():
            optimizer.param_groups[0]["lr"] = 2e-2 if step < updates // 2 else 2e-3
        for number, turn in enumerate(method.turns(roles, step)):
            (name,) = turn.updates
            roles.train_only(name)
            for repeat in range(turn.times):
                draws = Draws(fold("coupling", step, number, repeat), torch.arange(b))
                source = AT_END + math.sqrt(END) * draws.normal(1, dtype=F64)
                batch = Batch(draws, (1,), None, {"image": source})
                adam[name].zero_grad()
                for losses in turn.losses(batch):
                    losses.total().backward()
                adam[name].step()
        kept += [student.p.detach().clone()] if step >= updates - 100 else []
    a, slope, d = torch.stack(kept).mean(0).tolist()
    return [a, slope, abs(d)]


@pytest.mark.parametrize("sees", [False, True], ids=["unconditional", "conditional"])
def test_inverse_matching_on_a_bridge_recovers_the_coupling(sees: bool):
    """controls.md, section 0: target .60556, .36322, .33691 within 2 % after 500 updates."""
    target = [MEAN - SLOPE * AT_END, SLOPE, math.sqrt(LEFT)]
    assert target == pytest.approx([0.6055618615, 0.3632236095, 0.3369085603], abs=1e-6)
    assert trained(sees) == pytest.approx(target, rel=0.02)


def loss(a: float, b: float, d: float) -> torch.Tensor:
    """E |D_T - D_F|^2 of the unconditional bridge with the exact critic, the mean over LEVELS, in closed form."""
    p = torch.tensor([a, b, d], dtype=F64, requires_grad=True)
    t, w = 1 - LEVELS, LEVELS
    noise = EPS * t * w
    mean, var, both = p[0] + p[1] * AT_END, p[1] ** 2 * END + p[2] ** 2, p[1] * END
    at_mean, at = t * mean + w * AT_END, t * t * var + 2 * w * t * both + w * w * END + noise
    own = (t * var + w * both) / at
    real = (t * STD**2 + w * GAIN * STD**2) / (t * t * STD**2 + 2 * w * t * GAIN * STD**2 + w * w * END + noise)
    off = MEAN + real * (at_mean - t * MEAN - w * AT_END) - mean
    value = (off**2 + (real - own) ** 2 * at).mean()
    value.backward()
    return torch.cat((value.detach()[None], p.grad))


def test_the_method_has_the_golden_gradient_at_the_critics_optimum():
    """controls.md, section 2, at (.2, .2, .6): loss .1205710834, gradient (-.4945426834, -.1153165387, .0996384864)."""
    wanted = loss(0.2, 0.2, 0.6)
    assert wanted.tolist() == pytest.approx([0.1205710834, -0.4945426834, -0.1153165387, 0.0996384864], abs=1e-8)
    assert loss(MEAN - SLOPE * AT_END, SLOPE, math.sqrt(LEFT)).abs().max() < 1e-12
    student, critic = Student(), Affine()
    t, w = 1 - LEVELS, LEVELS
    mean, var, both = 0.2 + 0.2 * AT_END, 0.2**2 * END + 0.6**2, 0.2 * END
    own = (t * var + w * both) / (t * t * var + 2 * w * t * both + w * w * END + EPS * t * w)
    critic.w.data = torch.stack((mean - own * (t * mean + w * AT_END), own, torch.zeros_like(own)), 1)
    roles = Roles(teacher=Bridged(Exact()), student=Bridged(student, True), critic=Bridged(critic))
    roles.train_only("student")
    # All is of degree two in the three normal numbers, of which the corners +-1 are the expectation exactly.
    corners = torch.tensor(list(product((-1.0, 1.0), repeat=3)), dtype=F64)
    source = AT_END + math.sqrt(END) * corners[:, :1]
    for level in TIMES.at:
        method = SiD(steps=(FIRST,), alpha=0.5, normalize=False, times=Levels(at=(level,)))
        batch = Batch(Scripted([corners[:, 1:2], corners[:, 2:]]), (1,), None, {"image": source})
        for losses in method.student_losses(roles, batch):
            (losses.total() / len(LEVELS)).backward()
    # The loss is half of it: (D_T - D_F) . (D_T - x - (D_T - D_F) / 2) has the mean |D_T - D_F|^2 / 2.
    assert (2 * student.p.grad).tolist() == pytest.approx(wanted[1:].tolist(), abs=1e-8)
