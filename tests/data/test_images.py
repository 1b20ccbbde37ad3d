"""Folders of pictures: which are read, and which class a picture has."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_pictures import encoded, noise, png, tiff, write

from fewstep.config import UserError
from fewstep.data import images
from fewstep.data.images import ImageFolder
from fewstep.pictures import list_pictures


def test_sub_folders_sorted_by_name_are_the_classes(tmp_path: Path):
    for name, grey in (("b/y.png", 255), ("a/x.png", 0), ("a/z.png", 51), ("c/w.png", 102)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (3, 2), grey).save(path)
    x, y = ImageFolder(path=str(tmp_path), grey=True).open().all()
    assert y is not None
    assert y.tolist() == [0, 0, 1, 2]
    assert x.shape == (4, 1, 2, 3)
    assert [round(float(a.mean()), 6) for a in x] == [-1.0, -0.6, 1.0, -0.2]


BROKEN = {
    "z.png -> z.png": "leads back to itself",
    "a -> b, b -> a": "leads back to itself",
    "n.png -> one.png/q.png": "is not there",
    "v1.5 -> gone": "is not there",
    "film.gif -> gone": "is not there",
}


@pytest.mark.parametrize("links", BROKEN)
def test_a_link_that_leads_nowhere_is_refused_by_name(tmp_path: Path, links: str):
    root = write(tmp_path / "d", one_png=Image.new("L", (4, 4)))
    for link in links.split(", "):
        name, target = link.split(" -> ")
        (root / name).symlink_to(target)
    told = rf"d/({name}|a): is a link to .*, which {BROKEN[links]}; mend or remove it"
    with pytest.raises(UserError, match=told):
        ImageFolder(path=str(root)).open()


def test_a_broken_link_beside_pictures_is_counted(tmp_path: Path):
    root = write(tmp_path / "d", one_png=Image.new("L", (4, 4)))
    (root / "x.txt").symlink_to("x.txt")
    assert ImageFolder(path=str(root)).open().about().endswith("; left out: 1 a link to nothing")


def keyed(bits: int, key: int) -> bytes:
    """8 x 8 grey of few bits, whose first value is `key`, transparent, and all others are the highest."""
    values = np.full((8, 8), 2**bits - 1)
    values[0, 0] = key
    lines = ["".join(f"{v:0{bits}b}" for v in row) for row in values.tolist()]
    rows = b"".join(b"\0" + int(line, 2).to_bytes(bits, "big") for line in lines)
    return png(8, 8, rows, depth=bits, tRNS=struct.pack(">H", key))


def corner(data: bytes, name: str, folder: Path) -> list[int]:
    """The first pixel of a picture as it is trained."""
    write(folder).joinpath(name).write_bytes(data)
    x = ImageFolder(path=str(folder)).open().images[0]
    return [round(float(v)) for v in (x[:, 0, 0] + 1) * 127.5]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_transparent_grey_of_any_depth_lies_on_white(tmp_path: Path, bits: int):
    for key in (0, 1, 2**bits // 3):
        assert corner(keyed(bits, key), "x.png", tmp_path / f"{key}") == [255, 255, 255], key


@pytest.mark.parametrize(("bits", "white"), [(12, {}), (16, {}), (16, {"t262": 0}), (8, {"t262": 0})])
def test_white_of_a_grey_tiff_is_white(tmp_path: Path, bits: int, white: dict[str, Any]):
    """Of 0, the highest and a third of it, whichever of them is white."""
    third = (2**bits - 1) // 3
    for value, level in ((0, 0), (2**bits - 1, 255), (third, 85)):
        line = f"{value:0{bits}b}" * 8
        row = int(line, 2).to_bytes(bits, "big")
        if bits == 16:
            row = np.frombuffer(row, ">u2").astype("<u2").tobytes()
        told = corner(tiff(8, 8, row * 8, bits, **white), "x.tif", tmp_path / f"{value}")
        assert told == [255 - level if white else level] * 3, value


def test_a_colour_key_of_16_bits_is_refused(tmp_path: Path):
    row = b"\0" + struct.pack(">HHH", 0x1234, 0, 0x1234) * 4
    data = png(4, 4, row * 4, 16, 2, tRNS=struct.pack(">HHH", 0x1234, 0, 0x1234))
    with pytest.raises(UserError, match=r"x\.png: is 16-bit colour with a transparent value; save it with 8 bits, or"):
        corner(data, "x.png", tmp_path)


def test_a_file_of_several_pictures_is_refused_and_a_thumbnail_is_none(tmp_path: Path):
    one, other = (Image.fromarray(noise(8, 6, 3, seed=i)) for i in (0, 1))
    several: dict[str, Any] = {"save_all": True, "append_images": [other]}
    for name, kind, told in (("x.png", "PNG", "an animation of 2 frames"), ("x.webp", "WEBP", "an animation of 2 frames"),
                             ("x.tif", "TIFF", "2 pages")):  # fmt: skip
        with pytest.raises(UserError, match=rf"{name}: holds {told}; save the one that is meant as a file of its own"):
            corner(encoded(one, kind, **several), name, tmp_path / kind)
    small = one.resize((4, 3))
    small.encoderinfo = {"tiffinfo": {254: 1}}
    mask = one.convert("L")
    mask.encoderinfo = {"tiffinfo": {254: 4}}
    phone = encoded(one, "MPO", **several)
    assert corner(phone, "x.jpg", tmp_path / "phone") == corner(encoded(one, "JPEG"), "x.jpg", tmp_path / "plain")
    data = encoded(one, "TIFF", save_all=True, append_images=[small, mask])
    assert corner(data, "x.tif", tmp_path / "thumb") == noise(8, 6, 3)[0, 0].tolist()


def test_a_turned_tiff_stands_as_it_was_taken(tmp_path: Path):
    from PIL import ImageOps

    for turn in range(1, 9):
        data = encoded(Image.fromarray(noise(8, 5, 3)), "TIFF", tiffinfo={274: turn})
        root = write(tmp_path / f"{turn}", x_tif=data)
        with Image.open(root / "x.tif") as stored:
            shown = np.asarray(ImageOps.exif_transpose(stored)).transpose(2, 0, 1)
        assert shown.shape[1:] == ((8, 5) if turn < 5 else (5, 8))
        assert ImageFolder(path=str(root)).outline()[0] == shown.shape
        x = ImageFolder(path=str(root)).open().images[0]
        assert ((x + 1) * 127.5).round().int().tolist() == shown.tolist()


def test_an_empty_file_is_called_empty(tmp_path: Path):
    for data, told in ((b"", "is empty"), (b"dear reader", "is no picture, or damaged")):
        with pytest.raises(UserError, match=rf"x\.png: cannot be read: {told}$"):
            corner(data, "x.png", tmp_path)


def numbered(root: Path, *names: str, empty: tuple[str, ...] = ()) -> Path:
    for name in names:
        write(root / name, x_png=Image.new("L", (4, 4), int(name)))
    for name in empty:
        write(root / name)
    return root


def labels(root: Path, **more: Any) -> tuple[dict[int, int], str, str]:
    """Label by the number of a class folder, what is said of them, and why they are other numbers."""
    data = ImageFolder(path=str(root), grey=True, **more).open()
    x, y = data.all()
    assert y is not None
    assert data.classes == ImageFolder(path=str(root), grey=True).outline()[1]
    seen = {round(float(a[0, 0, 0] + 1) * 127.5): int(b) for a, b in zip(x, y, strict=True)}
    return seen, data.about().partition(" classes")[2], data.renumbered


def test_a_numbered_class_folder_has_its_label_or_it_is_said(tmp_path: Path):
    told = "class folder 1 has label 0, as there is no folder 0"
    ten = numbered(tmp_path / "ten", *map(str, range(1, 11)))
    assert labels(ten) == ({n: n - 1 for n in range(1, 11)}, f" ({told})", told)
    assert labels(ten, renumber=True)[1:] == (f" ({told})", "")
    assert "renumber" not in repr(ImageFolder(path="x"))  # caches of latents know their pictures by it
    assert ImageFolder(path=str(ten)).renumbered() == told
    told = "class folder 3 has label 2, as there is no folder 2"
    assert labels(numbered(tmp_path / "gap", "0", "1", "3")) == ({0: 0, 1: 1, 3: 2}, f" ({told})", told)
    filled = numbered(tmp_path / "filled", "00", "01", "03", empty=("02",))
    assert labels(filled) == ({n: n for n in (0, 1, 3)}, "; left out: 1 folder without pictures", "")
    assert ImageFolder(path=str(filled)).open().classes == 4
    # An empty folder that fills no gap is no class, nor is one behind the last.
    other = numbered(tmp_path / "other", "0", "1", empty=("2", "7", "new"))
    assert labels(other) == ({0: 0, 1: 1}, "; left out: 3 folder without pictures", "")
    assert ImageFolder(path=str(other)).open().classes == 2
    behind = numbered(tmp_path / "behind", "0", "1", empty=("2",))
    assert labels(behind) == ({0: 0, 1: 1}, "; left out: 1 folder without pictures", "")
    assert ImageFolder(path=str(behind)).open().classes == 2


def test_the_number_that_is_absent_is_one_that_is(tmp_path: Path):
    cases = (("a", ("0", "3"), ("1",), 2), ("b", ("1", "4"), ("0", "2"), 3), ("c", ("5",), ("0",), 1))
    for case, full, empty, absent in cases:
        root = numbered(tmp_path / case, *full, empty=empty)
        wrong = next(i for i, name in enumerate(full) if int(name) != i)
        told = f"class folder {full[wrong]} has label {wrong}, as there is no folder {absent}"
        assert labels(root)[2] == ImageFolder(path=str(root)).renumbered() == told


def test_numbers_among_names_keep_the_order_by_name_and_are_refused_by_nobody(tmp_path: Path):
    root = numbered(tmp_path / "mixed", "1", "2", "10", empty=("3",))
    write(root / "unknown", x_png=Image.new("L", (4, 4), 99))
    told = " (labels in the order 1, 10, 2, unknown); left out: 1 folder without pictures"
    assert labels(root) == ({1: 0, 10: 1, 2: 2, 99: 3}, told, "")


def test_a_folder_is_listed_once_for_its_outline_and_what_its_labels_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root, times = numbered(tmp_path / "d", "1", "2"), [0]

    def counted(path: Path) -> Any:
        times[0] += 1
        return list_pictures(path)

    monkeypatch.setattr(images, "list_pictures", counted)
    data = ImageFolder(path=str(root))
    data.outline()
    assert data.renumbered().startswith("class folder 1 has label 0")
    assert times == [1]
    (root / "1").rename(root / "0")
    (root / "2").rename(root / "1")
    data.outline()
    assert data.renumbered() == ""


def test_one_folder_in_two_classes_is_refused(tmp_path: Path):
    disk = write(tmp_path / "disk", a_png=Image.new("L", (4, 4)))
    write(disk / "sub", b_png=Image.new("L", (4, 4)))
    links = {"same": {"cat": disk, "dog": disk}, "part": {"cat": disk, "dog": disk / "sub"},
             "whole": {"cat": disk / "sub", "dog": disk}}  # fmt: skip
    said = {"same": "dog: is the folder cat", "part": "dog: is the folder cat/sub", "whole": "dog/sub: is the folder cat"}
    for case, targets in links.items():
        for name, target in targets.items():
            write(tmp_path / case).joinpath(name).symlink_to(target)
        with pytest.raises(UserError, match=rf"{said[case]} again, whose pictures are of class cat; remove one of the"):
            ImageFolder(path=str(tmp_path / case)).open()
    # Within a class, or up to the whole, it is read once and nothing is lost.
    root = write(tmp_path / "up" / "cat", a_png=Image.new("L", (4, 4))).parent
    write(root / "cat" / "sub", b_png=Image.new("L", (4, 4)))
    (root / "cat" / "up").symlink_to(root)
    (root / "cat" / "twice").symlink_to(root / "cat" / "sub")
    assert len(ImageFolder(path=str(root)).open()) == 2
