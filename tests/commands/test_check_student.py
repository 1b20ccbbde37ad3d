"""An export's own pipeline is run for the levels it calls the network at; what moved them since is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from calling import called
from tiny_pipelines import make_pipeline
from tiny_students import make_product
from tiny_teacher import edit_json, make_teacher

from fewstep.algebra.sampling import Sampler
from fewstep.commands.check_student import check_student
from fewstep.config import UserError
from fewstep.export.choose import export
from fewstep.networks.diffusers import load_denoiser
from fewstep.recipe.store import load
from fewstep.train.product import Product


@pytest.fixture(autouse=True)
def no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line has them off before tqdm is imported; here it is by now."""
    monkeypatch.setattr(diffusers.utils.logging, "_tqdm_active", False)


FOUR = (1.0, 0.75, 0.5, 0.25)
UNEVEN = (1.0, 0.7, 0.312)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Students of a table and its rows, of flows whose grid is the config's or the pipeline's, of pixels."""
    root = tmp_path_factory.mktemp("students")
    for name, sampler in (
        ("sd15", Sampler(steps=UNEVEN)),
        ("sd3", Sampler(steps=FOUR)),
        ("flux", Sampler(steps=FOUR)),
        ("dit", Sampler(kind="map", steps=FOUR)),
    ):
        export(make_product(make_pipeline(root / f"{name}-teacher", name), name, sampler), root / name)
    teacher = make_teacher(root / "pixels-teacher")
    recipe = load("digits-dmd2", [f"teacher.path={teacher}", "method.steps=[1.0,0.6]"])
    net = load_denoiser(str(teacher), 10)
    export(Product(net, Sampler(steps=(1.0, 0.6)), (1, 8, 8), 10, "pixels", (2,), recipe), root / "pixels")
    return {name: root / name for name in ("sd15", "sd3", "flux", "dit", "pixels")}


def shares(*ratios: float) -> list[float]:
    """sigma / (alpha + sigma) of sigma / alpha."""
    return [1.0 if r == float("inf") else r / (1 + r) for r in ratios]


def test_each_export_is_called_at_its_levels(exports: dict[str, Path]):
    bar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    table = [float(((1 - bar[i]) / bar[i]).sqrt()) for i in (999, 699, 311)]
    flow = [3 * u / (1 + 2 * u) for u in FOUR]
    karras = [(0.002 ** (1 / 7) + u * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7 for u in (1.0, 0.6)]
    wanted = {"sd15": shares(*table), "sd3": flow, "pixels": shares(*karras)}
    for name, folder in exports.items():
        report = check_student(str(folder))
        assert report.ok, report.text()
        assert report.calls == len(report.trained) == len(report.visited)
        if name in wanted:
            assert report.visited == pytest.approx(wanted[name], abs=2e-6)
    text = check_student(str(exports["sd3"])).text()
    assert text.splitlines()[2].split() == ["1", "pure", "noise", "pure", "noise"]
    assert "as called by pipe(..., num_inference_steps=4)" in text
    assert "not checked: the weights" in text


def test_a_scheduler_that_was_changed_since_is_found_with_the_remedy(
    exports: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    folder = Path(shutil.copytree(exports["sd3"], tmp_path / "sd3"))
    edit_json(folder / "scheduler" / "scheduler_config.json", shift=3.0, shift_terminal=None)
    code, out, err = called(capfd, "check-student", folder)
    assert (code, err) == (1, "")
    last = out.strip().splitlines()[-1]
    assert "StableDiffusion3Pipeline of diffusers" in last
    assert "calls the network at other levels than the trained ones, up to 0.49" in last
    assert f"Remedy: export the run again with this diffusers (`fewstep export RUN --out {folder} --force`)" in last
    alone = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    alone.set_timesteps(4)
    assert check_student(str(folder)).visited == pytest.approx(alone.sigmas[:4].tolist(), abs=1e-7)


def test_a_class_that_was_changed_since_is_found(exports: dict[str, Path], tmp_path: Path):
    """diffusers opens the scheduler that the index names: LCM's students under it."""
    folder = Path(shutil.copytree(exports["sd15"], tmp_path / "sd15"))
    edit_json(folder / "scheduler" / "scheduler_config.json", _class_name="PNDMScheduler")
    edit_json(folder / "model_index.json", scheduler=["diffusers", "PNDMScheduler"])
    report = check_student(str(folder))
    assert not report.ok
    assert "cannot draw from it" in report.verdict()
    assert "timesteps" in report.failed


def test_more_calls_than_steps_are_found(exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    own = diffusers.StableDiffusion3Pipeline.__call__

    def twice(self: Any, **call: Any) -> Any:
        own(self, **call)
        return own(self, **call)

    monkeypatch.setattr(diffusers.StableDiffusion3Pipeline, "__call__", twice)
    report = check_student(str(exports["sd3"]))
    assert "in 8 calls, not 4" in report.verdict()
    assert not report.ok


def test_what_is_no_student_is_said(exports: dict[str, Path], tmp_path: Path):
    def said(folder: Path) -> str:
        with pytest.raises(UserError) as caught:
            check_student(str(folder))
        assert str(caught.value).startswith(f"student {folder}: ")
        return str(caught.value)

    assert "no such folder; give one that `fewstep export` wrote" in said(tmp_path / "none")
    assert "has no fewstep.json" in said(exports["sd3"].with_name("sd3-teacher"))
    for file, words in (
        ("classes.json", "a pipeline for each group of classes"),
        ("steps.json", "no scheduler of diffusers does"),
        ("pytorch_lora_weights.safetensors", "is an adapter"),
        ("recipe.yaml", "is a run; give its export"),
    ):
        (tmp_path / file[:6]).mkdir()
        (tmp_path / file[:6] / file).touch()
        assert words in said(tmp_path / file[:6])
    folder = Path(shutil.copytree(exports["sd3"], tmp_path / "sd3"))
    told = json.loads((folder / "fewstep.json").read_text())
    (folder / "fewstep.json").write_text(json.dumps({k: v for k, v in told.items() if k != "levels"}))
    assert "does not hold the trained levels" in said(folder)
    (folder / "fewstep.json").write_text(json.dumps({k: told[k] for k in ("classes", "size")}))
    assert "is a teacher; `fewstep check-teacher`" in said(folder)
    (folder / "fewstep.json").write_text(json.dumps(told | {"levels": [1.0]}))
    with pytest.raises(UserError, match=r"levels is .1.0., not a number for each of the steps"):
        check_student(str(folder))
