"""The reward of a sample that shows what it was made from: log-likelihood of the picture in its condition."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fewstep.algebra.operators import Operator, OperatorPart
from fewstep.config import Positive, RecipeError, part
from fewstep.networks.parts import Site


class Control(nn.Module):
    """r(x, cond) = -<|A(x) - cond["image"]|^2> / (2 tau^2), (b,): log p(c | x) of noise tau, by the pixel."""

    def __init__(self, operator: Operator, tau: float) -> None:
        super().__init__()
        self.operator, self.tau = operator, tau

    def forward(self, x: Tensor, cond: Any = None) -> Tensor:
        """x (b, c, h, w), cond with an image -> (b,)."""
        gap = self.operator(x) - cond["image"].to(x.dtype)
        return -gap.square().flatten(1).mean(1) / (2 * self.tau**2)


@part("network", "control")
class ControlSpec:
    """The reward role of samples that agree with the picture that conditions them (JDM, arXiv 2503.06652)."""

    by: OperatorPart
    """The operator, the data's."""
    tau: Positive = 0.3
    """Deviation that A(x) may have from the picture; the reward's weight and 1 / tau^2 are one factor."""

    @property
    def differentiable(self) -> bool:
        return self.by.differentiable

    def build(self, site: Site) -> nn.Module:
        try:
            shape = self.by.shape(tuple(site.shape))
        except ValueError as error:
            raise RecipeError(f"control.by: {error}") from None
        if site.image is None or tuple(site.image) != tuple(shape):
            held = "hold no picture" if site.image is None else f"hold one of {list(site.image)}"
            raise RecipeError(
                f"control.by: {self.by.name} makes pictures of {list(shape)}, and the data's conditions {held}; name the "
                "operator of data.by"
            )
        return Control(self.by, self.tau)
