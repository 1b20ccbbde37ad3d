"""Image data sets: scikit-learn's digits, Fashion-MNIST and folders of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep.algebra.draws import Draws
from fewstep.config import UserError, part
from fewstep.data.base import Conditions
from fewstep.data.conditions import ClassConditions


class InMemory(ClassConditions):
    """A set of images held as one tensor, float32 (n, c, h, w) in [-1, 1], with optional labels int64 (n,)."""

    def __init__(self, images: Tensor, labels: Tensor | None, classes: int) -> None:
        self.images, self.labels, self.classes = images, labels, classes
        self.shape: tuple[int, ...] = tuple(images.shape[1:])

    def batch(self, draws: Draws) -> tuple[Tensor, Any]:
        k = draws.integers(len(self.images)).to(self.images.device)
        cond = None if self.labels is None else self.labels[k].to(draws.device)
        return self.images[k].to(draws.device), cond

    def all(self) -> tuple[Tensor, Tensor | None]:
        return self.images, self.labels


@part("data", "digits")
class Digits:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 grey, ten classes: always there, no download."""

    conditions: ClassVar[Conditions] = "classes"

    def open(self) -> InMemory:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        x = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 8 - 1  # 0..16 -> [-1, 1]
        return InMemory(x, torch.from_numpy(labels).long(), 10)


@part("data", "fashion-mnist")
class FashionMNIST:
    """Fashion-MNIST, 28 x 28 grey, ten classes, from its four idx files; nothing is downloaded."""

    path: str | None = None
    """Folder with the files, gzipped or not, or torchvision's root. Left out: $FEWSTEP_FASHION_MNIST, or where
    Debian's package dataset-fashion-mnist puts them."""
    split: Literal["train", "test"] = "train"
    """60,000 or 10,000 images."""
    conditions: ClassVar[Conditions] = "classes"

    def files(self) -> list[Path]:
        """The idx files of the split, images and labels."""
        from fewstep.eval.protocol.datasets import fashion_files

        try:
            return fashion_files(self.split, self.path)
        except FileNotFoundError as error:
            raise UserError(f"data fashion-mnist: {error}") from None

    def open(self) -> InMemory:
        from fewstep.eval.protocol.datasets import fashion_mnist

        try:
            images, labels = fashion_mnist(self.split, self.path)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"data fashion-mnist: {error}") from None
        return InMemory(images.float() / 127.5 - 1, labels, 10)


_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@part("data", "images")
class ImageFolder:
    """Pictures of one size in a folder; sub-folders, sorted by name, are the classes."""

    path: str
    """The folder."""
    grey: bool = False
    """True: one channel, otherwise RGB."""
    conditions: ClassVar[None] = None

    def files(self) -> list[Path]:
        """The pictures."""
        return [p for p in Path(self.path).expanduser().rglob("*") if p.suffix.lower() in _SUFFIXES]

    def open(self) -> InMemory:
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise UserError(f"data folder {root}: no such folder")
        files = sorted(p for p in root.rglob("*") if p.suffix.lower() in _SUFFIXES)
        if not files:
            raise UserError(f"data folder {root}: no pictures ({', '.join(sorted(_SUFFIXES))}) in it")
        names = sorted({p.relative_to(root).parts[0] for p in files if len(p.relative_to(root).parts) > 1})
        labels = []
        for p in files if names else ():
            parts = p.relative_to(root).parts
            if len(parts) == 1:
                raise UserError(f"{p}: stands beside class folders ({', '.join(names[:3])}); give it a class")
            labels.append(names.index(parts[0]))
        return InMemory(self.read(files), torch.tensor(labels) if names else None, len(names))

    def read(self, files: list[Path]) -> Tensor:
        """Pictures of one size as float32 (n, c, h, w) in [-1, 1]."""
        from PIL import Image, UnidentifiedImageError

        images: list[Tensor] = []
        for p in files:
            try:
                with Image.open(p) as picture:
                    pixels = picture.convert("L" if self.grey else "RGB")
                    data = torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8)
            except (OSError, UnidentifiedImageError) as error:
                raise UserError(f"{p}: not a readable picture: {error}") from None
            images.append(data.reshape(pixels.height, pixels.width, -1).permute(2, 0, 1))
            if images[-1].shape != images[0].shape:
                size, first = tuple(images[-1].shape[1:]), tuple(images[0].shape[1:])
                raise UserError(f"{p}: is {size[0]} x {size[1]}, but {files[0].name} is {first[0]} x {first[1]}")
        return torch.stack(images).float() / 127.5 - 1
