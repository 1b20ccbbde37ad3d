"""train.attention: where scaled_dot_product_attention goes while a recipe trains."""

from __future__ import annotations

import pytest
import torch

from fewstep.config import RecipeError, UserError
from fewstep.kernels import use_fewstep_attention
from fewstep.recipe.schema import Recipe
from fewstep.recipe.store import load
from fewstep.train.trainer import Trainer

SMALL = [
    "student={name: dit, process: {name: flow}, patch: 2, width: 16, depth: 2, heads: 2, inputs: [s]}",
    "train.batch=6",
]
SHORT = ["train.steps=2", "train.sample_every=0", "evaluate=null", "optim.default.warmup=0"]


def meanflow(attention: str) -> Recipe:
    return load("digits-meanflow", [*SMALL, *SHORT, f"train.attention={attention}"])


def trained(attention: str, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, set[str], int]:
    """The student's weights after two steps, the implementations that ran, and the calls left to torch."""
    entered: list[use_fewstep_attention] = []
    enter = use_fewstep_attention.__enter__
    monkeypatch.setattr(use_fewstep_attention, "__enter__", lambda c: entered.append(c) or enter(c))
    trainer = Trainer(meanflow(attention), cpu=True)
    trainer.fit()
    monkeypatch.undo()
    weights = torch.cat([p.detach().flatten() for p in trainer.roles.student.parameters()])
    return weights, {c.impl for c in entered if c.calls["fewstep"]}, sum(c.calls["torch"] for c in entered)


def test_every_choice_trains_the_same_student(monkeypatch: pytest.MonkeyPatch) -> None:
    start = torch.cat([p.detach().flatten() for p in Trainer(meanflow("auto"), cpu=True).roles.student.parameters()])
    auto, ran, _ = trained("auto", monkeypatch)
    assert ran == {"auto"}
    assert float((auto - start).abs().max()) > 1e-5
    for impl in ("chunked", "reference"):
        weights, ran, left = trained(impl, monkeypatch)
        assert (ran, left) == ({impl}, 0)
        assert float((weights - auto).norm() / (auto - start).norm()) < 1e-3


def test_a_choice_without_code_for_the_device_is_refused_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=r"^train\.attention: .*'xformers' has no kernel for cpu.*use 'auto'"):
        Trainer(meanflow("xformers"), cpu=True)
    with pytest.raises(UserError, match=r"^train\.attention: .*'triton' needs .*"):
        Trainer(meanflow("triton"), cpu=True)
    with pytest.raises(RecipeError, match=r"'flash' is not one of auto, .*, xformers"):
        meanflow("flash")


def test_checkpointing_recomputes_with_the_attention_of_the_forward() -> None:
    unet = ["student={name: unet2d, channels: [8, 16], layers: 1, attention: true}", "train.batch=6"]
    plain, saved = (
        Trainer(
            load("digits-teacher", [*unet, *SHORT[:-1], "train.attention=chunked", f"train.checkpointing={on}"]),
            cpu=True,
        )
        for on in ("false", "true")
    )
    plain.fit(), saved.fit()
    for a, b in zip(plain.roles.student.parameters(), saved.roles.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_implementation_without_tangents_is_refused_for_a_method_that_needs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fewstep.train.session.check_device", lambda impl, device: None)
    with pytest.raises(UserError, match=r"^train\.attention: 'xformers' has no tangent.*use auto"):
        Trainer(meanflow("xformers"), cpu=True)
