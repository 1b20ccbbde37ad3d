"""Stand-ins of blocks: golden numbers of a stack with three affine blocks, what they find, and two streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import TODAY, make_today
from tiny_pipelines import FAMILIES, build
from torch import Tensor, nn

from fewstep.networks.blocks import blocks_of
from fewstep.networks.probing import Probe, applied, cheapest, cka, entering, picked, proposed, stand_in, standing_in

F64 = torch.float64


class Block(nn.Module):
    """h + (h W + b), or h + 1.5 tanh(2 h V + b) V^T."""

    def __init__(self, w: Tensor, b: Tensor, v: Tensor, affine: bool) -> None:
        super().__init__()
        self.w, self.b, self.v, self.affine = w, b, v, affine

    def forward(self, h: Tensor) -> Tensor:
        if self.affine:
            return h + (h @ self.w.T + self.b)
        return h + 1.5 * torch.tanh(2 * h @ self.v.T + self.b) @ self.v


class Stack(nn.Module):
    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h)
        return h


class Held(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


@pytest.fixture(scope="module")
def case() -> tuple[Probe, Tensor]:
    """Eight blocks of width 6, of which 3, 4 and 5 are affine, on 512 rows."""
    g = torch.Generator().manual_seed(1)
    draw = lambda *s: torch.randn(*s, generator=g, dtype=F64)  # noqa: E731
    w = [0.5 * draw(6, 6) / 6**0.5 for _ in range(8)]
    b = [0.3 * draw(6) for _ in range(8)]
    v = [draw(6, 6) / 6**0.5 for _ in range(8)]
    net = Held(Stack([Block(w[i], b[i], v[i], i in (3, 4, 5)) for i in range(8)]))
    h = draw(512, 6)
    return Probe(net, lambda: net.net(h)), h


def test_affine_blocks_have_no_residual_and_cost_nothing(case: Any):
    probe, h = case
    # By numpy: fitted to the even rows, read on the odd ones.
    want = [0.3721, 0.3951, 0.3629, 0, 0, 0, 0.3984, 0.4284]
    assert [round(r, 4) for r in probe.residuals] == pytest.approx(want, abs=1e-4)
    deltas = [probe.loss(3, k) - probe.loss(3, k - 1) for k in range(1, 6)]
    assert deltas[:3] == pytest.approx([0, 0, 0], abs=1e-12)
    assert [round(d, 4) for d in deltas[3:]] == [0.0016, 0.0011]
    # The stand-ins of the three make one affine map: that of the three together.
    out = h
    for block in probe.blocks[3:6]:
        out = block(out)
    chained = h
    for maps in probe.maps[3:6]:
        chained = applied(chained, maps[0])
    torch.testing.assert_close(chained, out)
    torch.testing.assert_close(applied(h, stand_in(h, out)), out)
    assert all(len(b._forward_hooks) == 0 for b in probe.blocks)


def test_the_rule_finds_them_and_the_cheapest_are_cheapest(case: Any):
    probe, _ = case
    assert (3, 5) in proposed(8, probe.loss, probe.allowed, accept=1e-6)
    assert proposed(8, probe.loss, lambda u, v: False, accept=1.0) == []
    assert cheapest(8, probe.loss, probe.allowed, 2) == [(3, 5)]

    def brute(remove: int) -> float:
        best = float("inf")

        def go(u: int, left: int, cost: float) -> None:
            nonlocal best
            if left == 0:
                best = min(best, cost)
                return
            for a in range(u, 8):
                for b in range(a + 1, min(8, a + left + 1)):
                    go(b + 1, left - (b - a), cost + probe.loss(a, b - a + 1))

        go(0, remove, 0.0)
        return best

    for remove in (1, 3, 4, 7):
        runs = cheapest(8, probe.loss, probe.allowed, remove)
        assert sum(v - u for u, v in runs) == remove
        assert sum(probe.loss(u, v - u + 1) for u, v in runs) == pytest.approx(brute(remove), abs=1e-12)
    with pytest.raises(ValueError, match="no runs of the 8 blocks take 3 away"):
        cheapest(8, probe.loss, lambda u, v: v - u < 1, 3)


def test_alignment_does_not_see_a_rotation_a_factor_or_a_shift():
    g = torch.Generator().manual_seed(2)
    a = torch.randn(50, 3, 4, generator=g)
    q, _ = torch.linalg.qr(torch.randn(4, 4, generator=g))
    assert cka(a, 3 * a @ q + 1) == pytest.approx(1, abs=1e-6)
    assert cka(a, torch.randn(50, 3, 4, generator=g)) < 0.2


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd3", "flux", "hunyuan_video"])
def test_blocks_of_two_streams_have_a_stand_in_for_each(name: str, tmp_path: Any):
    """Stand-ins of the identity and none of the block: the answer is that of the network without it."""
    from fewstep.networks.diffusers import load_denoiser

    family: Any = FAMILIES.get(name) or TODAY[name]
    if name in TODAY:
        make_today(tmp_path, name)
    else:
        build(name).save_pretrained(tmp_path)
    net = load_denoiser(str(tmp_path), size=family.shape[1:], guidance=None if name == "sd3" else 2.5)
    wrapper: Any = net.net
    g = torch.Generator().manual_seed(0)
    x, t, cond = torch.randn(40, *family.shape, generator=g), torch.linspace(0.1, 0.9, 40), wrapper.example(40, g)
    probe = Probe(net, lambda: net(x, t, cond))
    streams = [len(maps) for maps in probe.maps]
    assert streams == [2, 1] if name == "sd3" else streams == [2, 2]
    assert all(0 < r < 1.001 for r in probe.residuals)
    plain = net(x, t, cond).x0
    with standing_in(blocks_of(net)[:1], probe.maps[:1], picked(net)):
        near = net(x, t, cond).x0
    zero = [[0 * m for m in probe.maps[0]]]
    with standing_in(blocks_of(net)[:1], zero, picked(net)):
        without = net(x, t, cond).x0
    assert 0 < float((near - plain).square().mean()) < float((without - plain).square().mean())


def test_two_streams_of_a_class_without_a_wrapper_are_refused():
    a, b = torch.zeros(2, 3), torch.ones(2, 3)
    assert [float(h[0, 0]) for h in entering((a, b), {}, (a, b), 0)] == [0, 1]
    assert [float(h[0, 0]) for h in entering((a, b), {}, (b, a), 1)] == [1, 0]
    assert [float(h[0, 0]) for h in entering((a, b), {}, (None, a), 1)] == [0]
    with pytest.raises(ValueError, match="which is the image's is not known"):
        entering((a, b), {}, (a, b), None)
    with pytest.raises(ValueError, match="which is the image's is not known"):
        entering((a, b), {}, (a, b, b), 0)


def test_what_is_read_was_not_fitted_to():
    """A block of noise has no affine map: fitted to the rows that are read its residual would be about .6."""
    g = torch.Generator().manual_seed(3)
    h, noise, still = torch.randn(64, 6, generator=g), torch.randn(64, 6, generator=g), torch.zeros(64, 6)

    class Adds(nn.Module):
        def __init__(self, more: Tensor) -> None:
            super().__init__()
            self.more = more

        def forward(self, h: Tensor) -> Tensor:
            return h + self.more[: len(h)]

    def probe(count: int) -> Probe:
        net = Held(Stack([Adds(noise), Adds(still)]))  # type: ignore[list-item]
        return Probe(net, lambda: net.net(h[:count]))

    residuals = probe(28).residuals
    assert residuals[0] > 1
    assert residuals[1] == 0
    with pytest.raises(ValueError, match=r"an affine map of 6 channels would be fitted to 13 rows, .* needs 14"):
        probe(26)
