"""use_fewstep_attention on tiny random networks of six diffusers families, in fp32, against SDPA math."""

import diffusers
import pytest
import torch
import torch.nn.functional as F
from attention_cases import relative, tensors
from diffusers.models import attention_dispatch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.kernels import attention, block_causal, reference, register_diffusers_backend, use_fewstep_attention as use


def unet():
    network = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=12, attention_head_dim=8,
    )  # fmt: skip
    text = torch.randn(2, 7, 12)
    return network, torch.randn(2, 3, 8, 12), lambda x, t: network(x, t, text).sample


def dit():
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=3, out_channels=3, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=8,
    )  # fmt: skip
    labels = torch.tensor([1, 3])
    return network, torch.randn(2, 3, 8, 8), lambda x, t: network(x, t, labels).sample


def sd3():
    network = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=3, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=3,
        pos_embed_max_size=12,
    )  # fmt: skip
    text, pooled = torch.randn(2, 7, 12), torch.randn(2, 10)
    return network, torch.randn(2, 3, 8, 12), lambda x, t: network(x, text, pooled, t).sample


def flux():
    network = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    text, pooled = torch.randn(2, 7, 12), torch.randn(2, 10)
    words, places = torch.zeros(7, 3), torch.zeros(15, 3)
    places[:, 1], places[:, 2] = torch.arange(15) // 5, torch.arange(15) % 5
    return network, torch.randn(2, 15, 4), lambda x, t: network(x, text, pooled, t, places, words).sample


def wan():
    network = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=3, out_channels=3,
        text_dim=10, freq_dim=16, ffn_dim=24, num_layers=2, rope_max_seq_len=16,
    )  # fmt: skip
    text = torch.randn(2, 7, 10)
    return network, torch.randn(2, 3, 2, 6, 8), lambda x, t: network(x, t, text).sample


def sana():
    network = diffusers.SanaTransformer2DModel(
        in_channels=3, out_channels=3, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
        mlp_ratio=2.0, sample_size=8, patch_size=1,
    )  # fmt: skip
    text = torch.randn(2, 7, 12)
    return network, torch.randn(2, 3, 8, 6), lambda x, t: network(x, text, t).sample


# number of attention calls in one forward, as counted on diffusers 0.42
FAMILIES = {
    "unet": (unet, 8),
    "dit": (dit, 2),
    "sd3": (sd3, 2),
    "flux": (flux, 2),
    "wan": (wan, 4),
    "sana": (sana, 2),
}


def build(name):
    torch.manual_seed(0)
    network, x, call = FAMILIES[name][0]()
    network.eval()
    for p in network.parameters():
        # diffusers starts output layers at zero, which would hide the tangent
        p.data.add_(0.02 * torch.randn_like(p))
    return network, x, call


def step(name, network, x, call):
    """Output, its tangent, and the gradients of a loss that uses both."""
    dx = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    if name == "dit":
        o, to = torch.func.jvp(lambda x: call(x, torch.tensor([3, 7])), (x,), (dx,))
    else:
        o, to = torch.func.jvp(call, (x, torch.tensor([0.3, 0.7])), (dx, torch.ones(2)))
    loss = o.square().mean() + to.square().mean()
    return o.detach(), to.detach(), torch.autograd.grad(loss, tuple(network.parameters()), allow_unused=True)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_tangents_and_parameter_gradients_equal_those_of_sdpa_math(name):
    network, x, call = build(name)
    with sdpa_kernel(SDPBackend.MATH):
        o, to, grads = step(name, network, x, call)
    with use() as context:
        o2, to2, grads2 = step(name, network, x, call)
    assert context.calls == {"fewstep": FAMILIES[name][1]}
    assert to.norm() > 1.0
    assert relative(o2, o) < 1e-5
    assert relative(to2, to) < 1e-5
    total = torch.cat([g.flatten() for g in grads if g is not None]).norm()
    for parameter, g, g2 in zip(network.parameters(), grads, grads2, strict=True):
        if g is None:
            assert g2 is None or not g2.any()
            continue
        assert g2.shape == parameter.shape
        # softmax makes the gradient of a key bias exactly zero; there only the total sets a scale
        assert (g2 - g).norm() <= 1e-5 * max(g.norm(), 1e-3 * total)


def test_without_the_context_a_jvp_fails_loudly():
    network, x, call = build("wan")
    with pytest.raises(NotImplementedError):
        step("wan", network, x, call)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_the_dispatcher_backend_reaches_the_models_that_use_it(name, monkeypatch):
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    network, x, call = build(name)
    with sdpa_kernel(SDPBackend.MATH):
        _, to, _ = step(name, network, x, call)
    # diffusers also makes it the active backend of the whole process
    network.set_attention_backend(register_diffusers_backend())
    before = registry._active_backend
    _, to2, _ = step(name, network, x, call)
    assert relative(to2, to) < 1e-5
    with use("reference") as context:
        _, to3, _ = step(name, network, x, call)
    assert relative(to3, to) < 1e-5
    assert context.calls == {"fewstep": FAMILIES[name][1]}
    assert registry._active_backend == before


def test_the_dispatcher_backend_takes_key_padding_and_refuses_what_it_lacks():
    register_diffusers_backend()
    q, k, v = (x.transpose(1, 2) for x in tensors(6, 9, 4, 5)[:3])
    padding = torch.arange(9) < torch.tensor([[5], [9]])
    run = attention_dispatch.dispatch_attention_fn
    got = run(q, k, v, attn_mask=padding, backend="fewstep")
    exact = attention(q, k, v, mask=padding[:, None, None], layout="bnhd", impl="reference")
    assert relative(got, exact) < 1e-13
    with pytest.raises(ValueError, match="return_lse"):
        run(q, k, v, backend="fewstep", attention_kwargs={"return_lse": True})


def test_sdpa_arguments_are_honoured_under_a_jvp():
    q, k, v, tq, tk, tv = tensors(6, 9, 4, 5, heads=4)

    def both(**options):
        def call(*x):
            return F.scaled_dot_product_attention(*x, **options)

        with sdpa_kernel(SDPBackend.MATH):
            exact = torch.func.jvp(call, primals, tangents)
        with use():
            got = torch.func.jvp(call, primals, tangents)
        assert relative(got[0], exact[0]) < 1e-13
        assert relative(got[1], exact[1]) < 1e-13

    primals, tangents = (q, k, v), (tq, tk, tv)
    both(scale=0.3)
    both(is_causal=True)
    both(attn_mask=torch.randn(2, 1, 6, 9).double())
    primals, tangents = (q, k[:, :2], v[:, :2]), (tq, tk[:, :2], tv[:, :2])
    both(enable_gqa=True)
    primals, tangents = (q[:, 0], k[:, 0], v[:, 0]), (tq[:, 0], tk[:, 0], tv[:, 0])
    both(attn_mask=torch.rand(2, 6, 9) > 0.2)
    with use(), pytest.raises(ValueError, match="dropout_p: must be 0 with tangents"):
        torch.func.jvp(lambda q: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1), (q,), (tq,))


def test_calls_without_tangents_are_left_to_torch():
    q, k, v = tensors(6, 9, 4, 5)[:3]
    with use() as context:
        got = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(got, F.scaled_dot_product_attention(q, k, v))
    assert context.calls == {"torch": 1}


def test_a_head_dimension_over_256_still_has_a_tangent():
    q, k, v, *tangents = tensors(5, 7, 260)
    with use():
        _, to = torch.func.jvp(F.scaled_dot_product_attention, (q, k, v), tuple(tangents))
    expected = torch.func.jvp(lambda *x: reference.attention(*x, scale=260**-0.5), (q, k, v), tuple(tangents))
    assert relative(to, expected[1]) < 1e-13


def test_ranges_apply_where_the_lengths_fit():
    ranges = block_causal([2, 3, 4])
    q, k, v = tensors(9, 9, 4)[:3]
    with use(ranges=ranges) as context:
        inside = F.scaled_dot_product_attention(q, k, v)
        across = F.scaled_dot_product_attention(q, k[:, :, :5], v[:, :, :5])
    assert relative(inside, reference.attention(q, k, v, mask=ranges.mask(), scale=0.5)) < 1e-13
    assert relative(across, reference.attention(q, k[:, :, :5], v[:, :, :5], scale=0.5)) < 1e-13
    assert context.calls == {"fewstep": 1, "torch": 1}


@pytest.mark.parametrize("inside", [False, True])
def test_the_context_works_around_and_inside_a_compiled_step(inside):
    torch._dynamo.reset()
    q, k, v, *tangents = tensors(6, 9, 4, 5)
    expected = torch.func.jvp(lambda *x: reference.attention(*x, scale=0.5), (q, k, v), tuple(tangents))

    def work(primals, tangents):
        return torch.func.jvp(F.scaled_dot_product_attention, primals, tangents)

    def within(primals, tangents):
        with use():
            return work(primals, tangents)

    compiled = torch.compile(within if inside else work, backend="aot_eager", fullgraph=not inside)
    if inside:
        got = compiled((q, k, v), tuple(tangents))
    else:
        with use():
            got = compiled((q, k, v), tuple(tangents))
    assert relative(got[0], expected[0]) < 1e-13
    assert relative(got[1], expected[1]) < 1e-13
    torch._dynamo.reset()


def test_autocast_under_the_context_matches_autocast_sdpa():
    x = [t.float() for t in tensors(6, 9, 4, 5)]
    with torch.autocast("cpu", torch.bfloat16):
        with use():
            o, to = torch.func.jvp(F.scaled_dot_product_attention, tuple(x[:3]), tuple(x[3:]))
        assert o.dtype == to.dtype == F.scaled_dot_product_attention(*x[:3]).dtype == torch.bfloat16
    exact = reference.attention_jvp(*(t.double() for t in x), scale=0.5)
    assert relative(to, exact[1]) < 1e-2
