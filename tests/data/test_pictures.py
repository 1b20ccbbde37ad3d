"""Pictures as people have them: every kind of file by every reader, folders, captions, shards, cuts, held-out parts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pictures import deep_png, encoded, make_tar, noise, png, write

from fewstep.algebra.draws import Draws
from fewstep.config import UserError
from fewstep.data import reader
from fewstep.data.images import Digits, ImageFolder, InMemory
from fewstep.data.pictures import Captions, WebDataset
from fewstep.data.reader import Pictures
from fewstep.data.text import read_prompts
from fewstep.eval.protocol.images import ImageFolder as Measured
from fewstep.eval.protocol.real import folder_pictures
from fewstep.pictures import CAP, PictureError, list_pictures

SIDE = 8


def images(folder: Path, name: str, data: bytes, **more: Any) -> torch.Tensor:
    write(folder).joinpath(name).write_bytes(data)
    return levels(ImageFolder(path=str(folder), **more).open())


def captions(folder: Path, name: str, data: bytes, **more: Any) -> torch.Tensor:
    write(folder, **{Path(name).stem + "_txt": b"words"}).joinpath(name).write_bytes(data)
    return levels(Captions(path=str(folder), **{"size": SIDE, **more}).open())


def shards(folder: Path, name: str, data: bytes, **more: Any) -> torch.Tensor:
    make_tar(write(folder) / "s.tar", [(name, data)])
    return levels(WebDataset(shards=str(folder / "s.tar"), **{"size": SIDE, **more}).open())


def reference(folder: Path, name: str, data: bytes, grey: bool = False, size: int = SIDE) -> torch.Tensor:
    write(folder, aa_png=data).joinpath(name).write_bytes(data)
    return folder_pictures(folder, size, 1 if grey else 3).read([0, 1])[1]


READERS: dict[str, Callable[..., torch.Tensor]] = {
    "images": images, "captions": captions, "webdataset": shards, "reference": reference,
}  # fmt: skip


def levels(data: Pictures) -> torch.Tensor:
    """The first picture, uint8 (c, h, w)."""
    x = (data.all()[0][0] + 1) * 127.5
    return x.round().to(torch.uint8)


def full(value: Any, mode: str, **info: Any) -> bytes:
    return encoded(Image.new(mode, (SIDE, SIDE), value), **info)


GREY = {
    "16-bit 32768": (deep_png(np.full((SIDE, SIDE), 32768)), 128),
    "16-bit 20000": (deep_png(np.full((SIDE, SIDE), 20000)), 78),
    "16-bit 65535": (deep_png(np.full((SIDE, SIDE), 65535)), 255),
    "black and white": (full(1, "1"), 255),
    "alpha over a hidden colour": (full((9, 0), "LA"), 255),
    "half transparent": (full((0, 128), "LA"), 127),
    "one grey value transparent": (full(7, "L", transparency=7), 255),
}
COLOUR = {
    "16-bit": (deep_png(np.full((SIDE, SIDE, 3), (65535, 257 * 100, 0))), (255, 100, 0)),
    "hidden colour": (full((200, 0, 90, 0), "RGBA"), (255, 255, 255)),
    "opaque": (full((200, 0, 90, 255), "RGBA"), (200, 0, 90)),
    "colour key": (full((1, 2, 3), "RGB", transparency=(1, 2, 3)), (255, 255, 255)),
    "other than the key": (full((1, 2, 4), "RGB", transparency=(1, 2, 3)), (1, 2, 4)),
}


@pytest.mark.parametrize("read", READERS)
def test_kinds_of_files_are_read_by_one_rule(tmp_path: Path, read: str):
    palette = Image.new("P", (SIDE, SIDE), 1)
    palette.putpalette([9, 90, 250, 0, 200, 0] + [0] * 762)
    kinds = COLOUR | {
        "palette": (encoded(palette), (0, 200, 0)),
        "palette, transparent": (encoded(palette, transparency=1), (255, 255, 255)),
    }
    for n, (data, value) in enumerate(kinds.values()):
        found = READERS[read](tmp_path / f"c{n}", "x.png", data)
        assert found.flatten(1).T.unique(dim=0).tolist() == [list(value)], list(kinds)[n]
    for n, (data, level) in enumerate(GREY.values()):
        found = READERS[read](tmp_path / f"g{n}", "x.png", data, grey=True)
        assert found.unique().tolist() == [level], list(GREY)[n]


@pytest.mark.parametrize("read", READERS)
def test_a_phones_picture_stands_as_it_was_taken(tmp_path: Path, read: str):
    from PIL import ImageOps

    for turn in range(1, 9):
        tag = Image.Exif()
        tag[0x0112] = turn
        data = encoded(Image.fromarray(noise(SIDE, SIDE, 3)), exif=tag)
        write(tmp_path / f"{turn}", x_png=data)
        with Image.open(tmp_path / f"{turn}" / "x.png") as stored:
            shown = np.asarray(ImageOps.exif_transpose(stored)).transpose(2, 0, 1)
        assert READERS[read](tmp_path / f"{turn}", "x.png", data).numpy().tolist() == shown.tolist()


def bomb(width: int, height: int) -> bytes:
    return png(width, height, b"")


UNREADABLE = {
    "Pillow's bomb": (bomb(40_000, 40_000), "exceeds limit"),
    "12,000 x 12,000": (bomb(12_000, 12_000), "is 12000 x 12000, more than 89 million pixels"),
    "a strip": (bomb(1, 60_000), "is 60000 x 1, more than 50 times as long as wide"),
    "text": (b"dear reader", "cannot be read"),
    "nothing": (b"", "cannot be read"),
    "cut": (encoded(Image.fromarray(noise(64, 64, 3)))[:3000], "cannot be read"),
    "floating point": (encoded(Image.new("F", (SIDE, SIDE)), "TIFF"), "is floating-point grey, whose white is not known"),
    "32 bits": (encoded(Image.new("I", (SIDE, SIDE)), "TIFF"), "is 32-bit grey, whose white is not known"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("read", READERS)
def test_what_cannot_be_read_is_one_line_with_the_files_name(tmp_path: Path, read: str, kind: str):
    data, reason = UNREADABLE[kind]
    with pytest.raises((UserError, PictureError)) as caught:
        READERS[read](tmp_path, "zz.png", data)
    told = str(caught.value)
    assert reason in told
    assert "zz" in told or "aa.png" in told
    assert "\n" not in told


def test_a_picture_at_the_cap_is_within_it():
    assert CAP < 12_000**2 <= 178_956_970  # else Pillow's own limit would be met first
    assert CAP > 9000 * 9900


def test_hidden_files_links_and_loops(tmp_path: Path):
    one = Image.new("L", (4, 4))
    root = write(tmp_path / "data", b_png=one, a_PNG=one, notes_txt=b"", film_gif=b"", Thumbs_db=b"")
    for folder in (".ipynb_checkpoints", "__MACOSX", ".git", "@eaDir"):
        write(root / folder, a_png=one)
    (root / "._b.png").write_bytes(b"no picture")
    write(tmp_path / "disk2", c_png=one, d_png=one)
    os.symlink(tmp_path / "disk2", root / "linked")
    os.symlink(root, root / "loop")
    os.symlink(tmp_path / "disk2", root / "linked-again")
    os.symlink(tmp_path / "disk2" / "c.png", root / "z.png")
    found = list_pictures(root)
    assert ["/".join(found.parts(f)) for f in found.files] == ["a.PNG", "b.png", "linked/c.png", "linked/d.png", "z.png"]
    twice = {k for k, v in found.skipped.items() if "read already" in v}
    assert twice == {"loop", "linked-again"}
    assert found.skipped["film.gif"] == "no picture (.gif)"
    assert sum(v == "hidden" for v in found.skipped.values()) == 6
    assert [f.name for f in Measured(root, 1).files] == [f.name for f in found.files]
    # A folder is read where it stands, not under a link that sorts before it.
    os.symlink(write(root / "real", e_png=one), root / "earlier")
    assert "real/e.png" in ["/".join(found.parts(f)) for f in list_pictures(root).files]
    (root / "gone.png").symlink_to(tmp_path / "unmounted" / "x.png")
    with pytest.raises(UserError, match=r"gone\.png: is a link to .*x\.png, which is not there"):
        ImageFolder(path=str(root)).open()


def labels_of(root: Path) -> list[int]:
    data = ImageFolder(path=str(root), grey=True).open()
    return [] if data.labels is None else data.labels.tolist()


def test_class_folders(tmp_path: Path):
    for c in range(12):
        write(tmp_path / "n" / str(c), x_png=Image.new("L", (4, 4), c))
    data = ImageFolder(path=str(tmp_path / "n"), grey=True).open()
    assert {int((x[0, 0, 0] + 1) * 127.5 + 0.5): int(y) for x, y in zip(*data.all(), strict=True)} == {
        c: c for c in range(12)
    }
    write(tmp_path / "n" / "one", x_png=Image.new("L", (4, 4)))
    assert sorted(labels_of(tmp_path / "n")) == list(range(13))
    data = ImageFolder(path=str(tmp_path / "n"), grey=True).open()
    assert [i.label for i in data.items if Path(i.name).parent.name in ("2", "10", "one")] == [2, 4, 12]
    assert "13 classes (labels in the order 0, 1, 10, ..., 9, one)" in data.about()
    for name in ("1", "01"):
        write(tmp_path / "two" / name, x_png=Image.new("L", (4, 4)))
    with pytest.raises(UserError, match=r"two: its class folders 0?1 and 0?1 are one number"):
        labels_of(tmp_path / "two")
    write(tmp_path / "n", loose_png=Image.new("L", (4, 4)))
    with pytest.raises(UserError, match=r"loose\.png: stands beside class folders \(0, 1, 10\)"):
        labels_of(tmp_path / "n")
    write(tmp_path / "e" / "full", x_png=Image.new("L", (4, 4)))
    write(tmp_path / "e" / "empty")
    data = ImageFolder(path=str(tmp_path / "e")).open()
    assert data.classes == 1
    assert data.skipped == {"empty": "folder without pictures"}


MARK = b"\xef\xbb\xbf"
TEXTS = ["a cat\u2028on a mat", "a dog\x85asleep", "two\x0cpages", "three\x0bcolumns\x1c", "plain"]


def test_captions_and_prompts_are_the_lines_of_their_files(tmp_path: Path):
    folder = write(tmp_path / "d", **{f"{i}_png": Image.new("RGB", (4, 4)) for i in range(5)})
    lines = [json.dumps({"file": f"{i}.png", "text": t}, ensure_ascii=False) for i, t in enumerate(TEXTS)]
    for mark in (b"", MARK):
        for end in ("\n", "\r\n"):
            (folder / "captions.jsonl").write_bytes(mark + (end.join(lines) + end).encode())
            opened = Captions(path=str(folder), size=4).open()
            assert [i.caption for i in opened.items] == TEXTS
            (tmp_path / "p.txt").write_bytes(mark + (end.join(TEXTS) + end + end).encode())
            assert read_prompts(tmp_path / "p.txt") == TEXTS
    (folder / "captions.jsonl").unlink()
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.txt").write_bytes(MARK + f"{text}\r\n".encode())
    assert [i.caption for i in Captions(path=str(folder), size=4).open().items] == TEXTS


BAD_LINES = {
    '{"file": "0.png", "text": null}': '"text" is null, expected a text',
    '{"file": "0.png", "text": NaN}': '"text" is NaN, expected a text',
    '{"file": "0.png", "text": ["a", "b"]}': '"text" is ["a", "b"], expected a text',
    '{"file": "0.png", "text": 3}': '"text" is 3, expected a text',
    '{"file": 0, "text": "a"}': '"file" is 0, expected a text',
    '{"file": "../0.png", "text": "a"}': "the picture '../0.png' is not inside",
    '{"file": "a/../../0.png", "text": "a"}': "is not inside",
    '{"file": "/etc/0.png", "text": "a"}': "is not inside",
    '{"file": "", "text": "a"}': "is not inside",
    '["0.png", "a"]': 'expected {"file": "NAME", "text": "CAPTION"}',
    "[" * 3000: 'expected {"file": "NAME", "text": "CAPTION"}',
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_caption_that_is_none_names_its_line(tmp_path: Path, line: str):
    folder = write(tmp_path / "d", **{"0_png": Image.new("RGB", (4, 4))})
    write(tmp_path, **{"0_png": Image.new("RGB", (4, 4))})
    told = folder / "captions.jsonl"
    told.write_text(f'{{"file": "0.png", "text": ""}}\n\n{line}\n')
    with pytest.raises(UserError) as caught:
        Captions(path=str(folder), size=4).open()
    assert str(caught.value).startswith(f"{told}:3: ")
    assert BAD_LINES[line] in str(caught.value)


def test_text_that_is_no_utf8_names_file_and_line(tmp_path: Path):
    folder = write(tmp_path / "d", x_png=Image.new("RGB", (4, 4)))
    for code, reason in (("latin-1", "is no UTF-8"), ("utf-16", "is UTF-16")):
        (folder / "x.txt").write_bytes("one\ncafé".encode(code))
        with pytest.raises(UserError, match=rf"x\.txt:[12]: .*{reason}; save the file as UTF-8"):
            Captions(path=str(folder), size=4).open()
        with pytest.raises(UserError, match=rf"prompts .*x\.txt:[12]: .*{reason}"):
            read_prompts(folder / "x.txt")
        make_tar(tmp_path / "t.tar", [("x.png", encoded(Image.new("L", (4, 4)))), ("x.txt", "é\n".encode(code))])
        with pytest.raises(UserError, match=rf"t\.tar:x: .*{reason}"):
            WebDataset(shards=str(tmp_path / "t.tar"), size=4).open()


def members(*keys: str) -> list[tuple[str, bytes]]:
    picture = encoded(Image.fromarray(noise(16, 16, 3)))
    return [(f"{key}.{kind}", data) for key in keys for kind, data in (("png", picture), ("txt", key.encode()))]


def test_a_shard_is_whole_or_refused_wherever_it_is_cut(tmp_path: Path):
    import tarfile

    whole = make_tar(tmp_path / "whole.tar", members("0", "1", "2"))
    assert [i.caption for i in WebDataset(shards=str(whole), size=4).open().items] == ["0", "1", "2"]
    with tarfile.open(whole) as tar:
        heads = [m.offset for m in tar]
        end = tar.offset
    data = whole.read_bytes()
    cut = tmp_path / "cut.tar"
    for length in [*heads, *(h + 512 for h in heads), *(h + 700 for h in heads), end - 512]:
        cut.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"cut\.tar"):
            WebDataset(shards=str(cut), size=4).open()
    (tmp_path / "joined.tar").write_bytes(data + data)
    with pytest.raises(UserError, match=r"joined\.tar: holds more after 2\.txt, which cannot be read"):
        WebDataset(shards=str(tmp_path / "joined.tar"), size=4).open()
    make_tar(tmp_path / "twice.tar", members("0", "1", "0"))
    with pytest.raises(UserError, match=r"twice\.tar: holds 0\.png twice"):
        WebDataset(shards=str(tmp_path / "twice.tar"), size=4).open()
    hidden = [("__MACOSX/._0.png", b"no picture"), ("./._0.txt", b"\xff")]
    make_tar(tmp_path / "mac.tar", [*hidden, *members("0")])
    assert len(WebDataset(shards=str(tmp_path / "mac.tar"), size=4).open()) == 1
    for text in (b'{"caption": null}', b'{"caption": ["a"]}', b"[1]"):
        make_tar(tmp_path / "null.tar", [members("0")[0], ("0.json", text)])
        with pytest.raises(UserError, match=r"null\.tar:0: its caption or class cannot be read"):
            WebDataset(shards=str(tmp_path / "null.tar"), size=4).open()


def photos(folder: Path) -> Path:
    shapes = [(20, 30), (24, 24), (31, 12), (40, 20), (9, 13), (60, 61)]
    files = {f"p{i}_png": Image.fromarray(noise(*s, 3, seed=i)) for i, s in enumerate(shapes)}
    return write(folder, **files)


def test_photos_of_any_size(tmp_path: Path):
    root = photos(tmp_path / "p")
    with pytest.raises(UserError) as caught:
        ImageFolder(path=str(root)).open()
    assert str(caught.value) == (
        f"{root / 'p1.png'}: is 24 x 24, but p0.png is 20 x 30 (5 of 6 differ); give data.size, the side in "
        "pixels to which the middle of every picture is resized"
    )
    data = ImageFolder(path=str(root), size=12).open()
    assert data.shape == (3, 12, 12)
    for i in range(6):
        with Image.open(root / f"p{i}.png") as picture:
            side = min(picture.size)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            cut = picture.crop((left, top, left + side, top + side)).resize((12, 12), Image.Resampling.LANCZOS)
        assert torch.equal(data.images[i], torch.from_numpy(np.array(cut)).permute(2, 0, 1).float() / 127.5 - 1)
    assert data.about() == (
        f"data {root}: 6 pictures (6 colour), 6 sizes from 9 x 13 to 60 x 61, the middle resized to 12 x 12 (lanczos)"
    )
    own = ImageFolder(path=str(root), size=9, resize="none").open()
    with Image.open(root / "p1.png") as picture:
        exact = np.array(picture)[7:16, 7:16]
    assert torch.equal(own.images[1], torch.from_numpy(exact).permute(2, 0, 1).float() / 127.5 - 1)
    with pytest.raises(UserError, match=r"p2\.png: is 31 x 12, smaller than 13; give resize: lanczos, or a smaller size"):
        ImageFolder(path=str(root), size=13, resize="none").open()
    with pytest.raises(ValueError, match="crop and resize change nothing without size"):
        ImageFolder(path=str(root), crop="random")


def test_cuts_and_mirrors_are_draws(tmp_path: Path):
    """Row by row the same numbers for any batch, any order, any data set object: nothing to keep for a resume."""
    root = photos(tmp_path / "p")
    settings: dict[str, Any] = {"path": str(root), "size": 9, "crop": "random", "flip": True, "resize": "none"}
    index = torch.arange(64)
    x, _ = ImageFolder(**settings).open().batch(Draws(11, index))
    again = ImageFolder(**settings).open()
    again.batch(Draws(12, index))
    parts = [again.batch(Draws(11, part))[0] for part in index.split(24)]
    assert torch.equal(x, torch.cat(parts))
    draws = Draws(11, index)
    k, at, mirrored = draws.integers(6), draws.uniform(), draws.uniform() < 0.5
    assert 16 < int(mirrored.sum()) < 48
    for row in range(64):
        with Image.open(root / f"p{int(k[row])}.png") as picture:
            left, top = (int(float(at[row]) * (n - 8)) for n in picture.size)
            cut = np.array(picture)[top : top + 9, left : left + 9]
        cut = cut[:, ::-1] if mirrored[row] else cut
        assert torch.equal(x[row], torch.from_numpy(cut.copy()).permute(2, 0, 1).float() / 127.5 - 1)
    # What is evaluated and encoded is never moved or mirrored.
    plain = ImageFolder(path=str(root), size=9, resize="none").open()
    assert torch.equal(again.images, plain.images)


def test_a_plain_folder_trains_on_the_numbers_of_a_tensor(tmp_path: Path):
    root = write(tmp_path / "d", **{f"{i}_png": Image.fromarray(noise(6, 5, 3, seed=i)) for i in range(7)})
    data = ImageFolder(path=str(root)).open()
    whole = InMemory(data.images, None, 0)
    for key in range(3):
        assert torch.equal(data.batch(Draws(key, torch.arange(16)))[0], whole.batch(Draws(key, torch.arange(16)))[0])


def test_large_sets_are_decoded_when_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = photos(tmp_path / "p")
    kept = ImageFolder(path=str(root), size=8).open()
    assert kept._kept is not None
    assert kept._kept.dtype == torch.uint8
    monkeypatch.setattr(reader, "CACHE", 0)
    monkeypatch.setattr(reader, "CHECKED", 0)
    data = ImageFolder(path=str(root), size=8).open()
    assert data._kept is None
    assert torch.equal(data.images, kept.images)
    (root / "p3.png").write_bytes((root / "p3.png").read_bytes()[:900])
    again = ImageFolder(path=str(root), size=8).open()
    with pytest.raises(UserError, match=r"p3\.png: cannot be read"):
        again.pictures(torch.tensor([0, 3]))
    monkeypatch.setattr(reader, "CHECKED", 2**20)
    with pytest.raises(UserError, match=r"p3\.png: cannot be read"):
        ImageFolder(path=str(root), size=8).open()


def test_a_plan_reads_no_picture(tmp_path: Path):
    from torch._subclasses.fake_tensor import FakeTensorMode

    write(tmp_path / "d" / "a", x_png=Image.new("RGB", (6, 6)))
    data = ImageFolder(path=str(tmp_path / "d"), size=6, crop="random", flip=True).open()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, label = data.batch(Draws(0, torch.arange(4)))
    assert x.shape == (4, 3, 6, 6)
    assert label.shape == (4,)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_what_is_held_out_is_never_trained_on(tmp_path: Path, share: float):
    root = write(tmp_path / "d", **{f"{i:02d}_png": Image.new("L", (4, 4), i) for i in range(40)})
    data = ImageFolder(path=str(root), grey=True, held_out=share).open()
    seen = set()
    for key in range(20):
        seen |= {round(float((x[0, 0, 0] + 1) * 127.5)) for x in data.batch(Draws(key, torch.arange(64)))[0]}
    real = data.reference()
    held = {int(x[0, 0, 0]) for x in real.read(real.rows())}
    assert (len(held), seen) == (round(40 * share), set(range(40)) - held)
    assert max(np.diff(sorted(held))) <= round(1 / share) + 1
    assert real.about == "the run's data, held out of training"
    digits = Digits(held_out=share).open()
    real = digits.reference()
    assert real.count == int(1797 * share)
    assert set(real.labels.tolist()) == set(range(10))  # type: ignore[union-attr]
    assert len(digits.all()[0]) == 1797


def test_held_out_leaves_something_on_both_sides(tmp_path: Path):
    root = write(tmp_path / "d", **{f"{i}_png": Image.new("L", (4, 4), i) for i in range(10)})
    with pytest.raises(UserError, match=r"data .*d: held_out 0\.1 of 10 samples leaves 1 out; at least 2 and not all"):
        ImageFolder(path=str(root), held_out=0.1).open()
    with pytest.raises(ValueError, match="held_out"):
        ImageFolder(path=str(root), held_out=1.0)
    plain = ImageFolder(path=str(root)).open()
    assert plain.reference().count == 10
    assert plain.reference().about == "the run's data, which it was trained on"


def test_pictures_without_a_line_are_counted(tmp_path: Path):
    root = write(tmp_path / "d", **{f"{k}_png": Image.new("L", (4, 4)) for k in "xyz"})
    told = root / "captions.jsonl"
    told.write_text('{"file": "./x.png", "text": "red"}\n')
    assert Captions(path=str(root), size=4).open().about().endswith("; left out: 2 not in captions.jsonl")
    (root / "link.png").symlink_to("y.png")
    told.write_text("".join(f'{{"file": "{k}.png", "text": "red"}}\n' for k in ("x", "z", "link")))
    assert Captions(path=str(root), size=4).open().skipped == {}
    # What was not asked for is said, and neither in the way nor in the place of the others.
    (root / "gone.png").symlink_to("nothing")
    (root / "sub").mkdir()
    (root / "sub" / "self.png").symlink_to("self.png")
    os.mkfifo(root / "pipe.png")
    (root / "w.png").write_bytes((root / "x.png").read_bytes())
    data = Captions(path=str(root), size=4).open()
    assert len(data) == 3
    left = "; left out: 2 a link to nothing, 1 a pipe, a device or a socket, 1 not in captions.jsonl"
    assert data.about().endswith(left)


@pytest.mark.parametrize("kind", ["a link to nothing", "a pipe or a device", "a folder"])
@pytest.mark.parametrize("name", [None, "captions.jsonl"])
def test_a_caption_file_that_is_none_is_refused(tmp_path: Path, kind: str, name: str | None):
    root = write(tmp_path / "d", x_png=Image.new("L", (4, 4)), x_txt=b"red")
    told = root / "captions.jsonl"
    {"a l": lambda: told.symlink_to("gone"), "a p": lambda: os.mkfifo(told), "a f": told.mkdir}[kind[:3]]()
    with pytest.raises(
        UserError, match=rf"captions\.jsonl: is {kind}, expected a file of captions; put it there, or rem"
    ):
        Captions(path=str(root), size=4, captions=name).open()


def test_a_name_that_is_no_files_is_missing(tmp_path: Path):
    root = write(tmp_path / "d", x_png=Image.new("L", (4, 4)))
    names = {"x" * 300: r"x{57}\.\.\.", "x\\u0000.png": r"'x\\x00\.png'"}
    for name, shown in names.items():
        (root / "captions.jsonl").write_text(f'{{"file": "{name}", "text": "red"}}\n')
        with pytest.raises(UserError, match=rf"captions\.jsonl:1: names the picture {shown}, which is not in"):
            Captions(path=str(root), size=4).open()
    (root / "captions.jsonl").write_text('{"file": "x\\ud83d.png", "text": "red"}\n')  # half a character
    with pytest.raises(UserError, match=r"captions\.jsonl:1: expected"):
        Captions(path=str(root), size=4).open()
