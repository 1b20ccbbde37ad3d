"""Pictures that are read when they are asked for: folders with captions, and tar shards as WebDataset writes them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor

from fewstep.algebra.draws import Draws
from fewstep.config import UserError, part
from fewstep.data.base import Conditions, EncoderPart
from fewstep.data.conditions import TextConditions
from fewstep.data.text import Text, embed, read_prompts

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Item:
    """One picture: how its bytes are read, its caption or class, and its name for messages."""

    read: Callable[[], bytes]
    name: str
    caption: str | None = None
    label: int | None = None


def decode(data: bytes, size: int, grey: bool, name: str) -> Tensor:
    """Bytes of a picture -> float32 (c, size, size) in [-1, 1]: shorter side to `size`, then the middle.

    Raises UserError naming the picture when it cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as opened:
            picture = opened.convert("L" if grey else "RGB")
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise UserError(f"{name}: not a readable picture: {error}") from None
    scale = size / min(picture.size)
    if scale != 1:
        resized = tuple(max(size, round(n * scale)) for n in picture.size)
        picture = picture.resize((resized[0], resized[1]), Image.Resampling.LANCZOS)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    picture = picture.crop((left, top, left + size, top + size))
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.reshape(size, size, -1).permute(2, 0, 1).float() / 127.5 - 1


class Pictures(TextConditions):
    """Pictures by number, with captions as text conditions, or with classes, or with neither."""

    def __init__(self, items: Sequence[Item], size: int, grey: bool, classes: int = 0, text: Text | None = None) -> None:
        self.items, self.size, self.grey, self.text = items, size, grey, text
        self.classes = classes
        self.shape: tuple[int, ...] = (1 if grey else 3, size, size)

    def __len__(self) -> int:
        return len(self.items)

    def pictures(self, k: Tensor) -> Tensor:
        """Pictures by number, int64 (b,) -> float32 (b, c, h, w) on the CPU."""
        chosen = [self.items[i] for i in k.tolist()]
        return torch.stack([decode(i.read(), self.size, self.grey, i.name) for i in chosen])

    def condition(self, k: Tensor) -> Any:
        """The conditions of pictures by number."""
        if self.text is not None:
            return self.text.take(k)
        if self.classes:
            return torch.tensor([self.items[i].label for i in k.tolist()], device=k.device)
        return None

    def batch(self, draws: Draws) -> tuple[Tensor, Any]:
        k = draws.integers(len(self.items))
        return self.pictures(k).to(draws.device), self.condition(k)

    def all(self) -> tuple[Tensor, Tensor | None]:
        k = torch.arange(len(self.items))
        labels = self.condition(k) if self.classes and self.text is None else None
        return self.pictures(k), labels


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
    """Side in pixels; pictures are resized to it and cut to a square."""
    encoder: EncoderPart | None = None
    """Text encoder; without one captions are read and not used."""
    captions: str | None = None
    """A file of lines {"file": ..., "text": ...} inside the folder; captions.jsonl, else .txt files, when left out."""
    negative: str = ""
    """Prompt that guidance moves away from."""
    zeros: bool = False
    """Guidance moves away from zeros in its place (SDXL)."""
    text_cache: str | None = None
    """Folder of the embeddings; the user's cache folder when left out."""
    grey: bool = False
    """True: one channel, otherwise RGB."""

    @property
    def conditions(self) -> Conditions:
        return "none" if self.encoder is None else "text"

    def files(self) -> list[Path]:
        """Pictures and captions."""
        root = Path(self.path).expanduser()
        told = root / (self.captions or "captions.jsonl")
        kinds = SUFFIXES if told.is_file() else (*SUFFIXES, ".txt")
        found = [p for p in root.rglob("*") if p.suffix.lower() in kinds and p.is_file()]
        return sorted({*found, *([told] if told.is_file() else [])})

    def open(self) -> Pictures:
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise UserError(f"data folder {root}: no such folder")
        told = root / (self.captions or "captions.jsonl")
        if self.captions is not None and not told.is_file():
            raise UserError(f"{told}: no such caption file")
        pairs = _caption_file(told) if told.is_file() else _beside(root)
        missing = [(n, name) for n, name, _ in pairs if not (root / name).is_file()]
        if missing:
            where = f"{told}:{missing[0][0]}" if told.is_file() else str(root)
            raise UserError(
                f"{where}: names the picture {missing[0][1]}, which is not in {root} ({len(missing)} of {len(pairs)} are "
                "missing); add the pictures or delete their lines"
            )
        items = [Item((root / name).read_bytes, str(root / name), text) for _, name, text in pairs]
        return Pictures(items, self.size, self.grey, text=_texts(items, self))


def _caption_file(path: Path) -> list[tuple[int, str, str]]:
    """(line number, file, text) of a caption file."""
    out = []
    for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            out.append((n, str(entry["file"]), str(entry["text"])))
        except (ValueError, KeyError, TypeError):
            raise UserError(f'{path}:{n}: expected {{"file": "NAME", "text": "CAPTION"}}, got {line[:60]!r}') from None
    if not out:
        raise UserError(f"{path}: holds no caption")
    return out


def _beside(root: Path) -> list[tuple[int, str, str]]:
    pictures = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not pictures:
        raise UserError(f"data folder {root}: no pictures ({', '.join(SUFFIXES)}) in it")
    bare = [p for p in pictures if not p.with_suffix(".txt").is_file()]
    if bare:
        raise UserError(
            f"{bare[0]}: has no caption ({len(bare)} of {len(pictures)} have none); write {bare[0].stem}.txt beside "
            "it, or captions.jsonl"
        )
    return [(0, str(p.relative_to(root)), p.with_suffix(".txt").read_text().strip()) for p in pictures]


@part("data", "webdataset")
class WebDataset:
    """Tar shards in which files of one stem are a sample: a picture, and .txt, .json ("caption") or .cls beside it."""

    shards: str
    """Path with wildcards or a range, such as data/train-{0000..0012}.tar."""
    size: PositiveInt
    """Side in pixels; pictures are resized to it and cut to a square."""
    encoder: EncoderPart | None = None
    """Text encoder for the captions; without one classes are the condition, if there are any."""
    classes: int = 0
    """Number of classes, where the samples have .cls files."""
    negative: str = ""
    """Prompt that guidance moves away from."""
    zeros: bool = False
    """Guidance moves away from zeros in its place (SDXL)."""
    text_cache: str | None = None
    """Folder of the embeddings; the user's cache folder when left out."""
    grey: bool = False
    """True: one channel, otherwise RGB."""

    @property
    def conditions(self) -> Conditions:
        if self.encoder is not None:
            return "text"
        return "classes" if self.classes else "none"

    def files(self) -> list[Path]:
        """The tar files."""
        return expand(self.shards)

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
        return Pictures(items, self.size, self.grey, self.classes, _texts(items, self))


def expand(pattern: str) -> list[Path]:
    """Paths of a pattern with wildcards and one {0000..0012}, sorted. Raises UserError when there are none."""
    before, brace, rest = pattern.partition("{")
    if brace:
        span, _, after = rest.partition("}")
        first, dots, last = span.partition("..")
        if not (dots and first.isdigit() and last.isdigit()):
            raise UserError(f"shards {pattern}: expected a range such as {{0000..0012}}")
        names = [f"{before}{i:0{len(first)}d}{after}" for i in range(int(first), int(last) + 1)]
    else:
        names = sorted(glob(str(Path(pattern).expanduser())))
    paths = [Path(n).expanduser() for n in names]
    absent = [p for p in paths if not p.is_file()]
    if absent or not paths:
        raise UserError(f"shards {pattern}: " + (f"{absent[0]} is missing" if absent else "match no file"))
    return paths


def index(path: Path) -> list[Item]:
    """The samples of one tar file; only headers, captions and classes are read."""
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    folder, _, name = member.name.rpartition("/")
                    stem, _, kind = name.partition(".")
                    groups.setdefault(f"{folder}/{stem}".lstrip("/"), {})[kind.lower()] = (
                        member.offset_data,
                        member.size,
                    )
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path}: not a readable tar file (compressed ones are not read): {error}") from None
    end = path.stat().st_size

    def read(span: tuple[int, int]) -> bytes:
        with path.open("rb") as f:
            f.seek(span[0])
            return f.read(span[1])

    items = []
    for stem, parts in groups.items():
        picture = next((parts[s[1:]] for s in SUFFIXES if s[1:] in parts), None)
        name = f"{path}:{stem}"
        if picture is None:
            raise UserError(f"{name}: has no picture ({', '.join(SUFFIXES)}), only {', '.join(sorted(parts))}")
        if picture[0] + picture[1] > end:
            raise UserError(f"{path}: ends within {stem}; the file is cut off, copy it again")
        caption, label = None, None
        try:
            if "txt" in parts:
                caption = read(parts["txt"]).decode().strip()
            elif "json" in parts:
                caption = json.loads(read(parts["json"])).get("caption")
            if "cls" in parts:
                label = int(read(parts["cls"]).decode())
        except (ValueError, AttributeError) as error:
            raise UserError(f"{name}: its caption or class cannot be read: {error}") from None
        items.append(Item(lambda span=picture: read(span), name, caption, label))  # type: ignore[misc]
    if not items:
        raise UserError(f"{path}: holds no sample")
    return items


@part("data", "prompts")
class Prompts:
    """Prompts alone, for methods that need no data."""

    path: str
    """A text file, one prompt a line."""
    shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    """Of one sample, channels, height, width; latents for a latent teacher."""
    encoder: EncoderPart
    """Text encoder."""
    vae: str | None = None
    """Folder of the VAE, or of a pipeline with one, that turns samples into pictures where they are latents."""
    negative: str = ""
    """Prompt that guidance moves away from."""
    zeros: bool = False
    """Guidance moves away from zeros in its place (SDXL)."""
    text_cache: str | None = None
    """Folder of the embeddings; the user's cache folder when left out."""
    conditions: ClassVar[Conditions] = "text"

    def files(self) -> list[Path]:
        """The file of prompts."""
        return [Path(self.path).expanduser()]

    def open(self) -> PromptData:
        prompts = read_prompts(Path(self.path).expanduser())
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
