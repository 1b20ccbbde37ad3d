"""Rewards as roles: frozen networks that say how good samples are, r(x, cond) -> (b,), more being better."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.config import Absent, Bounded, NotNegative, RecipeError, UserError, part
from fewstep.eval.errors import InputError
from fewstep.eval.features.clip import ClipRecipe, load_clip, tokenise
from fewstep.eval.features.house import HouseClassifier, HouseDigits, HouseFashion
from fewstep.eval.features.pixel_network import CLIP_MEAN, CLIP_STD
from fewstep.files import expanded
from fewstep.networks import code
from fewstep.networks.parts import Site, check_labels

HOUSE: dict[str, type[HouseClassifier]] = {"digits": HouseDigits, "fashion-mnist": HouseFashion}
OWN_GRADIENT = "method pso only compares rewards and needs no gradient of them"


def full(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def straight(x: Tensor) -> Tensor:
    """x within [-1, 1], with the gradient of x: a mere clamp has none outside, where it is needed most."""
    return x + (x.clamp(-1, 1) - x).detach()


class Opinion(nn.Module):
    """A reward around a network that is frozen and not registered, so that checkpoints of a run do not hold it."""

    def __init__(self, net: Callable[..., Any]) -> None:
        super().__init__()
        self._net = (net.requires_grad_(False).eval() if isinstance(net, nn.Module) else net,)

    @property
    def net(self) -> Any:
        return self._net[0]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        if isinstance(self.net, nn.Module):
            self.net._apply(fn)
        return super()._apply(fn, recurse)


class Own(Opinion):
    """A reward of the user's."""

    def forward(self, x: Tensor, cond: Any = None) -> Tensor:
        return self.net(full(x), cond)


class Ink(nn.Module):
    """Mean of (x + 1) / 2 over a sample, in [0, 1] for pictures; with `above` the share of values above that level."""

    def __init__(self, above: float | None = None) -> None:
        super().__init__()
        self.above = above

    def forward(self, x: Tensor, cond: Any = None) -> Tensor:
        """x (b, *d) -> (b,)."""
        x = full(x)
        inked = (x + 1) / 2 if self.above is None else (x > self.above).to(x.dtype)
        return inked.flatten(1).mean(1)


class Confidence(Opinion):
    """log p(label | x) by a house classifier."""

    def forward(self, x: Tensor, cond: Any) -> Tensor:
        """x (b, 1, size, size), labels (b,) or a mapping with them -> (b,)."""
        label = cond if isinstance(cond, Tensor) else cond["label"]
        logits = self.net.head(self.net.trunk(straight(full(x))))
        return logits.log_softmax(1).gather(1, label[:, None])[:, 0]


class Likeness(Opinion):
    """Cosine of a picture's and a text's embedding by CLIP.

    Args:
        net: an open-clip model.
        side: of the pictures that it takes.
        texts: (1 or classes, d) unit embeddings, or differences of such, one for all samples or one for each class.
    """

    texts: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, side: int, texts: Tensor) -> None:
        super().__init__(net)
        self.side = side
        for name, value in (("texts", texts), ("mean", _column(CLIP_MEAN)), ("std", _column(CLIP_STD))):
            self.register_buffer(name, value, persistent=False)

    def forward(self, x: Tensor, cond: Any = None) -> Tensor:
        """x (b, 1 or 3, h, w) -> (b,)."""
        pixels = (straight(full(x)) + 1) / 2
        # What CLIP's own preprocessing does on uint8, here with a gradient.
        size = (self.side, self.side)
        pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False)
        seen = self.net.encode_image((pixels.expand(-1, 3, -1, -1) - self.mean) / self.std)
        texts = self.texts
        if len(texts) > 1:
            texts = texts[cond if isinstance(cond, Tensor) else cond["label"]]
        return (F.normalize(full(seen), dim=1) * texts).sum(1)


def away(text: Tensor, negative: Tensor, k: float) -> Tensor:
    """(1 + k) text - negative of unit embeddings (1 or classes, d), as DMDR's code weighs SRPO's reward."""
    return (1 + k) * text - negative


def _column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).reshape(1, -1, 1, 1)


@part("network", "ink")
class InkSpec:
    """The reward role of pictures with more ink: the mean of (x + 1) / 2, of vectors too."""

    above: Bounded | None = None
    """Share of values above this level in place of their mean; it has no gradient."""

    @property
    def differentiable(self) -> bool:
        return self.above is None

    def build(self, site: Site) -> nn.Module:
        return Ink(self.above)


@part("network", "house-classifier")
class HouseClassifierSpec:
    """The reward role of pictures that a shipped classifier takes for their class: log p(label | x)."""

    of: Literal["digits", "fashion-mnist"] = "digits"
    """Which classifier; digits takes 8 x 8 pictures, fashion-mnist 28 x 28."""

    def build(self, site: Site) -> nn.Module:
        kind = HOUSE[self.of]
        if tuple(site.shape) != (1, kind.size, kind.size) or site.classes != kind.classes:
            raise RecipeError(
                f"house-classifier.of {self.of}: is for grey pictures of {kind.size} x {kind.size} in {kind.classes} "
                f"classes; the data has shape {list(site.shape)} and {site.classes} classes"
            )
        check_labels(site, f"house-classifier.of {self.of}")
        return Confidence(kind.load())


@part("network", "clip")
class ClipSpec:
    """The reward role of pictures that CLIP finds like a text, from a local file by open-clip."""

    architecture: str
    """open-clip's name, such as ViT-B-32; OpenAI's own weights want -quickgelu behind it."""
    path: str
    """File of the weights. Nothing is downloaded."""
    prompts: tuple[str, ...]
    """One text for all samples, or one for each class."""
    negative: tuple[str, ...] = ()
    """One text, or one for each class, that samples shall be unlike: the reward is the picture's product with
    (1 + k) prompt - negative (SRPO, arXiv 2509.06942, in DMDR's code), in which what both texts share counts k times."""
    k: NotNegative = 0.1
    """What of the prompt counts beyond its difference from `negative`; 0 is the difference alone."""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("prompts is empty; give one text, or one for each class")
        if self.k != 0.1 and not self.negative:
            raise ValueError(f"k {self.k:g}: is beside a negative text, and there is none; give negative, or leave k out")

    def files(self) -> list[Path]:
        return [expanded(self.path)]

    def check(self, site: Site) -> None:
        """RecipeError for samples that it cannot judge, Absent for a file that is not there."""
        if len(site.shape) != 3 or site.shape[0] not in (1, 3):
            raise RecipeError(f"network clip is for grey or RGB pictures; the data has shape {list(site.shape)}")
        for key, texts in (("prompts", self.prompts), ("negative", self.negative)):
            if len(texts) > 1 and len(texts) != site.classes:
                raise RecipeError(f"clip.{key}: {len(texts)} texts for {site.classes} classes; give one, or one each")
        if not self.files()[0].is_file():
            raise Absent(f"clip.path {self.path}: no such file; CLIP weights are never downloaded for a reward")

    def build(self, site: Site) -> nn.Module:
        self.check(site)
        try:
            net: Any = load_clip(self.architecture, self.files()[0])[0]
            recipe = ClipRecipe(self.architecture)
            tokens = [tokenise(recipe, texts) for texts in (self.prompts, self.negative) if texts]
        except (InputError, FileNotFoundError, ModuleNotFoundError) as error:
            raise UserError(f"clip: {error}") from None
        side: Any = net.visual.image_size
        with torch.no_grad():
            texts = [F.normalize(net.encode_text(part).float(), dim=1) for part in tokens]
        told = texts[0] if len(texts) == 1 else away(texts[0], texts[1], self.k)
        return Likeness(net, side[0] if isinstance(side, tuple) else side, told)


@part("network", "module")
class ModuleSpec:
    """The reward role by a class or function of yours; its code is run."""

    factory: str
    """module:Class or file.py:Class, called without arguments; returns what is called with (x, cond) and gives (b,)."""

    def build(self, site: Site) -> nn.Module:
        from fewstep.networks.diffusers import import_name

        if not code.is_allowed(self.factory):  # whoever builds roles has asked before; this is the last door
            raise Absent(f"module.factory {self.factory!r}: is code that nobody has allowed to run")
        made = import_name(self.factory, "module.factory")()
        if not callable(made):
            raise UserError(f"module.factory {self.factory!r}: returned a {type(made).__name__}, which cannot be called")
        return Own(made)


def check_reward(reward: Callable[[Tensor, Any], Tensor], x: Tensor, cond: Any, *, gradient: bool) -> None:
    """Try a reward on samples x (b, *d) before anything is trained.

    Args:
        gradient: whether a method needs its gradient with respect to x.

    Raises UserError, naming the role, for an answer of another shape than (b,), one that is not finite, and for one
    without a gradient where that is needed.
    """
    x = x.detach().requires_grad_(gradient)
    try:
        with torch.enable_grad():
            value: Any = reward(x, cond)
    except (UserError, RecipeError):
        raise
    except Exception as error:  # of the user's own code, or of samples that it is not for
        line = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"roles.reward: cannot judge samples of {list(x.shape)}: {type(error).__name__}: {line}"
        ) from None
    if not isinstance(value, Tensor) or value.shape != (len(x),):
        told = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise UserError(
            f"roles.reward: gave {told} for {len(x)} samples; it must give one number for each, shape [{len(x)}], and "
            "leave the mean to the method"
        )
    if not torch.isfinite(value).all():
        raise UserError("roles.reward: is not finite on samples of noise; keep its logarithms and divisions away from 0")
    if not gradient:
        return
    with torch.enable_grad():
        slope = torch.autograd.grad(value.sum(), x, allow_unused=True)[0] if value.requires_grad else None
    if slope is None or not torch.isfinite(slope).all() or not slope.any():
        what = "is not finite" if slope is not None and not torch.isfinite(slope).all() else "is nothing"
        raise UserError(
            f"roles.reward: its gradient with respect to the samples {what}, and this method follows it; mend the "
            f"reward (no rounding, thresholds, detach or no_grad in it), or use another method: {OWN_GRADIENT}"
        )
