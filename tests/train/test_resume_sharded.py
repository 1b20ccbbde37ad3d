"""FSDP2 over two processes: the losses, samples and checkpoints of one process, there and back."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import two_processes
from tiny_runs import SPLIT, contents, record_gradients, records, tiny
from tiny_teacher import make_teacher, student_settings

LATE = ("train.checkpoint_every=3", "train.keep=2")
SETS = ("student={name: lora, rank: 2}", "critic={name: lora, rank: 3}", "train.steps=1", "train.batch=4")
LINEAR = ("optim={default: {lr: 1e-2, eps: 1e-2}}",)


def sampled(trainer: Any) -> torch.Tensor:
    from fewstep.train.product import product_of

    product = product_of(trainer.recipe, trainer.product.eval(), trainer.data, "x")
    return product.draw(6, seed=5)


def adapters_run(teacher: Path, run: Path, *settings: str) -> Any:
    from fewstep.recipe.store import load
    from fewstep.train.trainer import Trainer

    run.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(load("digits-dmd2", [*student_settings(teacher), *SETS, *LINEAR, *settings]), run, cpu=True)
    trainer.fit()
    return trainer


def sharded(folder: Path | str) -> None:
    """What each of two processes runs."""
    import os

    from fewstep.train.parallel import is_sharded
    from fewstep.train.trainer import Trainer

    folder, rank, fsdp = Path(folder), int(os.environ["RANK"]), "train.parallel=fsdp"
    seen = record_gradients(folder / "two", *LATE, fsdp)
    trainer = Trainer(tiny(*SPLIT, *LATE, fsdp), folder / "two", cpu=True)
    trainer.resume()
    assert all(is_sharded(p) for p in trainer.roles.student.parameters())
    assert not any(is_sharded(p) for p in trainer.roles.discriminator.parameters())
    torch.save({"gradients": [g for _, g in seen], "samples": sampled(trainer)}, folder / f"told-{rank}.pt")
    continued = Trainer(tiny(*SPLIT, *LATE, fsdp), folder / "one-then-two", cpu=True)
    assert continued.resume()
    assert continued.progress.done == 3
    continued.fit()
    adapters = adapters_run(folder / "teacher", folder / "adapters-two", fsdp)
    assert all(is_sharded(p) for p in adapters.roles.student.parameters())
    trainer.accelerator.end_training()


def until_three(run: Path, to: Path) -> Path:
    """A copy of a run as it stood after three steps."""
    shutil.copytree(run, to)
    shutil.rmtree(to / "checkpoints" / "step-00000006")
    return to


def same_weights(left: Path, right: Path, names: Sequence[str]) -> None:
    a, b = contents(left), contents(right)
    for name in names:
        assert a[name].keys() == b[name].keys()
        for key, value in a[name].items():
            torch.testing.assert_close(b[name][key], value, rtol=0, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[torch.Tensor]]:
    folder = tmp_path_factory.mktemp("sharded")
    one = [g for _, g in record_gradients(folder / "one", *LATE)]
    until_three(folder / "one", folder / "one-then-two")
    make_teacher(folder / "teacher")
    two_processes(sharded, folder)
    return folder, one


NAMES = ("student", "critic", "discriminator", "ema_0.9", "ema_0.99")
END = Path("checkpoints") / "step-00000006"


def test_two_sharded_processes_are_one(runs: tuple[Path, list[torch.Tensor]]):
    folder, one = runs
    told = [torch.load(folder / f"told-{r}.pt", weights_only=True) for r in (0, 1)]
    assert len(one) == len(told[0]["gradients"]) > 10
    for a, b, c in zip(one, told[0]["gradients"], told[1]["gradients"], strict=True):
        assert torch.equal(b, c)
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)
    same_weights(folder / "one" / END, folder / "two" / END, NAMES)
    for a, b in zip(records(folder / "one"), records(folder / "two"), strict=True):
        for key in (k for k in a if not k.startswith("health/")):
            assert b[key] == pytest.approx(a[key], rel=2e-5, abs=1e-6), key
    from fewstep.train.trainer import Trainer

    trainer = Trainer(tiny(*SPLIT, *LATE), folder / "one", cpu=True)
    assert trainer.resume()
    want = sampled(trainer)
    for t in told:
        torch.testing.assert_close(t["samples"], want, rtol=0, atol=1e-5)


def test_a_checkpoint_of_one_is_continued_by_two_and_back(runs: tuple[Path, list[torch.Tensor]]):
    from fewstep.train.trainer import Trainer

    folder, _ = runs
    same_weights(folder / "one" / END, folder / "one-then-two" / END, NAMES)
    back = until_three(folder / "two", folder / "two-then-one")
    trainer = Trainer(tiny(*SPLIT, *LATE), back, cpu=True)
    assert trainer.resume()
    assert trainer.progress.done == 3
    trainer.fit()
    same_weights(folder / "one" / END, back / END, NAMES)
    left, right = (contents(r / END)["optim-student"]["state"] for r in (folder / "one", folder / "one-then-two"))
    assert left.keys() == right.keys()
    for i, state in left.items():
        for key, value in state.items():
            torch.testing.assert_close(right[i][key], value, rtol=1e-3, atol=1e-7)


def test_adapters_on_a_sharded_base(runs: tuple[Path, list[torch.Tensor]]):
    folder, _ = runs
    one = adapters_run(folder / "teacher", folder / "adapters-one")
    end = Path("checkpoints") / "step-00000001"
    same_weights(folder / "adapters-one" / end, folder / "adapters-two" / end, ("student", "critic", "ema_0.98"))
    assert any(float(p.abs().max()) > 0 for k, p in one.roles.student.own.items() if "lora_B" in k)
