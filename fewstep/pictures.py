"""Pictures as people have them: the files of a folder listed, one file decoded, what will not do refused by its name."""

from __future__ import annotations

import errno
import io
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
CAP = 2**28 // 3
"""Pixels of one picture, 89 million: 256 MiB as 8-bit RGB, where Pillow too begins to warn."""
STRIP = 50
"""Times that a picture may be as long as wide: the middle of a longer one shows next to nothing of it."""
SYSTEM = {"__macosx", "__pycache__", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information"}
"""What systems leave in folders, in lower case; names that begin with a dot are hidden too."""
BESIDE = (".txt", ".json", ".jsonl", ".cls")
"""Captions and classes, which stand beside pictures and are not worth a word."""
Filter = Literal["lanczos", "bicubic", "bilinear", "box"]


class PictureError(ValueError):
    """A picture, or a folder of them, that cannot be used: `name` says which, `reason` why."""

    def __init__(self, name: object, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = str(name), reason


@dataclass(frozen=True)
class Listing:
    """The pictures of a folder in the order of their names, and by relative name what was left out and why."""

    root: Path
    files: list[Path]
    skipped: dict[str, str] = field(default_factory=dict)

    def parts(self, file: Path) -> tuple[str, ...]:
        """The name of a file from the folder on."""
        return file.relative_to(self.root).parts


def hidden(name: str) -> bool:
    """Whether a file or folder of this name is the system's or an editor's, no part of the data."""
    return name.startswith(".") or name.lower() in SYSTEM


def list_pictures(root: Path, suffixes: Sequence[str] = SUFFIXES) -> Listing:
    """All pictures of a folder and its sub-folders; links are followed, and no folder is read twice.

    Raises:
        PictureError: no such folder, one that may not be read, a link to nothing or to itself, or a pipe that is named
            as a picture.
    """
    if not root.is_dir():
        raise PictureError(root, "no such folder")
    files: list[Path] = []
    skipped: dict[str, str] = {}
    seen: set[str] = set()
    folders, links = [root], list[Path]()
    while folders or links:
        # A folder counts where it stands; a link to it, anywhere, comes after.
        links.sort()
        folder = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(folder)
        if real in seen:
            skipped[str(folder.relative_to(root))] = "a link to a folder that was read already"
            continue
        seen.add(real)
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise PictureError(folder, f"cannot be read: {error.strerror}") from None
        for entry in entries:
            path, suffix = folder / entry.name, Path(entry.name).suffix.lower()
            if hidden(entry.name):
                skipped[str(path.relative_to(root))] = "hidden"
            elif os.path.isdir(path):  # DirEntry.is_dir and is_file raise on links in a circle
                (links if entry.is_symlink() else folders).append(path)
            elif entry.is_symlink() and (why := _broken(path)):
                # A name with a dot, v1.5, may be a class as well as a file.
                if suffix not in BESIDE:
                    raise PictureError(path, f"is a link to {os.readlink(path)}, {why}; mend or remove it")
                skipped[str(path.relative_to(root))] = "a link to nothing"
            elif suffix in suffixes:
                if not os.path.isfile(path):
                    raise PictureError(path, "is a pipe, a device or a socket and no file; remove it")
                files.append(path)
            elif suffix not in BESIDE:
                skipped[str(path.relative_to(root))] = f"no picture ({suffix or 'no suffix'})"
    return Listing(root, sorted(files, key=lambda p: p.relative_to(root).parts), skipped)


def _broken(link: Path) -> str:
    """Why a link cannot be followed; nothing where it can."""
    try:
        link.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "which leads back to itself"
        gone = error.errno in (errno.ENOENT, errno.ENOTDIR)
        return "which is not there" if gone else f"which cannot be read: {error.strerror}"
    return ""


def class_names(listing: Listing) -> list[str]:
    """The sub-folders that are classes, by number where all are numbers, by name otherwise; none where none has pictures.

    Raises:
        PictureError: a picture beside class folders, or two names of one number.
    """
    found: dict[str, Path] = {}
    loose = [f for f in listing.files if len(listing.parts(f)) == 1]
    for file in listing.files:
        if len(listing.parts(file)) > 1:
            found.setdefault(listing.parts(file)[0], file)
    if loose and found:
        raise PictureError(loose[0], f"stands beside class folders ({', '.join(sorted(found)[:3])}); give it a class")
    if not all(name.isascii() and name.isdigit() for name in found):
        return sorted(found)
    names = sorted(found, key=int)
    for one, other in pairwise(names):
        if int(one) == int(other):
            raise PictureError(listing.root, f"its class folders {one} and {other} are one number; rename or join them")
    return names


def load(source: Path | bytes, name: object) -> tuple[Image, str]:
    """A picture as a viewer shows it (turned by its EXIF tag), not converted, and what it is, as in `kind_of`.

    Raises:
        PictureError: not a picture, cut off, or of more than `CAP` pixels.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
                _refuse_size(picture.size, name)
                kind = kind_of(picture)
                upright = ImageOps.exif_transpose(picture)
                upright.load()
    except PictureError:
        raise
    except Exception as error:  # Pillow's readers raise nearly anything on bytes that are not theirs
        raise PictureError(name, f"cannot be read: {error}") from None
    return upright, kind


def facts(source: Path | bytes, name: object) -> tuple[int, int, str]:
    """(height, width, kind) of a picture by its header, upright; raises as `load`."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
                _refuse_size(picture.size, name)
                wide, high = picture.size
                # Pillow decodes a whole PNG to find a tag behind its pixels; such a tag shows when it is read.
                tagged = picture.format != "PNG" or {"exif", "Raw profile type exif"} & picture.info.keys()
                turned = tagged and picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
                return (wide, high, kind_of(picture)) if turned else (high, wide, kind_of(picture))
    except PictureError:
        raise
    except Exception as error:  # as in `load`
        raise PictureError(name, f"cannot be read: {error}") from None


def kind_of(picture: Image) -> str:
    """What an opened picture is, in words: "grey" and "colour" are those of 8 bits without transparency."""
    # Pillow halves 16-bit colour to mode RGB; only the name of the raw mode tells.
    deep = any(";16" in str(tile[3]) for tile in getattr(picture, "tile", ()))
    names = {"L": "grey", "RGB": "colour", "P": "palette", "1": "black and white", "F": "floating-point grey"}
    names |= {"LA": "grey with alpha", "RGBA": "colour with alpha", "I": "32-bit grey"}
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):
        name = "16-bit grey"
    elif picture.mode in ("RGB", "RGBA") and deep:
        name = f"16-bit {names[picture.mode]}"
    else:
        name = names.get(picture.mode, picture.mode)
    return f"{name} with a transparent value" if "transparency" in picture.info else name


def flat(picture: Image, kind: str, channels: int, name: object) -> Image:
    """A loaded picture as 8-bit grey (1 channel) or RGB (3).

    What is transparent lies on white. 16-bit grey is divided by 65,535 and rounded to 8 bits; of 16-bit colour the
    high bytes are taken, within one of 255 levels.

    Raises:
        PictureError: 32-bit and floating-point pictures, whose white is not known, and 16-bit grey with transparency.
    """
    from PIL import Image

    if kind.startswith("16-bit grey"):
        if "transparen" in kind:
            raise PictureError(name, f"is {kind}; save it with 8 bits, or without transparency")
        values = np.asarray(picture).astype(np.float64)
        picture = Image.fromarray((values * (255 / 65535)).round().astype(np.uint8))
    elif kind.startswith(("32-bit", "floating")):
        raise PictureError(name, f"is {kind}, whose white is not known; save it with 8 or 16 bits")
    elif picture.has_transparency_data:
        above = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
    try:
        return picture.convert("L" if channels == 1 else "RGB")
    except ValueError as error:
        raise PictureError(name, f"is {kind}, which cannot be converted: {error}") from None


def square(picture: Image, size: int, how: Filter | None = "lanczos", at: float = 0.5) -> Image:
    """The largest square of a picture resized to `size`, or with no filter its own `size` x `size` pixels.

    It is cut before it is resized. `at` in [0, 1) is its place along what is left over, .5 the middle.

    Raises:
        ValueError: without a filter, a picture smaller than `size`.
    """
    from PIL import Image

    wide, high = picture.size
    side = min(wide, high) if how is not None else size
    if side > min(wide, high):
        raise ValueError(f"is {high} x {wide}, smaller than {size}")
    left, top = (int(at * (n - side + 1)) if at != 0.5 else (n - side) // 2 for n in (wide, high))
    cut = picture.crop((left, top, left + side, top + side))
    return cut if how is None or side == size else cut.resize((size, size), Image.Resampling[how.upper()])


def pixels(picture: Image) -> np.ndarray:
    """uint8 (C, H, W) of a grey or RGB picture."""
    values = np.asarray(picture)
    return (values[None] if values.ndim == 2 else values.transpose(2, 0, 1)).copy()


def told(listing: Iterable[str]) -> str:
    """Reasons with how often each came: "3 hidden, 1 no picture (.gif)"."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(Counter(listing).items()))


def _refuse_size(size: tuple[int, int], name: object) -> None:
    wide, high = size
    if wide * high > CAP:
        raise PictureError(name, f"is {high} x {wide}, more than {CAP // 10**6} million pixels; make it smaller")
    if max(size) > STRIP * min(size):
        raise PictureError(name, f"is {high} x {wide}, more than {STRIP} times as long as wide; cut it")
