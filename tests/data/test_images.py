"""Folders of pictures: which class a picture has."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

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
