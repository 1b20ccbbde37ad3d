"""Networks and discriminators as recipe parts: each spec builds one role."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from fewstep.algebra.condition import check_keys
from fewstep.algebra.process import EDM, DiscreteVP, Flow, ProcessPart
from fewstep.config import Count, RecipeError, config, part
from fewstep.files import expanded
from fewstep.networks.adapters import Adapted, fresh_name, plain_copy
from fewstep.networks.denoiser import Denoiser, Rescheduled
from fewstep.networks.dit import DiT
from fewstep.networks.extras import Input
from fewstep.networks.heads import Discriminator, LogVar
from fewstep.networks.lora_file import read_lora
from fewstep.networks.mlp import MLP
from fewstep.networks.parts import Site, check_image, check_prediction, check_weights, seeded
from fewstep.networks.slow_time import slow_time
from fewstep.networks.wrappers.base import Wrapper

Channels = Annotated[int, Field(ge=0, le=1024)]


def example_condition(net: Any) -> Any:
    """A condition of one row with the shapes that a wrapped diffusers model takes; None for other networks."""
    while not isinstance(net, Wrapper):
        net = next((getattr(net, k) for k in ("base", "denoiser", "net") if hasattr(net, k)), None)
        if net is None:
            return None
    return net.example(1)


@part("network", "copy")
class Copy:
    """A full, trainable copy of another role's denoiser; of an adapter, the base with the adapter merged in."""

    of: str = "teacher"
    """Role to copy: teacher, student or one that is built before."""
    inputs: tuple[Input, ...] = ()
    """Further inputs that the copy takes, without effect at first: s (destination time) or length (of the jump), w
    (guidance), mirror."""
    image: Channels = 0
    """Input channels for the picture in the data's conditions, without effect at first; 0 keeps those of the role."""
    ignore: tuple[str, ...] = ()
    """Keys of conditions that the copy is not shown; of the role that it copies it does not inherit them."""
    max_frequency: float | None = None
    """Cut time features of a diffusers network that turn faster than this, in radians per unit of its own time input
    (1 to 1e-4): they make d/dt explode in sCM, MeanFlow and whatever else takes a tangent (sCM, sec. 4.1)."""

    def __post_init__(self) -> None:
        check_keys(self.ignore, "ignore")

    def build(self, site: Site) -> nn.Module:
        source = site.role(self.of, "copy.of")
        if not list(source.parameters()):
            raise RecipeError(
                f"copy.of: the {self.of} is analytic and has no weights to copy; name a network (mlp, dit, unet2d)"
            )
        twin = plain_copy(source)
        denoiser = innermost_denoiser(twin)
        if denoiser is not None:
            denoiser.ignore, denoiser.see = self.ignore, {}
        if self.image:
            try:
                twin.add_image(self.image)  # type: ignore[operator]
            except (AttributeError, ValueError) as error:
                raise RecipeError(f"copy.image: the {self.of} cannot take a picture: {error}") from None
        if isinstance(twin, Denoiser | Rescheduled) and "image" not in self.ignore and (self.image or site.image):
            check_image(site, int(getattr(twin, "image_channels", 0)), "copy.image")
        if self.inputs:
            try:
                seeded(site, lambda: twin.add_inputs(self.inputs))  # type: ignore[operator]
            except (AttributeError, ValueError) as error:
                raise RecipeError(f"copy.inputs: the {self.of} cannot take further inputs: {error}") from None
        for p in twin.parameters():
            p.requires_grad_(True)
        if self.max_frequency is not None:
            try:
                slow_time(twin, self.max_frequency)
            except ValueError as error:
                raise RecipeError(f"copy.max_frequency {self.max_frequency}: the {self.of}: {error}") from None
        return twin.eval()


def innermost_denoiser(module: Any) -> Denoiser | None:
    """The denoiser around a role's network, inside re-expressions; None for roles of other kinds."""
    while module is not None and not isinstance(module, Denoiser):
        module = getattr(module, "denoiser", None)
    return module


@part("network", "lora")
class Lora:
    """A LoRA adapter (by peft) on the weights of another role, which answers without it as before."""

    of: str = "teacher"
    """Role whose weights carry the adapter; on the student's it follows their training."""
    rank: Count = 16
    """Rank r of the update B A of every layer."""
    alpha: float | None = None
    """Scale; the rank when left out."""
    targets: tuple[str, ...] | None = None
    """Suffixes of the layers to adapt; every Linear and Conv2d when left out."""
    file: str | None = None
    """A LoRA file to start from, of diffusers' scripts, peft or kohya; rank and targets must be the file's."""
    beside: tuple[str, ...] = ()
    """Roles, adapters of the same role, whose LoRA sets a call uses as well; they are trained in their own right."""

    def build(self, site: Site) -> nn.Module:
        base = site.role(self.of, "lora.of")
        if isinstance(base, Adapted):
            raise RecipeError(f"lora.of: the {self.of} is an adapter itself; name the role with the weights")
        if not list(base.parameters()):
            raise RecipeError(f"lora.of: the {self.of} is analytic and has no weights to adapt")
        inner = innermost_denoiser(base)
        if inner is not None and (inner.ignore or inner.see):
            hidden = ", ".join((*inner.ignore, *inner.see))
            told = f"the {self.of} is not shown {hidden} as the data have it, and an adapter on it would not be either"
            raise RecipeError(f"lora.of: {told}; take a copy")
        sizes = {"rank": self.rank, "alpha": self.alpha, "targets": self.targets, "beside": self._others(base, site)}
        try:
            adapted: Any = seeded(site, lambda: Adapted(base, fresh_name(base), **sizes))  # type: ignore[arg-type]
        except ValueError as error:
            raise RecipeError(f"lora: {error}") from None
        if self.file is not None:
            read_lora(adapted, expanded(self.file))
        return adapted

    def _others(self, base: nn.Module, site: Site) -> tuple[str, ...]:
        others: list[Any] = [site.role(name, "lora.beside") for name in self.beside]
        for name, other in zip(self.beside, others, strict=True):
            if not isinstance(other, Adapted) or other.base is not base:
                raise RecipeError(f"lora.beside: {name} is no adapter of the {self.of}")
        return tuple(n for other in others for n in other.names)


@part("network", "mlp")
class MLPSpec:
    """The toy MLP."""

    width: Count = 192
    """Hidden units of a layer."""
    depth: Count = 5
    """Number of hidden layers."""
    process: ProcessPart = Flow()
    """The noising process in which it answers."""
    prediction: str = "velocity"
    """What it answers: x0, eps, v, velocity (dx/dt), psi (eps - x0), score, trig; edm and cm on the process edm."""
    inputs: tuple[Input, ...] = ()
    """Scalar inputs beside the time: s (destination time) or length (of the jump), w (embedded guidance), mirror
    (TwinFlow)."""
    frequencies: Count = 16
    """Fourier features 2 k angle of the time; 3 or 4 for methods that differentiate in it (sCM, sec. 4.1)."""
    residual: bool = False
    """The layers after the first are residual blocks, which can be pruned."""

    def __post_init__(self) -> None:
        check_weights(self.width**2 * self.depth, f"width {self.width} and depth {self.depth}")
        check_prediction(self.prediction, self.process)

    def build(self, site: Site) -> nn.Module:
        if len(site.shape) != 1:
            raise RecipeError(f"network mlp is for vectors; the data has shape {list(site.shape)}")
        sizes = (self.width, self.depth, site.classes, self.inputs, self.frequencies, self.residual)
        net = seeded(site, lambda: MLP(site.shape[0], *sizes))
        return Denoiser(net, self.process, self.prediction, "angle")


@part("network", "dit")
class DiTSpec:
    """The small diffusion transformer."""

    patch: Count = 2
    """Side of a patch in pixels; it must divide height and width."""
    width: Count = 64
    """Channels of a token."""
    depth: Count = 4
    """Number of blocks."""
    heads: Count = 4
    """Attention heads; they must divide the width."""
    process: ProcessPart = Flow()
    """The noising process in which it answers."""
    prediction: str = "velocity"
    """What it answers: x0, eps, v, velocity (dx/dt), psi (eps - x0), score, trig; edm and cm on the process edm."""
    inputs: tuple[Input, ...] = ()
    """Scalar inputs beside the time: s (destination time) or length (of the jump), w (embedded guidance), mirror
    (TwinFlow)."""

    image: Channels = 0
    """Channels of the picture in the data's conditions, which joins x; 0 for none."""

    def __post_init__(self) -> None:
        check_prediction(self.prediction, self.process)
        check_weights(12 * self.width**2 * self.depth, f"width {self.width} and depth {self.depth}")
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} must divide width {self.width}")

    def build(self, site: Site) -> nn.Module:
        if len(site.shape) != 3:
            raise RecipeError(f"network dit is for images; the data has shape {list(site.shape)}")
        if any(n % self.patch for n in site.shape[1:]):
            raise RecipeError(f"dit.patch {self.patch}: does not divide height and width of the data, {list(site.shape)}")
        check_image(site, self.image, "dit.image")
        shape = (site.shape[0], site.shape[1], site.shape[2])
        sizes = (self.patch, self.width, self.depth, self.heads)
        net = seeded(site, lambda: DiT(shape, *sizes, site.classes, self.inputs, self.image))
        return Denoiser(net, self.process, self.prediction, "angle")


def _check_channels(channels: tuple[int, ...], layers: int) -> None:
    check_weights(36 * layers * sum(c * c for c in channels), f"channels {list(channels)} and layers {layers}")


def _pixels(site: Site, name: str, levels: int, image: int) -> dict[str, Any]:
    """Size and channels of a diffusers UNet for the site's images. RecipeError for sizes that it cannot take."""
    check_image(site, image, f"{name}.image")
    if len(site.shape) != 3:
        raise RecipeError(f"network {name} is for images; the data has shape {list(site.shape)}")
    channels, height, width = site.shape
    # On the way up a side doubles: one that was halved with a remainder does not meet its own again.
    step = 2 ** (levels - 1)
    if height % step or width % step:
        raise RecipeError(
            f"{name}.channels: {levels} levels halve a side {levels - 1} times, so height and width of the data must be "
            f"multiples of {step}, not {height} x {width}; give fewer levels, or pictures of another size"
        )
    size = height if height == width else (height, width)
    return {"sample_size": size, "in_channels": channels + image, "out_channels": channels}


@part("network", "unet2d")
class UNet2DSpec:
    """A diffusers UNet2DModel on the EDM process in the parametrisation of consistency models.

    That is what diffusers' ConsistencyModelPipeline runs, so teacher and students export without conversion.
    """

    channels: tuple[Count, ...] = (32, 64)
    """Channels at each level, finest first; the side halves from one to the next."""
    layers: Count = 1
    """Residual blocks of a level, one more on the way up."""
    attention: bool = False
    """Attention at all but the finest level."""
    groups: Count = 8
    """Groups of the group norms; they must divide every entry of channels."""
    head_dim: Count = 16
    """Channels of an attention head."""
    sigma_data: float = 0.5
    """Standard deviation of the data in [-1, 1], for the scalings before and behind the network (EDM, table 1)."""
    image: Channels = 0
    """Channels of the picture in the data's conditions, which joins x; 0 for none."""

    def __post_init__(self) -> None:
        if not self.channels or any(c % self.groups for c in self.channels):
            raise ValueError(f"channels {list(self.channels)} must be multiples of groups {self.groups}")
        _check_channels(self.channels, self.layers)

    @property
    def process(self) -> EDM:
        return EDM(sigma_data=self.sigma_data)

    def build(self, site: Site) -> nn.Module:
        from diffusers import UNet2DModel

        return self.around(seeded(site, lambda: UNet2DModel(**self.settings(site))), site)

    def settings(self, site: Site) -> dict[str, Any]:
        """The arguments of UNet2DModel."""
        inner = "Attn" if self.attention else ""
        deeper = len(self.channels) - 1
        return _pixels(site, "unet2d", len(self.channels), self.image) | {
            "block_out_channels": self.channels,
            "layers_per_block": self.layers,
            "down_block_types": ("DownBlock2D", *[f"{inner}DownBlock2D"] * deeper),
            "up_block_types": (*[f"{inner}UpBlock2D"] * deeper, "UpBlock2D"),
            "norm_num_groups": self.groups,
            "attention_head_dim": self.head_dim,
            "add_attention": self.attention,
            "num_class_embeds": site.classes + 1 if site.classes else None,
            "resnet_time_scale_shift": "scale_shift",
        }

    def around(self, model: nn.Module, site: Site) -> Denoiser:
        """The denoiser of a UNet2DModel with these settings."""
        from fewstep.networks.unet2d import UNet2D

        return Denoiser(UNet2D(model, site.classes), self.process, "cm", "250log_sigma")


@part("network", "unet-text")
class UNetTextSpec:
    """A small text-conditional UNet of pixels in the form of DeepFloyd IF, a diffusers UNet2DConditionModel.

    The text is pooled into the time embedding and attended to at the coarsest level. It predicts v on a DDPM
    table, so that diffusers' IFPipeline runs teacher and students without conversion.
    """

    text: Count
    """Width of the text encoder's tokens."""
    channels: tuple[Count, ...] = (16, 32, 64, 96)
    """Channels at each level, finest first; the side halves from one to the next."""
    layers: Count = 1
    """Residual blocks of a level, one more on the way up."""
    groups: Count = 8
    """Groups of the group norms; they must divide every entry of channels."""
    heads: Count = 4
    """Of the attention and of the pooling; must divide the last of `channels` and `text`."""
    image: Channels = 0
    """Channels of the picture in the data's conditions, which joins x; 0 for none. With one it may go without text."""
    process: ClassVar[DiscreteVP] = DiscreteVP()

    def __post_init__(self) -> None:
        if len(self.channels) < 2 or any(c % self.groups for c in self.channels):
            raise ValueError(f"channels {list(self.channels)} must be two or more multiples of {self.groups}")
        if self.channels[-1] % self.heads or self.text % self.heads:
            raise ValueError(f"heads {self.heads} must divide channels {self.channels[-1]} and text {self.text}")
        _check_channels(self.channels, self.layers)

    def build(self, site: Site) -> nn.Module:
        from diffusers import UNet2DConditionModel

        from fewstep.networks.wrappers.unet_condition import UNetCondition

        pixels = _pixels(site, "unet-text", len(self.channels), self.image)
        finer = len(self.channels) - 1
        model = seeded(
            site,
            lambda: UNet2DConditionModel(
                **pixels,
                block_out_channels=self.channels,
                layers_per_block=self.layers,
                down_block_types=(*["DownBlock2D"] * finer, "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", *["UpBlock2D"] * finer),
                norm_num_groups=self.groups,
                # What diffusers calls the dimension of a head is for this class their number.
                attention_head_dim=self.heads,
                cross_attention_dim=self.channels[-1],
                encoder_hid_dim=self.text,
                encoder_hid_dim_type="text_proj",
                addition_embed_type="text",
                addition_embed_type_num_heads=self.heads,
                resnet_time_scale_shift="scale_shift",
            ),
        )
        return Denoiser(UNetCondition(model), self.process, "v", "index")


def example_of(site: Site, trunk: nn.Module) -> Any:
    """A condition of one row as the site's data have it, or as a wrapped diffusers model takes it."""
    labels = torch.zeros(1, dtype=torch.long) if site.classes else None
    own = example_condition(trunk)
    if site.image is None:
        return own if labels is None else labels
    picture = {"image": torch.zeros(1, *site.image)} | ({} if labels is None else {"label": labels})
    return own | picture if isinstance(own, dict) else picture


@part("network", "logvar")
class LogVarSpec:
    """A scalar of the noise level, for learned loss weights (EDM2, sCM)."""

    width: Count = 32
    """Fourier features of the noise level."""

    def build(self, site: Site) -> nn.Module:
        return seeded(site, lambda: LogVar(site.role("student", "logvar").process, self.width))  # type: ignore[arg-type]


@config
class DiscriminatorSpec:
    """Heads on the features of a denoiser."""

    trunk: Literal["critic", "teacher"] = "critic"
    """Whose features: the critic's (DMD2), trained with them, or the frozen teacher's (LADD, FastGen)."""
    taps: tuple[str, ...] = ("mid",)
    """Which features, one head each."""
    width: Count | None = None
    """Hidden channels of a head; the feature's own when left out."""

    def __post_init__(self) -> None:
        if not self.taps:
            raise ValueError("taps is empty; name at least one feature, such as [mid]")

    def build(self, site: Site) -> nn.Module:
        trunk = site.role(self.trunk, "discriminator.trunk")
        process: Any = trunk.process
        example = (
            torch.zeros(1, *site.shape),
            process.grid(torch.tensor([0.5], dtype=torch.float64)),
            example_of(site, trunk),
        )
        try:
            return seeded(site, lambda: Discriminator(trunk, self.taps, example, self.width))
        except ValueError as error:
            raise RecipeError(f"discriminator: {error}") from None
