"""Losses of samples that are padding in part are those of the samples without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws
from fewstep.algebra.points import fill_of
from fewstep.algebra.prediction import Prediction, from_x0
from fewstep.algebra.process import Flow
from fewstep.algebra.times import Uniform
from fewstep.methods.critic import Critic
from fewstep.methods.sid import SiD
from fewstep.networks.roles import Roles
from fewstep.objectives import dsm, inverse_matching

N, SHORT = 5, 3
MASK = torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 0, 0]])


class Halved(torch.nn.Module):
    """x0 = gain x, zero wherever x is."""

    process, takes_s, inputs = Flow(), False, ()

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        there = 1 if cond is None else cond["points"][..., None]
        return from_x0(self.process, x * there, t, self.gain * x * there)


def cut(x: Tensor) -> Tensor:
    return x[:, :SHORT]


def test_denoising_is_over_the_points_that_are_there() -> None:
    g = torch.Generator().manual_seed(0)
    x, eps = (torch.randn(2, N, 2, generator=g, dtype=torch.float64) for _ in range(2))
    x, t = x * MASK[..., None], torch.tensor([0.3, 0.8], dtype=torch.float64)
    whole = dsm(Halved(0.5), x, t, eps, {"points": MASK}, weight="v")
    torch.testing.assert_close(whole, dsm(Halved(0.5), cut(x), t, cut(eps), weight="v"))
    assert not torch.allclose(whole, dsm(Halved(0.5), x, t, eps * MASK[..., None], weight="v"))


@pytest.mark.parametrize("huber", [None, 0.1])
def test_inverse_matching_is_too(huber: float | None) -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, N, 2, generator=g, dtype=torch.float64) * MASK[..., None]
    t, cond = torch.tensor([0.3, 0.8], dtype=torch.float64), {"points": MASK}
    real, fake = Halved(0.5), Halved(0.2)
    whole = inverse_matching(real(x, t, cond), fake(x, t, cond), x, alpha=1.2, huber=huber, fill=fill_of(cond))
    part = inverse_matching(real(cut(x), t), fake(cut(x), t), cut(x), alpha=1.2, huber=huber)
    torch.testing.assert_close(whole, part)


class Given(Draws):
    """Noise of the short chains, with anything at padding; times of the rows."""

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        whole = super().normal(N, 2, dtype=torch.float64)
        return whole[:, : shape[0]]


@pytest.mark.parametrize("settings", [{}, {"normalize": False}, {"huber": 0.3}])
def test_sid_and_its_critic_do_not_see_how_much_padding_there_is(settings: dict[str, Any]) -> None:
    method = SiD(times=Uniform(low=0.2, high=0.8), critic=Critic(weight="v"), **settings)
    roles = Roles(teacher=Halved(0.5), student=Halved(0.7), critic=Halved(0.2))
    x = torch.randn(2, N, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * MASK[..., None]
    whole = Batch(Given(7, torch.arange(2)), (N, 2), cond={"points": MASK})
    part = Batch(Given(7, torch.arange(2)), (SHORT, 2))
    assert method.loss(roles, whole, x)["match"].item() == pytest.approx(
        method.loss(roles, part, cut(x))["match"].item(), rel=1e-12
    )
    losses = [method.critic.losses(roles, b, v)["dsm"].item() for b, v in ((whole, x), (part, cut(x)))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
