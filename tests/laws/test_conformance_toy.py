"""The shipped toy recipe learns, at a third of its batch: its updates move the student to the teacher's distribution."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from fewstep.algebra.sampling import Sampler, sample, seeded
from fewstep.eval import energy_distance
from fewstep.recipe.store import load
from fewstep.train.trainer import Hooks, Trainer

COUNT = 4000


def distance(net: Any, real: torch.Tensor, steps: tuple[float, ...]) -> float:
    """Energy distance of 4,000 samples to 4,000 of the ring."""
    noise, fresh = seeded(1000, torch.arange(COUNT), (2,))
    with torch.no_grad():
        x = sample(Sampler(steps=steps), net, noise, None, fresh)
    assert torch.isfinite(x).all()
    return energy_distance(x.double(), real[:COUNT].double())


def trained(*settings: str) -> tuple[Any, Any, torch.Tensor]:
    """(student when the method starts, product, real samples) of toy/dmd2."""
    recipe = load("toy/dmd2", settings)
    warm = recipe.before[0].steps
    kept: list[Any] = []

    def keep(trainer: Trainer) -> None:
        if trainer.progress.done == warm:
            kept.append(copy.deepcopy(trainer.roles.student))

    trainer = Trainer(recipe, None, hooks=Hooks(on_step=keep), cpu=True)
    trainer.fit()
    assert trainer.progress.skipped == 0
    return kept[0], trainer.product, trainer.data.all()[0]


@pytest.fixture(scope="module")
def one_step() -> tuple[Any, Any, torch.Tensor]:
    return trained("before.0.steps=600", "train.batch=128")


def test_toy_dmd2_beats_its_initialisation_twentyfold(one_step: tuple[Any, Any, torch.Tensor]):
    start, product, real = one_step
    before, after = distance(start, real, (1.0,)), distance(product, real, (1.0,))
    # The start is the mean of the data, far away: the ratio does not come from a floor in the numerator.
    assert before > 0.3
    assert after < before / 20, (before, after)
    # And it is near the truth in absolute terms: every mode is there, in about its share.
    noise, _ = seeded(7, torch.arange(COUNT), (2,))
    with torch.no_grad():
        x = sample(Sampler(), product, noise)
    angle = torch.arange(8) * torch.pi / 4
    modes = 1.25 * torch.stack((angle.cos(), angle.sin()), 1)
    share = torch.bincount(torch.cdist(x, modes).argmin(1), minlength=8) / COUNT
    wanted = torch.tensor([1.0, 2.0] * 4) / 12
    assert float((share - wanted).abs().max()) < 0.05, share


def test_four_steps_by_backward_simulation_end_better_than_they_began():
    """A smaller network and budget: the student of 4 steps against the initial network at the same 4 steps."""
    steps = (1.0, 0.75, 0.5, 0.25)
    start, product, real = trained(
        "method.steps=[1.0, 0.75, 0.5, 0.25]",
        "method.critic.steps=3",
        "student.width=96",
        "before.0.steps=400",
        "train.steps=240",
        "train.batch=128",
    )
    before, after = distance(start, real, steps), distance(product, real, steps)
    assert before < 0.5 * distance(start, real, (1.0,))  # four steps of the warm start are worth something already
    assert after < before / 2, (before, after)
