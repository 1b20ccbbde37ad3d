"""Pictures as people have them: the files of a folder listed, one file decoded, what will not do refused by its name."""

from __future__ import annotations

import errno
import io
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
    """The pictures of a folder in the order of their names, and by relative name what was left out and why.

    again: folders that were met twice, as (second, first). folders: names of the sub-folders, with pictures or without,
        but for hidden ones.
    """

    root: Path
    files: list[Path]
    skipped: dict[str, str] = field(default_factory=dict)
    again: list[tuple[Path, Path]] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)

    def parts(self, file: Path) -> tuple[str, ...]:
        """The name of a file from the folder on."""
        return file.relative_to(self.root).parts


def hidden(name: str) -> bool:
    """Whether a file or folder of this name is the system's or an editor's, no part of the data."""
    return name.startswith(".") or name.lower() in SYSTEM


def list_pictures(root: Path, suffixes: Sequence[str] = SUFFIXES, strict: bool = True) -> Listing:
    """All pictures of a folder and its sub-folders; links are followed, and no folder is read twice.

    strict: False counts as left out what is refused otherwise, but for a folder that is not there.

    Raises:
        PictureError: no such folder, one that may not be read, a link to nothing or to itself, or a pipe that is named
            as a picture.
    """
    if not root.is_dir():
        raise PictureError(root, "no such folder")
    files: list[Path] = []
    skipped: dict[str, str] = {}
    seen: dict[str, Path] = {}
    again: list[tuple[Path, Path]] = []
    folders, links, inside = [root], list[Path](), list[str]()
    while folders or links:
        # A folder counts where it stands; a link to it, anywhere, comes after.
        links.sort()
        folder = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(folder)
        if real in seen:
            skipped[str(folder.relative_to(root))] = "a link to a folder that was read already"
            again.append((folder, seen[real]))
            continue
        seen[real] = folder
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            if strict:
                raise PictureError(folder, f"cannot be read: {error.strerror}") from None
            skipped[str(folder.relative_to(root))] = "a folder that cannot be read"
            continue
        for entry in entries:
            path, suffix, linked = folder / entry.name, Path(entry.name).suffix.lower(), entry.is_symlink()
            # An entry knows what it is without a look at the disk, and raises on a link in a circle.
            if hidden(entry.name):
                skipped[str(path.relative_to(root))] = "hidden"
            elif os.path.isdir(path) if linked else entry.is_dir():
                (links if linked else folders).append(path)
                if folder == root:
                    inside.append(entry.name)
            elif linked and (why := _broken(path)):
                # A name with a dot, v1.5, may be a class as well as a file.
                if strict and suffix not in BESIDE:
                    raise PictureError(path, f"is a link to {os.readlink(path)}, {why}; mend or remove it")
                skipped[str(path.relative_to(root))] = "a link to nothing"
            elif suffix in suffixes:
                if os.path.isfile(path) if linked else entry.is_file():
                    files.append(path)
                elif strict:
                    raise PictureError(path, "is a pipe, a device or a socket and no file; remove it")
                else:
                    skipped[str(path.relative_to(root))] = "a pipe, a device or a socket"
            elif suffix not in BESIDE:
                skipped[str(path.relative_to(root))] = f"no picture ({suffix or 'no suffix'})"
    return Listing(root, sorted(files, key=lambda p: p.relative_to(root).parts), skipped, again, sorted(inside))


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
    """The sub-folders that are classes in the order of their labels; none where none has pictures.

    By value where all names are whole numbers, else by name, as text. Among numbers an empty folder below the last is a
    class too if 0, 1, 2, ... is then without a gap.

    Raises:
        PictureError: a picture beside class folders, two names of one number, or one folder in two classes.
    """
    found: dict[str, Path] = {}
    loose = [f for f in listing.files if len(listing.parts(f)) == 1]
    for file in listing.files:
        if len(listing.parts(file)) > 1:
            found.setdefault(listing.parts(file)[0], file)
    if loose and found:
        raise PictureError(loose[0], f"stands beside class folders ({', '.join(sorted(found)[:3])}); give it a class")
    full = {folder for file in listing.files for folder in file.parents} if listing.again else set()
    for second, first in listing.again:
        classes = [listing.parts(path)[:1] for path in (first, second)]
        # A link up to the whole folder is no class; pictures are asked for as an empty folder has none to lose.
        if classes[0] not in ((), classes[1]) and first in full:
            where = "/".join(listing.parts(first))
            raise PictureError(
                second, f"is the folder {where} again, whose pictures are of class {classes[0][0]}; remove one of the two"
            )
    if not found or not all(map(_is_number, found)):
        return sorted(found)
    numbers = sorted(found, key=lambda name: (int(name), name))
    for one, other in pairwise(numbers):
        if int(one) == int(other):
            raise PictureError(listing.root, f"its class folders {one} and {other} are one number; rename or join them")
    last = int(numbers[-1])
    named = {int(name): name for name in [*filter(_is_number, listing.folders), *numbers] if int(name) <= last}
    return [named[n] for n in range(last + 1)] if len(named) == last + 1 else numbers


def renumbered(names: Sequence[str], folders: Sequence[str]) -> str:
    """Which class folder, where all are named by numbers, has another label than its number; nothing where none has.

    folders: all that are there, with pictures or without.
    """
    wrong = next((i for i, name in enumerate(names) if not _is_number(name) or int(name) != i), None)
    if wrong is None or not all(map(_is_number, names)):
        return ""
    there = {int(name) for name in folders if _is_number(name)}
    absent = next(n for n in count() if n not in there)
    return f"class folder {names[wrong]} has label {wrong}, as there is no folder {absent}"


def label_order(names: Sequence[str], folders: Sequence[str]) -> str:
    """What is to be said of the labels of class folders: `renumbered`, or the order where numbers stand among names."""
    if not 0 < sum(map(_is_number, names)) < len(names):
        return renumbered(names, folders)
    shown = names if len(names) <= 6 else [*names[:3], "...", *names[-2:]]
    return f"labels in the order {', '.join(shown)}"


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


@contextmanager
def _opened(source: Path | bytes, name: object) -> Iterator[Image]:
    """One picture, opened and not decoded; whatever goes wrong with it is a PictureError, also in the caller's block."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
                _refuse_size(picture.size, name)
                if several := _frames(picture):
                    raise PictureError(name, f"holds {several}; save the one that is meant as a file of its own")
                yield picture
    except PictureError:
        raise
    except UnidentifiedImageError:
        bare = not (source if isinstance(source, bytes) else source.stat().st_size)
        raise PictureError(name, f"cannot be read: {'is empty' if bare else 'is no picture, or damaged'}") from None
    except Exception as error:  # Pillow's readers raise nearly anything on bytes that are not theirs
        raise PictureError(name, f"cannot be read: {error}") from None


def _frames(picture: Image) -> str:
    """The pages or frames of a file with more than one picture, in words; thumbnails of the first do not count."""
    count = getattr(picture, "n_frames", 1)
    if count == 1 or picture.format == "MPO":  # a phone's JPEG, with previews and depth behind the picture
        return ""
    if picture.format != "TIFF":
        return f"an animation of {count} frames"
    pages: Any = picture
    full = 1
    for i in range(1, count):
        pages.seek(i)
        full += not pages.tag_v2.get(254, 0) & 5  # NewSubfileType: a smaller copy of another page, or its mask
    pages.seek(0)
    return f"{full} pages" if full > 1 else ""


def load(source: Path | bytes, name: object) -> tuple[Image, str]:
    """A picture as a viewer shows it (turned by its EXIF tag), not converted, and what it is, as in `kind_of`.

    Raises:
        PictureError: not a picture, cut off, several in one file, or of more than `CAP` pixels.
    """
    from PIL import ImageOps

    with _opened(source, name) as picture:
        kind = kind_of(picture)
        key = picture.info.get("transparency")
        if picture.mode == "L" and isinstance(key, int):
            # Pillow spreads 2 and 4 bits over 0..255, but not the value that is transparent.
            stored: Any = picture
            raw = str(stored.tile[0][3])
            picture.info["transparency"] = key * {"L;2": 85, "L;4": 17}.get(raw, 1)
        upright = ImageOps.exif_transpose(picture)
        upright.load()
    return upright, kind


def facts(source: Path | bytes, name: object) -> tuple[int, int, str]:
    """(height, width, kind) of a picture by its header, upright; raises as `load`."""
    with _opened(source, name) as picture:
        wide, high = picture.size
        if picture.format == "TIFF":  # whose size some versions of Pillow give upright, some as it is stored
            tags: Any = picture
            wide, high = tags.tag_v2[256], tags.tag_v2[257]
        # Pillow decodes a whole PNG to find a tag behind its pixels; such a tag shows when it is read.
        tagged = picture.format != "PNG" or {"exif", "Raw profile type exif"} & picture.info.keys()
        turned = tagged and picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return (wide, high, kind_of(picture)) if turned else (high, wide, kind_of(picture))


def kind_of(picture: Image) -> str:
    """What an opened picture is, in words: "grey" and "colour" are those of 8 bits without transparency."""
    # Pillow halves 16-bit colour to mode RGB; only the name of the raw mode tells.
    raw = [str(tile[3]) for tile in getattr(picture, "tile", ())]
    deep = any(";16" in name for name in raw)
    names = {"L": "grey", "RGB": "colour", "P": "palette", "1": "black and white", "F": "floating-point grey"}
    names |= {"LA": "grey with alpha", "RGBA": "colour with alpha", "I": "32-bit grey"}
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):
        inverse = picture.format == "TIFF" and getattr(picture, "tag_v2", {}).get(262) == 0
        name = "12-bit grey" if any(";12" in r for r in raw) else f"16-bit grey{', white at 0' if inverse else ''}"
    elif picture.mode in ("RGB", "RGBA") and deep:
        name = f"16-bit {names[picture.mode]}"
    else:
        name = names.get(picture.mode, picture.mode)
    return f"{name} with a transparent value" if "transparency" in picture.info else name


def flat(picture: Image, kind: str, channels: int, name: object) -> Image:
    """A loaded picture as 8-bit grey (1 channel) or RGB (3).

    What is transparent lies on white. 16-bit grey is divided by 65,535 and rounded to 8 bits, 12-bit grey by 4,095; of
    16-bit colour the high bytes are taken, within one of 255 levels.

    Raises:
        PictureError: 32-bit and floating-point pictures, whose white is not known, and 16 bits with one value or colour
            that is transparent, which 8 bits do not tell from its neighbours.
    """
    from PIL import Image

    if kind.startswith("16-bit") and "transparent value" in kind:
        raise PictureError(name, f"is {kind}; save it with 8 bits, or without transparency")
    if kind.startswith(("16-bit grey", "12-bit grey")):
        values = np.asarray(picture).astype(np.float64) / (4095 if kind.startswith("12") else 65535)
        if "white at 0" in kind:
            values = 1 - values
        picture = Image.fromarray((values * 255).round().astype(np.uint8))
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
