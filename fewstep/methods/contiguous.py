"""PPCL: each block that replaces a run of blocks learns what the run does, all at once (arXiv 2511.16156)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from fewstep.algebra.batch import Batch
from fewstep.algebra.noising import add_noise
from fewstep.algebra.sampling import Sampler, many_step
from fewstep.algebra.times import TimesPart, Uniform
from fewstep.config import Count, part
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.terms import dropped
from fewstep.networks.blocks import intervals_of, replaced, streams, watched
from fewstep.networks.roles import Roles


@part("method", "contiguous")
class Contiguous:
    """The depth part of PPCL. The student is `pruned`; what it shares with the whole network stays as it is."""

    cites: ClassVar[tuple[str, ...]] = ("2511.16156",)

    of: str = "teacher"
    """Role with all blocks."""
    norm: Literal["l2", "none"] = "l2"
    """l2: hidden states are compared on the unit sphere, as published, so that their size is free; none: as they are."""
    times: TimesPart = Uniform(low=0.0, high=1.0)
    """Noise levels at which the networks are called; the published run has those of its teacher's training."""
    drop_cond: float = 0.1
    """Probability that a sample is without its condition."""
    check_every: Count = 10
    """Updates between two readings of the assembled student's x0 error, a call of it."""
    sample_steps: Count = 18
    """Steps of the Heun sampler that shows its progress."""

    def __post_init__(self) -> None:
        if not 0 <= self.drop_cond <= 1:
            raise ValueError(f"drop_cond must lie in [0, 1], not {self.drop_cond}")

    def needs(self) -> Needs:
        return Needs(frozenset({"student", self.of}), data=True, frozen=frozenset({"teacher", self.of}))

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        yield Turn(("student",), lambda batch: self.losses(roles, batch, step))

    def losses(self, roles: Roles, batch: Batch, step: int) -> Iterator[Losses]:
        student, whole = roles.student, roles[self.of]
        intervals = intervals_of(student)
        if not intervals:
            raise ValueError("method contiguous trains the blocks of a network `pruned`, and the student is another")
        process: Any = student.process
        t, x0 = self.times.sample(batch.draws, process), batch.data()
        x_t, _ = add_noise(process, x0, batch.noise(), t)
        cond = dropped(batch, self.drop_cond)
        with torch.no_grad(), watched(whole, intervals) as calls:
            target = whole(x_t, t, cond).x0
        losses = Losses()
        for (u, v), block, call in zip(intervals, replaced(student), calls, strict=True):
            ours, theirs = streams(block(*call.args, **call.kwargs)), streams(call.output)
            gaps = [apart(a, b, self.norm) for a, b in zip(ours, theirs, strict=True)]
            losses[f"blocks_{u}_{v}"] = torch.stack(gaps).sum()
        if step % self.check_every == 0:
            with torch.no_grad():
                losses.log["output_mse"] = (student(x_t, t, cond).x0 - target).square().mean()
        yield losses

    def sampler(self) -> Sampler:
        return many_step(self.sample_steps)


def apart(ours: Tensor, theirs: Tensor, norm: Literal["l2", "none"]) -> Tensor:
    """The mean over samples and tokens of hidden states (b, ..., width), a scalar.

    l2: |a / |a| - b / |b||^2, 0 to 4; none: the mean over channels of (a - b)^2.
    """
    a, b = ours.float(), theirs.float()
    if norm == "none":
        return (a - b).square().mean()
    return (functional.normalize(a, dim=-1) - functional.normalize(b, dim=-1)).square().sum(-1).mean()
