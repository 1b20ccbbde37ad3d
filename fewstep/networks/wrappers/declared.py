"""A family of transformers as a table entry: names of arguments, clock, sign and layout, code only where it must be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fewstep.algebra.condition import KEYS
from fewstep.networks.wrappers.base import Wrapper, doubled, first_half, noise, numbered
from fewstep.networks.wrappers.packing import pack, unpack

Clock = Literal["1000t", "t", "1-t"]
CLOCKS: dict[str, Callable[[Tensor], Tensor]] = {
    "1000t": lambda time: time,
    "t": lambda time: time / 1000,
    "1-t": lambda time: (1000 - time) / 1000,
}
"""What a model takes as its time, of 1000 t; each in the arithmetic of the pipelines, so that float32 rounds alike."""
EXAMPLE_TOKENS = 7
"""Of the text in `example`."""


class Declared(Wrapper):
    """A wrapper that its class attributes describe; a subclass is a list of them.

    What they cannot say is `more` (further arguments of the model), `mu`, `combine` and `scale_of_pipeline`. A network
    without a pipeline, known by the names of its arguments alone, is `by_names`.
    """

    levels = "sigmas"
    even = True
    needs: ClassVar[tuple[str, ...]] = ("text",)
    x_name: ClassVar[str] = "hidden_states"
    """The model's argument for x."""
    time_name: ClassVar[str] = "timestep"
    clock: ClassVar[Clock] = "1000t"
    """What stands there at time t of the flow."""
    sign: ClassVar[float] = 1.0
    """The model answers sign * (eps - x0)."""
    packed: ClassVar[bool] = False
    """The model takes 2 x 2 cells as one token."""
    names: ClassVar[Mapping[str, str]] = {"text": "encoder_hidden_states"}
    """Arguments of the model by condition key."""
    asks: ClassVar[Mapping[str, str]] = {"text": "prompt_embeds"}
    """Arguments of the pipeline by condition key."""
    widths: ClassVar[Mapping[str, str]] = {"text": "joint_attention_dim"}
    """Config keys of the last size of a condition, by its key; of "a|b" the first that is set; a mask has none: ""."""
    stacks: ClassVar[Mapping[str, str]] = {"block": "transformer_blocks"}
    """Paths of lists of blocks by the name of their taps."""
    taps: ClassVar[Mapping[str, str]] = {}
    """Paths of single modules by the name of their tap."""
    embedder: ClassVar[str] = ""
    """Path of the module whose output conditions the blocks; further inputs are added there. "": it takes none."""
    made_for: ClassVar[tuple[int, ...]] = (128, 128)
    """Size of x at the pipeline's default number of pixels; (): the config's sample_size, which most classes have not."""
    patch: ClassVar[int] = 2
    """Side of a token in cells of x; 0: the config's patch_size."""
    variance: ClassVar[bool] = False
    """The model may answer with a learned variance after the channels of x."""
    flags: ClassVar[Mapping[str, Any]] = {"return_dict": False}
    """Arguments of the model that are always the same."""
    cuts: ClassVar[bool] = False
    """The model is handed the tokens that the mask leaves, in place of the mask."""
    counts: ClassVar[str] = ""
    """Path of a module that counts the mask's ones in Python: its second argument is the mask."""
    embedded: ClassVar[float] = 0.0
    """Scale that the pipeline is called with where the model takes it as an input."""

    def more(self, x: Tensor, cond: Mapping[str, Tensor]) -> dict[str, Any]:
        """Further arguments of the model."""
        return {}

    def layout(self, x: Tensor) -> Any:
        """x as the model takes it."""
        return pack(x) if self.packed else x

    def image(self, answer: Any, x: Tensor) -> Tensor:
        """The model's answer in x's shape; the inverse of `layout`."""
        return unpack(answer, x.shape[2:]) if self.packed else answer

    def time(self, time: Tensor) -> Tensor:
        """What the model takes of 1000 t."""
        return CLOCKS[self.clock](time)

    @classmethod
    def by_names(
        cls, model: nn.Module, names: Mapping[str, str], taps: Mapping[str, str] | None = None, *, classes: int = 0
    ) -> Declared:
        """A network of any class, called as model(**{names["x"]: x, names["time"]: time, names[key]: cond[key], ...}).

        Args:
            model: returns a tensor, or a tuple or an output object whose first entry is the tensor.
            names: argument names by "x", "time" and keys of fewstep.algebra.condition; every key named here is needed.
            taps: sub-modules by tap name, as dotted paths such as "blocks.3".

        Raises ValueError for an unknown key and for a path that the model does not have.
        """
        unknown = [k for k in names if k not in ("x", "time", *KEYS)]
        if unknown:
            raise ValueError(f"names: {unknown[0]!r} is not one of x, time, {', '.join(KEYS)}")
        for tap, path in (taps or {}).items():
            try:
                model.get_submodule(path)
            except AttributeError:
                raise ValueError(f"taps: {tap}: {type(model).__name__} has no sub-module {path!r}") from None
        net: Any = cls(model, classes)
        net.x_name, net.time_name = names.get("x", "x"), names.get("time", "time")
        net.names = {k: v for k, v in names.items() if k in KEYS}
        net.needs, net.stacks, net.taps = tuple(net.names), {}, dict(taps or {})
        net.flags, net.variance, net.widths = {}, True, {}
        return net

    @property
    def width(self) -> int:
        if not self.embedder:
            return 0
        module: Any = self.model.get_submodule(self.embedder)
        # Beside the time's there may be embeddings of sizes, pooled texts and the like, some of them narrower.
        module = getattr(module, "timestep_embedder", module)
        return int([m for m in module.modules() if isinstance(m, nn.Linear)][-1].out_features)

    def embedders(self) -> list[nn.Module]:
        return [self.model.get_submodule(self.embedder)] if self.embedder else []

    def blocks(self) -> dict[str, nn.Module]:
        out: dict[str, nn.Module] = {tap: self.model.get_submodule(path) for tap, path in self.taps.items()}
        for tap, path in self.stacks.items():
            out |= numbered(tap, self.model.get_submodule(path))
        return out

    def call(self, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        given: dict[str, Any] = {argument: cond[key] for key, argument in self.names.items() if key in cond}
        given |= {self.x_name: self.layout(x), self.time_name: self.time(time), **self.more(x, cond), **self.flags}
        out = self.model(**given)
        raw = self.image(out if isinstance(out, Tensor) else out[0], x)
        return self.sign * (first_half(raw, x.shape[1]) if self.variance else raw)

    def own(self, raw: Tensor) -> Any:
        raw = self.sign * raw
        return self.layout(doubled(raw, self.model) if self.variance else raw)

    def sample_size(self) -> tuple[int, ...]:
        return self.made_for or super().sample_size()

    def small_size(self) -> tuple[int, ...]:
        if not self.made_for:
            return super().small_size()
        return (*(min(n, 3) for n in self.made_for[:-2]), min(self.made_for[-2], 16), min(self.made_for[-1], 24))

    def channels(self) -> int:
        return int(self.config.in_channels) // (4 if self.packed else 1)

    @property
    def side(self) -> int:
        """Of a token in cells of x."""
        return self.patch or int(self.config.patch_size)

    def tokens(self, size: tuple[int, ...]) -> int:
        return (size[-2] // self.side) * (size[-1] // self.side)

    def refuses_size(self, size: Sequence[int]) -> str:
        return f"its patches have {self.side} x {self.side}" if any(n % self.side for n in size[-2:]) else ""

    def example(self, b: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        n, out = EXAMPLE_TOKENS, {}
        for key, width in self.widths.items():
            if key == "mask":  # a different number of tokens in each sample
                out[key] = (torch.arange(n) < n - torch.arange(b)[:, None] % 3).float()
            else:
                wide = next(int(self.config[k]) for k in width.split("|") if self.config.get(k))
                out[key] = noise(generator, b, wide) if key == "pooled" else noise(generator, b, n, wide)
        if self.embedded and self.config.guidance_embeds:
            out["guidance"] = torch.full((b,), self.embedded)
        return out

    def arguments(self, cond: Mapping[str, Tensor], size: tuple[int, ...]) -> dict[str, Any]:
        out: dict[str, Any] = {argument: cond[key] for key, argument in self.asks.items() if key in cond}
        if self.embedded and self.config.guidance_embeds:
            out["guidance_scale"] = float(cond["guidance"][0] if "guidance" in cond else self.guidance)  # type: ignore[arg-type]
        return out

    def to_pipeline(self, latents: Tensor) -> Tensor:
        return pack(latents) if self.packed else latents

    def from_pipeline(self, latents: Tensor, size: tuple[int, ...]) -> Tensor:
        return unpack(latents, size) if self.packed else latents
