"""JDM: a teacher that is blind to the control, a critic that sees it, the control as a reward. Gaussians in closed form.

x ~ N(.7, .4^2), c = x + .3 eta, student x = a + b c + d z. Everything is of degree two in (c, z, eps), so the eight
corners +-1 are their expectation exactly.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from distribution_cases import F64, Scripted
from torch import nn

from fewstep.algebra.batch import Batch
from fewstep.algebra.prediction import from_x0
from fewstep.algebra.process import Flow
from fewstep.algebra.times import Levels
from fewstep.methods.vsd import VSD
from fewstep.networks.control import Control
from fewstep.networks.roles import Roles

MEAN, STD, TAU = 0.7, 0.4, 0.3
SEEN = STD**2 + TAU**2
"""Variance of c."""
GAIN, LEFT = STD**2 / SEEN, STD**2 * TAU**2 / SEEN
EXACT = ((1 - GAIN) * MEAN, GAIN, math.sqrt(LEFT))
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
CORNERS = torch.tensor(list(product((-1.0, 1.0), repeat=3)), dtype=F64)


class Student(nn.Module):
    process = Flow()

    def __init__(self, *p: float) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(p, dtype=F64))

    def forward(self, x: Any, t: Any, cond: Any = None, **call: Any) -> Any:
        return from_x0(self.process, x, t, self.p[0] + self.p[1] * cond["image"] + self.p[2] * x)


class Gaussian(nn.Module):
    """E[x0 | x_t] where x0 given c is N(mean + slope c, variance)."""

    process = Flow()

    def __init__(self, mean: float, slope: float, variance: float) -> None:
        super().__init__()
        self.mean, self.slope, self.variance = mean, slope, variance

    def forward(self, x: Any, t: Any, cond: Any = None, **call: Any) -> Any:
        a, s = (1 - t)[:, None], t[:, None]
        mean = self.mean if cond is None or not self.slope else self.mean + self.slope * cond["image"]
        gain = a * self.variance / (a * a * self.variance + s * s)
        return from_x0(self.process, x, t, mean + gain * (x - a * mean))


def gradient(p: tuple[float, float, float], weight: float, levels: tuple[float, ...] = LEVELS, sees: bool = True) -> Any:
    """Mean gradient in (a, b, d) with the exact critic: of the student given c, or (not sees) of its marginal."""
    a, b, d = p
    critic = Gaussian(a, b, d * d) if sees else Gaussian(a + b * MEAN, 0.0, b * b * SEEN + d * d)
    found = []
    for level in levels:
        student = Student(*p)
        roles = Roles(teacher=Gaussian(MEAN, 0.0, STD**2), student=student, critic=critic)
        method = VSD(times=Levels(at=(level,)), weight="kl", guide_critic=False)
        c = MEAN + math.sqrt(SEEN) * CORNERS[:, :1]
        batch = Batch(Scripted([CORNERS[:, 1:2], CORNERS[:, 2:]]), (1,), None, {"image": c})
        for losses in method.student_losses(roles, batch):
            losses.total().backward()
        x = student(CORNERS[:, 1:2], torch.ones(8, dtype=F64), batch.cond).x0
        (-weight * Control(lambda v: v, TAU)(x, batch.cond).mean()).backward()
        found.append(student.p.grad)
    return torch.stack(found).mean(0)


def test_golden_posterior_and_control():
    """controls.md, section 1."""
    assert pytest.approx((0.252, 0.64, 0.24)) == EXACT
    c, z = MEAN + math.sqrt(SEEN) * CORNERS[:, :1], CORNERS[:, 1:2]
    x = 0.1 + 0.5 * c + 0.3 * z
    surprise = -Control(lambda v: v, TAU)(x, {"image": c}).mean() + 0.5 * math.log(2 * math.pi * TAU**2)
    assert float(surprise) == pytest.approx(0.9094101733, abs=1e-9)


@pytest.mark.parametrize(
    ("weight", "slope", "std"),
    [
        (1.0, 0.8505084153, 0.0682314945),
        (0.2, 0.5322442624, 0.2284829921),
        (0.1, 0.3626245490, 0.2885739361),
        (0.3124752353, GAIN, 0.1855566),
    ],
)
def test_the_optimum_with_a_clean_control_beside_noised_scores_is_the_known_one(weight: float, slope: float, std: float):
    found = gradient(((1 - slope) * MEAN, slope, std), weight)
    assert found.tolist() == pytest.approx([0.0, 0.0, 0.0], abs=2e-6)
    assert gradient(((1 - slope) * MEAN + 0.05, slope, std), weight)[0] > 0


def test_without_noise_on_the_scores_the_optimum_is_the_posterior():
    at = gradient(EXACT, 1.0, (1e-4,))
    assert at.tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-5)


def test_a_critic_of_the_marginal_collapses_the_spread():
    """Negative: with a critic that is blind to c the optimum is b = .8968882041, d = 0, and every spread shrinks."""
    slope = 0.8968882041
    still = gradient(((1 - slope) * MEAN, slope, 0.0), 1.0, (1e-4,), sees=False)
    assert still.tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-5)
    for std in (0.02, 0.1, 0.24):
        at = ((1 - slope) * MEAN, slope, std)
        assert gradient(at, 1.0, (1e-4,), sees=False)[2] > 0  # descending it makes the spread smaller
    assert gradient(EXACT, 1.0, (1e-4,), sees=False)[2] > 1.0
    # The critic that sees c holds it: below the true spread it grows.
    assert gradient((*EXACT[:2], 0.1), 1.0, (1e-4,))[2] < -1.0


def test_weight_0_is_matching_alone_and_the_teachers_blindness_is_its_optimum():
    found = gradient((MEAN, 0.0, STD), 0.0)
    assert found.tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-9)
