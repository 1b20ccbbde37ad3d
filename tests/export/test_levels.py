"""The levels of a stock scheduler that is not built are those of the scheduler itself."""

from __future__ import annotations

import pytest

from fewstep.algebra.process import EDM
from fewstep.algebra.sampling import Sampler
from fewstep.config import UserError
from fewstep.export import levels
from fewstep.export.routes import unet_stock
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.mlp import MLP

PROCESS = EDM(sigma_min=0.01, sigma_max=50.0, rho=5.0)


@pytest.mark.parametrize("steps", [(1.0,), (0.8,), (1.0, 0.75, 0.5, 0.25), (0.9, 0.45), (1.0, 0.61, 0.3), (0.7, 0.021)])
def test_a_consistency_scheduler_is_known_without_it(steps: tuple[float, ...], monkeypatch: pytest.MonkeyPatch):
    stock = unet_stock(Denoiser(MLP(2), PROCESS, "cm", "250log_sigma"), Sampler(steps=steps))
    theirs = levels.levels_of_scheduler(stock.scheduler, **stock.visits)
    ours = levels._karras_rows(stock.config, **stock.visits)
    assert ours.differ(theirs) < levels.TOLERANCE
    assert ours.differ(levels.levels_of(PROCESS, steps)) < levels.TOLERANCE
    levels.check_scheduler(PROCESS, steps, stock)
    monkeypatch.setattr(levels, "levels_of_scheduler", None)  # not asked
    levels.check_export(PROCESS, steps, stock)
    with pytest.raises(UserError, match="evaluation and exported scheduler stand at different noise levels"):
        levels.check_export(PROCESS, tuple(u * 0.999 for u in steps), stock)
