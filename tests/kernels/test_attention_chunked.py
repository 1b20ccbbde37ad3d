"""The row-chunked CPU implementation against the fp64 reference, and its memory."""

import pytest
import torch
import torch.nn.functional as F
from attention_cases import SUBSETS, errors, layouts, masks, relative, tensors
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.kernels import (
    Ranges,
    attention,
    attention_jvp,
    attention_tangent,
    chunked,
    reference,
    teacher_forcing,
)


def worst(result):
    return max(result.values())


@pytest.mark.parametrize("present", SUBSETS)
@pytest.mark.parametrize("kind", [None, "bool", "float"])
def test_every_output_and_gradient_with_every_subset_of_tangents(present, kind):
    mask = None if kind is None else masks(150, 61)[kind]
    assert worst(errors(tensors(150, 61, 8, 12), present, mask=mask, impl="chunked")) < 1e-12


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_of_each_head_is_its_own(kind):
    n = 21
    allowed = torch.stack(
        (torch.eye(n, dtype=torch.bool), torch.ones(n, n, dtype=torch.bool), torch.ones(n, n).tril() > 0)
    )
    mask = allowed[None] if kind == "bool" else torch.zeros(1, 3, n, n).masked_fill(~allowed, float("-inf"))
    assert worst(errors(tensors(n, n, 8, 12), (True, True, True), mask=mask, impl="chunked")) < 1e-12


@pytest.mark.parametrize(("n", "m", "d"), [(1, 17, 28), (17, 1, 40), (256, 77, 72), (130, 257, 160), (3, 5, 300)])
def test_lengths_and_head_dimensions(n, m, d):
    # one key makes every score gradient zero, where a relative error says nothing
    assert worst(errors(tensors(n, m, d), (True, True, True), impl="chunked", grads=m > 1)) < 1e-12


@pytest.mark.parametrize(("n", "m"), [(150, 61), (61, 150)])
def test_causal(n, m):
    assert worst(errors(tensors(n, m, 8, 12), (True, True, True), causal=True, impl="chunked")) < 1e-12


@pytest.mark.parametrize("name", list(layouts()))
@pytest.mark.parametrize("present", SUBSETS)
def test_ranges_skip_still_parts_and_stay_exact(name, present):
    ranges, rows, keys = layouts()[name]
    x = tensors(ranges.queries, ranges.keys, 8, 12)
    assert worst(errors(x, present, ranges=ranges, still=(rows, keys), impl="chunked")) < 1e-12


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 4e-4), (torch.bfloat16, 2.5e-3)])
@pytest.mark.parametrize("common", [0.0, 4.0, 10.0])
def test_half_precision_only_rounds_the_result(dtype, limit, common):
    q, k, v, *tangents = tensors(200, 300, 64, seed=3)
    inputs = [x.to(dtype) for x in (q, k + common * torch.randn(1, 3, 1, 64).double(), v, *tangents)]
    o, to = attention_jvp(*inputs, impl="chunked")
    exact = reference.attention_jvp(*(x.double() for x in inputs), scale=0.125)
    assert o.dtype == to.dtype == dtype
    assert relative(o, exact[0]) < limit
    assert relative(to, exact[1]) < limit


@pytest.mark.parametrize("least", [-1e4, -1e9, torch.finfo(torch.float32).min])
def test_rows_masked_throughout_by_a_finite_value_keep_their_weights(least):
    """Their lse has no digits left for the scores, so nothing may be recomputed from it."""
    q, k, v, *tangents = tensors(6, 40, 8, dtype=torch.float32)
    mask = torch.zeros(6, 40)
    mask[:, 30:] = mask[2] = least
    for impl in ("reference", "chunked"):
        o, to, lse = attention_jvp(q, k, v, *tangents, mask=mask, impl=impl, return_lse=True)
        with sdpa_kernel(SDPBackend.MATH):
            exact = torch.func.jvp(lambda *x: F.scaled_dot_product_attention(*x, mask), (q, k, v), tuple(tangents))
        assert relative(o, exact[0]) < 1e-6
        assert relative(to, exact[1]) < 1e-6
        if impl == "chunked":
            assert relative(attention_tangent(q, k, v, o, lse, *tangents, mask=mask)[0], to) < 1e-6


def test_statistics_of_half_precision_are_float32():
    x = tensors(6, 9, 4, 5, dtype=torch.float16)
    for impl in ("reference", "chunked"):
        out = attention_jvp(*x, impl=impl, return_lse=True, return_mu=True)
        assert [t.dtype for t in out] == [torch.float16] * 2 + [torch.float32] * 2


def test_a_row_without_keys_in_ranges_is_zero():
    ranges = teacher_forcing([3, 4])
    hollow = Ranges(14, 14, tuple(s if i else type(s)(s.start, s.stop, (), True) for i, s in enumerate(ranges.segments)))
    q, k, v, *tangents = tensors(14, 14, 4)
    for t in tangents:
        t[:, :, :7] = 0
    o, to, lse = attention_jvp(q, k, v, *tangents, ranges=hollow, impl="chunked", return_lse=True)
    assert not o[:, :, :3].any()
    assert not to[:, :, :3].any()
    assert torch.isneginf(lse[:, :, :3]).all()
    assert o[:, :, 3:].any()


def test_a_tangent_at_a_still_position_is_refused():
    ranges, _, keys = layouts()["block-causal"]
    q, k, v, tq, tk, tv = tensors(ranges.queries, ranges.keys, 4)
    with pytest.raises(ValueError, match=r"\[0, 13\) are declared still, but the tangent of k"):
        attention_jvp(q, k, v, tq, tk, tv, ranges=ranges, impl="chunked")
    tk[:, :, :keys] = 0
    with pytest.raises(ValueError, match="tangent of v"):
        attention_jvp(q, k, v, tq, tk, tv, ranges=ranges, impl="chunked")


def test_both_layouts_agree():
    q, k, v, *tangents = tensors(20, 30, 8, 12)
    o, to = attention_jvp(q, k, v, *tangents, impl="chunked")
    swapped = [x.transpose(1, 2) for x in (q, k, v, *tangents)]
    for contiguous in (False, True):
        x = [t.contiguous() if contiguous else t for t in swapped]
        o2, to2 = attention_jvp(*x, impl="chunked", layout="bnhd")
        assert relative(o2.transpose(1, 2), o) < 1e-14
        assert relative(to2.transpose(1, 2), to) < 1e-14
        assert relative(attention(*x[:3], impl="chunked", layout="bnhd").transpose(1, 2), o) < 1e-14


def test_nothing_quadratic_is_kept_for_the_backward():
    n, sizes = 512, []
    x = tensors(n, n, 16, dtype=torch.float32)
    for t in x[:3]:
        t.requires_grad_(True)

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        o, _ = attention_jvp(*x, impl="chunked")
    assert len(sizes) >= 8
    assert sum(sizes) <= 8 * 2 * 3 * n * 16
    assert o.requires_grad


def test_no_allocation_grows_with_the_square_of_the_length():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor):
                    self.size = max(self.size, t.numel())
            return out

    n, d = 2048, 8
    x = [t[0].squeeze(0) for t in torch.randn(6, 1, 1, 2, n, d)]
    with Largest() as seen:
        chunked.attention_jvp(*(t.unsqueeze(0) for t in x), scale=0.3)
    assert 2 * n * d <= seen.size <= 2 * chunked.ROWS * n
