"""Pictures by number, decoded when they are asked for; cut, moved and mirrored by draws; kept as bytes while they fit."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.algebra.draws import Draws
from fewstep.config import UserError
from fewstep.data.conditions import TextConditions
from fewstep.data.text import Text
from fewstep.eval.protocol.real import RealPictures
from fewstep.pictures import Filter, PictureError, facts, flat, load, pixels, square, told

CACHE = 2**30
"""Bytes of decoded pictures that one data set keeps in memory; a larger set is decoded anew each time."""
CHECKED = 2**28
"""Bytes of decoded files up to which a set is decoded before training, so that a broken file is found then."""
HEAD = 2**17
"""Bytes of a file in which its header is looked for first."""
Resize = Literal["lanczos", "bicubic", "bilinear", "box", "none"]
Crop = Literal["centre", "random"]


@dataclass(frozen=True)
class Item:
    """One picture: how its bytes are read (all, or the first so many), its caption or class, its name for messages."""

    read: Callable[..., bytes]
    name: str
    caption: str | None = None
    label: int | None = None


@dataclass(frozen=True)
class View:
    """How a picture becomes a sample: `size` None leaves it as it is."""

    size: int | None
    grey: bool = False
    resize: Resize = "lanczos"
    crop: Crop = "centre"
    flip: bool = False

    def decode(self, data: bytes, name: str, at: float = 0.5) -> Tensor:
        """Bytes of a picture -> uint8 (c, h, w); `at` in [0, 1) is the place of the cut, .5 the middle.

        Raises:
            UserError: what cannot be read, or is smaller than a size to which nothing is resized.
        """
        channels = 1 if self.grey else 3
        with refusals():
            picture = flat(*load(data, name), channels, name)
            if self.size is not None:
                how: Filter | None = None if self.resize == "none" else self.resize
                try:
                    picture = square(picture, self.size, how, at)
                except ValueError as error:
                    raise PictureError(name, f"{error}; give resize: lanczos, or a smaller size") from None
            return torch.from_numpy(pixels(picture))


@contextmanager
def refusals() -> Iterator[None]:
    """What `fewstep.pictures` refuses is the user's to mend."""
    try:
        yield
    except PictureError as error:
        raise UserError(str(error)) from None


def split(count: int, share: float, what: str) -> tuple[Tensor, Tensor]:
    """Numbers that are trained on and that are held out, int64: every so many-th, spread evenly and the same each time.

    Raises:
        UserError: a share that leaves fewer than two samples out, or none to train on.
    """
    every = [floor((i + 1) * share) > floor(i * share) for i in range(count)]
    if share and not 2 <= sum(every) < count:
        raise UserError(f"{what}: held_out {share:g} of {count} samples leaves {sum(every)} out; at least 2 and not all")
    out = torch.tensor(every, dtype=torch.bool)
    return torch.nonzero(~out)[:, 0], torch.nonzero(out)[:, 0]


class Pictures(TextConditions):
    """Pictures by number, with captions as text conditions, or with classes, or with neither.

    Args:
        items: the pictures, in order.
        view: how one becomes a sample; with a size of None all must be of one size.
        classes: number of classes, the items' labels; 0 for none.
        text: embedded captions of all items.
        held_out: share that `batch` never gives, for evaluation.
        origin: what messages call the set.
        skipped: files that are not among the items, and why.
        labelled: what `about` says of how classes have their labels.
        renumbered: why a label is another number than the one that its class is named by.
        remedy: what a message says to do where sizes differ.
    """

    def __init__(
        self,
        items: Sequence[Item],
        view: View,
        *,
        classes: int = 0,
        text: Text | None = None,
        held_out: float = 0.0,
        origin: str = "data",
        skipped: Mapping[str, str] | None = None,
        labelled: str = "",
        renumbered: str = "",
        remedy: str = "give `size`",
    ) -> None:
        self.items, self.view, self.classes, self.text = items, view, classes, text
        self.origin, self.skipped = origin, dict(skipped or {})
        self.labelled, self.renumbered = labelled, renumbered
        with refusals():
            self.facts = [_facts(item) for item in items]
        if view.size is None:
            _refuse_sizes(items, self.facts, remedy)
        sides = self.facts[0][:2] if view.size is None else (view.size, view.size)
        self.shape: tuple[int, ...] = (1 if view.grey else 3, *sides)
        self.rows, self.held = split(len(items), held_out, origin)
        self._kept: Tensor | None = None
        if view.crop == "centre" and len(items) * torch.Size(self.shape).numel() <= CACHE:
            self._kept = torch.empty(len(items), *self.shape, dtype=torch.uint8)
        self._have = [False] * len(items)
        if sum(high * wide * 3 for high, wide, _ in self.facts) <= CHECKED:
            for i in range(len(items)):
                self._one(i)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def size(self) -> int:
        """Side of a sample, or its height."""
        return self.shape[1]

    @property
    def images(self) -> Tensor:
        """The whole set, float32 (n, c, h, w) in [-1, 1]: for small ones."""
        return self.pictures(torch.arange(len(self)))

    @property
    def labels(self) -> Tensor | None:
        """The classes of all pictures, int64 (n,)."""
        return torch.tensor([item.label for item in self.items]) if self.classes else None

    def about(self) -> str:
        """What was read, in a line: number, sizes, kinds, what was left out and why."""
        sides = sorted({f[:2] for f in self.facts})
        low, high = sides[0], sides[-1]
        size = (
            f"{low[0]} x {low[1]}"
            if low == high
            else f"{len(sides)} sizes from {low[0]} x {low[1]} to {high[0]} x {high[1]}"
        )
        kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(f[2] for f in self.facts).most_common())
        line = f"{self.origin}: {len(self)} pictures ({kinds}), {size}"
        if self.view.size is not None:
            line += f", {_way(self.view)}"
        if self.classes:
            line += f", {self.classes} classes" + (f" ({self.labelled})" if self.labelled else "")
        if len(self.held):
            line += f", {len(self.held)} held out"
        return line + (f"; left out: {told(self.skipped.values())}" if self.skipped else "")

    def pictures(self, k: Tensor) -> Tensor:
        """Pictures by number as they are evaluated, int64 (b,) -> float32 (b, c, h, w) in [-1, 1] on the CPU."""
        return scaled(self._pixels(k))

    def condition(self, k: Tensor) -> Any:
        """The conditions of pictures by number."""
        if self.text is not None:
            return self.text.take(k)
        if self.classes:
            labels = self.labels
            assert labels is not None
            return labels.to(k.device)[k]
        return None

    def batch(self, draws: Draws) -> tuple[Tensor, Any]:
        k = draws.integers(len(self.rows))
        if len(self.held):
            k = self.rows.to(k.device)[k]
        at = draws.uniform() if self.view.crop == "random" else None
        mirrored = draws.uniform() < 0.5 if self.view.flip else None
        x = scaled(self._pixels(k, at)).to(draws.device)
        if mirrored is not None:
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        return x, self.condition(k)

    def all(self) -> tuple[Tensor, Tensor | None]:
        return self.images, self.labels if self.text is None else None

    def reference(self) -> RealPictures:
        """What samples are compared with: the pictures that are held out, or all of them."""
        chosen = self.held if len(self.held) else self.rows
        labels = self.labels if self.text is None else None

        def digest(rows: Sequence[int]) -> str:
            whole = hashlib.sha256(repr((self.view.size, self.view.grey, self.view.resize)).encode())
            for i in chosen[torch.tensor(rows)].tolist():
                whole.update(hashlib.sha256(self.items[i].read()).digest())
            return whole.hexdigest()

        return RealPictures(
            name="data",
            about=f"the run's data, {'held out of training' if len(self.held) else 'which it was trained on'}",
            count=len(chosen),
            read=lambda rows: self._pixels(chosen[torch.tensor(rows)]),
            digest=digest,
            labels=None if labels is None else labels[chosen],
        )

    def _pixels(self, k: Tensor, at: Tensor | None = None) -> Tensor:
        if type(k) is not Tensor:  # a fake tensor (`plan`) has no numbers
            return k.new_empty((len(k), *self.shape), dtype=torch.uint8)
        places = [0.5] * len(k) if at is None else at.tolist()
        return torch.stack([self._one(i, place) for i, place in zip(k.tolist(), places, strict=True)])

    def _one(self, i: int, at: float = 0.5) -> Tensor:
        if self._kept is not None and self._have[i]:
            return self._kept[i]
        item = self.items[i]
        x = self.view.decode(item.read(), item.name, at)
        if x.shape != self.shape:
            raise UserError(f"{item.name}: is {x.shape[1]} x {x.shape[2]} when it is turned by its EXIF tag; turn it")
        if self._kept is not None:
            self._kept[i], self._have[i] = x, True
        return x


def file_reader(path: Path) -> Callable[..., bytes]:
    """What reads a file, or its first so many bytes."""

    def read(limit: int = -1) -> bytes:
        with path.open("rb") as f:
            return f.read(limit)

    return read


def _facts(item: Item) -> tuple[int, int, str]:
    try:
        return facts(item.read(HEAD), item.name)
    except PictureError:
        return facts(item.read(), item.name)


def scaled(x: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return x.float() / 127.5 - 1


def _way(view: View) -> str:
    cut = "the middle" if view.crop == "centre" else "a square drawn at random"
    size = f"{view.size} x {view.size}"
    way = f"{cut} of {size}" if view.resize == "none" else f"{cut} resized to {size} ({view.resize})"
    return way + (", half of them mirrored" if view.flip else "")


def _refuse_sizes(items: Sequence[Item], sizes: Sequence[tuple[int, int, str]], remedy: str) -> None:
    first = sizes[0][:2]
    for item, (high, wide, _) in zip(items, sizes, strict=True):
        if (high, wide) != first:
            number = sum((h, w) != first for h, w, _ in sizes)
            raise UserError(
                f"{item.name}: is {high} x {wide}, but {Path(items[0].name).name} is {first[0]} x {first[1]} "
                f"({number} of {len(items)} differ); {remedy}"
            )
