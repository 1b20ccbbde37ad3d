"""Classifier-free guidance on a denoiser: uncond + w (cond - uncond), w = 1 means none (arXiv 2207.12598).

Guidance is affine, so it is applied once, on (x0, eps), whatever the network predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.algebra.condition import joined
from fewstep.algebra.prediction import Prediction
from fewstep.algebra.process import Process


def split(prediction: Prediction, n: int) -> tuple[Prediction, Prediction]:
    """Cut a prediction for a doubled batch into its first n rows and the rest."""

    def rows(part: slice) -> Prediction:
        features = {k: v[part] for k, v in prediction.features.items()}
        p = prediction
        return Prediction(p.x0[part], p.eps[part], p.x[part], p.t[part], p.process, features)

    return rows(slice(None, n)), rows(slice(n, None))


def halves(
    net: Callable[..., Prediction],
    x: Tensor,
    t: Tensor,
    cond: Any,
    null: Any,
    scale: float | Tensor,
    **call: Any,
) -> tuple[Prediction, Prediction]:
    """The conditional and the unconditional answer of one call; ValueError, naming the scale, without conditions."""
    if cond is None or null is None:
        raise ValueError(f"guidance scale {scale} needs a condition and a null condition; this run has none")
    return split(net(torch.cat((x, x)), torch.cat((t, t)), joined(cond, null), **call), x.shape[0])


def guided(
    net: Callable[..., Prediction],
    x: Tensor,
    t: Tensor,
    cond: Any,
    null: Any,
    scale: float | Tensor,
    *,
    interval: tuple[float, float] | None = None,
    **call: Any,
) -> Prediction:
    """One guided call; conditional and unconditional rows go through the network as one batch.

    Args:
        x, t: noised samples (b, *d) and their times (b,).
        cond, null: conditions of the same structure; null is the empty (or negative) one.
        scale: w, a number or (b,). Exactly 1.0 skips the unconditional half.
        interval: levels of sigma / alpha inside which w applies, elsewhere w = 1 (arXiv 2404.07724).

    Raises ValueError when w != 1 and there is no null condition.

    >>> teacher = fewstep.load_denoiser("assets:digits-teacher")
    >>> x, t = torch.zeros(2, 1, 8, 8), torch.ones(2)
    >>> label, null = torch.tensor([3, 7]), torch.tensor([10, 10])
    >>> with torch.no_grad():
    ...     plain, empty = teacher(x, t, label), teacher(x, t, null)
    ...     strong = fewstep.guided(teacher, x, t, label, null, 2.0)
    >>> torch.allclose(strong.x0, 2 * plain.x0 - empty.x0, atol=1e-5)
    True
    """
    if isinstance(scale, (int, float)) and scale == 1.0:
        return net(x, t, cond, **call)
    conditional, unconditional = halves(net, x, t, cond, null, scale, **call)
    if interval is not None:
        process = conditional.process
        ratio = process.sigma(t) / process.alpha(t)
        inside = (ratio >= interval[0]) & (ratio <= interval[1])
        scale = torch.where(inside, torch.as_tensor(scale, dtype=t.dtype, device=t.device), torch.ones_like(t))
    return combined(net, conditional, unconditional, scale)


def combined(net: Any, own: Prediction, null: Prediction, scale: float | Tensor) -> Prediction:
    """The guided prediction of the two halves, as the network's family has it; uncond + w (cond - uncond) for most."""
    combine = getattr(net, "combine", None)
    return own.mix(null, scale) if combine is None else combine(own, null, scale)


class Guided(nn.Module):
    """A denoiser with a fixed guidance scale, itself a denoiser.

    Args:
        denoiser: the denoiser to guide.
        scale: w; 1 means none.
        null: maps a condition to the null (or negative) one of the same structure.
        interval: see `guided`.

    >>> teacher = fewstep.load_denoiser("assets:digits-teacher")
    >>> strong = fewstep.Guided(teacher, 2.0, null=lambda cond: torch.full_like(cond, 10))
    >>> strong(torch.zeros(1, 1, 8, 8), torch.ones(1), torch.tensor([3])).x0.shape
    torch.Size([1, 1, 8, 8])
    """

    def __init__(
        self,
        denoiser: nn.Module,
        scale: float,
        null: Callable[[Any], Any],
        interval: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.scale = float(scale)
        self.null = null
        self.interval = interval

    @property
    def process(self) -> Process:
        return self.denoiser.process  # type: ignore[return-value]

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, *, taps: Sequence[str] = (), **call: Any) -> Prediction:
        null = None if cond is None else self.null(cond)
        return guided(self.denoiser, x, t, cond, null, self.scale, interval=self.interval, taps=taps, **call)

    def features(self, x: Tensor, t: Tensor, cond: Any, taps: Sequence[str]) -> Mapping[str, Tensor]:
        """The tapped activations of the conditional half, which are those that a guided call returns."""
        return self.denoiser.features(x, t, cond, taps)  # type: ignore[operator]


def guided_teacher(teacher: Any, guidance: float, null: Callable[[Any], Any]) -> Any:
    """The teacher at a guidance scale; at 1 itself. null: conditions to null conditions."""
    return teacher if guidance == 1.0 else Guided(teacher, guidance, null)
