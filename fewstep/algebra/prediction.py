"""What a network says about x_t, in one form: (x0, eps). Every parametrisation is one linear pair in these two.

raw = a x0 + b eps and x_t = alpha x0 + sigma eps are two equations in two unknowns, so one 2x2 solve replaces
all pairwise conversions:  x0 = (b x - sigma raw) / (alpha b - sigma a),  eps = (alpha raw - a x) / (alpha b - sigma a).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fewstep.algebra.process import EDM, Process, bc

Pair = tuple[Tensor, Tensor]


def _edm_scalings(process: Process, t: Tensor, boundary: float) -> tuple[Tensor, Tensor]:
    if not isinstance(process, EDM):
        raise ValueError(f"EDM and CM parametrisations need the EDM process, not {type(process).__name__}")
    var = process.sigma_data**2
    shifted = t - boundary
    c_skip = var / (shifted**2 + var)
    c_out = shifted * process.sigma_data / torch.sqrt(t**2 + var)
    return c_skip, c_out


def _edm(process: Process, t: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip, c_out of arXiv 2206.00364, table 1."""
    return _edm_scalings(process, t, 0.0)


def _cm(process: Process, t: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip, c_out with the boundary at sigma_min of arXiv 2303.01469, appendix C (as diffusers has them)."""
    return _edm_scalings(process, t, process.sigma_min if isinstance(process, EDM) else 0.0)


def _pair_of_scalings(scalings: Callable[[Process, Tensor], Pair]) -> Callable[[Process, Tensor], Pair]:
    def pair(process: Process, t: Tensor) -> Pair:
        c_skip, c_out = scalings(process, t)
        return (1 - c_skip * process.alpha(t)) / c_out, -c_skip * process.sigma(t) / c_out

    return pair


PAIRS: dict[str, Callable[[Process, Tensor], Pair]] = {
    "x0": lambda p, t: (torch.ones_like(t), torch.zeros_like(t)),
    "eps": lambda p, t: (torch.zeros_like(t), torch.ones_like(t)),
    "v": lambda p, t: (-p.sigma(t), p.alpha(t)),
    "velocity": lambda p, t: (p.dalpha(t), p.dsigma(t)),
    "psi": lambda p, t: (-torch.ones_like(t), torch.ones_like(t)),
    "score": lambda p, t: (torch.zeros_like(t), -1 / p.sigma(t)),
    "edm": _pair_of_scalings(_edm),
    "cm": _pair_of_scalings(_cm),
    "trig": lambda p, t: (-p.sigma(t), p.alpha(t)),
}
"""raw = a x0 + b eps. velocity is dx/dt of the process; psi is eps - x0 on any process; trig is TrigFlow's F."""

# These give x0 without a division by sigma, so they stay exact at sigma = 0 where the pair is degenerate.
_DIRECT: dict[str, Callable[[Process, Tensor], Pair]] = {
    "x0": lambda p, t: (torch.zeros_like(t), torch.ones_like(t)),
    "edm": _edm,
    "cm": _cm,
}


@dataclass(frozen=True)
class Prediction:
    """A network's answer at (x, t). All other forms are linear in x0 and eps, both (b, *d).

    Where sigma = 0, eps is unknown to an x0-type network and is NaN; `at` never uses it there.

    >>> x0, eps, t = torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([0.25])
    >>> x_t, _ = fewstep.add_noise(fewstep.Flow(), x0, eps, t)
    >>> prediction = fewstep.Prediction(x0, eps, x_t, t, fewstep.Flow())
    >>> prediction.velocity(), prediction.at(torch.tensor([0.5]))  # eps - x0, and (1 - s) x0 + s eps
    (tensor([[-1., -1.]]), tensor([[0.5000, 0.5000]]))
    """

    x0: Tensor
    eps: Tensor
    x: Tensor
    t: Tensor
    process: Process
    features: Mapping[str, Tensor] = field(default_factory=dict)
    """Intermediate activations asked for by `taps`."""

    def velocity(self) -> Tensor:
        """dx/dt of the probability-flow ODE: alpha' x0 + sigma' eps."""
        p, x = self.process, self.x
        return bc(p.dalpha(self.t), x) * self.x0 + bc(p.dsigma(self.t), x) * self.eps

    def score(self) -> Tensor:
        """grad log p_t(x) = -eps / sigma."""
        return -self.eps / bc(self.process.sigma(self.t), self.x)

    def raw(self, kind: str) -> Tensor:
        """The same answer in another parametrisation, one of PAIRS."""
        a, b = PAIRS[kind](self.process, self.t)
        if kind == "x0":
            return self.x0
        return bc(a, self.x) * self.x0 + bc(b, self.x) * self.eps

    def at(self, s: Tensor) -> Tensor:
        """alpha_s x0 + sigma_s eps: the DDIM transfer to time s; exactly x where s equals t."""
        p, x = self.process, self.x
        moved = bc(p.alpha(s), x) * self.x0 + bc(p.sigma(s), x) * self.eps
        # At sigma_s = 0 eps must not enter: it may be NaN, and 0 * NaN is not 0.
        clean = bc(p.sigma(s), x) == 0
        moved = torch.where(clean, bc(p.alpha(s), x) * self.x0, moved)
        return torch.where(bc(s, x) == bc(self.t, x), x.to(moved.dtype), moved)

    def mix(self, other: Prediction, weight: float | Tensor) -> Prediction:
        """other + weight (self - other), the affine combination that guidance needs; weight (b,) or a number."""
        w = bc(weight, self.x) if isinstance(weight, Tensor) else weight
        x0 = other.x0 + w * (self.x0 - other.x0)
        eps = other.eps + w * (self.eps - other.eps)
        return replace(self, x0=x0, eps=eps)


def from_x0(
    process: Process, x: Tensor, t: Tensor, x0: Tensor, features: Mapping[str, Tensor] | None = None
) -> Prediction:
    """Complete a denoiser's x0 to a Prediction: eps = (x - alpha x0) / sigma."""
    alpha, sigma = bc(process.alpha(t), x), bc(process.sigma(t), x)
    safe = torch.where(sigma == 0, torch.ones_like(sigma), sigma)
    eps = torch.where(sigma == 0, torch.full_like(x0, float("nan")), (x - alpha * x0) / safe)
    return Prediction(x0, eps, x, t, process, features or {})


def from_raw(
    process: Process,
    kind: str,
    x: Tensor,
    t: Tensor,
    raw: Tensor,
    features: Mapping[str, Tensor] | None = None,
) -> Prediction:
    """Read a network's raw output (b, *d) at x (b, *d) and t (b,).

    Args:
        kind: x0, eps, v (arXiv 2202.00512), velocity (dx/dt of the process), psi (eps - x0), score, edm (raw F of arXiv
            2206.00364, table 1), cm (arXiv 2303.01469, appendix C) or trig (TrigFlow's F, arXiv 2410.11081).

    Raises:
        ValueError: another kind, or one that says nothing about x0 here: an eps or score network at alpha = 0, where
            x is pure noise.

    >>> x_t, t = torch.tensor([[0.5]]), torch.tensor([0.5])
    >>> velocity = torch.tensor([[-1.0]])
    >>> answer = fewstep.from_raw(fewstep.Flow(), "velocity", x_t, t, velocity)
    >>> answer.x0, answer.eps
    (tensor([[1.]]), tensor([[0.]]))
    """
    if kind not in PAIRS:
        raise ValueError(f"prediction {kind!r} is not one of {', '.join(PAIRS)}")
    raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
    if kind in _DIRECT:
        p, q = _DIRECT[kind](process, t)
        # Written p x + q raw with p = 0 exactly for x0, where 0 * inf would poison the result.
        x0 = raw if kind == "x0" else bc(p, x) * x + bc(q, x) * raw
        return from_x0(process, x, t, x0, features)
    if kind in ("eps", "score") and bool((process.alpha(t) == 0).any()):
        raise ValueError(f"a network that predicts {kind} has no x0 at alpha = 0; start below t_max")
    alpha, sigma = process.alpha(t), process.sigma(t)
    if kind == "score":
        # The pair's 1 / sigma cancels; multiplied out, the score form is finite at sigma = 0.
        x0 = (x + bc(sigma, x) ** 2 * raw) / bc(alpha, x)
        return Prediction(x0, -bc(sigma, x) * raw, x, t, process, features or {})
    a, b = PAIRS[kind](process, t)
    det = alpha * b - sigma * a
    x0 = (bc(b, x) * x - bc(sigma, x) * raw) / bc(det, x)
    eps = (bc(alpha, x) * raw - bc(a, x) * x) / bc(det, x)
    return Prediction(x0, eps, x, t, process, features or {})
