"""Denoising: the student as a denoiser, on data or onto the teacher, guided or not. Makes teachers and warm starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.guidance import guided
from fewstep.algebra.noising import add_noise
from fewstep.algebra.sampling import Sampler, many_step
from fewstep.algebra.times import LogNormal, TimesPart, law_at
from fewstep.algebra.views import ViewPart, Whole
from fewstep.config import Count, part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.terms import dropped
from fewstep.networks.roles import Roles
from fewstep.objectives import dsm, mse
from fewstep.objectives.legs import Scale, check_scale, drawn, middle
from fewstep.objectives.regression import Weight, x0_weight


@part("method", "denoise")
class Denoise:
    """Denoising score matching of the student (arXiv 2206.00364, eq. 2), with condition dropout."""

    cites: ClassVar[tuple[str, ...]] = ("2206.00364",)

    times: TimesPart = LogNormal()
    """Noise levels; EDM trains on ln sigma ~ N(-1.2, 1.2^2) (table 1)."""
    weight: Weight = "edm"
    """Weight of the x0 error; "edm" for EDM (table 1), "eps" for SD's networks."""
    target: Literal["data", "teacher"] = "data"
    """data: regress on clean data; teacher: on the teacher's denoiser at the same noised data."""
    guidance: Scale = 1.0
    """The teacher's scale under target teacher, a number or drawn for each sample: the student then answers guided in one
    call (LoRA-enhanced distillation 7.5, arXiv 2312.06899, with a student that is a lora)."""
    embed_guidance: bool = False
    """The student takes the drawn scale as its input w."""
    source: Literal["data", "trajectory"] = "data"
    """Of target teacher: noised data, or the states of the teacher's own guided trajectories, without data (AGD)."""
    trajectory_steps: Count = 8
    """DDIM steps of a trajectory; every state of it is trained on in one update, the teacher's answer being both its
    step and the target."""
    of: str = "teacher"
    """Role that plays the teacher."""
    role: str = "student"
    """Role that is trained; another than the student where a later stage learns from it."""
    drop_cond: float = 0.1
    """Probability of training a sample without its condition, which guidance needs (arXiv 2207.12598)."""
    view: ViewPart = Whole()
    """What of the data is learned: `negative` makes an adapter that draws with inverted contrast."""
    sample_steps: int = 18
    """Steps of the Heun sampler that shows its progress."""

    def __post_init__(self) -> None:
        check_scale(self.guidance)
        if not 0 <= self.drop_cond <= 1:
            raise ValueError(f"drop_cond must lie in [0, 1], not {self.drop_cond}")
        if self.role in ("teacher", self.of):
            raise ValueError(f"role {self.role}: cannot be trained where it is the teacher")
        if self.sample_steps < 1:
            raise ValueError(f"sample_steps must be at least 1, not {self.sample_steps}")
        if self.target == "data" and (self.guidance != 1.0 or self.embed_guidance or self.source != "data"):
            raise ValueError("guidance, embed_guidance and source are of target teacher; data has neither")
        for key, default in (("view", Whole()), ("times", LogNormal())):
            if self.source == "trajectory" and getattr(self, key) != default:
                raise ValueError(
                    f"{key}: source trajectory trains at states of the teacher's own trajectories, not on data that "
                    "`times` noises and `view` shows; leave it out, or take source data"
                )

    def needs(self) -> Needs:
        roles = {self.role, self.of} if self.target == "teacher" else {self.role}
        inputs = frozenset({"w"} if self.embed_guidance else ())
        frozen = frozenset({"teacher", self.of})
        return Needs(frozenset(roles), data=self.source == "data", inputs=inputs, frozen=frozen)

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        losses = self.losses if self.source == "data" else self.trajectory_losses
        yield Turn((self.role,), lambda batch: losses(roles, batch))

    def losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        student, x0 = roles[self.role], self.view.see(batch.data(), batch.draws)
        process: Any = student.process
        t, eps = law_at(self.times, batch.step).sample(batch.draws, process), batch.noise()
        cond = dropped(batch, self.drop_cond)
        if self.target == "data":
            yield Losses({"dsm": dsm(student, x0, t, eps, cond, weight=self.weight)})
            return
        x_t, _ = add_noise(process, x0, eps, t)
        yield Losses({"regress": self.follow(roles, batch, x_t, t, cond, drawn(self.guidance, batch.draws))[0]})

    def trajectory_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        """The regression at each state of the teacher's own way from the prior, each with its share of the mean."""
        process: Any = roles[self.role].process
        cond, scale = dropped(batch, self.drop_cond), drawn(self.guidance, batch.draws)
        n = self.trajectory_steps
        u = torch.linspace(1, 0, n + 1, dtype=torch.float64, device=batch.draws.device)
        times = [t.expand(len(batch)) for t in process.grid(u)]
        x = process.prior(batch.noise(), times[0])
        for t, s in pairwise(times):
            error, target = self.follow(roles, batch, x, t, cond, scale)
            yield Losses({"regress": error / n})
            x = target.at(s).to(x.dtype)

    def follow(
        self, roles: Roles, batch: Batch, x: Tensor, t: Tensor, cond: Any, scale: float | Tensor
    ) -> tuple[Tensor, Any]:
        """The weighted x0 error of the student in one call against the guided teacher at (x, t), and that answer."""
        call = {"w": t * 0 + scale} if self.embed_guidance else {}
        with torch.no_grad():
            target = guided(roles[self.of], x, t, cond, batch.null_cond, scale)
        student: Any = roles[self.role]
        weight = x0_weight(self.weight, student.process, t)
        return mse(student(x, t, cond, **call).x0, target.x0, weight), target

    def sampler(self) -> Sampler:
        made = many_step(self.sample_steps)
        return replace(made, guidance=middle(self.guidance)) if self.embed_guidance else made
