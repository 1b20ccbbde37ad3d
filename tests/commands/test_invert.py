"""Inversion of images: exact for exact students, and the command's files say what the functions compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import names
from tiny_teacher import make_run, make_teacher
from torch import Tensor
from trajectory_helpers import F64, MEAN, STD, TIGHT, ExactMap, draws

from fewstep.algebra.process import EDM, Flow, Process
from fewstep.algebra.sampling import sample
from fewstep.cli import main
from fewstep.commands.invert import invert_run, read_images, round_trip
from fewstep.config import UserError
from fewstep.eval.protocol.images import to_pixels
from fewstep.methods.icd import ICD
from fewstep.networks.analytic import flow_map
from fewstep.recipe.store import load
from fewstep.train.build import build_roles
from fewstep.train.product import open_product
from fewstep.train.trainer import Trainer


@pytest.mark.parametrize("process", [Flow(), TIGHT], ids=["flow", "edm"])
def test_exact_students_invert_exactly_to_the_priors_noise(process: Process) -> None:
    exact = ExactMap(process)
    x = MEAN + STD * draws(9, "invert").normal(1, dtype=F64)
    errors = []
    for knots in (500, 50):
        method = ICD(knots=knots, start=0.2 / knots)
        done = round_trip(method, method.sampler(), exact, exact, x)
        errors.append(float(done.error.max()))
    # The encoder starts a fifth of a knot above the clean end, and that is all the error there is.
    assert errors[1] < 1e-2
    assert errors[0] < 0.12 * errors[1] or errors[1] < 1e-6
    # The code is the flow map's end in units of the prior, up to the encoder's start a little above clean.
    t = process.grid(torch.ones(9, dtype=F64))
    ends = flow_map(process, MEAN, STD, x, process.grid(torch.zeros(9, dtype=F64)), t)
    scale = t[:, None] if isinstance(process, EDM) else 1.0
    torch.testing.assert_close(done.noise, ends / scale, rtol=0, atol=2e-2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("icd")
    settings = [f"teacher.path={make_teacher(folder / 'teacher')}", "train.steps=2", "train.batch=4"]
    recipe = load("digits-icd", [*settings, "train.sample_every=0", "evaluate=null", "train.ema=[0.5]"])
    Trainer(recipe, folder / "run", cpu=True).fit()
    return folder / "run"


def pictures(folder: Path, x: Tensor) -> Path:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(to_pixels(x)[:, 0]):
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return folder


def test_the_command_writes_codes_that_decode_to_what_it_shows(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    product = open_product(run)
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    folder = pictures(tmp_path / "in", x)
    with pytest.raises(SystemExit) as left:
        main(
            [
                "invert",
                str(run),
                str(folder),
                "--out",
                str(tmp_path / "codes.safetensors"),
                "--classes",
                "4,7",
            ]
        )
    assert left.value.code == 0
    said = capsys.readouterr().out
    codes = load_file(tmp_path / "codes.safetensors")
    assert codes["labels"].tolist() == [4, 7, 4]
    assert codes["noise"].shape == (3, 1, 8, 8)
    seen, _, _ = read_images(folder, (1, 8, 8))
    with torch.no_grad():
        again = sample(product.sampler, product.net, codes["noise"], codes["labels"])
    error = ((again - seen) ** 2).flatten(1).mean(1).sqrt()
    assert f"differ by {float(error.mean()):.3g}" in said
    assert names(tmp_path) == ["codes.png", "codes.safetensors", "in"]
    # The trained encoder was read, not the one the recipe starts with.
    fresh: Any = build_roles(product.recipe, product.recipe.data.open())["forward"]  # type: ignore[union-attr]
    other = round_trip(product.recipe.method, product.sampler, product.net, fresh, seen, codes["labels"])  # type: ignore[union-attr]
    assert float((other.noise - codes["noise"]).abs().max()) > 1e-6
    one = invert_run(run, folder / "1.png", tmp_path / "one.safetensors", "7")
    torch.testing.assert_close(one.noise[0].float(), codes["noise"][1], rtol=1e-4, atol=1e-4)


def test_bad_input_is_named(run: Path, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", torch.zeros(2, 1, 8, 8))
    wide = pictures(tmp_path / "wide", torch.zeros(1, 1, 8, 9))
    (tmp_path / "note.txt").write_text("no picture")
    out = tmp_path / "codes.safetensors"
    for images, to, classes, message in (
        (folder, out, None, "--classes: this run has 10 classes; name those of the images"),
        (folder, out, "12", r"--classes '12': classes are 0\.\.9, not 12"),
        (wide, out, "1", r"wide: pictures are \[1, 8, 9\], this run's are \[1, 8, 8\]"),
        (tmp_path / "note.txt", out, "1", "is not a picture"),
        (tmp_path / "none", out, "1", "no such folder"),
        (folder, tmp_path / "codes.npz", "1", r"must end in \.safetensors"),
    ):
        with pytest.raises(UserError, match=message):
            invert_run(run, images, to, classes)
    assert names(tmp_path) == ["in", "note.txt", "wide"]
    other = make_run(tmp_path / "other", make_teacher(tmp_path / "teacher"))
    with pytest.raises(UserError, match="has no encoder; only runs of the method icd invert images"):
        invert_run(other, folder, out, "1")
