"""`fewstep cache-latents`: a recipe's pictures as latents, computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fewstep.config import RecipeError, UserError
from fewstep.data.base import renumbered
from fewstep.data.latents import Encoder, vae_hash
from fewstep.data.placed import encoding, placed
from fewstep.data.shards import Shards


def cache_latents(
    name: str,
    settings: Sequence[str],
    vae: str,
    out: Path,
    *,
    batch: int = 8,
    rows: int = 256,
    device: str | None = None,
) -> Shards:
    """`fewstep cache-latents`: encode the pictures of a recipe's data; goes on where it was stopped.

    The data must give pictures by number (captions, webdataset, images, digits). Their captions or classes are kept
    with the latents. A cache of other pictures, be it one under the same name, is refused.
    """
    from fewstep.recipe.store import load

    recipe = load(name, settings)
    data: Any = recipe.data
    if getattr(data, "encoder", None) is not None:
        from dataclasses import replace

        data = replace(data, encoder=None)  # captions are kept as text
    opened: Any = data.open()
    count, pictures = _pictures(opened, name)
    captions = [i.caption for i in opened.items] if hasattr(opened, "items") else None
    if captions is not None and any(c is None for c in captions):
        captions = None
    facts = {
        "vae": vae_hash(vae),
        "classes": opened.classes,
        "pictures": repr(recipe.data),
        "sha256 of the pictures": pictures_hash(opened),
        "captions": captions,
    }
    shards = Shards(out, facts, count, rows, remedy="choose another --out, or delete this folder")
    shards.note({"renumbered": renumbered(opened)})
    with shards.claimed() as todo:
        if todo:
            with encoding(device):
                _encode(shards, todo, pictures, vae, opened.shape[0], batch)
    return shards


def _encode(shards: Shards, todo: Sequence[range], pictures: Any, vae: str, colours: int, batch: int) -> None:
    """The rows `todo` of a cache, `batch` pictures at once."""
    encoder = Encoder(vae, placed())
    channels = int(getattr(encoder.vae.config, "in_channels", colours))
    if channels != colours:
        raise RecipeError(
            f"cache-latents: the VAE takes {channels} channels, the data has {colours}; set data.grey to "
            f"{str(channels == 1).lower()}"
        )
    for span in todo:
        parts = []
        for a in range(span.start, span.stop, batch):
            k = torch.arange(a, min(a + batch, span.stop))
            x, label = pictures(k)
            mean, deviation = encoder(x)
            parts.append({"mean": mean, "std": deviation} | ({} if label is None else {"label": label}))
        shards.write(span, {key: torch.cat([p[key] for p in parts]) for key in parts[0]})


def pictures_hash(data: Any) -> str:
    """sha256 over the pictures of a data set in their order, as their files hold them, and their classes."""
    digest = hashlib.sha256()
    if hasattr(data, "items"):
        for item in data.items:
            digest.update(hashlib.sha256(item.read()).digest())
            digest.update(f"{item.label}\n".encode())
    else:
        digest.update(data.images.contiguous().numpy().tobytes())
        digest.update(repr(None if data.labels is None else data.labels.tolist()).encode())
    return digest.hexdigest()


def _pictures(data: Any, name: str) -> tuple[int, Any]:
    """(count, number -> (pictures, labels or None))."""
    if hasattr(data, "pictures"):
        return len(data), lambda k: (data.pictures(k), data.condition(k) if data.classes else None)
    if hasattr(data, "images"):
        labels = data.labels
        return len(data.images), lambda k: (data.images[k], None if labels is None else labels[k])
    raise UserError(f"{name}: its data holds no pictures to encode")
