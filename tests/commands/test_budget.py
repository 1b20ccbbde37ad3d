"""What a network call costs in forward passes."""

from __future__ import annotations

import torch

from fewstep.algebra.process import Flow
from fewstep.commands.compare.budget import Calls
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.mlp import MLP
from fewstep.objectives.trajectory import raw_of, tangent

ROWS = 5


def test_a_tangent_costs_a_pass_more_and_a_backward_pass_two():
    net = Denoiser(MLP(2, 8, 2), Flow(), "velocity", "angle")
    calls = Calls([net])
    x, t = torch.randn(ROWS, 2), torch.full((ROWS,), 0.5, dtype=torch.float64)

    def cost_of(job: object) -> int:
        before = calls.total
        job()  # type: ignore[operator]
        return calls.total - before

    @torch.no_grad()
    def forward() -> None:
        net(x, t)

    def backward() -> None:
        net(x, t).x0.sum().backward()

    def derivative() -> None:
        tangent(raw_of(net, "velocity"), (x, t, 0 * t), (torch.ones_like(x), torch.ones_like(t), None))

    def through_frozen() -> None:
        net.requires_grad_(False)
        net(x.clone().requires_grad_(), t).x0.sum().backward()

    assert cost_of(forward) == ROWS
    assert cost_of(backward) == 3 * ROWS
    assert cost_of(derivative) == 2 * ROWS
    assert cost_of(through_frozen) == 2 * ROWS
