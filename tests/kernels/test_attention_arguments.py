"""Bad input is refused by name before anything runs."""

import sys
import types

import pytest
import torch
from attention_cases import relative, tensors
from torch.autograd import forward_ad

from fewstep.kernels import (
    attention,
    attention_jvp,
    attention_tangent,
    block_causal,
    reference,
    use_fewstep_attention as use,
    xformers_backend,
)


def good():
    return dict(zip(("q", "k", "v"), tensors(6, 9, 4, 5)[:3], strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 6)}, r"q: expected 4 dimensions, got 3"),
        ({"q": torch.zeros(2, 3, 6, 4, dtype=torch.int64)}, r"q: dtype torch.int64 is not one of float16"),
        ({"v": torch.zeros(2, 3, 9, 5, dtype=torch.complex64)}, r"v: dtype torch.complex64"),
        ({"k": "text"}, r"k: expected a tensor, got str"),
        ({"k": torch.zeros(2, 3, 0, 4)}, r"k: every dimension must be at least 1"),
        ({"k": torch.zeros(2, 3, 9, 4)}, r"k: dtype must be that of q, torch.float64, got torch.float32"),
        (
            {"v": torch.zeros(2, 3, 9, 5, device="meta").double()},
            r"v: device must be that of q, cpu, got meta",
        ),
        (
            {"k": torch.zeros(2, 4, 9, 4).double()},
            r"k: batch and heads must be those of q, \(2, 3\), got \(2, 4\)",
        ),
        ({"k": torch.zeros(2, 3, 9, 7).double()}, r"k: head dimension must be that of q, 4, got 7"),
        ({"v": torch.zeros(2, 3, 8, 5).double()}, r"v: length must be that of k, 9, got 8"),
        ({"v": torch.zeros(2, 3, 9, 257).double()}, r"v: head dimension 257 is over 256"),
        ({"mask": torch.zeros(6, 8, dtype=torch.bool)}, r"mask: shape must broadcast to .* \(2, 3, 6, 9\)"),
        ({"mask": torch.zeros(1, 2, 3, 6, 9)}, r"mask: shape must broadcast"),
        ({"mask": torch.zeros(6, 9, dtype=torch.int32)}, r"mask: dtype must be bool .* got torch.int32"),
        ({"mask": torch.zeros(6, 9, requires_grad=True)}, r"mask: a constant with impl='auto'; detach it"),
        ({"mask": torch.ones(6, 9, dtype=torch.bool, device="meta")}, r"mask: device"),
        ({"mask": [1]}, r"mask: expected a tensor"),
        (
            {"mask": torch.ones(6, 9, dtype=torch.bool), "causal": True},
            r"mask, ranges, causal: give at most one",
        ),
        ({"ranges": block_causal([6]), "causal": True}, r"at most one"),
        ({"ranges": block_causal([6])}, r"ranges: made for 6 queries and 6 keys, but q has 6 and k has 9"),
        ({"ranges": [(0, 6)]}, r"ranges: expected fewstep.kernels.Ranges"),
        ({"causal": 1}, r"causal: expected True or False"),
        ({"scale": float("nan")}, r"scale: expected a finite number"),
        ({"scale": torch.tensor(0.1)}, r"scale: expected a finite number"),
        ({"scale": True}, r"scale: expected a finite number"),
        ({"impl": "flash"}, r"impl: 'flash' is not one of auto"),
        ({"layout": "nbhd"}, r"layout: 'nbhd' is not one of bhnd, bnhd"),
    ],
)
def test_attention_names_the_argument(change, message):
    arguments = {**good(), **change}
    q, k, v = (arguments.pop(n) for n in "qkv")
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, **arguments)
    with pytest.raises(ValueError, match=message):
        attention_jvp(q, k, v, torch.ones(2, 3, 6, 4).double(), **arguments)


@pytest.mark.parametrize(
    ("tangents", "options", "message"),
    [
        (
            (torch.zeros(2, 3, 6, 5).double(),),
            {},
            r"tq: shape must be that of q, \(2, 3, 6, 4\), got \(2, 3, 6, 5\)",
        ),
        ((None, torch.zeros(2, 3, 9, 4)), {}, r"tk: dtype must be that of q"),
        ((None, None, torch.zeros(2, 3, 9, 5).int()), {}, r"tv: dtype torch.int32"),
        ((), {}, r"tq, tk, tv: at least one tangent is needed"),
        ((torch.zeros(2, 3, 6, 4).double(),), {"impl": "sdpa"}, r"impl: 'sdpa' has no explicit jvp"),
        ((torch.zeros(2, 3, 6, 4).double(),), {"impl": "xformers"}, r"impl: 'xformers' has no explicit jvp"),
        ((torch.zeros(2, 3, 6, 4).double(),), {"impl": "triton"}, r"impl='triton' takes float16"),
    ],
)
def test_attention_jvp_names_the_tangent(tangents, options, message):
    with pytest.raises(ValueError, match=message):
        attention_jvp(*good().values(), *tangents, **options)


def test_head_dimensions_over_256_run_where_nothing_limits_them():
    q, k, v, *tangents = tensors(5, 7, 260)
    with pytest.raises(ValueError, match="q: head dimension 260 is over 256"):
        attention(q, k, v)
    o, to = attention_jvp(q, k, v, *tangents, impl="chunked", scale=0.1)
    exact = reference.attention_jvp(q, k, v, *tangents, scale=0.1)
    assert relative(o, exact[0]) < 1e-13
    assert relative(to, exact[1]) < 1e-13


def test_attention_tangent_checks_the_primal_results():
    q, k, v, tq, _, _ = tensors(6, 9, 4, 5)
    o, _, lse = attention_jvp(q, k, v, tq, impl="chunked", return_lse=True)
    with pytest.raises(ValueError, match=r"o: expected a tensor of shape \(2, 3, 6, 5\)"):
        attention_tangent(q, k, v, o[:, :1], lse, tq)
    with pytest.raises(ValueError, match=r"lse: expected a tensor of shape \(2, 3, 6\)"):
        attention_tangent(q, k, v, o, lse[..., None], tq)
    with pytest.raises(ValueError, match=r"lse: dtype must be torch.float64"):
        attention_tangent(q, k, v, o, lse.float(), tq)
    with pytest.raises(ValueError, match=r"o: dtype must be that of q"):
        attention_tangent(q, k, v, o.float(), lse, tq)
    with pytest.raises(ValueError, match=r"impl: 'reference' has no tangent-only pass"):
        attention_tangent(q, k, v, o, lse, tq, impl="reference")
    with pytest.raises(ValueError, match="at least one tangent"):
        attention_tangent(q, k, v, o, lse)


def test_a_mask_or_explicit_input_with_a_tangent_is_refused():
    q, k, v, tq, _, _ = tensors(6, 9, 4, 5)
    with forward_ad.dual_level():
        mask = forward_ad.make_dual(torch.zeros(6, 9), torch.ones(6, 9))
        with pytest.raises(ValueError, match="mask: has a tangent"):
            attention(q, k, v, mask=mask)
        with pytest.raises(ValueError, match="q: already carries a tangent"):
            attention_jvp(forward_ad.make_dual(q, tq), k, v, tq)


def test_the_reference_differentiates_a_mask():
    q, k, v, tq, _, _ = tensors(6, 9, 4, 5)
    bias, dbias = torch.randn(2, 6, 9, dtype=torch.float64)
    _, to = torch.func.jvp(lambda b: attention(q, k, v, mask=b, impl="reference"), (bias,), (dbias,))

    def exact(b):
        return torch.softmax(0.5 * q @ k.mT + b, -1) @ v

    assert relative(to, torch.func.jvp(exact, (bias,), (dbias,))[1]) < 1e-13
    bias.requires_grad_(True)
    (got,) = torch.autograd.grad(attention(q, k, v, mask=bias, impl="reference").square().sum(), bias)
    assert relative(got, torch.autograd.grad(exact(bias).square().sum(), bias)[0]) < 1e-13
    with forward_ad.dual_level():
        mask = forward_ad.make_dual(bias.detach(), dbias)
        with pytest.raises(ValueError, match="mask: already carries a tangent"):
            attention_jvp(q, k, v, tq, mask=mask, impl="reference")


def test_triton_and_xformers_say_why_they_cannot_run_on_a_cpu():
    x = [t.float() for t in tensors(6, 9, 4, 5)]
    with pytest.raises(ValueError, match="impl='triton' needs CUDA tensors, got cpu; use 'chunked'"):
        attention(*x[:3], impl="triton")
    with pytest.raises(ValueError, match="impl='xformers' has no kernel for cpu, only CUDA"):
        attention(*x[:3], impl="xformers")
    with pytest.raises(ValueError, match="impl: 'xformers' has no jvp, but q has a tangent"):
        torch.func.jvp(lambda q: attention(q, *x[1:3], impl="xformers"), (x[0],), (x[3],))
    with pytest.raises(ValueError, match="impl: 'flash' is not one of"):
        use("flash")
    with pytest.raises(ValueError, match=r"ranges: expected fewstep.kernels.Ranges"):
        use(ranges=[1])


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"mask": True}])
def test_the_xformers_call_is_in_its_layout(monkeypatch, options):
    """A stand-in with the documented contract of memory_efficient_attention, since the real one needs CUDA."""

    class Lower:
        pass

    def stand_in(q, k, v, attn_bias, scale):
        assert q.shape == (2, 6, 3, 4)
        assert k.shape == (2, 9, 3, 4)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if isinstance(attn_bias, Lower):
            attn_bias = torch.ones(6, 9, dtype=torch.bool).tril()
        return reference.attention(q, k, v, mask=attn_bias, scale=scale).transpose(1, 2)

    ops = types.SimpleNamespace(memory_efficient_attention=stand_in, LowerTriangularMask=Lower)
    monkeypatch.setitem(sys.modules, "xformers", types.SimpleNamespace(ops=ops))
    q, k, v = tensors(6, 9, 4, 5)[:3]
    mask = torch.rand(2, 1, 6, 9) > 0.3 if options.get("mask") else None
    causal = options.get("causal", False)
    got = xformers_backend.attention(q, k, v, mask=mask, causal=causal, scale=0.3)
    dense = reference.dense_mask(q, k, mask, None, causal)
    assert relative(got, reference.attention(q, k, v, mask=dense, scale=0.3)) < 1e-14


def test_missing_xformers_is_an_error_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    q, k, v = tensors(6, 9, 4, 5)[:3]
    with pytest.raises(ValueError, match=r"needs the xformers package \(pip install 'fewstep\[xformers\]'"):
        xformers_backend.attention(q, k, v, mask=None, causal=False, scale=0.3)
