"""Tar shards as people pack them: links, classes, folders with brackets in their names."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from tiny_pictures import encoded, make_tar, write

from fewstep.config import UserError
from fewstep.data.pictures import WebDataset
from fewstep.data.tars import expand


def picture(value: int) -> bytes:
    return encoded(Image.new("L", (4, 4), value))


def linked(path: Path, *members: tuple[str, bytes | tuple[bytes, str]]) -> Path:
    """A tar whose members hold bytes or are (type, target)."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                tar.addfile(info)
    return path


def samples(path: Path, classes: int = 0) -> list[tuple[str, int, str | None, int | None]]:
    """(name, grey level, caption, class)."""
    data = WebDataset(shards=str(path), size=4, grey=True, classes=classes).open()
    greys = [round(float(x[0, 0, 0] + 1) * 127.5) for x in data.images]
    return [(i.name.partition("tar:")[2], g, i.caption, i.label) for i, g in zip(data.items, greys, strict=True)]


def hard(target: str) -> tuple[bytes, str]:
    return tarfile.LNKTYPE, target


def test_a_hard_link_is_its_target(tmp_path: Path):
    folder = write(tmp_path / "d", a_png=picture(30), a_txt=b"red", c_png=picture(60))
    for kind in ("png", "txt"):
        os.link(folder / f"a.{kind}", folder / f"b.{kind}")
    with tarfile.open(tmp_path / "packed.tar", "w") as tar:
        tar.add(folder, "./")
    assert sorted(s[1:3] for s in samples(tmp_path / "packed.tar")) == [(30, "red"), (30, "red"), (60, None)]
    first = (("a.png", picture(30)), ("a.txt", b"red"), ("a.cls", b"1"))
    rest = (("b.png", hard("a.png")), ("b.txt", hard("./a.txt")), ("b.cls", hard("a.cls")), ("c.png", hard("b.png")))
    found = samples(linked(tmp_path / "t.tar", *first, *rest))
    assert found == [("a", 30, "red", 1), ("b", 30, "red", 1), ("c", 30, None, None)]
    hidden = samples(linked(tmp_path / "h.tar", (".store/1", picture(9)), ("a.png", hard(".store/1"))))
    assert hidden == [("a", 9, None, None)]


UNREAD = {
    "hard": (
        hard("gone.png"),
        "is a hard link to gone.png, which is not before it in the file; pack it again with tar --h",
    ),
    "soft": ((tarfile.SYMTYPE, "a.png"), r"is a link to a.png and no file; pack it again with tar --dereference"),
    "pipe": ((tarfile.FIFOTYPE, ""), "is a pipe or a device and no file"),
}


@pytest.mark.parametrize("kind", UNREAD)
@pytest.mark.parametrize("name", ["b.png", "a.txt", "x/b.cls"])
def test_what_cannot_be_followed_is_refused_by_name(tmp_path: Path, kind: str, name: str):
    content, told = UNREAD[kind]
    with pytest.raises(UserError, match=rf"t\.tar: {name} {told}"):
        samples(linked(tmp_path / "t.tar", ("a.png", picture(9)), (name, content)))


def test_links_that_are_no_part_of_a_sample_change_nothing(tmp_path: Path):
    beside = (
        ("latest", (tarfile.SYMTYPE, "x")),
        (".a.png", (tarfile.SYMTYPE, "a.png")),
        ("x.png", (tarfile.DIRTYPE, "")),
        ("__MACOSX/._a.png", hard("gone")),
        ("readme.link", hard("gone")),
        ("copy.link", hard("a.png")),
    )
    last = ("b.png", hard("copy.link"))
    found = samples(linked(tmp_path / "t.tar", ("a.png", picture(9)), *beside, last))
    assert found == [("a", 9, None, None), ("b", 9, None, None)]


def test_a_file_with_holes_is_called_so(tmp_path: Path):
    with tarfile.open(tmp_path / "t.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("a.png")
        info.type = tarfile.GNUTYPE_SPARSE
        tar.addfile(info)
    with pytest.raises(UserError, match=r"t\.tar: a\.png is stored with holes; pack it again without --sparse"):
        samples(tmp_path / "t.tar")


def test_a_class_is_digits(tmp_path: Path):
    for text, label in ((b"3", 3), (b" 03\r\n", 3), (b"\xef\xbb\xbf3", 3), (b"-1", -1)):
        path = make_tar(tmp_path / "t.tar", [("a.png", picture(9)), ("a.cls", text)])
        assert samples(path)[0][3] == label
    for text in (b"1_0", b"3.0", b"", b"+3", "\u0663".encode()):
        path = make_tar(tmp_path / "t.tar", [("a.png", picture(9)), ("a.cls", text)])
        with pytest.raises(UserError, match=r"t\.tar:a: .* its \.cls is '.*', expected a whole number in digits"):
            samples(path, classes=11)


def test_brackets_in_a_folders_name_are_letters(tmp_path: Path):
    folder = write(tmp_path / "set[v1]")
    for name in ("a.tar", "b{1}.tar"):
        make_tar(folder / name, [("a.png", picture(9))])
        assert expand(str(folder / name)) == [folder / name]
    assert expand(str(folder / "*.tar")) == [folder / "a.tar", folder / "b{1}.tar"]
    make_tar(tmp_path / "c1.tar", [("a.png", picture(9))])
    assert expand(str(tmp_path / "c[0-9].tar")) == [tmp_path / "c1.tar"]


def test_a_dot_in_front_makes_no_other_sample_and_two_pictures_are_refused(tmp_path: Path):
    mixed = (("./a.png", picture(30)), ("a.txt", b"red"), ("./b.png", picture(60)))
    assert samples(linked(tmp_path / "t.tar", *mixed)) == [("a", 30, "red", None), ("b", 60, None, None)]
    two = linked(tmp_path / "two.tar", ("a.png", picture(30)), ("a.bmp", picture(60)), ("a.txt", b"red"))
    with pytest.raises(UserError, match=r"two\.tar:a: has 2 pictures, \.png, \.bmp; give every sample a name of its own"):
        samples(two)
    with pytest.raises(UserError, match=r"twice\.tar: holds a\.png twice"):
        samples(linked(tmp_path / "twice.tar", ("./a.png", picture(30)), ("a.png", picture(60))))
