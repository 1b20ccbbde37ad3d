"""Random numbers that depend on what they are for, not on who draws them or when.

Every draw is a pure function of (seed, stage, step, turn, repeat, draw number, global sample index, element),
so results do not change with world size, batch split, device or a restart, and resuming needs no generator state.
The bits are SplitMix64 (Steele, Lea and Flood 2014): a counter with an odd increment and a 64-bit finaliser.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift(x: Tensor, n: int) -> Tensor:
    """Logical right shift: torch's int64 shift keeps the sign."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _signed(_FACTORS[0])
    z = (z ^ _shift(z, 27)) * _signed(_FACTORS[1])
    return z ^ _shift(z, 31)


def _bits_torch(index: Tensor, key: int, count: int) -> Tensor:
    """(b, count) int64 with 64 random bits each, on any device."""
    rows = _mix(_mix(index * _signed(_GAMMA) + _signed(key)))
    counter = torch.arange(1, count + 1, device=index.device, dtype=torch.int64) * _signed(_GAMMA)
    return _mix(rows[:, None] + counter[None])


def _mix_numpy(z: np.ndarray) -> np.ndarray:
    """`_mix` in place."""
    z ^= z >> np.uint64(30)
    z *= np.uint64(_FACTORS[0])
    z ^= z >> np.uint64(27)
    z *= np.uint64(_FACTORS[1])
    z ^= z >> np.uint64(31)
    return z


def _bits_numpy(index: Tensor, key: int, count: int) -> Tensor:
    """The same bits on the CPU, where numpy's unsigned integers take half the time."""
    rows = _mix_numpy(_mix_numpy(index.numpy().astype(np.uint64) * np.uint64(_GAMMA) + np.uint64(key)))
    counter = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GAMMA)
    return torch.from_numpy(_mix_numpy(rows[:, None] + counter[None]).view(np.int64))


def fold(*parts: int | str) -> int:
    """A 64-bit key of a tuple of integers and names.

    >>> fewstep.fold("train", 3) == fewstep.fold("train", 3), fewstep.fold("train", 3) == fewstep.fold("train", 4)
    (True, False)
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class Draws:
    """The random numbers of one (micro-)batch: rows belong to global sample indices.

    Successive calls give independent numbers; the same sequence of calls gives the same numbers.

    Args:
        key: from `fold(seed, stage, step, turn, repeat)`.
        index: global sample indices of this batch, int64 (b,).

    >>> draws = fewstep.Draws(fewstep.fold("example"), torch.arange(6))
    >>> draws.normal(1, 8, 8).shape, draws.uniform().shape
    (torch.Size([6, 1, 8, 8]), torch.Size([6]))
    >>> whole = fewstep.Draws(7, torch.arange(6)).normal(2)
    >>> part = fewstep.Draws(7, torch.arange(4, 6)).normal(2)
    >>> whole[4:].equal(part)  # rows belong to samples, not to batches
    True
    """

    def __init__(self, key: int, index: Tensor, *, calls: int = 0) -> None:
        self.key = key
        self.index = index
        self._calls = calls

    def __len__(self) -> int:
        return int(self.index.shape[0])

    @property
    def device(self) -> torch.device:
        return self.index.device

    def _next(self) -> int:
        self._calls += 1
        return fold(self.key, self._calls)

    def _bits(self, count: int) -> Tensor:
        """(b, count) int64 with 64 random bits each."""
        plain = type(self.index) is Tensor and self.device.type == "cpu"  # a fake tensor (`plan`) has no numbers
        bits = _bits_numpy if plain else _bits_torch
        return bits(self.index, self._next(), count)

    def uniform(self, *shape: int) -> Tensor:
        """float64 in (0, 1), shape (b, *shape)."""
        count = math.prod(shape)
        # 52 bits and a half: with 53 the largest value would round to 1.
        return ((_shift(self._bits(count), 12).double() + 0.5) * 2.0**-52).reshape(len(self), *shape)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers of shape (b, *shape), by Box and Muller from pairs of 32-bit uniforms."""
        count = math.prod(shape)
        bits = self._bits((count + 1) // 2)
        work = torch.float64 if dtype == torch.float64 else torch.float32
        radius = torch.sqrt(-2 * torch.log((_shift(bits, 32).to(work) + 0.5) * 2.0**-32))
        angle = ((bits & 0xFFFFFFFF).to(work) + 0.5) * (2 * math.pi * 2.0**-32)
        both = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1)
        return both.reshape(len(self), -1)[:, :count].reshape(len(self), *shape).to(dtype)

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal numbers of x's shape and dtype (float32 for half precision)."""
        return self.normal(*x.shape[1:], dtype=torch.promote_types(x.dtype, torch.float32))

    def integers(self, high: int) -> Tensor:
        """int64 (b,) uniform in [0, high)."""
        return (self.uniform() * high).long().clamp_max(high - 1)

    def shared_integer(self, high: int) -> int:
        """One integer in [0, high) that every sample, micro-batch and rank of this update agrees on."""
        return fold(self._next(), "shared") % high
