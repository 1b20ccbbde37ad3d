"""Which two times a step compares: neighbours of a grid, and ECT's pairs stage by stage."""

from __future__ import annotations

import pytest
import torch

from fewstep.algebra.draws import Draws
from fewstep.algebra.pairings import CTGrid, ECTPairs, Grid, ICTGrid, Pairing, ct_points, ict_points, ict_weights
from fewstep.algebra.process import EDM, Flow, Process

F64 = torch.float64


@pytest.mark.parametrize("process", [Flow(), EDM()], ids=["flow", "edm"])
@pytest.mark.parametrize(
    ("pairing", "points"),
    [
        (Grid(points=7), 7),
        (CTGrid(total=100, start=3, end=20), ct_points(30, 100, 3, 20)),
        (ICTGrid(total=100, start=5, end=20), ict_points(30, 100, 5, 20)),
    ],
    ids=["grid", "ct", "ict"],
)
def test_a_grids_pairs_are_its_neighbours_and_every_one_occurs(pairing: Pairing, points: int, process: Process):
    t, u = pairing.sample(Draws(5, torch.arange(3000)), process, 30)
    k = process.level(t) * (points - 1)
    torch.testing.assert_close(k, k.round(), rtol=0, atol=1e-8)
    torch.testing.assert_close(process.level(u) * (points - 1), k - 1, rtol=0, atol=1e-8)
    share = torch.bincount(k.round().long() - 1, minlength=points - 1).double() / len(k)
    assert len(share) == points - 1
    uniform = torch.full_like(share, 1 / (points - 1))
    wanted = ict_weights(process, points, -1.1, 2.0) if isinstance(pairing, ICTGrid) else uniform
    assert float((share - wanted).abs().max()) < 4 * (0.25 / len(k)) ** 0.5


def test_ect_starts_at_the_stage_that_first_says():
    s = torch.tensor([0.3, 2.0, 40.0], dtype=F64)
    # Stage 3: rho = 1 - 2^-4.
    wanted = s - s / 16 * (1 + 8 * torch.sigmoid(-s))
    torch.testing.assert_close(ECTPairs(first=3).lower(EDM(), s, 0), wanted, rtol=1e-12, atol=0)
    later = ECTPairs(stage_steps=10).lower(EDM(), s, 39)
    torch.testing.assert_close(later, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(ECTPairs(first=1, stage_steps=10).lower(EDM(), s, 29), wanted, rtol=1e-12, atol=0)
