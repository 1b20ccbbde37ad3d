"""The equilibrium transformer: its iterates in closed form, a plain transformer as a special case, gradients, memory."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.process import Flow
from fewstep.config import RecipeError
from fewstep.methods.kd import KD
from fewstep.networks.adapters import frozen
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.get import GET, GETSpec, grid_positions
from fewstep.networks.parts import Site
from fewstep.networks.roles import Roles
from fewstep.recipe.store import load
from fewstep.train.trainer import Trainer

SHAPE = (2, 4, 6)


class Affine(nn.Module):
    """z -> a z + u, with u the first third of what is injected."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def forward(self, z: Tensor, injected: Tensor) -> Tensor:
        return self.a * z + injected[..., :8]


def affine(iterations: int, start: float, u: float = 1.0) -> GET:
    """A GET whose stack is z -> z / 2 + u, decoded as it is."""
    net = GET(SHAPE, width=8, heads=2, injection=1, depth=1, iterations=iterations).double()
    net.stack = nn.ModuleList([Affine(0.5)])
    net.origin.fill_(start)
    net.injection = lambda x, cond=None: torch.full((len(x), 6, 24), u, dtype=torch.float64)  # type: ignore[method-assign]
    net._decoded = lambda z: z  # type: ignore[method-assign]
    return net


def test_iterates_of_an_affine_block_go_to_its_fixed_point():
    net = affine(6, 0.3)
    x = torch.zeros(3, *SHAPE, dtype=torch.float64)
    out, seen = net(x, torch.ones(3), taps=(*net.iterates, "residual"))
    want = [1.15, 1.575, 1.7875, 1.89375, 1.946875, 1.9734375]
    assert [float(seen[tap][0, 0, 0].detach()) for tap in net.iterates] == pytest.approx(want, abs=1e-14)
    assert want[-1] == pytest.approx(2 + (0.3 - 2) * 0.5**6)
    assert out is not None
    assert torch.equal(out, seen["iterate5"])
    steps = [0.3, *want]
    told = [(b - a) / b for a, b in pairwise(steps)]
    assert seen["residual"].tolist() == pytest.approx(told)


@pytest.mark.parametrize(("iterations", "value"), [(1, 2.0), (2, 3.0), (6, 3.9375)])
def test_the_gradient_of_unrolled_steps_goes_to_that_of_the_equilibrium(iterations: int, value: float):
    net = affine(iterations, 2.0)
    out, _ = net(torch.zeros(1, *SHAPE, dtype=torch.float64), torch.ones(1))
    (gradient,) = torch.autograd.grad(out[0, 0, 0], [net.stack[0].a])  # type: ignore[index,list-item]
    assert float(gradient) == pytest.approx(value) == 4 * (1 - 0.5**iterations)


def build(seed: int = 0, **changes: Any) -> GET:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"width": 8, "heads": 2, "injection": 2, "depth": 3, "classes": 3}
    return GET(SHAPE, **sizes | changes)


def test_one_iteration_is_a_plain_transformer_of_the_same_weights():
    net = build(iterations=1)
    x, cond = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 3])
    out, _ = net(x, torch.ones(4), cond)
    tokens = nn.functional.unfold(x, 2, stride=2).transpose(1, 2)
    h = net.embed(tokens) + grid_positions(2, 3, 8)
    for block in net.reading:
        h = block(h)
    u = net.inject(h)
    assert net.label is not None
    z = torch.zeros(4, 6, 8)
    for i, block in enumerate(net.stack):
        z = block(z, u[..., 24 * i : 24 * (i + 1)] + net.label(cond)[:, None])
    last = net.last(nn.functional.layer_norm(z, (8,)))
    assert out is not None
    torch.testing.assert_close(out, nn.functional.fold(last.transpose(1, 2), (4, 6), 2, stride=2))
    assert float((out[0] - net(x, torch.ones(4), cond.flip(0))[0][0]).abs().max()) > 1e-4  # type: ignore[index]


def test_a_condition_by_keys_is_its_label():
    net = build()
    x, label = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 3])
    want = net(x, torch.ones(4), label)[0]
    assert torch.equal(net(x, torch.ones(4), {"label": label})[0], want)  # type: ignore[arg-type]
    bare = net(x, torch.ones(4))[0]
    assert torch.equal(net(x, torch.ones(4), {"text": x})[0], bare)  # type: ignore[arg-type]


def test_a_start_of_noise_is_one_draw_and_the_same_for_every_split():
    net = build(start="noise", iterations=3)
    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1))
    whole, _ = net(x, torch.ones(4))
    torch.testing.assert_close(net(x[2:], torch.ones(2))[0], whole[2:])  # type: ignore[index]
    again = build(start="noise", iterations=3)
    assert torch.equal(again.origin, net.origin)
    assert "origin" in net.state_dict()
    assert float((build(iterations=3)(x, torch.ones(4))[0] - whole).abs().max()) > 1e-3  # type: ignore[operator]


def test_recomputing_changes_no_gradient_and_keeps_one_pass():
    gradients, kept = [], []
    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1))
    for again in (False, True):
        net = build(checkpointing=again, iterations=6)
        sizes: list[int] = []

        def note(t: Tensor, to: list[int] = sizes) -> Tensor:
            to.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            out, _ = net(x, torch.ones(4), torch.tensor([0, 1, 2, 3]), taps=net.iterates)
        kept.append(sum(sizes))
        out.square().mean().backward()  # type: ignore[union-attr]
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert kept[1] < 0.4 * kept[0]


def test_every_iterate_is_regressed_with_its_weight():
    student = Denoiser(build(iterations=3), Flow(), "x0", "angle")
    torch.manual_seed(2)
    teacher = frozen(Denoiser(build(1, iterations=1), Flow(), "x0", "angle"))
    roles = Roles(teacher=teacher, student=student)
    batch = Batch(Draws(fold("get"), torch.arange(4)), SHAPE, None, torch.tensor([0, 1, 2, 0]))
    method = KD(correct=0.8, distance="l1", teacher_steps=2)
    (losses,) = method.losses(roles, batch)
    times = [torch.ones(4)]
    states, target, cond = method.trajectory(
        roles, Batch(Draws(fold("get"), torch.arange(4)), SHAPE, None, batch.cond), times
    )
    seen = student(states[0], times[0], cond, taps=("iterate0", "iterate1", "iterate2")).features
    want = sum(w * (seen[f"iterate{k}"] - target).abs().mean() for k, w in enumerate((0.64, 0.8, 1.0)))
    torch.testing.assert_close(losses["regress"], want)
    assert set(losses.log) == {"residual_first", "residual_last"}
    plain = Roles(teacher=teacher, student=Denoiser(build(iterations=1), Flow(), "x0", "angle"))
    (one,) = method.losses(plain, batch)
    assert one["regress"].ndim == 0
    with pytest.raises(ValueError, match="needs a student with iterates, network get"):
        method.corrected(Roles(teacher=teacher, student=nn.Identity()), states[0], times[0], cond, target)


def test_a_bank_of_pairs_takes_the_place_of_trajectories():
    cut = ["student={name: get, width: 8, heads: 2, injection: 1, depth: 1, iterations: 2}", "method.pairs=12"]
    more = [
        "method.teacher_steps=2",
        "train.steps=3",
        "train.batch=4",
        "train.ema=[]",
        "train.product=student",
        "train.log_every=1",
    ]
    trainer = Trainer(load("digits-get", [*cut, *more]), None, cpu=True)
    trainer.fit()
    assert int(trainer.roles.state.filled) == 12
    assert trainer.last_record["residual_last"] > 0
    noise, target, cond = trainer.roles.state.draw(Draws(fold("bank"), torch.arange(5)))
    assert noise.shape == target.shape == (5, 1, 8, 8)
    assert cond.shape == (5,)


def test_settings_that_make_no_sense_are_refused():
    for settings, words in (
        (["method.steps=[1.0, 0.5]"], "correct: is for a student that answers at the prior alone"),
        (["method.steps=[1.0, 0.5]", "method.correct=null"], "pairs: hold no states between"),
        (["student.heads=3"], "heads 3, and 4 for the positions, must divide width 64"),
        (["student.width=40000"], "make a network of about"),
    ):
        with pytest.raises(RecipeError, match=words):
            load("digits-get", settings)
    with pytest.raises(RecipeError, match=r"network get is for images; the data has shape \[2\]"):
        GETSpec().build(Site((2,), 0, {}, 0))
    with pytest.raises(RecipeError, match=r"get\.patch 3: does not divide"):
        GETSpec(patch=3).build(Site((1, 8, 8), 0, {}, 0))
    told = r"get: takes no picture, .* conditions hold one of \[1, 4, 4\]; take dit, unet2d or unet-text, or other data"
    with pytest.raises(RecipeError, match=told):
        GETSpec().build(Site((1, 8, 8), 0, {}, 0, (1, 4, 4)))
    with pytest.raises(ValueError, match=r"taps \['mid'\] are unknown; allowed: residual, iterate0\.\.5"):
        build()(torch.zeros(1, *SHAPE), torch.ones(1), taps=("mid",))
