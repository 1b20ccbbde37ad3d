"""Moments of a population larger than a batch: what a student's features were lately, and the data's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.algebra.draws import Draws, fold
from fewstep.data.base import Data
from fewstep.networks.representation import Features
from fewstep.objectives.frechet import gaussian_frechet, root

ROWS = 256
"""Samples a call, while populations are filled."""


class Population(nn.Module):
    """Mean and covariance of a student's features, by an average or a queue, beside those of the data; all float64.

    Args:
        dim: number of features.
        decay: of the average of the moments; None keeps a queue of features.
        size: rows of the queue.
    """

    real_mean: Tensor
    real_root: Tensor
    mean: Tensor
    second: Tensor
    rows: Tensor
    place: Tensor

    def __init__(self, dim: int, decay: float | None, size: int) -> None:
        super().__init__()
        self.decay = decay
        shapes = {"real_mean": (dim,), "real_root": (dim, dim)}
        shapes |= {"rows": (size, dim)} if decay is None else {"mean": (dim,), "second": (dim, dim)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def set_real(self, features: Tensor) -> None:
        """Moments of the data's features (n, dim)."""
        mean, second = moments(features)
        self.real_mean.copy_(mean)
        self.real_root.copy_(root(second - torch.outer(mean, mean)))

    @torch.no_grad()
    def start(self, features: Tensor) -> None:
        """Begin with a student's features (n, dim); a queue takes `size` rows, over again where there are fewer."""
        if self.decay is None:
            self.rows.copy_(features[torch.arange(len(self.rows), device=features.device) % len(features)])
        else:
            for held, fresh in zip((self.mean, self.second), moments(features), strict=True):
                held.copy_(fresh)

    def distance(self, features: Tensor, batch: Tensor) -> Tensor:
        """The Frechet distance of the population, with a batch's features in it, from the data; a scalar.

        Args:
            features: float64 (b, dim), of this process, with the gradient.
            batch: (processes b, dim), those of all processes; with one process the same.

        Its gradient is as if the whole population moved as the batch does: that of the batch's share in it, divided by
        the share. So it does not shrink with the population, which only Adam would make good.
        """
        mean, second = self.mixed(batch)
        ours = moments(features)
        mean, second = (m.detach() + (own - own.detach()) for m, own in zip((mean, second), ours, strict=True))
        return gaussian_frechet(mean, second - torch.outer(mean, mean), self.real_mean, self.real_root)

    @torch.no_grad()
    def mixed(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """First and second moments of the population with the batch in it."""
        ours = moments(features)
        if self.decay is None:
            rest = self.rows[self._others(len(features))]
            return moments(torch.cat((rest, features)))
        held = (self.mean, self.second)
        return tuple(self.decay * a + (1 - self.decay) * b for a, b in zip(held, ours, strict=True))  # type: ignore[return-value]

    @torch.no_grad()
    def add(self, features: Tensor) -> None:
        """Put a batch's features into the population; those that are not finite would stay in it, and are left out."""
        if not bool(torch.isfinite(features).all()):
            return
        if self.decay is None:
            count = min(len(features), len(self.rows))
            where = (self.place + torch.arange(count, device=features.device)) % len(self.rows)
            self.rows[where] = features[:count]
            self.place.copy_((self.place + count) % len(self.rows))
        else:
            for held, fresh in zip((self.mean, self.second), self.mixed(features), strict=True):
                held.copy_(fresh)

    def _others(self, count: int) -> Tensor:
        """Rows of the queue that a batch of `count` does not replace, oldest last."""
        kept = max(0, len(self.rows) - count)
        return (self.place + count + torch.arange(kept, device=self.rows.device)) % len(self.rows)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and mean of outer products (d, d) of features (n, d)."""
    return features.mean(0), features.T @ features / len(features)


class Populations(nn.Module):
    """One population a representation. The features are no part of a checkpoint, whose moments stand for them."""

    filled: Tensor

    def __init__(self, features: Sequence[Features], data: Data, decay: float | None, size: int, real: int) -> None:
        super().__init__()
        self.features, self.data = tuple(features), data
        self.size, self.real = size, real
        self.of = nn.ModuleList(Population(f.dim, decay, size) for f in features)
        self.register_buffer("filled", torch.zeros((), dtype=torch.bool))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        for features in self.features:
            features._apply(fn)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def fill(self, sample: Callable[[Draws, tuple[int, ...], Any], Tensor]) -> None:
        """The moments of `real` samples of the data, and a population of `size` of sample(draws, shape, cond); once."""
        if bool(self.filled):
            return
        shape = tuple(self.data.shape)
        real = self._rows(self.real, "real", lambda draws: self.data.batch(draws)[0])
        ours = self._rows(self.size, "student", lambda draws: sample(draws, shape, self.data.conditions(draws)))
        every: list[Any] = list(self.of)
        for population, theirs, own in zip(every, real, ours, strict=True):
            population.set_real(theirs)
            population.start(own)
        self.filled.fill_(True)

    def _rows(self, count: int, name: str, make: Callable[[Draws], Tensor]) -> list[Tensor]:
        """Features float64 (count, dim) of fresh samples, a tensor a representation."""
        parts: list[list[Tensor]] = []
        for first in range(0, count, ROWS):
            index = torch.arange(first, min(first + ROWS, count), device=self.filled.device)
            x = make(Draws(fold("population", name), index))
            parts.append([features(x) for features in self.features])
        return [torch.cat(rows) for rows in zip(*parts, strict=True)]
