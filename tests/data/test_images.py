"""Folders of pictures: which are read, and which class a picture has."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from tiny_pictures import write

from fewstep.config import UserError
from fewstep.data.images import ImageFolder


def test_sub_folders_sorted_by_name_are_the_classes(tmp_path: Path):
    for name, grey in (("b/y.png", 255), ("a/x.png", 0), ("a/z.png", 51), ("c/w.png", 102)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (3, 2), grey).save(path)
    images, labels = ImageFolder(path=str(tmp_path), grey=True).open().all()
    assert labels is not None
    assert labels.tolist() == [0, 0, 1, 2]
    assert images.shape == (4, 1, 2, 3)
    assert [round(float(x.mean()), 6) for x in images] == [-1.0, -0.6, 1.0, -0.2]


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
