"""Help by a teacher: what each part draws, that its calls are as many as it says, and that batches change nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.algebra.assist import after_teacher, noised_again
from fewstep.algebra.guidance import Guided
from fewstep.algebra.prediction import Prediction
from fewstep.algebra.process import Flow
from fewstep.algebra.sampling import Sampler, many_step, sample
from fewstep.networks.analytic import Mixture, flow_map, gaussian
from fewstep.networks.assisted import Adaptive, Case, DistillationPP, Diversity
from fewstep.networks.scores import ClassScore

F64 = torch.float64
FOUR = Sampler(kind="renoise", steps=(1.0, 0.7, 0.45, 0.2))
M, S = 0.7, 0.4


class Counted(torch.nn.Module):
    """Counts rows that go through a denoiser."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net, self.process, self.rows = net, net.process, 0

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        self.rows += len(x)
        return self.net(x, t, cond, **call)


def noise(name: str, i: int = 0, rows: int = 6) -> Tensor:
    seed = 100 * i + len(name)
    return torch.randn(40, 1, dtype=F64, generator=torch.Generator().manual_seed(seed))[:rows]


def case(rows: int = 6, **changes: Any) -> Case:
    student = gaussian(Flow(), 0.2, 0.3)
    teacher = Mixture(Flow(), [0.5, 0.5], [[-1.0], [1.0]], [0.3, 0.4], [0, 1])
    told: dict[str, Any] = {
        "sampler": FOUR,
        "student": Counted(student),
        "teacher": Counted(teacher),
        "noise": noise("start", 0, rows),
        "cond": torch.arange(rows) % 2,
        "fresh": lambda i: noise("fresh", i, rows),
        "other": lambda name, i: noise(name, i, rows),
    }
    return Case(**told | changes)


def adaptive(**changes: Any) -> Adaptive:
    return Adaptive(score=ClassScore(), **changes)


@pytest.mark.parametrize(
    "part",
    [
        DistillationPP(weight=0.5, first=2),
        DistillationPP(weight=0.5, first=9, guidance=2.0),
        DistillationPP(weight=0.0),
        Diversity(),
        Diversity(steps=2, substeps=3, guidance=2.0),
        Diversity(steps=1, substeps=2, solver="heun"),
        adaptive(k=100.0, mode="refine", steps=3),
        adaptive(k=100.0, mode="regenerate", steps=2, guidance=3.0),
        adaptive(k=0.0),
    ],
)
def test_calls_are_as_many_as_said(part: Any):
    kept = case()
    counted = kept.teacher
    guided = kept.teacher if part.guidance == 1 else Guided(counted, part.guidance, lambda c: torch.full_like(c, 2))  # type: ignore[arg-type]
    score = (lambda x, cond: x[:, 0]) if isinstance(part, Adaptive) else None
    threshold = {0.0: float("-inf"), 100.0: float("inf")}.get(getattr(part, "k", 0.0), 0.0)
    out = part.draw(replace(kept, teacher=guided, score=score, threshold=threshold))
    assert out.shape == (6, 1)
    assert (kept.student.rows + counted.rows) / 6 == part.network_calls(FOUR)  # type: ignore[attr-defined]


def test_expected_calls_of_a_share():
    assert adaptive(k=30.0, steps=4, guidance=2.0).network_calls(FOUR) == pytest.approx(4 + 0.3 * 7 * 2)
    assert adaptive(k=50.0, steps=4, solver="ddim").network_calls(FOUR) == 6


@torch.no_grad()
def test_one_substep_is_the_teachers_step_and_many_are_its_flow():
    student, teacher = gaussian(Flow(), 0.2, 0.3), gaussian(Flow(), M, S)
    two = Sampler(kind="map", steps=(1.0, 0.4))
    x = noise("start")
    plain = after_teacher(two, student, teacher, x)
    assert torch.equal(plain, after_teacher(two, student, teacher, x, substeps=1))
    assert float((plain - after_teacher(two, student, teacher, x, substeps=5)).abs().max()) > 1e-3
    t, s = (torch.full((6,), u, dtype=F64) for u in two.steps)
    want = student(flow_map(Flow(), M, S, x, t, s), s).x0
    fine = after_teacher(two, student, teacher, x, substeps=400, solver="heun")
    torch.testing.assert_close(fine, want, rtol=0, atol=1e-6)
    # The part is that function.
    drawn = Diversity(substeps=3, solver="heun").draw(case(sampler=two, student=student, teacher=teacher, cond=None))
    torch.testing.assert_close(drawn, after_teacher(two, student, teacher, x, substeps=3, solver="heun"))


@torch.no_grad()
@pytest.mark.parametrize("mode", ["refine", "regenerate"])
def test_the_teacher_draws_what_scores_badly_and_nothing_else(mode: str):
    kept = case()
    base = sample(FOUR, kept.student, kept.noise, kept.cond, kept.fresh)
    part = adaptive(mode=mode, steps=3)
    threshold = float(base.median()) + 1e-9
    out = part.draw(replace(kept, score=lambda x, _: x[:, 0], threshold=threshold))
    poor = base[:, 0] < threshold
    assert 0 < int(poor.sum()) < 6
    assert torch.equal(out[~poor], base[~poor])
    fresh, cond = noise(mode)[poor], kept.cond[poor]
    if mode == "regenerate":
        want = sample(many_step(3), kept.teacher, fresh, cond)
    else:
        want = noised_again(kept.teacher, base[poor], fresh, cond, level=0.4, steps=3)
    torch.testing.assert_close(out[poor], want)


@torch.no_grad()
@pytest.mark.parametrize("part", [DistillationPP(), Diversity(substeps=2), adaptive(), adaptive(mode="regenerate")])
def test_a_smaller_batch_draws_the_same_rows(part: Any):
    told: dict[str, Any] = {"score": lambda x, _: x[:, 0], "threshold": 0.1}
    torch.testing.assert_close(part.draw(case(6, **told))[:4], part.draw(case(4, **told)))


@torch.no_grad()
def test_what_every_step_takes_for_the_clean_sample_is_shown():
    net, x = gaussian(Flow(), M, S), noise("start")
    for sampler in (FOUR, replace(FOUR, kind="map", history=(0.0, 0.5, 0.4, 0.3)), many_step(4), many_step(4, "ddim")):
        seen: list[tuple[int, Prediction]] = []
        out = sample(sampler, net, x, None, lambda i: noise("fresh", i), seen=lambda *s, to=seen: to.append(s))
        assert torch.equal(out, sample(sampler, net, x, None, lambda i: noise("fresh", i)))
        assert [i for i, _ in seen] == [0, 1, 2, 3]
        assert torch.equal(seen[-1][1].x0, out)
        levels = [float(p.t[0]) for _, p in seen]
        assert levels == pytest.approx(sampler.steps)
