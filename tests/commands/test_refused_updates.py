"""What a run says when it ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fewstep.commands.finish import refused_updates


def trainer(skipped: int, **turns: tuple[int, int]) -> Any:
    """A trainer whose optimisers refused and made so many updates."""
    optim = {k: SimpleNamespace(names=(k,), skipped=a, updates=b) for k, (a, b) in turns.items()}
    return SimpleNamespace(progress=SimpleNamespace(skipped=skipped), loop=SimpleNamespace(optim=optim))


def test_refused_updates_have_a_closing_word():
    assert refused_updates(trainer(0, student=(0, 8))) is None
    told = refused_updates(trainer(2, student=(1, 7), critic=(1, 7)))
    assert told == "note: 2 updates were refused, their gradients were not finite"
    told = refused_updates(trainer(7, student=(7, 1), critic=(0, 8)))
    assert told is not None
    assert told.startswith(
        "warning: 7 updates were refused, their gradients were not finite: 7 of 8 of student in the last"
    )
    assert "hardly more than its start" in told
    assert refused_updates(trainer(1)) == "note: 1 updates were refused, their gradients were not finite"
