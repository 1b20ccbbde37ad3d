"""Blocks replaced in place: which stand where, what is refused, and that untouched intervals change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fewstep.algebra.process import Flow
from fewstep.networks.adapters import plain_copy
from fewstep.networks.blocks import blocks_of, check_intervals, fill, intervals_of, prune, replaced, streams, watched
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.dit import DiT
from fewstep.networks.mlp import MLP


def dit(depth: int = 6, seed: int = 0) -> Denoiser:
    torch.manual_seed(seed)
    net = DiT((2, 4, 6), width=8, heads=2, depth=depth, classes=3)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return Denoiser(net, Flow(), "velocity", "angle").eval()


def called(net: Denoiser) -> torch.Tensor:
    g = torch.Generator().manual_seed(5)
    x, t = torch.randn(3, 2, 4, 6, generator=g), torch.tensor([0.2, 0.5, 0.9])
    return net(x, t, torch.tensor([0, 2, 3])).x0


@torch.no_grad()
def test_the_middle_block_stands_for_its_run():
    whole = dit()
    pruned = plain_copy(whole)
    prune(pruned, [(1, 3), (4, 5)])
    assert intervals_of(pruned) == ((1, 3), (4, 5))
    assert intervals_of(whole) == ()

    def source(block: Any) -> int:
        return next(i for i, b in enumerate(blocks_of(whole)) if torch.equal(b.qkv.weight, block.qkv.weight))  # type: ignore[union-attr,arg-type]

    names = [source(block) for block in blocks_of(pruned)]
    assert names == [0, 2, 4]
    assert [b.qkv.weight.data_ptr() for b in replaced(pruned)] == [b.qkv.weight.data_ptr() for b in blocks_of(pruned)[1:]]
    assert float((called(pruned) - called(whole)).abs().max()) > 1e-3
    # A run of one block is that block.
    same = plain_copy(whole)
    prune(same, [(2, 2)])
    assert torch.equal(called(same), called(whole))
    # A pruned network of other weights becomes the pruned whole.
    other = dit(seed=3)
    prune(other, [(1, 3), (4, 5)])
    fill(other, whole)
    assert torch.equal(called(other), called(pruned))
    with pytest.raises(RuntimeError):
        fill(other, dit(depth=4))


@torch.no_grad()
def test_a_call_of_the_first_block_and_the_answer_of_the_last_are_seen():
    whole = dit()
    with watched(whole, [(1, 3), (2, 2)]) as calls:
        called(whole)
    run, one = calls
    h = run.args
    for i in (1, 2, 3):
        out = blocks_of(whole)[i](*h, **run.kwargs)
        if i == 2:
            torch.testing.assert_close(one.output, out)
        h = (out, *h[1:])
    torch.testing.assert_close(run.output, h[0])
    assert len(streams((None, h[0]))) == 1
    before = [len(b._forward_hooks) + len(b._forward_pre_hooks) for b in blocks_of(whole)]
    assert before == [0] * 6


def test_intervals_that_make_no_network_are_refused():
    whole = dit()
    for intervals, words in (
        ([(3, 2)], r"\[3, 2\] ends before it begins"),
        ([(0, 2), (2, 3)], r"\[2, 3\] begins before block 3"),
        ([(4, 6)], r"the blocks are 0\.\.5"),
    ):
        with pytest.raises(ValueError, match=words):
            check_intervals(intervals, whole)
    blocks: Any = blocks_of(whole)
    blocks[3].up = torch.nn.Linear(8, 12)
    with pytest.raises(ValueError, match=r"block 3 has other weights than block 2"):
        check_intervals([(2, 3)], whole)
    plain = Denoiser(MLP(2, 8, 3), Flow(), "velocity", "angle")
    with pytest.raises(ValueError, match="a MLP has no list of blocks"):
        blocks_of(plain)
    assert intervals_of(plain) == ()
    assert intervals_of(torch.nn.Linear(2, 2)) == ()
    assert len(blocks_of(Denoiser(MLP(2, 8, 5, residual=True), Flow(), "velocity", "angle"))) == 4
