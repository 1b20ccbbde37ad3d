"""Self-E: flow matching where s = t, a target of the data's length elsewhere, and the classifier's score as direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from trajectory_helpers import F64, Batch64, draws

from fewstep.algebra.noising import add_noise
from fewstep.algebra.process import Flow
from fewstep.methods.self_e import SelfE, reach
from fewstep.networks.analytic import Mixture
from fewstep.networks.roles import Roles
from fewstep.objectives import mse

WEIGHTS, MEANS, STD = (0.3, 0.7), (-1.0, 1.5), 0.5


class Exact(nn.Module):
    """The exact class-conditional denoiser of two Gaussians as a student that ignores where it goes."""

    takes_s, inputs = True, ("s",)

    def __init__(self) -> None:
        super().__init__()
        self.process = Flow()
        self.inner = Mixture(self.process, WEIGHTS, [[m, 0.0] for m in MEANS], [STD, STD], labels=[0, 1])

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Any:
        return self.inner(x, t, cond)


def batch(count: int) -> Batch64:
    d = draws(count, "self-e")
    label = d.integers(2)
    x0 = torch.tensor(MEANS, dtype=F64)[label][:, None] * torch.tensor([1.0, 0.0]) + STD * d.normal(2, dtype=F64)
    return Batch64(d, (2,), x0, label, torch.full_like(label, 2))


def test_lambda_is_zero_at_rest_and_the_difference_of_noise_to_signal() -> None:
    t, s = torch.tensor([0.5, 0.8], dtype=F64), torch.tensor([0.5, 0.2], dtype=F64)
    assert torch.allclose(reach(Flow(), t, s), torch.tensor([0.0, 4.0 - 0.25], dtype=F64), atol=1e-15)


def test_where_s_is_t_it_is_flow_matching() -> None:
    method, roles = SelfE(local=1.0, drop_cond=0.0), Roles(student=Exact(), target=Exact())
    got = next(iter(method.losses(roles, batch(64), 500))).total()
    again = batch(64)
    t, s = method.pair(again, Flow(), 500)
    assert torch.equal(t, s)
    eps = again.noise()
    x, _ = add_noise(Flow(), again.data(), eps, t)
    velocity = roles.student(x, t, again.cond).velocity()
    assert torch.allclose(got, mse(velocity, eps - again.data()), rtol=1e-9)


def test_the_target_has_the_datas_length_and_leans_along_the_classifiers_score() -> None:
    """D(c) - D(no c) is sigma^2 / alpha times the gradient of log p(c | x_s), by Tweedie's formula."""
    method, roles, b = SelfE(), Roles(student=Exact(), target=Exact()), batch(256)
    t = torch.full((256,), 0.9, dtype=F64)
    s = torch.full((256,), 0.6, dtype=F64)
    own = b.data().flip(0)
    # The noise that target() draws next, from a batch of the same draws.
    landed, _ = add_noise(Flow(), own, batch_like(b).noise(), s)
    got = method.target(roles, b, own, t, s, b.cond)
    assert torch.allclose(got.norm(dim=1), b.data().norm(dim=1), rtol=1e-9)
    x = landed.clone().requires_grad_()
    inner = roles.student.inner
    posterior = inner.log_prob(x, s, b.cond) - inner.log_prob(x, s, b.null_cond)
    (score,) = torch.autograd.grad(posterior.sum(), x)
    want = b.data() + (9.0 - 1.5) * (own + 0.36 / 0.4 * score)
    want = want * (b.data().norm(dim=1) / want.norm(dim=1))[:, None]
    assert torch.allclose(got, want, atol=1e-8)
    assert float((got - b.data()).abs().max()) > 0.1


def batch_like(b: Batch64) -> Batch64:
    """A batch whose stream stands where that of `b` stands."""
    fresh = batch(len(b))
    return Batch64(fresh.draws, b.shape, b.x0, b.cond, b.null_cond)


def test_s_starts_at_t_and_reaches_zero_as_it_ramps() -> None:
    method = SelfE(local=0.0, ramp=100)
    for step, least in ((0, 1.0), (50, 0.5), (100, 0.0)):
        t, s = method.pair(batch(2000), Flow(), step)
        share = s / t
        assert float(share.max()) <= 1.0
        assert least - 1e-12 <= float(share.min()) <= least + 0.01
