"""Several teachers: the closed form of two Gaussians, VSD as a special case, views, and gradients through all steps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.jump import clean
from fewstep.algebra.process import Flow
from fewstep.algebra.rollout import unrolled
from fewstep.algebra.sampling import sample
from fewstep.algebra.views import Coarse, Frame, Mirror, Negative
from fewstep.config import RecipeError
from fewstep.methods.factorised import Expert, Factorised
from fewstep.methods.vsd import VSD
from fewstep.networks.adapters import Adapted, fresh_name, frozen, plain_copy
from fewstep.networks.analytic import gaussian
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.mlp import MLP
from fewstep.networks.roles import Roles
from fewstep.objectives import surrogate_loss
from fewstep.recipe.store import load
from fewstep.train.trainer import Trainer

F64 = torch.float64


class EvenTimes:
    """The levels .02 to .98, each twice."""

    def sample(self, draws: Any, process: Any, **where: Any) -> Tensor:
        return torch.linspace(0.02, 0.98, len(draws) // 2, dtype=F64).repeat(2)


class Both(Batch):
    """Noise +1 and -1 at each level: exact means of what is linear in the noise."""

    def noise(self) -> Tensor:
        half = len(self) // 2
        return torch.cat([torch.ones(half, 1, dtype=F64), -torch.ones(half, 1, dtype=F64)])


def mean_pull(x: float) -> float:
    """The expected gradient in x of the two teachers' SDS, weights one half."""
    teachers = {"first": gaussian(Flow(), -0.5, 0.4), "second": gaussian(Flow(), 1.0, 0.2)}
    roles = Roles(student=gaussian(Flow(), 0.0, 1.0), **teachers)
    method = Factorised()
    object.__setattr__(method, "times", EvenTimes())
    b = 2 * 4801
    batch = Both(Draws(fold("eve"), torch.arange(b)), (1,))
    seen = torch.full((b, 1), x, dtype=F64)
    return sum(0.5 * float(method.pull(roles, batch, seen, Expert(role=name)).mean()) for name in teachers)


def test_two_gaussian_teachers_pull_to_the_weighted_mean_and_not_to_their_product():
    w = torch.tensor([0.6689904048, 1.0858994461], dtype=F64)
    rest = float((w * torch.tensor([-0.5, 1.0], dtype=F64)).sum() / w.sum())
    assert rest == pytest.approx(0.4281774400, abs=1e-9)
    assert mean_pull(rest) == pytest.approx(0, abs=1e-9)
    assert mean_pull(0.0) == pytest.approx(-0.3757021220, abs=1e-9)
    product = (-0.5 / 0.16 + 1 / 0.04) / (1 / 0.16 + 1 / 0.04)
    assert product == pytest.approx(0.7)
    assert mean_pull(product) > 0.1


def net(seed: int = 0, **more: Any) -> Denoiser:
    torch.manual_seed(seed)
    inner = MLP(2, 12, 3, classes=3, **more)
    for p in inner.parameters():
        nn.init.normal_(p, std=0.4)
    return Denoiser(inner, Flow(), "velocity", "angle")


def batch(b: int = 6) -> Batch:
    return Batch(Draws(fold("factorised"), torch.arange(b)), (2,), None, torch.arange(b) % 3, torch.full((b,), 3))


def test_one_teacher_one_step_and_a_critic_are_vsd():
    roles = Roles(teacher=frozen(net(1)), student=net(2), critic=frozen(net(3)))
    own = Factorised(experts=(Expert(kind="vsd"),), steps=(1.0,), weight="dmd")
    vsd = VSD(weight="dmd", guide_critic=False, times=own.times)
    gradients = []
    for method in (own, vsd):
        (losses,) = method.student_losses(roles, batch())
        roles.student.zero_grad()
        losses.total().backward()
        gradients.append([p.grad.clone() for p in roles.student.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert own.sampler().steps == (1.0,)


def test_gradients_go_through_every_step_and_samples_are_the_samplers():
    student, steps = net(2), (1.0, 0.6, 0.3)
    draws = Draws(fold("unrolled"), torch.arange(5))
    x = unrolled(student, draws, (2,), steps, torch.zeros(5, dtype=torch.long))
    noise = Draws(fold("unrolled"), torch.arange(5)).normal(2)
    same = sample(Factorised(steps=steps).sampler(), student, noise, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(x, same)
    (whole,) = torch.autograd.grad(x.sum(), [student.net.last.bias], retain_graph=True)  # type: ignore[union-attr,list-item]

    process = student.process
    t = [process.grid(torch.full((5,), u, dtype=F64)) for u in steps]
    state = process.prior(noise, t[0])
    with torch.no_grad():
        for a, b in pairwise(t):
            state = student(state, a, torch.zeros(5, dtype=torch.long)).at(b)
    last = student(state, t[2], torch.zeros(5, dtype=torch.long)).at(clean(process, t[2]))
    (alone,) = torch.autograd.grad(last.sum(), [student.net.last.bias])  # type: ignore[union-attr,list-item]
    assert float((whole - alone).abs().max()) > 0.1 * float(alone.abs().max())


def test_bins_hold_one_level_each():
    seen: list[Tensor] = []

    class Watch(nn.Module):
        process = Flow()

        def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Any:
            seen.append(t)
            return gaussian(Flow(), 0.2, 0.3)(x, t)

    draws = Draws(fold("bins"), torch.arange(200))
    unrolled(Watch(), draws, (1,), (1.0, 0.6, 0.3), bins=True)  # type: ignore[arg-type]
    assert bool((seen[0] == 1).all())
    for levels, low, high in ((seen[1], 0.3, 0.6), (seen[2], 0.0, 0.3)):
        assert low <= float(levels.min()) < low + 0.03
        assert high - 0.03 < float(levels.max()) <= high
        assert float(levels.mean()) == pytest.approx((low + high) / 2, abs=0.02)


def test_a_view_is_what_the_teacher_judges():
    draws = Draws(fold("views"), torch.arange(3))
    x = torch.randn(3, 2, 4, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.equal(Negative().see(x, draws), -x)
    assert torch.equal(Mirror().see(x, draws)[..., 0], x[..., -1])
    coarse = Coarse().see(x, draws)
    assert coarse.shape == x.shape
    torch.testing.assert_close(coarse[0, 0, :2, :2], x[0, 0, :2, :2].mean().expand(2, 2))
    film = torch.arange(3 * 5).reshape(3, 1, 5, 1, 1).float()
    frames = Frame().see(film, draws)
    assert frames.shape == (3, 1, 1, 1)
    assert all(5 * i <= float(v) < 5 * i + 5 for i, v in enumerate(frames.flatten()))
    for view in (Coarse(factor=4), Frame()):
        with pytest.raises(ValueError, match=f"view {view.name}: needs"):
            view.see(x, draws)
    # The gradient of a term reaches the sample through its view: negative turns its sign.
    pull = torch.ones_like(x)
    surrogate_loss(Negative().see(x, draws), pull).backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, -pull / x.numel())


def test_settings_that_make_no_sense_are_refused():
    for settings, words in (
        (["method.experts=[]"], "experts is empty"),
        (["method.experts=[{kind: vsd}, {kind: vsd, view: {name: negative}}]"], "'critic' would track two views"),
        (["method.experts=[{role: nobody}]"], "needs the role nobody"),
        (["method.critic.alignment=0.1"], r"critic\.alignment: the critics follow what a view shows"),
    ):
        with pytest.raises(RecipeError, match=words):
            load("toy/factorised", settings)
    with pytest.raises(RecipeError, match=r"student\.beside: role 'nobody' is not built before student"):
        load("digits-eve", ["student.beside=[nobody]"])


def test_a_call_with_adapters_beside_is_that_of_the_merged_weights():
    base = frozen(net(1))
    a, b = (Adapted(base, fresh_name(base), rank=2) for _ in range(2))
    student = Adapted(base, fresh_name(base), rank=3, beside=(*a.names, *b.names))
    for adapter in (a, b, student):
        for p in adapter.own.values():
            nn.init.normal_(p, std=0.3)
    x, t, cond = torch.randn(4, 2), torch.linspace(0.1, 0.9, 4), torch.tensor([0, 1, 2, 3])
    here = student(x, t, cond).x0
    torch.testing.assert_close(plain_copy(student)(x, t, cond).x0, here)
    others = [net_(x, t, cond).x0 for net_ in (base, a, b)]
    assert all(float((here - other).abs().max()) > 1e-3 for other in others)
    student(x, t, cond).x0.sum().backward()
    assert all(p.grad is not None for p in student.own.values())
    torch.testing.assert_close(base(x, t, cond).x0, others[0])
    here.sum().backward()


def test_the_digits_recipe_trains_its_abilities_and_then_the_student_alone():
    cut = [
        "before.0.steps=2",
        "before.1.steps=2",
        "train.steps=2",
        "train.batch=4",
        "train.ema=[]",
        "train.product=student",
    ]
    trainer = Trainer(load("digits-eve", cut), None, cpu=True)
    seen: dict[int, dict[str, Any]] = {}
    fit = trainer._run_stage

    def watch(stage: Any) -> None:
        fit(stage)
        names = ("mirrored", "inverted", "student", "critic_mirrored")
        seen[len(seen)] = {n: [p.detach().clone() for p in trainer.roles.parameters(n)] for n in names}

    trainer._run_stage = watch  # type: ignore[method-assign]
    trainer.fit()

    def moved(name: str, a: int, b: int) -> bool:
        return any(not torch.equal(p, q) for p, q in zip(seen[a][name], seen[b][name], strict=True))

    assert moved("inverted", 0, 1)
    assert not moved("mirrored", 0, 2)
    assert not moved("inverted", 1, 2)
    assert moved("student", 1, 2)
    assert moved("critic_mirrored", 1, 2)
    assert trainer.progress.skipped == 0
