"""A picture that conditions, cond["image"], as further input channels of a network: a layer of its own beside the first.

Added to what the first layer answers it is one layer of more input channels, which is how it is exported; apart, a layer
of zeros leaves a copied network as it was, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def image_at(image: Tensor, x: Tensor, channels: int, who: str) -> Tensor:
    """cond["image"] (b, channels, h', w') at the height and width of x (b, c, h, w).

    Bilinear with aligned corners, as IFSuperResolutionPipeline has it; of x's size it stays as it is. Raises ValueError
    naming `who` for another number of channels or of pictures.
    """
    if image.ndim != 4 or image.shape[1] != channels:
        raise ValueError(f"{who}: takes cond['image'] of (b, {channels}, h, w), not {tuple(image.shape)}")
    if image.shape[0] != x.shape[0]:
        raise ValueError(f"{who}: cond['image'] has {image.shape[0]} pictures for {x.shape[0]} samples")
    if image.shape[2:] == x.shape[2:]:
        return image
    return F.interpolate(image, x.shape[2:], mode="bilinear", align_corners=True)


def beside(first: nn.Conv2d, channels: int) -> nn.Conv2d:
    """A layer of zeros for so many channels of a picture, to be added to what a network's first convolution answers."""
    if first.groups != 1:
        raise ValueError(f"its first layer has {first.groups} groups, so nothing joins it")
    sides: Any = {"stride": first.stride, "padding": first.padding, "dilation": first.dilation}
    made = nn.Conv2d(channels, first.out_channels, first.kernel_size, bias=False, device=first.weight.device, **sides)  # type: ignore[arg-type]
    nn.init.zeros_(made.weight)
    return made.to(first.weight.dtype)


def parted(first: nn.Conv2d, channels: int) -> tuple[nn.Conv2d, nn.Conv2d]:
    """(the first layer for `channels` of x, the layer for the others) of one that takes both."""
    sides: Any = {"stride": first.stride, "padding": first.padding, "device": first.weight.device}
    own = nn.Conv2d(channels, first.out_channels, first.kernel_size, bias=first.bias is not None, **sides)  # type: ignore[arg-type]
    own.to(first.weight.dtype)
    rest = beside(own, first.in_channels - channels)
    own.weight.data = first.weight.data[:, :channels].clone()
    rest.weight.data = first.weight.data[:, channels:].clone()
    if first.bias is not None:
        own.bias = first.bias
    return own, rest


def joined(first: nn.Conv2d, picture: nn.Conv2d) -> nn.Conv2d:
    """The two of `parted` as one layer again."""
    sides: Any = {"stride": first.stride, "padding": first.padding, "device": first.weight.device}
    count = first.in_channels + picture.in_channels
    whole = nn.Conv2d(count, first.out_channels, first.kernel_size, bias=first.bias is not None, **sides)  # type: ignore[arg-type]
    whole.to(first.weight.dtype)
    whole.weight.data = torch.cat((first.weight.data, picture.weight.data), 1)
    if first.bias is not None:
        whole.bias = first.bias
    return whole
