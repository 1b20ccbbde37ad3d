"""What only a GPU can show: the compiled kernels' accuracy, their memory, odd shapes, no silent fallback."""

import pytest
import torch
from attention_cases import SUBSETS, errors, layouts, masks, relative, tensors

from fewstep.kernels import attention_jvp, explain, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(x, dtype):
    return [t.to("cuda", dtype) for t in x]


@pytest.mark.parametrize("common", [0.0, 4.0, 10.0])
def test_bfloat16_error_is_that_of_rounding(common):
    q, k, v, *tangents = tensors(1024, 1024, 64, batch=1, heads=2)
    x = on_gpu([q, k + common * torch.randn(1, 2, 1, 64).double(), v, *tangents], torch.bfloat16)
    o, to = attention_jvp(*x, impl="triton")
    exact = reference.attention_jvp(*(t.double() for t in x), scale=0.125)
    assert relative(o, exact[0]) <= 2.5e-3
    assert relative(to, exact[1]) <= 2.5e-3


@pytest.mark.parametrize("d", [28, 40, 64, 72, 80, 96, 128, 160, 256])
@pytest.mark.parametrize(("n", "m"), [(1, 17), (49, 77), (999, 256), (1670, 1670)])
def test_any_length_and_head_dimension(n, m, d):
    x = on_gpu(tensors(n, m, d, batch=1, heads=2), torch.bfloat16)
    assert explain(*x[:3], tangents="q").impl == "triton"
    assert max(errors(x, (True, True, True), impl="triton").values()) <= 1e-2


@pytest.mark.parametrize("present", SUBSETS)
def test_missing_tangents_masks_and_ranges(present):
    x = on_gpu(tensors(150, 190, 64, 32, batch=2), torch.float16)
    for mask in masks(150, 190).values():
        assert max(errors(x, present, mask=mask.cuda(), impl="triton").values()) <= 4e-3
    for ranges, rows, keys in layouts().values():
        x = on_gpu(tensors(ranges.queries, ranges.keys, 64), torch.float16)
        assert max(errors(x, present, ranges=ranges, still=(rows, keys), impl="triton").values()) <= 4e-3


def test_extra_memory_is_linear_in_the_length():
    x = [torch.randn(1, 24, 8192, 128, device="cuda", dtype=torch.bfloat16) for _ in range(6)]
    attention_jvp(*(t[:, :, :128] for t in x), impl="triton")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = attention_jvp(*x, impl="triton")
    torch.cuda.synchronize()
    statistics = 2 * 24 * 8192 * 4
    assert torch.cuda.max_memory_allocated() - before <= 2 * outputs[0].nbytes + statistics + 2**20
