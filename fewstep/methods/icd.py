"""iCD: Invertible Consistency Distillation (arXiv 2406.14539): a student that decodes and one that encodes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.jump import ask
from fewstep.algebra.noising import add_noise
from fewstep.algebra.process import Process
from fewstep.algebra.sampling import Sampler
from fewstep.config import Count, part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.networks.roles import Roles
from fewstep.objectives.legs import Scale, Teacher, check_scale, drawn, ends, middle, student_leg
from fewstep.objectives.trajectory import Distance, distance, two_leg


def boundaries(knots: int = 50, count: int = 4, table: int = 1000) -> tuple[list[int], list[int]]:
    """Table indices of the decoder's and the encoder's boundaries: the ends of ceil(knots / count) knots each."""
    step, size = table // knots, -(-knots // count)
    ends = [step * min(size * (j + 1), knots) - 1 for j in range(count)]
    return [0, *ends[:-1]], ends


@part("method", "icd")
class ICD:
    """Consistency to the nearest boundary in both directions; cycles through both students return."""

    cites: ClassVar[tuple[str, ...]] = ("2406.14539",)

    knots: Count = 50
    """DDIM knots of the solver's grid."""
    count: Count = 4
    """Boundaries, and so steps, of each direction."""
    guidance: Scale = 1.0
    """The decoder's teacher scale (official: one of 1, 8, 12, 16, 20); the encoder's is always unguided, which
    inversion needs (sec. 3.2)."""
    embed_guidance: bool = False
    """True: the decoder takes the scale as its input w."""
    dynamic: tuple[float, float] | None = None
    """Sampling with dynamic guidance between these levels (see Sampler); needs embed_guidance."""
    distance: Distance = "huber"
    """How the two answers are compared: huber is LCM's, of every element; huber_sample iCT's, of a sample's norm."""
    c: float = 1e-3
    """c of the pseudo-Huber distances, in units of the data (which lies in [-1, 1]); mse and l1 have none."""
    preserve_forward: float = 1.5
    """Weight of decode-then-encode returning to its start, unguided (official 1.5)."""
    preserve_reverse: float = 1.5
    """Weight of encode-then-decode returning to its start, unguided (official 1.5)."""
    start: float = 0.02
    """Level at which the encoder begins, and decoding ends for it (official: index 19 of 1000): at the clean end
    itself a network that answers by eps knows nothing."""

    def __post_init__(self) -> None:
        check_scale(self.guidance)
        if not 0 < self.start <= 1 / self.knots:
            raise ValueError(f"start must lie in the first knot, (0, {1 / self.knots:g}], not {self.start}")
        if self.dynamic is not None:
            if not self.embed_guidance:
                raise ValueError("dynamic needs embed_guidance: true, so that the scale can change from step to step")
            if not 0 <= self.dynamic[0] <= self.dynamic[1] <= 1:
                raise ValueError(f"dynamic must satisfy 0 <= low <= high <= 1, not {list(self.dynamic)}")

    def needs(self) -> Needs:
        return Needs(frozenset({"teacher", "student", "forward"}), data=True)

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student", "forward"), lambda batch: self.losses(roles, batch))

    def edges(self, process: Process) -> Tensor:
        """Boundaries from the clean end up, process times float64 (count + 1,)."""
        _, ends = boundaries(self.knots, self.count)
        return process.grid((torch.tensor([-1, *ends], dtype=torch.float64) + 1) / 1000)

    def losses(self, roles: Roles, batch: Batch) -> Iterator[Losses]:
        process: Any = roles.student.process
        draws, edges = batch.draws, self.edges(process).to(batch.draws.device)
        k = draws.integers(self.knots)
        above, below = process.grid((k + 1).double() / self.knots), process.grid(k.double() / self.knots)
        x0, eps = batch.data(), batch.noise()
        scale = drawn(self.guidance, draws)
        guide = {"w": above * 0 + scale} if self.embed_guidance else {}
        plain = {"w": torch.ones_like(above)} if self.embed_guidance else {}
        decode = student_leg(roles.student, batch.cond, **guide)
        # An encoder without guidance is the inverse of a decoder without.
        unguided = student_leg(roles.student, batch.cond, **plain)
        encode = student_leg(roles.forward, batch.cond)
        floor = edges[(torch.searchsorted(edges, below, right=True) - 1).clamp_min(0)]
        ceiling = edges[torch.searchsorted(edges, above).clamp_max(len(edges) - 1)]
        start = self.begin(below, process)
        x_above, x_below = (add_noise(process, x0, eps, t)[0] for t in (above, start))
        guided = Teacher(roles.teacher, batch, scale)
        target = two_leg(guided.step, decode, x_above, above, below, floor)
        losses = Losses({"decode": distance(decode(x_above, above, floor), target, self.distance, self.c)})
        target = two_leg(Teacher(roles.teacher, batch).step, encode, x_below, start, above, ceiling)
        losses["encode"] = distance(encode(x_below, start, ceiling), target, self.distance, self.c)
        for weight, first, second, name, a, b in (
            (self.preserve_forward, unguided, encode, "preserve_forward", ceiling, floor),
            (self.preserve_reverse, encode, unguided, "preserve_reverse", floor, ceiling),
        ):
            if weight:
                a, b = self.begin(a, process), self.begin(b, process)
                x, _ = add_noise(process, x0, batch.noise(), a)
                with torch.no_grad():
                    gone = first(x, a, b)
                losses[name] = weight * distance(second(gone, b, a), x, self.distance, self.c)
        yield losses

    def begin(self, t: Tensor, process: Process) -> Tensor:
        """t, at least the time of the level `start`."""
        return torch.maximum(t, process.grid(torch.full_like(t, self.start)))

    def sampler(self) -> Sampler:
        levels = tuple((e + 1) / 1000 for e in reversed(boundaries(self.knots, self.count)[1]))
        # With a scale that falls, the largest trained one is what it falls from.
        scale = middle(self.guidance) if self.dynamic is None else ends(self.guidance)[1]
        return Sampler(
            kind="map",
            steps=levels,
            guidance=scale if self.embed_guidance else None,
            dynamic=self.dynamic,
        )


@torch.no_grad()
def invert(method: ICD, forward: Any, x: Tensor, cond: Any = None) -> Tensor:
    """Encode clean samples x (b, *d) to noise in `count` calls of the trained role `forward`, unguided."""
    process = forward.process
    edges = method.edges(process).to(x.device)
    t = method.begin(edges[0].expand(len(x)), process)
    for edge in edges[1:]:
        s = edge.expand(len(x))
        x, t = ask(forward, x, t, s, cond).at(s), s
    return x
