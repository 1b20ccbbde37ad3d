"""A teacher's legs: stopped, gone on with, shipped, and begun again from what was shipped, counted through."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.bench import relay
from fewstep.config import UserError
from fewstep.files import read_json
from fewstep.recipe.schema import Recipe
from fewstep.recipe.store import load
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


def test_legs_are_counted_through_stops_and_a_start_from_what_was_shipped(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "run"
    trained(run, 4, monkeypatch)
    trained(run, 6, monkeypatch)
    looked = relay.look(run, "ema_0.99", 1, 20)
    assert relay.rows(run)[-1] == {"look": json.loads(json.dumps(looked))}
    shipped = relay.ship("digits-teacher", run, assets, "ema_0.9997", [1], 20)
    assert sorted(p.name for p in assets.iterdir()) == ["digits-teacher"]
    assert sorted(p.name for p in shipped.iterdir()) == [
        "README.md",
        "fewstep.json",
        "model_index.json",
        "relay.json",
        "scheduler",
        "unet",
    ]
    told = read_json(shipped / "relay.json")
    assert [(leg["from"], leg["to"], leg["moments"], leg["seed"]) for leg in told["legs"]] == [
        (0, 4, "fresh", 0),
        (4, 6, "kept", 0),
    ]
    assert told["updates"] == 6
    assert [m["heun_steps"] for m in told["measured"]] == [1]
    assert [(e["done"], e["average"]) for e in told["evaluations"]] == [(6, "ema_0.99")]
    assert 0 < told["evaluations"][0]["train_core_s"] <= told["core_seconds"]["training"] + 1
    text = (shipped / "README.md").read_text()
    assert "| legs | 2, of which 1 with fresh moments |" in text
    assert f"1 Heun steps, guidance 1, N = 20 | {told['measured'][0]['value']:.2f} |" in text
    assert "Trained for 6 steps" in text

    again = tmp_path / "again"
    begun = open_product(run).net.state_dict()
    start = Trainer(relay.of_leg("digits-teacher", again), cpu=True).product.state_dict()
    assert begun.keys() == start.keys()
    for key, v in begun.items():
        assert torch.allclose(start[key].float(), v.float(), atol=2e-3), key
    for end in (2, 4):  # gone on with although the weights that it began from have been shipped anew
        trained(again, end, monkeypatch)
        second = read_json(relay.ship("digits-teacher", again, assets, "ema_0.9997", [1], 20) / "relay.json")
    assert [(leg["from"], leg["to"], leg["moments"], leg["seed"]) for leg in second["legs"]] == [
        (0, 4, "fresh", 0),
        (4, 6, "kept", 0),
        (6, 8, "fresh", 1),
        (8, 10, "kept", 1),
    ]
    assert second["updates"] == 10
    assert second["core_seconds"]["training"] >= told["core_seconds"]["training"]
    assert [e["done"] for e in second["evaluations"]] == [6]
    assert [row["updates"] for row in second["shipped_before"]] == [6, 8]


def test_an_average_that_is_not_there_is_named(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = tmp_path / "run"
    trained(run, 2, monkeypatch)
    with pytest.raises(UserError, match=r"--average ema_0.5: .* has ema_0.99, ema_0.9997"):
        relay.look(run, "ema_0.5", 1, 20)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint"):
        relay.look(run, "ema_0.99", 1, 20)
