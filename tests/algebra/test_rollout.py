"""Lists of steps: an update draws one list for all its samples, then the step of it that is trained."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from listening import Listening

from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.process import Flow
from fewstep.algebra.rollout import StepLists, listed, rollout
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.times import check_step_lists

LISTS = ((1.0,), (1.0, 0.5), (0.8, 0.6, 0.4, 0.2))


def draws(update: int) -> Draws:
    return Draws(fold("lists", update), torch.arange(3))


def test_every_list_and_every_step_of_one_are_as_likely_as_the_others():
    """P(list) = 1/3, and of n steps P(exit) = 1/n: the way there is that of the list."""
    seen: Counter[tuple[float, ...]] = Counter()
    count = 1200
    for update in range(count):
        net = Listening(Flow(), 0.5)
        made = rollout(net, draws(update), (2,), listed(LISTS[0], LISTS))
        way = tuple(round(float(t[0]), 6) for t in net.times)
        assert all(bool((t == t[0]).all()) for t in net.times)
        assert float(made.t[0]) == way[-1]
        assert net.graphs == [False] * (len(way) - 1) + [True]
        seen[way] += 1
    wanted = {tuple(own[: k + 1]): 1 / 3 / len(own) for own in LISTS for k in range(len(own))}
    wanted[(1.0,)] = 1 / 3 + 1 / 6  # the first step of two of them
    assert set(seen) == set(wanted)
    for way, share in wanted.items():
        assert seen[way] / count == pytest.approx(share, abs=4 * (share * (1 - share) / count) ** 0.5)


def test_one_update_is_a_rollout_of_the_list_that_it_drew():
    for update in range(8):
        net = Listening(Flow(), 0.5, 0.1)
        made = rollout(net, draws(update), (2,), StepLists(LISTS))
        way = [float(t[0]) for t in net.times]
        d = draws(update)
        chosen = LISTS[d.shared_integer(len(LISTS))]
        stop = d.shared_integer(len(chosen)) if len(chosen) > 1 else 0
        assert way == pytest.approx(list(chosen[: stop + 1]))
        # Noise is drawn for the longest list, whichever was drawn.
        noise = [d.normal(2) for _ in range(4)]
        x = Flow().prior(noise[0], made.t)
        for i in range(stop):
            x0 = net.answer(x.double())
            x = (1 - chosen[i + 1]) * x0 + chosen[i + 1] * noise[i + 1]
        torch.testing.assert_close(made.x_in.double(), x.double())


def test_without_lists_nothing_changes():
    assert listed((1.0, 0.5), ()) == (1.0, 0.5)
    assert Sampler(steps=(1.0,), lists=LISTS).counts == (1, 2, 4)
    assert Sampler(steps=(1.0,)).counts is None


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        (((1.0,), (0.5, 1.0)), r"step_lists\.1: steps \[0\.5, 1\.0\] must decrease strictly"),
        (((1.0,), ()), r"step_lists\.1: steps is empty"),
        (((1.0,), (1.2, 0.5)), r"step_lists\.1: .* must lie in \(0, 1\]"),
        (((1.0,),), "one list is what `steps` is for"),
        (((1.0, 0.5), (1.0, 0.4), (1.0,)), "two lists have 2 steps, and `--steps 2` could mean either"),
        (((1.0, 0.5), (1.0, 0.6, 0.3)), r"none is steps, \[1\.0\], at which it is sampled"),
    ],
)
def test_lists_that_are_none_are_named(lists: tuple[tuple[float, ...], ...], said: str):
    with pytest.raises(ValueError, match=said):
        check_step_lists((1.0,), lists)
