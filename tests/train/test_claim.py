"""A directory that a trainer is given is its own: marked, of one recipe, and kept to one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import in_child, names, records

from fewstep.config import UserError
from fewstep.files import LOCK, MARK
from fewstep.recipe.schema import Recipe
from fewstep.recipe.store import load, load_run
from fewstep.train.claim import held
from fewstep.train.trainer import Trainer


def recipe(*settings: str) -> Recipe:
    """Two updates of a small DMD2."""
    return load("toy/dmd2", ["before=[]", "copy={}", "train.steps=2", "train.batch=8", "train.ema=[]", *settings])


def trainer_in(run: Path, *settings: str) -> Trainer:
    return Trainer(recipe(*settings), run, cpu=True)


def test_two_processes_do_not_train_in_one_directory(tmp_path: Path):
    run = tmp_path / "run"
    with held(run):

        def second() -> None:
            words = rf"is being trained in by process {os.getppid()}; wait for it or stop"
            with pytest.raises(UserError, match=words), held(run):
                pass

        assert in_child(second) == 0
    with held(run):
        pass


def test_a_lock_is_not_taken_through_a_link(tmp_path: Path):
    run, victim = tmp_path / "run", tmp_path / "victim"
    run.mkdir()
    victim.write_text("mine")
    (run / LOCK).symlink_to(victim)
    with pytest.raises(UserError, match=r"\.fewstep-lock: cannot be opened"), held(run):
        pass
    assert victim.read_text() == "mine"


def test_a_trained_directory_is_continued_and_never_trained_over(tmp_path: Path):
    run = tmp_path / "run"
    first, early = trainer_in(run), trainer_in(run)
    first.fit()
    assert names(run) == sorted([MARK, LOCK, "checkpoints", "log.jsonl", "recipe.yaml"])
    again = trainer_in(run, "train.steps=3")
    for other in (early, again):  # one that was made before, one after
        with pytest.raises(UserError, match=rf"^{run}: holds an earlier training; call resume\(\) before fit\(\)"):
            other.fit()
    assert again.resume()
    again.fit()
    assert (again.progress.done, load_run(run)) == (3, again.recipe)
    again.fit()  # its own checkpoints are no one else's


def test_another_recipe_is_refused_with_what_differs(tmp_path: Path):
    run = tmp_path / "run"
    trainer_in(run).fit()
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(UserError) as caught:
        trainer_in(run, "train.batch=16")
    assert "  train.batch: 8 -> 16\n" in str(caught.value)
    assert "Trainer.go_on_from" in str(caught.value)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    on = trainer_in(tmp_path / "on", "train.batch=16", "train.steps=4")
    on.go_on_from(run)
    on.fit()
    assert on.progress.done == 4


@pytest.mark.parametrize("kind", ["thesis", "recipe", "link"])
def test_a_directory_of_somebody_elses_is_left_as_it_is(tmp_path: Path, kind: str):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    if kind == "recipe":
        (other / "recipe.yaml").write_text("my cake: flour")
    if kind == "link":
        (other / "checkpoints").symlink_to(tmp_path)
    before = names(other)
    with pytest.raises(UserError, match=r"is not a run directory that fewstep made|is a symbolic link"):
        trainer_in(other)
    assert names(other) == before
    with pytest.raises(UserError, match=r"thesis\.tex: is a file; choose another directory \(--out\)"):
        trainer_in(other / "thesis.tex")


def test_a_trainer_keeps_its_directory_while_it_trains(tmp_path: Path):
    run = tmp_path / "run"
    trainer = trainer_in(run)

    def refused(call: Any) -> None:
        with pytest.raises(UserError, match=rf"is being trained in by process {os.getpid()}"):
            call()

    with held(run):
        for call in (lambda: trainer_in(run), trainer.resume, trainer.fit):
            refused(call)
    trainer.hooks.on_step = lambda _: refused(lambda: trainer_in(run))
    trainer.fit()
    assert trainer.progress.done == 2


def test_what_a_killed_training_logged_before_its_first_checkpoint_goes(tmp_path: Path):
    run = tmp_path / "run"
    trainer = trainer_in(run, "train.log_every=1")
    (run / "log.jsonl").write_text('{"done": 1, "of": "another time"}\n')
    trainer.fit()
    assert [line["done"] for line in records(run)] == [1, 2]


def test_without_a_directory_nothing_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(recipe(), cpu=True)
    trainer.fit()
    assert names(tmp_path) == []
    with pytest.raises(UserError, match="run: this trainer has no directory"):
        trainer.resume()


def test_a_recipe_by_its_name_is_not_loaded_here():
    with pytest.raises(TypeError, match=r"recipe: expected a Recipe, which fewstep\.load reads, not a str"):
        Trainer("toy/dmd2")  # type: ignore[arg-type]
