"""attention() under every way torch differentiates forwards: right, or loud."""

import pytest
import torch
from attention_cases import layouts, masks, relative, tensors
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fewstep.kernels import attention, explain, reference

BACKENDS = ["aot_eager", "inductor"]


def exact(q, k, v):
    return reference.attention(q, k, v, scale=0.3)


def mine(q, k, v):
    return attention(q, k, v, scale=0.3, impl="chunked")


def via_jvp(fn, primals, tangents):
    return torch.func.jvp(fn, primals, tangents)


def via_forward_ad(fn, primals, tangents):
    with forward_ad.dual_level():
        out = fn(*(forward_ad.make_dual(p, t) for p, t in zip(primals, tangents, strict=True)))
        o, to = forward_ad.unpack_dual(out)
        return o, to


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def halves(dtype=torch.float64):
    x = tensors(6, 9, 4, 5, dtype=dtype)
    return tuple(x[:3]), tuple(x[3:])


@pytest.mark.parametrize("route", [via_jvp, via_forward_ad])
@pytest.mark.parametrize("impl", ["auto", "chunked", "reference", "sdpa"])
def test_eager_tangents_are_there_and_right(route, impl):
    primals, tangents = halves()
    o, to = route(lambda *x: attention(*x, scale=0.3, impl=impl), primals, tangents)
    expected = torch.func.jvp(exact, primals, tangents)
    assert to.abs().max() > 0.1
    assert relative(o, expected[0]) < 1e-13
    assert relative(to, expected[1]) < 1e-13


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_inputs_without_a_tangent_are_constants(which):
    primals, tangents = halves()

    def partial(fn):
        def call(*moving):
            x = list(primals)
            for i, m in zip(which, moving, strict=True):
                x[i] = m
            return fn(*x)

        return call

    moving = tuple(primals[i] for i in which), tuple(tangents[i] for i in which)
    expected = torch.func.jvp(partial(exact), *moving)
    assert relative(torch.func.jvp(partial(mine), *moving)[1], expected[1]) < 1e-13
    with forward_ad.dual_level():
        dual = (forward_ad.make_dual(p, t) for p, t in zip(*moving, strict=True))
        assert relative(forward_ad.unpack_dual(partial(mine)(*dual)).tangent, expected[1]) < 1e-13


def test_masks_ranges_causal_and_layout_under_jvp():
    primals, tangents = halves()
    mask = masks(6, 9)["bool"]
    causal = torch.ones(6, 9, dtype=torch.bool).tril()
    for options, dense in (({"mask": mask}, mask), ({"causal": True}, causal)):
        expected = torch.func.jvp(lambda *x, d=dense: reference.attention(*x, mask=d, scale=0.3), primals, tangents)
        got = torch.func.jvp(lambda *x, o=options: attention(*x, scale=0.3, **o), primals, tangents)
        assert relative(got[1], expected[1]) < 1e-13
    ranges, _, still = layouts()["block-causal"]
    q, k, v, tq, tk, tv = tensors(ranges.queries, ranges.keys, 4)
    tk[:, :, :still] = tv[:, :, :still] = 0
    expected = torch.func.jvp(lambda *x: reference.attention(*x, mask=ranges.mask(), scale=0.3), (q, k, v), (tq, tk, tv))
    got = torch.func.jvp(lambda *x: attention(*x, scale=0.3, ranges=ranges), (q, k, v), (tq, tk, tv))
    assert relative(got[1], expected[1]) < 1e-13
    swapped = [[x.transpose(1, 2) for x in group] for group in (primals, tangents)]
    got = torch.func.jvp(lambda *x: attention(*x, scale=0.3, layout="bnhd"), *map(tuple, swapped))
    assert relative(got[1].transpose(1, 2), torch.func.jvp(exact, primals, tangents)[1]) < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
def test_jvp_inside_a_compiled_function_is_one_graph_and_right(backend):
    primals, tangents = halves()
    expected = torch.func.jvp(exact, primals, tangents)

    @torch.compile(backend=backend, fullgraph=True)
    def compiled(primals, tangents):
        return torch.func.jvp(mine, primals, tangents)

    o, to = compiled(primals, tangents)
    assert to.abs().max() > 0.1
    assert relative(o, expected[0]) < 1e-13
    assert relative(to, expected[1]) < 1e-13
    assert relative(torch.compile(mine, backend=backend, fullgraph=True)(*primals), expected[0]) < 1e-13


def test_jvp_of_a_compiled_function_is_right_or_refused():
    primals, tangents = halves()
    expected = torch.func.jvp(exact, primals, tangents)
    compiled = torch.compile(mine, backend="aot_eager")
    assert relative(torch.func.jvp(compiled, primals, tangents)[1], expected[1]) < 1e-13
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.func.jvp(torch.compile(mine, backend="aot_eager", fullgraph=True), primals, tangents)


class Block(nn.Module):
    """Linear, attention, Linear with a nonlinearity before and after: tangents mix with everything."""

    def __init__(self, core):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.core = core
        self.qkv = nn.Parameter(torch.randn(4, 12, generator=generator, dtype=torch.float64))
        self.out = nn.Parameter(torch.randn(4, 4, generator=generator, dtype=torch.float64))

    def forward(self, x):
        q, k, v = (torch.tanh(x) @ self.qkv).chunk(3, -1)
        return torch.tanh(self.core(q, k, v) @ self.out)


def loss_of(kind, network, x, tx):
    o, to = torch.func.jvp(network, (x,), (tx,))
    if kind == "primal":
        return (o * to.detach()).sum()
    return to.square().sum() if kind == "tangent" else (o * to).sum()


@pytest.mark.parametrize("kind", ["primal", "tangent", "both"])
@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_parameter_gradients_through_output_and_tangent(kind, backend):
    q, _, _, tx, _, _ = tensors(6, 6, 4)
    networks = Block(mine), Block(exact)
    grads = []
    for network, compiled in zip(networks, (backend is not None, False), strict=True):
        step = loss_of
        if compiled:
            step = torch.compile(loss_of, backend=backend, fullgraph=True)
        grads.append(torch.autograd.grad(step(kind, network, q, tx), tuple(network.parameters())))
    for got, expected in zip(*grads, strict=True):
        assert expected.norm() > 0.1
        assert relative(got, expected) < 1e-12


def test_gradient_of_lse_and_of_the_tangent_only_pass_raise():
    from fewstep.kernels import attention_jvp, attention_tangent

    q, k, v, tq, tk, tv = tensors(6, 9, 4, 5)
    q.requires_grad_(True)
    o, _, lse, mu = attention_jvp(q, k, v, tq, tk, tv, impl="chunked", return_lse=True, return_mu=True)
    with pytest.raises(RuntimeError, match="gradient of lse and mu is not implemented"):
        torch.autograd.grad(lse.sum(), q, retain_graph=True)
    with pytest.raises(RuntimeError, match="gradient of lse and mu is not implemented"):
        torch.autograd.grad(o.sum() + mu.sum(), q)
    alone, _ = attention_tangent(q, k, v, o.detach(), lse.detach(), tq, tk, tv)
    with pytest.raises(RuntimeError, match="tangent-only pass is not implemented"):
        torch.autograd.grad(alone.sum(), q)


def test_second_order_raises_instead_of_giving_zeros():
    (q, k, v), (tq, _, _) = halves()

    def inner(fn):
        return lambda q: torch.func.jvp(lambda q: fn(q, k, v), (q,), (tq,))[1]

    assert torch.func.jvp(inner(exact), (q,), (tq,))[1].abs().max() > 1e-3
    with pytest.raises(NotImplementedError, match="jvp inside a jvp"):
        torch.func.jvp(inner(mine), (q,), (tq,))
    compiled = torch.compile(lambda: torch.func.jvp(inner(mine), (q,), (tq,)), backend="aot_eager")
    with pytest.raises(Exception, match="jvp inside a jvp"):
        compiled()
    with pytest.raises(RuntimeError):
        torch.func.jvp(torch.func.grad(lambda q: mine(q, k, v).square().sum()), (q,), (tq,))
    q.requires_grad_(True)
    (grad,) = torch.autograd.grad(mine(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(grad.square().sum(), q)


def test_functionalize_hides_tangents_and_is_refused_rather_than_zero():
    primals, tangents = halves()
    with pytest.raises(NotImplementedError, match="forward-mode AD of the operator"):
        torch.func.jvp(torch.func.functionalize(mine), primals, tangents)
    _, to = torch.func.jvp(torch.func.functionalize(exact), primals, tangents)
    assert relative(to, torch.func.jvp(exact, primals, tangents)[1]) < 1e-13


def test_a_scale_computed_from_a_dynamic_shape_compiles():
    def work(primals, tangents):
        return torch.func.jvp(
            lambda *x: attention(*x, scale=primals[0].shape[-1] ** -0.5, impl="chunked"), primals, tangents
        )

    compiled = torch.compile(work, backend="aot_eager", fullgraph=True, dynamic=True)
    for n, m, d in ((6, 9, 4), (7, 11, 5)):
        x = tensors(n, m, d)
        got = compiled(tuple(x[:3]), tuple(x[3:]))[1]
        assert relative(got, reference.attention_jvp(*x, scale=d**-0.5)[1]) < 1e-13


def test_the_bare_operator_refuses_tangents():
    (q, k, v), (tq, _, _) = halves()

    def bare(q):
        return torch.ops.fewstep.attention(q, k, v, None, [], False, 0.3, "chunked", False)[0]

    with pytest.raises(NotImplementedError, match=r"direct call of torch\.ops\.fewstep"):
        torch.func.jvp(bare, (q,), (tq,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="direct call"):
        bare(forward_ad.make_dual(q, tq))


def test_checkpoint_around_the_jvp_gives_equal_gradients():
    q, _, _, tx, _, _ = tensors(6, 6, 4)
    network = Block(mine)

    def block(x, tx):
        return torch.func.jvp(network, (x,), (tx,))

    grads = []
    for run in (block, lambda *a: checkpoint(block, *a, use_reentrant=False)):
        o, to = run(*run(q, tx))
        grads.append(torch.autograd.grad((o * to).sum(), tuple(network.parameters())))
    for got, expected in zip(*grads, strict=True):
        assert expected.norm() > 0.01
        assert torch.equal(got, expected)


def test_no_grad_keeps_the_tangent():
    primals, tangents = halves()
    with torch.no_grad():
        _, to = torch.func.jvp(mine, primals, tangents)
    assert relative(to, torch.func.jvp(exact, primals, tangents)[1]) < 1e-13


def test_vmap_and_jacfwd_are_exact():
    (q, k, v), _ = halves()
    batched = torch.func.vmap(lambda q, k, v: mine(q[None], k[None], v[None])[0])(q, k, v)
    assert relative(batched, exact(q, k, v)) < 1e-13
    one = q[:1, :1, :2], k[:1, :1, :3], v[:1, :1, :3]
    jacobian = torch.func.jacfwd(lambda q: mine(q, *one[1:]))(one[0])
    assert relative(jacobian, torch.func.jacfwd(lambda q: exact(q, *one[1:]))(one[0])) < 1e-13


def test_explain_follows_the_call():
    (q, k, v), (tq, _, _) = halves()
    assert explain(q, k, v).impl == "sdpa"
    assert explain(q, k, v, tangents="k").impl == "chunked"
    assert str(explain(q, k, v, impl="reference")) == "reference: asked for"
    seen = []
    torch.func.jvp(lambda q: seen.append(explain(q, k, v)) or attention(q, k, v), (q,), (tq,))
    assert seen[0].impl == "chunked"
    assert "tangents of q on cpu" in seen[0].reason
    with pytest.raises(ValueError, match="tangents: letters of 'qkv'"):
        explain(q, k, v, tangents="x")
