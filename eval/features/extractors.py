"""Feature networks by the names that presets use."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from fewstep.eval.errors import InputError
from fewstep.eval.features.base import FeatureExtractor, Vectors, random_conv
from fewstep.eval.features.house import house_digits, house_fashion
from fewstep.eval.features.networks import dinov2, effnet_lite0, inception

_FACTORIES: dict[str, Callable[..., FeatureExtractor]] = {
    "house-digits": house_digits,
    "house-fashion-mnist": house_fashion,
    "inception-2015": inception,
    "vectors": lambda path=None: Vectors(),
}


def build_extractor(name: str, path: str | os.PathLike[str] | None = None) -> FeatureExtractor:
    """The extractor of that name, as presets and the command line write it.

    ``house-digits``, ``house-fashion-mnist``, ``inception-2015``, ``effnet-lite0-SIZE``,
    ``random-conv-SEED``, ``vectors``, and with a `path` ``dinov2`` and ``clip:ARCHITECTURE``.

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
            raise InputError(f"extractor {name}: needs the path of its weights")
        if name == "dinov2":
            return dinov2(path)
        from .clip import clip_images

        return clip_images(name.removeprefix("clip:"), path)
    known = [*sorted(_FACTORIES), "effnet-lite0-SIZE", "random-conv-SEED", "dinov2", "clip:ARCHITECTURE"]
    raise InputError(f"extractor: unknown {name!r}, expected one of {known}")
