"""iCD: Invertible Consistency Distillation (arXiv 2406.14539): a student that decodes and one that encodes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.jump import ask
from fewstep.algebra.process import Process, add_noise
from fewstep.algebra.sampling import Sampler
from fewstep.config import part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.networks.roles import Roles
from fewstep.objectives.legs import Teacher, between, student_leg
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

    knots: PositiveInt = 50
    """DDIM knots of the solver's grid."""
    count: PositiveInt = 4
    """Boundaries, and so steps, of each direction."""
    guidance: tuple[float, float] = (1.0, 1.0)
    """Range of the decoder's teacher scale; the encoder's is always unguided, which inversion needs (sec. 3.2)."""
    embed_guidance: bool = False
    """True: the decoder takes the scale as its input w."""
    dynamic: tuple[float, float] | None = None
    """Sampling with dynamic guidance between these levels (see Sampler); needs embed_guidance."""
    distance: Distance = "huber"
    c: float = 1e-3
    preserve_forward: float = 0.0
    """Weight of decode-then-encode returning to its start."""
    preserve_reverse: float = 0.0
    """Weight of encode-then-decode returning to its start."""

    def __post_init__(self) -> None:
        if self.dynamic is not None:
            if not self.embed_guidance:
                raise ValueError(
                    "dynamic needs embed_guidance: true, so that the scale can change from step to step"
                )
            if not 0 <= self.dynamic[0] < self.dynamic[1] <= 1:
                raise ValueError(f"dynamic must satisfy 0 <= low < high <= 1, not {list(self.dynamic)}")

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
        low, high = self.guidance
        scale = low if low == high else between(draws, above * 0 + low, above * 0 + high)
        call = {"w": above * 0 + scale} if self.embed_guidance else {}
        decode = student_leg(roles.student, batch.cond, **call)
        encode = student_leg(roles.forward, batch.cond)
        floor = edges[(torch.searchsorted(edges, below, right=True) - 1).clamp_min(0)]
        ceiling = edges[torch.searchsorted(edges, above).clamp_max(len(edges) - 1)]
        x_above, x_below = (add_noise(process, x0, eps, t)[0] for t in (above, self.start(below, process)))
        guided = Teacher(roles.teacher, batch, scale)
        target = two_leg(guided.step, decode, x_above, above, below, floor)
        losses = Losses({"decode": distance(decode(x_above, above, floor), target, self.distance, self.c)})
        plain, start = Teacher(roles.teacher, batch), self.start(below, process)
        target = two_leg(plain.step, encode, x_below, start, above, ceiling)
        losses["encode"] = distance(encode(x_below, start, ceiling), target, self.distance, self.c)
        for weight, first, second, name, a, b in (
            (self.preserve_forward, decode, encode, "preserve_forward", ceiling, floor),
            (self.preserve_reverse, encode, decode, "preserve_reverse", floor, ceiling),
        ):
            if weight:
                a, b = self.start(a, process), self.start(b, process)
                x, _ = add_noise(process, x0, batch.noise(), a)
                with torch.no_grad():
                    gone = first(x, a, b)
                losses[name] = weight * distance(second(gone, b, a), x, self.distance, self.c)
        yield losses

    def start(self, t: Tensor, process: Process) -> Tensor:
        """t, but never the clean end itself, where a network that answers by eps knows nothing."""
        return torch.maximum(t, process.grid(torch.full_like(t, 0.2 / self.knots)))

    def sampler(self) -> Sampler:
        levels = tuple((e + 1) / 1000 for e in reversed(boundaries(self.knots, self.count)[1]))
        middle = sum(self.guidance) / 2 if self.embed_guidance else None
        # With a scale that falls, the largest trained one is what it falls from.
        top = middle if self.dynamic is None else self.guidance[1]
        return Sampler(kind="map", steps=levels, guidance=top, dynamic=self.dynamic)


@torch.no_grad()
def invert(method: ICD, forward: Any, x: Tensor, cond: Any = None) -> Tensor:
    """Encode clean samples x (b, *d) to noise in `count` calls of the trained role `forward`, unguided."""
    process = forward.process
    edges = method.edges(process).to(x.device)
    t = method.start(edges[0].expand(len(x)), process)
    for edge in edges[1:]:
        s = edge.expand(len(x))
        x, t = ask(forward, x, t, s, cond).at(s), s
    return x
