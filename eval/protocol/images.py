"""Image folders read strictly: what does not fit is an error, or, if asked for, a counted and reported
exclusion.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.eval.errors import InputError
from fewstep.pictures import SUFFIXES, PictureError, list_pictures, load, pixels

EXTENSIONS = (*SUFFIXES, ".npy")
_KINDS = {1: "grey", 3: "colour"}


@dataclass
class ImageFolder:
    """The images of a folder and its sub-folders, in the order of their names; hidden ones are no images of it.

    Args:
        path: the folder.
        channels: 3 takes 8-bit RGB files only, 1 takes 8-bit grey files only; nothing is converted.
        number: how many images are wanted, the first in order; None means all.
        allow_skips: leave out what does not fit instead of stopping; `skipped` then says what and why.
        any_size: images may have different sizes; `batches` cannot be used then.
        grey_to_colour: with 3 channels take 8-bit grey files too, their value in all channels.

    Iterating reads; `skipped` is complete once `images` has been exhausted, and so is `kept`, the places in that
    order of the images given.
    """

    path: Path
    channels: int = 3
    number: int | None = None
    allow_skips: bool = False
    any_size: bool = False
    grey_to_colour: bool = False
    skipped: dict[str, str] = field(default_factory=dict)
    kept: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.path = Path(self.path)
        if self.channels not in _KINDS:
            raise InputError(f"channels: expected 1 or 3, got {self.channels}")
        try:
            self.files = list_pictures(self.path, EXTENSIONS).files
        except PictureError as error:
            raise (InputError if self.path.is_dir() else FileNotFoundError)(str(error)) from None
        if not self.files:
            raise InputError(f"{self.path}: no images ({', '.join(sorted(EXTENSIONS))}) in it")
        if self.number is not None and len(self.files) < self.number:
            raise InputError(f"{self.path}: {len(self.files)} images, but {self.number} are asked for")

    def images(self) -> Iterator[Tensor]:
        """uint8 (C, H, W) images, all of one size unless `any_size`.

        Raises:
            ValueError: an unreadable file, another size than the first image's, another mode or depth, or too
                few good images.
        """
        self.skipped.clear()
        shape: tuple[int, ...] | None = None
        given = 0
        self.kept.clear()
        for index, file in enumerate(self.files):
            if given == self.number:
                break
            try:
                image = self._read(file)
                if shape is not None and image.shape != shape and not self.any_size:
                    raise InputError(
                        f"{image.shape[1]}x{image.shape[2]} pixels, the first image has {shape[1]}x{shape[2]}"
                    )
            except InputError as error:
                if not self.allow_skips:
                    raise InputError(f"{file}: {error}") from None
                self.skipped[str(file.relative_to(self.path))] = str(error)
                continue
            shape = image.shape
            given += 1
            self.kept.append(index)
            yield torch.from_numpy(image)
        if self.number is not None and given < self.number:
            raise InputError(
                f"{self.path}: only {given} usable images, {self.number} asked for, {len(self.skipped)} skipped"
            )
        if not given:
            raise InputError(f"{self.path}: none of {len(self.files)} images is usable")

    def batches(self, size: int) -> Iterator[Tensor]:
        """uint8 (N, C, H, W) batches of at most `size` images."""
        batch: list[Tensor] = []
        for image in self.images():
            batch.append(image)
            if len(batch) == size:
                yield torch.stack(batch)
                batch = []
        if batch:
            yield torch.stack(batch)

    def _read(self, file: Path) -> np.ndarray:
        if file.suffix.lower() == ".npy":
            return self._read_array(file)
        try:
            picture, kind = load(file, file)
        except PictureError as error:
            raise InputError(error.reason) from None
        wanted = _KINDS[self.channels]
        if kind != wanted and not (self.grey_to_colour and kind == "grey"):
            raise InputError(f"is {kind}, expected 8-bit {wanted}")
        values = pixels(picture)
        return np.repeat(values, 3, axis=0) if len(values) < self.channels else values

    def _read_array(self, file: Path) -> np.ndarray:
        try:
            array = np.load(file, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise InputError(f"cannot be read ({error})") from None
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[0] != self.channels:
            raise InputError(f"is {array.dtype} of shape {array.shape}, expected uint8 ({self.channels}, H, W)")
        return array


def save_image(image: Tensor, path: str | Path) -> None:
    """Write uint8 (C, H, W) as PNG: JPEG would change the metric."""
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise InputError(f"path: expected a .png name, got {target.name!r}; lossy formats change every metric")
    if image.dtype != torch.uint8:
        raise InputError(f"image: expected uint8, got {image.dtype}; quantise first")
    pixels = image.permute(1, 2, 0).cpu().numpy()
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(target)


def to_pixels(x: Tensor) -> Tensor:
    """[-1, 1] -> uint8 by rounding, the way diffusers does."""
    return ((x.float() * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
