"""A product that its teacher helps: noise by global index, a threshold from samples that no measurement draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.algebra.process import Flow
from fewstep.algebra.sampling import Sampler, many_step
from fewstep.config import UserError
from fewstep.networks.assisted import Adaptive, DistillationPP, Diversity, Nasa
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.dit import DiT
from fewstep.networks.scores import ClassScore
from fewstep.recipe.store import load
from fewstep.train.assisted import Assisted, assisted, scores_of
from fewstep.train.build import build_roles
from fewstep.train.product import Product, open_product, product_of

TEACHER = Path(__file__).parents[2] / "assets" / "digits-teacher"


@pytest.fixture(scope="module")
def student() -> Product:
    """The digits teacher itself under a student's sampler."""
    return replace(open_product(TEACHER), sampler=Sampler(steps=(1.0, 0.4)), trained=(2,), title="student")


def null(cond: torch.Tensor) -> torch.Tensor:
    return torch.full_like(cond, 10)


def test_batches_change_nothing_and_calls_are_told(student: Product):
    index = torch.tensor([3, 17, 4])
    for part, calls in ((Diversity(substeps=2), 3), (DistillationPP(guidance=2.0), 4)):
        helped = assisted(student, part, student.net, null)
        assert helped.network_calls() == calls
        assert student.network_calls() == 2
        whole = helped.images(index, index % 10, 5)
        for i in range(3):
            torch.testing.assert_close(helped.images(index[i : i + 1], index[i : i + 1] % 10, 5)[0], whole[i])
        assert float((whole - student.images(index, index % 10, 5)).abs().max()) > 1e-3
        assert helped.title == f"student + {part.name}"


def test_the_threshold_is_a_percentile_of_calibration_samples(student: Product):
    part = Adaptive(score=ClassScore(), k=25.0, calibration=40, steps=1)
    helped = assisted(student, part, student.net, null)
    assert helped.assist is not None
    scores = scores_of(student, 40, helped.assist)  # type: ignore[arg-type]
    assert scores.shape == (40,)
    assert int((scores < helped.assist.threshold).sum()) == 10
    assert float(scores.max()) <= 0  # log of a probability


def test_classes_beside_a_picture_are_judged_too():
    """Conditions that are no classes alone have no captions for that."""
    recipe = load("digits-jdm")
    data: Any = recipe.data.open()
    roles = build_roles(recipe, data)
    made = replace(product_of(recipe, roles.student.eval(), data, "student"), sampler=Sampler(steps=(1.0,)))
    part = Adaptive(score=ClassScore(), k=25.0, calibration=8, steps=1)
    helped = assisted(made, part, roles.teacher, data.null)
    assert helped.assist is not None
    assert float(helped.assist.threshold) < 0
    assert helped.draw(4, seed=1).shape == (4, 1, 8, 8)


def test_what_cannot_be_helped_is_refused(student: Product):
    with pytest.raises(UserError, match=r"assist\.steps 2: the student takes 2 in all"):
        assisted(student, Diversity(steps=2), student.net, null)
    with pytest.raises(UserError, match="assist diversity: helps a student; teacher is a teacher"):
        assisted(replace(student, sampler=many_step(3), title="teacher"), Diversity(), student.net, null)
    with pytest.raises(UserError, match=r"a negative prompt \(NASA\): the student's network has no attention processors"):
        assisted(student, Nasa(negative="blurry"), student.net, null)


def test_a_threshold_is_of_training_pictures_never_of_those_that_are_measured():
    recipe = load("digits-x2-teacher")
    data: Any = recipe.data.open()
    net = Denoiser(DiT((1, 8, 8), width=8, heads=2, depth=1, image=1), Flow(), "velocity", "angle")
    product = replace(product_of(recipe, net, data, "student"), sampler=Sampler(steps=(1.0,)))
    shown: list[torch.Tensor] = []

    def score(x: torch.Tensor, cond: Any, index: torch.Tensor) -> torch.Tensor:
        shown.append(cond["image"])
        return torch.zeros(len(x))

    helped = Assisted(part=Adaptive(score=ClassScore()), teacher=product.net, score=score)
    assert scores_of(product, 300, helped).shape == (300,)
    held, taken = data.examples(torch.arange(400)).cond["image"].flatten(1), torch.cat(shown).flatten(1)
    assert taken.shape == (300, 16)
    assert float(torch.cdist(taken.double(), held.double()).min()) > 0
