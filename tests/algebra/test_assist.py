"""Help by a teacher that is switched off is the student, and chunks that are one are backward simulation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.algebra.assist import Corrected, adaptive, after_teacher, noised_again, percentile
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.prediction import Prediction
from fewstep.algebra.process import EDM, Flow
from fewstep.algebra.rollout import chunked_rollout, renoise, rollout
from fewstep.algebra.sampling import Sampler, sample
from fewstep.config import UserError
from fewstep.networks.analytic import flow_map, gaussian
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.mlp import MLP

F64 = torch.float64
FOUR = (1.0, 0.7, 0.45, 0.2)


def student(seed: int = 5) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(MLP(3, 12, 3), Flow(), "velocity", "angle").double().eval()


def noise(i: int = 0) -> Tensor:
    return torch.randn(7, 3, dtype=F64, generator=torch.Generator().manual_seed(10 + i))


@torch.no_grad()
def test_distillation_pp_of_weight_zero_is_the_student_and_of_one_the_teachers_opinion() -> None:
    net, teacher = student(), gaussian(Flow(), 0.7, 0.4)
    for kind in ("renoise", "map"):
        sampler = Sampler(kind=kind, steps=FOUR)  # type: ignore[arg-type]
        plain = sample(sampler, net, noise(9), None, noise)
        off = Corrected(net, teacher, sampler, 0.0, noise, first=2)
        assert torch.equal(sample(sampler, off, noise(9), None, noise), plain)
        half = Corrected(net, teacher, sampler, 0.5, noise, first=2)
        assert float((sample(sampler, half, noise(9), None, noise) - plain).abs().max()) > 1e-3
    sampler = Sampler(steps=FOUR)
    one = Corrected(net, teacher, sampler, 1.0, noise)
    t, s = (torch.full((7,), u, dtype=F64) for u in FOUR[:2])
    answer = one(noise(9), t)
    wanted = teacher(renoise(Flow(), net(noise(9), t).x0, noise(0), s), s).x0
    torch.testing.assert_close(answer.x0, wanted, rtol=1e-12, atol=1e-12)
    # x0 and eps still make up x, and later levels are the student's.
    torch.testing.assert_close((1 - t)[:, None] * answer.x0 + t[:, None] * answer.eps, noise(9))
    assert torch.equal(one(noise(9), s).x0, net(noise(9), s).x0)
    with pytest.raises(ValueError, match=r"level 0\.33 is none of the sampler's"):
        one(noise(9), torch.full((7,), 0.33, dtype=F64))


def test_the_correction_is_a_gradient_step_on_score_distillation() -> None:
    """(1 - w) x0 + w D_T = x0 - (w / 2) d/dx0 |x0 - sg D_T|^2, per element."""
    x0, opinion = noise(1).requires_grad_(True), noise(2)
    (gradient,) = torch.autograd.grad(((x0 - opinion) ** 2).sum(), x0)
    torch.testing.assert_close(0.7 * x0 + 0.3 * opinion, x0 - 0.15 * gradient)


@torch.no_grad()
def test_no_steps_of_the_teacher_is_the_student_and_all_of_them_the_teacher() -> None:
    net, teacher = student(), gaussian(Flow(), 0.7, 0.4)
    sampler = Sampler(steps=FOUR)
    plain = sample(sampler, net, noise(9), None, noise)
    assert torch.equal(after_teacher(sampler, net, teacher, noise(9), None, noise, steps=0), plain)
    ode = sample(Sampler(kind="ode", steps=FOUR), teacher, noise(9))
    torch.testing.assert_close(after_teacher(sampler, net, teacher, noise(9), None, noise, steps=4), ode)
    # With two, the student starts where the teacher's two steps end, with its own later noises.
    x = noise(9)
    for t, s in ((1.0, 0.7), (0.7, 0.45)):
        x = teacher(x, torch.full((7,), t, dtype=F64)).at(torch.full((7,), s, dtype=F64))
    s, end = torch.full((7,), 0.45, dtype=F64), torch.full((7,), 0.2, dtype=F64)
    x = renoise(Flow(), net(x, s).x0, noise(2), end)
    two = after_teacher(sampler, net, teacher, noise(9), None, noise, steps=2)
    torch.testing.assert_close(two, net(x, end).x0)
    with pytest.raises(UserError, match=r"must lie in 0\.\.4, not 5"):
        after_teacher(sampler, net, teacher, noise(9), steps=5)


def test_adaptive_refinement_by_percentile() -> None:
    index = torch.arange(40)
    values = torch.linspace(-1, 1, 40, dtype=F64)[torch.randperm(40, generator=torch.Generator().manual_seed(1))]
    asked: list[list[int]] = []

    def refine(x: Tensor, rows: Tensor) -> Tensor:
        asked.append(rows.tolist())
        return x + 10

    def run(k: float) -> tuple[Tensor, Tensor]:
        return adaptive(lambda i: values[i, None], refine, lambda x: x[:, 0], index, percentile(values, k))

    never, rows = run(0)
    assert torch.equal(never, values[:, None])
    assert not rows.any()
    assert asked == []
    half, rows = run(50)
    assert rows.sum() == 20
    assert torch.equal(half[rows], values[rows, None] + 10)
    assert torch.equal(half[~rows], values[~rows, None])
    assert asked == [index[rows].tolist()]
    assert run(100)[1].all()
    assert percentile(values, 20) <= percentile(values, 80)


@torch.no_grad()
def test_refinement_noises_to_its_level_and_solves_back() -> None:
    teacher = gaussian(EDM(), 0.7, 0.4)
    x = 0.7 + 0.4 * noise(3)
    fine = noised_again(teacher, x, noise(4), level=0.5, steps=400)
    top = EDM().grid(torch.full((7,), 0.5, dtype=F64))
    state = renoise(EDM(), x, noise(4), top)
    # The last of 400 levels is still above sigma_min; there x0 is the denoiser's, not the flow's end.
    exact = flow_map(EDM(), 0.7, 0.4, state, top, EDM().grid(torch.full((7,), 0.5 / 400, dtype=F64)))
    torch.testing.assert_close(fine, exact, rtol=0, atol=3e-3)


class Chunky(torch.nn.Module):
    """A student of sequences that records the past it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.process, self.net, self.seen = Flow(), student(), []
        self.seen: list[Any]

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, context: Tensor | None = None) -> Prediction:
        self.seen.append(context)
        shift = 0.0 if context is None else 0.1 * context.sum(1, keepdim=True)
        flat = (x + shift).flatten(0, 1).double()
        answer = self.net(flat, t.repeat_interleave(x.shape[1]), cond)
        x0, eps = (v.reshape(x.shape) for v in (answer.x0, answer.eps))
        return Prediction(x0, eps, x, t, self.process)


def draws() -> Draws:
    return Draws(fold("chunks"), torch.arange(5))


def gradients(net: Chunky, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((x**2).mean(), list(net.parameters())))


def test_self_forcing_of_one_chunk_is_backward_simulation() -> None:
    net, steps = Chunky(), (1.0, 0.6, 0.3)
    for exit in (None, 0, 1, 2):
        whole = rollout(net, draws(), (4, 3), steps, exit=exit).x
        chunk = chunked_rollout(net, draws(), (4, 3), steps, exit=exit)
        assert torch.equal(chunk, whole)
        for a, b in zip(gradients(net, chunk), gradients(net, whole), strict=True):
            assert torch.equal(a, b)
    assert all(c is None for c in net.seen)


def test_later_chunks_see_the_drawn_past_without_its_graph() -> None:
    net, steps = Chunky(), (1.0, 0.6)
    x = chunked_rollout(net, draws(), (6, 3), steps, chunks=3, exit=1)
    assert x.shape == (5, 6, 3)
    pasts = [None if c is None else tuple(c.shape) for c in net.seen]
    assert pasts == [None] * 2 + [(5, 2, 3)] * 2 + [(5, 4, 3)] * 2
    assert torch.equal(net.seen[-1], x[:, :4].detach())
    assert not net.seen[-1].requires_grad
    with pytest.raises(ValueError, match="chunks 4 must divide the 6 frames"):
        chunked_rollout(net, draws(), (6, 3), steps, chunks=4)
