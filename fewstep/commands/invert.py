"""Inversion of real images by a student that encodes (iCD): `fewstep invert RUN IMAGES --out codes.safetensors`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.algebra.sampling import Sampler, sample
from fewstep.commands.options import parse_classes
from fewstep.commands.pictures import save_side_by_side
from fewstep.commands.report import opened
from fewstep.config import UserError
from fewstep.data.images import ImageFolder
from fewstep.data.reader import View, scaled
from fewstep.methods.icd import ICD, invert
from fewstep.pictures import SUFFIXES
from fewstep.train.build import build_roles
from fewstep.train.product import Product
from fewstep.train.state import checkpoints, load_into, load_tensors


@dataclass(frozen=True)
class Inverted:
    """noise (n, *shape), standard normal where the encoder is exact; again: what it decodes to; error (n,) is the
    root mean square difference of `again` from the images, which are in [-1, 1]."""

    noise: Tensor
    again: Tensor
    error: Tensor


@torch.no_grad()
def round_trip(method: ICD, sampler: Sampler, student: Any, forward: Any, x: Tensor, cond: Any = None) -> Inverted:
    """Encode images x (b, *d) with `forward` and decode them with `student`.

    The noise is in units of the prior, as `fewstep.algebra.sampling.sample` takes it.
    """
    process = forward.process
    code = invert(method, forward, x, cond)
    top = process.grid(torch.ones(len(x), dtype=torch.float64, device=x.device))
    noise = code / process.prior(torch.ones_like(x), top)
    again = sample(sampler, student, noise, cond)
    return Inverted(noise, again, ((again - x) ** 2).flatten(1).mean(1).sqrt())


def read_images(path: Path, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None, int]:
    """(images (n, *shape) in [-1, 1], labels by sub-folder or None, their number) of a picture or a folder."""
    grey = shape[0] == 1
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path}: is not a picture ({', '.join(SUFFIXES)})")
        x, labels, classes = scaled(View(None, grey).decode(path.read_bytes(), str(path)))[None], None, 0
    else:
        folder = ImageFolder(path=str(path), grey=grey).open()
        x, labels, classes = folder.images, folder.labels, folder.classes
    if tuple(x.shape[1:]) != shape:
        raise UserError(f"{path}: pictures are {list(x.shape[1:])}, this run's are {list(shape)}; resize them first")
    return x, labels, classes


def labels_of(product: Product, given: str | None, found: Tensor | None, kinds: int, count: int) -> Tensor | None:
    """The class of each image: those given in order and repeated, or those of the sub-folders."""
    if not product.classes:
        if given is not None:
            parse_classes(given, 0)
        return None
    if given is not None:
        wanted = parse_classes(given, product.classes)
        return torch.tensor([wanted[i % len(wanted)] for i in range(count)])
    if found is None or kinds != product.classes:
        raise UserError(
            f"--classes: this run has {product.classes} classes; name those of the images, or put them into "
            f"{product.classes} sub-folders"
        )
    return found


def invert_run(run: Path, images: Path, out: Path, classes: str | None = None, batch: int = 256) -> Inverted:
    """`fewstep invert`: codes into `out` (safetensors), images and what they decode to beside it as a PNG."""
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: must end in .safetensors")
    sheet = out.with_suffix(".png")
    if sheet.exists() and (sheet.resolve() == images.resolve() or sheet.resolve().is_relative_to(images.resolve())):
        raise UserError(f"--out {out}: its pictures would be {sheet}, which is one of the images; give another name")
    product = opened(run)
    recipe = product.recipe
    method: Any = recipe.method if recipe else None
    if recipe is None or not isinstance(method, ICD):
        raise UserError(f"{run}: has no encoder; only runs of the method icd invert images")
    x, found, kinds = read_images(images, product.shape)
    labels = labels_of(product, classes, found, kinds, len(x))
    forward = build_roles(recipe, recipe.data.open())["forward"].eval()
    file = checkpoints(run / "checkpoints")[-1] / "forward.safetensors"
    load_into(forward, load_tensors(file), file)
    parts = [
        round_trip(
            method, product.sampler, product.net, forward, x[i : i + batch],
            None if labels is None else labels[i : i + batch],
        )
        for i in range(0, len(x), batch)
    ]  # fmt: skip
    done = Inverted(*(torch.cat([getattr(p, name) for p in parts]) for name in ("noise", "again", "error")))
    tensors = {"noise": done.noise.float()} | ({} if labels is None else {"labels": labels})
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, out)
    shown = [("images", x[:50]), ("decoded from their codes", done.again[:50].clamp(-1, 1).float())]
    save_side_by_side(shown, sheet)
    return done
