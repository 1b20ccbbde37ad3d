"""A tracker is given what the log is given."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_runs import records, tiny

from fewstep.config import UserError
from fewstep.train.trainer import Trainer

SHORT = ("before=[]", "copy={}", "train.steps=3", "train.log_every=1", "train.trackers=[tensorboard]")


def test_tensorboard_has_every_reading_of_the_log(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = Trainer(tiny(*SHORT), tmp_path, cpu=True)
    trainer.fit()
    trainer.accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "fewstep"))
    events.Reload()
    log = records(tmp_path)
    assert [r["done"] for r in log] == [1, 2, 3]
    assert {"match", "dsm", "discriminator", "lr/student", "grad_norm/student"} <= set(log[0])
    for name in log[0]:
        found = {e.step: e.value for e in events.Scalars(name)}
        assert found == pytest.approx({r["done"]: r[name] for r in log if name in r}, rel=1e-6), name


def test_a_resumed_run_tells_every_step_once(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for kept in (3, 2):
        trainer = Trainer(tiny(*SHORT, "train.checkpoint_every=1", "train.keep=3"), tmp_path, cpu=True)
        assert trainer.resume() == (kept == 2)
        assert trainer.progress.done == (2 if kept == 2 else 0)
        trainer.fit()
        trainer.accelerator.end_training()
        # As if it had been killed after step 3 was logged and before it was saved.
        shutil.rmtree(tmp_path / "checkpoints" / "step-00000003")
    events = EventAccumulator(str(tmp_path / "fewstep"))
    events.Reload()
    assert [e.step for e in events.Scalars("match")] == [1, 2, 3]


def test_a_tracker_that_cannot_start_says_so(tmp_path: Path):
    trainer = Trainer(tiny(*SHORT), tmp_path, cpu=True)
    (tmp_path / "fewstep").write_text("in the way")
    with pytest.raises(UserError, match=r"^train\.trackers: tensorboard cannot start: .*fewstep"):
        trainer.fit()
