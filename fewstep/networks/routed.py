"""Networks that are several: experts by noise level, or students by class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fewstep.networks.specs  # noqa: F401  experts are made of these
from fewstep.algebra.condition import label_of, rows as part_of
from fewstep.algebra.prediction import Prediction
from fewstep.algebra.process import Process
from fewstep.config import Count, RecipeError, part
from fewstep.networks.adapters import twin
from fewstep.networks.parts import NetworkPart, Site


class Routed(nn.Module):
    """Denoisers behind one call: each row of a batch goes to the member that `route` names.

    Args:
        members: denoisers of one process.
        route: maps (t, cond) to member numbers int64 (b,).
    """

    def __init__(self, members: Sequence[nn.Module], route: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.route = route

    @property
    def process(self) -> Process:
        return self.members[0].process  # type: ignore[return-value]

    def _shares(self, t: Tensor, cond: Any) -> list[tuple[nn.Module, Tensor]]:
        number = self.route(t, cond)
        return [(self.members[k], (number == k).nonzero()[:, 0]) for k in number.unique().tolist()]

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        """x (b, *d), t (b,) -> the members' answers in the batch's order."""
        shares = self._shares(t, cond)
        if len(shares) == 1:
            return shares[0][0](x, t, cond, **call)
        parts = [net(x[rows], t[rows], part_of(cond, rows), **call) for net, rows in shares]
        back = torch.cat([rows for _, rows in shares]).argsort()
        features = {k: torch.cat([p.features[k] for p in parts])[back] for k in parts[0].features}
        x0, eps = (torch.cat([getattr(p, name) for p in parts])[back] for name in ("x0", "eps"))
        return Prediction(x0, eps, x, t, self.process, features)

    def features(self, x: Tensor, t: Tensor, cond: Any, taps: Sequence[str]) -> Mapping[str, Tensor]:
        """The tapped activations of each row's member; the members must agree on their shapes."""
        shares = self._shares(t, cond)
        parts = [net.features(x[rows], t[rows], part_of(cond, rows), taps) for net, rows in shares]  # type: ignore[operator]
        back = torch.cat([rows for _, rows in shares]).argsort()
        return {tap: torch.cat([p[tap] for p in parts])[back] for tap in taps}


class ByTime:
    """Member 0 above the first boundary, member k at and below the k-th; boundaries are levels u, decreasing."""

    def __init__(self, process: Process, boundaries: Sequence[float]) -> None:
        self.edges = process.grid(torch.tensor(boundaries, dtype=torch.float64))

    def __call__(self, t: Tensor, cond: Any) -> Tensor:
        # A level that a float32 step list names must not fall on the wrong side of the same level in float64.
        return (t[:, None].double() <= self.edges.to(t.device) * (1 + 1e-6)).sum(1)


class ByClass:
    """Contiguous groups of classes, one member each; the null class goes to the last one."""

    def __init__(self, classes: int, members: int) -> None:
        self.classes, self.members = classes, members

    def __call__(self, t: Tensor, cond: Any) -> Tensor:
        label = label_of(cond)
        if label is None:
            raise ValueError("by_class: routes by class, and the condition has no label")
        return (label.clamp_max(self.classes - 1) * self.members).div(self.classes, rounding_mode="floor")


def _members(of: Any, count: int, site: Site) -> list[nn.Module]:
    """`count` denoisers of one spec with the same initial weights, so that together they begin as one."""
    first = of.build(site)
    return [first, *(twin(first) for _ in range(count - 1))]


@part("network", "experts")
class ExpertsSpec:
    """One network per interval of noise levels (Phased DMD), all of one spec and with equal initial weights."""

    of: NetworkPart
    """Spec of each expert."""
    boundaries: tuple[float, ...] = (0.5,)
    """Levels u, decreasing, at which the next expert takes over."""

    def __post_init__(self) -> None:
        if not self.boundaries or list(self.boundaries) != sorted(set(self.boundaries), reverse=True):
            raise ValueError(f"boundaries {list(self.boundaries)} must decrease strictly")

    def build(self, site: Site) -> nn.Module:
        members = _members(self.of, len(self.boundaries) + 1, site)
        return Routed(members, ByTime(members[0].process, self.boundaries))  # type: ignore[arg-type]


@part("network", "by_class")
class ByClassSpec:
    """One network per contiguous group of classes (multi-student distillation, arXiv 2410.23274)."""

    of: NetworkPart
    """Spec of each student; smaller than the teacher if wished."""
    members: Count = 2
    """Students, at most as many as classes."""

    def build(self, site: Site) -> nn.Module:
        if not 1 <= self.members <= max(site.classes, 1) or (self.members > 1 and not site.classes):
            raise RecipeError(f"by_class.members: {self.members} students for {site.classes} classes")
        return Routed(_members(self.of, self.members, site), ByClass(site.classes, self.members))


def innermost(spec: Any) -> Any:
    """The spec of the members, where a spec is of several networks, else itself."""
    while isinstance(spec, ExpertsSpec | ByClassSpec):
        spec = spec.of
    return spec


def source_of(spec: Any) -> str | None:
    """The role that building a spec takes; None where it stands alone."""
    inner = innermost(spec)
    if getattr(inner, "name", None) == "logvar":
        return "student"
    if getattr(inner, "name", None) == "house-classifier":
        return None  # whose `of` is no role
    return getattr(inner, "of", getattr(inner, "trunk", None))
