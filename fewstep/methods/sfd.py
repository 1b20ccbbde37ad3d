"""SFD: Simple and Fast Distillation of Diffusion Models, and SFD-v with a variable number of steps (arXiv 2409.19681)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch

from fewstep.algebra.batch import Batch
from fewstep.algebra.jump import Solver, ask
from fewstep.algebra.sampling import Sampler
from fewstep.config import Count, part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.networks.roles import Roles
from fewstep.objectives.legs import Teacher
from fewstep.objectives.trajectory import Distance, distance


@part("method", "sfd")
class SFD:
    """Few Euler steps follow a finer solver; an optimiser step after each of them, along the student's own path."""

    cites: ClassVar[tuple[str, ...]] = ("2409.19681",)

    counts: tuple[Count, ...] = (4,)
    """Numbers of steps; one is drawn per update. Several make SFD-v, whose student should take s."""
    between: int = 3
    """M, teacher nodes inside one student interval; 0 makes teacher and student the same."""
    solver: Solver = "heun"
    """Solver of the teacher's leg; heun takes two calls a step, the others one."""
    guidance: float = 1.0
    """The teacher's guidance scale; 1 is none."""
    distance: Distance = "l1"
    """l1 (official)."""

    def __post_init__(self) -> None:
        if not self.counts or self.between < 0:
            raise ValueError(f"counts must not be empty and between not negative: {self.counts}, {self.between}")

    def needs(self) -> Needs:
        return Needs(frozenset({"teacher", "student"}))

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        held: list[tuple[Batch, dict[str, Any]]] = []

        def losses(batch: Batch, i: int) -> Iterator[Losses]:
            if i == 0:
                held.append((batch, self.path(roles, batch)))
            path = next(p for b, p in held if b is batch)
            # A shorter path has fewer steps than turns: the surplus ones retrain its last step.
            yield self.step_loss(roles, batch, path, min(i, len(path["times"]) - 2))

        for i in range(max(self.counts)):
            # Every later turn continues on the first one's batches: a path belongs to its noise.
            yield Turn(("student",), partial(losses, i=i), batches=tuple(b for b, _ in held))

    def levels(self, count: int) -> tuple[float, ...]:
        """Levels of `count` steps from the prior down, without the clean end."""
        return tuple(1 - i / count for i in range(count))

    @torch.no_grad()
    def path(self, roles: Roles, batch: Batch) -> dict[str, Any]:
        """Times, the teacher's states at them, and the student's start."""
        process = roles.student.process
        count = self.counts[batch.draws.shared_integer(len(self.counts))]
        u = torch.tensor([*self.levels(count), 0.0], dtype=torch.float64, device=batch.draws.device)
        times = [t.expand(len(batch)) for t in process.grid(u)]
        walk = Teacher(roles.teacher, batch, self.guidance, self.solver).walk(self.between + 1)
        states = [process.prior(batch.noise(), times[0])]
        for t, s in pairwise(times):
            states.append(walk(states[-1], t, s).to(states[0].dtype))
        return {"times": times, "states": states, "student": list(states[:1])}

    def step_loss(self, roles: Roles, batch: Batch, held: dict[str, Any], i: int) -> Losses:
        """Euler step i of the student from its own detached state against the teacher's state; moves the path on."""
        t, s, path = held["times"][i], held["times"][i + 1], held["student"]
        x = path[i]
        moved = ask(roles.student, x, t, s, batch.cond).at(s)
        path[i + 1 :] = [moved.detach().to(x.dtype)]
        return Losses({"follow": distance(moved, held["states"][i + 1], self.distance)})

    def sampler(self) -> Sampler:
        return Sampler(kind="map", steps=self.levels(self.counts[0]), counts=self.counts)
