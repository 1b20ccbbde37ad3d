"""What trajectory methods cannot do is refused, and a path keeps to its own micro-batch."""

from __future__ import annotations

import pytest

from fewstep.algebra.batch import Batch
from fewstep.algebra.process import EDM, Flow, ShiftedFlow
from fewstep.methods.imm import IMM
from fewstep.methods.sfd import SFD
from fewstep.networks.roles import Roles
from fewstep.recipe.store import load
from fewstep.train.trainer import Trainer


def test_each_micro_batch_walks_its_own_path() -> None:
    """Two micro-batches of SFD: every turn sees both, in their order, and none sees one of them twice."""
    settings = ["student.width=8", "student.depth=2", "train.steps=1", "before.0.steps=1", "train.batch=8"]
    recipe = load("toy/sfd", [*settings, "train.accumulate=2", "train.sample_every=0"])
    trainer = Trainer(recipe, cpu=True)
    seen: list[tuple[int, list[int]]] = []
    method = type(recipe.method)
    original = method.step_loss

    def listen(self: SFD, roles: Roles, batch: Batch, held: dict, i: int):
        seen.append((i, batch.draws.index.tolist()))
        return original(self, roles, batch, held, i)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "step_loss", listen)
        trainer.fit()
    count = len(recipe.method.sampler().steps)
    first, second = [0, 1, 2, 3], [4, 5, 6, 7]
    rows = [[r % 8 for r in index] for _, index in seen]
    assert [i for i, _ in seen] == [i for i in range(count) for _ in range(2)]
    assert rows == [first, second] * count


def test_imm_speaks_the_flow_process_alone() -> None:
    needs = IMM().needs()
    assert needs.refuses_process(EDM()) == "needs flow or shifted_flow, not edm"
    assert needs.refuses_process(Flow()) == needs.refuses_process(ShiftedFlow(shift=3.0)) == ""
