"""What the Triton kernels are launched with, seen without running them."""

import pytest
import torch

pytest.importorskip("triton")

from fewstep.kernels import triton_launch


class Recorder:
    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((grid, args, options))


@pytest.fixture
def recorded(monkeypatch):
    recorder = Recorder()
    for name in ("attention_kernel", "backward_query_kernel", "backward_key_kernel"):
        monkeypatch.setattr(triton_launch, name, recorder)
    monkeypatch.setattr(triton_launch, "_CHOSEN", {})
    return recorder.launches


OPTIONS = {"mask": None, "ranges": None, "causal": False, "scale": 0.3}


def run(x):
    o, to, lse, mu = triton_launch.forward(*x, **OPTIONS, tangent=True)
    triton_launch.backward(o, to, *x, o, to, lse, mu, **OPTIONS)
    return o, to


@pytest.mark.parametrize("inside", [False, True])
def test_both_layouts_reach_the_kernels_without_a_copy(recorded, inside):
    shape = (2, 33, 3, 16) if inside else (2, 3, 33, 16)
    x = [torch.randn(shape, dtype=torch.float16) for _ in range(6)]
    x = [t.transpose(1, 2) if inside else t for t in x]
    o, to = run(x)
    assert len(recorded) == 3
    for _, args, _ in recorded:
        assert [a.data_ptr() for a in args[:6]] == [t.data_ptr() for t in x]
        flat = [s for t in x for s in t.stride()]
        numbers = [a for a in args if not isinstance(a, torch.Tensor)]
        assert numbers[: len(flat)] == flat
    assert o.stride() == to.stride() == x[0].stride()


def test_more_heads_than_the_second_grid_dimension_holds(recorded):
    run([torch.zeros(33, 2048, 1, 16, dtype=torch.float16) for _ in range(6)])
    assert len(recorded) == 3
    for grid, args, _ in recorded:
        assert grid == (33 * 2048,)
        # the number of tiles per head, by which the kernels split their one index
        assert args[-1] == 1
    recorded.clear()
    run([torch.zeros(2, 3, 300, 16, dtype=torch.float16) for _ in range(6)])
    for i, (grid, args, options) in enumerate(recorded):
        size = options["BLOCK_N" if i == 2 else "BLOCK_M"]
        assert args[-1] == -(-300 // size) > 1
        assert grid == (args[-1] * 6,)
