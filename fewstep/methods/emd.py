"""EM distillation: short Langevin chains correct the student's own samples (arXiv 2405.16852)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep import objectives as obj
from fewstep.algebra.batch import Batch
from fewstep.algebra.guidance import guided
from fewstep.algebra.prediction import Prediction
from fewstep.algebra.rollout import rollout
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.times import TimesPart, Uniform
from fewstep.config import part
from fewstep.methods.critic import Critic
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.readings import readings
from fewstep.methods.reward import Reward, add_reward, need_reward
from fewstep.methods.terms import scaled
from fewstep.networks.roles import Roles
from fewstep.objectives.score import ScoreWeight


@dataclass(frozen=True)
class Chain:
    """State of a chain: latents z and eps (b, *d), the share of eps that is injected noise, the teacher's last answer.

    start: the student's own sample x and what the teacher and the critic said of it, before anything moved.
    """

    z: Tensor
    eps: Tensor
    noise: Tensor
    real: Prediction
    start: tuple[Tensor, Prediction, Prediction]


@part("method", "emd")
class EMD:
    """Move (eps, z) of x_t = alpha g(z) + sigma eps along teacher minus critic score, then regress g onto the result."""

    cites: ClassVar[tuple[str, ...]] = ("2405.16852",)

    level: float = 1.0
    """Level u of the one step."""
    times: TimesPart = Uniform()
    """Noise level of the chain."""
    langevin: int = 4
    """Langevin steps K; 16 in the paper's best ImageNet-64 run, 1 in its fast ones."""
    step_eps: float = 0.16
    """Step size of eps, 0.4^2."""
    step_z: float = 1.6e-5
    """Step size of z, 0.004^2; 0 leaves z alone and saves the products with the student's Jacobian."""
    cancel_noise: bool = True
    """Take the propagated noise out of the regression target (the paper's noise cancellation)."""
    weight: ScoreWeight = "dmd"
    """Weight of the correction in x0 units, as for a score difference."""
    guidance: float = 1.0
    """The teacher's guidance scale; 1 is none."""
    critic: Critic = Critic()
    """The network whose score stands for the student's; it denoises the student's samples."""
    reward: Reward | None = None
    """A reward of the samples, maximised beside the method's own losses."""

    def __post_init__(self) -> None:
        if not 0 < self.level <= 1:
            raise ValueError(f"level must lie in (0, 1], not {self.level}")
        if self.langevin < 1:
            raise ValueError(f"langevin must be at least 1, not {self.langevin}")
        if not 0 < self.step_eps < 1 or not 0 <= self.step_z < 1:
            raise ValueError(f"need 0 < step_eps < 1 and 0 <= step_z < 1, not {self.step_eps}, {self.step_z}")

    def needs(self) -> Needs:
        return need_reward(Needs(frozenset({"teacher", "student", "critic"})), self.reward)

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.student_losses(roles, batch))
        yield self.critic.turn(roles, step, lambda batch: self.critic_losses(roles, batch))

    def sampler(self) -> Sampler:
        return Sampler(kind="renoise", steps=(self.level,))

    def generate(self, roles: Roles, z: Tensor, cond: Any) -> Tensor:
        """g(z), the student's x0 from latent noise."""
        process: Any = roles.student.process
        t = process.grid(torch.full((len(z),), self.level, dtype=torch.float64, device=z.device))
        return roles.student(process.prior(z, t), t, cond).x0

    def student_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        process: Any = roles.student.process
        z, tau, eps = batch.noise(), self.times.sample(batch.draws, process), batch.noise()
        chain = self.chain(roles, batch, z, eps, tau)
        x = self.generate(roles, chain.z, batch.cond)
        drift = chain.eps - chain.noise if self.cancel_noise else chain.eps
        # x_t^K - alpha g(z^K) = sigma eps^K, of which the drift is the part to learn. In x0 units, and by the
        # step size, so that one step without z is exactly VSD.
        gap = -scaled(process.sigma(tau) / (process.alpha(tau) * self.step_eps), drift)
        weight = obj.score_weight(self.weight, process, tau, x.detach(), chain.real.x0)
        gradient = gap * weight
        own, real, fake = chain.start
        losses = Losses({"match": obj.surrogate_loss(x, gradient)}, readings(own, real, gradient, fake, batch.cond))
        yield add_reward(losses, self.reward, roles, batch, x)

    def chain(self, roles: Roles, batch: Batch, z: Tensor, eps: Tensor, tau: Tensor) -> Chain:
        """K joint updates of (eps, z) from the student's own sample."""
        process: Any = roles.student.process
        noise, start = eps, None
        for _ in range(self.langevin):
            moved = z.detach().requires_grad_(bool(self.step_z))
            with torch.set_grad_enabled(bool(self.step_z)):
                x = self.generate(roles, moved, batch.cond)
            with torch.no_grad():
                x_tau = scaled(process.alpha(tau), x) + scaled(process.sigma(tau), eps)
                real = guided(roles.teacher, x_tau, tau, batch.cond, batch.null_cond, self.guidance)
                fake = roles.critic(x_tau, tau, batch.cond)
            start = start or (x.detach(), real, fake)
            gap = real.x0 - fake.x0
            # sigma (s_T - s_F) = (alpha / sigma)(D_T - D_F), finite at any level above 0.
            push = scaled(process.alpha(tau) / process.sigma(tau), gap)
            fresh = math.sqrt(2 * self.step_eps) * batch.noise()
            if self.step_z:
                cotangent = scaled(process.alpha(tau) / process.sigma(tau), push)
                (pull,) = torch.autograd.grad(x, moved, cotangent)
                z = z + self.step_z * (pull - z) + math.sqrt(2 * self.step_z) * batch.noise()
            eps = eps + self.step_eps * (push - eps) + fresh
            noise = (1 - self.step_eps) * noise + fresh
        assert start is not None
        return Chain(z.detach(), eps, noise, real, start)

    def critic_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        x = rollout(roles.student, batch.draws, batch.shape, (self.level,), batch.cond, grad=False).x
        yield self.critic.losses(roles, batch, x)
