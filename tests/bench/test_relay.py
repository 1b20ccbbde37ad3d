"""A teacher's legs: stopped, gone on with, shipped, and begun again from what was shipped, counted through."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.bench import relay
from fewstep.config import UserError
from fewstep.files import read_json
from fewstep.recipe.schema import Recipe
from fewstep.recipe.store import load, load_run
from fewstep.train.product import open_product
from fewstep.train.trainer import Trainer

SMALL = (
    "student.channels=[8,16]",
    "train.batch=8",
    "train.steps=12",
    "train.sample_every=0",
    "train.log_every=2",
    "train.ema=[0.9997, 0.99]",
    "optim.student.decay=constant",
)


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Assets of their own, in which a tiny digits teacher is trained by `relay`; a note every other update."""
    folder = tmp_path / "assets"
    folder.mkdir()

    def small(name: str, changes: Any = ()) -> Recipe:
        kept = [s for s in SMALL if not (changes and s.startswith("student."))]
        return load(name.removesuffix("-long"), [*kept, *changes])

    monkeypatch.setattr(relay, "load", small)
    monkeypatch.setattr(relay, "expanded", lambda name: folder / name.removeprefix("assets:"))
    monkeypatch.setattr(relay, "EVERY", 2)
    return folder


def trained(run: Path, until: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leg that is stopped."""
    with monkeypatch.context() as patched:
        hooked = Trainer._call_hooks

        def stop(self: Trainer, finished: bool) -> bool:
            self._stop = self.progress.done >= until
            return hooked(self, finished)

        patched.setattr(Trainer, "_call_hooks", stop)
        relay.train("digits-teacher", run)


QUICK = relay.How("ema_0.9997", (1,), (1.0,), 20)


def test_legs_are_counted_through_stops_and_a_start_from_what_was_shipped(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "run"
    trained(run, 4, monkeypatch)
    trained(run, 6, monkeypatch)
    (looked,) = relay.look(run, replace(QUICK, average="ema_0.99"))
    assert relay.rows(run)[-1] == {"look": json.loads(json.dumps(looked))}
    shipped = relay.ship("digits-teacher", run, assets, QUICK)
    assert [p.name for p in assets.iterdir()] == ["digits-teacher"]
    files = ["README.md", "fewstep.json", "model_index.json", "relay.json", "scheduler", "unet"]
    assert sorted(p.name for p in shipped.iterdir()) == files
    told = read_json(shipped / "relay.json")
    assert stretches(told) == [(0, 4, "fresh", 0), (4, 6, "kept", 0)]
    assert told["updates"] == 6
    (measured,), (looked,) = told["measured"], told["evaluations"]
    assert (measured["heun_steps"], measured["guidance"], measured["samples"]) == (1, 1.0, 20)
    assert {"accuracy", "diversity", "reference", "core_s"} <= set(measured)
    assert (looked["done"], looked["average"], looked["leg"]) == (6, "ema_0.99", 2)
    assert 0 < looked["train_core_s"] <= told["core_seconds"]["training"] + 1
    assert told["core_seconds"]["evaluation"] == round(measured["core_s"] + looked["core_s"])
    text = (shipped / "README.md").read_text()
    assert "| legs | 2, of which 0 began from the weights that had shipped |" in text
    assert f"1 Heun steps, guidance 1, N = 20 | {measured['value']:.2f} |" in text
    assert "Trained for 6 steps" in text

    again = tmp_path / "again"
    begun = open_product(run).net.state_dict()
    start = Trainer(relay.of_leg("digits-teacher", again), cpu=True).product.state_dict()
    assert begun.keys() == start.keys()
    for key, v in begun.items():
        assert torch.allclose(start[key].float(), v.float(), atol=2e-3), key
    for end in (2, 4):  # gone on with although the weights that it began from have been shipped anew
        trained(again, end, monkeypatch)
        second = read_json(relay.ship("digits-teacher", again, assets, QUICK) / "relay.json")
    assert "_name_or_path" not in read_json(assets / "digits-teacher" / "unet" / "config.json")
    assert stretches(second) == [(0, 4, "fresh", 0), (4, 6, "kept", 0), (6, 8, "fresh", 1), (8, 10, "kept", 1)]
    assert second["updates"] == 10
    assert "| legs | 4, of which 1 began from the weights that had shipped |" in (shipped / "README.md").read_text()
    assert second["core_seconds"]["training"] >= told["core_seconds"]["training"]
    spent = [told["core_seconds"]["evaluation"], *(r["shipped"]["core_s"] for r in relay.rows(again) if "shipped" in r)]
    assert len(spent) == 3
    assert second["core_seconds"]["evaluation"] == round(sum(spent))
    assert [e["done"] for e in second["evaluations"]] == [6]
    assert [row["updates"] for row in second["shipped_before"]] == [6, 8]

    shutil.rmtree(again)  # the machine is another one, but for the notes
    trained(again, 2, monkeypatch)
    third = relay.history(second, again, 2)
    assert stretches(third)[4:] == [(10, 12, "fresh", 2)]
    assert (third["updates"], len(third["legs"])) == (12, 5)
    (looked,) = relay.look(again, replace(QUICK, average="ema_0.99"))
    assert (looked["done"], looked["leg"]) == (12, 5)


def stretches(told: dict[str, Any]) -> list[tuple[int, int, str, int]]:
    return [(leg["from"], leg["to"], leg["moments"], leg["seed"]) for leg in told["legs"]]


def test_a_leg_that_a_kill_left_without_a_checkpoint_is_none_and_a_cut_line_is_passed_over(tmp_path: Path):
    run = tmp_path / "run"
    relay.note(run, updates=100, core_s=7, evaluated_s=1)
    for leg, done, seconds in ((0, 50, 3.0), (25, 60, 9.0), (25, 75, 12.0)):
        relay.note(run, leg=leg, started="", commit="", moments="kept" if leg else "fresh", seed=0)
        relay.note(run, done=done, spent=seconds)
    with relay.notes(run).open("a") as f:
        f.write('{"done": 80, "spe')
    assert [(leg["from"], leg["to"]) for leg in relay.legs(run, 75)] == [(100, 125), (125, 175)]
    assert relay.spent(run, 75) == 7 + 12
    assert relay.spent(run, 55) == 7 + 3


def test_what_is_wrong_is_named(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = tmp_path / "run"
    trained(run, 2, monkeypatch)
    with pytest.raises(UserError, match=r"--average ema_0.5: .* has ema_0.99, ema_0.9997"):
        relay.look(run, replace(QUICK, average="ema_0.5"))
    about = replace(load_run(run), about="of another data set")
    with monkeypatch.context() as patched:
        patched.setattr(relay, "of_leg", lambda name, folder: about)
        with pytest.raises(UserError, match="another recipe than digits-teacher-long"):
            relay.train("digits-teacher", run)
    (assets / "digits-teacher").mkdir()
    with pytest.raises(UserError, match=r"is not a teacher with a relay\.json"):
        relay.ship("digits-teacher", run, assets, QUICK)
    (assets / "digits-teacher").rmdir()
    monkeypatch.setattr(relay, "LARGEST", 1000)
    with pytest.raises(UserError, match="0 may ship"):
        relay.ship("digits-teacher", run, assets, QUICK)
    assert list(assets.iterdir()) == []
    relay.notes(run).unlink()
    with pytest.raises(UserError, match=r"does not tell what .* began from"):
        relay.ship("digits-teacher", run, assets, QUICK)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint"):
        relay.look(run, QUICK)
