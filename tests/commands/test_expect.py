"""`fewstep recipes expect`: bands from run directories into a recipe, and what `fewstep health` makes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fewstep.commands.expect import expect
from fewstep.commands.health import bands_of, report
from fewstep.commands.health_plots import figure_of
from fewstep.config import UserError
from fewstep.recipe.store import load
from fewstep.train.bands import beginning
from fewstep.train.trainer import Trainer
from fewstep.train.verdicts import last_stage

SHORT = (
    "student.width=16",
    "student.depth=2",
    "before=[]",
    "copy={}",
    "train.steps=40",
    "train.batch=32",
    "train.log_every=2",
    "train.readings_every=4",
    "train.sample_every=0",
)
RECIPE = "extends: toy/dmd2\nabout: mine\n# expected by nobody yet\n"


def trained(run: Path, recipe: str, *settings: str) -> Path:
    Trainer(load(recipe, [*SHORT, *settings]), run, cpu=True).fit()
    return run


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with the bands of two runs, which lie beside it as a and b."""
    folder = tmp_path_factory.mktemp("expect")
    recipe = folder / "mine.yaml"
    recipe.write_text(RECIPE)
    runs = [trained(folder / name, str(recipe), f"train.seed={seed}") for name, seed in (("a", 1), ("b", 2))]
    assert expect(runs, recipe) == f"{recipe}: bands of 2 runs\n"
    return recipe


def test_bands_stand_in_the_recipe_once(mine: Path):
    text = mine.read_text()
    assert text.startswith(RECIPE)
    expected = load(str(mine)).expected
    assert expected is not None
    assert {"match", "dsm", "health/diversity", "samples/mean"} <= set(expected.bands)
    runs = [mine.parent / name for name in "ab"]
    expect(runs, mine)
    assert mine.read_text() == text
    assert expect(runs, None) in text


def test_health_says_whether_a_run_is_within_them(mine: Path, tmp_path: Path):
    run = trained(tmp_path / "c", str(mine), "train.seed=1")
    assert "as expected" in report(run)
    assert "within the band of the 2 reference runs" in report(run)
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    expected, why = bands_of(run)
    assert expected is not None
    assert why == ""
    axes = {axis.get_title(): axis for axis in figure_of(last_stage(rows), expected, beginning(rows)).axes}
    band = expected.bands["match"]
    (shaded,) = axes["match"].collections
    assert shaded.get_paths()[0].get_extents().intervaly.tolist() == [min(band.low), max(band.high)]
    assert "match" not in {axis.get_title() for axis in figure_of(last_stage(rows)).axes}
    away = [{**r, "match": 40.0} if r["done"] > 20 else r for r in rows]
    (run / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in away))
    text = report(run)
    assert "WARN   match unexpected" in text
    assert "match left the band of the 2 reference runs in updates 21 to 24: 40, expected" in text


def test_bands_of_another_batch_are_not_compared(mine: Path, tmp_path: Path):
    run = trained(tmp_path / "d", str(mine), "train.batch=16")
    assert "the recipe's expected bands are not compared: they are of train.batch 32, this run has 16" in report(run)
    assert bands_of(run) == (None, "they are of train.batch 32, this run has 16")
    with pytest.raises(UserError, match=r"d: is no run of the recipe of .*a: their batch differs"):
        expect([mine.parent / "a", run], None)


def test_what_is_no_run_or_no_recipe_is_refused(mine: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"nothing: has no log\.jsonl"):
        expect([tmp_path / "nothing"], None)
    with pytest.raises(UserError, match=r"none\.yaml: is no recipe file"):
        expect([mine.parent / "a"], tmp_path / "none.yaml")
    shutil.copytree(mine.parent / "a", tmp_path / "e")
    shutil.rmtree(tmp_path / "e" / "checkpoints")
    with pytest.raises(UserError, match="e: has no checkpoint, which says what teacher it had"):
        expect([tmp_path / "e"], None)
