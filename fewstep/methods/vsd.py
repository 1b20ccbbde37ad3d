"""Variational score distillation of a generator: SwiftBrush, Diff-Instruct and PG-SB (arXiv 2312.05239, 2305.18455)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep import objectives as obj
from fewstep.algebra.batch import Batch
from fewstep.algebra.guidance import combined, guided, halves
from fewstep.algebra.prediction import Prediction
from fewstep.algebra.rollout import StepLists, listed, rollout
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.times import TimesPart, Uniform, check_step_lists
from fewstep.config import part
from fewstep.methods.critic import Critic
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.readings import readings
from fewstep.methods.reward import Reward, add_reward, need_reward, reward_turns
from fewstep.methods.terms import noised
from fewstep.networks.roles import Roles
from fewstep.objectives.score import ScoreWeight


@part("method", "vsd")
class VSD:
    """Follow teacher score minus critic score at noised student samples; the critic is a LoRA or a full copy."""

    cites: ClassVar[tuple[str, ...]] = ("2312.05239", "2305.18455", "2412.02687")

    steps: tuple[float, ...] = (1.0,)
    """Levels u the student is sampled at; the papers have one."""
    step_lists: tuple[tuple[float, ...], ...] = ()
    """Lists of steps of which every update draws one, so that one student, or LoRA, takes the steps of each: [[1.0],
    [1.0, 0.5]]. `steps` is one of them, at which it is sampled where nothing else is asked (Hyper-SD's unified LoRA)."""
    times: TimesPart = Uniform()
    """Re-noising level of the score difference; U(0.02, 0.98) in SwiftBrush's code."""
    weight: ScoreWeight = "sigma2"
    """Weight of the score difference: sigma2 is SwiftBrush's; kl makes it the gradient of KL (Diff-Instruct)."""
    guidance: float | tuple[float, float] = 1.0
    """Guidance scale w; a pair draws w uniformly between the two for each update (PG-SB: 0.5 to 4)."""
    guide_critic: bool = True
    """SwiftBrush and PG-SB guide the critic with the same w; False is Diff-Instruct and DMD."""
    critic: Critic = Critic()
    """1 update per student update in the three papers; SwiftBrush's weight is alpha^2 times "eps"."""
    drop_cond: float = 0.1
    """Probability that the critic trains without its condition, which guiding it needs (SwiftBrush: 0.1)."""
    real: str = "teacher"
    """Role that plays the teacher; DisBack names a checkpoint of the teacher's degradation."""
    reward: Reward | None = None
    """A reward of the samples, maximised beside the method's own losses."""

    def __post_init__(self) -> None:
        check_step_lists(self.steps, self.step_lists)
        if isinstance(self.guidance, tuple) and not self.guidance[0] < self.guidance[1]:
            raise ValueError(f"guidance {list(self.guidance)} must be one number or a pair low < high")
        if not 0 <= self.drop_cond <= 1:
            raise ValueError(f"drop_cond must lie in [0, 1], not {self.drop_cond}")

    def needs(self) -> Needs:
        needs = Needs(frozenset({self.real, "student", "critic"}), frozen=frozenset({"teacher", self.real}))
        return need_reward(needs, self.reward, fits=True)

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.student_losses(roles, batch))
        yield self.critic.turn(roles, step, lambda batch: self.critic_losses(roles, batch))
        yield from reward_turns(self.reward, roles, self.walked)

    @property
    def walked(self) -> tuple[float, ...] | StepLists:
        """What its rollouts take their steps from."""
        return listed(self.steps, self.step_lists)

    def sampler(self) -> Sampler:
        return Sampler(kind="renoise", steps=self.steps, lists=self.step_lists)

    def student_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        x = rollout(roles.student, batch.draws, batch.shape, self.walked, batch.cond).x
        gradient, log = self.gradient(roles, batch, x.detach())
        yield add_reward(Losses({"match": obj.surrogate_loss(x, gradient)}, log), self.reward, roles, batch, x)

    def gradient(self, roles: Roles, batch: Batch, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """w(tau) (D_fake - D_real) at a fresh noise level, and readings."""
        process: Any = roles.student.process
        x_tau, tau = noised(self.times, roles, batch, x)
        scale = self.scale(batch)
        with torch.no_grad():
            real = guided(roles[self.real], x_tau, tau, batch.cond, batch.null_cond, scale)
            fake, own = self.guided_critic(roles, batch, x_tau, tau, scale if self.guide_critic else 1.0)
        weight = obj.score_weight(self.weight, process, tau, x, real.x0)
        gradient = obj.score_difference(fake, real) * weight
        return gradient, readings(x, real, gradient, own, batch.cond)

    def guided_critic(
        self, roles: Roles, batch: Batch, x: Tensor, t: Tensor, scale: float
    ) -> tuple[Prediction, Prediction]:
        """The critic's guided answer and its conditional half, from one call; the same without guidance."""
        if scale == 1.0:
            own = roles.critic(x, t, batch.cond)
            return own, own
        own, null = halves(roles.critic, x, t, batch.cond, batch.null_cond, scale)
        return combined(roles.critic, own, null, scale), own

    def scale(self, batch: Batch) -> float:
        """This update's guidance scale, the same for every sample of it."""
        if not isinstance(self.guidance, tuple):
            return self.guidance
        low, high = self.guidance
        return low + (high - low) * batch.draws.shared_integer(2**31) / 2**31

    def critic_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        x = rollout(roles.student, batch.draws, batch.shape, self.walked, batch.cond, grad=False).x
        drop = self.drop_cond if self.guide_critic else 0.0
        yield self.critic.losses(roles, batch, x, drop_cond=drop)
