"""Pairwise sample optimisation: a few-step student raised towards the better of two samples (arXiv 2410.03190)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.jump import ask, clean
from fewstep.algebra.noising import add_noise
from fewstep.algebra.process import bc
from fewstep.algebra.rollout import Passage, renoise_std, rollout
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.times import check_steps
from fewstep.config import NotNegative, Positive, Proper, part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.readings import of_batch
from fewstep.networks.adapters import Adapted
from fewstep.networks.roles import Roles
from fewstep.objectives.preference import log_ratio, offline, offline_hinge, pairwise
from fewstep.objectives.regression import per_sample

Made = tuple[tuple[tuple[Passage, ...], tuple[Passage, ...]], Tensor, Losses]
"""The ways of two samples of each condition, which is preferred (b,), and readings of them."""


@part("method", "pso")
class PSO:
    """Of two samples the better one's re-noising steps become likelier than under the reference, the worse one's less."""

    cites: ClassVar[tuple[str, ...]] = ("2410.03190",)

    steps: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    """Levels u of the student (the released script on SDXL-DMD2: 8). Online each step but the last is one update: that
    one draws nothing, so it gets no gradient, nor does a student of one step."""
    pairs: Literal["online", "offline"] = "online"
    """online: two samples of the student, compared by the role `reward`; offline: data against the reference's own."""
    reference: str | None = None
    """Role that stands still; left out, the student's base with the adapters `beside` the one that the student is."""
    beta: Positive = 50.0
    """Sharpness of the preference: 50 online; offline 5 in the DreamBooth script, 200 by default."""
    clip: Proper | None = 0.1
    """Online: likelihood ratios stay within 1 -+ this, a trust region; null leaves them free."""
    loss: Literal["pso", "pso_db"] = "pso"
    """Offline: pso compares with the reference, pso_db (DreamBooth's script) is a hinge without it."""
    lose_factor: NotNegative = 0.1
    """Offline: g on the errors of the samples that lose (released code)."""
    prior_weight: NotNegative = 0.5
    """Offline: weight of denoising the samples that lose, so that they are not forgotten (DreamBooth's prior)."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if self.reference == "student":
            raise ValueError("reference: the student is what is trained; name a role that stands still")
        if self.pairs == "online" and len(self.steps) < 2:
            raise ValueError(
                f"steps {list(self.steps)}: one step draws nothing between its noise and its sample, so PSO's gradient "
                "of it is exactly zero; give two levels or more, or train a one-step student by dmd2 with a reward"
            )
        if self.pairs == "online" and self.loss != "pso":
            raise ValueError(f"loss {self.loss}: is for pairs offline")

    def needs(self) -> Needs:
        still = frozenset({self.reference} if self.reference else ())
        if self.pairs == "offline":
            return Needs(still | {"student"}, data=True, frozen=still | {"teacher"})
        return Needs(still | {"student", "reward"}, frozen=still | {"teacher"}, reward="value")

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        if self.pairs == "offline":
            yield Turn(("student",), lambda batch: self.offline_losses(roles, batch))
            return
        held: list[tuple[Batch, Made]] = []

        def losses(batch: Batch, i: int) -> Iterator[Losses]:
            if i == 0:
                held.append((batch, self.made(roles, batch)))
            yield self.step_loss(roles, batch, next(m for b, m in held if b is batch), i)

        for i in range(len(self.steps) - 1):
            # Every later turn goes on with the first one's batches: a step belongs to its samples.
            yield Turn(("student",), partial(losses, i=i), batches=tuple(b for b, _ in held))

    def sampler(self) -> Sampler:
        return Sampler(kind="renoise", steps=self.steps)

    def still(self, roles: Roles) -> Any:
        """The reference: without a role the student's base, with the adapters that it calls beside its own."""
        if self.reference is not None:
            return roles[self.reference]
        return Adapted(roles.student.base, None, beside=roles.student.beside)

    @torch.no_grad()
    def made(self, roles: Roles, batch: Batch) -> Made:
        """Two whole rollouts of the student under each condition, and which the reward prefers."""
        last = len(self.steps) - 1
        draw = partial(rollout, roles.student, batch.draws, batch.shape, self.steps, batch.cond, exit=last, grad=False)
        both = [draw(record=True) for _ in range(2)]
        first, second = (roles.reward(made.x, batch.cond) for made in both)
        log = {"reward": (first.mean() + second.mean()) / 2, **of_batch(both[0].x, batch.cond)}
        return (both[0].way, both[1].way), torch.sign(first - second), Losses(log=log)

    def step_loss(self, roles: Roles, batch: Batch, made: Made, i: int) -> Losses:
        """The loss of re-noising step i of both samples, and how many of its ratios the clip has stopped."""
        ways, preference, told = made
        first, second = (self.ratio(roles, way[i], batch.cond) for way in ways)
        out = Losses({"prefer": pairwise(first, second, preference, self.beta, self.clip)})
        if self.clip is not None:
            stopped = (torch.cat((first, second)).detach().exp() - 1).abs() > self.clip
            out.log["clipped"] = stopped.float().mean()
        return out.join(told) if i == 0 else out

    def ratio(self, roles: Roles, passage: Passage, cond: Any) -> Tensor:
        """log p(x_s | x_t) of the student over that of the reference, (b,)."""
        process: Any = roles.student.process
        x, t, s = passage.x_in, passage.t, passage.s
        alpha = bc(process.alpha(s), x)
        mean = alpha * ask(roles.student, x, t, clean(process, t), cond).x0
        with torch.no_grad():
            before = alpha * ask(self.still(roles), x, t, clean(process, t), cond).x0
        return log_ratio(passage.x_out, mean, before, renoise_std(process, s))

    def offline_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        """Data against samples of the reference, both under one noise at one of the student's levels."""
        process: Any = roles.student.process
        still, last = self.still(roles), len(self.steps) - 1
        lost = rollout(still, batch.draws, batch.shape, self.steps, batch.cond, exit=last, grad=False).x
        levels = torch.tensor(self.steps, dtype=torch.float64, device=batch.draws.device)
        t, eps = process.grid(levels[batch.draws.integers(len(levels))]), batch.noise()

        def error(net: Any, x0: Tensor) -> Tensor:
            x_t, _ = add_noise(process, x0, eps, t)
            gap = (ask(net, x_t, t, clean(process, t), batch.cond).x0 - x0) / bc(process.sigma(t), x0)
            return per_sample(gap**2)

        win, lose = error(roles.student, batch.data()), error(roles.student, lost)
        if self.loss == "pso_db":
            losses = Losses({"prefer": offline_hinge(win, lose, self.beta, self.lose_factor)})
        else:
            with torch.no_grad():
                before = error(still, batch.data()), error(still, lost)
            losses = Losses({"prefer": offline(win, lose, *before, self.beta, self.lose_factor)})
        if self.prior_weight:
            losses["prior"] = self.prior_weight * lose.mean()
        losses.log |= {"error/win": win.mean(), "error/lose": lose.mean()}
        yield losses
