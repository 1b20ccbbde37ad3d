"""A network of any class, driven by the names of its arguments: for models without a wrapper of their own."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fewstep.algebra.condition import KEYS
from fewstep.networks.wrappers.base import Wrapper, first_half


class Generic(Wrapper):
    """Calls model(**{names["x"]: x, names["time"]: time, names[key]: cond[key], ...}).

    Args:
        model: returns a tensor, or a tuple or an output object whose first entry is the tensor.
        names: argument names by "x", "time" and keys of fewstep.algebra.condition; every key named here is needed.
        taps: sub-modules by tap name, as dotted paths such as "blocks.3".
        pick: which output of a tapped module that returns several.

    Raises ValueError for an unknown key and for a path that the model does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Mapping[str, str],
        taps: Mapping[str, str] | None = None,
        *,
        classes: int = 0,
        pick: int = 0,
    ) -> None:
        super().__init__(model, classes)
        unknown = [k for k in names if k not in ("x", "time", *KEYS)]
        if unknown:
            raise ValueError(f"names: {unknown[0]!r} is not one of x, time, {', '.join(KEYS)}")
        self.names = {"x": "x", "time": "time", **names}
        self.needs = tuple(k for k in self.names if k in KEYS)  # type: ignore[misc]
        self.pick = pick  # type: ignore[misc]
        self.taps: dict[str, str] = dict(taps or {})
        for tap, path in self.taps.items():
            try:
                model.get_submodule(path)
            except AttributeError:
                raise ValueError(f"taps: {tap}: {type(model).__name__} has no sub-module {path!r}") from None

    def blocks(self) -> dict[str, nn.Module]:
        return {tap: self.model.get_submodule(path) for tap, path in self.taps.items()}

    def call(self, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        values = {"x": x, "time": time, **cond}
        out = self.model(**{name: values[key] for key, name in self.names.items()})
        return first_half(out if isinstance(out, Tensor) else out[0], x.shape[1])
