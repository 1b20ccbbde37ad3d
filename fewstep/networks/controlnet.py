"""A ControlNet beside a frozen Stable Diffusion UNet: a student that is shown a picture (arXiv 2302.05543)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.config import RecipeError, part
from fewstep.files import expanded
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.parts import Site, seeded
from fewstep.networks.specs import innermost_denoiser
from fewstep.networks.weights import load_part
from fewstep.networks.wrappers.base import noise
from fewstep.networks.wrappers.unet_condition import UNetCondition

CHANNELS = (16, 32, 96, 256)
"""Of the layers that bring the picture to the size of latents, each half of the one before (as published)."""

CONTROLNET_PIPELINES = ("StableDiffusionControlNetPipeline", "StableDiffusionXLControlNetPipeline")
"""Stock pipelines of latents that hand their picture to a ControlNet."""


class Controlled(UNetCondition):
    """A UNet whose blocks are added to by a ControlNet, which alone is its own weights and state.

    The UNet belongs to another role and is called as it is there; copies share it. cond["image"] (b, c, pixels h,
    pixels w) lies in [-1, 1] as pictures do, and the ControlNet sees it in [0, 1] as diffusers' pipelines hand it on.

    Args:
        base: the wrapped UNet, of latents.
        controlnet: a ControlNetModel of the UNet's sizes.
    """

    def __init__(self, base: UNetCondition, controlnet: nn.Module) -> None:
        self.__dict__["_frozen"] = (base.model,)
        super().__init__(base.model, guidance=base.guidance, pixels=base.pixels)
        del self._modules["model"]
        self.controlnet: Any = controlnet
        self.pipeline = CONTROLNET_PIPELINES[int(self.added)]  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> Controlled:
        """Another ControlNet with the same values on the same UNet."""
        base = UNetCondition(self.model, guidance=self.guidance, pixels=self.pixels)
        other = Controlled(base, copy.deepcopy(self.controlnet, memo))
        memo[id(self)] = other
        return other.train(self.training)

    def with_own_base(self) -> None:
        """From now on a UNet of its own, in float32 on the CPU."""
        self.__dict__["_frozen"] = (copy.deepcopy(self.model).cpu().float(),)

    @property
    def model(self) -> Any:
        """The UNet, which no `parameters()` of this network holds."""
        return self.__dict__["_frozen"][0]

    @property
    def width(self) -> int:
        return 0

    @property
    def image_channels(self) -> int:
        net = self._modules.get("controlnet")
        return 0 if net is None else int(net.config.conditioning_channels)  # type: ignore[union-attr, arg-type]

    def add_image(self, channels: int) -> None:
        raise ValueError("this student is shown its picture by a ControlNet; build another one")

    def example_image(self, b: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return self.picture_at(self.sample_size(), b, generator)

    def picture_at(self, size: Sequence[int], b: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """A random picture for x (b, c, h, w) of a height and width, of `pixels` times both."""
        sides = (n * self.pixels for n in size)
        return {"image": noise(generator, b, self.image_channels, *sides).clamp(-1, 1)}

    def call(self, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        image, sides = cond["image"], tuple(n * self.pixels for n in x.shape[2:])
        if tuple(image.shape) != (len(x), self.image_channels, *sides):
            raise ValueError(
                f"ControlNet: takes cond['image'] of {[len(x), self.image_channels, *sides]}, {self.pixels} pixels for "
                f"each cell of the latents, not {list(image.shape)}"
            )
        own = next(self.controlnet.parameters()).dtype
        given = self.given(x, cond)
        down, middle = self.controlnet(
            x.to(own),
            time,
            encoder_hidden_states=self.words(cond, len(x)).to(own),
            controlnet_cond=(image.to(own) + 1) / 2,
            added_cond_kwargs=given["added_cond_kwargs"],
            return_dict=False,
        )
        more = {
            "down_block_additional_residuals": [d.to(x.dtype) for d in down],
            "mid_block_additional_residual": middle.to(x.dtype),
        }
        return self.model(x, time, self.words(cond, len(x)), **given, **more, return_dict=False)[0]

    def arguments(self, cond: Mapping[str, Tensor], size: tuple[int, ...]) -> dict[str, Any]:
        return super().arguments(cond, size) | {"image": (cond["image"] + 1) / 2}


@part("network", "controlnet")
class ControlNetSpec:
    """A ControlNet on another role's frozen Stable Diffusion UNet, for data whose conditions hold a picture.

    It begins with the UNet's own weights and without effect: the role's answer is the UNet's bit for bit.
    """

    of: str = "teacher"
    """Role with the UNet, of Stable Diffusion's or SDXL's class. The picture has as many pixels as its VAE's."""
    path: str | None = None
    """Folder of a ControlNet to begin from (config.json and .safetensors), trained on the UNet's base or a student."""

    def files(self) -> list[Path]:
        """Those that it begins from."""
        return [] if self.path is None else sorted(expanded(self.path).glob("*.safetensors"))

    def build(self, site: Site) -> nn.Module:
        base = site.role(self.of, "controlnet.of")
        inner = innermost_denoiser(base)
        wrapper: Any = getattr(inner, "net", None)
        if inner is None or inner is not base or type(wrapper) is not UNetCondition or wrapper.pixels == 1:
            kind = type(getattr(wrapper, "model", wrapper or base)).__name__
            raise RecipeError(
                f"controlnet.of: the {self.of} is a {kind}, and a ControlNet is for a UNet2DConditionModel of latents in "
                "its own process; of others take {name: copy, of: " + self.of + ", image: CHANNELS}"
            )
        if wrapper.image_channels:
            raise RecipeError(f"controlnet.of: the {self.of} is made from a picture already")
        if wrapper.takes_scale:
            raise RecipeError(
                f"controlnet.of: the {self.of} takes its guidance scale as an input (time_cond_proj_dim), and no "
                "ControlNetModel does; name a role with a UNet that takes none, such as the one it was distilled from"
            )
        shape = (*(n * wrapper.pixels for n in site.shape[1:]),)
        if site.image is None or tuple(site.image[1:]) != shape:
            held = "hold no picture" if site.image is None else f"hold one of {list(site.image)}"
            raise RecipeError(
                f"controlnet.of: takes pictures of {shape[0]} x {shape[1]} pixels, {wrapper.pixels} for each cell of the "
                f"latents, and the data's conditions {held}; train on data: {{name: degraded, vae: FOLDER, ...}} with "
                "an operator that keeps the size"
            )
        net = Controlled(wrapper, seeded(site, lambda: self._net(wrapper, site.image[0])))
        made = Denoiser(net, inner.process, inner.prediction, inner.time_input)
        made.ignore = tuple(key for key in inner.ignore if key != "image")
        return made

    def _net(self, wrapper: Any, channels: int) -> nn.Module:
        from diffusers import ControlNetModel

        if self.path is not None:
            net: Any = load_part(expanded(self.path), f"controlnet.path {self.path}", "ControlNetModel")
            for key, wanted in (("conditioning_channels", channels), ("cross_attention_dim", None)):
                own = getattr(net.config, key)
                if own != (wanted or getattr(wrapper.config, key)):
                    raise RecipeError(
                        f"controlnet.path {self.path}: {key} is {own}, and here it is "
                        f"{wanted or getattr(wrapper.config, key)}; name one of this UNet and this data"
                    )
            return net
        halvings = (wrapper.pixels - 1).bit_length()
        widths = (*CHANNELS, *(CHANNELS[-1] for _ in range(halvings)))[: halvings + 1]
        net = ControlNetModel.from_unet(
            wrapper.model, conditioning_embedding_out_channels=widths, conditioning_channels=channels
        )
        return net.requires_grad_(True).eval()
