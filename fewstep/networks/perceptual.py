"""LPIPS (arXiv 1801.03924): a perceptual distance from VGG16 features, with weights from two local files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.config import Absent, Count, RecipeError, UserError, part
from fewstep.files import expanded
from fewstep.networks.parts import Site

CUTS = (3, 8, 15, 22, 29)
"""Indices in torchvision's vgg16().features of relu1_2, relu2_2, relu3_3, relu4_3, relu5_3."""
CHANNELS = (64, 128, 256, 512, 512)
# ImageNet's mean and deviation of [0, 1] pixels, said of [-1, 1] ones.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def read_weights(path: str) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from a torch file without code in it. UserError names the file."""
    file = expanded(path)
    if not file.is_file():
        raise UserError(f"lpips: {file}: no such file; LPIPS weights are never downloaded")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        return torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:
        raise UserError(f"lpips: {file}: cannot be read as weights: {error}") from None


class Perceptual(nn.Module):
    """distance(a, b) of images (b, c, h, w) in [-1, 1] -> (b,).

    Frozen, and without parameters of its own: checkpoints of a run do not hold it.

    Args:
        layers: torchvision's vgg16().features.
        linear: five weights (1, C, 1, 1), of CHANNELS.
        size: side to which images are resized first (consistency models: 224); None leaves them.
    """

    def __init__(self, layers: nn.Module, linear: list[Tensor], size: int | None = None) -> None:
        super().__init__()
        for p in layers.parameters():
            p.requires_grad_(False)
        self._layers = (layers.eval(),)
        self._linear = [w.detach().float() for w in linear]
        self.size = size

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        self._layers[0]._apply(fn)
        self._linear = [fn(w) for w in self._linear]
        return super()._apply(fn, recurse)

    def features(self, x: Tensor) -> list[Tensor]:
        """Activations at CUTS, each of unit length over its channels."""
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        if self.size is not None and x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False)
        column = (1, 3, 1, 1)
        x = (x - x.new_tensor(SHIFT).reshape(column)) / x.new_tensor(SCALE).reshape(column)
        found = []
        for i, layer in enumerate(self._layers[0].children()):
            x = layer(x)
            if i in CUTS:
                found.append(x / torch.sqrt((x**2).sum(1, keepdim=True) + 1e-10))
            if i == CUTS[-1]:
                break
        return found

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Gradients flow to both; the target's caller cuts them."""
        pairs = zip(self.features(a.float()), self.features(b.float()), self._linear, strict=True)
        return sum(((x - y) ** 2 * w).sum(1).mean((1, 2)) for x, y, w in pairs)  # type: ignore[return-value]


@part("network", "lpips")
class LPIPSSpec:
    """LPIPS with VGG16, as the role `perceptual` of methods whose distance is lpips. Nothing is downloaded."""

    features: str
    """File of torchvision's vgg16 weights (state dict; .pth or .safetensors)."""
    linear: str
    """File of the five linear layers (lin0.model.1.weight to lin4.model.1.weight)."""
    size: Count | None = None
    """Side to which images are resized first (consistency models: 224)."""

    def files(self) -> list[Path]:
        """Both files of weights."""
        return [expanded(self.features), expanded(self.linear)]

    def build(self, site: Site) -> nn.Module:
        from torchvision.models import vgg16

        self.check(site)
        layers = vgg16(weights=None).features
        weights = {
            k.removeprefix("features."): v for k, v in read_weights(self.features).items() if "classifier" not in k
        }
        linear = read_weights(self.linear)
        try:
            layers.load_state_dict(weights)
            rows = [linear[f"lin{i}.model.1.weight"].reshape(1, c, 1, 1) for i, c in enumerate(CHANNELS)]
        except (KeyError, RuntimeError) as error:
            first = str(error).splitlines()[0]
            raise UserError(f"lpips: {self.features}, {self.linear}: not VGG16's and LPIPS's weights: {first}") from None
        return Perceptual(layers, rows, self.size)

    def check(self, site: Site) -> None:
        """RecipeError for pictures that it cannot judge, Absent for a file that is not there."""
        if len(site.shape) != 3 or site.shape[0] not in (1, 3):
            raise RecipeError(f"network lpips is for grey or RGB images; the data has shape {list(site.shape)}")
        side = self.size or min(site.shape[1:])
        if side < 16:
            raise RecipeError(f"lpips.size: VGG16 halves four times, so images need a side of 16, not {side}")
        for file in self.files():
            if not file.is_file():
                raise Absent(f"lpips: {file}: no such file; LPIPS weights are never downloaded")
