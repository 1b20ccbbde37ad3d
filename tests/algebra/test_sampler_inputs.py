"""What a sampler hands its student: dynamic guidance, and the numbers of steps that a method trains for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fewstep.algebra.process import Flow
from fewstep.algebra.sampling import Sampler, sample
from fewstep.config import UserError
from fewstep.export.choose import export
from fewstep.methods.icd import ICD
from fewstep.methods.tdd import TDD
from fewstep.networks.analytic import ring
from fewstep.recipe.store import load
from fewstep.train.product import product_of
from fewstep.train.trainer import Trainer


class Listening(nn.Module):
    """The exact ring, which writes down the scale of each call."""

    takes_s, inputs = False, ("w",)

    def __init__(self) -> None:
        super().__init__()
        self.process, self.exact = Flow(), ring(Flow())
        self.heard: list[tuple[float, float]] = []

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Any = None, **call: Any) -> Any:
        self.heard.append((float(t[0]), float(call["w"][0])))
        return self.exact(x, t)


def test_dynamic_guidance_falls_with_the_noise_level() -> None:
    method = ICD(guidance=(1.0, 8.0), embed_guidance=True, dynamic=(0.4, 0.8), knots=50, count=4)
    sampler = method.sampler()
    net = Listening()
    sample(sampler, net, torch.randn(3, 2))
    assert [t for t, _ in net.heard] == pytest.approx([1.0, 0.78, 0.52, 0.26])
    # 1 + 7 (0.8 - u) / 0.4 between the two levels.
    assert [w for _, w in net.heard] == pytest.approx([1.0, 1.35, 5.9, 8.0])
    still = Listening()
    sample(ICD(guidance=(1.0, 8.0), embed_guidance=True).sampler(), still, torch.randn(3, 2))
    assert [w for _, w in still.heard] == [4.5] * 4


def test_dynamic_guidance_needs_a_student_that_is_told_the_scale() -> None:
    with pytest.raises(ValueError, match="dynamic needs embed_guidance: true"):
        ICD(dynamic=(0.4, 0.8))
    with pytest.raises(ValueError, match="0 <= low <= high <= 1"):
        ICD(embed_guidance=True, dynamic=(0.8, 0.4))


def test_no_stock_pipeline_takes_dynamic_guidance(tmp_path: Any) -> None:
    settings = ["student.width=8", "student.depth=2", "train.steps=1", "before.0.steps=1", "train.batch=8"]
    chosen = ["method.guidance=[1.0, 4.0]", "method.embed_guidance=true", "method.dynamic=[0.4, 0.8]"]
    recipe = load(
        "toy/icd",
        [*settings, *chosen, "data.conditional=true", "student.inputs=[s, w]", "train.sample_every=0"],
    )
    trainer = Trainer(recipe, cpu=True)
    trainer.fit()
    product = product_of(recipe, trainer.product.eval(), trainer.data, "icd")
    with pytest.raises(UserError, match="dynamic guidance hands the student another scale at each step"):
        export(product, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["cd", "ctm", "meanflow", "imm", "mdt", "scd", "self-e", "twinflow"])
def test_students_of_all_times_may_be_sampled_at_1_2_4_and_8_steps(name: str) -> None:
    sampler = load(f"toy/{name}").method.sampler()
    assert sampler.counts == (1, 2, 4, 8)


def test_others_keep_to_their_own_numbers() -> None:
    assert TDD().sampler().counts == (4, 5, 6, 7, 8)
    assert load("toy/boot").method.sampler().counts is None
    assert Sampler(guidance=3.0).guidance_at(0.9) == 3.0
