"""Progressive stages whose teacher is the stage before, kept in the first teacher's own tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_teacher import make_teacher

from fewstep.commands.report import first_teacher
from fewstep.config import RecipeError
from fewstep.recipe.store import load
from fewstep.train.trainer import Hooks, Trainer

SHORT = ["train.batch=6", "train.sample_every=0", "train.log_every=1", "evaluate=null", "train.steps=2"]
STAGES = [f"before.{i}.steps=2" for i in range(3)]


def stages(of: str, target: str) -> list[str]:
    """Three stages and the last one, halving 8 to 4 to 2 to 1."""
    method = "{{name: progressive, of: {0}, steps: {1}, weight: x0}}"
    rows = [
        f"{{method: {method.format(of, n)}, steps: 2" + (f", copy: {{{target}: student}}}}" if n < 8 else "}")
        for n in (8, 4, 2)
    ]
    return [f"before=[{', '.join(rows)}]", f"copy={{{target}: student}}", f"method.of={of}"]


def trained(settings: list[str]) -> tuple[Trainer, list[dict[str, Any]], list[int]]:
    """A run in memory: the trainer, its losses, and where the teacher's first tensor lies after each step."""
    losses: list[dict[str, Any]] = []
    places: list[int] = []

    def on_step(t: Trainer) -> None:
        # Samples are read against the teacher's, or the data's where the run writes into the teacher.
        losses.append({k: v for k, v in t.last_record.items() if k != "seconds" and not k.startswith("samples/")})
        places.append(next(t.roles.teacher.parameters()).data_ptr())

    trainer = Trainer(load("digits-progressive", settings), None, hooks=Hooks(on_step=on_step), cpu=True)
    places.append(next(trainer.roles.teacher.parameters()).data_ptr())
    trainer.fit()
    return trainer, losses, places


def test_stages_in_place_equal_stages_with_a_copy_and_hold_two_networks(tmp_path: Path) -> None:
    common = [*SHORT, f"teacher.path={make_teacher(tmp_path / 'teacher')}"]
    here, losses, places = trained([*common, *STAGES])
    there, copied, _ = trained([*common, "roles={previous: {name: copy, of: teacher}}", *stages("previous", "previous")])
    assert losses == copied
    assert len(losses) == 8
    for name, value in there.roles.student.state_dict().items():
        assert torch.equal(value, here.roles.student.state_dict()[name]), name
    # One teacher in one place all along, and no third network.
    assert len(set(places)) == 1
    assert sorted(here.roles) == ["student", "teacher"]
    previous = there.roles.previous.state_dict()
    assert all(torch.equal(v, previous[k]) for k, v in here.roles.teacher.state_dict().items())
    # What is measured at the end is the recipe's teacher, not the last stage's.
    first = first_teacher(here).state_dict()
    assert all(torch.equal(v, there.roles.teacher.state_dict()[k]) for k, v in first.items())
    assert any(not torch.equal(v, here.roles.teacher.state_dict()[k]) for k, v in first.items())


def test_a_resumed_run_finds_the_overwritten_teacher(tmp_path: Path) -> None:
    settings = [
        *SHORT,
        *STAGES,
        f"teacher.path={make_teacher(tmp_path / 'teacher')}",
        "train.checkpoint_every=1",
    ]
    whole, _, _ = trained(settings)
    recipe = load("digits-progressive", settings)
    stopped = Trainer(
        recipe,
        tmp_path / "run",
        hooks=Hooks(on_step=lambda t: t._ask_to_stop() if t.progress.done == 5 else None),
        cpu=True,
    )
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    again = Trainer(recipe, tmp_path / "run", cpu=True)
    assert again.resume()
    again.fit()
    for role in ("teacher", "student"):
        for name, value in whole.roles[role].state_dict().items():
            assert torch.equal(value, again.roles[role].state_dict()[name]), (role, name)


def test_an_adapter_on_the_teacher_forbids_to_overwrite_it() -> None:
    with pytest.raises(RecipeError, match="student is an adapter on the teacher's weights"):
        load("digits-progressive", ["student={name: lora}"])
