"""Chains of two helices and the hinge between them, as C-alpha traces are drawn: points (n, 3), synthetic."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.points import centred
from fewstep.config import Count, NotNegative, part
from fewstep.data.base import Conditions

BOND = 3.8
"""Angstrom between neighbours of a chain: C-alpha atoms of a trans peptide."""
RISE, TURN = 1.5, math.radians(100)
"""Of the alpha helix, Angstrom along the axis and angle about it, per residue."""
HINGE = 3
"""Bonds between the helices whose angles are free."""
UNIT = 10.0
"""Angstrom in one unit of the samples, which are in nanometres."""
REFERENCE = 4000
"""Samples of `all`."""


def helix_angles() -> tuple[float, float]:
    """(angle between one bond and the next, torsion) of the helix of BOND, RISE and TURN, in radians.

    Its radius follows, 2.279 Angstrom (of real helices 2.3).
    """
    radius = math.sqrt(BOND**2 - RISE**2) / (2 * math.sin(TURN / 2))
    k = torch.arange(4, dtype=torch.float64)
    points = torch.stack((radius * torch.cos(TURN * k), radius * torch.sin(TURN * k), RISE * k), -1)
    a, b, c = points.diff(dim=0)
    first, second = torch.linalg.cross(a, b), torch.linalg.cross(b, c)
    torsion = torch.atan2(b.norm() * (a @ second), first @ second)
    return float(torch.acos(a @ b / BOND**2)), float(torsion)


def turns_of(turn: Tensor, torsion: Tensor) -> Tensor:
    """(*b, 3, 3): the rotation by torsion (*b,) about the first axis, after that by turn (*b,) about the third."""
    ct, st, cp, sp = torch.cos(turn), torch.sin(turn), torch.cos(torsion), torch.sin(torsion)
    zero = torch.zeros_like(turn)
    entries = (ct, -st, zero, cp * st, cp * ct, -sp, sp * st, sp * ct, cp)
    return torch.stack(entries, -1).unflatten(-1, (3, 3))


def orientations(draws: Draws) -> Tensor:
    """Uniform rotations (b, 3, 3), float64: unit quaternions."""
    w, x, y, z = torch.nn.functional.normalize(draws.normal(4, dtype=torch.float64), dim=1).unbind(1)
    entries = (
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack(entries, 1).reshape(-1, 3, 3)


def chain(turn: Tensor, torsion: Tensor, frame: Tensor) -> Tensor:
    """Points (b, n + 2, 3) in Angstrom from n angles between bonds and n torsions (b, n), the first torsion unused.

    frame (b, 3, 3): its first column is the direction of the first bond. Every bond is BOND long.
    """
    directions = [frame[:, :, 0]]
    for step in turns_of(turn, torsion).unbind(1):
        frame = frame @ step
        directions.append(frame[:, :, 0])
    steps = BOND * torch.stack(directions, 1)
    return torch.cat((torch.zeros_like(steps[:, :1]), steps.cumsum(1)), 1)


@part("data", "helices")
class Helices:
    """Synthetic chains: an alpha helix, a hinge of three free bonds, another helix, turned at random. No real protein.

    All bonds are 3.8 Angstrom, .38 in the samples' nanometres. The hinge stands anywhere in the middle half of a chain.
    """

    points: Count = 32
    """n of a sample (n, 3)."""
    shortest: Count | None = None
    """Lengths are uniform from this to `points`, the rest is padding and cond["points"] says so; left out, all are
    `points`."""
    flex: NotNegative = 0.05
    """Standard deviation of every angle of the helices, radians."""
    turned: bool = True
    """Chains point anywhere; false: the first bond lies along the first axis."""

    def __post_init__(self) -> None:
        least = self.points if self.shortest is None else self.shortest
        if not 8 <= least <= self.points:
            raise ValueError(f"points {self.points}, shortest {self.shortest}: chains have at least 8 points")

    @property
    def conditions(self) -> Conditions:
        return "none" if self.shortest is None else "points"

    def outline(self) -> tuple[tuple[int, ...], int]:
        """As `open` has them."""
        return (self.points, 3), 0

    def open(self) -> HelicesData:
        return HelicesData(self)


class HelicesData:
    """Samples float32 (b, n, 3), centred over the points that are there, zeros at padding; exact draws without end."""

    classes = 0

    def __init__(self, spec: Helices) -> None:
        self.spec = spec
        self.shape: tuple[int, ...] = (spec.points, 3)
        self.masked = spec.shortest is not None

    def _lengths(self, draws: Draws) -> Tensor:
        """int64 (b,)."""
        spec = self.spec
        if spec.shortest is None:
            return torch.full((len(draws),), spec.points, device=draws.device)
        return spec.shortest + draws.integers(spec.points - spec.shortest + 1)

    def _mask(self, lengths: Tensor) -> Any:
        if not self.masked:
            return None
        there = torch.arange(self.spec.points, device=lengths.device) < lengths[:, None]
        return {"points": there.float()}

    def batch(self, draws: Draws) -> tuple[Tensor, Any]:
        spec, lengths = self.spec, self._lengths(draws)
        cond, n = self._mask(lengths), spec.points - 2
        turn, torsion = helix_angles()
        start = ((0.25 + 0.5 * draws.uniform()) * lengths).long()
        place = torch.arange(n, device=draws.device)
        free = (place >= start[:, None]) & (place < start[:, None] + HINGE)
        jitter = spec.flex * draws.normal(2, n, dtype=torch.float64)
        loose = draws.uniform(2, n)
        # 20 to 60 degrees between bonds: more of them would fold chains back into themselves (2.8 % of them do).
        turns = torch.where(free, math.pi * (1 + 2 * loose[:, 0]) / 9, turn + jitter[:, 0])
        torsions = torch.where(free, 2 * math.pi * loose[:, 1], torsion + jitter[:, 1])
        still = torch.eye(3, dtype=torch.float64, device=draws.device).expand(len(draws), 3, 3)
        frame = orientations(draws) if spec.turned else still
        x = chain(turns, torsions, frame) / UNIT
        return centred(x, None if cond is None else cond["points"]).float(), cond

    def conditions(self, draws: Draws) -> Any:
        return self._mask(self._lengths(draws))

    def null(self, cond: Any) -> Any:
        """There is none: lengths are no matter of guidance."""
        return None

    def all(self) -> tuple[Tensor, Tensor | None]:
        """4,000 samples of a fixed seed."""
        return self.batch(Draws(fold("helices reference"), torch.arange(REFERENCE)))[0], None
