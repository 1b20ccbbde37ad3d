"""A training that ended is kept: exported before it is measured, and no error after it is a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_teacher import make_teacher, student_settings

from fewstep.cli import main
from fewstep.commands import finish
from fewstep.commands.finish import UNFINISHED
from fewstep.commands.judge import judge_of
from fewstep.commands.measure import measure
from fewstep.recipe.schema import Evaluate
from fewstep.recipe.store import load
from fewstep.train.build import build_roles
from fewstep.train.product import Product, product_of

METRICS = "[fd, kid, cmmd, prdc3, prdc5, class-accuracy, diversity, classifier-score]"
PRESET = """
name: every-metric
title: every metric of pictures
number: 64
size: null
channels: null
conditions: {{kind: data}}
quantiser: round
chain: []
extractor: {extractor}
reference: {{kind: data, name: data}}
metrics: {metrics}
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {n: make_teacher(folder / f"teacher-{n}", n) for n in (0, 3, 10)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders of grey 8 x 8 pictures: of no classes, and of three."""
    out, generator = {}, torch.Generator().manual_seed(0)
    for classes in (0, 3):
        out[classes] = root = tmp_path_factory.mktemp(f"pictures-{classes}")
        for i in range(36):
            folder = root / f"class-{i % classes}" if classes else root
            folder.mkdir(exist_ok=True)
            pixels = torch.randint(0, 256, (8, 8), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"{i:02d}.png")
    return out


def preset(folder: Path, extractor: str, metrics: str = METRICS) -> Path:
    path = folder / "every.yaml"
    path.write_text(PRESET.format(extractor=extractor, metrics=metrics))
    return path


def settings(classes: int, teachers: dict[int, Path], pictures: dict[int, Path]) -> list[str]:
    data = [] if classes == 10 else [f"data={{name: images, path: {pictures[classes]}, grey: true}}"]
    return [s for s in student_settings(teachers[classes]) if not s.startswith("evaluate")] + data


@pytest.mark.parametrize("classes", [0, 3, 10])
@pytest.mark.parametrize("extractor", ["random-conv-1", "house-digits"])
@pytest.mark.parametrize("samples", [4, 64])
def test_a_metric_that_cannot_be_computed_is_left_out_with_its_reason(
    teachers: dict[int, Path], pictures: dict[int, Path], tmp_path: Path, classes: int, extractor: str, samples: int
):
    """Labelled and unlabelled data, with and without a classifier, few samples and more, by every metric of pictures."""
    recipe = load("digits-dmd2", [*settings(classes, teachers, pictures), "evaluate=null"])
    data: Any = recipe.data.open()
    product: Product = product_of(recipe, build_roles(recipe, data).student.eval(), data, "student")
    spec = Evaluate(metric=str(preset(tmp_path, extractor)), samples=max(samples, 2 * classes))
    row, _ = measure(product, judge_of(product, spec))
    assert row.distance.value > 0
    assert any(name.startswith("KID") for name in row.metrics)
    expected = set()
    if extractor == "random-conv-1":
        expected |= {"class-accuracy", "classifier-score"}
    if not classes:
        expected |= {"class-accuracy", "diversity"}
    if classes == 3:  # of which a classifier of digits knows nothing
        expected |= {"class-accuracy"}
    if spec.samples <= 5:
        expected |= {"prdc5"}
    if spec.samples < 10:
        expected |= {"classifier-score"}
    assert set(row.omitted) == expected
    assert all(row.omitted.values())


def test_not_one_metric_is_an_error_that_names_them(teachers: dict[int, Path], pictures: dict[int, Path], tmp_path: Path):
    recipe = load("digits-dmd2", [*settings(0, teachers, pictures), "evaluate=null"])
    data: Any = recipe.data.open()
    product: Product = product_of(recipe, build_roles(recipe, data).student.eval(), data, "student")
    path = preset(tmp_path, "random-conv-1", "[classifier-score]")
    with pytest.raises(ValueError, match=r"none of its metrics .*\(classifier-score: the extractor has no classifier\)"):
        measure(product, judge_of(product, Evaluate(metric=str(path), samples=20)))


Run = Callable[..., tuple[int, str, Path]]


@pytest.fixture
def run(teachers: dict[int, Path], pictures: dict[int, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """`fewstep run` of two updates; gives the exit code, what was printed and the run directory."""

    def call(classes: int, *more: str) -> tuple[int, str, Path]:
        out = tmp_path / "run"
        evaluation = f"evaluate={{metric: {preset(tmp_path, 'random-conv-1')}, samples: 12, teacher_steps: [1]}}"
        with pytest.raises(SystemExit) as caught:
            main(["run", "digits-dmd2", *settings(classes, teachers, pictures), evaluation, *more, "--out", str(out)])
        told, errors = capfd.readouterr()
        assert "Traceback" not in told + errors
        return int(caught.value.code or 0), told, out

    return call


def test_a_labelled_folder_is_trained_exported_and_measured(run: Run):
    code, told, out = run(3)
    assert code == 0
    assert "class-accuracy: the extractor has no classifier" in told
    row = json.loads((out / "report" / "results.json").read_text())["rows"][-1]
    card = (out / "export" / "README.md").read_text()
    value = next(v for k, v in row["metrics"].items() if k.startswith("FD"))["value"]
    assert f", student, 1 step, 12 samples | {value:.4g} |" in card
    assert told.splitlines()[-1].strip().startswith("pipe(")  # what to do next comes last
    (best,) = [line for line in told.splitlines() if line.startswith("best at step ")]
    assert f"| iterations to the peak | {best.partition(';')[0]} |" in card
    with pytest.raises(SystemExit) as caught:
        main(["export", str(out)])
    assert not caught.value.code
    assert (out / "export" / "README.md").read_text() == card


def test_a_run_that_measures_nothing_has_its_best_step_on_the_card(run: Run):
    code, _, out = run(0, "evaluate=null")
    assert code == 0
    assert "| iterations to the peak | best at step " in (out / "export" / "README.md").read_text()


def test_an_evaluation_that_fails_costs_neither_the_run_nor_its_export(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any, **__: Any) -> Any:
        assert (finish_folder / "export" / "model_index.json").is_file()  # the export came first
        raise RuntimeError("kernel larger than the picture\nand more")

    monkeypatch.setattr(finish, "compare", fail)
    finish_folder = tmp_path / "run"
    code, told, out = run(0)
    assert out == finish_folder
    assert code == UNFINISHED == 3
    (line,) = [x for x in told.splitlines() if x.startswith("evaluation failed")]
    assert line == (
        "evaluation failed: RuntimeError: kernel larger than the picture "
        f"(traceback in {out}/report/evaluation-error.txt); the run is trained, measure it again with: "
        f"fewstep eval {out} --teacher 1"
    )
    assert "and more" in (out / "report" / "evaluation-error.txt").read_text()
    assert "exported to" in told
    monkeypatch.undo()
    with pytest.raises(SystemExit) as caught:
        main(line.rpartition("with: fewstep ")[2].split())
    assert not caught.value.code


@pytest.mark.parametrize("what", ["picture", "export"])
def test_neither_does_a_picture_or_an_export_that_fails(run: Run, monkeypatch: pytest.MonkeyPatch, what: str):
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(finish, {"picture": "save_side_by_side", "export": "export"}[what], fail)
    code, told, out = run(0)
    assert code == UNFINISHED
    again = f"fewstep export {out}" if what == "export" else f"fewstep eval {out} --teacher 1"
    assert again in told
    assert (out / "report" / "results.json").is_file()
    assert (out / "export").exists() == (what == "picture")


def test_a_measurement_on_the_way_that_fails_lets_the_training_go_on(run: Run, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr("fewstep.commands.run.measure", fail)
    code, told, out = run(0, "train.eval_every=1")
    assert code == 0
    assert f"step 1: evaluation failed: RuntimeError: no (traceback in {out}/report/evaluation-error.txt)" in told
    assert "training goes on" in told
    assert (out / "report" / "results.json").is_file()
