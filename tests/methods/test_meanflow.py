"""iMF: du/dt along the network's own velocity, at rest where it must be; guidance as an input; what is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trajectory_helpers import F64, MEAN, STD, Batch64, ExactMap, draws

from fewstep.algebra.noising import add_noise
from fewstep.algebra.prediction import Prediction, from_raw
from fewstep.algebra.process import Flow
from fewstep.config import RecipeError
from fewstep.methods.meanflow import MeanFlow
from fewstep.networks.analytic import gaussian
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.mlp import MLP
from fewstep.networks.roles import Roles
from fewstep.objectives.legs import PowerLaw, drawn, ends, middle
from fewstep.recipe.cards import cite
from fewstep.recipe.store import load

FLOW = Flow()


def only(losses: Any) -> Tensor:
    (one,) = list(losses)
    return one.total()


def net(*inputs: str, classes: int = 0) -> Denoiser:
    torch.manual_seed(5)
    made = Denoiser(MLP(3, 12, 3, classes, inputs), FLOW, "velocity", "angle").double()
    for name in inputs:
        made.net.extras[name].linear.weight.data.normal_(0, 0.2)
    return made


def points(method: MeanFlow, rows: int, dim: int) -> tuple[Tensor, ...]:
    """t, s, x_t and the pair's velocity of a batch, as the method draws them."""
    batch = Batch64.of(rows, dim)
    t, s = method.pair(batch, FLOW)
    x0, eps = batch.data(), batch.noise()
    return t, s, add_noise(FLOW, x0, eps, t)[0], eps - x0


def test_it_rests_at_the_exact_map_of_a_teacher_and_at_the_line_to_a_single_point() -> None:
    method = MeanFlow(source="teacher", along="own", power=0.0)
    teacher = gaussian(FLOW, MEAN, STD)
    assert float(only(method.losses(Roles(teacher=teacher, student=ExactMap(FLOW)), Batch64.of(12, 3), 0))) < 1e-20
    moved = gaussian(FLOW, MEAN + 0.1, STD)
    assert float(only(method.losses(Roles(teacher=moved, student=ExactMap(FLOW)), Batch64.of(12, 3), 0))) > 1e-5

    class Line(nn.Module):
        """All data are one point: velocity (x - point) / t whatever s is."""

        process, takes_s, inputs = FLOW, True, ("s",)

        def __init__(self, point: float) -> None:
            super().__init__()
            self.point = point

        def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
            return from_raw(FLOW, "velocity", x, t, (x - self.point) / t[:, None])

    batch = Batch64.of(12, 3)
    batch.x0 = torch.full((12, 3), 0.7, dtype=F64)
    scratch = MeanFlow(along="own", apart=0.8, power=0.0)
    assert float(only(scratch.losses(Roles(student=Line(0.7)), batch, 0))) < 1e-20
    assert float(only(scratch.losses(Roles(student=Line(0.6)), batch, 0))) > 1e-3


def test_at_the_exact_map_the_compound_velocity_is_a_function_of_x_alone() -> None:
    # The loss is then the variance of e - x0 given x_t, whatever s is; along the pair's velocity it is more.
    t, _, x, pair = points(MeanFlow(apart=0.9), 40, 1)
    marginal = gaussian(FLOW, MEAN, STD)(x, t).velocity()
    wanted = float(((marginal - pair) ** 2).mean())
    losses = {
        along: float(
            only(MeanFlow(along=along, apart=0.9, power=0.0).losses(Roles(student=ExactMap(FLOW)), Batch64.of(40), 0))
        )
        for along in ("own", "target")
    }
    assert losses["own"] == pytest.approx(wanted, rel=1e-9)
    assert abs(losses["target"] - wanted) > 0.01 * wanted


def test_its_gradient_is_that_of_the_squared_error_of_v_by_hand() -> None:
    student, method = net("s"), MeanFlow(along="own", apart=0.7, power=0.0)
    loss = only(method.losses(Roles(student=student), Batch64.of(9, 3), 0))
    t, s, x, pair = points(method, 9, 3)

    def u(x: Tensor, t: Tensor) -> Tensor:
        return student(x, t, None, s=s).velocity()

    with torch.no_grad():
        own = student(x, t).velocity()
        slope = torch.func.jvp(u, (x, t), (own, torch.ones_like(t)))[1]
    by_hand = ((u(x, t) + (t - s)[:, None] * slope - pair) ** 2).mean()
    torch.testing.assert_close(loss, by_hand, rtol=1e-6, atol=1e-9)
    weights = list(student.parameters())
    for ours, theirs in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(by_hand, weights), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)
    other = only(MeanFlow(apart=0.7, power=0.0).losses(Roles(student=student), Batch64.of(9, 3), 0))
    assert abs(float((other - loss).detach())) > 1e-4


def test_it_is_meanflow_where_nothing_is_apart_and_where_the_own_velocity_is_the_teachers() -> None:
    student, teacher = net("s"), gaussian(FLOW, MEAN, STD)
    for common in ({"apart": 0.0}, {"apart": 0.0, "source": "teacher"}):
        who = Roles(student=student, teacher=teacher)
        plain, own = (only(MeanFlow(along=a, **common).losses(who, Batch64.of(8, 3), 0)) for a in ("target", "own"))  # type: ignore[arg-type]
        assert torch.equal(plain, own)
    who = Roles(student=student, teacher=copy.deepcopy(student))
    common = {"apart": 0.8, "source": "teacher", "power": 0.0}
    plain, own = (only(MeanFlow(along=a, **common).losses(who, Batch64.of(8, 3), 0)) for a in ("target", "own"))  # type: ignore[arg-type]
    assert float(plain.detach()) > 1e-8
    torch.testing.assert_close(plain, own, rtol=1e-12, atol=0)


def labelled(rows: int) -> Batch64:
    batch = Batch64.of(rows, 3)
    batch.cond = torch.arange(rows) % 4
    batch.null_cond = torch.full((rows,), 4)
    return batch


def test_one_scale_as_an_input_is_meanflows_guidance_at_kappa_one_minus_its_inverse() -> None:
    # The student does not look at w here: all that is left of it is in the target.
    student = net("s", "w", classes=4)
    student.net.extras["w"].linear.weight.data.zero_()
    who, common = Roles(student=student), {"apart": 0.6, "along": "own", "drop_cond": 0.2, "power": 0.0}
    embedded = MeanFlow(guidance=4.0, embed_guidance=True, **common)  # type: ignore[arg-type]
    plain = MeanFlow(guidance=1.0, kappa=0.75, **common)  # type: ignore[arg-type]
    a, b = (only(m.losses(who, labelled(16), 0)) for m in (embedded, plain))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    assert not torch.allclose(a, only(MeanFlow(kappa=0.5, **common).losses(who, labelled(16), 0)), rtol=1e-4)  # type: ignore[arg-type]
    # Told to it, another scale is another answer; a teacher is guided at the same scale as the student is told.
    student.net.extras["w"].linear.weight.data.normal_(0, 0.2)
    assert not torch.allclose(only(embedded.losses(who, labelled(16), 0)), a, rtol=1e-4)

    class Watched(nn.Module):
        process = FLOW

        def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
            return from_raw(FLOW, "velocity", x, t, 0 * x + cond[:, None])

    method = MeanFlow(source="teacher", guidance=(3.0, 3.0), embed_guidance=True)
    batch = labelled(16)
    x, t = batch.noise(), torch.full((16,), 0.5, dtype=F64)
    v = method.velocity(Roles(teacher=Watched()), batch, batch.cond, x, t, x, 3.0, 0 * t + 3.0)
    torch.testing.assert_close(v[:, 0], 4 + 3.0 * (batch.cond.double() - 4))


def test_scales_are_drawn_by_the_power_law() -> None:
    n = 20_000
    for law in (PowerLaw(), PowerLaw(low=1.0, high=4.0, power=0.5), PowerLaw(low=2.0, high=5.0, power=0.0)):
        w = drawn(law, draws(n, "power"))
        assert isinstance(w, Tensor)
        assert law.low <= float(w.min()) < float(w.max()) <= law.high
        grid = torch.linspace(law.low, law.high, 4001, dtype=F64)
        area = torch.cumulative_trapezoid(grid**-law.power, grid)
        for k in (400, 2000, 3600):
            q = float(area[k - 1] / area[-1])
            assert abs(float((w < grid[k]).double().mean()) - q) < 5 * math.sqrt(q * (1 - q) / n)
    assert ends(PowerLaw()) == (1.0, 8.0)
    assert middle(PowerLaw()) == pytest.approx(8**0.5)
    with pytest.raises(ValueError, match="need 0 < low < high, not 2"):
        PowerLaw(low=2.0, high=2.0)


def test_what_has_no_effect_or_nothing_to_train_it_is_refused() -> None:
    method = MeanFlow(guidance=PowerLaw(), embed_guidance=True, sample_guidance=3.0)
    assert method.sampler().guidance == 3.0
    assert MeanFlow().sampler().guidance is None
    assert method.needs().inputs == {"s", "w"}
    for change, message in (
        ({"along": "own", "apart": 1.0}, "apart: 1 leaves no row"),
        ({"embed_guidance": True, "kappa": 0.5}, "kappa: 0.5 has no effect"),
        ({"sample_guidance": 2.0}, "set embed_guidance: true"),
        ({"guidance": (1.0, 3.0)}, "several scales of a student's own"),
    ):
        with pytest.raises(ValueError, match=message):
            MeanFlow(**change)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"student.*needs \[s, w\], not \[s\]"):
        load("toy/imf", ["data.conditional=true", "method.embed_guidance=true", "method.guidance={high: 3.0}"])
    with pytest.raises(RecipeError, match="a guidance scale of 1 to 3 needs conditions to move away from"):
        load("toy/imf", ["data.conditional=false", "method.embed_guidance=true", "method.guidance={high: 3.0}"])


def test_the_paper_is_cited_where_it_is_switched_on() -> None:
    assert "2512.02012" in cite("toy/imf")
    assert "2512.02012" not in cite("toy/meanflow")
