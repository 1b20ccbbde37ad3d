"""Phased DMD: distribution matching at the ends of sub-intervals, one expert each (arXiv 2510.27684)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep import objectives as obj
from fewstep.algebra.batch import Batch
from fewstep.algebra.guidance import guided
from fewstep.algebra.jump import times_of
from fewstep.algebra.noising import add_noise, transition
from fewstep.algebra.rollout import exit_step
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.times import TimesPart, Uniform, check_steps, law_at
from fewstep.config import part
from fewstep.methods.critic import Critic
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.readings import readings
from fewstep.methods.reward import Reward, add_reward, need_reward
from fewstep.methods.terms import scaled
from fewstep.networks.roles import Roles


@part("method", "phased_dmd")
class PhasedDMD:
    """One phase: train the expert whose interval ends at level s to make x_s, matched on re-noisings to (s, 1].

    The student is a network that routes by time (`experts`); only the last call of a rollout has a gradient,
    so only this phase's expert learns. Phases are stages of a recipe; each starts with a fresh critic.
    """

    cites: ClassVar[tuple[str, ...]] = ("2510.27684",)

    steps: tuple[float, ...] = (1.0, 0.5)
    """Levels u of the whole sampler, over all phases."""
    boundaries: tuple[float, ...] = (0.5,)
    """Levels, members of `steps`, at which a phase ends and the next begins."""
    phase: int = 1
    """Which phase, from 1; the last one ends at clean samples."""
    exit: Literal["random", "last"] = "random"
    """Which of the phase's steps carries the gradient and jumps to its end (the paper draws it)."""
    times: TimesPart = Uniform()
    """Re-noising level, squeezed into (s, 1]: the whole noisier side."""
    guidance: float = 1.0
    """Guidance scale of the teacher (Wan2.2 and Qwen-Image runs use the teacher's own)."""
    weight: Literal["dmd", "kl"] = "dmd"
    """dmd: 1 / <|x0 - D_real|> with the student's own x0; kl: the exact gradient of KL(q_t || p_t)."""
    loss_on: Literal["x_s", "x0"] = "x_s"
    """Which output the gradient is applied to: x_s as in the paper, or the x0 prediction as in public code."""
    critic: Critic = Critic(times=Uniform(low=0.02, high=1.0), weight="psi", steps=5)
    """Levels are squeezed into (s, 1], never s itself, where the target diverges. The weight is the paper's clamped one
    in every phase, min(1, 10 t^2) on the velocity of a flow once s is 0; LightX2V has velocity, with times that stay
    away from s. 5 updates per student update (paper)."""
    clamp: float = 10.0
    """Largest 1 / sigma_{t|s}^2 in the critic's weight (paper: 10)."""
    reward: Reward | None = None
    """A reward of the samples, maximised beside the method's own losses."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if self.boundaries:
            check_steps(self.boundaries)
        outside = [b for b in self.boundaries if b not in self.steps[1:]]
        if outside:
            raise ValueError(f"boundaries: {outside[0]} is not one of the inner steps {list(self.steps[1:])}")
        if not 1 <= self.phase <= len(self.boundaries) + 1:
            raise ValueError(f"phase must lie in 1..{len(self.boundaries) + 1}, not {self.phase}")
        if self.clamp <= 0:
            raise ValueError(f"clamp must be positive, not {self.clamp}")

    def needs(self) -> Needs:
        return need_reward(Needs(frozenset({"teacher", "student", "critic"})), self.reward)

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.student_losses(roles, batch))
        yield self.critic.turn(roles, step, lambda batch: self.critic_losses(roles, batch))

    def sampler(self) -> Sampler:
        # DDIM through the experts: eta = 0 keeps the noise that a step predicted.
        return Sampler(kind="gamma", steps=self.steps, eta=0.0)

    @property
    def end(self) -> float:
        """The level s at which this phase ends; 0 is clean."""
        return (*self.boundaries, 0.0)[self.phase - 1]

    def path(self, roles: Roles, batch: Batch, *, grad: bool = True) -> tuple[Tensor, Tensor]:
        """(x_s, x0): the state (b, *d) at this phase's end and the x0 prediction it came from."""
        process: Any = roles.student.process
        first = self.steps.index(self.boundaries[self.phase - 2]) if self.phase > 1 else 0
        own = [i for i, u in enumerate(self.steps) if i >= first and u > self.end]
        last = own[exit_step(batch.draws, len(own)) if self.exit == "random" else -1]
        times = times_of((*self.steps, self.end), process).to(batch.draws.device)
        b = len(batch)
        x = process.prior(batch.noise(), times[0].expand(b))
        with torch.no_grad():
            for i in range(last):
                x = roles.student(x, times[i].expand(b), batch.cond).at(times[i + 1].expand(b))
        with torch.set_grad_enabled(grad):
            prediction = roles.student(x, times[last].expand(b), batch.cond)
            x_s = prediction.at(times[-1].expand(b)) if self.end else prediction.x0
        return x_s, prediction.x0

    def level(self, roles: Roles, batch: Batch, times: Any) -> tuple[Tensor, Tensor | None]:
        """(t in (s, 1], s) as process times (b,); s is None at the clean end."""
        process: Any = roles.student.process
        t = law_at(times, batch.step).sample(batch.draws, process, span=(self.end, 1.0))
        return t, process.grid(torch.full_like(t, self.end)) if self.end else None

    def student_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        x_s, x0 = self.path(roles, batch)
        gradient, log = self.gradient(roles, batch, x_s.detach(), x0.detach())
        losses = Losses({"match": obj.surrogate_loss(x_s if self.loss_on == "x_s" else x0, gradient)}, log)
        yield add_reward(losses, self.reward, roles, batch, x0)

    @torch.no_grad()
    def gradient(self, roles: Roles, batch: Batch, x_s: Tensor, x0: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """w (D_fake - D_real) at x_t, noised from x_s, and readings.

        kl is w = alpha_t alpha_{t|s} / sigma_t^2, the x0 form of the paper's generator weight on psi.
        """
        process: Any = roles.student.process
        t, s = self.level(roles, batch, self.times)
        x_t, _ = add_noise(process, x_s, batch.noise(), t, s)
        real = guided(roles.teacher, x_t, t, batch.cond, batch.null_cond, self.guidance)
        fake = roles.critic(x_t, t, batch.cond)
        gradient = obj.score_difference(fake, real)
        if self.weight == "kl":
            gradient = scaled(process.alpha(t) * transition(process, s, t)[0] / process.sigma(t) ** 2, gradient)
        else:
            gradient = gradient * obj.dmd_normalizer(x0, real.x0)
        # Only in the last phase is x0 the sample that the critic denoises towards.
        return gradient, readings(x0, real, gradient, fake if s is None else None, batch.cond)

    def critic_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        x_s, _ = self.path(roles, batch, grad=False)
        t, s = self.level(roles, batch, self.critic.times)
        weights: dict[str, Any] = {"weight": self.critic.weight, "clamp": self.clamp}
        yield Losses({"dsm": obj.dsm(roles.critic, x_s, t, batch.noise(), batch.cond, s=s, **weights)})
