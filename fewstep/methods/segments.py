"""Segmented consistency: TSCD of Hyper-SD (arXiv 2404.13686) and phased consistency, PCM (arXiv 2405.18407)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws
from fewstep.algebra.jump import Solver
from fewstep.algebra.noising import add_noise
from fewstep.algebra.sampling import Sampler
from fewstep.config import Count, Decay, part
from fewstep.methods.gan import Gan
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.reward import Reward, add_reward, need_reward
from fewstep.methods.trunk import with_trunk
from fewstep.networks.roles import Roles
from fewstep.objectives.legs import Scale, Teacher, between, check_scale, drawn, student_leg
from fewstep.objectives.trajectory import Distance, distance, follow, two_leg


@part("method", "segments")
class Segments:
    """Consistency inside each of k segments of time; TSCD runs stages of k = 8, 4, 2, 1."""

    cites: ClassVar[tuple[str, ...]] = ("2404.13686", "2405.18407")

    segments: Count = 1
    """k; the student then takes k steps, one per segment."""
    counts: tuple[Count, ...] = ()
    """Numbers of segments of which every update draws one, [1, 2, 4, 8], so that one student, or LoRA, takes each of
    these numbers of steps (Hyper-SD's unified LoRA); `segments` is one of them, the one it is sampled at."""
    to: Literal["inside", "edge"] = "inside"
    """inside: s uniform down to the segment's lower edge (TSCD); edge: always the edge (PCM)."""
    knots: Count = 64
    """Points of the solver's grid (PCM 50, on SDXL 40). A segment begins at the last knot that is not above its place,
    so that 4 of 50 begin at knots 0, 12, 25 and 37."""
    skip: Count = 1
    """Knots between t and u; the leg ends at the edge where it would cross it."""
    solver: Solver = "ddim"
    """Solver of the teacher's leg; heun takes two calls a step, the others one."""
    guidance: Scale = 1.0
    """The teacher's scale (PCM on SD 1.5: between 5 and 6)."""
    target_decay: Decay | None = None
    """None: the target is the student itself (PCM's script); a number: its EMA in the role `target`."""
    distance: Distance = "mse"
    """PCM: huber, c 1e-3."""
    c: float = 1e-3
    """c of the pseudo-Huber distances, in units of the data (which lies in [-1, 1]); mse and l1 have none."""
    gan: Gan | None = None
    """Adversarial loss on the jump's end carried to x0 (late stages of TSCD; PCM with weight .1); left out: none."""
    reward: Reward | None = None
    """A reward of the samples, maximised beside the method's own losses."""

    def __post_init__(self) -> None:
        check_scale(self.guidance)
        if (most := max(self.segments, *self.counts, 1)) > self.knots:
            raise ValueError(f"segments {most} must not exceed the {self.knots} knots")
        if self.counts and (len(set(self.counts)) < max(2, len(self.counts)) or self.segments not in self.counts):
            raise ValueError(
                f"counts {list(self.counts)}: expected two numbers of segments or more, each once, and segments, "
                f"{self.segments}, among them"
            )

    def edges(self, count: int | None = None) -> list[int]:
        """The knot at which each of `count` segments begins, from the clean end; left out: `segments` of them."""
        count = self.segments if count is None else count
        return [j * self.knots // count for j in range(count)]

    def needs(self) -> Needs:
        roles = {"teacher", "student"} | ({"target"} if self.target_decay is not None else set())
        roles |= {"critic", "discriminator"} if self.gan else set()
        return need_reward(Needs(frozenset(roles), data=True, frozen=frozenset({"teacher", "target"})), self.reward)

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.losses(roles, batch))
        if self.target_decay is not None:
            follow(roles.target, roles.student, self.target_decay)
        if self.gan:
            yield Turn(("critic", "discriminator"), lambda batch: self.critic_losses(roles, batch))

    def levels(self, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """Levels (t, u, s), float64 (b,): t a knot, u its neighbour below, s in [edge, u]."""
        k = draws.integers(self.knots) + 1
        count = self.counts[draws.shared_integer(len(self.counts))] if self.counts else None
        edges = torch.tensor(self.edges(count), device=k.device)
        edge = edges[torch.searchsorted(edges, k - 1, right=True) - 1]
        u = torch.maximum(k - self.skip, edge)
        low, high = edge.double() / self.knots, u.double() / self.knots
        return k.double() / self.knots, high, low if self.to == "edge" else between(draws, low, high)

    def losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        process = roles.student.process
        t, u, s = (process.grid(v) for v in self.levels(batch.draws))
        x, _ = add_noise(process, batch.data(), batch.noise(), t)
        teacher = Teacher(roles.teacher, batch, drawn(self.guidance, batch.draws), self.solver)
        frozen = roles.student if self.target_decay is None else roles.target
        target = two_leg(teacher.step, student_leg(frozen, batch.cond), x, t, u, s)
        here = student_leg(roles.student, batch.cond)(x, t, s)
        losses = Losses({"consistency": distance(here, target, self.distance, self.c)})
        if self.gan or self.reward:
            clean = self.sample(roles, batch, x, t)
            if self.gan:
                losses["gan"] = self.gan.generator(roles, batch, clean)
            losses = add_reward(losses, self.reward, roles, batch, clean)
        yield losses

    def sample(self, roles: Roles, batch: Batch, x: Tensor, t: Tensor) -> Tensor:
        """The student's x0 on its way to the clean end."""
        return student_leg(roles.student, batch.cond)(x, t, roles.student.process.grid(torch.zeros_like(t)))

    def critic_losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        process = roles.student.process
        t, _, _ = (process.grid(v) for v in self.levels(batch.draws))
        noised, _ = add_noise(process, batch.data(), batch.noise(), t)
        with torch.no_grad():
            x = self.sample(roles, batch, noised, t)
        assert self.gan is not None
        yield with_trunk(self.gan, roles, batch, x)

    def sampler(self) -> Sampler:
        def steps(count: int) -> tuple[float, ...]:
            return (1.0, *(edge / self.knots for edge in reversed(self.edges(count)[1:])))

        return Sampler(kind="map", steps=steps(self.segments), lists=tuple(steps(n) for n in self.counts))
