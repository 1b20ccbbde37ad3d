"""`fewstep fit`: a folder that opens like a run, the table beside it, and what is refused before a network is called."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from calling import called
from tiny_pipelines import make_pipeline
from tiny_teacher import edit_json, make_run, make_teacher

from fewstep.algebra.fitted import fit_history, nodes
from fewstep.algebra.guidance import Guided
from fewstep.algebra.sampling import sample
from fewstep.algebra.searched import search_levels
from fewstep.commands.fitting import SUBSTEPS, Wish, expected_calls, fit, noise_of
from fewstep.files import read_mark
from fewstep.train.fitted import read_fit
from fewstep.train.product import open_product

SMALL = ("--calls", "2,3", "--points", "6", "--noises", "3")
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))

    return partial(called, capfd)


@pytest.fixture
def refused(call: Call, tmp_path: Path) -> Callable[..., str]:
    def run(*arguments: Any) -> str:
        code, out, err = call("fit", *arguments, "--out", tmp_path / "none")
        assert code == 2, err
        assert "Traceback" not in out + err
        assert not (tmp_path / "none").exists()
        return " ".join(err[err.index("error: ") :].removeprefix("error: ").split())

    return run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that says which of its 11 rows is the null class."""
    folder = make_teacher(tmp_path_factory.mktemp("models") / "teacher")
    (folder / "fewstep.json").write_text('{"classes": 10}')
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "student", teacher)


@torch.no_grad()
def test_a_fit_opens_samples_and_is_measured(call: Call, teacher: Path, tmp_path: Path):
    out = tmp_path / "fit"
    code, said, err = call("fit", teacher, *SMALL, "--preset", "fd-house-digits", "--samples", 20, "--out", out)
    assert code == 0, err
    assert (read_mark(out) or {}).get("kind") == "fit"
    fitted, product = read_fit(out), open_product(out)
    assert (fitted.counts, product.trained, product.classes, len(product.sampler.steps)) == ((2, 3), (2, 3), 10, 3)
    # What stands in it is the search and the fit on its own noises.
    net, grid = open_product(teacher), nodes(product.net.process, 6)
    noise, cond = noise_of(net, 7, "calibration", 3)
    path = search_levels(net.net, noise, cond, 2, grid)
    levels = tuple(grid[i] for i in path[:-1])
    assert fitted.samplers[0].steps == levels
    assert fitted.samplers[0].history == pytest.approx(fit_history(net.net, noise, cond, levels, SUBSTEPS), abs=1e-6)
    # Its table: four samplers at each number of calls, by the metric; printed, stored and on the card.
    assert [r["name"] for r in fitted.rows[:4]] == ["even DDIM", "even DPM++2M", "searched levels", "fitted history"]
    assert {(r["calls"], r["metric"], r["samples"]) for r in fitted.rows} == {
        (n, "FD (house-digits)", 20) for n in (2, 3)
    }
    assert "searched levels" in said
    assert f"{fitted.rows[0]['value']:.3g}" in (out / "README.md").read_text()
    # Drawn by the command and by the library alike.
    assert call("sample", out, "--steps", 2, "--count", 10, "--out", tmp_path / "two.png")[0] == 0
    index = torch.arange(4)
    drawn = product.with_steps(2).images(index, index, 5)
    from fewstep.algebra.sampling import seeded

    torch.testing.assert_close(drawn, sample(fitted.samplers[0], net.net, seeded(5, index, net.shape)[0], index))
    code, said, err = call("eval", out, "--preset", "fd-house-digits", "--samples", 20)
    assert code == 0, err
    assert "fit, 2 steps" in said
    assert "fit, 3 steps" in said
    code, _, err = call("sample", out, "--steps", 5, "--out", tmp_path / "no.png")
    assert code == 2
    assert "--steps 5: was fitted for 2, 3 calls; fit others with `fewstep fit --calls 5`" in err
    assert "the loop that draws it is in the fit's README.md" in " ".join(call("export", out)[2].split())
    code, _, err = call("run", "toy/cd", "--out", out, "--resume")
    assert code == 2
    assert "is not a run directory" in err
    assert not (out / ".fewstep-lock").exists()


def test_the_guidance_of_the_fit_is_stored_and_another_refused(call: Call, teacher: Path, tmp_path: Path):
    out = tmp_path / "fit"
    options = (*SMALL, "--guidance", 2.5, "--no-table", "--out", out)
    code, _, err = call("fit", teacher, *options)
    assert code == 0, err
    product = open_product(out)
    assert isinstance(product.net, Guided)
    assert (product.net.scale, read_fit(out).guidance) == (2.5, 2.5)
    assert torch.equal(product.net.null(torch.tensor([3, 4])), torch.tensor([10, 10]))
    bare = open_product(teacher)
    assert fit(bare, Wish(calls=(2,), points=6, noises=3)).samplers[0] != read_fit(out).samplers[0]
    picture = ("--steps", 2, "--count", 4, "--out", tmp_path / "x.png")
    assert call("sample", out, *picture, "--guidance", 2.5)[0] == 0
    code, _, err = call("sample", out, *picture, "--guidance", 3)
    assert code == 2
    assert "--guidance 3: this sampler was fitted at guidance 2.5 and holds there only" in " ".join(err.split())
    code, _, err = call("fit", teacher, *options)
    assert code == 2
    assert "overwrite it with --force" in " ".join(err.split())
    assert call("fit", teacher, *options, "--force")[0] == 0


def test_a_recipes_teacher_with_its_data_and_a_teacher_that_changed(call: Call, student: Path, tmp_path: Path):
    out = tmp_path / "fit"
    code, said, err = call("fit", student, "--teacher", *SMALL, "--solver", "2m", "--out", out)
    assert code == 0, err
    assert "distance to the fine trajectory, 60 samples" in said  # this recipe measures nothing
    assert "2M on them" in said
    product = open_product(out)
    assert product.recipe is not None
    assert (read_fit(out).of, product.shape, product.changed) == ("recipe", (1, 8, 8), ())
    edit_json(out / "fitted.json", digest="3 files, 9 bytes")
    assert "has changed since the fit; fit it again" in " ".join(open_product(out).changed)


def test_levels_alone_may_be_of_one_call(call: Call, teacher: Path, tmp_path: Path):
    out = tmp_path / "fit"
    told = ("--calls", "1,2", "--points", "4", "--noises", "2", "--no-history", "--no-table", "--out", out)
    code, _, err = call("fit", teacher, *told)
    assert code == 0, err
    assert [s.steps[0] for s in read_fit(out).samplers] == [1.0, 1.0]
    assert not any(s.history for s in read_fit(out).samplers)


def test_latents_and_flows_are_fitted(tmp_path: Path, call: Call):
    folder = make_pipeline(tmp_path / "dit", "dit")
    out = tmp_path / "fit"
    code, _, err = call("fit", folder, "--calls", 2, "--points", 4, "--noises", 2, "--guidance", 1.5, "--out", out)
    assert code == 0, err
    assert [r["metric"] for r in read_fit(out).rows] == ["distance to the fine trajectory"] * 4
    rows = [u * 1000 for u in read_fit(out).samplers[0].steps]
    assert rows == pytest.approx([round(r) for r in rows])


def test_the_cost_is_known_beforehand(teacher: Path):
    wish = Wish(calls=(3, 4), points=12, noises=2)
    done = fit(open_product(teacher), wish)
    assert 0.5 < done.calls / expected_calls(wish) < 1.5


def test_what_cannot_be_fitted_is_refused_with_the_remedy(
    refused: Callable[..., str], teacher: Path, student: Path, tmp_path: Path
):
    assert refused(teacher, "--calls", "4", "--points", "3").startswith("--calls 4: more than the 3 points")
    assert refused(teacher, "--calls", "1,4").startswith("--calls 1: one call has no history and no level to choose")
    assert refused(teacher, "--calls", "four").startswith("--calls 'four': expected whole numbers")
    assert refused(teacher, "--solver", "heun") == "--solver heun: is not one of ddim, 2m"
    assert refused(teacher, "--solver", "2m", "--no-history").startswith("--no-history: 2m is made of history")
    assert refused(teacher, "--noises", "0").startswith("--noises 0: expected 1 to 10000")
    assert refused(teacher, "--points", "0").startswith("--points 0: must be at least 1")
    assert refused(teacher, "--guidance", "-1").startswith("--guidance -1: expected a scale from 0 on")
    assert refused(teacher, "--teacher").startswith("--teacher: is for a run of a student")
    assert refused(teacher, "--no-table", "--samples", "9").startswith("--no-table: leave it out, or")
    assert re.search(r"is a student that was trained for the levels 1 and .* add --teacher", refused(student))
    assert "has no teacher" in refused("digits-teacher")
    assert "its teacher is analytic and has no folder" in refused("toy/dmd2")
    told = "digits-deblur-ibmd: its process, bridge, is a bridge: at level 1 it is its source alone, where a step of DDIM"
    assert refused("digits-deblur-ibmd").startswith(told)
    assert "only a run on data: {name: degraded} has them" in refused(teacher, "--preset", "paired-house-digits")
    assert refused("digits-tescher").startswith("digits-tescher: no such folder, run directory or recipe")
    assert "neither a run directory" in refused(tmp_path)
    text = make_pipeline(tmp_path / "sd15", "sd15")
    assert "fewstep new --teacher" in refused(text)
    plain = shutil.copytree(teacher, tmp_path / "plain")
    (plain / "fewstep.json").unlink()
    assert "has no null class" in refused(plain, "--guidance", "2")
    told = {"kind": "renoise", "steps": [1.0, 0.5], "call": {"num_inference_steps": 2}}
    (plain / "fewstep.json").write_text(json.dumps(told))
    assert "is an exported student of 2 steps" in refused(plain)


def test_a_fit_is_to_training_pictures_never_to_those_that_are_measured():
    from fewstep.recipe.store import load
    from fewstep.train.product import product_of

    recipe = load("digits-x2-teacher")
    data: Any = recipe.data.open()
    product = product_of(recipe, torch.nn.Identity(), data, "teacher")
    held = data.examples(torch.arange(400)).cond["image"].flatten(1)
    taken = noise_of(product, 7, "calibration", 60)[1]["image"].flatten(1)
    assert taken.shape == (60, 16)
    assert float(torch.cdist(taken.double(), held.double()).min()) > 0
    other = noise_of(product, 7, "held out", 60)[1]["image"].flatten(1)
    assert not torch.equal(taken, other)
    assert torch.equal(taken, noise_of(product, 7, "calibration", 60)[1]["image"].flatten(1))
