"""CoDi on a Gaussian: the best affine student of a consistency and a data term, in closed form (arXiv 2310.01407)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.algebra.prediction import Prediction, from_x0
from fewstep.algebra.process import Flow, bc
from fewstep.methods.consistency import Consistency
from fewstep.networks.roles import Roles

MU, SD, TAU = 0.7, 0.4, 0.3
"""x ~ N(MU, SD^2), and the condition c = x + TAU eta."""
KNOTS = (0.25, 0.5, 0.75, 1.0)


class Points:
    """A batch with exactly the moments of (x0, eta, eps): three standard normals by six points, exact to third order."""

    def __init__(self) -> None:
        z = 3**0.5 * torch.cat((torch.eye(3), -torch.eye(3))).double()
        self.x0, eta, self.eps = (MU + SD * z[:, :1], z[:, 1:2], z[:, 2:])
        self.cond, self.null_cond, self.draws, self.step = self.x0 + TAU * eta, None, None, 0

    def data(self) -> Tensor:
        return self.x0

    def noise(self) -> Tensor:
        return self.eps


class Affine(nn.Module):
    """x0 = a x + b c + e, with numbers of their own at every knot; only those of `trained` are being fitted."""

    process = Flow()

    def __init__(self) -> None:
        super().__init__()
        self.weights = {u: torch.zeros(3, dtype=torch.float64) for u in (0.0, *KNOTS)}  # at 0 it is asked and not heard

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **_: Any) -> Prediction:
        a, b, e = self.weights[round(float(t[0]), 6)]
        return from_x0(self.process, x, t, a * x + b * cond + e)


class Exact(nn.Module):
    """The denoiser of x alone, or of x and the condition c."""

    process = Flow()

    def __init__(self, sees: bool) -> None:
        super().__init__()
        variance = 1 / (1 / SD**2 + (1 / TAU**2 if sees else 0))
        self.sees, self.variance = sees, variance

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **_: Any) -> Prediction:
        alpha, sigma = bc(1 - t, x), bc(t, x)
        mean = self.variance * (MU / SD**2 + (cond / TAU**2 if self.sees else 0))
        gain = alpha * self.variance / (alpha**2 * self.variance + sigma**2)
        return from_x0(self.process, x, t, mean + gain * (x - alpha * mean))


class At:
    """A pairing of one pair."""

    def __init__(self, t: float, u: float) -> None:
        self.t, self.u = (torch.full((6,), v, dtype=torch.float64) for v in (t, u))

    def sample(self, *_: Any) -> tuple[Tensor, Tensor]:
        return self.t, self.u


def best(method: Consistency, teacher: Any, consistency: float = 1.0) -> list[float]:
    """(a, b, e) at the prior of the student that minimises the losses knot by knot, each given the one below it."""
    student = Affine()
    for u, t in zip((0.0, *KNOTS), KNOTS, strict=False):
        object.__setattr__(method, "pairing", At(t, u))

        def loss(w: Tensor, t: float = t) -> Tensor:
            student.weights[t] = w
            (losses,) = method.losses(Roles(student=student, teacher=teacher), Points(), 0)  # type: ignore[arg-type]
            return consistency * losses["consistency"] + losses.get("data", torch.zeros(()))

        start = torch.zeros(3, dtype=torch.float64)
        slope = torch.func.grad(loss)(start)
        # Of a quadratic one Newton step is exact.
        curve = torch.autograd.functional.hessian(loss, start)
        student.weights[t] = (-torch.linalg.lstsq(curve, slope[:, None]).solution[:, 0]).detach()
    return student.weights[1.0].tolist()


def codi(data_weight: float) -> Consistency:
    return Consistency(solver="ddim", data_weight=data_weight)


@pytest.mark.parametrize(
    ("sees", "weights", "wanted"),
    [
        (False, (1.0, 1.0), (0.0374419268, 0.5809689966, 0.2933217024)),
        (False, (1.0, 0.0), (0.2597574432, 0.0, 0.7)),
        (False, (0.0, 1.0), (0.0, 0.64, 0.252)),
        (True, (1.0, 1.0), (0.0276395906, 0.64, 0.252)),
        (True, (1.0, 0.0), (0.1278052944, 0.64, 0.252)),
    ],
    ids=["blind", "blind-without-data", "data-alone", "seeing", "seeing-without-data"],
)
def test_the_best_student_of_both_terms(sees: bool, weights: tuple[float, float], wanted: tuple[float, ...]):
    """At t = 1 x is the noise alone: b is what is taken of the picture, a the spread. Without data a blind teacher
    teaches to ignore the picture (b = 0)."""
    found = best(codi(weights[1]), Exact(sees), weights[0])
    assert found == pytest.approx(wanted, abs=1e-9)


def test_a_target_that_leads_is_a_teacher_of_itself():
    """ode target is ode teacher with the target in the teacher's place."""
    student, leads = Affine(), Exact(sees=True)
    for u in KNOTS:
        student.weights[u] = torch.tensor([0.1, 0.5, 0.2], dtype=torch.float64)
    values = []
    for method, roles in (
        (Consistency(solver="ddim", target_decay=0.9, ode="target"), Roles(student=student, target=leads)),
        (Consistency(solver="ddim", target_decay=0.9), Roles(student=student, target=leads, teacher=leads)),
    ):
        object.__setattr__(method, "pairing", At(0.75, 0.5))
        (losses,) = method.losses(roles, Points(), 0)  # type: ignore[arg-type]
        values.append(float(losses["consistency"]))
    assert values[0] == values[1] > 0
    assert Consistency(ode="target", target_decay=0.9).needs().roles == {"student", "target"}


def test_a_step_of_its_own_takes_no_guidance_and_no_data():
    for wrong in ({"guidance": 3.0}, {"guidance": (1.0, 3.0)}, {"source": "data"}):
        with pytest.raises(ValueError, match="ode target: is a step of source teacher by the target's own answer"):
            Consistency(ode="target", **wrong)  # type: ignore[arg-type]
