"""Ways to help a student at sampling, by its teacher or a negative prompt, as parts: what each draws, its calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from fewstep.algebra.assist import Corrected, adaptive, after_teacher, noised_again
from fewstep.algebra.condition import rows
from fewstep.algebra.jump import Solver, calls
from fewstep.algebra.prediction import Prediction
from fewstep.algebra.sampling import Fresh, Sampler, many_step, sample
from fewstep.config import Count, OneOf, part
from fewstep.networks.nasa import negative_away, steerable
from fewstep.networks.scores import Score

Net = Callable[..., Prediction]
Scale = Annotated[float, Field(ge=0, le=1000)]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A batch to draw: start noise (b, *d), conditions, and further noise by what it is for.

    teacher: its guidance is inside. score: of samples (b, *d) with their conditions, (b,). threshold: the least score
    that is kept. negative: (1, tokens, width), a negative prompt as the student's cross-attention takes it.
    """

    sampler: Sampler
    student: Net
    teacher: Net
    noise: Tensor
    cond: Any
    fresh: Fresh
    other: Callable[[str, int], Tensor]
    score: Callable[[Tensor, Any], Tensor] | None = None
    threshold: float = field(default=float("-inf"))
    negative: Tensor | None = None


class Assist(Protocol):
    """A way to help. `score` names what judges samples, None where nothing does."""

    @property
    def name(self) -> str: ...
    @property
    def guidance(self) -> float: ...
    def draw(self, case: Case) -> Tensor:
        """x0 (b, *d); the same rows for any split into batches."""
        ...

    def network_calls(self, sampler: Sampler) -> float:
        """Expected calls of student and teacher per sample; a guided call of the teacher counts two."""
        ...


AssistPart = Annotated[Assist, OneOf("assist")]
ScorePart = Annotated[Score, OneOf("score")]


def _per_call(guidance: float) -> int:
    return 1 if guidance == 1 else 2


@part("assist", "distillation_pp")
class DistillationPP:
    """Distillation++ (arXiv 2412.08871): the student's first answers move toward the teacher's opinion of them."""

    weight: Annotated[float, Field(ge=0, le=1)] = 0.3
    """lambda: how far; 0 is the student."""
    first: Count = 1
    """How many of the first steps are corrected (the paper: 1 or 2); the last never is."""
    guidance: Scale = 1.0
    """Guidance scale of the teacher; 1 is none."""

    def draw(self, case: Case) -> Tensor:
        help_noise: Fresh = lambda i: case.other("corrected", i)  # noqa: E731
        net = Corrected(case.student, case.teacher, case.sampler, self.weight, help_noise, self.first)
        return sample(case.sampler, net, case.noise, case.cond, case.fresh)

    def network_calls(self, sampler: Sampler) -> float:
        n = len(sampler.steps)
        return n + (min(self.first, n - 1) if self.weight else 0) * _per_call(self.guidance)


@part("assist", "diversity")
class Diversity:
    """Diversity distillation (arXiv 2503.10637): the teacher takes the first steps, in which the student loses modes."""

    steps: Count = 1
    """Steps of the student's grid that the teacher takes."""
    substeps: Count = 1
    """Solver steps in each of them."""
    solver: Solver = "ddim"
    """Of the teacher."""
    guidance: Scale = 1.0
    """Guidance scale of the teacher; 1 is none."""

    def draw(self, case: Case) -> Tensor:
        told: dict[str, Any] = {"steps": self.steps, "substeps": self.substeps, "solver": self.solver}
        return after_teacher(case.sampler, case.student, case.teacher, case.noise, case.cond, case.fresh, **told)

    def network_calls(self, sampler: Sampler) -> float:
        each = 2 if self.solver == "heun" else 1
        taken = self.steps * self.substeps * each * _per_call(self.guidance)
        return len(sampler.steps) - self.steps + taken


@part("assist", "adaptive")
class Adaptive:
    """Adaptive collaboration (arXiv 2312.10835): the teacher draws again what scores badly."""

    k: Annotated[float, Field(ge=0, le=100)] = 50.0
    """Per cent of the samples that are drawn again, by the percentile of scores of calibration samples."""
    mode: Literal["refine", "regenerate"] = "refine"
    """refine: noise the sample to `level` and solve back; regenerate: solve from fresh noise."""
    level: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Level u of refine (the paper's strength)."""
    steps: Count = 4
    """Solver steps of the teacher (the paper: 4)."""
    solver: Solver = "heun"
    """Of the teacher."""
    guidance: Scale = 1.0
    """Guidance scale of the teacher; 1 is none (the paper: 8)."""
    score: ScorePart
    """What judges the samples."""
    calibration: Count = 300
    """Samples from which the threshold is taken; no measurement draws their noise."""

    def draw(self, case: Case) -> Tensor:
        assert case.score is not None
        score = case.score

        def again(x: Tensor, which: Tensor) -> Tensor:
            noise, cond = case.other(self.mode, 0)[which], rows(case.cond, which)
            if self.mode == "regenerate":
                return sample(many_step(self.steps, self.solver), case.teacher, noise, cond)
            told: dict[str, Any] = {"level": self.level, "steps": self.steps, "solver": self.solver}
            return noised_again(case.teacher, x, noise, cond, **told)

        index = torch.arange(len(case.noise), device=case.noise.device)
        drawn = sample(case.sampler, case.student, case.noise, case.cond, case.fresh)
        return adaptive(lambda _: drawn, again, lambda x: score(x, case.cond), index, case.threshold)[0]

    def network_calls(self, sampler: Sampler) -> float:
        return sampler.network_calls() + self.k / 100 * calls(self.steps, self.solver) * _per_call(self.guidance)


@part("assist", "nasa")
class Nasa:
    """NASA (SNOOPI, arXiv 2412.02687): the student's cross-attention moves away from a negative prompt; no teacher."""

    negative: str
    """The prompt to move away from."""
    weight: Annotated[float, Field(ge=0, le=2)] = 0.1
    """a of Z+ - a Z-: .1 for SD1.5, .2 for SD2.1, .5 for PixArt-alpha in the paper; 0 is the student."""
    guidance: ClassVar[float] = 1.0

    def draw(self, case: Case) -> Tensor:
        assert case.negative is not None
        with negative_away(steerable(case.student), case.negative, self.weight):
            return sample(case.sampler, case.student, case.noise, case.cond, case.fresh)

    def network_calls(self, sampler: Sampler) -> float:
        return sampler.network_calls()
