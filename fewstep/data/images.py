"""Image data sets: scikit-learn's digits, Fashion-MNIST and folders of pictures."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from fewstep.algebra.draws import Draws
from fewstep.config import Absent, UserError, part
from fewstep.data.base import Conditions, Share
from fewstep.data.conditions import ClassConditions
from fewstep.data.reader import Crop, Item, Pictures, Resize, View, file_reader, refusals, split
from fewstep.eval.protocol.images import to_pixels
from fewstep.eval.protocol.real import RealPictures, tensor_digest
from fewstep.files import expanded
from fewstep.pictures import SUFFIXES, Listing, class_names, facts, label_order, list_pictures, renumbered, told


class InMemory(ClassConditions):
    """A set of images held as one tensor, float32 (n, c, h, w) in [-1, 1], with optional labels int64 (n,).

    A share `held_out` of it is never in a batch.
    """

    def __init__(self, images: Tensor, labels: Tensor | None, classes: int, held_out: float = 0.0) -> None:
        self.images, self.labels, self.classes = images, labels, classes
        self.shape: tuple[int, ...] = tuple(images.shape[1:])
        self.rows, self.held = split(len(images), held_out, "data")

    def batch(self, draws: Draws) -> tuple[Tensor, Any]:
        k = draws.integers(len(self.rows)).to(self.images.device)
        if len(self.held):
            k = self.rows.to(k.device)[k]
        cond = None if self.labels is None else self.labels[k].to(draws.device)
        return self.images[k].to(draws.device), cond

    def pictures(self, k: Tensor) -> Tensor:
        """Images by number, int64 (b,) -> float32 (b, c, h, w)."""
        return self.images[k]

    def condition(self, k: Tensor) -> Any:
        """The classes of images by number; None without."""
        return None if self.labels is None else self.labels[k]

    def all(self) -> tuple[Tensor, Tensor | None]:
        return self.images, self.labels

    def reference(self) -> RealPictures:
        """What samples are compared with: the images that are held out, or all of them."""
        chosen = self.held if len(self.held) else self.rows
        images = to_pixels(self.images[chosen])
        labels = None if self.labels is None else self.labels[chosen]
        return RealPictures(
            name="data",
            about=f"the run's data, {'held out of training' if len(self.held) else 'which it was trained on'}",
            count=len(chosen),
            read=lambda rows: images[torch.tensor(rows)],
            digest=lambda rows: tensor_digest(images[torch.tensor(rows)]),
            labels=labels,
        )


@part("data", "digits")
class Digits:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 grey, ten classes: always there, no download."""

    conditions: ClassVar[Conditions] = "classes"
    held_out: Share = 0.0
    """Share of them, spread evenly, that is never trained on: evaluation against `data` takes these."""

    def outline(self) -> tuple[tuple[int, ...], int]:
        """As `open` has them."""
        return (1, 8, 8), 10

    def open(self) -> InMemory:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        x = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 8 - 1  # 0..16 -> [-1, 1]
        return InMemory(x, torch.from_numpy(labels).long(), 10, self.held_out)


@part("data", "fashion-mnist")
class FashionMNIST:
    """Fashion-MNIST, 28 x 28 grey, ten classes, from its four idx files; nothing is downloaded."""

    path: str | None = None
    """Folder with the files, gzipped or not, or torchvision's root. Left out: $FEWSTEP_FASHION_MNIST, or where
    Debian's package dataset-fashion-mnist puts them."""
    split: Literal["train", "test"] = "train"
    """60,000 or 10,000 images."""
    conditions: ClassVar[Conditions] = "classes"
    held_out: Share = 0.0
    """Share of them, spread evenly, that is never trained on: evaluation against `data` takes these."""

    def files(self) -> list[Path]:
        """The idx files of the split, images and labels."""
        from fewstep.eval.protocol.datasets import fashion_files

        try:
            return fashion_files(self.split, self.path)
        except FileNotFoundError as error:
            raise Absent(f"data fashion-mnist: {error}") from None

    def outline(self) -> tuple[tuple[int, ...], int]:
        """As `open` has them, where the files are there."""
        self.files()
        return (1, 28, 28), 10

    def open(self) -> InMemory:
        from fewstep.eval.protocol.datasets import fashion_mnist

        try:
            images, labels = fashion_mnist(self.split, self.path)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"data fashion-mnist: {error}") from None
        return InMemory(images.float() / 127.5 - 1, labels, 10, self.held_out)


@part("data", "images")
class ImageFolder:
    """Pictures in a folder; sub-folders are the classes: by value where all are named by numbers, else by name.

    Links are followed, hidden files and folders are not read. A picture is turned as its EXIF tag says, laid on white
    where it is transparent and divided by 65,535 where it has 16 bits.
    """

    path: str
    """The folder."""
    grey: bool = False
    """True: one channel, otherwise RGB."""
    conditions: ClassVar[None] = None
    size: PositiveInt | None = None
    """Side in pixels, to which the largest square of a picture is resized; left out: pictures are of one size and stay
    as they are."""
    resize: Resize = "lanczos"
    """Filter; none: `size` pixels are cut as they are."""
    crop: Crop = "centre"
    """Which square: the middle, or one drawn anew each time; needs `size`."""
    flip: bool = False
    """True: half of the pictures, drawn anew each time, are mirrored left to right."""
    held_out: Share = 0.0
    """Share of the pictures, spread evenly, that is never trained on: evaluation against `data` takes these."""
    # Not in the repr, by which a cache of latents knows its pictures: caches of before stay what they were.
    renumber: bool = field(default=False, repr=False)
    """True: class folders 1, 2, ... or with a gap mean labels 0, 1, 2, ... by their order, for a teacher with classes
    too, which is refused otherwise."""

    def __post_init__(self) -> None:
        if self.size is None and (self.crop != "centre" or self.resize != "lanczos"):
            raise ValueError("crop and resize change nothing without size; give the side in pixels")

    def files(self) -> list[Path]:
        """The pictures."""
        with refusals():
            return list_pictures(expanded(self.path)).files

    def _listed(self) -> tuple[Path, Listing, list[str]]:
        """(folder, its pictures, the names of its classes)."""
        root = expanded(self.path)
        if not root.is_dir():
            raise Absent(f"data folder {root}: no such folder")
        with refusals():
            listing = list_pictures(root)
            names = class_names(listing)
        # A spec is frozen; what is said of the labels follows its outline, and the folder is not listed again for it.
        object.__setattr__(self, "_last", renumbered(names, listing.folders))
        if not listing.files:
            left = f"; left out: {told(listing.skipped.values())}" if listing.skipped else ""
            raise UserError(f"data folder {root}: no pictures ({', '.join(SUFFIXES)}) in it{left}")
        return root, listing, names

    def renumbered(self) -> str:
        """Which class folder has another label than its number; nothing where `renumber` says that it is meant.

        As the last outline found it, where there was one.
        """
        if self.renumber:
            return ""
        if "_last" not in self.__dict__:
            self._listed()
        return str(self.__dict__["_last"])

    def outline(self) -> tuple[tuple[int, ...], int]:
        """As `open` has them; without `size` the first picture tells."""
        _, listing, names = self._listed()
        if self.size is not None:
            return (1 if self.grey else 3, self.size, self.size), len(names)
        with refusals():
            high, wide, _ = facts(listing.files[0], listing.files[0])
        return (1 if self.grey else 3, high, wide), len(names)

    def open(self) -> Pictures:
        root, listing, names = self._listed()
        number = {name: i for i, name in enumerate(names)}
        items = [
            Item(file_reader(p), str(p), None, number[listing.parts(p)[0]] if names else None) for p in listing.files
        ]
        empty = set(listing.folders) - {listing.parts(p)[0] for p in listing.files} if names else set()
        return Pictures(
            items,
            View(self.size, self.grey, self.resize, self.crop, self.flip),
            classes=len(names),
            held_out=self.held_out,
            origin=f"data {root}",
            skipped=listing.skipped | dict.fromkeys(sorted(empty), "folder without pictures"),
            labelled=label_order(names, listing.folders),
            renumbered="" if self.renumber else renumbered(names, listing.folders),
            remedy="give data.size, the side in pixels to which the middle of every picture is resized",
        )
