"""TwinFlow: one network with a mirrored side of time as its own critic (arXiv 2512.05150)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.condition import rows as cond_rows
from fewstep.algebra.noising import add_noise
from fewstep.algebra.process import Flow, bc
from fewstep.algebra.sampling import Sampler, any_steps
from fewstep.algebra.times import Beta, TimesPart, check_steps
from fewstep.config import Count, UserError, part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.networks.roles import Roles
from fewstep.objectives.regression import per_sample
from fewstep.objectives.trajectory import follow


@part("method", "twinflow")
class TwinFlow:
    """Any-step training on data (RCGM), flow matching on own samples at mirrored times, and their difference as score."""

    cites: ClassVar[tuple[str, ...]] = ("2512.05150",)

    times: TimesPart = Beta()
    """Distribution of t, in [0, 1]."""
    guidance_share: float = 0.0
    """enr: guidance in the target of the groups with 0 < t < 1, 0 for none. Data: the pair's velocity + enr (cond -
    uncond) (official .5 to .8); image_free: the teacher's scale, uncond + enr (cond - uncond) (official 4)."""
    step: float = 0.01
    """Length of the finite difference of the any-step target."""
    order: Count = 2
    """Sub-steps of the target network's path from there to the destination."""
    clamp: float = 1.0
    """Bound of the residual and of the rectifying difference."""
    near: float = 0.05
    """The group `mul` jumps at most this share of t."""
    rectify: float = 0.5
    """Weight of the self-adversarial term on the one-step group (official .5 to .75)."""
    decay: float = 0.99
    """Decay of the EMA network in the role `target`."""
    image_free: bool = False
    """True: own one-step samples in place of data, with the frozen role `teacher`'s velocity (official emd 1)."""
    steps: tuple[float, ...] = (1.0,)
    """Levels u that the student is sampled at; other numbers of steps are allowed too."""

    def __post_init__(self) -> None:
        check_steps(self.steps)

    def needs(self) -> Needs:
        roles = frozenset({"student", "target", *(("teacher",) if self.image_free else ())})
        frozen, inputs = frozenset({"teacher", "target"}), frozenset({"s", "mirror"})
        return Needs(roles, data=not self.image_free, process="flow", inputs=inputs, frozen=frozen)

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.losses(roles, batch))
        follow(roles.target, roles.student, self.decay)

    def groups(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(group 0..3, t, s): one-step (1, 0), near (t, t - U near t), any (t, t - U t), own samples (t, t)."""
        group = batch.draws.index % 4
        t = self.times.sample(batch.draws, Flow()).clamp(1e-3, 1.0)
        u = batch.draws.uniform()
        t = torch.where(group == 0, torch.ones_like(t), t)
        s = torch.where(group == 0, 0 * t, torch.where(group == 1, t - u * self.near * t, t - u * t))
        return group, t, torch.where(group == 3, t, s)

    def generate(self, net: Any, batch: Batch) -> Tensor:
        """One-step samples (b, *d) without a gradient."""
        noise = batch.noise()
        one = torch.ones(len(batch), dtype=torch.float64, device=noise.device)
        with torch.no_grad():
            return net(noise, one, batch.cond, s=0 * one).x0

    def losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        student, process = roles.student, roles.student.process
        if len(batch) < 4:
            raise UserError(f"method twinflow needs a micro-batch of at least 4, not {len(batch)}")
        group, t, s = self.groups(batch)
        fake, own = group == 3, self.generate(student, batch)
        mirrored = bc(fake.to(t.dtype), own) > 0
        x0, eps = own if self.image_free else torch.where(mirrored, own, batch.data()), batch.noise()
        x, _ = add_noise(process, x0, eps, t)
        here = student(x, t, batch.cond, s=s, mirror=fake.to(t.dtype)).velocity()
        v = self.velocity(roles, batch, x, t, group, eps - x0)
        target = torch.where(mirrored, v, self.target(roles, batch, x, t, s, v, here.detach()))
        weight = torch.tan((1 - (t - s).clamp(0, 1)) * torch.pi / 2.5) + 1
        losses = Losses({"any_step": robust(here - target, torch.where(fake, 1.0, weight).to(here.dtype))})
        if self.rectify:
            losses["rectify"] = self.rectify * self.rectifier(roles, batch, x, here, group)
        yield losses

    @torch.no_grad()
    def velocity(self, roles: Roles, batch: Batch, x: Tensor, t: Tensor, group: Tensor, v: Tensor) -> Tensor:
        """The pair's, or image_free the teacher's off group 3, along cond minus uncond where 0 < t < 1."""
        net, rows = roles.target, group != 3
        if self.image_free:
            # A student that is fed on nothing but its own samples drifts.
            net = roles.teacher
            real = net(x[rows], t[rows], cond_rows(batch.cond, rows)).velocity()
            v = v.index_put((rows,), real.to(v.dtype))
        if not self.guidance_share or batch.cond is None or batch.null_cond is None:
            return v
        gap = net(x, t, batch.cond).velocity() - net(x, t, batch.null_cond).velocity()
        # The official index excludes t = 1, so the one-step group has none, as well as own samples.
        share = (self.guidance_share - self.image_free) * ((group == 1) | (group == 2)).to(t.dtype)
        return v + bc(share, x) * gap

    @torch.no_grad()
    def target(self, roles: Roles, batch: Batch, x: Tensor, t: Tensor, s: Tensor, v: Tensor, here: Tensor) -> Tensor:
        """raw - clamp(R), R = ((t - s) raw - path) / step - v: the Eulerian residual by a difference (RCGM)."""
        close = (t - s) < self.step
        below = torch.maximum(t - self.step, s)
        x_m = (x - bc(t - below, x) * v).to(x.dtype)
        path, at = torch.zeros_like(here), below
        for k in range(1, self.order + 1):
            to = below + (s - below) * (k / self.order)
            f = roles.target(x_m, at, batch.cond, s=to).velocity()
            path, x_m, at = path + bc(at - to, x) * f, (x_m - bc(at - to, x) * f).to(x.dtype), to
        residual = (bc(t - s, x) * here - path) / self.step - v
        residual = torch.where(bc(close.to(t.dtype), x) > 0, here - v, residual)
        return here - residual.clamp(-self.clamp, self.clamp)

    def rectifier(self, roles: Roles, batch: Batch, x: Tensor, here: Tensor, group: Tensor) -> Tensor:
        """The one-step group moves along v_fake - v_real of the mirrored and the plain side of time."""
        tau = batch.draws.uniform()
        with torch.no_grad():
            x_tau, _ = add_noise(roles.student.process, (x - here).to(x.dtype), batch.noise(), tau)
            fake = roles.student(x_tau, tau, batch.cond, mirror=torch.ones_like(tau)).velocity()
            gap = (fake - roles.student(x_tau, tau, batch.cond).velocity()).clamp(-self.clamp, self.clamp)
        return robust((here - (here - gap).detach())[group == 0])

    def sampler(self) -> Sampler:
        return Sampler(kind="map", steps=self.steps, counts=any_steps(self.steps))


def robust(error: Tensor, weight: Tensor | float = 1.0, c: float = 1e-3) -> Tensor:
    """Barron's loss at alpha = 1: the batch mean of weight (b,) times e / (c sqrt(sg[e] / c^2 + 1)), about sqrt(e).

    e is the mean square of a row of error (b, *d). A scalar.
    """
    e = per_sample(error**2)
    return (weight * e / (c * torch.sqrt(e.detach() / c**2 + 1))).mean()
