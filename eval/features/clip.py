"""CLIP image features and CLIP score by open-clip, from a local checkpoint; the score's name states its
conventions.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.eval.errors import InputError
from fewstep.eval.features.base import state_sha256
from fewstep.eval.features.pixel_network import (
    CLIP_MEAN,
    CLIP_STD,
    PixelNetwork,
    checked_digest,
    find_weights,
)
from fewstep.eval.metrics.estimate import Estimate


@dataclass(frozen=True)
class ClipRecipe:
    """What makes two CLIP scores comparable.

    Attributes:
        architecture: open-clip's name, such as ``ViT-B-32``. OpenAI's own weights want ``-quickgelu`` behind it: a local
            file does not say with which activation it was trained, and the wrong one gives other numbers in silence.
        prefix: text put before every prompt.
        scale: factor on the cosine.
        clip_negative: count negative cosines as zero.
        on_long_prompt: ``error``, or ``keep-eot`` to cut the words and keep the end-of-text token. Cutting
            the token off, as some packages do, changes the score of every long prompt.
    """

    architecture: str
    prefix: str = ""
    scale: float = 1.0
    clip_negative: bool = False
    on_long_prompt: str = "error"

    @property
    def name(self) -> str:
        """The metric's full name."""
        floor = ", max(cos, 0)" if self.clip_negative else ", cos"
        return (
            f"CLIP score ({self.architecture}{floor}, x{self.scale:g}, prefix {self.prefix!r}, "
            f"long prompts: {self.on_long_prompt})"
        )


RECIPES = {
    "clip-s": ClipRecipe("ViT-B-32-quickgelu", prefix="A photo depicts ", scale=2.5, clip_negative=True),
    "torchmetrics": ClipRecipe("ViT-L-14-quickgelu", scale=100.0, clip_negative=True),
    "dmd2": ClipRecipe("ViT-g-14", prefix="A photo depicts ", on_long_prompt="keep-eot"),
}


def load_clip(architecture: str, path: str | os.PathLike[str], sha256: str | None = None) -> tuple[nn.Module, str]:
    """An open-clip model and its sha256: from a local checkpoint, or by one of open-clip's tags.

    A tag, such as ``laion2b_s12b_b42k``, is what `path` names when there is no such file; open-clip downloads it, and
    the digest is that of the weights in memory.

    Raises:
        ModuleNotFoundError: open-clip is not installed.
        FileNotFoundError: no such file; open-clip alone would take a random network or a download.
        ValueError: an unknown architecture, or weights that do not fit it.
    """
    if find_spec("open_clip") is None:
        raise ModuleNotFoundError("CLIP: pip install 'fewstep[clip]' (it needs open-clip-torch)")
    import open_clip

    if architecture not in open_clip.list_models():
        raise InputError(f"CLIP: unknown architecture {architecture!r}; see open_clip.list_models()")
    if str(path) in open_clip.list_pretrained_tags_by_model(architecture) and not Path(path).exists():
        if sha256 is not None:
            raise InputError(
                f"clip:{architecture}: this protocol names a file by its sha256 {sha256}, give that file "
                f"and not the tag {path}"
            )
        model = open_clip.create_model(architecture, pretrained=str(path), weights_only=True)
        return model.requires_grad_(False).eval(), state_sha256(model)
    source = find_weights(
        f"clip:{architecture}",
        Path(path).name,
        path,
        "Give an open-clip checkpoint file or one of its tags for this architecture.",
    )
    digest = checked_digest(f"clip:{architecture}", source, sha256)
    try:
        model = open_clip.create_model(architecture, pretrained=str(source), weights_only=True)
    except Exception as error:  # torch, pickle and safetensors have error types of their own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{source}: not weights of {architecture} ({reason})") from None
    return model.requires_grad_(False).eval(), digest


def clip_images(architecture: str, path: str | os.PathLike[str], sha256: str | None = None) -> PixelNetwork:
    """Image features of CLIP as a FeatureExtractor (for FD-CLIP, KID and CMMD): not normalised to unit
    length.
    """
    model, digest = load_clip(architecture, path, sha256)
    size = model.visual.image_size
    return PixelNetwork(
        model,
        model.encode_image,
        name=f"clip:{architecture}",
        dim=model.visual.output_dim,
        input_size=size[0] if isinstance(size, tuple) else size,
        sha256=digest,
        mean=CLIP_MEAN,
        std=CLIP_STD,
    )


def tokenise(recipe: ClipRecipe, prompts: Sequence[str]) -> Tensor:
    """Token ids (N, context) of prefix + prompt, the end-of-text token always there.

    Raises:
        ValueError: a prompt longer than the encoder takes, unless the recipe says ``keep-eot``.
    """
    import open_clip

    if recipe.on_long_prompt not in ("error", "keep-eot"):
        raise ValueError(f"on_long_prompt: expected 'error' or 'keep-eot', got {recipe.on_long_prompt!r}")
    tokenizer = open_clip.get_tokenizer(recipe.architecture)
    context = tokenizer.context_length
    for index, prompt in enumerate(prompts):
        # Two places go to start and end of text.
        length = len(tokenizer.encode(recipe.prefix + prompt)) + 2
        if length > context and recipe.on_long_prompt == "error":
            raise InputError(f"prompt {index}: {length} tokens, {recipe.architecture} reads {context}: {prompt[:60]!r}")
    return tokenizer([recipe.prefix + prompt for prompt in prompts])


@dataclass(frozen=True)
class ClipScorer:
    """A recipe with its network; `images` gives the features that `score` takes."""

    recipe: ClipRecipe
    images: PixelNetwork

    def score(self, features: Tensor, prompts: Sequence[str]) -> Estimate:
        """See `clip_score`."""
        return clip_score(self.images.network, self.recipe, features, prompts)


@torch.no_grad()
def clip_score(
    model: nn.Module,
    recipe: ClipRecipe,
    image_features: Tensor,
    prompts: Sequence[str],
    batch_size: int = 256,
) -> Estimate:
    """Mean scaled cosine between image features (N, D) and the N prompts, with its standard error.

    Raises ValueError for another number of prompts, or features that are not finite.
    """
    if len(image_features) != len(prompts):
        raise ValueError(f"prompts: {len(prompts)} for {len(image_features)} images")
    bad = ~torch.isfinite(image_features).all(dim=1)
    if bad.any():
        raise InputError(f"{recipe.architecture}: features of image {int(bad.int().argmax())} are not finite")
    tokens = tokenise(recipe, prompts)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    chunks = tokens.to(device).split(batch_size)
    text = torch.cat([model.encode_text(chunk).float() for chunk in chunks]).to(image_features.device)
    cosines = nn.functional.cosine_similarity(image_features.double(), text.double(), dim=1)
    if recipe.clip_negative:
        cosines = cosines.clamp(min=0)
    scores = recipe.scale * cosines
    return Estimate(value=float(scores.mean()), standard_error=float(scores.std()) / len(scores) ** 0.5)
