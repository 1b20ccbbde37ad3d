"""Networks that see x_t of a bridge: exact denoisers, foreign conventions, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fewstep.algebra.bridge import DDBM, I2SB, Brownian
from fewstep.algebra.prediction import from_x0
from fewstep.algebra.process import Flow
from fewstep.config import RecipeError
from fewstep.networks.bridged import Bridged, BridgedSpec, DDBMNet, I2SBNet
from fewstep.networks.parts import Site
from fewstep.networks.specs import Copy, DiTSpec

F64 = torch.float64
MEAN, STD, GAIN, SHIFT, NOISE, EPS = 0.7, 0.4, 0.8, -0.3, 0.5, 0.5
"""x0 ~ N(.7, .4^2), x_T = .8 x0 - .3 + .5 eta."""
END, AT_END = GAIN**2 * STD**2 + NOISE**2, GAIN * MEAN + SHIFT
SLOPE, LEFT = GAIN * STD**2 / END, STD**2 * NOISE**2 / END


class Exact(nn.Module):
    """E[x0 | x_t], and with `sees` E[x0 | x_t, x_T], of these Gaussians."""

    def __init__(self, sees: bool, process: Any = None) -> None:
        super().__init__()
        self.sees, self.process = sees, process or Brownian(eps=EPS)

    def forward(self, x: Any, t: Any, cond: Any = None, **call: Any) -> Any:
        a, w = self.process.alpha(t)[:, None], self.process.source(t)[:, None]
        noise = self.process.variance(t)[:, None]
        if self.sees:
            source = cond["image"]
            prior = MEAN + SLOPE * (source - AT_END)
            x0 = prior + a * LEFT / (a * a * LEFT + noise) * (x - a * prior - w * source)
        else:
            cov = a * STD**2 + w * GAIN * STD**2
            var = a * a * STD**2 + 2 * w * a * GAIN * STD**2 + w * w * END + noise
            x0 = MEAN + cov / var * (x - a * MEAN - w * AT_END)
        return from_x0(self.process, x, t, x0)


def at(x_t: float, source: float, t: float = 0.5) -> tuple[Any, Any, Any]:
    """(y, t, cond) of a point of the bridge."""
    time, end = torch.tensor([t], dtype=F64), torch.tensor([[source]], dtype=F64)
    return torch.tensor([[x_t]], dtype=F64) - t * end, time, {"image": end}


def test_golden_posterior_and_denoisers():
    """controls.md, section 2."""
    wanted = (0.3632236095, 0.6055618615, 0.1135073780)
    assert pytest.approx(wanted, abs=1e-9) == (SLOPE, MEAN - SLOPE * AT_END, LEFT)
    y, t, cond = at(0.4, 0.1)
    assert float(Bridged(Exact(True), sees=True)(y, t, cond).x0) == pytest.approx(0.6526364477, abs=1e-9)
    assert float(Bridged(Exact(False))(y, t, cond).x0) == pytest.approx(0.6636707663, abs=1e-9)


def test_a_conditional_bridge_is_a_diffusion_in_y():
    """Its denoiser is that of VE diffusion in y / w0 at deviation sigma / w0, whose prior is x0 given x_T."""
    for t in (0.2, 0.5, 0.9):
        y, time, cond = at(0.4, 0.1, t)
        prior = MEAN + SLOPE * (0.1 - AT_END)
        level = EPS * t / (1 - t)
        wanted = prior + LEFT / (LEFT + level) * (float(y) / (1 - t) - prior)
        assert float(Bridged(Exact(True), sees=True)(y, time, cond).x0) == pytest.approx(wanted, abs=1e-9)


def test_foreign_networks_answer_by_their_own_coefficients():
    i2sb = I2SB()
    exact = Exact(False, i2sb)

    class Theirs(nn.Module):
        def forward(self, x: Any, t: Any, cond: Any = None) -> Any:
            return (x - exact(x, t).x0) / i2sb.spent(t).sqrt()[:, None]

    y, t, cond = at(0.4, 0.1, 0.3)
    ours = Bridged(I2SBNet(Theirs(), i2sb))(y, t, cond).x0
    assert torch.allclose(ours, Bridged(exact)(y, t, cond).x0, atol=1e-12)

    class Zero(nn.Module):
        def forward(self, x: Any, t: Any, cond: Any = None) -> Any:
            return torch.zeros_like(x)

    # Of centred Gaussians c_skip alone is the exact denoiser, and c_out the deviation that it leaves.
    p, both = DDBM(), GAIN * STD**2
    net = DDBMNet(Zero(), p, STD, END**0.5, both)
    t = torch.tensor([0.4], dtype=F64)
    a, b, c = p.source(t), p.alpha(t), p.variance(t)
    cov, var = b * STD**2 + a * both, a * a * END + b * b * STD**2 + 2 * a * b * both + c
    x = torch.tensor([[0.8]], dtype=F64)
    assert torch.allclose(net(x, t).x0, cov / var * x)
    assert torch.allclose(net.scalings(t)[2] ** 2, STD**2 - cov**2 / var)


def test_a_recipes_bridge_and_its_copy_answer_alike():
    spec = BridgedSpec(of=DiTSpec(width=8, depth=1, heads=2, process=Brownian(), prediction="x0"))
    site = Site((1, 4, 6), 0, {}, 0, (1, 4, 6))
    net: Any = spec.build(site)
    net.denoiser.net.last.weight.data.normal_()
    twin: Any = Copy(image=1).build(Site((1, 4, 6), 0, {"teacher": net}, 0, (1, 4, 6)))
    assert (net.sees, twin.sees) == (False, True)
    y, t = torch.randn(3, 1, 4, 6), torch.tensor([0.2, 0.9, 1.0])
    cond = {"image": torch.randn(3, 1, 4, 6)}
    assert torch.equal(net(y, t, cond).x0, twin(y, t, cond).x0)
    assert torch.isfinite(net(y, t, cond).x0).all()
    moved = {"image": cond["image"] + 1}
    assert torch.allclose(net(y - t[:, None, None, None], t, moved).x0, net(y, t, cond).x0, atol=1e-5)
    with pytest.raises(ValueError, match=r"of the samples' shape \(3, 1, 4, 6\), not \(3, 1, 2, 3\)"):
        net(y, t, {"image": torch.randn(3, 1, 2, 3)})


@pytest.mark.parametrize(
    ("process", "prediction", "image", "message"),
    [
        (Brownian(), "x0", (1, 2, 3), "a bridge starts from a picture of the samples' shape"),
        (Brownian(), "x0", None, "conditions hold none"),
        (Brownian(), "v", (1, 4, 6), "bridged.of: takes a network of its own with prediction: x0"),
        (Flow(), "x0", (1, 4, 6), "bridged.of: a network of the process Flow.* has no source"),
    ],
)
def test_what_is_no_bridge_is_refused(process, prediction, image, message):
    spec = BridgedSpec(of=DiTSpec(width=8, depth=1, heads=2, process=process, prediction=prediction))
    with pytest.raises(RecipeError, match=message):
        spec.build(Site((1, 4, 6), 0, {}, 0, image))
