"""Every mistake of a user is one clear message on stderr and exit code 2, with nothing half-written left."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calling import called
from tiny_runs import names
from tiny_teacher import edit_json, make_run, make_teacher, student_settings

from fewstep.cli import main

WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"
Call = Callable[..., str]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="module")
def trained(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("trained") / "run", teacher)


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Call the command line in an empty folder: exit code 2, one message, nothing written. Gives the message."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def call(*arguments: Any, leaves: tuple[str, ...] = ()) -> str:
        code, out, err = called(capfd, *arguments)
        assert code == 2, err
        assert "Traceback" not in out + err
        messages = err[err.index("error: ") :]
        assert messages.count("error: ") == 1
        assert tuple(names(work)) == leaves
        return messages.removeprefix("error: ").strip()

    return call


def test_recipes_and_settings(refused: Call):
    assert refused("run", "digit-dmd2") == "recipe 'digit-dmd2' is not shipped; did you mean 'digits-dmd2'?"
    assert refused("run", "mine.yaml") == "mine.yaml: no such recipe file"
    assert refused("run", "toy/dmd2", "train.stpes=3", "train.batch=1.5").splitlines() == [
        "argument 'train.batch=1.5': train.batch: expected int, got 1.5",
        "argument 'train.stpes=3': train.stpes: unknown key; did you mean 'steps'?",
    ]
    assert refused("run", "toy/dmd2", "train.steps") == (
        "argument 'train.steps': expected key=value, such as train.steps=200"
    )
    assert refused("run", "toy/dmd2", "method.steps=[0.25, 0.5]").startswith(
        "argument 'method.steps=[0.25, 0.5]': method.steps: steps [0.25, 0.5] must decrease strictly"
    )
    assert refused("run", "toy/dmd2", "method.steps=[1.0, -0.5]").endswith("must lie in (0, 1], the levels of the "
                                                                        "process grid")  # fmt: skip
    assert refused("run", "toy/dmd2", "critic=null").endswith("method dmd2 needs the role critic")
    assert refused("run", "toy/dmd2", "student.process={name: trig}").startswith(
        "dmd2.yaml:3: teacher.process: Flow(name='flow') differs from the student's"
    )
    assert refused("recipes", "show", "toy/dmd22") == "recipe 'toy/dmd22' is not shipped; did you mean 'toy/dmd2'?"
    assert refused("recipes", "check", "toy/dmd2", "train.steps=x").endswith("train.steps: expected int, got 'x'")
    assert refused("recipes", "cp", "toy/dmd2", "mine.txt") == "mine.txt: a recipe's name ends in .yaml"
    assert refused("recipes", "cp", "toy/dmd2", "no/mine.yaml") == "no: no such folder"


def test_a_copied_recipe_runs_and_is_not_overwritten(refused: Call, tmp_path: Path):
    with pytest.raises(SystemExit) as caught:
        main(["recipes", "cp", "toy/dmd2", "mine.yaml"])
    assert caught.value.code == 0
    beside = ("mine.yaml", "recipe.schema.json")
    assert refused("recipes", "cp", "toy/dmd2", "mine.yaml", leaves=beside).endswith(
        "mine.yaml: exists; overwrite it with --force"
    )
    assert refused("run", "mine.yaml", "train.steps=-1", leaves=beside).endswith(
        "train.steps: steps must be at least 1, not -1"
    )


def missing_scheduler(folder: Path) -> None:
    shutil.rmtree(folder / "scheduler")


def unsupported_class(folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", _class_name="Kandinsky3UNet")


def no_prediction(folder: Path) -> None:
    edit_json(folder / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler")


def odd_prediction(folder: Path) -> None:
    edit_json(folder / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler", prediction_type="flow")


def odd_scheduler(folder: Path) -> None:
    edit_json(folder / "scheduler" / "scheduler_config.json", _class_name="KarrasVeScheduler")


def odd_betas(folder: Path) -> None:
    edit_json(
        folder / "scheduler" / "scheduler_config.json",
        _class_name="DDPMScheduler",
        prediction_type="epsilon",
        beta_schedule="sigmoid",
    )


def truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5000])


def weights_lacking(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    save_file({k: v for k, v in tensors.items() if not k.startswith("mid_block")}, folder / WEIGHTS)


def weights_of_another(folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", block_out_channels=[8, 32])


def a_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.bin")


def broken_json(folder: Path) -> None:
    (folder / "unet" / "config.json").write_text("{")


def nine_classes(folder: Path) -> None:
    shutil.rmtree(folder)
    make_teacher(folder, classes=8)


TEACHERS: list[tuple[Callable[[Path], None], str]] = [
    (missing_scheduler, "teacher T: scheduler/scheduler_config.json is missing; a diffusers pipeline has it"),
    (
        unsupported_class,
        "T/unet/config.json: class 'Kandinsky3UNet' is not supported: takes a mask of its text in every layer; no entry "
        "has been written; supported: ",
    ),
    (
        no_prediction,
        "T/scheduler/scheduler_config.json: prediction_type is missing; add one of 'epsilon', 'v_prediction', 'sample' "
        "as trained",
    ),
    (
        odd_prediction,
        "T/scheduler/scheduler_config.json: prediction_type 'flow' is not one of epsilon, v_prediction, sample",
    ),
    (
        odd_scheduler,
        "T/scheduler/scheduler_config.json: scheduler 'KarrasVeScheduler' is not supported; known: ",
    ),
    (
        odd_betas,
        "T/scheduler/scheduler_config.json: beta_schedule 'sigmoid' is not one of 'linear', 'scaled_linear'",
    ),
    (truncated, "teacher T: unet/diffusion_pytorch_model.safetensors is truncated or damaged (5000 bytes): "),
    (
        weights_lacking,
        "teacher T: the weights in unet/ lack mid_block.resnets.0.conv1.bias (20 in all); they are of ",
    ),
    (weights_of_another, "teacher T: the weights in unet/ cannot be loaded: "),
    (
        a_pickle,
        "teacher T: unet/ has no .safetensors file; diffusion_pytorch_model.bin is a pickle: convert it with "
        "safetensors first",
    ),
    (broken_json, "T/unet/config.json: cannot be read as JSON: Expecting property name"),
    (nine_classes, "teacher T: has 9 class embeddings, which fits 9 classes (or 8 and a null class), not 10"),
]


@pytest.mark.parametrize(("spoil", "message"), TEACHERS, ids=[f.__name__ for f, _ in TEACHERS])
def test_teachers(refused: Call, teacher: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str):
    folder = Path(shutil.copytree(teacher, tmp_path / "T"))
    spoil(folder)
    told = refused("run", "digits-dmd2", *student_settings(folder)).replace(str(folder), "T")
    assert told.startswith(message)


def test_a_teacher_that_is_not_there(refused: Call):
    assert refused("run", "digits-dmd2", "teacher.path=nowhere") == (
        "teacher nowhere: no such folder; give the path of a diffusers pipeline folder"
    )
    assert refused("run", "digits-dmd2", "teacher.path=assets:nothing").startswith(
        "teacher assets:nothing: no such folder"
    )


def test_what_can_be_sampled(refused: Call, trained: Path, teacher: Path, tmp_path: Path):
    assert refused("sample", "nowhere") == "nowhere: no such run or folder"
    assert refused("eval", "nowhere") == "nowhere: no such run or folder"
    empty = tmp_path / "empty"
    empty.mkdir()
    for command in ("sample", "eval", "export"):
        assert refused(command, empty) == (
            f"{empty}: neither a run directory (recipe.yaml) nor a diffusers folder (model_index.json)"
        )
    shutil.copy(trained / "recipe.yaml", empty)
    assert refused("sample", empty) == f"{empty}: has no checkpoint yet; train it with `fewstep run` first"
    assert refused("sample", trained, "--steps", "4") == (
        "--steps 4: this student was trained for 1; add --any to try it anyway"
    )
    assert refused("sample", trained, "--steps", "0") == "--steps must be at least 1, not 0"
    assert refused("sample", trained, "--classes", "0-10") == "--classes '0-10': classes are 0..9, not 10"
    assert refused("sample", trained, "--classes", "7-3") == "--classes '7-3': classes are 0..9"
    for text in ("a", "-1", "3,,4", "1-", "²"):
        assert refused("sample", trained, "--classes", text) == (
            f"--classes {text!r}: expected numbers and ranges such as 0-9 or 1,4,7"
        )
    assert refused("sample", trained, "--out", "grid.jpg") == "--out grid.jpg: must end in .png"
    assert refused("export", teacher) == f"{teacher}: is a diffusers folder already; export takes a run directory"
    assert refused("export", trained, "--out", teacher) == f"{teacher}: exists; overwrite it with --force"
    assert refused("export", trained, "--out", teacher, "--force") == (
        f"{teacher}: exists and is not an earlier export; choose another folder"
    )
    assert names(teacher) == ["model_index.json", "scheduler", "unet"]


def test_damaged_runs(refused: Call, trained: Path, tmp_path: Path):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    file = run / "checkpoints" / "step-00000002" / "ema_0.98.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:3000])
    for command in ("sample", "eval", "export"):
        assert refused(command, run) == (
            f"{file}: is damaged (3000 of {len(whole)} bytes, checksum differs); no older checkpoint was "
            "kept (train.keep), so the run has to start again with --force"
        )
    file.write_bytes(whole)
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("ema:\n  - 0.98", "ema:\n  - 0.97"))
    assert refused("sample", run).startswith(f"{file.with_name('ema_0.97.safetensors')}: ")
    (run / "recipe.yaml").write_text(text.replace("name: dmd2", "name: dmd9"))
    assert "recipe.yaml:" in refused("sample", run)


def test_a_metric_that_does_not_fit_is_refused_before_training(refused: Call, tmp_path: Path):
    from PIL import Image

    digits, fashion = "evaluate.metric=fd-house-digits", "evaluate.metric=fd-house-fashion-mnist"
    remedy = "; give another metric, or evaluate=null to measure nothing"
    assert refused("run", "toy/dmd2", digits) == (
        f"evaluate: preset fd-house-digits is for 8 x 8 images; these samples are [2]{remedy}"
    )
    assert refused("run", "digits-teacher", "evaluate.metric=energy") == (
        f"evaluate: preset energy is for vectors and points; these samples are [1, 8, 8]{remedy}"
    )
    assert refused("run", "digits-teacher", fashion) == (
        f"evaluate: preset fd-house-fashion-mnist is for 28 x 28 images; these samples are [1, 8, 8]{remedy}"
    )
    assert refused("run", "digits-teacher", "evaluate.samples=19") == (
        "evaluate: samples 19: the diversity within a class needs two of each, so at least 20 for 10 classes" + remedy
    )
    folder = tmp_path / "pictures"
    for name in ("a", "b", "c"):
        (folder / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(folder / name / "0.png")
    data = f"data={{name: images, path: {folder}, grey: true}}"
    assert refused("run", "digits-teacher", data, digits) == (
        f"evaluate: preset fd-house-digits asks for 10 classes; these samples are of 3 classes{remedy}"
    )
    assert refused("compare", "toy/dmd2", "toy/sid", "--budget", "updates=4", "--set", digits) == (
        "toy/dmd2: preset fd-house-digits is for 8 x 8 images; these samples are [2]"
    )


def test_a_tracker_that_is_not_installed(refused: Call, teacher: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    settings = [*student_settings(teacher), "train.trackers=[tensorboard]"]
    assert refused("run", "digits-dmd2", *settings) == (
        "train.trackers: tensorboard is not installed; pip install tensorboard, or leave it out"
    )
    assert refused("run", "digits-dmd2", "train.trackers=[aim]").endswith(
        "train.trackers.0: 'aim' is not one of tensorboard, wandb"
    )


def test_run_directories(refused: Call, trained: Path, teacher: Path, tmp_path: Path):
    settings = student_settings(teacher)
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert refused("run", "digits-dmd2", *settings, "--out", run) == (
        f"{run}: is already used; continue it with --resume, or overwrite it with --force"
    )
    told = refused("run", "digits-dmd2", *settings, "method.gan.weight=0.5", "--out", run, "--resume")
    assert told.splitlines()[0] == f"{run}: was started with another recipe, so it cannot be resumed:"
    assert [line.split(":")[0].strip() for line in told.splitlines()[1:-1]] == ["method.gan.weight"]
    assert told.splitlines()[-1].startswith("To go on from its weights with other settings: --from")
    after = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".fewstep-lock"}
    assert after == {p: data for p, data in before.items() if p.name != ".fewstep-lock"}
    letters = tmp_path / "letters"
    letters.mkdir()
    (letters / "a.txt").write_text("dear")
    assert refused("run", "digits-dmd2", *settings, "--out", letters, "--force") == (
        f"{letters}: is not a run directory that fewstep made; --force deletes only those. Choose another --out"
    )
    assert refused("run", "digits-dmd2", *settings, "--out", letters / "a.txt") == (
        f"{letters / 'a.txt'}: is a file; choose another directory (--out)"
    )
    assert (letters / "a.txt").read_text() == "dear"


def test_a_full_disk(refused: Call, trained: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """ENOSPC from the system calls beneath: the recipe, the log, a checkpoint, a picture."""
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*_: Any, **__: Any) -> Any:
        raise full

    out = tmp_path / "run"
    settings = [*student_settings(teacher), "--out", out]
    with monkeypatch.context() as patch:
        patch.setattr("fewstep.train.state.save_tensors", fail)
        told = refused("run", "digits-dmd2", *settings)
    assert told == (
        f"{out}/checkpoints/step-00000002: the checkpoint could not be written: the disk is full; free some space and "
        "continue with --resume"
    )
    assert names(out / "checkpoints") == []
    assert [json.loads(line)["done"] for line in (out / "log.jsonl").read_text().splitlines()] == [2]
    with monkeypatch.context() as patch:
        patch.setattr("fewstep.train.log.Log.write", fail)
        assert "the disk is full" in refused("run", "digits-dmd2", *settings, "--force")
    with monkeypatch.context() as patch:
        patch.setattr("PIL.Image.Image.save", fail)
        assert "the disk is full" in refused("sample", trained, "--out", "grid.png")


def test_samples_are_drawn_as_asked(trained: Path, tmp_path: Path):
    from PIL import Image

    out = tmp_path / "grid.png"
    with pytest.raises(SystemExit) as caught:
        main(["sample", str(trained), "--steps", "1", "--classes", "0-4", "--count", "12", "--out", str(out)])
    assert caught.value.code == 0
    width, height = Image.open(out).size
    assert width * 3 == height * 5  # five classes a row, three rows for twelve samples
    assert names(tmp_path) == ["grid.png"]


def test_a_distance_of_too_few_samples_is_called_so(trained: Path, capfd: pytest.CaptureFixture[str]):
    for count, told in ((64, True), (65, False)):
        with pytest.raises(SystemExit) as caught:
            main(["eval", str(trained), "--samples", str(count)])
        assert caught.value.code == 0
        assert ("without ±: no more samples than features" in capfd.readouterr().out) == told


def test_samples_do_not_depend_on_the_batch(trained: Path):
    from fewstep.train.product import open_product

    product = open_product(trained)
    a, b = product.draw(11, seed=4, batch=3), product.draw(11, seed=4, batch=11)
    torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
    assert not torch.equal(a, product.draw(11, seed=5))
