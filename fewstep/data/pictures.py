"""Pictures that are read when they are asked for: folders with captions, and tar shards as WebDataset writes them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor

from fewstep.algebra.draws import Draws
from fewstep.config import Absent, UserError, part
from fewstep.data.base import Conditions, EncoderPart, Share
from fewstep.data.conditions import TextConditions
from fewstep.data.reader import Crop, Item, Pictures, Resize, View, file_reader, refusals
from fewstep.data.tars import expand, index
from fewstep.data.text import Text, embed, read_prompts
from fewstep.eval.protocol.real import RealPictures
from fewstep.files import expanded, lines_of, parse_json, regular, text_of
from fewstep.pictures import SUFFIXES, list_pictures


def _texts(items: Sequence[Item], spec: Any) -> Text | None:
    if spec.encoder is None:
        return None
    return embed(
        spec.encoder,
        [i.caption or "" for i in items],
        negative=spec.negative,
        zeros=spec.zeros,
        cache=spec.text_cache,
    )


@part("data", "captions")
class Captions:
    """Pictures in a folder with a caption each: `captions.jsonl` or a .txt file beside every picture."""

    path: str
    """The folder."""
    size: PositiveInt
    """Side in pixels, to which the largest square of a picture is resized."""
    encoder: EncoderPart | None = None
    """Text encoder; without one captions are read and not used."""
    captions: str | None = None
    """A file of lines {"file": ..., "text": ...} inside the folder; captions.jsonl, else .txt files, when left out."""
    negative: str = ""
    """Prompt that guidance moves away from."""
    zeros: bool | None = None
    """Guidance moves away from zeros in its place; left out: as the encoder's folder says (SDXL's do)."""
    text_cache: str | None = None
    """Folder of the embeddings; the user's cache folder when left out."""
    grey: bool = False
    """True: one channel, otherwise RGB."""
    resize: Resize = "lanczos"
    """Filter; none: `size` pixels are cut as they are."""
    crop: Crop = "centre"
    """Which square: the middle, or one drawn anew each time."""
    flip: bool = False
    """True: half of the pictures, drawn anew each time, are mirrored left to right; captions stay as they are."""
    held_out: Share = 0.0
    """Share of the pictures, spread evenly, that is never trained on: evaluation against `data` takes these."""

    @property
    def conditions(self) -> Conditions:
        return "none" if self.encoder is None else "text"

    def files(self) -> list[Path]:
        """Pictures and captions, those that are read."""
        root, told, names, _ = self._listed()
        words = [root / Path(n).with_suffix(".txt") for n, _ in names] if told is None else [told]
        return [*(root / n for n, _ in names), *words]

    def outline(self) -> tuple[tuple[int, ...], int]:
        """As `open` has them; no caption is embedded and no picture decoded."""
        self._listed()
        return (1 if self.grey else 3, self.size, self.size), 0

    def open(self) -> Pictures:
        root, told, names, skipped = self._listed()
        if told is not None:
            skipped |= _unlisted(root, told, [name for name, _ in names])
        items = [Item(file_reader(root / name), str(root / name), text) for name, text in names]
        return _opened(self, items, f"data {root}", skipped=skipped)

    def _listed(self) -> tuple[Path, Path | None, list[tuple[str, str]], dict[str, str]]:
        """(folder, file of captions or None, pictures by name in it with their captions, what is left out and why)."""
        root, skipped = expanded(self.path), dict[str, str]()
        if not root.is_dir():
            raise Absent(f"data folder {root}: no such folder")
        told = root / (self.captions or "captions.jsonl")
        if not os.path.isfile(told):
            if os.path.lexists(told):
                is_a = "a folder" if told.is_dir() else "a link to nothing" if told.is_symlink() else "a pipe or a device"
                raise UserError(f"{told}: is {is_a}, expected a file of captions; put it there, or remove this")
            if self.captions is not None:
                raise UserError(f"{told}: no such caption file")
            return root, None, _beside(root, skipped), skipped
        lines = _caption_file(told)
        missing = [(n, name) for n, name, _ in lines if not os.path.isfile(root / name)]
        if missing:
            raise UserError(
                f"{told}:{missing[0][0]}: names the picture {_short(missing[0][1])}, which is not in {root} "
                f"({len(missing)} of {len(lines)} are missing); add the pictures or delete their lines"
            )
        return root, told, [(name, text) for _, name, text in lines], skipped


def _unlisted(root: Path, told: Path, names: Sequence[str]) -> dict[str, str]:
    """The pictures of a folder that its caption file leaves out, and what else is not read there."""
    listing = list_pictures(root, strict=False)  # what no line names is told, and no reason to stop
    known = {Path(name) for name in names}
    left = [file for file in listing.files if file.relative_to(root) not in known]
    if left:  # a picture may be named by another path, through a link
        real = {os.path.realpath(root / name) for name in known}
        left = [file for file in left if os.path.realpath(file) not in real]
    skipped = {name: why for name, why in listing.skipped.items() if root / name != told}
    return skipped | {str(file.relative_to(root)): f"not in {told.name}" for file in left}


def _short(name: str) -> str:
    """A name from a file, as it can be printed: a lone surrogate cannot."""
    name = name if len(name) <= 60 else f"{name[:57]}..."
    return name if name.isprintable() else ascii(name)


def _opened(spec: Any, items: Sequence[Item], origin: str, classes: int = 0, **more: Any) -> Pictures:
    view = View(spec.size, spec.grey, spec.resize, spec.crop, spec.flip)
    text = _texts(items, spec)
    return Pictures(items, view, classes=classes, text=text, held_out=spec.held_out, origin=origin, **more)


def _read_text(path: Path) -> str:
    """A text file. UserError naming file and line where it is no UTF-8."""
    try:
        return text_of(path.read_bytes(), path)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from None


def _caption_file(path: Path) -> list[tuple[int, str, str]]:
    """(line number, file, text) of a caption file."""
    out = []
    for n, line in enumerate(lines_of(_read_text(path)), 1):
        if not line.strip():
            continue
        try:
            entry = parse_json(line, path)
            name, text = entry["file"], entry["text"]
        except (UserError, KeyError, TypeError):
            raise UserError(f'{path}:{n}: expected {{"file": "NAME", "text": "CAPTION"}}, got {line[:60]!r}') from None
        for key, value in (("file", name), ("text", text)):
            if not isinstance(value, str):
                raise UserError(f'{path}:{n}: "{key}" is {json.dumps(value)[:60]}, expected a text; write one, or ""')
        if Path(name).is_absolute() or ".." in Path(name).parts or not name:
            raise UserError(f"{path}:{n}: the picture {name!r} is not inside {path.parent}; move it there")
        out.append((n, name, text))
    if not out:
        raise UserError(f"{path}: holds no caption")
    return out


def _beside(root: Path, skipped: dict[str, str]) -> list[tuple[str, str]]:
    """(file, text) of pictures with a .txt file each; what is left out goes to `skipped`."""
    with refusals():
        listing = list_pictures(root)
    skipped |= listing.skipped
    pictures = listing.files
    if not pictures:
        raise UserError(f"data folder {root}: no pictures ({', '.join(SUFFIXES)}) in it")
    bare = [p for p in pictures if not p.with_suffix(".txt").is_file()]
    if bare:
        raise UserError(
            f"{bare[0]}: has no caption ({len(bare)} of {len(pictures)} have none); write {bare[0].stem}.txt beside "
            "it, or captions.jsonl"
        )
    return [(str(p.relative_to(root)), _read_text(p.with_suffix(".txt")).strip(" \t\r\n")) for p in pictures]


@part("data", "webdataset")
class WebDataset:
    """Tar shards in which files of one stem are a sample: a picture, and .txt, .json ("caption") or .cls beside it."""

    shards: str
    """Path with wildcards or a range, such as data/train-{0000..0012}.tar."""
    size: PositiveInt
    """Side in pixels, to which the largest square of a picture is resized."""
    encoder: EncoderPart | None = None
    """Text encoder for the captions; without one classes are the condition, if there are any."""
    classes: int = 0
    """Number of classes, where the samples have .cls files."""
    negative: str = ""
    """Prompt that guidance moves away from."""
    zeros: bool | None = None
    """Guidance moves away from zeros in its place; left out: as the encoder's folder says (SDXL's do)."""
    text_cache: str | None = None
    """Folder of the embeddings; the user's cache folder when left out."""
    grey: bool = False
    """True: one channel, otherwise RGB."""
    resize: Resize = "lanczos"
    """Filter; none: `size` pixels are cut as they are."""
    crop: Crop = "centre"
    """Which square: the middle, or one drawn anew each time."""
    flip: bool = False
    """True: half of the pictures, drawn anew each time, are mirrored left to right; captions stay as they are."""
    held_out: Share = 0.0
    """Share of the pictures, spread evenly, that is never trained on: evaluation against `data` takes these."""

    @property
    def conditions(self) -> Conditions:
        if self.encoder is not None:
            return "text"
        return "classes" if self.classes else "none"

    def files(self) -> list[Path]:
        """The tar files."""
        return expand(self.shards)

    def outline(self) -> tuple[tuple[int, ...], int]:
        """As `open` has them; no file is read."""
        self.files()
        return (1 if self.grey else 3, self.size, self.size), 0 if self.encoder else self.classes

    def open(self) -> Pictures:
        items = [item for path in expand(self.shards) for item in index(path)]
        if self.encoder is not None:
            bare = next((i for i in items if i.caption is None), None)
            if bare:
                raise UserError(f"{bare.name}: has no caption (.txt or .json beside it)")
        if self.classes:
            wrong = next((i for i in items if i.label is None or not 0 <= i.label < self.classes), None)
            if wrong:
                raise UserError(f"{wrong.name}: its class is {wrong.label}, not one of 0..{self.classes - 1} (.cls)")
        return _opened(self, items, f"data {self.shards}", self.classes)


@part("data", "prompts")
class Prompts:
    """Prompts alone, for methods that need no data."""

    path: str
    """A text file, one prompt a line."""
    shape: tuple[PositiveInt, PositiveInt, PositiveInt] | tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]
    """Of one sample, channels, height, width; latents for a latent teacher. Of a video frames after the channels."""
    encoder: EncoderPart
    """Text encoder."""
    vae: str | None = None
    """Folder of the VAE, or of a pipeline with one, that turns samples into pictures where they are latents."""
    negative: str = ""
    """Prompt that guidance moves away from."""
    zeros: bool | None = None
    """Guidance moves away from zeros in its place; left out: as the encoder's folder says (SDXL's do)."""
    text_cache: str | None = None
    """Folder of the embeddings; the user's cache folder when left out."""
    conditions: ClassVar[Conditions] = "text"

    def files(self) -> list[Path]:
        """The file of prompts."""
        return [expanded(self.path)]

    def outline(self) -> tuple[tuple[int, ...], int]:
        """As `open` has them, where the file is there."""
        (path,) = self.files()
        if not path.exists():
            raise Absent(f"prompts {path}: no such file")
        return self.shape, 0

    def open(self) -> PromptData:
        prompts = read_prompts(regular(expanded(self.path)))
        text = embed(self.encoder, prompts, negative=self.negative, zeros=self.zeros, cache=self.text_cache)
        return PromptData(self.path, self.shape, text)


class PromptData(TextConditions):
    """Conditions without samples."""

    classes = 0
    text: Text

    def __init__(self, path: str, shape: tuple[int, ...], text: Text) -> None:
        self.path, self.shape, self.text = path, shape, text

    def batch(self, draws: Draws) -> tuple[Tensor, Any]:
        raise UserError(
            f"data {self.path}: holds prompts and no pictures, but this method trains on pictures; choose captions, "
            "webdataset or latents, or a method without data (DMD2 with gan: null)"
        )

    def condition(self, k: Tensor) -> Any:
        return self.text.take(k)

    def all(self) -> tuple[Tensor, Tensor | None]:
        return self.batch(Draws(0, torch.arange(1)))

    def reference(self) -> RealPictures:
        raise UserError(
            f"data {self.path}: holds prompts and no pictures to compare with; give a folder of real pictures, "
            "evaluate.against=FOLDER"
        )
