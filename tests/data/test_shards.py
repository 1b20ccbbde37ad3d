"""Shards: what goes on where it stopped, what several fill at once, what is read of them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.config import UserError
from fewstep.data import shards as shards_module
from fewstep.data.shards import Shards, sparse
from fewstep.files import LOCK, MARK, read_mark

LEFT = ".00000-x.999999999.fewstep-tmp.safetensors"
"""What a process that is gone was writing."""


def refused(open_it: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        open_it()
    return str(caught.value)


def test_shards_go_on_where_they_stopped_and_notice_damage(tmp_path: Path):
    x = torch.arange(7.0)[:, None] * torch.ones(7, 3)

    def shards() -> Shards:
        return Shards(tmp_path / "s", {"vae": "a" * 64}, 7, rows=3, remedy="do this")

    first = shards()
    assert [list(r) for r in first.missing()] == [[0, 1, 2], [3, 4, 5], [6]]
    first.write(first.missing()[1], {"x": x[3:6]})
    (tmp_path / "s" / LEFT).write_bytes(b"half")
    second = shards()
    assert [list(r) for r in second.missing()] == [[0, 1, 2], [6]]
    assert refused(second.check).startswith(f"{tmp_path / 's'}: holds 3 of 7 rows; run the command")
    for span in second.missing():
        second.write(span, {"x": x[span.start : span.stop]})
    third = shards()
    third.check()
    k = torch.tensor([6, 0, 4, 4])
    assert torch.equal(third.take(k)["x"], x[k])
    with pytest.raises(ValueError, match="3 rows are needed"):
        third.write(range(0, 3), {"x": x[:2]})
    told = refused(lambda: Shards(tmp_path / "s", {"vae": "b" * 64}, 7, remedy="do this"))
    assert told == f"{tmp_path / 's'}: was made with another vae, aaaaaaaaaaaa… instead of bbbbbbbbbbbb…; do this"
    assert "holds 7 rows, 8 are needed" in refused(lambda: Shards(tmp_path / "s", {}, 8))
    data = bytearray((tmp_path / "s" / "00001.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "s" / "00001.safetensors").write_bytes(bytes(data))
    assert refused(shards().check).startswith(f"{tmp_path / 's' / '00001.safetensors'}: is damaged")


def test_two_that_write_one_file_at_once_leave_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Both have the file open in writing before either is done, as processes that start cold together have.
    both = threading.Barrier(2, timeout=0.5)
    save = shards_module.save_file

    def slow(tensors: dict[str, Tensor], path: Path) -> None:
        save(tensors, path)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait()

    monkeypatch.setattr(shards_module, "save_file", slow)
    x = torch.arange(3.0)[:, None]
    made = [Shards(tmp_path / "s", {"vae": "a"}, 3) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda s: s.write(range(3), {"x": x}), made)) == [None, None]
    for s in made:
        s.check()
        assert torch.equal(s.take(torch.tensor([2, 0]))["x"], x[[2, 0]])
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [MARK, LOCK, "00000.safetensors", "index.json"]


def test_of_several_that_claim_a_folder_one_fills_it(tmp_path: Path):
    fast, order = threading.Event(), []

    def fill(name: str) -> None:
        s = Shards(tmp_path / "s", {"vae": "a"}, 5, rows=2)
        with s.claimed() as todo:
            order.append((name, len(todo)))
            fast.set()
            if todo:
                time.sleep(0.2)  # the other one is waiting by now
            for span in todo:
                s.write(span, {"x": torch.full((len(span), 1), float(span.start))})
        s.check()
        assert s.take(torch.tensor([4, 1]))["x"].flatten().tolist() == [4.0, 0.0]

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(fill, "first")
        assert fast.wait(5)
        others = [pool.submit(fill, "second"), pool.submit(fill, "third")]
        for done in (first, *others):
            done.result(timeout=10)
    assert order[0] == ("first", 3)
    assert {todo for _, todo in order[1:]} == {0}


def test_a_claim_that_fails_is_free_for_the_next(tmp_path: Path):
    s = Shards(tmp_path / "s", {"vae": "a"}, 2)
    with pytest.raises(RuntimeError, match="the encoder"), s.claimed():
        raise RuntimeError("the encoder")
    (tmp_path / "s" / LEFT).write_bytes(b"of one that died")
    again = Shards(tmp_path / "s", {"vae": "a"}, 2)
    with again.claimed() as todo:
        assert todo == [range(2)]
        again.write(todo[0], {"x": torch.zeros(2, 1)})
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [MARK, LOCK, "00000.safetensors", "index.json"]


def test_rows_are_read_alone_and_few_files_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards_module, "OPEN", 3)
    x = torch.arange(7.0)[:, None, None] * torch.ones(7, 300, 1000)
    s = Shards(tmp_path / "s", {"vae": "a"}, 7, rows=1)
    for span in s.missing():
        s.write(span, {"x": x[span.start : span.stop], "label": torch.arange(span.start, span.stop)})
    got = s.take(torch.tensor([6, 0, 3, 6, 5, 1]))
    assert torch.equal(got["x"], x[[6, 0, 3, 6, 5, 1]])
    assert got["label"].tolist() == [6, 0, 3, 6, 5, 1]
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/s/" in line}
    files = {str(p.resolve()) for p in (tmp_path / "s").glob("*.safetensors")}
    assert mapped & files == {str((tmp_path / "s" / f"0000{n}.safetensors").resolve()) for n in (1, 5, 6)}


def test_a_folder_of_somebody_else_is_not_filled(tmp_path: Path):
    """Neither a file of ours by name alone, nor a lock, makes a folder ours; a link to one that is leads there."""
    theirs = tmp_path / "thesis"
    theirs.mkdir()
    for name in ("lock", "notes.tmp", "index.md"):
        (theirs / name).write_text("mine")
        before = sorted(theirs.iterdir())
        told = refused(Shards(theirs, {"vae": "a"}, 2).claimed().__enter__)
        assert told == f"{theirs}: is not empty and no folder of shards that fewstep made; choose another folder"
        assert sorted(theirs.iterdir()) == before
        (theirs / name).unlink()
    made, link = Shards(tmp_path / "s", {"vae": "a"}, 2), tmp_path / "link"
    made.write(range(2), {"x": torch.zeros(2, 1)})
    assert (read_mark(tmp_path / "s") or {})["kind"] == "folder of shards"
    link.symlink_to(tmp_path / "s")
    (tmp_path / "s" / "00000.safetensors").unlink()
    with Shards(link, {"vae": "a"}, 2).claimed() as todo:
        assert todo == [range(2)]


def test_rows_of_any_length_come_back_whole_and_zeros_are_not_stored(tmp_path: Path):
    x = torch.arange(1.0, 61).reshape(5, 4, 3)
    rows = [x[0], x[1].clone(), x[2][:2], torch.zeros(4, 3), torch.zeros(0, 3), x[3].clone(), x[4].clone()]
    rows[1][1:3] = 0  # padding in the middle, as Krea 2 has it
    rows[5][2:] = 0
    rows[6][1, 1:] = 0  # not zero throughout
    shards = Shards(tmp_path / "s", {}, 7, rows=5)
    for span in shards.missing():
        shards.write(span, {"text": [sparse(r) for r in rows[span.start : span.stop]], "n": torch.tensor(span)})
    again = Shards(tmp_path / "s", {}, 7)
    for i, row in enumerate(rows):
        taken = again.take(torch.tensor([i]))
        assert sorted(taken) == ["n", "text"]
        assert torch.equal(taken["text"][0], row)
        assert taken["n"].tolist() == [i]
    some = again.take(torch.tensor([2, 5, 0]))["text"]
    assert torch.equal(some, torch.stack([torch.cat((rows[2], torch.zeros(2, 3))), rows[5], rows[0]]))
    held = [load_file(f) for f in sorted((tmp_path / "s").glob("*.safetensors"))]
    assert [len(h["text"]) for h in held] == [4 + 2 + 2 + 0 + 0, 2 + 4]
    assert [h["text.at"].tolist() for h in held] == [[0, 1, 2, 3, 0, 3, 0, 1], [0, 1, 0, 1, 2, 3]]
