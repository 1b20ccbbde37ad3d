"""DMD, the first version: score matching anchored by teacher pairs (arXiv 2311.18828)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch

from fewstep import objectives as obj
from fewstep.algebra.batch import Batch
from fewstep.algebra.guidance import guided
from fewstep.algebra.jump import Solver
from fewstep.algebra.rollout import rollout
from fewstep.algebra.sampling import Sampler, many_step
from fewstep.algebra.times import TimesPart, Uniform
from fewstep.config import part
from fewstep.methods.critic import Critic
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.pairs import Pairs
from fewstep.methods.readings import readings
from fewstep.methods.reward import Reward, add_reward, need_reward
from fewstep.methods.terms import apart, noised, perceptual
from fewstep.networks.roles import Roles


@part("method", "dmd")
class DMD:
    """DMD2's score difference without GAN, plus a regression of the student onto the teacher's own pairs."""

    cites: ClassVar[tuple[str, ...]] = ("2311.18828",)

    level: float = 1.0
    """Level u of the one step."""
    times: TimesPart = Uniform()
    """Re-noising level of the score difference, U(0.02, 0.98)."""
    guidance: float = 1.0
    """Guidance scale of the teacher, in the score difference and in the pairs."""
    critic: Critic = Critic()
    """1 update per student update in the paper; weight "edm" for EDM networks."""
    regression_weight: float = 0.25
    """Weight of the regression: 0.25 with LPIPS for CIFAR-10 and ImageNet."""
    distance: Literal["mse", "pseudo_huber", "lpips"] = "mse"
    """Distance of the regression; the paper's is lpips, which needs a role `perceptual` of network lpips."""
    pairs: int = 512
    """Size of the pair bank, solved by the teacher when the method starts and kept in the checkpoints."""
    pair_steps: int = 18
    """Solver steps of a pair (paper: Heun, 18 for CIFAR-10, 256 for ImageNet)."""
    pair_solver: Solver = "heun"
    """Solver of the pairs; heun takes two teacher calls a step, the others one."""
    reward: Reward | None = None
    """A reward of the samples, maximised beside the method's own losses."""

    def __post_init__(self) -> None:
        if not 0 < self.level <= 1:
            raise ValueError(f"level must lie in (0, 1], not {self.level}")
        for name in ("pairs", "pair_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.regression_weight < 0:
            raise ValueError(f"regression_weight must not be negative, not {self.regression_weight}")

    def needs(self) -> Needs:
        roles = frozenset({"teacher", "student", "critic"})
        if not self.regression_weight:
            return need_reward(Needs(roles), self.reward)
        frozen = frozenset({"teacher", "perceptual"})
        roles |= perceptual(self.distance)
        return need_reward(
            Needs(roles, pairs=True, frozen=frozen, state=lambda data: Pairs(self.pairs, data)), self.reward
        )

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        if self.regression_weight:
            roles.state.fill(roles, many_step(self.pair_steps, self.pair_solver), self.guidance)
        yield Turn(("student",), lambda batch: self.student_losses(roles, batch))
        yield self.critic.turn(roles, step, lambda batch: self.critic_losses(roles, batch))

    def sampler(self) -> Sampler:
        return Sampler(kind="renoise", steps=(self.level,))

    def student_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        x = rollout(roles.student, batch.draws, batch.shape, (self.level,), batch.cond).x
        x_tau, tau = noised(self.times, roles, batch, x.detach())
        with torch.no_grad():
            real = guided(roles.teacher, x_tau, tau, batch.cond, batch.null_cond, self.guidance)
            fake = roles.critic(x_tau, tau, batch.cond)
        gradient = obj.score_difference(fake, real) * obj.dmd_normalizer(x.detach(), real.x0)
        losses = Losses(
            {"match": obj.surrogate_loss(x, gradient)}, readings(x.detach(), real, gradient, fake, batch.cond)
        )
        if self.regression_weight:
            losses["regress"] = self.regression_weight * self.regression(roles, batch)
        yield add_reward(losses, self.reward, roles, batch, x)

    def regression(self, roles: Roles, batch: Batch) -> Any:
        """Distance of the student's answer to a pair's noise from the pair's sample, a scalar."""
        noise, target, cond = roles.state.draw(batch.draws)
        process: Any = roles.student.process
        level = torch.tensor(self.level, dtype=torch.float64, device=noise.device)
        t = process.grid(level).expand(len(noise))
        x = roles.student(process.prior(noise, t), t, cond).x0
        if self.distance != "pseudo_huber":
            return apart(roles, x, target, self.distance)
        return obj.pseudo_huber_element(x, target, 0.03)

    def critic_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        x = rollout(roles.student, batch.draws, batch.shape, (self.level,), batch.cond, grad=False).x
        yield self.critic.losses(roles, batch, x)
