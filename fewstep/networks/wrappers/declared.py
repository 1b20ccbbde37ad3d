"""A family of transformers as a table entry: names of arguments, clock, sign and layout, code only where it must be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fewstep.networks.wrappers.base import Wrapper, noise, numbered
from fewstep.networks.wrappers.flux import pack, unpack

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

    What they cannot say is `more` (further arguments of the model), `mu`, `combine` and `scale_of_pipeline`.
    """

    levels = "sigmas"
    even = True
    needs = ("text",)
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
    """Config keys of the last size of a condition, by its key; a mask has none: ""."""
    stacks: ClassVar[Mapping[str, str]] = {"block": "transformer_blocks"}
    """Paths of lists of blocks by the name of their taps."""
    embedder: ClassVar[str] = ""
    """Path of the module whose output conditions the blocks; further inputs are added there. "": it takes none."""
    made_for: ClassVar[tuple[int, ...]] = (128, 128)
    """Size of x at the pipeline's default number of pixels; configs of these classes have none."""
    patch: ClassVar[int] = 2
    """Side of a token in cells of x."""
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

    @property
    def width(self) -> int:
        if not self.embedder:
            return 0
        layers = [m for m in self.model.get_submodule(self.embedder).modules() if isinstance(m, nn.Linear)]
        return int(layers[-1].out_features)

    def embedders(self) -> list[nn.Module]:
        return [self.model.get_submodule(self.embedder)] if self.embedder else []

    def blocks(self) -> dict[str, nn.Module]:
        out: dict[str, nn.Module] = {}
        for tap, path in self.stacks.items():
            out |= numbered(tap, self.model.get_submodule(path))
        return out

    def call(self, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        given: dict[str, Any] = {argument: cond[key] for key, argument in self.names.items() if key in cond}
        given |= {self.x_name: self.layout(x), self.time_name: CLOCKS[self.clock](time), **self.more(x, cond)}
        return self.sign * self.image(self.model(**given, return_dict=False)[0], x)

    def own(self, raw: Tensor) -> Any:
        return self.layout(self.sign * raw)

    def sample_size(self) -> tuple[int, ...]:
        return self.made_for

    def small_size(self) -> tuple[int, ...]:
        return (*(min(n, 3) for n in self.made_for[:-2]), min(self.made_for[-2], 16), min(self.made_for[-1], 24))

    def channels(self) -> int:
        return int(self.config.in_channels) // (4 if self.packed else 1)

    def tokens(self, size: tuple[int, ...]) -> int:
        return size[-2] * size[-1] // self.patch**2

    def refuses_size(self, size: Sequence[int]) -> str:
        return f"its patches have {self.patch} x {self.patch}" if any(n % self.patch for n in size[-2:]) else ""

    def example(self, b: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        n, out = EXAMPLE_TOKENS, {}
        for key, width in self.widths.items():
            if key == "mask":  # a different number of tokens in each sample
                out[key] = (torch.arange(n) < n - torch.arange(b)[:, None] % 3).float()
            else:
                out[key] = noise(generator, b, n, int(self.config[width]))
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


def places(x: Tensor, columns: int = 3) -> Tensor:
    """Positions (h/2 w/2, columns) of 2 x 2 cells of x: row in column 1, number within it in column 2."""
    h, w = x.shape[-2] // 2, x.shape[-1] // 2
    out = torch.zeros(h, w, columns, device=x.device, dtype=x.dtype)
    out[..., 1] = torch.arange(h, device=x.device, dtype=x.dtype)[:, None]
    out[..., 2] = torch.arange(w, device=x.device, dtype=x.dtype)
    return out.reshape(-1, columns)
