"""What a wrapper is: one diffusers class as a fewstep network, in a few lines that say how it is called.

A subclass gives `call` (one forward pass) and `blocks` (what can be tapped); hooks, early stop, further inputs
and dtypes are done here. It is registered under the class name that stands in the folder's config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fewstep.algebra.condition import checked, moved
from fewstep.networks.extras import Extras
from fewstep.networks.picture import beside, image_at

WRAPPERS: dict[str, type[Wrapper]] = {}
"""Wrappers by the `_class_name` of a model's config.json."""
W = TypeVar("W", bound="type[Wrapper]")


def wraps(name: str) -> Callable[[W], W]:
    """Register a wrapper for the models of a class, such as "SD3Transformer2DModel"."""

    def register(cls: W) -> W:
        if name in WRAPPERS:
            raise ValueError(f"{name} has two wrappers: {WRAPPERS[name].__qualname__}, {cls.__qualname__}")
        WRAPPERS[name] = cls
        return cls

    return register


class _Stop(Exception):
    """Leaves the forward pass once all taps are known."""


class Wrapper(nn.Module):
    """A network called as net(x, time, cond, taps=..., stop=...) -> (raw, features).

    Args:
        model: the module; it runs in its own dtype.
        classes: number of real classes, 0 for none.
        guidance: embedded guidance scale where the condition brings none.
        pixels: side of a cell of x in pixels of the decoded image, 1 without a VAE.
    """

    component: ClassVar[str] = "transformer"
    """Sub-folder of the pipeline that holds the model."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Keys that a condition must have."""
    takes: ClassVar[tuple[str, ...]] = ()
    """Keys that it may have."""
    pipeline: ClassVar[str] = ""
    """The stock pipeline class that runs this network, for export and `check-teacher`."""
    levels: ClassVar[str] = "timesteps"
    """How that pipeline's call takes its own noise levels: timesteps, sigmas, or "" for their number only."""
    even: ClassVar[bool] = False
    """True: without levels of its own the pipeline's call spaces u as 1 - i / n and leaves the shift to the scheduler."""
    plain: ClassVar[Mapping[str, Any]] = {"guidance_scale": 1.0}
    """Arguments with which that pipeline's call does not guide."""
    cfg: ClassVar[str] = "guidance_scale"
    """The argument of that pipeline's call that mixes answers with and without the condition; "": it mixes none."""
    pick: ClassVar[int] = 0
    """Which output of a tapped block that returns several is the image's."""

    def __init__(self, model: nn.Module, classes: int = 0, *, guidance: float | None = None, pixels: int = 1) -> None:
        super().__init__()
        self.model: Any = model
        self.classes = classes
        self.guidance = guidance
        self.pixels = pixels
        self.picture: Any = None
        if self.width:
            self.extras = Extras(self.width)

    @classmethod
    def load(cls, folder: Any) -> nn.Module:
        """The model of a `Folder`, in float32; a class of your own may read its files in any way."""
        from fewstep.networks.folder import load_model

        return load_model(folder)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def width(self) -> int:
        """Size of the embedding that conditions the network; 0: it takes no further inputs."""
        return 0

    def embedders(self) -> list[nn.Module]:
        """Modules whose outputs (b, width) condition the network; further inputs are added to each."""
        return []

    @property
    def image_channels(self) -> int:
        """Channels of cond["image"], a picture that conditions; 0: it takes none."""
        return 0 if self.picture is None else int(self.picture.in_channels)

    @property
    def wanted(self) -> tuple[str, ...]:
        """Keys that a condition must have, with that of a picture."""
        return (*self.needs, "image") if self.image_channels else self.needs

    def first(self) -> Any:
        """The first convolution, beside which a picture enters; ValueError for a model whose pictures do not so."""
        raise ValueError(f"a {type(self.model).__name__} takes no picture as further channels")

    def add_image(self, channels: int) -> None:
        """Take cond["image"] of so many channels, without effect yet. Raises ValueError where it cannot or does."""
        if self.picture is not None:
            raise ValueError(
                f"this {type(self.model).__name__} takes a picture of {self.image_channels} channels already"
            )
        self.picture = beside(self.first(), channels)

    def call(self, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """One forward pass: x (b, c, h, w), time (b,) as the model takes it -> raw of x's shape."""
        raise NotImplementedError

    def blocks(self) -> dict[str, nn.Module]:
        """Modules by tap name; their outputs are maps (b, c, h, w) or tokens (b, n, c)."""
        raise NotImplementedError

    def own(self, raw: Tensor) -> Tensor:
        """raw in the layout that `model` itself returns; what an oracle in its place would answer."""
        return raw

    def sample_size(self) -> tuple[int, ...]:
        """Height and width of x that the model was made for; of a video frames, height and width."""
        size = self.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def small_size(self) -> tuple[int, ...]:
        """A size of x on which conventions are tried: its own, or of a model that takes any a smaller, unequal one."""
        return self.sample_size()

    def channels(self) -> int:
        """Channels of x."""
        return int(self.config.in_channels)

    def tokens(self, size: tuple[int, ...]) -> int:
        """Number of image tokens for x of a size; a dynamic flow shift depends on it."""
        patch = int(getattr(self.config, "patch_size", None) or 1)
        return (size[0] // patch) * (size[1] // patch)

    def refuses_size(self, size: Sequence[int]) -> str:
        """Why the model cannot take x of a height and width; "" where it can, as far as its config tells."""
        patch = int(getattr(self.config, "patch_size", None) or 1)
        return f"its patches have {patch} x {patch}" if any(n % patch for n in size) else ""

    def mu(self, config: Mapping[str, Any], tokens: int, where: str = "", steps: int | None = None) -> float:
        """Logarithm of a dynamic flow shift as the family's pipeline has it; config: the scheduler's.

        steps: how many the pipeline takes, for a family whose shift depends on it; its own default when left out.
        """
        from fewstep.networks.scheduler import dynamic_mu

        return dynamic_mu(config, tokens, where)

    def scale_of_pipeline(self, scale: float) -> float:
        """The guidance scale in fewstep's convention, where 1 is none, of the number that the pipeline is called with."""
        return scale

    combine: ClassVar[Callable[..., Tensor] | None] = None
    """(self, cond, null, scale) -> the guided answer of the model's two, all as `call` returns them; scale is w, a number
    or (b,), and 1 is none. None: null + w (cond - null)."""

    def example(self, b: int, generator: torch.Generator | None = None) -> Any:
        """A random condition of the right shapes, None where the network takes none."""
        return None

    def arguments(self, cond: Mapping[str, Tensor], size: tuple[int, ...]) -> dict[str, Any]:
        """The condition as keyword arguments of the stock pipeline's call."""
        return {}

    def of_size(self, size: tuple[int, ...]) -> dict[str, Any]:
        """Arguments of the pipeline's call that go with x of a size, beside height and width."""
        return {}

    def to_pipeline(self, latents: Tensor) -> Tensor:
        """Latents as the stock pipeline takes them."""
        return latents

    def from_pipeline(self, latents: Tensor, size: tuple[int, ...]) -> Tensor:
        """What the stock pipeline returns for output_type="latent", as x."""
        return latents

    def drawn(self, latents: Tensor, size: tuple[int, ...], pipe: Any) -> Tensor:
        """`from_pipeline` where the pipeline that drew them is at hand: one may return codes of its VAE instead."""
        return self.from_pipeline(latents, size)

    def stepped(self, latents: Tensor) -> Tensor:
        """x in the layout that the pipeline's scheduler steps, in which it draws its noise."""
        return self.to_pipeline(latents)

    def unstepped(self, latents: Tensor, size: tuple[int, ...]) -> Tensor:
        """The inverse of `stepped`."""
        return self.from_pipeline(latents, size)

    def _dtype(self, x: Tensor) -> torch.dtype:
        """That of the weights; diffusers keeps parts of some classes (Wan, Krea 2) in float32 whatever is asked for."""
        kept = tuple(getattr(self.model, "_keep_in_fp32_modules", None) or ())
        floats = ((n, p.dtype) for n, p in self.model.named_parameters() if p.is_floating_point())
        return next((dtype for name, dtype in floats if not any(k in name for k in kept)), x.dtype)

    def _block(self, tap: str) -> nn.Module:
        blocks = self.blocks()
        if tap not in blocks:
            kind = type(self.model).__name__
            raise ValueError(f"tap {tap!r} is unknown to this {kind}; allowed: {', '.join(blocks)}")
        return blocks[tap]

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        cond: Any = None,
        *,
        taps: Sequence[str] = (),
        stop: bool = False,
        extras: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """x (b, c, h, w), time (b,) as the model was trained, cond see fewstep.algebra.condition -> (raw, features)."""
        who = type(self.model).__name__
        given = checked(cond, self.wanted, self.takes, who)
        features: dict[str, Tensor] = {}
        handles = []

        def watch(tap: str) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                features[tap] = output[self.pick] if isinstance(output, tuple) else output
                if stop and len(features) == len(taps):
                    raise _Stop

            return hook

        dtype = self._dtype(x)
        try:
            handles = [self._block(tap).register_forward_hook(watch(tap)) for tap in taps]
            further = self.extras.embed(extras) if self.width else None
            if isinstance(further, Tensor):
                # diffusers has no argument for inputs of ours: they join where it adds its own conditions.
                handles += [m.register_forward_hook(lambda _m, _a, out: out + further) for m in self.embedders()]
            if self.picture is not None:
                shown = self.picture(image_at(given["image"], x, self.image_channels, who).to(dtype))
                handles.append(self.first().register_forward_hook(lambda _m, _a, out: out + shown))
            return self.call(x.to(dtype), time, moved(given, dtype=dtype)), features
        except _Stop:
            return None, features
        finally:
            for handle in handles:
                handle.remove()

    @property
    def takes_scale(self) -> bool:
        """Whether the model takes a guidance scale as an input."""
        return bool(getattr(self.config, "guidance_embeds", False))

    def scale_of(self, cond: Mapping[str, Tensor], x: Tensor) -> Tensor | None:
        """The embedded guidance scale (b,) for a model that takes one, else None.

        Raises ValueError when the model takes one and neither the condition nor the wrapper has it.
        """
        if not self.takes_scale:
            if "guidance" in cond:
                raise ValueError(f"{type(self.model).__name__}: was not built to take cond['guidance']")
            return None
        if "guidance" in cond:
            return cond["guidance"].to(torch.float32)
        if self.guidance is None:
            raise ValueError(
                f"{type(self.model).__name__}: takes its guidance scale as an input; give cond['guidance'] (b,) or "
                "`guidance` beside the teacher's path (Flux-dev: 3.5)"
            )
        return torch.full((x.shape[0],), self.guidance, device=x.device)


def noise(generator: torch.Generator | None, *shape: int) -> Tensor:
    """Standard normal numbers for example conditions."""
    return torch.randn(*shape, generator=generator)


def numbered(prefix: str, modules: Any) -> dict[str, nn.Module]:
    """A list of modules as prefix0, prefix1, ..."""
    return {f"{prefix}{i}": m for i, m in enumerate(modules)}


def first_half(raw: Tensor, channels: int) -> Tensor:
    """raw without the channels of a learned variance."""
    return raw[:, :channels] if raw.shape[1] == 2 * channels else raw


def doubled(raw: Tensor, model: Any) -> Tensor:
    """raw with zeros for the learned variance where the model returns one."""
    return torch.cat((raw, torch.zeros_like(raw)), 1) if model.config.out_channels == 2 * raw.shape[1] else raw
