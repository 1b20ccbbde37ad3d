"""What use_fewstep_attention takes and reaches besides plain (B, H, N, D) calls: shapes, MHA, checkpoints."""

import threading
from functools import partial

import diffusers
import pytest
import torch
import torch.nn.functional as F
from attention_cases import relative, tensors
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fewstep.kernels import attention_contexts, use_fewstep_attention as use

SHAPES = {
    "query batch 1": (lambda q, k, v: (q[:1], k, v), {}),
    "query heads 1": (lambda q, k, v: (q[:, :1], k, v), {}),
    "key batch 1": (lambda q, k, v: (q, k[:1], v), {}),
    "two dimensions": (lambda q, k, v: (q[0, 0], k[0, 0], v[0, 0]), {}),
    "three, mask per entry": (lambda q, k, v: (q[0], k[0], v[0]), {"attn_mask": (4, 6, 9)}),
    "three, grouped": (lambda q, k, v: (q[0], k[0, :2], v[0, :2]), {"enable_gqa": True}),
    "five": (lambda *x: tuple(t.unflatten(1, (2, 2)) for t in x), {}),
    "five, mask": (lambda *x: tuple(t.unflatten(1, (2, 2)) for t in x), {"attn_mask": (2, 1, 2, 6, 9)}),
    "five, mask of four": (lambda *x: tuple(t.unflatten(1, (2, 2)) for t in x), {"attn_mask": (2, 1, 1, 9)}),
    "mask of three for four": (lambda *x: x, {"attn_mask": (4, 6, 9)}),
    "mask of one": (lambda *x: x, {"attn_mask": (9,)}),
}


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("moving", [True, False])
def test_leading_dimensions_broadcast_as_in_sdpa(name, moving):
    pick, options = SHAPES[name]
    x = tensors(6, 9, 4, 5, heads=4)
    primals, tangents = pick(*x[:3]), pick(*x[3:])
    if "attn_mask" in options:
        torch.manual_seed(0)
        options = {"attn_mask": torch.rand(options["attn_mask"]) > 0.2}

    def call(*x):
        return F.scaled_dot_product_attention(*x, **options)

    def both():
        return torch.func.jvp(call, primals, tangents) if moving else (call(*primals),)

    with sdpa_kernel(SDPBackend.MATH):
        exact = both()
    with use("chunked") as context:
        got = both()
    assert context.calls == {"fewstep": 1}
    for a, b in zip(got, exact, strict=True):
        assert a.shape == b.shape
        assert relative(a, b) < 1e-13


def test_shapes_that_do_not_fit_are_refused_by_name():
    q, k, v = tensors(6, 9, 4, 5, heads=4)[:3]
    with use("chunked"):
        with pytest.raises(ValueError, match=r"key: enable_gqa needs .* divides the query's 4, got 3"):
            F.scaled_dot_product_attention(q, k[:, :3], v[:, :3], enable_gqa=True)
        with pytest.raises(ValueError, match=r"query, key, value: leading dimensions must broadcast"):
            F.scaled_dot_product_attention(q, k[:, :3], v[:, :3])
        with pytest.raises(ValueError, match=r"query: expected \(\.\.\., N, D\)"):
            F.scaled_dot_product_attention(q[0, 0, 0], k, v)


@pytest.mark.parametrize("weights", [False, True])
def test_multi_head_attention_is_reached_and_sdpa_is_put_back(weights):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=True).double()
    x, dx = torch.randn(2, 2, 5, 8).double()

    def call(x):
        return layer(x, x, x, need_weights=weights)[0]

    with sdpa_kernel(SDPBackend.MATH):
        exact = torch.func.jvp(call, (x,), (dx,))
    before = F.scaled_dot_product_attention
    with use() as context:
        got = torch.func.jvp(call, (x,), (dx,))
    assert F.scaled_dot_product_attention is before
    # asked for its weights, torch's layer computes them itself from differentiable parts
    assert context.calls == ({} if weights else {"fewstep": 1})
    assert relative(got[1], exact[1]) < 1e-13


@pytest.mark.parametrize("where", ["inside", "outside", "thread"])
@pytest.mark.parametrize("moving", [False, True])
def test_a_checkpointed_block_recomputes_with_the_attention_of_its_forward(where, moving):
    q, k, v, tq, _, _ = tensors(6, 9, 4, 5)
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)

    def block(q):
        return F.scaled_dot_product_attention(q @ weight, k, v)

    def work(q):
        return sum(torch.func.jvp(block, (q,), (tq,))) if moving else block(q)

    with sdpa_kernel(SDPBackend.MATH):
        (exact,) = torch.autograd.grad(work(q).square().sum(), weight)
    with use("chunked") as context:
        loss = checkpoint(work, q, use_reentrant=False, context_fn=attention_contexts).square().sum()
        if where == "inside":
            loss.backward()
    if where == "outside":
        loss.backward()
    if where == "thread":
        worker = threading.Thread(target=loss.backward)
        worker.start()
        worker.join()
    assert context.calls["torch"] == 0
    assert relative(weight.grad, exact) < 1e-13


def test_checkpointed_diffusers_models_train_inside_the_context():
    torch.manual_seed(0)
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=3, out_channels=3, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=8,
    ).train()  # fmt: skip
    for p in network.parameters():
        p.data.add_(0.02 * torch.randn_like(p))
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 3])

    def gradient():
        # the class dropout of train mode draws, so both runs draw alike
        torch.manual_seed(1)
        loss = network(x, torch.tensor([3, 7]), labels).sample.square().mean()
        grads = torch.autograd.grad(loss, tuple(network.parameters()), allow_unused=True)
        return torch.cat([g.flatten() for g in grads if g is not None])

    exact = gradient()
    network.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, context_fn=attention_contexts))
    with use("chunked") as context:
        got = gradient()
    assert context.calls == {"fewstep": 4}
    assert relative(got, exact) < 1e-5
