"""Numbers of segments for one student: each update draws one, and the student takes each of these numbers of steps."""

from __future__ import annotations

import pytest
import torch

from fewstep.algebra.draws import Draws, fold
from fewstep.methods.segments import Segments

COUNTS = (1, 2, 4, 8)


def test_an_update_compares_within_segments_of_the_number_that_it_drew():
    method = Segments(segments=1, counts=COUNTS, to="edge", knots=64)
    seen = set()
    for update in range(40):
        draws = Draws(fold("segments", update), torch.arange(500))
        t, u, s = method.levels(draws)
        assert bool(((s <= u) & (u < t)).all())
        edges = {round(float(v) * 64) for v in s}
        (count,) = [n for n in COUNTS if edges == {j * 64 // n for j in range(n)}]
        assert bool(((t - s) * count <= 1 + 1e-9).all())
        seen.add(count)
    assert seen == set(COUNTS)


def test_it_is_sampled_at_each_of_them():
    sampler = Segments(segments=4, counts=COUNTS).sampler()
    assert sampler.steps == (1.0, 0.75, 0.5, 0.25)
    assert sampler.counts == COUNTS
    assert [len(own) for own in sampler.lists] == [1, 2, 4, 8]
    alone = Segments(segments=4)
    assert (alone.sampler().lists, alone.sampler().counts) == ((), None)
    one, other = (m.levels(Draws(fold("x"), torch.arange(9))) for m in (alone, Segments(segments=4)))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_counts_that_are_none_are_named():
    for counts in ((4,), (4, 4), (1, 2)):
        with pytest.raises(ValueError, match=r"counts .*: expected two numbers of segments or more, each once, and"):
            Segments(segments=4, counts=counts)
    with pytest.raises(ValueError, match="segments 8 must not exceed the 6 knots"):
        Segments(segments=2, counts=(2, 8), knots=6)
