"""Evaluation against pictures of one's own: by hand the same numbers, cached by content, refusals with a way out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_command import eval_refusal
from PIL import Image
from tiny_pictures import noise, write
from tiny_teacher import make_run, make_teacher

from fewstep.cli import main
from fewstep.commands.against import FEATURES, fitted
from fewstep.commands.judge import judge_of, preset_of
from fewstep.config import RecipeError, UserError
from fewstep.eval.features import networks
from fewstep.eval.features.house import HouseDigits, house_digits
from fewstep.eval.metrics.frechet import frechet_distance
from fewstep.eval.metrics.measures import kernel_distance, manifold
from fewstep.eval.metrics.statistics import FeatureStatistics
from fewstep.eval.protocol.datasets import digits
from fewstep.eval.protocol.images import save_image, to_pixels
from fewstep.eval.protocol.preset import load_preset, preset_names
from fewstep.eval.tools.make_reference import make
from fewstep.recipe import schema
from fewstep.recipe.schema import Evaluate
from fewstep.recipe.store import load
from fewstep.train.product import open_product

N = 90


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    teacher = make_teacher(tmp_path_factory.mktemp("models") / "teacher")
    return make_run(tmp_path_factory.mktemp("trained") / "run", teacher, "data.held_out=0.1")


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """The first 100 digits at twice their size, so that they are reduced on the way."""
    for index, image in enumerate(digits()[0][:100].round().to(torch.uint8)):
        save_image(image.repeat_interleave(2, 1).repeat_interleave(2, 2), tmp_path / "real" / f"{index:03d}.png")
    return tmp_path / "real"


Call = Callable[..., Any]


@pytest.fixture
def ok(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    def call(*arguments: Any) -> tuple[dict[str, Any], str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(["eval", *map(str, arguments), "--report", str(tmp_path / "report")])
        out, err = capfd.readouterr()
        assert caught.value.code == 0, err
        return json.loads((tmp_path / "report" / "report.json").read_text())[0], out

    return call


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Call:
    return partial(eval_refusal, capfd)


def shrunk(folder: Path) -> torch.Tensor:
    """Every picture of the folder at 8 x 8, by Pillow."""
    out = []
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as picture:
            small = picture.convert("L").resize((8, 8), Image.Resampling.LANCZOS)
        out.append(torch.from_numpy(np.array(small))[None])
    return torch.stack(out)


def test_a_folder_a_file_and_a_computation_by_hand_give_one_number(
    ok: Call, trained: Path, real: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = (trained, "--features", "house", "--samples", N, "--against")
    row, told = ok(*asked, real)
    extractor = house_digits()
    samples = extractor(to_pixels(open_product(trained).draw(N, 1000, batch=16)))
    expected = extractor(shrunk(real))
    statistics = FeatureStatistics(64)
    statistics.update(expected)
    distance = frechet_distance(samples, statistics)
    fd, kid = (next(v for k, v in row["metrics"].items() if k.startswith(name)) for name in ("FD", "KID"))
    assert fd["value"] == pytest.approx(distance.value, rel=1e-5)
    assert fd["standard_error"] == pytest.approx(distance.standard_error, rel=1e-4)
    assert kid["value"] == pytest.approx(kernel_distance(samples, expected).value, rel=1e-5)
    assert row["metrics"]["recall (house-digits, k=5)"]["value"] == manifold(expected, samples, k=5).recall
    assert row["reference"] == f"{real}, the middle of each resized to 8 x 8 (lanczos), 100 pictures"
    assert f"against {row['reference']}" in told.replace("\n", "")
    # The features are kept under the contents of the pictures: read again only when one has changed.
    (kept,) = (cache / "reference").iterdir()
    stamp = kept.stat().st_mtime_ns
    assert ok(*asked, real)[0]["metrics"] == row["metrics"]
    assert kept.stat().st_mtime_ns == stamp
    moved = Path(shutil.copytree(real, tmp_path / "elsewhere" / "real"))
    assert ok(*asked, moved)[0]["preset_hash"] == row["preset_hash"]
    assert len(list((cache / "reference").iterdir())) == 1
    shutil.copy(real / "000.png", moved / "050.png")
    other, _ = ok(*asked, moved)
    assert other["metrics"] != row["metrics"]
    assert other["files"]["reference"] != row["files"]["reference"]
    # A statistics file: with its features it says all that the folder says.
    mine = tmp_path / "mine.yaml"
    mine.write_text((load_preset.__globals__["FOLDER"] / "fd.yaml").read_text().replace(
        "effnet-lite0-224", "house-digits").replace("[{op: centre-square}, {op: clean-bicubic, size: 224}]", "[]")
        .replace("channels: null", "channels: 1"))  # fmt: skip
    arguments = [str(real), "--preset", str(mine), "--size", "8", "--out", str(tmp_path / "real.npz")]
    make([*arguments, "--keep-features"])
    file, _ = ok(*asked, tmp_path / "real.npz")
    for name, entry in row["metrics"].items():
        assert file["metrics"][name]["value"] == pytest.approx(entry["value"], rel=1e-5), name
    assert file["reference"] == "real.npz, 100 pictures"
    make(arguments)
    file, told = ok(*asked, tmp_path / "real.npz")
    assert list(file["metrics"]) == ["FD (house-digits)"]
    assert set(file["omitted"]) == {"kid", "prdc5"}
    assert "holds moments only" in told


def test_the_runs_own_data_are_those_it_was_not_trained_on(ok: Call, trained: Path):
    row, _ = ok(trained, "--against", "data", "--features", "house", "--samples", N)
    assert row["reference"] == "the run's data, held out of training, 179 pictures"
    held = open_product(trained).recipe.data.open()  # type: ignore[union-attr,attr-defined]
    statistics = FeatureStatistics(64)
    statistics.update(house_digits()(digits()[0][held.held].round()))
    samples = house_digits()(to_pixels(open_product(trained).draw(N, 1000, batch=16)))
    expected = frechet_distance(samples, statistics).value
    assert row["metrics"]["FD (house-digits)"]["value"] == pytest.approx(expected, rel=1e-5)


def test_two_folders_of_colour_of_different_sizes(ok: Call, tmp_path: Path):
    ours = write(tmp_path / "ours", **{f"{i}_png": Image.fromarray(noise(16, 16, 3, seed=i)) for i in range(6)})
    shapes = [(20, 31), (16, 16), (40, 18), (17, 90), (8, 9), (30, 30), (21, 20)]
    photos = {f"{i}_jpg": Image.fromarray(noise(*s, 3, seed=9 + i)) for i, s in enumerate(shapes)}
    row, told = ok("--images", ours, "--against", write(tmp_path / "photos", **photos))
    assert row["number"] == 6
    assert {name.partition(" (")[0] for name in row["metrics"]} == {
        "FD",
        "KID",
        "precision",
        "recall",
        "density",
        "coverage",
    }
    assert row["reference"].endswith("the middle of each resized to 16 x 16 (lanczos), 7 pictures")
    few = write(tmp_path / "few", a_png=Image.fromarray(noise(9, 9, 3)), b_png=Image.fromarray(noise(9, 9, 3, seed=1)))
    row, told = ok("--images", ours, "--against", few)
    assert "left out: prdc5: 2 pictures have no 5 neighbours" in told
    assert any(name.startswith("KID") for name in row["metrics"])


def test_what_cannot_be_compared_names_the_way_out(refused: Call, trained: Path, real: Path, tmp_path: Path):
    house = ("--features", "house")
    assert refused(trained, "--against", tmp_path / "no", *house) == f"{tmp_path / 'no'}: no such folder"
    empty = write(tmp_path / "empty", a_txt=b"")
    assert refused(trained, "--against", empty, *house).startswith(f"{empty}: 0 pictures (.png, ")
    (real / "007.png").write_bytes(b"no picture")
    assert refused(trained, "--against", real, *house).startswith(f"{real / '007.png'}: cannot be read: ")
    assert refused(trained, "--against", tmp_path / "no.npz", *house) == f"{tmp_path / 'no.npz'}: no such statistics file"
    assert refused(trained, "--against", real, "--preset", "digits") == (
        "--against, --features: preset digits has its own; give one or the other"
    )
    assert refused(trained, "--against", real, "--features", "vgg") == (
        "--features vgg: features 'vgg' is not one of effnet-lite0, inception, dinov2, clip, house, clip:ARCHITECTURE"
    )
    for name in ("dinov2", "clip"):
        told = refused(trained, "--against", real, "--features", name)
        assert told.startswith(f"features {name}: needs --extractor-path (evaluate.extractor_path in a recipe): ")
    for asked in (("--against", "data"), house, ("--preset", "fd")):
        assert refused("--images", real, *asked) == (
            "--against: only a run knows its own data; give a folder of real pictures or FILE.npz"
        )
    wide = write(tmp_path / "wide", a_png=Image.new("L", (16, 16)), b_png=Image.new("L", (16, 16)))
    assert refused("--images", wide, "--against", real, *house) == (
        "features house: are of grey pictures of 8 x 8 or 28 x 28; these are [1, 16, 16]"
    )


def test_no_metric_of_somebody_else_is_taken(tmp_path: Path, trained: Path):
    grey = write(tmp_path / "grey", a_png=Image.new("L", (8, 8)))

    def metric(data: str, *settings: str) -> str | None:
        found = load("digits-teacher", [f"data={data}", *settings]).evaluate
        assert found is not None
        return found.metric

    assert metric("{name: digits}") == "fd-house-digits"
    assert metric(f"{{name: images, path: {grey}}}") == "fd"
    assert metric(f"{{name: captions, path: {grey}, size: 8}}") == "fd"
    assert metric(f"{{name: images, path: {grey}, grey: true}}") is None
    assert metric("{name: fashion-mnist}", f"evaluate.against={grey}") == "fd"
    assert metric("{name: ring}") is None
    product = replace(open_product(trained), recipe=None)
    with pytest.raises(UserError) as caught:
        judge_of(product, Evaluate())
    assert str(caught.value).startswith("no metric was chosen, and these data have no default; write evaluate.metric=fd")
    with pytest.raises(RecipeError, match="against, features and extractor_path are of metric fd, not of energy"):
        load("toy/dmd2", ["evaluate.against=photos"])


def test_features_have_their_extractor_and_their_size():
    assert set(FEATURES) | {"house"} == set(schema.FEATURES)
    for name, (extractor, side) in FEATURES.items():
        spec = Evaluate(metric="fd", features=name, extractor_path="weights")
        preset = preset_of(spec, (3, 64, 64))
        assert (preset.extractor, [(s.op, s.size) for s in preset.chain]) == (
            extractor, [("centre-square", None), ("clean-bicubic", side)],
        )  # fmt: skip
    other = Evaluate(metric="fd", features="clip:ViT-L-14", extractor_path="weights")
    assert preset_of(other).extractor == "clip:ViT-L-14"
    digits_, fashion = (fitted(load_preset("fd"), Evaluate(features="house"), (1, n, n)) for n in (8, 28))
    assert (digits_.extractor, fashion.extractor) == ("house-digits", "house-fashion-mnist")


def test_an_extractor_is_not_given_images_that_are_too_small():
    with pytest.raises(ValueError, match=r"effnet-lite0-16: takes images from 32 x 32 on; take effnet-lite0-224 and"):
        networks.effnet_lite0(16)


def test_presets_are_listed_with_what_they_need(capfd: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(["eval", "--list-presets"])
    lines = capfd.readouterr().out.splitlines()
    assert caught.value.code == 0
    assert [line.partition(":")[0] for line in lines if not line.startswith(" ")] == preset_names()
    assert "  1,797 samples, 8 x 8, on house-digits, against digits: fd, class-accuracy, diversity" in lines
    assert any("needs" in line and "captions_coco14_test.txt" in line for line in lines)


def test_house_features_are_computed_once_for_a_folder(real: Path, trained: Path, monkeypatch: pytest.MonkeyPatch):
    product = open_product(trained)
    spec = Evaluate(metric="fd", features="house", against=str(real), samples=20)
    seen: list[int] = []
    forward = HouseDigits.forward
    monkeypatch.setattr(HouseDigits, "forward", lambda self, x: (seen.append(len(x)), forward(self, x))[1])
    judge_of(product, spec)
    assert sum(seen) == 100
    judge_of(product, spec)
    assert sum(seen) == 100
