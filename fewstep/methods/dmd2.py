"""DMD2: Improved Distribution Matching Distillation for Fast Image Synthesis (arXiv 2405.14867)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep import objectives as obj
from fewstep.algebra.batch import Batch
from fewstep.algebra.guidance import guided
from fewstep.algebra.jumps import Jumps, jumped
from fewstep.algebra.rollout import Path, RandomSteps, Rollout, listed, rollout
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.times import Fading, TimesPart, Uniform, check_step_lists
from fewstep.config import part
from fewstep.methods.critic import Critic
from fewstep.methods.first_step import FirstStep
from fewstep.methods.gan import Gan
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.off_trajectory import OffTrajectory
from fewstep.methods.readings import readings
from fewstep.methods.reward import Reward, add_reward, need_reward, reward_turns
from fewstep.methods.terms import noised
from fewstep.networks.roles import Roles


@part("method", "dmd2")
class DMD2:
    """Match the student's noised distribution to the teacher's; a critic tracks the student, a GAN anchors it to data."""

    cites: ClassVar[tuple[str, ...]] = ("2405.14867", "2311.18828")

    steps: tuple[float, ...] = (1.0,)
    """Levels u the student is sampled at, from the prior down (SDXL 4-step: 1, .75, .5, .25)."""
    step_lists: tuple[tuple[float, ...], ...] = ()
    """Lists of which every update draws one, for one student or LoRA of them all (Hyper-SD); `steps` is one of them."""
    times: TimesPart = Uniform()
    """Re-noising level of the score difference; U(0.02, 0.98) in the official code."""
    critic: Critic = Critic(steps=5)
    """5 updates per student update for ImageNet-64 and SDXL, 10 for SD1.5 (sec. 4.2); at all levels."""
    guidance: float = 1.0
    """Guidance scale of the real score only: 1.75 for SD1.5, 8 for SDXL; 1 is none."""
    gan: Gan | None = Gan()
    """The discriminator on the critic's features; null removes it, and with it the data."""
    share_rollout: bool = False
    """True: the first critic update of a step trains on the samples of the student's turn: a rollout less."""
    simulate: RandomSteps | None = None
    """Training samples come from steps at random levels in place of `steps` (rCM, CDM); null: from steps."""
    jumps: Jumps | None = None
    """AnyFlow: training samples come from three jumps of a flow map at any number of steps; null: from steps."""
    path: Path = "renoise"
    """Between steps, in training and sampling: renoise as in DMD2, map without fresh noise (DP-DMD and CDM)."""
    first_step: FirstStep | None = None
    """DP-DMD: the first step regresses the teacher's state and only the others are matched; null is DMD2."""
    off_trajectory: OffTrajectory | None = None
    """CDM: a second sample of each update, from a point off the trajectory, is matched too; null is DMD2."""
    lean: Fading | None = None
    """DMDR (arXiv 2511.13649): scale of the critic, a lora of the teacher, in the real score, {start: .75} there."""
    reward: Reward | None = None
    """A reward of the samples, maximised beside the method's own losses."""

    def __post_init__(self) -> None:
        check_step_lists(self.steps, self.step_lists)
        if self.step_lists and (self.simulate or self.anchored or self.jumps):
            raise ValueError("step_lists: simulate, jumps and first_step have steps of their own; leave one of them out")
        if self.first_step is not None and self.first_step.weight:
            self.first_step.check(self.steps)
            if self.simulate is not None:
                raise ValueError("first_step and simulate: the first needs fixed levels of steps; give one of the two")
        if self.jumps is not None and (self.path != "map" or self.simulate or self.anchored):
            raise ValueError("jumps: a flow map's need path: map, and neither simulate nor first_step beside them")

    def needs(self) -> Needs:
        roles = {"teacher", "student", "critic"} | ({"discriminator"} if self.gan else set())
        inputs = frozenset({"s"} if self.jumps else ())
        return need_reward(Needs(frozenset(roles), data=self.gan is not None, inputs=inputs), self.reward, fits=True)

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        made: list[tuple[Tensor, Any]] | None = [] if self.share_rollout else None
        yield Turn(("student",), lambda batch: self.student_losses(roles, batch, made, step))
        yield self.critic.turn(
            roles, step, lambda batch: self.critic_losses(roles, batch, made.pop(0) if made else None), self.gan
        )
        yield from reward_turns(self.reward, roles, lambda batch: self.rolled(roles, batch, grad=False).x)

    def sampler(self) -> Sampler:
        more = range(self.simulate.least, self.simulate.most + 1) if self.simulate else getattr(self.jumps, "counts", ())
        counts = tuple(sorted({len(self.steps), *more})) if more else None
        return Sampler(kind=self.path, steps=self.steps, counts=counts, lists=self.step_lists)

    @property
    def anchored(self) -> FirstStep | None:
        """The first step's own loss, where it has a weight."""
        return self.first_step if self.first_step is not None and self.first_step.weight else None

    def rolled(self, roles: Roles, batch: Batch, grad: bool = True) -> Rollout:
        """The student's samples, at the step that this update draws of those that are matched."""
        if self.jumps is not None:
            return jumped(roles.student, batch.draws, batch.shape, self.jumps, batch.cond, grad=grad)
        steps = self.simulate or listed(self.steps, self.step_lists)
        stop = self.anchored.exit(batch.draws, len(self.steps)) if self.anchored else None
        call: dict[str, Any] = {"exit": stop, "grad": grad, "path": self.path}
        return rollout(roles.student, batch.draws, batch.shape, steps, batch.cond, **call)

    def student_losses(
        self, roles: Roles, batch: Batch, made: list[tuple[Tensor, Any]] | None = None, step: int = 0
    ) -> Iterator[Losses]:
        """The losses of the student's turn; its samples and their conditions are appended to `made`."""
        x = (rolled := self.rolled(roles, batch)).x
        if made is not None:
            made.append((x.detach(), batch.cond))
        log: dict[str, Tensor] = {}
        losses = Losses({"match": obj.surrogate_loss(x, self.gradient(roles, batch, x.detach(), log))}, log)
        if self.gan:
            losses["gan"] = self.gan.generator(roles, batch, x)
        if self.anchored:
            losses["first_step"] = self.anchored.loss(roles, batch, self.steps[0], self.guidance)
        if (off := self.off_trajectory) is not None and off.weight:
            strayed = off.sample(roles, batch, rolled)
            gradient = self.gradient(roles, batch, strayed.detach(), floor=off.floor)
            losses["off_trajectory"] = off.scale(step) * obj.surrogate_loss(strayed, gradient)
        yield add_reward(losses, self.reward, roles, batch, x)

    def gradient(
        self, roles: Roles, batch: Batch, x: Tensor, log: dict[str, Tensor] | None = None, floor: float = 1e-6
    ) -> Tensor:
        """(D_fake - D_real) / <|x - D_real|> at a fresh noise level (DMD eq. 7 and 8); readings go to `log`."""
        x_tau, tau = noised(self.times, roles, batch, x)
        with torch.no_grad():
            share = self.lean.at(batch.step) if self.lean else 0.0
            net = roles.critic if share else roles.teacher
            call: dict[str, Any] = {"adapter_scale": share} if share else {}
            real = guided(net, x_tau, tau, batch.cond, batch.null_cond, self.guidance, **call)
            fake = roles.critic(x_tau, tau, batch.cond)
        gradient = obj.score_difference(fake, real) * obj.dmd_normalizer(x, real.x0, floor)
        if log is not None:
            log.update(readings(x, real, gradient, fake, batch.cond))
        return gradient

    def critic_losses(self, roles: Roles, batch: Batch, made: tuple[Tensor, Any] | None = None) -> Iterator[Losses]:
        """The losses of critic and head, on fresh samples of the student or on given ones with their conditions."""
        if made is not None:
            x, fakes = made[0], replace(batch, cond=made[1])
        else:
            x, fakes = self.rolled(roles, batch, grad=False).x, batch
        yield self.critic.losses(roles, batch, x, self.gan, fakes=fakes)
