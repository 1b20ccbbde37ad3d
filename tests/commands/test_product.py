"""`fewstep.open_product`: whatever it opens draws, is measured, and is exported or says why not."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from python_runs import make_runs
from sklearn.datasets import load_digits

import fewstep
from fewstep.files import cache_dir


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/ring, runs/digits, the latter's export as exported/, and 40 real digits as pictures/."""
    where = make_runs(tmp_path_factory.mktemp("products"))
    fewstep.open_product(where / "runs" / "digits").export(where / "exported")
    (where / "pictures").mkdir()
    for i, image in enumerate(load_digits().images[:40]):
        Image.fromarray((image * 15).astype(np.uint8)).save(where / "pictures" / f"{i}.png")
    return where


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FEWSTEP_CACHE", str(folder / "cache"))
    assert cache_dir() == folder / "cache"
    return folder


RING, DIGITS, EXPORTED, TEACHER = "runs/ring", "runs/digits", "exported", "assets:digits-teacher"
PICTURES: dict[str, Any] = {"against": "pictures", "features": "house", "samples": 20}


@pytest.mark.parametrize(
    ("path", "shape", "steps", "measured"),
    [
        (RING, (2,), 1, {"samples": 20}),
        (DIGITS, (1, 8, 8), 1, {**PICTURES, "against": "data"}),
        (EXPORTED, (1, 8, 8), 1, PICTURES),
        (TEACHER, (1, 8, 8), 18, PICTURES),
    ],
)
def test_each_is_drawn_from_and_measured(here: Path, path: str, shape: tuple[int, ...], steps: int, measured: Any):
    product = fewstep.open_product(path)
    assert (product.shape, len(product.sampler.steps)) == (shape, steps)
    if product.trained is None:
        product = product.with_steps(2)
    x = product.draw(12, seed=3)
    assert (x.shape, x.dtype, bool(x.isfinite().all())) == ((12, *shape), torch.float32, True)
    assert torch.allclose(product.draw(3, seed=3, batch=2), x[:3], atol=1e-5)
    if product.classes:
        assert torch.allclose(product.draw(12, seed=3, labels=torch.arange(12) % 10), x, atol=1e-5)
    result = product.evaluate(**measured)
    assert (result.number, result.preset) == (20, "energy" if path == RING else "fd")
    assert math.isfinite(result.distance.value)


def test_an_export_draws_what_its_run_draws(here: Path):
    run, exported = (fewstep.open_product(path).draw(20, seed=1) for path in (DIGITS, EXPORTED))
    assert torch.allclose(run, exported, atol=1e-4)


def test_an_export_opens_in_plain_diffusers(here: Path):
    from diffusers import DiffusionPipeline

    done = fewstep.open_product(DIGITS).export("again")
    assert (done.folder, type(DiffusionPipeline.from_pretrained("again")).__name__) == (
        Path("again"),
        "ConsistencyModelPipeline",
    )


def test_a_trainer_is_opened_as_it_stands():
    trainer = fewstep.Trainer(fewstep.load("toy/dmd2", before=[], copy={}, train={"steps": 1, "batch": 8}), cpu=True)
    before = fewstep.open_product(trainer).draw(3)
    trainer.fit()
    assert not fewstep.open_product(trainer).draw(3).equal(before)


@pytest.mark.parametrize(
    ("path", "call", "told"),
    [
        (RING, lambda p: p.draw(0), "count must be at least 1, not 0"),
        (RING, lambda p: p.draw(2, labels=1), "labels: ring is of no classes"),
        (RING, lambda p: p.draw(2, prompts=["a cat"]), "prompts: ring was not trained on text"),
        (RING, lambda p: p.draw(2, labels=1, prompts=["a cat"]), "labels: samples are of classes or of prompts"),
        (TEACHER, lambda p: p.draw(2, labels=[1, 2, 3]), "labels: expected a class or 2 of them"),
        (TEACHER, lambda p: p.draw(2, labels=0.5), "labels: expected a class or 2 of them"),
        (TEACHER, lambda p: p.draw(2, labels=[0, -1]), "labels: the classes are 0..9, not -1"),
        (RING, lambda p: p.with_steps(0), "steps must be at least 1, not 0"),
        (EXPORTED, lambda p: p.with_steps(4), "steps 4: this student was trained for 1; any_steps=True tries it anyway"),
        (
            RING,
            lambda p: p.evaluate("pictures", metric="energy"),
            "against: is of metric fd, and metric energy has its own",
        ),
        (RING, lambda p: p.evaluate("pictures"), "against: is for pictures; these samples are [2]"),
        (RING, lambda p: p.evaluate(samples=1), "samples must be at least 2, not 1"),
        (RING, lambda p: p.evaluate(metric="fid"), "metric 'fid' is no preset"),
        (RING, lambda p: p.evaluate(features="vgg"), "features 'vgg' is not one of"),
        (DIGITS, lambda p: p.evaluate("nowhere", samples=20), "nowhere"),
        (TEACHER, lambda p: p.evaluate("data"), "against: only a run knows its own data"),
        (TEACHER, lambda p: p.evaluate(), "against: nothing says how to measure digits-teacher"),
        (RING, lambda p: p.export("out"), "ring: not exported: no stock diffusers pipeline runs a MLP student"),
        (DIGITS, lambda p: p.export("pictures"), "pictures: "),
        (DIGITS, lambda p: p.export("out", lora=True), "digits: not exported: "),
        (EXPORTED, lambda p: p.export("out"), "exported: is a diffusers folder and no run; it needs no export"),
        (TEACHER, lambda p: p.export("out"), "digits-teacher: is a diffusers folder and no run; it needs no export"),
    ],
)
def test_a_mistake_is_told_by_its_argument(here: Path, path: str, call: Callable[[fewstep.Product], Any], told: str):
    with pytest.raises(fewstep.UserError) as caught:
        call(fewstep.open_product(path))
    assert told in str(caught.value)
    assert not (here / "out").exists()


def test_what_is_no_product_is_refused(here: Path):
    with pytest.raises(fewstep.UserError, match="pictures: neither a run directory"):
        fewstep.open_product("pictures")
    with pytest.raises(TypeError, match="path: expected a run directory, a folder or a Trainer, not a int"):
        fewstep.open_product(3)  # type: ignore[arg-type]
