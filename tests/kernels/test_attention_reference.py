"""The reference itself against closed forms, finite differences and autograd."""

import pytest
import torch
import torch.nn.functional as F
from attention_cases import SUBSETS, masks, relative, tensors
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.kernels import attention_jvp, merge, reference


@pytest.mark.parametrize("kind", [None, "bool", "float"])
def test_reference_equals_sdpa_and_its_jvp(kind):
    q, k, v, *tangents = tensors(5, 7, 4, 6)
    mask = None if kind is None else masks(5, 7)[kind]
    # SDPA differentiates a dead row to NaN, so the comparison leaves that row out
    rows = [i for i in range(5) if mask is None or i != 5 // 3]
    bias = mask.double() if kind == "float" else mask
    with sdpa_kernel(SDPBackend.MATH):
        exact = torch.func.jvp(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, bias, scale=0.3),
            (q, k, v),
            tuple(tangents),
        )
    o, to, lse, mu = reference.attention_jvp(q, k, v, *tangents, mask=mask, scale=0.3)
    assert relative(o[:, :, rows], exact[0][:, :, rows]) < 1e-13
    assert relative(to[:, :, rows], exact[1][:, :, rows]) < 1e-13
    assert o.shape == (2, 3, 5, 6)
    assert lse.shape == mu.shape == (2, 3, 5)


def test_tangents_are_the_limits_of_central_differences():
    q, k, v, tq, tk, tv = tensors(5, 7, 4, 6)
    eps = 1e-5

    def at(sign):
        return reference.attention_jvp(q + sign * eps * tq, k + sign * eps * tk, v + sign * eps * tv, scale=0.3)

    _, to, _, mu = reference.attention_jvp(q, k, v, tq, tk, tv, scale=0.3)
    plus, minus = at(1), at(-1)
    assert relative(to, (plus[0] - minus[0]) / (2 * eps)) < 1e-9
    assert relative(mu, (plus[2] - minus[2]) / (2 * eps)) < 1e-9


def test_dead_rows_are_zero_with_finite_gradients():
    q, k, v, tq, tk, tv = tensors(6, 7, 4, 5)
    for mask in masks(6, 7).values():
        q.requires_grad_(True)
        o, to, lse, mu = reference.attention_jvp(q, k, v, tq, tk, tv, mask=mask, scale=0.3)
        assert not o[:, :, 2].any()
        assert not to[:, :, 2].any()
        assert not mu[:, :, 2].any()
        assert torch.isneginf(lse[:, :, 2]).all()
        (grad,) = torch.autograd.grad(o.sum() + to.square().sum(), q)
        assert torch.isfinite(grad).all()
        assert not grad[:, :, 2].any()
        assert grad.any()


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_merging_two_key_sets_equals_attending_to_both(impl):
    q, k, v, tq, tk, tv = tensors(9, 20, 4, 6)
    options = {"impl": impl, "return_lse": True, "return_mu": True}
    mask = masks(9, 20)["bool"]
    parts = [
        attention_jvp(q, k[:, :, s], v[:, :, s], tq, tk[:, :, s], tv[:, :, s], mask=mask[..., s], **options)
        for s in (slice(0, 8), slice(8, 20))
    ]
    whole = attention_jvp(q, k, v, tq, tk, tv, mask=mask, **options)
    for got, expected in zip(merge(*parts), whole, strict=True):
        assert relative(got, expected) < 1e-13


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_a_common_mode_of_keys_shifts_mu_and_lse_but_not_the_outputs(impl):
    q, k, v, tq, tk, tv = tensors(9, 20, 4, 6)
    kbar, tkbar = torch.randn(1, 1, 1, 4, dtype=torch.float64), torch.randn(1, 1, 1, 4, dtype=torch.float64)
    options = {"impl": impl, "scale": 0.3, "return_lse": True, "return_mu": True}
    o, to, lse, mu = attention_jvp(q, k, v, tq, tk, tv, **options)
    o2, to2, lse2, mu2 = attention_jvp(q, k + kbar, v, tq, tk + tkbar, tv, **options)
    assert relative(o2, o) < 1e-13
    assert relative(to2, to) < 1e-12
    assert relative(lse2, lse + 0.3 * (q * kbar).sum(-1)) < 1e-13
    assert relative(mu2, mu + 0.3 * (tq * kbar + q * tkbar).sum(-1)) < 1e-12


def test_the_tangent_is_linear_in_the_tangents():
    q, k, v, *tangents = tensors(5, 7, 4, 6)
    total = attention_jvp(q, k, v, *tangents, impl="chunked")[1]
    parts = [
        attention_jvp(q, k, v, *(t if j == i else None for j, t in enumerate(tangents)), impl="chunked")[1]
        for i in range(3)
    ]
    assert relative(sum(parts), total) < 1e-13
    assert len(SUBSETS) == 7
