"""FD-loss: the Frechet distance of features as a loss, over a population larger than a batch (arXiv 2604.28190)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws
from fewstep.algebra.rollout import Path, rollout
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.times import check_steps
from fewstep.config import Count, NotNegative, Proper, part
from fewstep.data.base import Data
from fewstep.methods.method import Losses, Needs, Turn
from fewstep.methods.population import Populations
from fewstep.networks.representation import Representation
from fewstep.networks.roles import Roles
from fewstep.objectives.reduce import everywhere


@part("method", "fd_loss")
class FDLoss:
    """Move the student's features to the data's mean and covariance, in one or several representations at once.

    No teacher and no critic: a start that makes samples already is all it needs. What is trained on says nothing about
    quality any more, so the distance in another representation, `beside`, is read at every update.
    """

    cites: ClassVar[tuple[str, ...]] = ("2604.28190",)

    steps: tuple[float, ...] = (1.0,)
    """Levels u the student is sampled at; the last step alone has the gradient."""
    path: Path = "renoise"
    """Between several steps: fresh noise, or the noise that a step predicts."""
    representations: tuple[Representation, ...] = (Representation(),)
    """Where the distance is taken; the losses are added, each divided by its own value."""
    weights: tuple[NotNegative, ...] = ()
    """One a representation; all 1 when left out."""
    beside: Representation = Representation(of="waves-0")
    """A representation that is not trained on, read as fd/NAME beside the others."""
    population: Literal["average", "queue"] = "average"
    """Where the moments come from: an average of those of past batches, or a queue of past features."""
    decay: Proper = 0.999
    """Of the average (official script: 0.999)."""
    size: Count = 2048
    """Samples of the student that begin the population, and the length of a queue (paper: 50,000)."""
    real: Count = 10_000
    """Samples of the data that their moments are taken of, drawn once (paper: all, ahead of the training)."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if not self.representations:
            raise ValueError("representations is empty; name at least one")
        if self.weights and len(self.weights) != len(self.representations):
            raise ValueError(
                f"weights: {len(self.weights)} for {len(self.representations)} representations; give one each, or none"
            )
        names = [r.of for r in self.representations]
        if len(set(names)) < len(names):
            raise ValueError(f"representations: {max(names, key=names.count)} stands there twice; a name is read once")
        if self.beside.of in names:
            raise ValueError(f"beside: {self.beside.of} is trained on, so it is no witness; name another representation")

    def needs(self) -> Needs:
        parts = (*self.representations, self.beside)
        return Needs(frozenset({"student"}), data=True, state=self.made, parts=parts)

    def made(self, data: Data) -> Populations:
        """A population of each representation, that of `beside` last."""
        features = [r.open(tuple(data.shape)) for r in (*self.representations, self.beside)]
        return Populations(features, data, self.decay if self.population == "average" else None, self.size, self.real)

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        roles.state.fill(partial(self.samples, roles, grad=False))
        seen: list[list[Tensor]] = []
        yield Turn(("student",), lambda batch: self.losses(roles, batch, seen))
        # Once an update, over its micro-batches and processes, so that it does not count how they are split.
        for population, told in zip(roles.state.of if seen else (), zip(*seen, strict=True), strict=True):
            population.add(everywhere(torch.cat(told)))

    def sampler(self) -> Sampler:
        return Sampler(kind=self.path, steps=self.steps)

    def samples(self, roles: Roles, draws: Draws, shape: tuple[int, ...], cond: Any, grad: bool = True) -> Tensor:
        """Whole samples (b, *shape) of the student."""
        last = len(self.steps) - 1
        return rollout(roles.student, draws, shape, self.steps, cond, exit=last, grad=grad, path=self.path).x

    def losses(self, roles: Roles, batch: Batch, seen: list[list[Tensor]]) -> Iterator[Losses]:
        """FD / (sg FD + 0.01) of every representation; all distances are read as fd/NAME.

        The features (b, dim) of this process go to `seen`, a tensor a representation.
        """
        state = roles.state
        x = self.samples(roles, batch.draws, batch.shape, batch.cond)
        weights, losses = self.weights or (1.0,) * len(self.representations), Losses()
        told: list[Tensor] = []
        for i, (features, population) in enumerate(zip(state.features, state.of, strict=True)):
            own = features(x if i < len(weights) else x.detach())
            distance = population.distance(own, everywhere(own))
            if i < len(weights):
                losses[f"frechet/{features.name}"] = (weights[i] * distance / (distance.detach() + 0.01)).to(x.dtype)
            losses.log[f"fd/{features.name}"] = distance.detach()
            told.append(own.detach())
        seen.append(told)
        yield losses
