"""Files that are not ours stay: what --force deletes, links, leftovers of a kill, and two runs in one directory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tiny_runs import in_child, tiny

from fewstep.commands.claim import prepare
from fewstep.config import UserError
from fewstep.files import LOCK, MARK, aside_name, atomic_path, clear_leftovers, read_mark, strangers, write_mark
from fewstep.recipe.store import dump
from fewstep.train.claim import held

SHORT = ("before.0.steps=10", "train.steps=20")


def claimed(folder: Path) -> Path:
    prepare(tiny(*SHORT), folder, resume=False, force=False)
    return folder


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_force_deletes_no_folder_that_only_looks_like_a_run(tmp_path: Path):
    other = tmp_path / "cakes"
    other.mkdir()
    (other / "recipe.yaml").write_text("my cake: flour\n")
    (other / "thesis.tex").write_text("years of work")
    before = everything(other)
    with pytest.raises(UserError, match=r"is not a run directory that fewstep made; --force deletes only those"):
        prepare(tiny(*SHORT), other, resume=False, force=True)
    assert everything(other) == before


@pytest.mark.parametrize(
    "name", ["thesis.tex", "notes/plan.txt", "export/mine.txt", "report/notes.md", "samples/thesis.tex", "lora/mine"]
)
def test_force_deletes_no_file_that_fewstep_did_not_write(tmp_path: Path, name: str):
    run = claimed(tmp_path / "run")
    (run / "checkpoints" / "step-00000010").mkdir(parents=True)
    (run / "checkpoints" / "step-00000010" / "student.safetensors").write_text("weights")
    (run / "export").mkdir()
    (run / "export" / "model_index.json").write_text("{}")
    write_mark(run / "export", "export")
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text("mine")
    before = everything(run)
    with pytest.raises(UserError, match=rf"{name}, which fewstep did not write; move that away first"):
        prepare(tiny(*SHORT), run, resume=False, force=True)
    assert everything(run) == before
    (run / name).unlink()
    if name.startswith("notes"):
        (run / "notes").rmdir()
    prepare(tiny(*SHORT), run, resume=False, force=True)
    assert sorted(everything(run)) == [MARK, "recipe.yaml"]


def test_nothing_is_deleted_through_a_link(tmp_path: Path):
    run = claimed(tmp_path / "run")
    (tmp_path / "link").symlink_to(run)
    before = everything(run)
    with pytest.raises(UserError, match="is a symbolic link; fewstep deletes nothing through one"):
        prepare(tiny(*SHORT), tmp_path / "link", resume=False, force=True)
    assert everything(run) == before
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "picture.png").write_text("mine")
    (run / "samples").symlink_to(outside)
    prepare(tiny(*SHORT), run, resume=False, force=True)
    assert (outside / "picture.png").read_text() == "mine"


def test_resume_takes_no_folder_for_its_own(tmp_path: Path):
    """A folder with a recipe of the user's: nothing in it changes, so that no later --force deletes it."""
    other = tmp_path / "exp1"
    other.mkdir()
    (other / "recipe.yaml").write_text("# mine\n" + dump(tiny(*SHORT)))
    (other / "thesis.tex").write_text("years of work")
    (other / ".lock").write_text("precious")
    before = everything(other)
    for resume, force in ((False, False), (True, False), (False, True)):
        with held(other), pytest.raises(UserError, match=r"is already used|is not a run directory that fewstep made"):
            prepare(tiny(*SHORT), other, resume, force)
        assert everything(other) == before


@pytest.mark.parametrize("name", ["checkpoints", "samples", "report", "recipe.yaml", "log.jsonl"])
def test_a_run_with_planted_links_is_not_continued(tmp_path: Path, name: str):
    run = claimed(tmp_path / "run")
    victim = tmp_path / "victim"
    if "." in name:
        victim.write_bytes((run / name).read_bytes() if (run / name).exists() else b"")
        (run / name).unlink(missing_ok=True)
    else:
        victim.mkdir()
    (run / name).symlink_to(victim)
    with pytest.raises(UserError, match=rf"{name}: is a symbolic link; fewstep does not write through links"):
        prepare(tiny(*SHORT), run, resume=True, force=False)


def test_planted_links_under_temporary_names_are_not_followed(tmp_path: Path):
    """Names that older versions wrote to in the open."""
    run = claimed(tmp_path / "run")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in (".recipe.tmp", "log.tmp", aside_name("recipe.yaml")):
        (run / name).symlink_to(victim)
    prepare(tiny(*SHORT), run, resume=True, force=False)
    assert victim.read_text() == "mine"


def test_the_lock_outlives_force_and_not_its_process(tmp_path: Path):
    run = tmp_path / "run"
    with held(run):
        claimed(run)
        inode = (run / LOCK).stat().st_ino
        prepare(tiny(*SHORT), run, resume=False, force=True)
        assert (run / LOCK).stat().st_ino == inode

    def dies_with_it() -> None:
        context = held(run)
        context.__enter__()
        os._exit(0)

    assert in_child(dies_with_it) == 0
    with held(run):
        pass


def test_leftovers_of_a_killed_process_go_and_a_running_ones_stay(tmp_path: Path):
    def leave() -> None:
        with atomic_path(tmp_path / "picture.png") as aside:
            aside.write_text("half")
            (tmp_path / aside_name("export")).mkdir()
            (tmp_path / aside_name("export") / "weights").write_text("half")
            os._exit(0)

    assert in_child(leave) == 0
    (tmp_path / ".picture.png").write_text("mine")
    with atomic_path(tmp_path / "other.png") as own:
        assert len(list(tmp_path.iterdir())) == 4
        clear_leftovers(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted([".picture.png", own.name])
        own.write_text("whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".picture.png", "other.png"]


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": 3, "files": []}', '{"kind": "export", "files": {}}', "[" * 100000])
def test_a_damaged_mark_is_none(tmp_path: Path, text: str):
    (tmp_path / MARK).write_text(text)
    assert read_mark(tmp_path) is None


def test_a_mark_that_names_files_elsewhere_makes_them_nobodys(tmp_path: Path):
    folder = tmp_path / "export"
    folder.mkdir()
    (tmp_path / "mine.txt").write_text("mine")
    (folder / MARK).write_text(json.dumps({"kind": "export", "files": ["../mine.txt", MARK]}))
    (folder / "weights").symlink_to(tmp_path)
    assert strangers(folder) == ["weights"]


@pytest.mark.parametrize("role", ["/tmp/weights", "../weights", "a/b", "a\0b", "x" * 300, "ema_0.9", "", "1st", "a.b"])
def test_a_role_cannot_name_a_file_elsewhere(role: str):
    with pytest.raises(ValueError, match=r"cannot name a file"):
        tiny(*SHORT, f"roles={json.dumps({role: {'name': 'copy', 'of': 'student'}})}")
