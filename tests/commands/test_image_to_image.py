"""The curve of content against style, by the command that writes it."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calling import called
from tiny_teacher import make_run, make_teacher

from fewstep.algebra.assist import noised_again
from fewstep.algebra.guidance import Guided
from fewstep.algebra.onward import onward
from fewstep.algebra.sampling import seeded
from fewstep.commands import image_to_image
from fewstep.commands.image_to_image import correlation, curve, house_of, parse_strengths, sources
from fewstep.config import UserError
from fewstep.data.images import Digits
from fewstep.recipe.schema import Evaluate
from fewstep.train.product import open_product, teacher_beside


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    teacher = make_teacher(tmp_path_factory.mktemp("models") / "teacher")
    return make_run(tmp_path_factory.mktemp("trained") / "run", teacher)


def test_correlation_of_a_picture_with_itself_its_negative_and_nothing() -> None:
    x = torch.randn(5, 1, 8, 8)
    assert correlation(x, x).value == pytest.approx(1)
    assert correlation(3 * x + 2, x).value == pytest.approx(1)
    assert correlation(-x, x).value == pytest.approx(-1)
    assert correlation(0 * x, x).value == 0


def test_sources_are_of_their_class_and_become_another(run: Path) -> None:
    pictures, labels = Digits().open().all()
    assert labels is not None
    product = open_product(run)
    x, asked = sources(product, "3", "8", 40)
    assert asked.tolist() == [8] * 40
    assert torch.equal(x, pictures[labels == 3][:40])
    x, asked = sources(product, None, None, 30)
    assert torch.equal(x, pictures[:30])
    assert torch.equal(asked, (labels[:30] + 1) % 10)


def test_the_command_writes_what_it_measures(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    points = curve(run, (0.4, 1.0), "3", "8", count=12, seed=5)
    folder = run / "image-to-image"
    with (folder / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["model"], float(r["strength"])) for r in rows] == [
        ("student", 0.4), ("teacher", 0.4), ("student", 1.0), ("teacher", 1.0)]  # fmt: skip
    assert [float(r["content"]) for r in rows] == pytest.approx([p.content for p in points])
    assert all(0 <= p.style <= 1 and -1 <= p.content <= 1 for p in points)
    assert (folder / "curve.png").stat().st_size > 1000
    assert (folder / "sheet.png").is_file()
    product = open_product(run)
    x, labels = sources(product, "3", "8", 12)
    noise, fresh = seeded(5, torch.arange(12), (1, 8, 8))
    with torch.no_grad():
        by_hand = onward(product.sampler, product.net, x, noise, labels, fresh, strength=0.4)
    assert points[0].content == pytest.approx(correlation(by_hand, x).value, abs=1e-6)
    assert "strength 0.4" in capfd.readouterr().out


def test_the_teacher_is_guided_as_the_run_measures_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    product = open_product(run)
    assert product.recipe is not None
    recipe = replace(product.recipe, evaluate=Evaluate(metric="fd", guidance=3.0))
    monkeypatch.setattr(image_to_image, "opened", lambda _: replace(product, recipe=recipe))
    found = curve(run, (0.4,), "3", "8", count=12, seed=5, out=run / "guided")
    data: Any = recipe.data.open()
    x, labels = sources(product, "3", "8", 12)
    noise, _ = seeded(5, torch.arange(12), (1, 8, 8))
    bare = teacher_beside(recipe, data, "run")
    for net, same in ((Guided(bare, 3.0, data.null), True), (bare, False)):
        with torch.no_grad():
            made = noised_again(net, x, noise, labels, level=0.4, steps=found[1].calls, solver="ddim")
        assert (abs(found[1].content - correlation(made, x).value) < 1e-6) == same


def test_a_run_that_is_made_from_pictures_is_refused_by_name(run: Path) -> None:
    product = open_product(run)
    for beside in ({"paired": lambda _: None}, {"prompted": lambda _: None}):
        with pytest.raises(UserError, match="run: the curve needs a run whose only condition is a class"):
            house_of(replace(product, **beside))  # type: ignore[arg-type]


def test_what_it_is_not_for_is_refused(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for text in ("", "2", "a", ".5,0"):
        with pytest.raises(UserError, match="--strengths"):
            parse_strengths(text)
    assert parse_strengths(".5, .25,.5") == (0.25, 0.5)
    code, _, told = called(capfd, "image-to-image", run, "--source", "12")
    assert (code, "classes are 0..9" in told) == (2, True)
    assert called(capfd, "image-to-image", tmp_path / "none")[0] == 2
