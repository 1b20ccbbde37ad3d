"""What may be resumed, what is refused, and what a signal leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import TINY, contents, environment, names, records, same, tiny, train

from fewstep.commands.claim import prepare
from fewstep.config import UserError
from fewstep.train.state import checkpoints, read_state
from fewstep.train.trainer import Hooks, Trainer

SHORT = ("before.0.steps=10", "train.checkpoint_every=10", "optim.default.decay=constant")


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 10 + 20 steps."""
    run = tmp_path_factory.mktemp("short") / "run"
    train(run, *SHORT, "train.steps=20")
    return run


@pytest.fixture
def copied(short: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(short, tmp_path / "run"))


def test_a_finished_run_goes_on_when_train_steps_grows(copied: Path, tmp_path: Path):
    train(tmp_path / "long", *SHORT, "train.steps=30")
    trainer = train(copied, *SHORT, "train.steps=30")
    assert trainer.progress.done == 40
    assert same(
        contents(tmp_path / "long" / "checkpoints" / "step-00000040"),
        contents(copied / "checkpoints" / "step-00000040"),
    ) == []  # fmt: skip
    assert same(records(tmp_path / "long"), records(copied)) == []


def test_a_finished_run_has_nothing_to_do(copied: Path):
    before = contents(copied / "checkpoints" / "step-00000030")
    trainer = train(copied, *SHORT, "train.steps=20")
    assert trainer.progress.done == 30
    assert same(before, contents(copied / "checkpoints" / "step-00000030")) == []


def test_fewer_steps_than_are_done_is_refused(copied: Path):
    with pytest.raises(UserError, match=r"has already done 20 steps of the last stage; train\.steps must be at least"):
        train(copied, *SHORT, "train.steps=15")


def test_another_recipe_is_refused_and_changes_nothing(copied: Path):
    before = (copied / "recipe.yaml").read_text()
    with pytest.raises(UserError) as caught:
        prepare(tiny(*SHORT, "train.steps=20", "method.gan.weight=0.5", "train.seed=1"), copied, True, False)
    assert str(caught.value) == (
        f"{copied}: was started with another recipe, so it cannot be resumed:\n"
        "  method.gan.weight: 0.01 -> 0.5\n  train.seed: 0 -> 1\n"
        f"To go on from its weights with other settings: --from {copied} and another --out"
        " (in Python: Trainer.go_on_from)"
    )
    assert (copied / "recipe.yaml").read_text() == before
    prepare(tiny(*SHORT, "train.steps=99", "train.keep=5"), copied, resume=True, force=False)


def test_a_used_directory_is_never_overwritten_unasked(copied: Path, tmp_path: Path):
    recipe = tiny(*SHORT, "train.steps=20")
    with pytest.raises(UserError, match=r"is already used; continue it with --resume, or overwrite it with --force$"):
        prepare(recipe, copied, resume=False, force=False)
    assert len(checkpoints(copied / "checkpoints")) == 2
    prepare(recipe, copied, resume=False, force=True)
    assert names(copied) == [".fewstep", ".fewstep-lock", "recipe.yaml"]
    other = tmp_path / "letters"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    for resume, force in ((False, False), (True, False), (False, True)):
        with pytest.raises(UserError, match=r"is not a run directory|is already used"):
            prepare(recipe, other, resume, force)
    assert (other / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize("name", ["student.safetensors", "optim-student.pt", "ema_0.9.safetensors"])
def test_a_truncated_checkpoint_is_named(copied: Path, name: str):
    path = copied / "checkpoints" / "step-00000030" / name
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2])
    with pytest.raises(UserError) as caught:
        train(copied, *SHORT, "train.steps=30")
    assert str(caught.value) == (
        f"{path}: is damaged ({size // 2} of {size} bytes, checksum differs); delete step-00000030 to use an older one"
    )
    shutil.rmtree(path.parent)
    assert train(copied, *SHORT, "train.steps=20").progress.done == 30


def test_a_flipped_byte_is_noticed(copied: Path):
    path = copied / "checkpoints" / "step-00000030" / "critic.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        read_state(path.parent)


def test_damaged_state_and_missing_files_are_named(copied: Path):
    newest = copied / "checkpoints" / "step-00000030"
    (newest / "critic.safetensors").unlink()
    with pytest.raises(UserError, match=r"critic\.safetensors: is missing from the checkpoint"):
        read_state(newest)
    (newest / "state.json").write_text('{"progress": {"done"')
    with pytest.raises(UserError, match=r"state\.json: cannot be read"):
        read_state(newest)


def test_weights_of_another_network_are_refused(copied: Path):
    trainer = Trainer(tiny(*SHORT, "train.steps=30", "student.width=24"), None, cpu=True)
    trainer.attach(copied)  # as its own directory it would be refused for its recipe
    with pytest.raises(UserError, match=r"does not fit this recipe's network: size mismatch for net\.first\.weight"):
        trainer.resume()


def test_a_full_disk_leaves_the_older_checkpoint_and_nothing_else(copied: Path, monkeypatch: pytest.MonkeyPatch):
    import errno

    from fewstep.train import state

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for target in ("save_tensors", "torch.save"):
        run = Path(shutil.copytree(copied, copied.parent / target))
        with monkeypatch.context() as patch:
            patch.setattr(f"fewstep.train.state.{target}", full)
            with pytest.raises(UserError) as caught:
                train(run, *SHORT, "train.steps=30")
        assert str(caught.value) == (
            f"{run}/checkpoints/step-00000040: the checkpoint could not be written: the disk is full; "
            "free some space and continue with --resume"
        )
        assert names(run / "checkpoints") == ["step-00000020", "step-00000030"]
        assert state.read_state(run / "checkpoints" / "step-00000030")[0].done == 30
        assert train(run, *SHORT, "train.steps=30").progress.done == 40


class Killed(BaseException):
    """Passes every `except`, as a kill does."""


def test_the_one_checkpoint_that_is_kept_is_whole_wherever_the_next_is_cut_off(
    copied: Path, monkeypatch: pytest.MonkeyPatch
):
    from fewstep.train import state

    save, rename, rmtree = state.save_tensors, os.rename, shutil.rmtree

    def half_written(tensors: Any, path: Path) -> None:
        save(tensors, path)
        path.write_bytes(path.read_bytes()[:200])
        raise Killed

    def before_the_rename(source: Any, target: Any) -> None:
        raise Killed

    def before_the_old_one_goes(source: Any, target: Any) -> None:
        if str(target).endswith(".old.tmp"):
            raise Killed
        rename(source, target)

    def while_the_old_one_goes(path: Path, **options: Any) -> None:
        if path.name.endswith(".old.tmp"):
            (path / "student.safetensors").unlink()
            raise Killed
        rmtree(path, **options)

    rmtree(copied / "checkpoints" / "step-00000020")
    points = (
        ("fewstep.train.state.save_tensors", half_written, 30),
        ("os.rename", before_the_rename, 30),
        ("os.rename", before_the_old_one_goes, 40),
        ("shutil.rmtree", while_the_old_one_goes, 40),
    )
    for target, point, left in points:
        run = Path(shutil.copytree(copied, copied.parent / point.__name__))
        with monkeypatch.context() as patch:
            patch.setattr(target, point)
            with pytest.raises(Killed):
                train(run, *SHORT, "train.steps=30", "train.keep=1")
        newest = checkpoints(run / "checkpoints")[-1]
        assert read_state(newest)[0].done == left, point.__name__
        assert train(run, *SHORT, "train.steps=40", "train.keep=1").progress.done == 50
        assert names(run / "checkpoints") == ["step-00000050"]


def test_damage_to_the_only_checkpoint_says_that_there_is_no_other(copied: Path):
    shutil.rmtree(copied / "checkpoints" / "step-00000020")
    path = copied / "checkpoints" / "step-00000030" / "student.safetensors"
    path.unlink()
    with pytest.raises(UserError) as caught:
        train(copied, *SHORT, "train.steps=30")
    assert str(caught.value) == (
        f"{path}: is missing from the checkpoint; no older checkpoint was kept (train.keep), so the run has to start "
        "again with --force"
    )


def test_sigterm_saves_and_exits_130(tmp_path: Path):
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "fewstep",
        "run",
        "toy/dmd2",
        *TINY,
        "train.steps=100000",
        "--out",
        str(run),
    ]
    command += ["train.checkpoint_every=99999", "evaluate=null"]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path
    )
    try:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and not ((run / "log.jsonl").exists() and process.poll() is None):
            assert process.poll() is None, process.stdout and process.stdout.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=200)[0]
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "Traceback" not in output
    (saved,) = checkpoints(run / "checkpoints")
    done = read_state(saved)[0].done
    assert done == int(saved.name.removeprefix("step-"))
    assert f"stopped at step {done}; continue with: fewstep run toy/dmd2" in output
    assert "--resume" in output
    assert str(run) in output.split("continue with:")[1], "the printed command must name the directory"
    # What was stopped between two log records continues to the same means.
    upto = (done // 5 + 2) * 5
    settings = ("train.steps=100000", "train.checkpoint_every=99999", "evaluate=null")
    continued = Trainer(tiny(*settings), run, cpu=True)
    assert continued.resume()
    (tmp_path / "fresh").mkdir()
    reference = Trainer(tiny(*settings), tmp_path / "fresh", cpu=True)

    class Enough(Exception):
        pass

    def stop(trainer: Trainer) -> None:
        if trainer.progress.done == upto:
            raise Enough

    for trainer in (continued, reference):
        trainer.hooks = Hooks(on_step=stop)
        with pytest.raises(Enough):
            trainer.fit()
    assert records(run)[-1]["done"] == upto
    assert same(records(tmp_path / "fresh"), records(run)) == []


def test_a_student_that_never_moves_stops_the_run(monkeypatch: pytest.MonkeyPatch):
    """The critic's good updates must not hide that every student update is refused."""
    from fewstep.methods import dmd2

    monkeypatch.setattr(dmd2.obj, "logistic_generator", lambda logits: logits.mean() * float("nan"))
    trainer = Trainer(tiny("before=[]", "copy={}", "train.max_skips=3", "train.steps=50"), None, cpu=True)
    start = [p.clone() for p in trainer.roles.student.parameters()]
    with pytest.raises(UserError) as caught:
        trainer.fit()
    assert str(caught.value).startswith("stopped at step 2: 3 updates of student in a row had non-finite gradients")
    assert trainer.progress.skipped == 3
    assert trainer.loop.optim["student"].updates == 0
    assert trainer.loop.optim["critic+discriminator"].updates == 4
    assert same(start, list(trainer.roles.student.parameters())) == []
    assert same(start, list(trainer.session.ema[0].module.parameters())) == []


def test_log_cut_drops_what_a_kill_left(tmp_path: Path):
    from fewstep.train.log import Log, read_log

    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"done": n}) + "\n" for n in (5, 10, 15, 20)) + '{"done": 25, "ma')
    assert [r["done"] for r in read_log(path)] == [5, 10, 15, 20]
    Log(path).cut(12)
    assert path.read_text() == '{"done": 5}\n{"done": 10}\n'
    assert os.listdir(tmp_path) == ["log.jsonl"]
