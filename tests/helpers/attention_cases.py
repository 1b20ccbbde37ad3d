"""Inputs and the fp64 yardstick shared by the attention tests; also run as a script under the interpreter."""

import itertools
import json
import sys

import torch

from fewstep.kernels import (
    KeyRange,
    Ranges,
    Segment,
    attention_jvp,
    attention_tangent,
    block_causal,
    reference,
    teacher_forcing,
)

SUBSETS = [s for s in itertools.product((False, True), repeat=3) if any(s)]


def tensors(n, m, d, width=None, *, batch=2, heads=3, dtype=torch.float64, seed=0):
    """q, k, v, tq, tk, tv with different batch, heads, lengths and widths."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, n, d), (batch, heads, m, d), (batch, heads, m, width or d)] * 2
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def masks(n, m, batch=2):
    """A bool mask that differs by batch and has a dead row, and an additive one with the same zeros."""
    generator = torch.Generator().manual_seed(1)
    allowed = torch.rand(batch, 1, n, m, generator=generator) > 0.4
    allowed[:, :, n // 3] = False
    bias = torch.randn(batch, 1, n, m, generator=generator)
    return {"bool": allowed, "float": bias.masked_fill(~allowed, float("-inf"))}


def layouts():
    """name -> (ranges, still queries, still keys); the prefix and the clean half have zero tangents."""
    return {
        "block-causal": (block_causal([11, 19, 24], context=13, window=2), 0, 13),
        "teacher-forcing": (teacher_forcing([13, 9, 17]), 39, 39),
    }


def relative(a, b):
    """Frobenius distance of a and b over the norm of b, ignoring shared -inf."""
    a, b = a.detach(), b.detach()
    dead = torch.isneginf(b)
    assert torch.equal(torch.isneginf(a), dead)
    a, b = a.double().masked_fill(dead, 0.0), b.double().masked_fill(dead, 0.0)
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


def errors(inputs, present, *, mask=None, ranges=None, still=(0, 0), causal=False, scale=0.2, impl, grads=True):
    """Relative errors of every output and gradient of `impl` against the reference in fp64."""
    inputs = [x.clone() for x in inputs]
    for x, rows in zip(inputs[3:], (still[0], still[1], still[1]), strict=True):
        x[:, :, :rows] = 0
    given = [x if p else None for x, p in zip(inputs[3:], present, strict=True)]
    exact = [None if x is None else x.double() for x in inputs[:3] + given]
    options = {"mask": mask, "ranges": ranges, "causal": causal, "scale": scale, "impl": impl}
    leaves = [x.requires_grad_(True) for x in inputs[:3] + given if x is not None]
    truths = [x.requires_grad_(True) for x in exact if x is not None]
    dense = reference.dense_mask(exact[0], exact[1], mask, ranges, causal)
    o, to, lse, mu = reference.attention_jvp(*exact, mask=dense, scale=scale)
    got = attention_jvp(*inputs[:3], *given, **options, return_lse=True, return_mu=True)
    result = {n: relative(a, b) for n, a, b in zip(("o", "to", "lse", "mu"), got, (o, to, lse, mu), strict=True)}
    plain = [None if x is None else x.detach() for x in (*inputs[:3], got[0], got[2], *given)]
    alone = attention_tangent(*plain, **options)
    result |= {"tangent-only": relative(alone[0], to), "tangent-only mu": relative(alone[1], mu)}
    if not grads:
        return result
    generator = torch.Generator().manual_seed(2)
    w, u = (torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device) for _ in "ou")
    losses = {"primal": (1, 0), "tangent": (0, 1), "both": (1, 1)}
    names = [n for n, p in zip(("q", "k", "v", "tq", "tk", "tv"), (1, 1, 1, *present), strict=True) if p]
    for loss, (a, b) in losses.items():
        truth = torch.autograd.grad(a * (o * w).sum() + b * (to * u).sum(), truths, retain_graph=True, allow_unused=True)
        pair = [(got[0] * w.to(got[0].dtype)).sum(), (got[1] * u.to(got[1].dtype)).sum()]
        value = pair[0] if not b else pair[1] if not a else pair[0] + pair[1]
        mine = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
        for name, x, y in zip(names, mine, truth, strict=True):
            # The primal loss does not reach tangents: the reference says None or zero, so must we.
            if y is None or (loss == "primal" and len(name) == 2):
                assert x is None or not x.any()
                continue
            y = y.clone()
            if len(name) == 2:
                # a declared zero tangent is a constant, its gradient is zero by definition
                y[:, :, : still[0] if name == "tq" else still[1]] = 0
            result[f"{loss} d{name}"] = relative(torch.zeros_like(y) if x is None else x, y)
    return result


def interpreter_cases():
    """name -> (limit, function) for the Triton kernels in the interpreter."""
    cases = {}

    def add(name, limit, inputs, present=(True, True, True), **options):
        cases[name] = (limit, lambda: errors(inputs, present, impl="triton", **options))

    widths = (28, 40, 64, 72, 80, 96, 128, 160, 256)
    pairs = ((1, 17), (17, 49), (49, 77), (77, 49), (17, 77), (49, 17), (77, 17), (17, 49), (1, 77))
    for i, (d, (n, m)) in enumerate(zip(widths, pairs, strict=True)):
        half = i % 2 == 1
        dtype, limit = (torch.float16, 2e-3) if half else (torch.float32, 3e-6)
        add(f"D={d} {n}x{m} {dtype}", limit, tensors(n, m, d, heads=1, batch=1 + i % 2, dtype=dtype, seed=i))
        other, limit = (torch.float32, 3e-6) if half else (torch.float16, 2e-3)
        add(f"D={d} 17x33 {other}", limit, tensors(17, 33, d, heads=1, batch=1, dtype=other), grads=False)
    one = tensors(17, 1, 8, 12, batch=1, heads=2, dtype=torch.float32)
    add("one key", 3e-6, one, (False, False, True), grads=False)
    for n, m in ((200, 49), (49, 200), (256, 77)):
        x = tensors(n, m, 16, heads=1, batch=1, dtype=torch.float32)
        add(f"long {n}x{m}", 3e-6, x)
    x = tensors(256, 256, 16, heads=1, batch=1, dtype=torch.float32)
    add("long 256x256", 3e-6, x, grads=False)
    for present in SUBSETS[:-1]:
        named = "".join(c for c, p in zip("qkv", present, strict=True) if p)
        add(f"only t{named}", 3e-6, tensors(17, 23, 8, 12, batch=1, heads=2, dtype=torch.float32), present)
    small = tensors(33, 70, 16, 20, heads=2, dtype=torch.float32)
    for name, mask in masks(33, 70).items():
        add(f"{name} mask, dead row", 3e-6, small, mask=mask)
    add("causal", 3e-6, tensors(140, 70, 16, 20, batch=1, heads=1, dtype=torch.float32), causal=True)
    half = tensors(40, 52, 32, heads=1, dtype=torch.float16)
    add("float16 mask", 2e-3, half, mask=masks(40, 52)["bool"])
    for name, (ranges, rows, keys) in layouts().items():
        x = tensors(ranges.queries, ranges.keys, 16, 20, batch=1, heads=2, dtype=torch.float32)
        for present in ((True, True, True), (False, True, True), (True, False, False), (False, False, True)):
            add(f"{name} {present}", 3e-6, x, present, ranges=ranges, still=(rows, keys))
        x = tensors(ranges.queries, ranges.keys, 16, 20, batch=1, heads=1, dtype=torch.float16)
        add(f"{name} float16", 2e-3, x, ranges=ranges, still=(rows, keys))
    hollow = Ranges(9, 12, (Segment(0, 4, ()), Segment(4, 9, (KeyRange(2, 7), KeyRange(9, 12)))))
    add("rows without keys", 3e-6, tensors(9, 12, 8, batch=1, heads=2, dtype=torch.float32), ranges=hollow)
    bias = torch.zeros(33, 40)
    bias[:, 20:] = bias[5] = -1e9
    x = tensors(33, 40, 16, 20, heads=2, batch=1, dtype=torch.float32)
    # such a row is the softmax of its scores; of its lse only the value is given up
    cases["row of -1e9"] = (
        2e-4,
        lambda: {n: e for n, e in errors(x, (True,) * 3, mask=bias, impl="triton").items() if n != "lse"},
    )
    common = tensors(64, 96, 32, batch=1, heads=1, dtype=torch.float16)
    common[1] += 10.0
    add("float16, keys with common mode 10", 2e-3, common, grads=False)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors(20, 30, 8, 12, dtype=torch.float32)]
    add("heads inside the sequence", 3e-6, strided)
    return cases


def main(part, parts):
    names = list(interpreter_cases())
    for name in names[part::parts]:
        limit, run = interpreter_cases()[name]
        print(json.dumps({"name": name, "limit": limit, "errors": run()}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]))
