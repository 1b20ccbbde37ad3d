"""Tar shards as WebDataset writes them: which there are, and the samples of one."""

from __future__ import annotations

import json
import re
import tarfile
from glob import glob
from pathlib import Path
from posixpath import normpath

from fewstep.config import Absent, UserError
from fewstep.data.reader import Item
from fewstep.files import expanded, parse_json, text_of
from fewstep.pictures import SUFFIXES, hidden

PARTS = (*(suffix[1:] for suffix in SUFFIXES), "txt", "json", "cls")
"""Suffixes of what is read of a sample."""


def expand(pattern: str) -> list[Path]:
    """Paths of a pattern with wildcards and one {0000..0012}, sorted. Raises UserError when there are none."""
    if expanded(pattern).is_file():  # whatever brackets or braces are in its name
        return [expanded(pattern)]
    before, brace, rest = pattern.partition("{")
    if brace:
        span, _, after = rest.partition("}")
        first, dots, last = span.partition("..")
        if not (dots and first.isdigit() and last.isdigit()):
            raise UserError(f"shards {pattern}: expected a range such as {{0000..0012}}")
        names = [f"{before}{i:0{len(first)}d}{after}" for i in range(int(first), int(last) + 1)]
    else:
        # Brackets are a set of letters to `glob`, and to most who have them a part of a folder's name.
        wild = str(expanded(pattern))
        names = sorted(glob(wild) or glob(wild.replace("[", "[[]")))
    paths = [expanded(n) for n in names]
    absent = [p for p in paths if not p.is_file()]
    if absent or not paths:
        raise Absent(f"shards {pattern}: " + (f"{absent[0]} is missing" if absent else "match no file"))
    return paths


def index(path: Path) -> list[Item]:
    """The samples of one tar file; only headers, captions and classes are read.

    Raises:
        UserError: a file that is no tar, is cut off, holds one name twice, or a sample without a picture.
    """
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    spans: dict[str, tuple[int, int]] = {}
    end, last = 0, "its first member"
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.issparse():
                    raise UserError(f"{path}: {member.name} is stored with holes; pack it again without --sparse (-S)")
                size = 0 if member.islnk() else member.size
                end, last = member.offset_data + -(-size // 512) * 512, member.name
                span = _span(path, member, spans)
                if span is None or any(hidden(p) for p in member.name.split("/") if p not in ("", ".")):
                    continue
                folder, _, name = normpath(member.name).rpartition("/")  # ./a.png and a.txt are of one sample
                stem, _, kind = name.partition(".")
                parts = groups.setdefault(f"{folder}/{stem}".lstrip("/"), {})
                if kind.lower() in parts:
                    raise UserError(f"{path}: holds {member.name} twice; give every sample a name of its own")
                parts[kind.lower()] = span
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path}: not a readable tar file (compressed ones are not read): {error}") from None
    _refuse_cut(path, end, last)

    def read(span: tuple[int, int], limit: int | None = None) -> bytes:
        with path.open("rb") as f:
            f.seek(span[0])
            return f.read(span[1] if limit is None else min(limit, span[1]))

    items = []
    for stem, parts in groups.items():
        kinds, name = [s[1:] for s in SUFFIXES if s[1:] in parts], f"{path}:{stem}"
        if not kinds:
            raise UserError(f"{name}: has no picture ({', '.join(SUFFIXES)}), only {', '.join(sorted(parts))}")
        if len(kinds) > 1:
            raise UserError(
                f"{name}: has {len(kinds)} pictures, .{', .'.join(kinds)}; give every sample a name of its own"
            )
        picture = parts[kinds[0]]
        caption, label = None, None
        try:
            if "txt" in parts:
                caption = text_of(read(parts["txt"]), f"{name}.txt").strip(" \t\r\n")
            elif "json" in parts:
                told = parse_json(text_of(read(parts["json"]), f"{name}.json"), "its .json")
                caption = told.get("caption")
                if "caption" in told and not isinstance(caption, str):
                    raise ValueError(f'"caption" is {json.dumps(caption)[:60]}, expected a text')
            if "cls" in parts:
                number = text_of(read(parts["cls"]), f"{name}.cls").strip()
                if not re.fullmatch(r"-?[0-9]+", number):
                    raise ValueError(f"its .cls is {number[:60]!r}, expected a whole number in digits")
                label = int(number)
        except (ValueError, AttributeError, TypeError, UserError) as error:
            raise UserError(f"{name}: its caption or class cannot be read: {error}") from None
        items.append(Item(lambda limit=None, span=picture: read(span, limit), name, caption, label))
    if not items:
        raise UserError(f"{path}: holds no sample")
    return items


def _span(path: Path, member: tarfile.TarInfo, spans: dict[str, tuple[int, int]]) -> tuple[int, int] | None:
    """(begin, length) of a member's bytes, a hard link's those of its target; None for what is no part of a sample."""
    name = normpath(member.name)
    if member.isreg():
        spans[name] = member.offset_data, member.size
        return spans[name]
    read = name.rpartition("/")[2].partition(".")[2].lower() in PARTS and not any(map(hidden, name.split("/")))
    if member.islnk():
        target = normpath(member.linkname)
        if target in spans:
            spans[name] = spans[target]
            return spans[name] if read else None
        if read:
            raise UserError(
                f"{path}: {member.name} is a hard link to {member.linkname}, which is not before it in the file; pack it "
                "again with tar --hard-dereference"
            )
    elif read and not member.isdir():
        kind = f"a link to {member.linkname}" if member.issym() else "a pipe or a device"
        raise UserError(f"{path}: {member.name} is {kind} and no file; pack it again with tar --dereference (-h)")
    return None


def _refuse_cut(path: Path, end: int, last: str) -> None:
    """UserError unless zeros follow the last member and nothing else: tarfile is silent about what is cut there."""
    with path.open("rb") as f:
        size = f.seek(0, 2)
        if size < end:
            raise UserError(f"{path}: ends within {last}; the file is cut off, copy it again")
        f.seek(end)
        mark = f.read(512)
        if len(mark) < 512:
            raise UserError(f"{path}: ends after {last} without the mark of an end; the file is cut off, copy it again")
        while mark:
            if mark.count(0) != len(mark):
                raise UserError(f"{path}: holds more after {last}, which cannot be read: damaged, or two files joined")
            mark = f.read(1 << 20)
