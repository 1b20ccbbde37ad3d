"""Range lists: what they allow, what they cost, what they refuse."""

import pytest
import torch

from fewstep.kernels import KeyRange, Ranges, Segment, block_causal, teacher_forcing
from fewstep.kernels.ranges import decode


def test_block_causal_is_the_mask_of_chunk_indices():
    chunks = [3, 5, 2]
    index = torch.repeat_interleave(torch.arange(3), torch.tensor(chunks))
    allowed = index[:, None] >= index[None, :]
    assert torch.equal(block_causal(chunks).mask(), allowed)
    near = allowed & (index[:, None] - index[None, :] < 2)
    assert torch.equal(block_causal(chunks, window=2).mask(), near)
    prefixed = torch.cat([torch.ones(10, 4, dtype=torch.bool), near], 1)
    assert torch.equal(block_causal(chunks, context=4, window=2).mask(), prefixed)


def test_teacher_forcing_is_the_mask_of_clean_and_noisy_chunks():
    chunks = [3, 5, 2]
    index = torch.repeat_interleave(torch.arange(3), torch.tensor(chunks)).repeat(2)
    noisy = torch.arange(20) >= 10
    clean_sees = ~noisy[None, :] & (index[:, None] >= index[None, :])
    noisy_sees = (~noisy[None, :] & (index[:, None] > index[None, :])) | (
        noisy[None, :] & (index[:, None] == index[None, :])
    )
    assert torch.equal(teacher_forcing(chunks).mask(), torch.where(noisy[:, None], noisy_sees, clean_sees))


@pytest.mark.parametrize("n", [1, 2, 7])
def test_teacher_forcing_work_follows_the_closed_form(n):
    ranges = teacher_forcing([4] * n)
    assert ranges.jvp_work() == 16 * (3 * n * n + 5 * n)
    assert ranges.jvp_work(skip=False) == 16 * 6 * n * (n + 1)


def test_seven_chunks_cost_182_of_336():
    ranges = teacher_forcing([1] * 7)
    assert (ranges.jvp_work(), ranges.jvp_work(skip=False)) == (182, 336)


@pytest.mark.parametrize(
    "ranges", [block_causal([3, 5, 2], context=4, window=2), teacher_forcing([3, 5, 2]), block_causal([1])]
)
def test_encoding_and_transposition_keep_every_pair(ranges):
    assert decode(ranges.encode()) == ranges
    back = torch.zeros(ranges.queries, ranges.keys, dtype=torch.bool)
    for keys in ranges.transposed():
        for rows in keys.keys:
            back[rows.start : rows.stop, keys.start : keys.stop] = True
    assert torch.equal(back, ranges.mask())
    assert decode([]) is None


def test_malformed_ranges_are_refused():
    with pytest.raises(ValueError, match="expected one starting at 2"):
        Ranges(5, 4, (Segment(0, 2, ()), Segment(3, 5, ())))
    with pytest.raises(ValueError, match="segments end at 4, but queries is 5"):
        Ranges(5, 4, (Segment(0, 4, ()),))
    with pytest.raises(ValueError, match="inside"):
        Ranges(5, 4, (Segment(0, 5, (KeyRange(2, 6),)),))
    with pytest.raises(ValueError, match="disjoint"):
        Ranges(5, 4, (Segment(0, 5, (KeyRange(0, 3), KeyRange(2, 4))),))
    with pytest.raises(ValueError, match="still for some queries and moving for others"):
        Ranges(4, 4, (Segment(0, 2, (KeyRange(0, 4),)), Segment(2, 4, (KeyRange(1, 3, True),))))
    with pytest.raises(ValueError, match="chunks"):
        block_causal([3, 0])
    with pytest.raises(ValueError, match="window"):
        block_causal([3], window=0)
    with pytest.raises(ValueError, match="context"):
        block_causal([3], context=-1)
    with pytest.raises(ValueError, match="chunks"):
        teacher_forcing([])
