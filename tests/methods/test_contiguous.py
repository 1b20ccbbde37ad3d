"""PPCL's depth part: what a block's loss says, that intervals do not mix, that training helps the whole student."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.process import Flow
from fewstep.config import RecipeError
from fewstep.methods.contiguous import Contiguous, apart
from fewstep.networks.adapters import frozen, plain_copy
from fewstep.networks.blocks import blocks_of, prune, replaced
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.dit import DiT
from fewstep.networks.roles import Roles
from fewstep.recipe.store import load
from fewstep.train.trainer import Trainer

SHAPE = (2, 4, 6)


def roles(intervals: Any) -> Roles:
    torch.manual_seed(0)
    net = DiT(SHAPE, width=8, heads=2, depth=6, classes=3)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    whole = Denoiser(net, Flow(), "velocity", "angle")
    student = plain_copy(whole)
    prune(student, intervals)
    return Roles(teacher=frozen(whole), student=student)


def batch(b: int = 5) -> Batch:
    draws = Draws(fold("contiguous"), torch.arange(b))
    x0 = torch.randn(b, *SHAPE, generator=torch.Generator().manual_seed(2))
    return Batch(draws, SHAPE, x0, torch.arange(b) % 3, torch.full((b,), 3))


def test_the_published_distance_is_of_directions_alone():
    h = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(0))
    assert float(apart(3 * h, h, "l2")) == pytest.approx(0, abs=1e-12)
    assert float(apart(-h, h, "l2")) == pytest.approx(4, rel=1e-6)
    assert float(apart(3 * h, h, "none")) == pytest.approx(float((2 * h).square().mean()), rel=1e-6)


def test_a_run_of_one_block_costs_nothing_and_the_others_what_they_say():
    taking = roles([(1, 1), (3, 5)])
    (losses,) = Contiguous(norm="none").losses(taking, batch(), 0)
    assert list(losses) == ["blocks_1_1", "blocks_3_5"]
    assert float(losses["blocks_1_1"].detach()) == 0
    (same,) = Contiguous(norm="none").losses(taking, batch(), 3)
    assert same.log == {}
    whole = blocks_of(taking.teacher)
    seen: list[Any] = []
    handle = whole[3].register_forward_pre_hook(lambda _m, args: seen.append(args))
    (losses,) = Contiguous(norm="none").losses(taking, batch(), 0)
    handle.remove()
    ((h, embedding),) = seen
    want = h
    for block in whole[3:6]:
        want = block(want, embedding)
    by_hand = (whole[4](h, embedding) - want).square().mean()
    assert float(losses["blocks_3_5"].detach()) == pytest.approx(float(by_hand), rel=1e-6)
    assert float(losses.log["output_mse"]) > 0


def test_gradients_of_intervals_do_not_mix_and_nothing_else_has_any():
    taking = roles([(0, 1), (3, 5)])
    (losses,) = Contiguous().losses(taking, batch(), 0)
    first, second = replaced(taking.student)
    losses["blocks_0_1"].backward(retain_graph=True)
    assert all(p.grad is None for p in second.parameters())
    assert any(float(p.grad.abs().max()) > 0 for p in first.parameters() if p.grad is not None)
    losses["blocks_3_5"].backward()
    mine = {id(p) for block in (first, second) for p in block.parameters()}
    for name, p in taking.student.named_parameters():
        assert (p.grad is not None) == (id(p) in mine), name
    assert all(p.grad is None for p in taking.teacher.parameters())


def test_another_student_is_refused():
    taking = roles([(0, 1)])
    with pytest.raises(ValueError, match="trains the blocks of a network `pruned`"):
        next(Contiguous().losses(Roles(teacher=taking.teacher, student=plain_copy(taking.teacher)), batch(), 0))
    with pytest.raises(RecipeError, match=r"drop_cond must lie in \[0, 1\]"):
        load("toy/ppcl", ["before.1.method.drop_cond=2"])
    with pytest.raises(RecipeError, match=r"student\.of: role 'hole' is not in this recipe"):
        load("toy/ppcl", ["student.of=hole"])
    with pytest.raises(RecipeError, match="role teacher: cannot be trained where it is the teacher"):
        load("toy/ppcl", ["before.0.method.role=teacher"])


def test_the_stages_bring_the_assembled_student_to_the_whole_network():
    """Each stage starts from the weights that the one before it left; blocks outside the intervals wait for the last."""
    cut = [
        "student.intervals=[[1,2],[4,6]]",
        "roles.whole.width=24",
        "train.batch=64",
        "train.steps=1",
        "train.log_every=1",
    ]
    recipe = load("toy/ppcl", [*cut, "before.0.steps=120", "before.1.steps=150", "before.2.steps=1"])
    trainer = Trainer(recipe, None, cpu=True)
    noted: list[float] = []
    fit = trainer._run_stage

    def watch(stage: Any) -> None:
        if stage.method.name == "contiguous":
            before = {k: v.clone() for k, v in trainer.roles.whole.state_dict().items()}
        fit(stage)
        if stage.method.name == "contiguous":
            assert all(torch.equal(v, before[k]) for k, v in trainer.roles.whole.state_dict().items())
            blocks, whole = blocks_of(trainer.roles.student), blocks_of(trainer.roles.whole)
            assert len(blocks) == 5
            for i, j in ((0, 0), (2, 3), (4, 7)):
                torch.testing.assert_close(blocks[i].state_dict(), whole[j].state_dict())
            for i, j in ((1, 1), (3, 5)):
                assert not torch.equal(blocks[i].up.weight, whole[j].up.weight)  # type: ignore[union-attr,arg-type]

    def record(losses: Any) -> None:
        noted.append(float(losses))

    trainer._run_stage = watch  # type: ignore[method-assign]
    add = trainer.loop.meter.add
    trainer.loop.meter.add = lambda name, value: (record(value) if name == "output_mse" else None, add(name, value))[1]  # type: ignore[method-assign]
    trainer.fit()
    assert noted[-1] < 0.5 * noted[0]
