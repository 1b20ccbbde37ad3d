"""Students that are made from a picture, cond["image"]: what IFSuperResolutionPipeline needs to run them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fewstep.export.base import ExportRefused, Stock
from fewstep.export.card import as_code, opening
from fewstep.export.routes import INSTEAD
from fewstep.networks.controlnet import CONTROLNET_PIPELINES
from fewstep.networks.picture import joined

IF_PIPELINES = ("IFPipeline", "IFSuperResolutionPipeline")
"""Stock pipelines of text-conditional networks of pixels, without and with a picture."""
NOISING = "image_noising_scheduler"


def whole_model(wrapper: Any) -> nn.Module:
    """The wrapped model; of one with a picture a copy whose first layer takes x and the picture as one input."""
    if wrapper.picture is None:
        return wrapper.model
    model: Any = copy.deepcopy(wrapper.model)
    model.conv_in = joined(model.conv_in, wrapper.picture)
    model.register_to_config(in_channels=model.conv_in.in_channels)
    return model


def no_noise() -> Any:
    """An image_noising_scheduler whose sigma at level 250, a call's default, is 1.6e-5, below the step of a pixel."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(num_train_timesteps=1000, trained_betas=[1e-12] * 1000)


def check_picture(wrapper: Any, stock: Stock) -> None:
    """ExportRefused where no stock pipeline hands this network its picture as it was trained with it."""
    if not wrapper.image_channels or wrapper.pipeline in CONTROLNET_PIPELINES:
        return
    if wrapper.pipeline != "IFSuperResolutionPipeline":
        raise ExportRefused(
            f"no stock pipeline joins a picture to the input of a {type(wrapper.model).__name__}; train the network as "
            f"`unet-text`, whose students IFSuperResolutionPipeline runs; {INSTEAD}"
        )
    if wrapper.image_channels != wrapper.channels():
        raise ExportRefused(
            f"IFSuperResolutionPipeline takes pictures of as many channels as samples have, {wrapper.channels()}, and "
            f"this student was trained with {wrapper.image_channels}; {INSTEAD}"
        )
    if stock.name == "EulerDiscreteScheduler":
        raise ExportRefused(
            "EulerDiscreteScheduler scales the picture together with x; train at evenly spaced steps, which "
            f"DDIMScheduler takes, or re-noise between steps; {INSTEAD}"
        )


def picture_usage(call: Mapping[str, Any], image: tuple[int, ...], text: int, folder: str, **named: str) -> str:
    """Lines of plain diffusers code that make a sample of a picture (c, h, w); text: width of words it does without."""
    given = f"prompt_embeds=torch.zeros(1, 1, {text}), " if "prompt" not in call else ""
    shape = ", ".join(map(str, image))
    return (
        f"import torch\n{opening('IFSuperResolutionPipeline', folder, **named)}"
        f"image = torch.zeros(1, {shape})  # yours, in [-1, 1]\n"
        f'pipe({given}image=image, {as_code(call)}).images[0].save("sample.png")'
    )


def controlnet_usage(name: str, call: Mapping[str, Any], image: tuple[int, ...], folder: str, **named: str) -> str:
    """`picture_usage` of a ControlNet, which takes pictures in [0, 1]."""
    colours, high, wide = image
    if colours == 3:
        more, given = ", utils", f'utils.load_image("yours.png").resize(({wide}, {high}))'
    else:  # the pipeline makes colours of every file
        more, given = "", f"torch.zeros(1, {colours}, {high}, {wide})  # yours, in [0, 1]"
    lines = opening(name, folder, **named).replace(f"import {name}", f"import {name}{more}")
    start = "" if more else "import torch\n"
    return f'{start}{lines}image = {given}\npipe(image=image, {as_code(call)}).images[0].save("sample.png")'


def save_noising(folder: Path, index: dict[str, Any]) -> None:
    """The scheduler of `no_noise` as a part of a pipeline's folder."""
    no_noise().save_pretrained(folder / NOISING)
    index[NOISING] = ["diffusers", "DDPMScheduler"]
